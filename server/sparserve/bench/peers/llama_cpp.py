"""llama.cpp through llama-cpp-python's low-level API, run as its own `llama-batched-bench` runs it.

Settings are the library's defaults (logical batch 2048, physical 512, float16 KV, flash attention as it
decides, a KV stream for each sequence); only the threads are ours. Its OpenMP threads sleep soon after
a step.

On a CPU with AMX build it without (`BUILD_WITHOUT_AMX`): its AMX kernels, which only quantized weights
have, can end the process by a segmentation fault (github.com/ggml-org/llama.cpp/issues/20824). In a
build that has them they cannot be turned off alone; repacking goes too, and Q4_0 without it
decodes at 0.85 to 0.9 and reads prompts at 0.7 of its speed (measured on the demo model; Q8_0 and BF16,
which are not repacked here, stay as they are).
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparserve.bench.peers.packages import llama_cpp
from sparserve.bench.systems import Prompts, Run
from sparserve.errors import UnsupportedModel

BUILD_WITHOUT_AMX = (
    'CMAKE_ARGS="-DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8" pip install '
    "--force-reinstall --no-cache-dir --no-deps llama-cpp-python"
)

log = logging.getLogger(__name__)

KV_BYTES = 2  # float16
CONTEXT_STEP = 256  # llama.cpp rounds contexts up to it


def load_file(file: Path) -> Any:
    """A `llama_model` in memory. Raises ConfigError where the package is missing, UnsupportedModel where
    it refuses the file.
    """
    api = llama_cpp()
    parameters = api.llama_model_default_params()
    if b"AMX_INT8 = 1" in api.llama_print_system_info():
        parameters.use_extra_bufts = False
        _warn_of_amx()
    model = api.llama_model_load_from_file(bytes(file), parameters)
    if model is None:
        raise UnsupportedModel(f"llama.cpp cannot load {file}")
    return model


@functools.cache  # once is enough
def _warn_of_amx() -> None:
    log.warning(
        "this llama.cpp is built with AMX kernels, which crash on quantized weights: they are off, and "
        "with them repacking, which makes Q4_0 slower than it can be; build it without them: %s",
        BUILD_WITHOUT_AMX,
    )


class LlamaCpp:
    name = "llama.cpp"
    policy = "dense"

    def __init__(
        self, file: Path, format: str, threads: int, *, weight_bytes: int, kv_bytes_per_token: int
    ) -> None:
        """Raises ConfigError where the package is missing, UnsupportedModel where it refuses the file."""
        self._api = llama_cpp()
        self.format = format
        self.weight_bytes = weight_bytes
        self.kv_bytes_per_token = kv_bytes_per_token
        self._threads = threads
        self._model = load_file(file)
        self._vocab_size = self._api.llama_vocab_n_tokens(
            self._api.llama_model_get_vocab(self._model)
        )
        self._shape = (0, 0)
        self._context: Any = None
        self._batch: Any = None

    def run(self, prompts: Prompts, new_tokens: int) -> Run:
        count, length = len(prompts), len(prompts[0])
        self._prepare(count, length + new_tokens)
        api = self._api
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        start = time.perf_counter()
        tokens = self._prefill(prompts)
        ttft = time.perf_counter() - start
        for position in range(length, length + new_tokens - 1):
            rows = [(token, position, index, True) for index, token in enumerate(tokens)]
            tokens = self._decode(rows)
        total = time.perf_counter() - start
        return Run(ttft, total, new_tokens * count, count)

    def _prefill(self, prompts: Prompts) -> list[int]:
        """All prompts one behind the other, in logical batches -> the first token of each."""
        last = len(prompts[0]) - 1
        rows = [
            (token, position, index, position == last)
            for index, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        size = self._api.llama_n_batch(self._context)
        parts = [rows[first : first + size] for first in range(0, len(rows), size)]
        return [token for part in parts for token in self._decode(part)]

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """rows of (token, position, sequence, wanted) -> the likeliest token after each wanted one."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for place, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[place] = token
            batch.pos[place] = position
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = sequence
            batch.logits[place] = wanted
        if (status := self._api.llama_decode(self._context, batch)) != 0:
            raise UnsupportedModel(f"llama.cpp cannot run a batch of {len(rows)} (status {status})")
        found = []
        for place, row in enumerate(rows):
            if row[3]:
                logits = self._api.llama_get_logits_ith(self._context, place)
                found.append(int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax()))
        return found

    def _prepare(self, count: int, length: int) -> None:
        """A context for `count` sequences of `length`; kept for the next run of that shape."""
        if self._shape == (count, length):
            return
        api = self._api
        if self._context is not None:
            api.llama_batch_free(self._batch)
            api.llama_free(self._context)
        parameters = api.llama_context_default_params()
        parameters.n_ctx = count * (-(-length // CONTEXT_STEP) * CONTEXT_STEP)
        parameters.n_seq_max = count
        parameters.n_threads = parameters.n_threads_batch = self._threads
        self._context = api.llama_init_from_model(self._model, parameters)
        if self._context is None:
            raise UnsupportedModel(
                f"llama.cpp makes no context of {count} sequences of {length} tokens; is there memory?"
            )
        self._batch = api.llama_batch_init(max(parameters.n_batch, count), 0, 1)
        self._shape = (count, length)
