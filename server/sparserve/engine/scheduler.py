"""Which sequences run in the next step, and which KV blocks they hold.

Invariants, true between any two calls:

1. A block in use is in as many block tables as the block manager counts, and in more than one only
   where it holds a whole block of a prompt; only waiting sequences that never ran, finished ones and
   preempted ones hold none.
2. A running sequence holds blocks for every position it has computed. `running` and `waiting` are in
   the order of `Sequence.order`: priority, then arrival.
3. A step takes at most `max_batched_tokens` tokens of at most `max_running` sequences. Every running
   sequence that decodes computes a token at least in every step; beside them prompts get at most
   `mixed_prefill_tokens`, so that a long prompt does not hold up who is decoding. Dense passes over
   decoded tokens come before prompts and may take several steps; drafts get what prompts leave.
4. Half of the prompt tokens go to the first prompt in order, the others to the shortest first: a long
   prompt neither starves nor holds up short ones.
5. Blocks are taken from the last in order only, so the first always goes on: with a pool that
   holds one full context, every sequence finishes.
6. Preemption loses nothing: prefilled blocks are computed again to the same bits, decoded ones,
   which prefill could not reproduce, wait in host memory.
7. Drafts cost nobody a block: they get what is free, and are dropped where another needs it. Only KV that
   stays counts as computed.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field, replace
from enum import Enum

from sparserve.engine.block_manager import BlockManager, blocks_for
from sparserve.engine.sequence import Sequence, Status
from sparserve.engine.speculation import Speculation
from sparserve.model.backend import BLOCK_SIZE, Phase

# Verified in a step, of all sequences together: each needs a row of logits of its own, and a step of so many
# tokens no longer takes its time from reading weights.
MAX_DRAFTS = 128


class Work(Enum):
    """What a sequence does in a step."""

    PROMPT = "prompt"
    DECODE = "decode"  # its next token, and the verification of drafts
    DRAFT = "draft"  # the model's own, with fewer neurons
    REFRESH = "refresh"  # decoded tokens once more, with all neurons


@dataclass(frozen=True, slots=True)
class Scheduled:
    """`count` tokens of a sequence, from position `start` on; drafts follow those of its output."""

    sequence: Sequence
    start: int
    count: int
    work: Work

    @property
    def phase(self) -> Phase:
        return Phase.PREFILL if self.work is Work.PROMPT else Phase.DECODE

    @property
    def outputs(self) -> range:
        """Which of the tokens' next-token distributions are wanted."""
        first = self.sequence.num_computed - self.start
        if self.work is Work.PROMPT:
            reached = self.start + self.count == self.sequence.prompt_len
            first = self.count - 1 if reached and self.sequence.in_first_prefill else self.count
        return range(max(first, 0), self.count)

    @property
    def wants_token(self) -> bool:
        """A distribution gives the sequence a new token."""
        return self.work is not Work.DRAFT and len(self.outputs) > 0


@dataclass(frozen=True, slots=True)
class Swap:
    """KV blocks of a sequence that move to host memory, or come back to these blocks."""

    sequence: Sequence
    blocks: tuple[int, ...]


@dataclass(slots=True)
class Plan:
    """One step. Swaps out come first, then swaps in, then the forward."""

    scheduled: list[Scheduled] = field(default_factory=list)
    swaps_out: list[Swap] = field(default_factory=list)
    swaps_in: list[Swap] = field(default_factory=list)
    preempted: int = 0
    prefix_queries: int = 0  # tokens looked for in the prefix cache by sequences that were admitted
    prefix_hits: int = 0  # those found

    @property
    def num_tokens(self) -> int:
        return sum(item.count for item in self.scheduled)


