"""This project's engine, driven over given tokens: the quality of what it serves, and what it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch

from sparse_kernels._abi import SK_CHOICE_TOKENS
from sparse_kernels.choice import ALL_NEURONS, NeuronChoice, Score
from sparserve.bench.policies import PolicySpec, in_short
from sparserve.bench.quality import Logits, Window
from sparserve.bench.reads import DENSE_PLAN, correction_bytes, read_bytes
from sparserve.engine.block_manager import blocks_for
from sparserve.engine.choosing import ChoiceState
from sparserve.engine.engine import Engine
from sparserve.errors import ConfigError
from sparserve.model.backend import (
    BLOCK_SIZE,
    Backend,
    ForwardBatch,
    NeuronReads,
    Phase,
    SequenceInput,
)
from sparserve.sparsity.chooser import ChoicePlan
from sparserve.sparsity.policy import DENSE
from sparserve.sparsity.statistics import NeuronStatistics, PromptStatistics

ROWS = 64  # whose logits are in memory at once
# (the choice of a window's tokens, what they read; None: everything, and how many they are)
OnReads = Callable[[NeuronChoice, NeuronReads | None, int], None]


@dataclass(slots=True)
class _Prompt:
    """One window's, in the KV cache."""

    table: list[int]
    statistics: PromptStatistics


class _State:
    """A window that is decoded."""

    def __init__(self, window: Window, prompt: _Prompt, plan: ChoicePlan, engine: Engine) -> None:
        self._window, self._table = window, prompt.table
        self._plan = plan
        self._neurons = ChoiceState(plan, engine.backend.info, engine.policies.plan)
        self._neurons.choose(prompt.statistics if self._neurons.needs_statistics else None)

    def input(self, steps: range) -> SequenceInput:
        """The tokens of `steps` that it has."""
        tokens = self._window.fed[steps.start : steps.stop]
        start = len(self._window.prompt) + steps.start
        return SequenceInput(
            tokens, start, self._table, Phase.DECODE, self._neurons.choice, range(len(tokens))
        )

    def refresh_input(self, steps: range) -> SequenceInput:
        """All of `steps` with all neurons; the last is new. That one alone where drift has ended refreshes."""
        if self._neurons.choice.is_dense:
            return self.input(steps[-1:])
        wanted = self._plan.score
        return replace(
            self.input(steps),
            choice=ALL_NEURONS,
            output_offsets=(len(steps) - 1,),
            collect_statistics=wanted is not None,
            score=wanted or Score.NORM,
            score_share=self._plan.score_share,
        )

    def refreshed(self, start: int, statistics: Sequence[NeuronStatistics] | None) -> None:
        """Tokens from position `start` on were read by `refresh_input`."""
        if statistics is not None:
            self._neurons.take_refreshed(start, statistics)
            self._neurons.refreshed()


