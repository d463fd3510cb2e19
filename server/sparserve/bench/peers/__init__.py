"""Rivals on the same weights, each behind the `System` protocol of `sparserve.bench.systems`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparserve.bench.peers.gguf_files import GGUF_FORMATS, gguf_file
from sparserve.bench.peers.llama_cpp import LlamaCpp
from sparserve.bench.peers.openvino import OpenVino
from sparserve.bench.peers.transformers import Transformers
from sparserve.bench.systems import System
from sparserve.errors import ConfigError
from sparserve.model.loader import DTYPES, LoadedModel

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
    format: str | None = None  # None: whatever we are measured in


def wanted_peers(specs: Sequence[PeerSpec], formats: Sequence[str]) -> list[tuple[str, str]]:
    """(peer, format), each once; a spec without a format stands for each of `formats`, of which the part
    before a space counts: peers have an int4, but no "int4 (LM head int8)"."""
    own = [format.split()[0] for format in formats]
    return list(
        dict.fromkeys(
            (spec.name, format)
            for spec in specs
            for format in ([spec.format] if spec.format else own)
        )
    )


def source_model(format: str, load: Load) -> LoadedModel:
    """What a peer's file is written from: what is quantized, from the checkpoint's own data type."""
    return load(format if format in DTYPES else "auto")


def _transformers(format: str, load: Load, threads: int) -> System:
    return Transformers(load(format), threads)


def _llama_cpp(format: str, load: Load, threads: int) -> System:
    model = source_model(format, load)
    return LlamaCpp(gguf_file(model, format), format, model.config, threads)


def _openvino(format: str, load: Load, threads: int) -> System:
    file_format, arithmetic, kv_cache, kv_bytes = OPENVINO_FORMATS[format]
    model = source_model(format, load)
    return OpenVino(
        gguf_file(model, file_format),
        format,
        model.config,
        threads,
        arithmetic=arithmetic,
        kv_cache=kv_cache,
        kv_bytes=kv_bytes,
    )


# name -> (formats that it has, what makes it)
PEERS: dict[str, tuple[tuple[str, ...], Callable[[str, Load, int], System]]] = {
    "llama.cpp": (GGUF_FORMATS, _llama_cpp),
    "transformers": (tuple(DTYPES), _transformers),
    "openvino": (tuple(OPENVINO_FORMATS), _openvino),
}


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
    return PEERS[name][1](format, load, threads)


def check_format(name: str, format: str) -> None:
    """Raises ConfigError."""
    formats = PEERS[name][0]
    if format not in formats:
        raise ConfigError(
            f"{name} has no format {format}; give one that it has, as in {name}:{formats[-1]}, of: "
            f"{', '.join(formats)}"
        )
