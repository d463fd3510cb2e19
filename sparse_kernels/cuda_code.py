"""The CUDA kernels, compiled on the machine that uses them: for a library built without nvcc.

NVRTC, NVIDIA's compiler as a library, makes of the kernels' text, which the package carries, what
nvcc would have made at the build. It takes a minute or so; the result is kept on disk.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from types import ModuleType

import platformdirs

import sparse_kernels
from sparse_kernels.native import REINSTALL, NativeLibraryError

ENTRY = "kernels.cu"
WAY_OUT = (
    "Install it with pip install 'sparserve[cuda]', or install sparserve again on a machine with "
    "nvcc 12 or newer"
)
LOG_LINES = 10


def compile_kernels(capability: int) -> bytes:
    """Return machine code (a cubin) of all kernels for GPUs of a compute capability, 90 for 9.0.

    Compiled only once for each text of the kernels, capability and version of NVRTC.

    Raises NativeLibraryError, with the way out, where NVRTC is missing or the text does not compile.
    """
    core, version = _nvrtc()
    folder = _find_texts()
    kept = _cache_dir() / f"{_key(folder, capability, version)}.cubin"
    if kept.is_file():
        return kept.read_bytes()
    image = _compile(core, folder, capability, version)
    _keep(kept, image)
    return image


def _nvrtc() -> tuple[ModuleType, str]:
    """cuda.core, and the version of the compiler behind it, such as 13.0."""
    try:
        import cuda.core
        from cuda.bindings import nvrtc

        # The compiler itself is a package of its own, which is looked for at the first call.
        status, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise NativeLibraryError(
            "this sparserve was built without nvcc, so its CUDA kernels are compiled at first "
            f"use, and NVRTC, which does it, cannot be used: {error}. {WAY_OUT}."
        ) from error
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise NativeLibraryError(f"NVRTC does not tell its version: {status.name}. {WAY_OUT}.")
    return cuda.core, f"{major}.{minor}"


def _find_texts() -> Path:
    # An editable install has two entries, and the text is only in the source tree.
    folders = [Path(entry) / "cuda" for entry in sparse_kernels.__path__]
    for folder in folders:
        if (folder / ENTRY).is_file():
            return folder
    searched = ", ".join(map(str, folders))
    raise NativeLibraryError(f"{ENTRY} is not in {searched}. {REINSTALL}.")


def _key(folder: Path, capability: int, version: str) -> str:
    """Of all that the machine code depends on."""
    digest = hashlib.sha256(f"sm_{capability} NVRTC {version}".encode())
    texts = [*folder.glob("*.cu"), *folder.glob("*.cuh"), folder / "arguments.hpp"]
    for path in sorted(texts):
        text = path.read_bytes()
        digest.update(f"\n{path.name} {len(text)}\n".encode() + text)
    return digest.hexdigest()


def _compile(core: ModuleType, folder: Path, capability: int, version: str) -> bytes:
    # As the build has it (cmake/cuda_image.cmake): sums that are fused in one place and not in
    # another would make bits depend on the shape of a call.
    options = core.ProgramOptions(
        name=ENTRY, std="c++17", arch=f"sm_{capability}", fma=False, include_path=str(folder)
    )
    try:
        text = (folder / ENTRY).read_text()
        return bytes(core.Program(text, "c++", options).compile("cubin").code)
    except (RuntimeError, ValueError) as error:
        # cuda.core puts the compiler's log behind its own message.
        log = "\n".join(str(error).splitlines()[:LOG_LINES])
        raise NativeLibraryError(
            f"NVRTC {version} cannot compile the CUDA kernels for sm_{capability}: {log}\n"
            "Install another version of it (pip install 'sparserve[cuda]'), or sparserve again on "
            "a machine with nvcc 12 or newer."
        ) from error


def _cache_dir() -> Path:
    """`$SPARSERVE_CACHE_DIR/kernels`, or `sparserve/kernels` in the user's cache folder."""
    override = os.environ.get("SPARSERVE_CACHE_DIR")
    return Path(override or platformdirs.user_cache_dir("sparserve")) / "kernels"


def _keep(path: Path, image: bytes) -> None:
    """Written whole: another process may look at any time. Where it cannot be written, it is not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(image)
                file.close()
                os.replace(file.name, path)
            except OSError:
                os.unlink(file.name)
                raise
    except OSError:
        return  # a read-only or full disk costs the next start its time, not this one its service
