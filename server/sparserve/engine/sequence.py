"""A choice of a request inside the engine: its tokens, its KV blocks, how far it has come."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence as Ordered
from enum import Enum

import torch

from sparserve.engine.block_manager import CachedBlock, StatisticsKind
from sparserve.engine.cache_events import BlockStored
from sparserve.engine.choosing import ChoiceState
from sparserve.engine.detokenizer import Detokenizer
from sparserve.engine.logits import LogitAdjuster
from sparserve.engine.refresh import Refresh
from sparserve.engine.request import (
    Finish,
    FinishReason,
    GenerationRequest,
    PromptToken,
    Timings,
    TopToken,
)
from sparserve.engine.speculation import Speculation
from sparserve.errors import SparserveError
from sparserve.model.backend import BLOCK_SIZE, Phase, TargetScores
from sparserve.sparsity.statistics import NeuronStatistics, PromptStatistics


class Status(Enum):
    WAITING = "waiting"  # new or preempted
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Mutable state of one choice; only the engine thread touches it.

    KV exists for positions [0, num_computed). Positions up to `prefill_target` come from prefill.
    A preempted sequence keeps its decoded blocks in `host_blocks` (they belong at the end of its
    block table) and `resume_at`, the `num_computed` it returns to once prefill reached its target.
    """

    def __init__(
        self,
        request: GenerationRequest,
        *,
        max_tokens: int,
        detokenizer: Detokenizer,
        adjuster: LogitAdjuster,
        neurons: ChoiceState,
        keys: Ordered[bytes] = (),
        seed: int = 0,
        choice: int = 0,
        speculation: Speculation | None = None,
        refresh: Refresh | None = None,
    ) -> None:
        """`keys` name the prompt's whole blocks in the prefix cache; (): neither looked for nor kept there."""
        self.request = request
        self.max_tokens = max_tokens
        self.detokenizer = detokenizer
        self.adjuster = adjuster
        self.neurons = neurons
        self.keys = keys
        self.seed = seed
        self.choice = choice
        self.speculation = speculation
        self.refresh = refresh
        self.output_token_ids: list[int] = []
        self.status = Status.WAITING
        self.block_table: list[int] = []
        self.num_computed = 0
        self.prefill_target = self.prompt_len
        self.resume_at: int | None = None
        self.host_blocks: torch.Tensor | None = None
        self.statistics: PromptStatistics | None = None
        self.prompt_tokens: list[PromptToken] = []
        self.cached_tokens = 0  # of the prompt, found in the cache when this first ran
        self.first_scheduled: float | None = None
        self.first_token: float | None = None
        self.last_token: float | None = None
        self._begin_prompt()

    @property
    def order(self) -> tuple[int, float]:
        """Who goes first: the higher priority, then the earlier arrival."""
        return -self.request.priority, self.request.arrival

    @property
    def arrival(self) -> float:
        return self.request.arrival

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def phase(self) -> Phase:
        return Phase.PREFILL if self.num_computed < self.prefill_target else Phase.DECODE

    @property
    def in_first_prefill(self) -> bool:
        """Not yet a token generated: the prompt's statistics and its first logits are still due."""
        return not self.output_token_ids

    @property
    def wanted_statistics(self) -> StatisticsKind | None:
        """Of the prompt; one choice of a request collects them."""
        wanted = self.request.report_statistics or self.neurons.needs_statistics
        collects = wanted and self.choice == 0 and self.in_first_prefill
        return self.neurons.statistics_kind if collects else None

    @property
    def wants_prompt_logprobs(self) -> bool:
        asked = self.request.output.prompt_logprobs is not None
        return asked and self.choice == 0 and self.in_first_prefill

    @property
    def cacheable_keys(self) -> Ordered[bytes]:
        """Keys of the blocks that may come from the prefix cache. One token at least is computed, for its
        logits; all are where prompt log-probabilities are wanted.
        """
        if self.wants_prompt_logprobs:
            return ()
        last = self.prompt_len - 1 if self.in_first_prefill else self.prefill_target
        return self.keys[: last // BLOCK_SIZE]

    @property
    def positions_after_next_token(self) -> int:
        """KV positions this sequence holds once it decodes its next token."""
        return self.prompt_len + max(len(self.output_token_ids), 1)

    @property
    def refreshes(self) -> int:
        """Dense passes over decoded tokens."""
        return self.refresh.passes if self.refresh else 0

    @property
    def drafted_tokens(self) -> int:
        """Those that were verified."""
        return self.speculation.drafted_tokens if self.speculation else 0

    @property
    def accepted_tokens(self) -> int:
        """Of them, those that came out."""
        return self.speculation.accepted_tokens if self.speculation else 0

    def tokens(self, start: int, count: int) -> tuple[int, ...]:
        """Token ids at positions [start, start + count) of prompt, output and drafts, one after another."""
        drafts = self.speculation.drafts if self.speculation else ()
        ids: list[int] = []
        for part in (self.request.prompt_token_ids, self.output_token_ids, drafts):
            ids += part[max(start, 0) : max(start + count, 0)]
            start -= len(part)
        return tuple(ids)

    def stored_block(self, index: int) -> BlockStored | None:
        """What watchers of the prefix cache are told of the prompt's whole block `index`."""
        if self.request.cache_salt:
            return None
        start = index * BLOCK_SIZE
        ids = self.request.prompt_token_ids[start : start + BLOCK_SIZE]
        parent = self.keys[index - 1] if index else None
        return BlockStored(self.keys[index], parent, index, array("I", ids))

    def take_cached(self, cached: Ordered[CachedBlock]) -> None:
        """These blocks, from the cache, now begin this sequence; it has not computed anything yet."""
        assert self.num_computed == 0
        self.num_computed = len(cached) * BLOCK_SIZE
        if self.first_scheduled is None:
            self.cached_tokens = self.num_computed
        if (kind := self.wanted_statistics) is not None:
            assert self.statistics is not None
            for block in cached:
                self.statistics.append_block(block.statistics[kind])

    def take_prompt_output(
        self, parts: Ordered[NeuronStatistics] | None, scores: TargetScores | None
    ) -> None:
        """What a forward told of prompt tokens from `num_computed` on; call it before `advance`."""
        if parts is not None:
            assert self.statistics is not None
            self.statistics.extend(self.num_computed, parts)
        if scores is not None:
            first = self.num_computed + 1  # the first position scores the second token
            rows = zip(
                scores.logprobs.tolist(),
                scores.top_ids.tolist(),
                scores.top_logprobs.tolist(),
                strict=True,
            )
            for position, (logprob, top_ids, top_logprobs) in enumerate(rows, first):
                top = tuple(map(TopToken, top_ids, top_logprobs))
                token_id = self.request.prompt_token_ids[position]
                self.prompt_tokens.append(PromptToken(token_id, logprob, top))

    def choose_neurons(self) -> None:
        """The prompt is in, and its first token is about to be drawn. Raises InvalidRequest of a prompt that
        is too short for the policy.
        """
        self.neurons.choose(self.statistics)
        if not self.request.report_statistics:
            self.statistics = None  # as large as the prompt's KV

    def choose_anew(self) -> None:
        """A dense pass over decoded tokens is over."""
        assert self.refresh is not None
        self.neurons.refreshed()
        if self.neurons.choice.is_dense:
            self.refresh.end()

    def append(self, token_id: int) -> None:
        """A token was generated."""
        self.output_token_ids.append(token_id)
        if self.speculation is not None:
            self.speculation.check(token_id)

    def advance(self, count: int) -> None:
        """`count` more positions have KV now."""
        self.num_computed += count
        self.finish_recompute()

    def lose_blocks(self) -> None:
        """Preempted: nothing is computed any more."""
        self.num_computed = 0
        self.block_table = []
        self.status = Status.WAITING
        if self.speculation is not None:
            self.speculation.drop()
        if self.in_first_prefill:
            self._begin_prompt()

    def _begin_prompt(self) -> None:
        if self.wanted_statistics is not None:
            self.statistics = PromptStatistics(BLOCK_SIZE)
        if self.wants_prompt_logprobs:
            self.prompt_tokens = [PromptToken(self.request.prompt_token_ids[0], None)]

    def finish_recompute(self) -> None:
        """Prefill that reached its target hands over to the restored decoded blocks, if any."""
        if self.resume_at is not None and self.num_computed == self.prefill_target:
            self.num_computed, self.resume_at = self.resume_at, None
            self.prefill_target = self.prompt_len

    def timings(self) -> Timings:
        scheduled, first, last = self.first_scheduled, self.first_token, self.last_token
        return Timings(
            queue=(scheduled or time.monotonic()) - self.arrival,
            ttft=first - self.arrival if first else 0.0,
            prefill=first - scheduled if first and scheduled else 0.0,
            decode=last - first if first and last else 0.0,
        )

    def finish(
        self,
        reason: FinishReason,
        *,
        stop_string: str | None = None,
        stop_token_id: int | None = None,
        error: SparserveError | None = None,
    ) -> Finish:
        """The record of this sequence's end; freeing its blocks is the scheduler's."""
        # Sorting them takes long for a large model, so only where somebody will read it.
        wanted = self.request.report_statistics and error is None
        ended = wanted and reason is not FinishReason.CANCELLED
        total = self.statistics.total() if self.statistics and ended else None
        return Finish(
            reason=reason,
            timings=self.timings(),
            prompt_tokens=self.prompt_len,
            completion_tokens=len(self.output_token_ids),
            cached_tokens=self.cached_tokens,
            stop_string=stop_string,
            stop_token_id=stop_token_id,
            sparsity=self.neurons.report(
                refreshes=self.refreshes,
                drafted=self.drafted_tokens,
                accepted=self.accepted_tokens,
            ),
            core_share=total.share_holding(0.9) if total and total.tokens else None,
            error=error,
        )
