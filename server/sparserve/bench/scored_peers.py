"""Peers under the same scorer, on the same windows: prompts prefilled at once, then one token at a time.

They run with the settings they are timed with, so that a speed and a KL of one row belong together.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparserve.bench.peers.gguf_files import gguf_file, mlp_weight_bytes, step_weight_bytes
from sparserve.bench.peers.llama_cpp import KV_BYTES, load_file
from sparserve.bench.peers.openvino import check_threads
from sparserve.bench.peers.packages import llama_cpp, require
from sparserve.bench.peers.registry import (
    OPENVINO_FORMATS,
    Load,
    check_format,
    kv_bytes_per_token,
    source_model,
)
from sparserve.bench.quality import Logits, Scored, Window
from sparserve.errors import ConfigError, UnsupportedModel
from sparserve.model.config import ModelConfig


class _GGUFPeer:
    """What two engines that read GGUF files have in common."""

    system: str
    policy = "dense"
    density = 1.0
    refresh = 0
    predicted_kl: float | None = None
    resolved: str | None = None
    dense = None

    def __init__(
        self, file: Path, format: str, config: ModelConfig, windows: Sequence[Window], kv_bytes: int
    ) -> None:
        self.format = format
        self._vocab_size = config.vocab_size
        middle = len(windows[0].prompt) + len(windows[0].fed) // 2
        self.bytes_per_token = step_weight_bytes(file) + middle * kv_bytes_per_token(
            config, kv_bytes
        )
        self.mlp_bytes = mlp_weight_bytes(file)

    def logits(self, windows: Sequence[Window]) -> Iterator[Logits]:
        for window in windows:
            self._forget()
            self._forward(window.prompt, 0)
            decoded = np.empty((len(window.fed), self._vocab_size), np.float32)
            for step, token in enumerate(window.fed):
                decoded[step] = self._forward([token], len(window.prompt) + step)
            yield decoded

    def _forget(self) -> None:
        """Empty the KV cache."""
        raise NotImplementedError

    def _forward(self, tokens: Sequence[int], start: int) -> Logits:
        """Tokens at positions `start`, … -> logits [vocab] after the last, valid until the next call."""
        raise NotImplementedError


class ScoredLlamaCpp(_GGUFPeer):
    """llama.cpp with its defaults: a float16 KV cache, flash attention as it decides."""

    system = "llama.cpp"

    def __init__(
        self, file: Path, format: str, config: ModelConfig, windows: Sequence[Window], threads: int
    ) -> None:
        """Raises ConfigError where the package is missing, UnsupportedModel where it refuses the file."""
        super().__init__(file, format, config, windows, KV_BYTES)
        self._api = api = llama_cpp()
        model = load_file(file)
        parameters = api.llama_context_default_params()
        parameters.n_ctx = windows[0].tokens
        parameters.n_batch = max(parameters.n_batch, len(windows[0].prompt))
        parameters.n_threads = parameters.n_threads_batch = threads
        self._context = api.llama_init_from_model(model, parameters)
        if self._context is None:
            raise UnsupportedModel(f"llama.cpp makes no context of {windows[0].tokens} tokens")

    def _forget(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def _forward(self, tokens: Sequence[int], start: int) -> Logits:
        ids = (self._api.llama_token * len(tokens))(*tokens)
        status = self._api.llama_decode(
            self._context, self._api.llama_batch_get_one(ids, len(tokens))
        )
        if status != 0:
            raise UnsupportedModel(f"llama.cpp cannot run {len(tokens)} tokens (status {status})")
        row = self._api.llama_get_logits_ith(self._context, -1)
        logits: Logits = np.ctypeslib.as_array(row, (self._vocab_size,))
        return logits


class ScoredOpenVino(_GGUFPeer):
    """OpenVINO on the graph that OpenVINO GenAI builds of a GGUF file."""

    system = "openvino"

    def __init__(
        self, file: Path, format: str, config: ModelConfig, windows: Sequence[Window], threads: int
    ) -> None:
        """Raises ConfigError where a package is missing and of a single thread, UnsupportedModel where it
        refuses the file or the format.
        """
        check_threads(threads)
        _, arithmetic, kv_cache, kv_bytes = OPENVINO_FORMATS[format]
        super().__init__(file, format, config, windows, kv_bytes)
        graph, core = _openvino_graph(file), require("openvino").Core()
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": arithmetic,
            "KV_CACHE_PRECISION": kv_cache,
        }
        try:
            compiled = core.compile_model(graph, "CPU", settings)
        except RuntimeError as error:
            raise UnsupportedModel(f"OpenVINO cannot run {format} on this CPU: {error}") from error
        self._request = compiled.create_infer_request()

    def _forget(self) -> None:
        self._request.reset_state()

    def _forward(self, tokens: Sequence[int], start: int) -> Logits:
        stop = start + len(tokens)
        found = self._request.infer(
            {
                "input_ids": np.array([tokens], np.int64),
                "attention_mask": np.ones((1, stop), np.int64),
                "position_ids": np.arange(start, stop, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
        )
        logits: Logits = found[0][0, -1]
        return logits


def _openvino_graph(file: Path) -> Any:
    """The model of a GGUF file with a stateful KV cache. Only the pipeline makes it, and puts it into
    the folder of the file."""
    openvino, genai = require("openvino"), require("openvino_genai")
    with tempfile.TemporaryDirectory() as scratch:
        link = Path(scratch) / file.name
        os.symlink(file.resolve(), link)
        try:
            genai.LLMPipeline(str(link), "CPU", enable_save_ov_model=True)
        except RuntimeError as error:
            raise UnsupportedModel(f"OpenVINO GenAI cannot load {file}: {error}") from error
        # Its weights stay mapped after their file is gone.
        return openvino.Core().read_model(Path(scratch) / "openvino_model.xml")


def open_scored(
    name: str, format: str, load: Load, windows: Sequence[Window], threads: int
) -> Scored:
    """The peer `name` in one of its formats.

    Raises ConfigError where it has no such format or its package is missing, UnsupportedModel where
    it cannot run the model.
    """
    _check_named(name, format)
    file = peer_file(name, format, load)
    return SCORED[name](file, format, source_model(format, load).config, windows, threads)


def check_scored(name: str, format: str) -> None:
    """Raises ConfigError where the peer has no such format, is not scored, or its package is missing."""
    _check_named(name, format)
    for package in PACKAGES[name]:
        require(package)


def _check_named(name: str, format: str) -> None:
    if name not in SCORED:
        raise ConfigError(f"{name} is not scored; there are: {', '.join(SCORED)}")
    check_format(name, format)


def peer_file(name: str, format: str, load: Load) -> Path:
    """What the peer loads, written where there is none yet. Raises as `gguf_file`."""
    file_format = OPENVINO_FORMATS[format][0] if name == "openvino" else format
    return gguf_file(source_model(format, load), file_format)


SCORED: dict[str, type[ScoredLlamaCpp | ScoredOpenVino]] = {
    "llama.cpp": ScoredLlamaCpp,
    "openvino": ScoredOpenVino,
}
PACKAGES = {"llama.cpp": ("llama_cpp",), "openvino": ("openvino", "openvino_genai")}
