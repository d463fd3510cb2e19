"""Hugging Face `generate` on the same weights, in the same dtype and threads."""

from __future__ import annotations

import time
from typing import Any

import torch

from sparserve.bench.systems import Prompts, Run
from sparserve.bench.to_transformers import to_transformers
from sparserve.model.backend import BLOCK_SIZE
from sparserve.model.kv_cache import bytes_per_block
from sparserve.model.loader import LoadedModel
from sparserve.model.weights import step_weight_bytes


class Transformers:
    name = "transformers"
    policy = "dense"

    def __init__(self, model: LoadedModel, threads: int) -> None:
        self._threads = threads
        dtype = model.weights.dtype
        self.format = str(dtype).removeprefix("torch.")
        self.weight_bytes = step_weight_bytes(model.config, dtype)
        self.kv_bytes_per_token = bytes_per_block(model.config, dtype) // BLOCK_SIZE
        self._model = to_transformers(model)
        self._model.generation_config.eos_token_id = None  # exactly as many tokens as asked for
        self._model.generation_config.pad_token_id = 0

    @torch.inference_mode()
    def run(self, prompts: Prompts, new_tokens: int) -> Run:
        # A backend of ours may want torch on fewer.
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            return self._generate(torch.tensor(prompts), new_tokens)
        finally:
            torch.set_num_threads(before)

    def _generate(self, ids: torch.Tensor, new_tokens: int) -> Run:
        watch = _FirstTokenWatch()
        start = time.perf_counter()
        output = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=watch,
        )
        total = time.perf_counter() - start
        generated = output.shape[1] - ids.shape[1]
        assert generated == new_tokens, f"transformers made {generated} tokens, not {new_tokens}"
        return Run(watch.first - start, total, generated * len(ids), len(ids))


class _FirstTokenWatch:
    """A transformers streamer that notes when the first tokens came; the prompts are put first."""

    def __init__(self) -> None:
        self._puts = 0
        self.first = 0.0

    def put(self, value: Any) -> None:
        self._puts += 1
        if self._puts == 2:
            self.first = time.perf_counter()

    def end(self) -> None:
        pass
