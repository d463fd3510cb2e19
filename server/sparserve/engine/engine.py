"""The engine: one synchronous `step` over all requests in flight."""

from __future__ import annotations

import logging
import secrets
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, replace

from sparse_kernels.native import DeviceLost, NativeCallError
from sparserve.engine.block_manager import BlockManager, blocks_for, prefix_keys
from sparserve.engine.cache_events import BlockStored, CacheEvent
from sparserve.engine.choosing import ChoiceState
from sparserve.engine.in_flight import InFlight
from sparserve.engine.inputs import input_of
from sparserve.engine.limits import EngineLimits, validate
from sparserve.engine.logits import LogitAdjuster, Mask, refused_tokens
from sparserve.engine.next_token import continue_text, draft, draw
from sparserve.engine.policies import Policies
from sparserve.engine.refresh import Refresh
from sparserve.engine.request import (
    FinishReason,
    GenerationRequest,
    PromptToken,
    Update,
)
from sparserve.engine.sampler import Row, rows_of
from sparserve.engine.scheduler import Plan, Scheduled, Scheduler, Swap, Work
from sparserve.engine.sequence import Sequence
from sparserve.engine.speculation import Speculation
from sparserve.engine.tokenizer import TextTokenizer
from sparserve.errors import (
    ConfigError,
    DeviceFailure,
    EngineFailure,
    InvalidRequest,
)
from sparserve.metrics import Metrics
from sparserve.model.backend import Backend, ForwardBatch, ForwardOutput, Phase, SequenceInput
from sparserve.sparsity.chooser import ChoicePlan

log = logging.getLogger(__name__)

# After so many failed steps without a sign of life between, the engine stops taking requests.
MAX_CONSECUTIVE_FAILURES = 3


