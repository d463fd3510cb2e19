"""What is measured: systems that run a batch of prompts and say when tokens came."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # torch comes with them, which rivals do without
    from sparserve.bench.policies import PolicySpec
    from sparserve.bench.reads import Reads
    from sparserve.engine.engine import Engine

DENSE_POLICY = "dense"

Prompts = Sequence[tuple[int, ...]]


def bits(format: str) -> int:
    """Of a weight, without its share of scales: the first number in the name of every format, ours
    (bfloat16, int8) and rivals' (Q4_K_M)."""
    number = re.search(r"\d+", format)
    assert number is not None, f"the format {format} does not name its bits"
    return int(number[0])


@dataclass(frozen=True, slots=True)
class Run:
    """One measured batch: seconds from its start."""

    ttft: float  # until every prompt had its first token
    total: float
    new_tokens: int  # over all prompts
    tokens_at_ttft: int  # of these, those that were there by `ttft`
    reads: Reads | None = None  # in decode, where that was watched; else all of `weight_bytes`

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after every prompt had its first, over the time that they took."""
        return (self.new_tokens - self.tokens_at_ttft) / (self.total - self.ttft)


class System(Protocol):
    name: str
    format: str  # of the weights
    policy: str  # which neurons decoded tokens use, in words
    weight_bytes: int  # read by a decode step: all but the embedding, of which it takes one row
    kv_bytes_per_token: int  # K and V of one position in all layers

    def run(self, prompts: Prompts, new_tokens: int) -> Run:
        """Generate exactly `new_tokens` greedily for each prompt, all prompts at once; all of one
        length.
        """
        ...


def data_type(format: str) -> str:
    """That of most weights: "int4" of "int4-g32 (LM head int8-g32)". Rivals know no more."""
    return re.split("[ -]", format, maxsplit=1)[0]


class Sparserve:
    """This project's engine, step by step as it is served."""

    name = "sparserve"

    def __init__(
        self, engine: Engine, spec: PolicySpec | None = None, *, prompts_cached: bool = False
    ) -> None:
        """Without a `spec` dense. `prompts_cached`: read the prompts before the run, which then finds them in
        the prefix cache. All of a batch then decode from one step on, as rivals' do; its TTFT says nothing.

        Raises RequestError of a policy that the engine cannot follow.
        """
        info = engine.backend.info
        self.format = info.dtype
        self.policy = DENSE_POLICY if spec is None else str(spec)
        self.weight_bytes = info.weight_bytes
        self.kv_bytes_per_token = info.kv_bytes_per_token
        self._engine = engine
        self._spec = spec
        self._plan = engine.policies.plan(spec.policy) if spec else None
        self._prompts_cached = prompts_cached

    def run(self, prompts: Prompts, new_tokens: int) -> Run:
        from sparserve.bench.reads import DENSE_PLAN, watching  # not above: it needs torch

        if self._prompts_cached:
            self._generate(prompts, 1)
        with watching(self._engine) as watch:
            run = self._generate(prompts, new_tokens)
        decoded = run.new_tokens - len(prompts)
        return (
            replace(run, reads=watch.found(self._plan or DENSE_PLAN, decoded)) if decoded else run
        )

    def _generate(self, prompts: Prompts, new_tokens: int) -> Run:
        start = time.perf_counter()
        self._add(prompts, new_tokens)
        waiting = set(range(len(prompts)))
        ttft, at_ttft, generated = 0.0, 0, 0
        while self._engine.has_work:
            for update in self._engine.step():
                generated += len(update.tokens)
                if update.tokens:
                    waiting.discard(int(update.request_id))
                if update.finish is not None and update.finish.error is not None:
                    raise update.finish.error
            if not waiting and not at_ttft:
                ttft, at_ttft = time.perf_counter() - start, generated
        total = time.perf_counter() - start
        assert generated == new_tokens * len(prompts), (
            f"made {generated} tokens, not what was asked for"
        )
        return Run(ttft, total, generated, at_ttft)

    def _add(self, prompts: Prompts, new_tokens: int) -> None:
        from sparserve.engine.request import GenerationRequest, SamplingParams, StoppingParams

        sampling, stopping = (
            SamplingParams(temperature=0),
            StoppingParams(new_tokens, ignore_eos=True),
        )
        for index, prompt in enumerate(prompts):
            request = GenerationRequest(str(index), prompt, sampling, stopping)
            if self._spec is not None:
                request = replace(request, policy=self._spec.policy)
            self._engine.validate(request)
            self._engine.add(request)
