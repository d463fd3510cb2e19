"""What fits: the weights on a GPU, and the KV cache in what they leave."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from sparse_kernels.device import describe
from sparse_kernels.formats import DecoderFormats
from sparse_kernels.native import memory_room
from sparserve.config import EngineSettings
from sparserve.engine.block_manager import blocks_for
from sparserve.engine.formats import weight_formats, with_dtype
from sparserve.errors import ConfigError
from sparserve.model.backend import BLOCK_SIZE
from sparserve.model.loader import LoadedModel
from sparserve.model.weight_bytes import bytes_of_weights

log = logging.getLogger(__name__)

GIB = 1 << 30
# Of a GPU's memory, for what a step needs beside weights and KV: statistics of its prompts, chunks of
# attention, and CUDA graphs.
STEP_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Room:
    """Memory that a KV cache may take."""

    free: int  # bytes; more cannot be asked for
    share: int  # of these, where nobody says how much
    source: str  # of the share, in words

    @classmethod
    def of(cls, device: str, settings: EngineSettings) -> Room:
        if device == "cpu":
            free = memory_room()
            share = free // 4
            return cls(free, share, f"a quarter of the free memory ({share / GIB:.2f} GiB)")
        gpu = describe(device)
        free = max(0, gpu.free_bytes - STEP_BYTES)
        share = int(free * settings.gpu_memory_utilization)
        return cls(
            free,
            share,
            f"gpu_memory_utilization {settings.gpu_memory_utilization:g} of what the weights leave on {gpu} "
            f"({share / GIB:.2f} GiB)",
        )


def size_cache(
    settings: EngineSettings, block_bytes: int, max_context: int, device: str = "cpu"
) -> tuple[int, int]:
    """-> (KV blocks, context that fits in them). Raises ConfigError where an asked context does not fit."""
    one_context, room = blocks_for(max_context), Room.of(device, settings)
    if settings.kv_cache_gib * GIB > room.free:
        raise ConfigError(
            f"kv_cache_gib {settings.kv_cache_gib:g} is more than the {room.free / GIB:.1f} GiB of free memory"
        )
    if settings.kv_cache_gib:
        blocks = int(settings.kv_cache_gib * GIB) // block_bytes
        source, way_out = f"kv_cache_gib {settings.kv_cache_gib:g}", "raise --kv-cache-gib"
    else:
        blocks = min(settings.max_running * one_context, room.share // block_bytes)
        source = room.source
        way_out = "raise --kv-cache-gib" if device == "cpu" else "take --kv-dtype int8"
    if blocks >= one_context:
        return blocks, max_context
    needs = f"one context of {max_context} needs {one_context * block_bytes / GIB:.2f} GiB"
    holds = f"{source} holds {blocks * BLOCK_SIZE} tokens of KV cache, {needs}"
    if settings.max_context or blocks < 1:
        raise ConfigError(f"{holds}; {way_out} or lower --max-context")
    log.warning("%s: serving a context of %d; %s for more", holds, blocks * BLOCK_SIZE, way_out)
    return blocks, blocks * BLOCK_SIZE


def check_weights(
    model: LoadedModel, formats: DecoderFormats, settings: EngineSettings, device: str
) -> None:
    """Before they are read: raises ConfigError where a GPU has no room for them."""
    gpu, needed = describe(device), bytes_of_weights(model.config, formats)
    room = gpu.free_bytes - STEP_BYTES
    if needed <= room:
        return
    smaller = []
    for dtype in ("int8", "int4") if model.rounded is None else ():
        own = bytes_of_weights(model.config, weight_formats(with_dtype(settings, dtype)))
        if own < needed:
            smaller.append(f"--dtype {dtype} (about {own / GIB:.1f} GiB)")
    ways = [*smaller, "--device cpu", "--backend reference --device-map auto, which is slow"]
    raise ConfigError(
        f"the weights of {model.name} in {formats} need {needed / GIB:.1f} GiB, and {gpu} has "
        f"{max(room, 0) / GIB:.1f} GiB for them; try {' or '.join(ways)}"
    )