class Engine:
    """Not thread-safe: one thread adds, aborts and steps."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: TextTokenizer,
        limits: EngineLimits,
        metrics: Metrics,
        policies: Policies,
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
        self.policies = policies
        self.broken: EngineFailure | DeviceFailure | None = None  # what ended it
        self._blocks = BlockManager(backend.num_blocks, prefix_cache=limits.prefix_cache)
        self._scheduler = Scheduler(
            self._blocks,
            limits.max_running,
            limits.max_batched_tokens,
            limits.mixed_prefill_tokens,
        )
        self._eos = frozenset(backend.config.eos_token_ids)
        self._in_flight = InFlight(self._scheduler, metrics)
        self._failures = 0
        metrics.watch_engine(
            num_blocks=backend.num_blocks,
            num_running=lambda: self.num_running,
            num_waiting=lambda: self.num_waiting,
            used_blocks=lambda: self.used_blocks,
        )

    @property
    def has_work(self) -> bool:
        return bool(self._in_flight)

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting)

    @property
    def used_blocks(self) -> int:
        return self._blocks.num_used

    @property
    def cached_blocks(self) -> int:
        """Blocks that nobody uses and that hold a cached prompt."""
        return self._blocks.num_idle

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens in flight that have no KV yet."""
        return self._in_flight.waiting_tokens

    def watch_cache(self, on_change: Callable[[CacheEvent], None] | None) -> None:
        """Tell `on_change` from now on what happens to the prefix cache, while a step runs; None: nobody."""
        self._blocks.on_change = on_change

    def cached_prefixes(self) -> list[BlockStored]:
        """What is cached, the beginnings of prompts first."""
        return self._blocks.told_blocks()

    def flush_cache(self) -> bool:
        """Forget all cached prompts; False, and nothing done, where requests are in flight."""
        if self.has_work:
            return False
        self._blocks.forget_cached()
        return True

    def warm_up(self) -> None:
        """Run prefill and decode once, before the first request, so that none pays for it. Raises ConfigError
        where the native library cannot."""
        assert not self.has_work
        token = SequenceInput((0,), 0, (0,), Phase.PREFILL, output_offsets=(0,))
        try:
            self.backend.forward(ForwardBatch([token]))
            self.backend.forward(ForwardBatch([replace(token, start=1, phase=Phase.DECODE)]))
        except NativeCallError as error:
            info = self.backend.info
            raise ConfigError(
                f"backend {info.title} cannot compute on {info.place}: {error}"
            ) from error

    def validate(self, request: GenerationRequest) -> None:
        """Raises InvalidRequest, PromptTooLong or SparsityUnavailable; touches no state, so any thread may
        call it."""
        validate(request, self.limits, self.backend.config.vocab_size)
        plan = self.policies.plan(request.policy)
        if plan.score is not None and len(request.prompt_token_ids) == 1:
            (plan.drafts or plan).choose(
                None
            )  # the attention sink counts nowhere: there will be no statistics

    def add(self, request: GenerationRequest) -> None:
        """Take a validated request whose id is not in flight."""
        keys: tuple[bytes, ...] = ()
        if self.limits.prefix_cache:
            keys = tuple(prefix_keys(request.prompt_token_ids, request.cache_salt))
        seed = request.sampling.seed
        seed = secrets.randbits(64) if seed is None else seed
        refused = refused_tokens(request, self.backend.config.vocab_size)
        plan = self.policies.plan(request.policy)
        first = self._new_sequence(request, plan, keys, refused, seed)
        others = [
            self._new_sequence(request, plan, keys, refused, seed, choice, first.neurons)
            for choice in range(1, request.sampling.n)
        ]
        shares = bool(others) and (len(keys) > 0 or first.neurons.needs_statistics)
        self._in_flight.add([first, *others], share_prompt=shares)
        self.metrics.prompt_tokens.inc(first.prompt_len)

    def _new_sequence(
        self,
        request: GenerationRequest,
        plan: ChoicePlan,
        keys: tuple[bytes, ...],
        refused: Mask | None,
        seed: int,
        choice: int = 0,
        first: ChoiceState | None = None,
    ) -> Sequence:
        config, stopping = self.backend.config, request.stopping
        detokenizer = self.tokenizer.detokenizer(
            stopping.stop,
            before=request.prompt_token_ids,
            include_stop=stopping.include_stop,
            skip_special_tokens=request.output.skip_special_tokens,
        )
        max_tokens = stopping.max_tokens or self.limits.default_max_tokens
        prompt = request.prompt_token_ids
        return Sequence(
            request,
            max_tokens=max_tokens,
            detokenizer=detokenizer,
            adjuster=LogitAdjuster(request, config.vocab_size, config.eos_token_ids, refused),
            neurons=ChoiceState(plan, self.backend.info, self.policies.plan, first),
            keys=keys,
            seed=seed,
            choice=choice,
            speculation=Speculation.of(
                plan, prompt, min(max_tokens, self.limits.max_context - len(prompt))
            ),
            refresh=Refresh.of(plan, len(prompt)),
        )

    def abort(self, request_id: str, reason: FinishReason = FinishReason.CANCELLED) -> list[Update]:
        """End a request now, its blocks free at once; [] where it is not in flight."""
        return [
            self._in_flight.end(s, s.finish(reason), s.detokenizer.flush())
            for s in self._in_flight.choices(request_id)
        ]

    def step(self) -> list[Update]:
        """Run one batch. A failure ends the requests of that batch with EngineFailure, nobody else's; that of
        a GPU all with DeviceFailure, for good."""
        started = time.monotonic()
        updates = self._in_flight.expire(started)
        plan = Plan()
        try:
            plan = self._scheduler.schedule()
            if plan.scheduled:
                self._run(plan, started, updates)
            self._failures = 0
        except DeviceLost:
            self.broken = DeviceFailure(self._log_failure("the GPU"))
            updates += self._in_flight.fail_everything(self.broken)
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
        vocab_size = self.backend.config.vocab_size
        inputs = [input_of(item, vocab_size) for item in plan.scheduled]
        output = self.backend.forward(ForwardBatch(inputs))
        if output.head is not None:
            self.metrics.observe_head(**asdict(output.head))
        self._count_reads(plan, inputs, output)
        rows = iter(rows_of(output.candidates, vocab_size))
        parts = zip(plan.scheduled, output.statistics, output.scores, strict=True)
        for item, statistics, scores in parts:
            self._note_first_schedule(item.sequence, now)
            if item.work is Work.PROMPT:
                item.sequence.take_prompt_output(statistics, scores)
            elif statistics is not None:
                item.sequence.neurons.take_refreshed(item.start, statistics)
        wanting = [(item, [next(rows) for _ in item.outputs]) for item in plan.scheduled]
        self._scheduler.update(plan)
        for item, own_rows in wanting:
            sequence = item.sequence
            try:
                if item.work is Work.DRAFT:
                    draft(sequence, own_rows[0])
                    continue
                if item.work is Work.REFRESH and own_rows:
                    sequence.choose_anew()
                if own_rows:
                    self._take_tokens(sequence, own_rows, updates)
            except InvalidRequest as error:
                updates += self._in_flight.fail(sequence, error)
            except Exception:  # the step is done: nobody else is touched
                error_id = self._log_failure("a request's own step")
                updates += self._in_flight.fail(sequence, EngineFailure(error_id))

    def _count_reads(self, plan: Plan, inputs: list[SequenceInput], output: ForwardOutput) -> None:
        reads = output.reads or [None] * len(inputs)
        for item, own, read in zip(plan.scheduled, inputs, reads, strict=True):
            if own.phase is Phase.DECODE:
                context = own.start + len(own.token_ids)
                item.sequence.neurons.count_pass(own.choice, read, context)
        if output.union is not None:
            neurons = self.backend.config.num_neurons * output.union.tokens
            self.metrics.union_share.observe(int(output.union.counts[:, 1].sum()) / neurons)

    def _note_first_schedule(self, sequence: Sequence, now: float) -> None:
        if sequence.first_scheduled is not None:
            return
        sequence.first_scheduled = now
        if sequence.choice == 0:
            self.metrics.observe_scheduled(
                queue_seconds=now - sequence.request.arrival, cached_tokens=sequence.cached_tokens
            )

    def _take_tokens(self, sequence: Sequence, rows: list[Row], updates: list[Update]) -> None:
        """A token from each row, as long as those before it are what the forward was given as drafts."""
        speculation = sequence.speculation
        for row in rows:
            updates.append(self._take_token(sequence, row))
            if updates[-1].finish is not None or speculation is None:
                return
            if not speculation.is_right:  # nor is any after it
                speculation.verified()
                return
            self._scheduler.keep(sequence)

    def _take_token(self, sequence: Sequence, row: Row) -> Update:
        if sequence.in_first_prefill:
            sequence.choose_neurons()
        token = draw(sequence, row)
        now = time.monotonic()
        prompt: tuple[PromptToken, ...] = ()
        if sequence.last_token is None:
            sequence.first_token = now
            self.metrics.observe_first_token(now - sequence.request.arrival)
            prompt = tuple(sequence.prompt_tokens)
            self._in_flight.release_choices(sequence)
        else:
            self.metrics.observe_next_token(now - sequence.last_token)
            sequence.neurons.count_token()
        sequence.last_token = now
        sequence.append(token.id)
        text, finish = continue_text(sequence, token.id, self._eos, self.limits.max_context)
        if finish is None:
            return Update(
                sequence.request.request_id, sequence.choice, text, (token,), prompt=prompt
            )
        return self._in_flight.end(sequence, finish, text, (token,), prompt)

    def _fail(self, plan: Plan) -> list[Update]:
        """End what was in the failed step; without a plan, everything, for nothing can be trusted."""
        error = EngineFailure(self._log_failure("an engine step"))
        # A swap that did not happen leaves a sequence without its KV, so those count too.
        lost = [swap for swap in plan.swaps_out if swap.sequence.host_blocks is None]
        parts: list[Scheduled | Swap] = [*plan.scheduled, *lost, *plan.swaps_in]
        updates = self._in_flight.fail_all([part.sequence for part in parts], error)
        if not parts:
            updates += self._in_flight.fail_everything(error)
        if self._works():  # then it was something about these requests
            self._failures = 0
            return updates
        self._failures += 1
        if self._failures >= MAX_CONSECUTIVE_FAILURES:
            self.broken = error
            updates += self._in_flight.fail_everything(error)
        return updates

    def _works(self) -> bool:
        """The backend can still run a token."""
        if not self._blocks.num_free:
            return True  # the next step will show
        blocks = self._blocks.allocate(1)
        try:
            self.backend.forward(ForwardBatch([SequenceInput((0,), 0, blocks, Phase.PREFILL)]))
        except Exception:
            return False
        finally:
            self._blocks.free(blocks)
        return True

    def _log_failure(self, what: str) -> str:
        """-> the error id that the log has now."""
        error_id = uuid.uuid4().hex[:12]
        log.exception("%s failed, error id %s", what, error_id)
        self.metrics.step_failures.inc()
        return error_id

    def _record(self, plan: Plan, seconds: float) -> None:
        self.metrics.observe_step(
            seconds=seconds,
            tokens=plan.num_tokens,
            preempted=plan.preempted,
            prefix_queries=plan.prefix_queries,
            prefix_hits=plan.prefix_hits,
        )
