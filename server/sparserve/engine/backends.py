"""Which backend computes, and on what device."""

from __future__ import annotations

import os
from typing import NamedTuple

from sparse_kernels.device import Device, usable
from sparse_kernels.native import EMULATED, NativeCallError, NativeLibraryError, cpu_features
from sparserve.config import EngineSettings
from sparserve.engine.formats import native_only, weight_formats
from sparserve.errors import ConfigError


class Chosen(NamedTuple):
    name: str  # cpu, cuda or reference
    # Why it is no faster one: of reference why neither native backend, of cpu why no GPU, of cuda "".
    reason: str
    device: str = "cpu"  # of a native backend: cpu, cuda:0, …

    @property
    def is_native(self) -> bool:
        return self.name != "reference"


def choose_backend(settings: EngineSettings, dtype: str) -> Chosen:
    """For weights of `dtype`. Raises ConfigError."""
    weight_formats(settings)  # what contradicts itself is told whatever the backend
    asked, wanted = _asked(settings), native_only(settings)
    if asked == "reference":
        if wanted is not None:
            raise ConfigError(
                f"{wanted}, which the reference backend cannot compute; take --backend cpu, or --dtype "
                "float32, bfloat16 or float16"
            )
        return Chosen("reference", "the settings ask for it")
    obstacle = _obstacle(settings, dtype)
    if obstacle is None and asked == "cuda":
        gpu = _gpu(settings)
        if isinstance(gpu, str):
            raise ConfigError(f"the cuda backend cannot be used: {gpu}; take --device cpu")
        return Chosen("cuda", "", gpu.place)
    if obstacle is None:
        obstacle = _cpu_obstacle()
        gpu = "the settings ask for it" if asked == "cpu" else _gpu_by_itself(settings)
        if isinstance(gpu, Device):
            return Chosen("cuda", "", gpu.place)
        if obstacle is None:
            return Chosen("cpu", gpu)
    native = asked or "cpu"
    if wanted is not None:
        raise ConfigError(
            f"{wanted}, which only the {native} backend computes, and it cannot be used: {obstacle}"
        )
    if asked:
        raise ConfigError(
            f"the {native} backend cannot be used: {obstacle}; or take --backend reference"
        )
    return Chosen("reference", obstacle)


def _asked(settings: EngineSettings) -> str:
    """The name of the backend that backend and device together ask for, or "". Raises ConfigError."""
    by_device = settings.device.partition(":")[0]
    if settings.backend == "reference" and by_device == "cuda":
        raise ConfigError(
            f"device is {settings.device}, and the backend is the reference one, whose weights lie where "
            f"device_map says; take --device-map {settings.device}"
        )
    if settings.backend == "auto":
        return "" if by_device == "auto" else by_device
    if by_device not in ("auto", settings.backend) and settings.backend != "reference":
        raise ConfigError(
            f"backend is {settings.backend} and device is {settings.device}; give one of them"
        )
    return settings.backend


def _obstacle(settings: EngineSettings, dtype: str) -> str | None:
    """What keeps either native backend from running, if anything."""
    if settings.device_map != "cpu":
        return f"device_map is {settings.device_map!r} and it needs cpu"
    if dtype not in ("auto", "bfloat16", "int8", "int4"):
        return f"dtype is {dtype} and it needs bfloat16, int8 or int4"
    return None


def _cpu_obstacle() -> str | None:
    """What keeps the cpu backend from running, if anything. Raises ConfigError where the instruction
    set that SPARSE_KERNELS_ISA asks for cannot be had."""
    try:
        cpu_features()
    except NativeLibraryError as error:
        return str(error)
    except NativeCallError as error:
        raise ConfigError(str(error)) from error
    return None


def _gpu_by_itself(settings: EngineSettings) -> Device | str:
    """The GPU that is taken where nobody asked for one, or what keeps it from that."""
    if os.environ.get(EMULATED):
        return f"{EMULATED} is set, and the emulator is taken only with --device cuda"
    return _gpu(settings)


def _gpu(settings: EngineSettings) -> Device | str:
    """The GPU that the settings name, else the first, or what keeps it from being used."""
    if settings.lm_head_dtype == "int4+exact":
        return "lm_head_dtype is int4+exact, which the CPU alone computes"
    try:
        return usable(settings.device if settings.device.startswith("cuda") else "cuda")
    except (NativeLibraryError, NativeCallError) as error:
        return str(error).removesuffix(".")
