"""The systems under measurement: each runs a batch of prompts and says when tokens came."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sparserve.bench.to_transformers import to_transformers
from sparserve.engine.engine import Engine
from sparserve.engine.request import GenerationRequest, SamplingParams, StoppingParams
from sparserve.model.loader import LoadedModel

Prompts = Sequence[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Run:
    """One measured batch: seconds from its start."""

    ttft: float  # until every prompt had its first token
    total: float
    new_tokens: int  # over all prompts
    batch: int

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after each prompt's first, over the time after the first tokens."""
        return (self.new_tokens - self.batch) / (self.total - self.ttft)


class System(Protocol):
    name: str

    def run(self, prompts: Prompts, new_tokens: int) -> Run:
        """Generate exactly `new_tokens` greedily for each prompt, all prompts at once."""
        ...


class Sparserve:
    """This project's engine, offline."""

    name = "sparserve"

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def run(self, prompts: Prompts, new_tokens: int) -> Run:
        start = time.perf_counter()
        stopping = StoppingParams(max_tokens=new_tokens, ignore_eos=True)
        for index, prompt in enumerate(prompts):
            request = GenerationRequest(
                f"bench-{index}", prompt, SamplingParams(temperature=0), stopping
            )
            self._engine.validate(request)
            self._engine.add(request)
        waiting = {f"bench-{index}" for index in range(len(prompts))}
        ttft, generated = 0.0, 0
        while self._engine.has_work:
            for update in self._engine.step():
                generated += len(update.tokens)
                if update.request_id in waiting and update.tokens:
                    waiting.remove(update.request_id)
                    ttft = time.perf_counter() - start
                if update.finish is not None and update.finish.error is not None:
                    raise update.finish.error
        assert generated == new_tokens * len(prompts), (
            f"made {generated} tokens, not what was asked for"
        )
        return Run(ttft, time.perf_counter() - start, generated, len(prompts))


class Transformers:
    """Hugging Face `generate` on the same weights, in the same dtype and threads."""

    name = "transformers"

    def __init__(self, model: LoadedModel) -> None:
        self._model = to_transformers(model)
        self._model.generation_config.eos_token_id = None  # exactly as many tokens as asked for
        self._model.generation_config.pad_token_id = 0

    @torch.inference_mode()
    def run(self, prompts: Prompts, new_tokens: int) -> Run:
        ids = torch.tensor([list(prompt) for prompt in prompts])
        watch = _FirstTokenWatch()
        start = time.perf_counter()
        output = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=watch if len(prompts) == 1 else None,
        )
        total = time.perf_counter() - start
        generated = output.shape[1] - ids.shape[1]
        assert generated == new_tokens, f"transformers made {generated} tokens, not {new_tokens}"
        return Run((watch.first or start) - start, total, generated * len(prompts), len(prompts))


class _FirstTokenWatch:
    """A transformers streamer that notes when the first token came; the prompt is put first."""

    def __init__(self) -> None:
        self._puts = 0
        self.first: float | None = None

    def put(self, value: Any) -> None:
        self._puts += 1
        if self._puts == 2:
            self.first = time.perf_counter()

    def end(self) -> None:
        pass
