"""The requests that the engine has taken and that have not ended, and how each of their choices ends."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from sparserve.engine.request import (
    Finish,
    FinishReason,
    GeneratedToken,
    PromptToken,
    Update,
)
from sparserve.engine.scheduler import Scheduler
from sparserve.engine.sequence import Sequence
from sparserve.errors import DeadlineExceeded, RequestError, SparserveError
from sparserve.metrics import Metrics
from sparserve.model.backend import Phase


@dataclass(slots=True)
class _Request:
    """The choices of one request: those in the scheduler, and those that wait for the first one's
    prefill, to share its blocks."""

    sequences: list[Sequence]
    held_back: list[Sequence] = field(default_factory=list)
    cached_tokens: int = 0  # of the prompt, in the first choice
    longest: int = 0  # tokens in one of the choices that have ended


class InFlight:
    """False where there are none. What ends leaves the scheduler, and the metrics count it."""

    def __init__(self, scheduler: Scheduler, metrics: Metrics) -> None:
        self._scheduler = scheduler
        self._metrics = metrics
        self._requests: dict[str, _Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens that have no KV yet. Any thread may ask."""
        # list() first: the engine's thread adds and removes meanwhile.
        sequences = [s for request in list(self._requests.values()) for s in request.sequences]
        return sum(s.prefill_target - s.num_computed for s in sequences if s.phase is Phase.PREFILL)

    def add(self, choices: list[Sequence], *, share_prompt: bool) -> None:
        """All of one request; with `share_prompt` the others wait until the first one has its prompt's KV."""
        first, *others = choices
        entry = _Request([first], others) if share_prompt else _Request(choices)
        self._requests[first.request.request_id] = entry
        for sequence in entry.sequences:
            self._scheduler.add(sequence)

    def choices(self, request_id: str) -> list[Sequence]:
        """Of a request that may not be in flight."""
        request = self._requests.get(request_id)
        return [] if request is None else [*request.sequences, *request.held_back]

    def release_choices(self, sequence: Sequence) -> None:
        """A request's first choice has its prompt's KV: the others find it in the prefix cache."""
        request = self._requests[sequence.request.request_id]
        for held_back in request.held_back:
            request.sequences.append(held_back)
            self._scheduler.add(held_back)
        request.held_back = []

    def end(
        self,
        sequence: Sequence,
        finish: Finish,
        text: str = "",
        tokens: tuple[GeneratedToken, ...] = (),
        prompt: tuple[PromptToken, ...] = (),
    ) -> Update:
        request_id = sequence.request.request_id
        request = self._requests[request_id]
        if sequence in request.held_back:
            request.held_back.remove(sequence)
        else:
            self._scheduler.remove(sequence)
            request.sequences.remove(sequence)
            if sequence.choice == 0:
                request.cached_tokens = sequence.cached_tokens
            if sequence.first_token is None:
                self.release_choices(sequence)  # the first choice failed; theirs is another fate
        request.longest = max(request.longest, finish.completion_tokens)
        self._count(sequence, finish)
        if not request.sequences and not request.held_back:
            del self._requests[request_id]
            self._metrics.observe_request(
                n=sequence.request.sampling.n,
                max_tokens=sequence.max_tokens,
                prompt_tokens=sequence.prompt_len,
                cached_tokens=request.cached_tokens,
                longest=request.longest,
            )
        return Update(request_id, sequence.choice, text, tokens, finish, prompt)

    def _count(self, sequence: Sequence, finish: Finish) -> None:
        at_fault = isinstance(finish.error, RequestError)
        self._metrics.observe_finish(
            "invalid" if at_fault else finish.reason.value,
            e2e_seconds=time.monotonic() - sequence.request.arrival,
            prefill_seconds=finish.timings.prefill,
            decode_seconds=finish.timings.decode,
            completion_tokens=finish.completion_tokens,
        )
        report = finish.sparsity
        self._metrics.observe_sparsity(
            report.policy.value,
            density=report.density if report.decoded_tokens else None,
            coverage=report.coverage,
            refreshes=report.refreshes,
            drafted=report.drafted_tokens,
            accepted=report.accepted_tokens,
            fallbacks=report.fallbacks,
        )

    def expire(self, now: float) -> list[Update]:
        """End all whose deadline has passed."""
        late = [
            s
            for request_id, request in self._requests.items()
            if (deadline := request.sequences[0].request.deadline) is not None and deadline <= now
            for s in self.choices(request_id)
        ]
        return [self.end(s, s.finish(FinishReason.DEADLINE, error=_too_late(s))) for s in late]

    def fail(self, sequence: Sequence, error: SparserveError) -> list[Update]:
        """End a choice, and those that waited for its prefill: theirs would fail as well."""
        request = self._requests[sequence.request.request_id]
        return [
            self.end(s, s.finish(FinishReason.ERROR, error=error))
            for s in (*request.held_back, sequence)
        ]

    def fail_all(self, sequences: Iterable[Sequence], error: SparserveError) -> list[Update]:
        """Those of them that have not ended with another one."""
        updates: list[Update] = []
        for sequence in sequences:
            if sequence in self.choices(sequence.request.request_id):
                updates += self.fail(sequence, error)
        return updates

    def fail_everything(self, error: SparserveError) -> list[Update]:
        everything = [s for request_id in self._requests for s in self.choices(request_id)]
        return self.fail_all(everything, error)


def _too_late(sequence: Sequence) -> DeadlineExceeded:
    done, most = len(sequence.output_token_ids), sequence.max_tokens
    return DeadlineExceeded(f"the deadline passed after {done} of {most} tokens")