class Driver:
    """Drives an engine's backend as the engine does: prompts in chunks, what follows them through decode.

    Up to SK_CHOICE_TOKENS decoded tokens of a window go into one forward: they have the bits of single
    steps, and weights are read once for all of them. Prompts of the windows of the last call stay in the
    KV cache for the next one, which may have another policy.
    """

    def __init__(self, engine: Engine, usual: ChoicePlan = DENSE_PLAN) -> None:
        """`usual`: a plan whose statistics of prompts are gathered for those that want none as well, so that
        the next one finds them. KV blocks are taken from the first on: the engine must have no other user,
        and no use later for its prefix cache.
        """
        self._engine = engine
        self._usual = _wanted(usual)
        self._windows: list[Window] = []
        self._prompts: list[_Prompt] = []
        self._scored: tuple[Score, float] | None = None  # of the statistics that are there

    @property
    def backend(self) -> Backend:
        return self._engine.backend

    def rows(
        self,
        windows: Sequence[Window],
        plan: ChoicePlan = DENSE_PLAN,
        on_reads: OnReads = lambda choice, reads, tokens: None,
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(window, step, logits [vocab] float32) of every decoded position, all windows together, the
        steps of each in order; a row is valid until the next one is asked for.

        Raises ConfigError where the KV cache cannot hold these windows.
        """
        self._read_prompts(windows, plan)
        pairs = zip(windows, self._prompts, strict=True)
        states = [_State(window, prompt, plan, self._engine) for window, prompt in pairs]
        longest = max(len(window.fed) for window in windows)
        piece = max(1, min(SK_CHOICE_TOKENS, ROWS // len(windows)))
        for steps, refreshes in _passes(longest, piece, plan.policy.refresh_interval):
            needed = steps.stop if refreshes else steps.start + 1
            running = [i for i, window in enumerate(windows) if needed <= len(window.fed)]
            batch = [
                states[i].refresh_input(steps) if refreshes else states[i].input(steps)
                for i in running
            ]
            output = self.backend.forward(ForwardBatch(batch))
            reads = output.reads or [None] * len(batch)
            row = 0
            for i, sequence, own in zip(running, batch, reads, strict=True):
                on_reads(sequence.choice, own, len(sequence.output_offsets))
                first = sequence.start - len(windows[i].prompt)
                for offset in sequence.output_offsets:
                    yield i, first + offset, output.candidates.full_logits(row)
                    row += 1
            for i, sequence, found in zip(running, batch, output.statistics, strict=True):
                states[i].refreshed(sequence.start, found)

    def _read_prompts(self, windows: Sequence[Window], plan: ChoicePlan) -> None:
        """Into the KV cache, with the statistics that `plan` wants, unless they are there."""
        scored = _wanted(plan)
        if list(windows) == self._windows and scored in (None, self._scored):
            return
        scored = scored or self._usual
        self._windows = []  # until all is there: a forward may fail
        tables = _tables(self.backend, windows)
        read: dict[tuple[int, ...], _Prompt] = {}
        prompts = []
        for window, table in zip(windows, tables, strict=True):
            blocks = table[: blocks_for(len(window.prompt))]
            if window.prompt and (same := read.get(window.prompt)):  # the choices of one question
                copied = self.backend.read_blocks(same.table[: len(blocks)])
                self.backend.write_blocks(blocks, copied)
                prompts.append(_Prompt(table, same.statistics))
                continue
            prompts.append(_Prompt(table, self._read_prompt(window.prompt, table, scored)))
            read[window.prompt] = prompts[-1]
        self._windows, self._prompts, self._scored = list(windows), prompts, scored

    def _read_prompt(
        self, prompt: Sequence[int], table: Sequence[int], scored: tuple[Score, float] | None
    ) -> PromptStatistics:
        """Without `scored` its statistics stay empty."""
        statistics = PromptStatistics(BLOCK_SIZE)
        score, share = scored or (Score.NORM, 1.0)
        chunk = self._engine.limits.max_batched_tokens
        for start in range(0, len(prompt), chunk):
            part = SequenceInput(
                prompt[start : start + chunk],
                start,
                table,
                Phase.PREFILL,
                collect_statistics=scored is not None,
                score=score,
                score_share=share,
            )
            (found,) = self.backend.forward(ForwardBatch([part])).statistics
            if found is not None:
                statistics.extend(start, found)
        return statistics


class ServedModel:
    """One format under one policy."""

    system = "sparserve"

    def __init__(
        self,
        driver: Driver,
        windows: Sequence[Window],
        spec: PolicySpec = PolicySpec(DENSE),
        plan: ChoicePlan = DENSE_PLAN,
        dense: ServedModel | None = None,
    ) -> None:
        """`plan` is what `spec` comes to; `dense`, the same format dense, is what such a
        policy is compared with."""
        info = driver.backend.info
        self._driver, self._info, self._plan = driver, info, plan
        self.format, self.policy, self.dense = info.dtype, str(spec), dense
        left_open = plan.policy.kind is not spec.policy.kind
        self.resolved = in_short(plan.policy) if left_open else None
        self.refresh = plan.policy.refresh_interval
        self.predicted_kl = plan.predicted_kl
        middle = len(windows[0].prompt) + len(windows[0].fed) // 2
        self._other_bytes = info.weight_bytes - info.mlp_bytes + info.kv_bytes_per_token * middle
        self._tokens = 0  # decoded so far
        self._chosen_bytes = 0.0  # of feed-forward layers, that they read

    @property
    def mlp_bytes(self) -> int:
        """Mean over the tokens decoded so far. A refresh reads all neurons, once, in place of its newest
        token's own step."""
        if not self._tokens:
            return self._info.mlp_bytes
        return round(self._chosen_bytes / self._tokens)

    @property
    def density(self) -> float:
        return self.mlp_bytes / self._info.mlp_bytes

    @property
    def bytes_per_token(self) -> int:
        return self._other_bytes + self.mlp_bytes

    def logits(self, windows: Sequence[Window]) -> Iterator[Logits]:
        """Raises ConfigError where the KV cache cannot hold these windows at once, InvalidRequest of
        prompts too short for the policy."""
        vocab_size = self._driver.backend.config.vocab_size
        decoded = [np.empty((len(w.fed), vocab_size), np.float32) for w in windows]
        for index, step, row in self._driver.rows(windows, self._plan, self._note):
            decoded[index][step] = row.cpu().numpy()
        yield from decoded

    def _note(self, choice: NeuronChoice, reads: NeuronReads | None, tokens: int) -> None:
        self._tokens += tokens
        if reads is None:
            self._chosen_bytes += tokens * self._info.mlp_bytes
            return
        self._chosen_bytes += read_bytes(self._info, choice.kind, reads)
        self._chosen_bytes += tokens * correction_bytes(self._plan, choice)


def _wanted(plan: ChoicePlan) -> tuple[Score, float] | None:
    """The statistics of a prompt that it chooses by; None: none."""
    return None if plan.score is None else (plan.score, plan.score_share)


def _passes(steps: int, piece: int, refresh: int) -> Iterator[tuple[range, bool]]:
    """0 .. steps in parts of `piece` at most; each `refresh`-th step is a dense pass (True) over all
    since the last one.
    """
    start = 0
    while start < steps:
        due = (start // refresh + 1) * refresh - 1 if refresh else steps
        stop = min(start + piece, steps, due)
        if start < stop:
            yield range(start, stop), False
        start = stop
        if start == due < steps:
            yield range(due + 1 - refresh, due + 1), True
            start = due + 1


def _tables(backend: Backend, windows: Sequence[Window]) -> list[list[int]]:
    """A block table for each window, from the first block on."""
    needed = [blocks_for(window.tokens) for window in windows]
    if sum(needed) > backend.num_blocks:
        raise ConfigError(
            f"{len(windows)} windows need {sum(needed)} KV blocks, the cache has "
            f"{backend.num_blocks}; raise --kv-cache-gib or lower --prompt-tokens"
        )
    blocks = iter(range(backend.num_blocks))
    return [list(islice(blocks, count)) for count in needed]
