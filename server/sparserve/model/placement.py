"""Which layer's weights live where: on a GPU, in main memory, or left in the checkpoint on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import get_max_memory
from torch import nn

from sparserve.errors import ConfigError
from sparserve.model.config import ModelConfig
from sparserve.model.layers_at_use import LayersAtUse
from sparserve.model.weights import LayerWeights, layer_shapes

GPU_SHARE = 0.9  # of the free memory of a GPU; the rest is for activations


@dataclass(frozen=True, slots=True)
class Placement:
    """What the operator asked for."""

    device_map: str = "cpu"  # "cpu", "auto" or the name of a torch device
    max_memory: int = 0  # bytes of weights on each device at most, 0: what is free; for "auto"


@dataclass(frozen=True, slots=True)
class DeviceMap:
    """Where weights live. Embedding, norm and LM head are on `execution`, and so is the arithmetic
    of layers in main memory (which move in for each use) or on disk (which are read for each)."""

    execution: torch.device
    layers: tuple[torch.device | None, ...]  # None: disk

    def __str__(self) -> str:
        counts = Counter("disk" if device is None else str(device) for device in self.layers)
        return ", ".join(f"{count} layers on {name}" for name, count in counts.items())


def plan(placement: Placement, config: ModelConfig, dtype: torch.dtype) -> DeviceMap:
    """Distribute the layers of a model whose matrices are of `dtype`. Raises ConfigError."""
    if placement.device_map != "auto":
        if placement.max_memory:
            raise ConfigError(
                f"max_memory_gib has no effect with device_map {placement.device_map!r}; set it to auto"
            )
        device = _device(placement.device_map)
        return DeviceMap(device, (device,) * config.num_layers)
    free = get_max_memory()
    memory: dict[int | str, int] = {
        i: int(free[i] * GPU_SHARE) for i in range(torch.cuda.device_count()) if i in free
    }
    if "cpu" in free:  # a GPU may share it
        memory["cpu"] = free["cpu"]
    if placement.max_memory:
        memory = {device: min(room, placement.max_memory) for device, room in memory.items()}
    first = next(iter(memory))
    execution = torch.device("cpu" if first == "cpu" else f"cuda:{first}")
    memory[first] -= _bytes_outside_layers(config, dtype)
    if memory[first] < 0:
        raise ConfigError(
            f"embedding and LM head need {-memory[first] / 2**30:.3f} GiB more on {execution} than "
            "there are; raise --max-memory-gib or use --device-map cpu"
        )
    named = infer_auto_device_map(
        _skeleton(config, dtype),
        max_memory=memory,
        no_split_module_classes=[_Layer.__name__],
        clean_result=False,
    )
    devices = {"cpu": torch.device("cpu"), "disk": None}
    layers = (named[str(i)] for i in range(config.num_layers))
    return DeviceMap(
        execution,
        tuple(devices[d] if isinstance(d, str) else torch.device(f"cuda:{d}") for d in layers),
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.empty(0, device=name).device  # "cuda" becomes "cuda:0"
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device_map is {name!r}: {reason}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device_map is {name!r}; expected cpu, auto or a CUDA device")
    return device


class _Layer(nn.Module):
    """The shapes of a decoder layer, without memory."""

    def __init__(self, config: ModelConfig, index: int, dtype: torch.dtype) -> None:
        super().__init__()
        for field, shape in layer_shapes(config, index).items():
            kind = torch.float32 if len(shape) == 1 else dtype
            self.register_parameter(
                field, nn.Parameter(torch.empty(shape, dtype=kind, device="meta"))
            )


def _skeleton(config: ModelConfig, dtype: torch.dtype) -> nn.ModuleList:
    return nn.ModuleList(_Layer(config, index, dtype) for index in range(config.num_layers))


def _bytes_outside_layers(config: ModelConfig, dtype: torch.dtype) -> int:
    tables = 1 if config.tie_word_embeddings else 2
    return tables * config.vocab_size * config.hidden_size * dtype.itemsize + 4 * config.hidden_size


class PlacedLayers(LayersAtUse[LayerWeights]):
    """The layers of a model where a DeviceMap wants them, each ready for use on its device.

    All are read once at first, so that a damaged checkpoint is told then; those on disk are dropped
    and read again at each use. With `at_use` nothing is read before its use and nothing is kept.
    """

    def __init__(
        self,
        read_layer: Callable[[int], LayerWeights],
        devices: DeviceMap,
        *,
        at_use: bool = False,
    ) -> None:
        self._read_layer = read_layer
        self._devices = devices
        self._resident = [None if at_use else self._load(i) for i in range(len(devices.layers))]

    def _load(self, index: int) -> LayerWeights | None:
        layer, device = self._read_layer(index), self._devices.layers[index]
        return None if device is None else layer.to(device)

    def __len__(self) -> int:
        return len(self._resident)

    def layer(self, index: int) -> LayerWeights:
        layer = self._resident[index]
        if layer is None:
            layer = self._read_layer(index)
        here = layer.wq.device
        return layer.to(self._devices.execution) if here.type == "cpu" else layer
