"""The engine: one synchronous `step` over all requests in flight."""

from __future__ import annotations

import logging
import time
import uuid
from dataclasses import dataclass, replace

from sparserve.engine.block_manager import BlockManager, blocks_for
from sparserve.engine.request import (
    MAX_REQUEST_ID_LENGTH,
    Finish,
    FinishReason,
    GeneratedToken,
    GenerationRequest,
    Update,
)
from sparserve.engine.sampler import Row, rows_of, sample
from sparserve.engine.scheduler import Plan, Scheduled, Scheduler, Swap
from sparserve.engine.sequence import Sequence
from sparserve.engine.tokenizer import TextTokenizer
from sparserve.errors import (
    ConfigError,
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    PromptTooLong,
)
from sparserve.metrics import Metrics
from sparserve.model.backend import Backend, ForwardBatch, Phase, SequenceInput
from sparserve.sparsity.statistics import NeuronStatistics

log = logging.getLogger(__name__)

# After so many failed steps without a good one between, the engine stops taking requests.
MAX_CONSECUTIVE_FAILURES = 3


@dataclass(frozen=True, slots=True)
class EngineLimits:
    max_context: int  # positions, prompt and new tokens together
    max_running: int = 16
    max_batched_tokens: int = 512
    default_max_tokens: int = 256


