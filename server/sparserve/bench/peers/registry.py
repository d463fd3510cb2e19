"""Which rivals there are, in which formats, and what each is made of."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparserve.bench.peers.gguf_files import GGUF_FORMATS, gguf_file, step_weight_bytes
from sparserve.bench.peers.llama_cpp import KV_BYTES, LlamaCpp
from sparserve.bench.peers.openvino import OpenVino
from sparserve.bench.peers.transformers import Transformers
from sparserve.bench.systems import System, data_type
from sparserve.errors import ConfigError
from sparserve.model.config import ModelConfig
from sparserve.model.loader import DTYPES, LoadedModel

log = logging.getLogger(__name__)

# format -> (GGUF format of its file, element types of its arithmetic and its KV cache, bytes of the latter)
OPENVINO_FORMATS = {
    "bfloat16": ("float16", "bf16", "bf16", 2),
    "float16": ("float16", "f16", "f16", 2),
    "int8": ("Q8_0", "bf16", "u8", 1),
    "int4": ("Q4_0", "bf16", "u8", 1),
}

# Data type of the weights in memory -> the model.
Load = Callable[[str], LoadedModel]


@dataclass(frozen=True, slots=True)
class PeerSpec:
    """One entry of --peers: `llama.cpp`, or `llama.cpp:Q8_0` for a format of its own."""

    name: str
    format: str | None = None  # None: those of the same bits as ours


@dataclass(frozen=True, slots=True)
class Peer:
    formats: tuple[str, ...]
    open: Callable[[str, Load, int], System]  # (one of `formats`, the weights, threads)
    # Our formats -> those of the same bits, where they have other names.
    named: Mapping[str, str] = field(default_factory=dict)

    def counterpart(self, format: str) -> str | None:
        """Its own format at the bits of ours; None where it has none."""
        ours = data_type(format)
        own = self.named.get(ours, ours)
        return own if own in self.formats else None


def wanted_peers(specs: Sequence[PeerSpec], formats: Sequence[str]) -> list[tuple[str, str]]:
    """(peer, its format), each once. A spec without a format stands for its counterparts of our
    `formats`; where it has none, the log says so.
    """
    wanted = []
    for spec in specs:
        if spec.format is not None:
            wanted.append((spec.name, spec.format))
            continue
        for format in formats:
            if (own := PEERS[spec.name].counterpart(format)) is not None:
                wanted.append((spec.name, own))
            else:
                log.warning(
                    "%s has no format of the same bits as %s, which runs without it",
                    spec.name,
                    format,
                )
    return list(dict.fromkeys(wanted))


def source_model(format: str, load: Load) -> LoadedModel:
    """What weights of `format` are made from: what is quantized, from the checkpoint's own data type."""
    return load(format if format in DTYPES else "auto")


def resolved(format: str, load: Load) -> str:
    """`format`, or of "auto" the data type that the weights then have."""
    if format != "auto":
        return format
    return str(load(format).weights.dtype).removeprefix("torch.")


def _transformers(format: str, load: Load, threads: int) -> System:
    return Transformers(load(format), threads)


def llama_cpp_arguments(format: str, load: Load) -> dict[str, Any]:
    """What `LlamaCpp` is made of besides threads; its file is written where there is none yet."""
    model = source_model(format, load)
    file = gguf_file(model, format)
    return {
        "file": file,
        "format": format,
        "weight_bytes": step_weight_bytes(file),
        "kv_bytes_per_token": kv_bytes_per_token(model.config, KV_BYTES),
    }


def openvino_arguments(format: str, load: Load) -> dict[str, Any]:
    """What `OpenVino` is made of besides threads; its file is written where there is none yet."""
    file_format, arithmetic, kv_cache, kv_bytes = OPENVINO_FORMATS[format]
    model = source_model(format, load)
    file = gguf_file(model, file_format)
    return {
        "file": file,
        "format": format,
        "weight_bytes": step_weight_bytes(file),
        "kv_bytes_per_token": kv_bytes_per_token(model.config, kv_bytes),
        "arithmetic": arithmetic,
        "kv_cache": kv_cache,
    }


def _llama_cpp(format: str, load: Load, threads: int) -> System:
    return LlamaCpp(threads=threads, **llama_cpp_arguments(format, load))


def _openvino(format: str, load: Load, threads: int) -> System:
    return OpenVino(threads=threads, **openvino_arguments(format, load))


PEERS = {
    "llama.cpp": Peer(GGUF_FORMATS, _llama_cpp, {"int8": "Q8_0", "int4": "Q4_0"}),
    "transformers": Peer(tuple(DTYPES), _transformers),
    "openvino": Peer(tuple(OPENVINO_FORMATS), _openvino),
}


def kv_bytes_per_token(config: ModelConfig, number_bytes: int) -> int:
    """K and V of one position in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * number_bytes


def parse_peers(text: str) -> list[PeerSpec]:
    """`none`, or names with an optional `:format`, comma-separated. Raises ConfigError."""
    if text == "none":
        return []
    specs = []
    for part in text.split(","):
        name, _, format = part.strip().partition(":")
        if name not in PEERS:
            raise ConfigError(f"no peer is named {name!r}; there are: {', '.join(PEERS)}, none")
        specs.append(PeerSpec(name, format or None))
        if format:
            check_format(name, format)
    return specs


def open_peer(name: str, format: str, load: Load, threads: int) -> System:
    """Raises ConfigError where the peer lacks the format or its package is missing, UnsupportedModel
    where it cannot run the model.
    """
    check_format(name, format)
    return PEERS[name].open(format, load, threads)


def check_format(name: str, format: str) -> None:
    """Raises ConfigError."""
    formats = PEERS[name].formats
    if format not in formats:
        raise ConfigError(
            f"{name} has no format {format}; give one that it has, as in {name}:{formats[-1]}, of: "
            f"{', '.join(formats)}"
        )