class Scheduler:
    """Continuous batching with chunked prefill and shared prompt prefixes."""

    def __init__(
        self,
        blocks: BlockManager,
        max_running: int,
        max_batched_tokens: int,
        mixed_prefill_tokens: int | None = None,
    ) -> None:
        assert max_batched_tokens >= max_running, "every running sequence decodes in every step"
        self.blocks = blocks
        self.max_running = max_running
        self.max_batched_tokens = max_batched_tokens
        self.mixed_prefill_tokens = mixed_prefill_tokens or max_batched_tokens
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_order)

    def schedule(self) -> Plan:
        plan = Plan()
        for sequence in self.running:
            if sequence.speculation is not None and not sequence.speculation.drafts:
                self._trim(sequence)
        for sequence in list(self.running):
            # One before it may have preempted it.
            if sequence.status is Status.RUNNING and sequence.phase is Phase.DECODE:
                self._schedule_decode(sequence, plan)
        if not plan.preempted:
            self._admit(plan)
        self._schedule_refreshes(plan)
        budget = self.max_batched_tokens - plan.num_tokens
        if plan.scheduled:
            budget = min(budget, self.mixed_prefill_tokens)
        self._schedule_prompts(budget, plan)
        self._schedule_drafts(plan)
        return plan

    def update(self, plan: Plan) -> None:
        """The forward of `plan` is done: its tokens have KV. Of drafts it is not known yet whether theirs
        stays, see `keep`.
        """
        for item in plan.scheduled:
            sequence = item.sequence
            if item.work is Work.PROMPT:
                self._publish(sequence, item.start, item.start + item.count)
                sequence.advance(item.count)
                continue
            if item.work is Work.REFRESH:
                assert sequence.refresh is not None
                sequence.refresh.advance(item.count)
            if item.wants_token:
                self.keep(sequence)

    def keep(self, sequence: Sequence) -> None:
        """The KV of its next position, which decoding wrote, stays."""
        block = sequence.block_table[sequence.num_computed // BLOCK_SIZE]
        self.blocks.mark(block, sequence.neurons.decoded)
        sequence.advance(1)

    def remove(self, sequence: Sequence) -> None:
        """The sequence has finished, for whatever reason; its blocks are free at once."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        self.blocks.free(sequence.block_table)
        sequence.block_table = []
        sequence.host_blocks = None
        sequence.status = Status.FINISHED

    def _publish(self, sequence: Sequence, start: int, stop: int) -> None:
        """Prefill wrote the positions [start, stop): what became whole may be shared."""
        for index in range(start // BLOCK_SIZE, min(stop // BLOCK_SIZE, len(sequence.keys))):
            kind = sequence.wanted_statistics
            statistics = (
                None
                if sequence.statistics is None or kind is None
                else sequence.statistics.block(index)
            )
            self.blocks.publish(
                sequence.block_table[index],
                sequence.keys[index],
                kind,
                statistics,
                stored=sequence.stored_block(index),
            )

    def _schedule_decode(self, sequence: Sequence, plan: Plan) -> None:
        if self._make_room(sequence, plan):
            plan.scheduled.append(_decoding(sequence))

    def _schedule_refreshes(self, plan: Plan) -> None:
        """Dense passes take all their tokens, or as many as a step has room for."""
        budget = self.max_batched_tokens - plan.num_tokens
        for index, item in enumerate(plan.scheduled):
            if item.work is Work.REFRESH:
                more = min(item.sequence.num_computed - item.start, budget)
                plan.scheduled[index] = replace(item, count=1 + more)
                budget -= more

    def _schedule_drafts(self, plan: Plan) -> None:
        """Of steps that decode, those draft instead, or verify, whose policy says so."""
        budget = min(self.max_batched_tokens - plan.num_tokens, MAX_DRAFTS)
        for index, item in enumerate(plan.scheduled):
            if item.work is Work.DECODE and item.sequence.speculation is not None:
                plan.scheduled[index] = self._with_drafts(item, item.sequence.speculation, budget)
                budget -= plan.scheduled[index].count - 1

    def _with_drafts(self, item: Scheduled, speculation: Speculation, budget: int) -> Scheduled:
        """The step with `budget` more tokens at most; as it is where nothing can be drafted."""
        sequence, output = item.sequence, item.sequence.output_token_ids
        position = item.start + len(speculation.drafts)
        # Of more drafts than the budget has tokens for the verification could not take the last.
        drafts_more = speculation.wants_step(output) and len(speculation.drafts) < budget
        if drafts_more and self._fitting(sequence, position + 1) > position:
            return replace(item, start=position, work=Work.DRAFT)
        drafts = speculation.propose(output)
        wanted = item.start + 1 + min(len(drafts), budget)
        del drafts[self._fitting(sequence, wanted) - item.start - 1 :]
        return replace(item, count=1 + len(drafts))

    def _fitting(self, sequence: Sequence, positions: int) -> int:
        """So many of the sequence's first `positions` as blocks last for, free ones included."""
        missing = blocks_for(positions) - len(sequence.block_table)
        if missing > 0:
            sequence.block_table += self.blocks.allocate(min(missing, self.blocks.num_free))
        return min(positions, len(sequence.block_table) * BLOCK_SIZE)

    def _trim(self, sequence: Sequence) -> None:
        """Blocks of drafts that are no more are free again."""
        needed = len(sequence.block_table) - _spare_blocks(sequence)
        self.blocks.free(sequence.block_table[needed:])
        del sequence.block_table[needed:]

    def _drop_drafts(self, wanted: int) -> bool:
        """Whether `wanted` blocks are free, at the cost of drafts, those last in order first; where that would
        not do, none are dropped, or they might be so in every step.
        """
        holders = [s for s in reversed(self.running) if _spare_blocks(s)]
        if wanted > self.blocks.num_free + sum(map(_spare_blocks, holders)):
            return False
        for sequence in holders:
            if wanted > self.blocks.num_free:
                assert sequence.speculation is not None
                sequence.speculation.drop()
                self._trim(sequence)
        return True

    def _schedule_prompts(self, budget: int, plan: Plan) -> None:
        """Share `budget` tokens among the running prompts; see invariant 4."""
        prompts = [s for s in self.running if s.phase is Phase.PREFILL]
        if not prompts:
            return
        left = {s: s.prefill_target - s.num_computed for s in prompts}
        shares = dict.fromkeys(prompts, 0)
        shortest = sorted(prompts, key=lambda s: (left[s], s.order))
        for sequence, limit in [(s, -(-budget // 2)) for s in prompts[:1]] + [
            (s, budget) for s in shortest
        ]:
            share = min(limit, budget, left[sequence] - shares[sequence])
            shares[sequence] += share
            budget -= share
        for sequence in prompts:
            if shares[sequence]:
                self._schedule_prompt(sequence, shares[sequence], plan)

    def _schedule_prompt(self, sequence: Sequence, count: int, plan: Plan) -> None:
        """Add the next chunk of a prompt, of `count` tokens or a few less."""
        end = sequence.num_computed + count
        if end < sequence.prefill_target and end - end % BLOCK_SIZE > sequence.num_computed:
            count -= end % BLOCK_SIZE  # chunks end with a block where they can
        plan.scheduled.append(Scheduled(sequence, sequence.num_computed, count, Work.PROMPT))

    def _make_room(self, sequence: Sequence, plan: Plan) -> bool:
        """A block for the sequence's next position, at the cost of later arrivals. False: it was
        itself the latest, and is preempted.
        """
        missing = blocks_for(sequence.num_computed + 1) - len(sequence.block_table)
        if missing <= 0:
            return True
        while not self._drop_drafts(missing):
            victim = self.running[-1]
            self._preempt(victim, plan)
            if victim is sequence:
                return False
        sequence.block_table += self.blocks.allocate(missing)
        return True

    def _preempt(self, sequence: Sequence, plan: Plan) -> None:
        # Victims come later in `running` than whom they make room for, so none is scheduled yet.
        assert all(item.sequence is not sequence for item in plan.scheduled)
        table = sequence.block_table
        phases = [self.blocks.provenance(block).phase for block in table]
        decoded = phases.index(Phase.DECODE) if Phase.DECODE in phases else len(table)
        if decoded < len(table):
            sequence.resume_at = sequence.resume_at or sequence.num_computed
            # A block beyond was taken for the next token and holds nothing yet.
            written = blocks_for(sequence.resume_at)
            plan.swaps_out.append(Swap(sequence, tuple(table[decoded:written])))
            sequence.prefill_target = decoded * BLOCK_SIZE
        else:
            sequence.prefill_target = sequence.prompt_len
        self.blocks.free(table)
        sequence.lose_blocks()
        self.running.remove(sequence)
        insort(self.waiting, sequence, key=_order)
        plan.preempted += 1

    def _admit(self, plan: Plan) -> None:
        """Start waiting sequences while seats and blocks last, in their order."""
        while self.waiting and len(self.running) < self.max_running:
            sequence = self.waiting[0]
            if not self._seat(sequence, plan):
                return
            self.waiting.pop(0)
            insort(self.running, sequence, key=_order)
            sequence.status = Status.RUNNING
            self._restore(sequence, plan)
            if sequence.phase is Phase.DECODE:
                plan.scheduled.append(_decoding(sequence))

    def _seat(self, sequence: Sequence, plan: Plan) -> bool:
        """Blocks for all positions up to its next token, those of the prefix cache first. False: too few."""
        cached = self.blocks.share(
            sequence.cacheable_keys, with_statistics=sequence.wanted_statistics
        )
        shared = [c.block for c in cached]
        needed = blocks_for(sequence.positions_after_next_token) - len(shared)
        if not self._drop_drafts(needed):
            self.blocks.free(shared)
            return False
        plan.prefix_queries += len(sequence.keys) * BLOCK_SIZE
        plan.prefix_hits += len(shared) * BLOCK_SIZE
        sequence.block_table = shared + self.blocks.allocate(needed)
        sequence.take_cached(cached)
        return True

    def _restore(self, sequence: Sequence, plan: Plan) -> None:
        """Bring a preempted sequence's decoded blocks back to the end of its new table."""
        if sequence.resume_at is None:
            return
        first, last = sequence.prefill_target // BLOCK_SIZE, blocks_for(sequence.resume_at)
        restored = tuple(sequence.block_table[first:last])
        plan.swaps_in.append(Swap(sequence, restored))
        for block in restored:
            self.blocks.mark(block, sequence.neurons.decoded)
        sequence.finish_recompute()


def _decoding(sequence: Sequence) -> Scheduled:
    """A decoding sequence's least step."""
    position, refresh = sequence.num_computed, sequence.refresh
    if refresh is not None and position == refresh.due:
        return Scheduled(sequence, refresh.reached, 1, Work.REFRESH)
    return Scheduled(sequence, position, 1, Work.DECODE)


def _spare_blocks(sequence: Sequence) -> int:
    """Those that nothing but drafts needs."""
    if sequence.speculation is None or sequence.phase is Phase.PREFILL:
        return 0
    return max(len(sequence.block_table) - blocks_for(sequence.num_computed + 1), 0)


def _order(sequence: Sequence) -> tuple[int, float]:
    return sequence.order