class Engine:
    """Not thread-safe: one thread adds, aborts and steps."""

    def __init__(
        self, backend: Backend, tokenizer: TextTokenizer, limits: EngineLimits, metrics: Metrics
    ) -> None:
        """Raises ConfigError where the KV pool cannot hold one full context."""
        if blocks_for(limits.max_context) > backend.num_blocks:
            raise ConfigError(
                f"the KV cache has {backend.num_blocks} blocks, one context of {limits.max_context} "
                f"tokens needs {blocks_for(limits.max_context)}; raise the KV cache or lower the context"
            )
        self.backend = backend
        self.tokenizer = tokenizer
        self.limits = limits
        self.metrics = metrics
        self.broken: str | None = None  # the error id that ended it
        self._scheduler = Scheduler(
            BlockManager(backend.num_blocks), limits.max_running, limits.max_batched_tokens
        )
        self._sequences: dict[str, Sequence] = {}
        self._failures = 0
        metrics.kv_blocks_total.set(backend.num_blocks)
        metrics.running.set_function(lambda: self.num_running)
        metrics.waiting.set_function(lambda: self.num_waiting)
        metrics.kv_blocks_used.set_function(lambda: self.used_blocks)

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting)

    @property
    def used_blocks(self) -> int:
        return self._scheduler.blocks.num_used

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens in flight that have no KV yet."""
        # list() first: other threads ask while the engine thread adds and removes.
        in_flight = list(self._sequences.values())
        return sum(s.prefill_target - s.num_computed for s in in_flight if s.phase is Phase.PREFILL)

    def warm_up(self) -> None:
        """Run prefill and decode once, before the first request, so that none pays for it."""
        assert not self.has_work
        token = SequenceInput((0,), 0, (0,), Phase.PREFILL, output_offsets=(0,))
        self.backend.forward(ForwardBatch([token]))
        self.backend.forward(ForwardBatch([replace(token, start=1, phase=Phase.DECODE)]))

    def validate(self, request: GenerationRequest) -> None:
        """Raises InvalidRequest or PromptTooLong; touches no state, so any thread may call it."""
        if len(request.request_id) > MAX_REQUEST_ID_LENGTH:
            raise InvalidRequest(
                "request_id",
                f"request_id has {len(request.request_id)} characters, the limit is {MAX_REQUEST_ID_LENGTH}",
            )
        self.tokenizer.check(request.prompt_token_ids)
        prompt_len, limit = len(request.prompt_token_ids), self.limits.max_context - 1
        if prompt_len == 0:
            raise InvalidRequest("prompt", "the prompt is empty; at least one token is needed")
        if prompt_len > limit:
            raise PromptTooLong(
                "prompt",
                f"the prompt has {prompt_len} tokens, the limit is {limit} "
                f"(a context of {self.limits.max_context} less one new token)",
                limit,
            )

    def add(self, request: GenerationRequest) -> None:
        """Take a validated request whose id is not in flight."""
        asked = request.stopping.max_tokens or self.limits.default_max_tokens
        detokenizer = self.tokenizer.detokenizer(request.stopping.stop)
        sequence = Sequence(request, asked, detokenizer)
        self._sequences[request.request_id] = sequence
        self._scheduler.add(sequence)
        self.metrics.prompt_tokens.inc(sequence.prompt_len)

    def abort(self, request_id: str) -> Update | None:
        """End a request now, its blocks free at once; None where it is not in flight."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return None
        return self._end(
            sequence, sequence.finish(FinishReason.CANCELLED), sequence.detokenizer.flush()
        )

    def step(self) -> list[Update]:
        """Run one batch. A failure ends the requests of that batch with EngineFailure, nobody else's."""
        started = time.monotonic()
        updates = self._expire(started)
        plan = Plan()
        try:
            plan = self._scheduler.schedule()
            if plan.scheduled:
                self._run(plan, started, updates)
            self._failures = 0
        except Exception:
            updates += self._fail(plan)
        self._record(plan, time.monotonic() - started)
        return updates

    def _run(self, plan: Plan, now: float, updates: list[Update]) -> None:
        """Appends to `updates` as it goes, so that a failure half-way loses none."""
        for swap in plan.swaps_out:
            swap.sequence.host_blocks = self.backend.read_blocks(swap.blocks)
        for swap in plan.swaps_in:
            assert swap.sequence.host_blocks is not None
            self.backend.write_blocks(swap.blocks, swap.sequence.host_blocks)
            swap.sequence.host_blocks = None
        output = self.backend.forward(ForwardBatch([_input(item) for item in plan.scheduled]))
        rows = iter(rows_of(output.candidates, self.backend.config.vocab_size))
        for item, statistics in zip(plan.scheduled, output.statistics, strict=True):
            sequence = item.sequence
            sequence.first_scheduled = sequence.first_scheduled or now
            _add_statistics(sequence, statistics)
        wanting = [(item.sequence, next(rows)) for item in plan.scheduled if item.wants_token]
        self._scheduler.update(plan)
        for sequence, row in wanting:
            try:
                updates.append(self._take_token(sequence, row))
            except Exception:  # the step is done: nobody else is touched
                updates.append(
                    self._end_failed(sequence, self._log_failure("a request's own step"))
                )

    def _take_token(self, sequence: Sequence, row: Row) -> Update:
        token = sample(
            row, sequence.request.sampling, sequence.seed, step=len(sequence.output_token_ids)
        )
        now = time.monotonic()
        if sequence.last_token is None:
            sequence.first_token = now
            self.metrics.ttft.observe(now - sequence.arrival)
        else:
            self.metrics.itl.observe(now - sequence.last_token)
        sequence.last_token = now
        sequence.output_token_ids.append(token.id)
        self.metrics.generation_tokens.inc()
        text, stop = "", None
        ends = self._is_eos(sequence, token.id)
        if not ends:
            text, stop = sequence.detokenizer.push(token.id)
        finish = self._finish_of(sequence, token.id if ends else None, stop)
        if finish is None:
            return Update(sequence.request.request_id, text=text, tokens=(token,))
        if stop is None:
            text += sequence.detokenizer.flush()
        return self._end(sequence, finish, text, (token,))

    def _is_eos(self, sequence: Sequence, token_id: int) -> bool:
        known = token_id in self.backend.config.eos_token_ids
        return known and not sequence.request.stopping.ignore_eos

    def _finish_of(
        self, sequence: Sequence, eos_token_id: int | None, stop: str | None
    ) -> Finish | None:
        if eos_token_id is not None:
            return sequence.finish(FinishReason.STOP_EOS, stop_token_id=eos_token_id)
        if stop is not None:
            return sequence.finish(FinishReason.STOP_STRING, stop_string=stop)
        generated = len(sequence.output_token_ids)
        if generated >= sequence.max_tokens:
            return sequence.finish(FinishReason.LENGTH)
        if sequence.prompt_len + generated >= self.limits.max_context:
            return sequence.finish(FinishReason.CONTEXT)
        return None

    def _end(
        self,
        sequence: Sequence,
        finish: Finish,
        text: str = "",
        tokens: tuple[GeneratedToken, ...] = (),
    ) -> Update:
        self._scheduler.remove(sequence)
        del self._sequences[sequence.request.request_id]
        self.metrics.requests_finished.labels(reason=finish.reason.value).inc()
        self.metrics.e2e_latency.observe(time.monotonic() - sequence.arrival)
        if sequence.first_scheduled is not None:
            self.metrics.queue_time.observe(finish.timings.queue)
        return Update(sequence.request.request_id, text=text, tokens=tokens, finish=finish)

    def _expire(self, now: float) -> list[Update]:
        late = [
            s
            for s in self._sequences.values()
            if s.request.deadline is not None and s.request.deadline <= now
        ]
        return [
            self._end(
                s,
                s.finish(
                    FinishReason.DEADLINE,
                    error=DeadlineExceeded(
                        f"the deadline passed after {len(s.output_token_ids)} of {s.max_tokens} tokens"
                    ),
                ),
            )
            for s in late
        ]

    def _fail(self, plan: Plan) -> list[Update]:
        """End what was in the failed step; without a plan, everything, for nothing can be trusted."""
        error = self._log_failure("an engine step")
        self._failures += 1
        if self._failures >= MAX_CONSECUTIVE_FAILURES:
            self.broken = error.error_id
        # A swap that did not happen leaves a sequence without its KV, so those count too.
        parts: list[Scheduled | Swap] = [*plan.scheduled, *plan.swaps_out, *plan.swaps_in]
        involved = {id(part.sequence): part.sequence for part in parts}
        if self.broken or not involved:
            involved = {id(sequence): sequence for sequence in self._sequences.values()}
        in_flight = [s for s in involved.values() if s.request.request_id in self._sequences]
        return [self._end_failed(sequence, error) for sequence in in_flight]

    def _log_failure(self, what: str) -> EngineFailure:
        error = EngineFailure(uuid.uuid4().hex[:12])
        log.exception("%s failed, error id %s", what, error.error_id)
        self.metrics.step_failures.inc()
        return error

    def _end_failed(self, sequence: Sequence, error: EngineFailure) -> Update:
        return self._end(sequence, sequence.finish(FinishReason.ERROR, error=error))

    def _record(self, plan: Plan, seconds: float) -> None:
        self.metrics.preemptions.inc(plan.preempted)
        if plan.scheduled:
            self.metrics.step_time.observe(seconds)
            self.metrics.step_tokens.observe(sum(item.count for item in plan.scheduled))


def _input(item: Scheduled) -> SequenceInput:
    sequence = item.sequence
    first_prefill = item.phase is Phase.PREFILL and sequence.in_first_prefill
    return SequenceInput(
        token_ids=sequence.tokens(sequence.num_computed, item.count),
        start=sequence.num_computed,
        block_table=sequence.block_table,
        phase=item.phase,
        policy=sequence.request.policy,
        output_offsets=(item.count - 1,) if item.wants_token else (),
        temperature=sequence.request.sampling.temperature or 1.0,
        collect_statistics=first_prefill and sequence.request.report_statistics,
    )


def _add_statistics(sequence: Sequence, statistics: NeuronStatistics | None) -> None:
    if statistics is None:
        return
    if sequence.statistics is None:
        sequence.statistics = statistics
    else:
        sequence.statistics += statistics
