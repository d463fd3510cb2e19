"""A request inside the engine: its tokens, its KV blocks, how far it has come."""

from __future__ import annotations

import secrets
import time
from enum import Enum

import torch

from sparserve.engine.detokenizer import Detokenizer
from sparserve.engine.request import (
    Finish,
    FinishReason,
    GenerationRequest,
    Timings,
)
from sparserve.errors import SparserveError
from sparserve.model.backend import Phase
from sparserve.sparsity.statistics import NeuronStatistics


class Status(Enum):
    WAITING = "waiting"  # new or preempted
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Mutable state of one request; only the engine thread touches it.

    KV exists for positions [0, num_computed). Positions up to `prefill_target` come from prefill.
    A preempted sequence keeps its decoded blocks in `host_blocks` (they belong at the end of its
    block table) and `resume_at`, the `num_computed` it returns to once prefill reached its target.
    """

    def __init__(
        self, request: GenerationRequest, max_tokens: int, detokenizer: Detokenizer
    ) -> None:
        self.request = request
        self.max_tokens = max_tokens
        self.detokenizer = detokenizer
        self.seed = secrets.randbits(64) if request.sampling.seed is None else request.sampling.seed
        self.output_token_ids: list[int] = []
        self.status = Status.WAITING
        self.block_table: list[int] = []
        self.num_computed = 0
        self.prefill_target = self.prompt_len
        self.resume_at: int | None = None
        self.host_blocks: torch.Tensor | None = None
        self.statistics: NeuronStatistics | None = None
        self.first_scheduled: float | None = None
        self.first_token: float | None = None
        self.last_token: float | None = None

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
    def positions_after_next_token(self) -> int:
        """KV positions this sequence holds once it decodes its next token."""
        return self.prompt_len + max(len(self.output_token_ids), 1)

    def tokens(self, start: int, count: int) -> tuple[int, ...]:
        """Token ids at positions [start, start + count), prompt and output together."""
        prompt = self.request.prompt_token_ids[start : start + count]
        first = max(start - self.prompt_len, 0)
        return (*prompt, *self.output_token_ids[first : first + count - len(prompt)])

    def advance(self, count: int) -> None:
        """`count` more positions have KV now."""
        self.num_computed += count
        self.finish_recompute()

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
        share = (
            self.statistics.share_holding(0.9)
            if self.statistics and self.statistics.tokens
            else None
        )
        return Finish(
            reason=reason,
            timings=self.timings(),
            prompt_tokens=self.prompt_len,
            completion_tokens=len(self.output_token_ids),
            stop_string=stop_string,
            stop_token_id=stop_token_id,
            core_share=share,
            error=error,
        )
