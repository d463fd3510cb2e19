"""Which sequences run in the next step, and which KV blocks they hold.

Invariants, true between any two calls:

1. A block is free or in exactly one block table; only waiting sequences that never ran, finished
   ones and preempted ones hold none.
2. A running sequence holds blocks for every position it has computed. `running` is in order of
   arrival; `waiting` too, so that a preempted sequence comes before all that never ran.
3. A step takes at most `max_batched_tokens` tokens of at most `max_running` sequences. Every running
   sequence that decodes gets its token in every step; prompts share what is left, in chunks.
4. Blocks are taken from the latest arrival only, so the earliest always goes on: with a pool that
   holds one full context, every sequence finishes.
5. Preemption loses nothing: prefilled blocks are computed again to the same bits, decoded ones,
   which prefill could not reproduce, wait in host memory.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

from sparserve.engine.block_manager import DECODED, BlockManager, blocks_for
from sparserve.engine.sequence import Sequence, Status
from sparserve.model.backend import BLOCK_SIZE, Phase


@dataclass(frozen=True, slots=True)
class Scheduled:
    """`count` tokens of a sequence, from its `num_computed` on."""

    sequence: Sequence
    count: int
    phase: Phase

    @property
    def wants_token(self) -> bool:
        """The last position's distribution gives a new token."""
        if self.phase is Phase.DECODE:
            return True
        reached = self.sequence.num_computed + self.count
        return self.sequence.in_first_prefill and reached == self.sequence.prompt_len


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


class Scheduler:
    """Continuous batching with chunked prefill, first come first served."""

    def __init__(self, blocks: BlockManager, max_running: int, max_batched_tokens: int) -> None:
        assert max_batched_tokens >= max_running, "every running sequence decodes in every step"
        self.blocks = blocks
        self.max_running = max_running
        self.max_batched_tokens = max_batched_tokens
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_arrival)

    def schedule(self) -> Plan:
        plan = Plan()
        decodes = sum(s.phase is Phase.DECODE for s in self.running)
        prompt_budget = self.max_batched_tokens - decodes
        for sequence in list(self.running):
            if sequence.status is not Status.RUNNING:  # preempted by one before it
                continue
            if sequence.phase is Phase.DECODE:
                if self._make_room(sequence, plan):
                    plan.scheduled.append(Scheduled(sequence, 1, Phase.DECODE))
            elif prompt_budget > 0:
                prompt_budget -= self._schedule_prompt(sequence, prompt_budget, plan)
        if not plan.preempted:
            self._admit(prompt_budget, plan)
        return plan

    def update(self, plan: Plan) -> None:
        """The forward of `plan` is done: its tokens have KV."""
        for item in plan.scheduled:
            sequence = item.sequence
            if item.phase is Phase.DECODE:
                block = sequence.block_table[sequence.num_computed // BLOCK_SIZE]
                self.blocks.mark(block, DECODED)
            sequence.advance(item.count)

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

    def _schedule_prompt(self, sequence: Sequence, budget: int, plan: Plan) -> int:
        """Add the next chunk of a prompt; returns its tokens."""
        count = min(budget, sequence.prefill_target - sequence.num_computed)
        end = sequence.num_computed + count
        if end < sequence.prefill_target and end - end % BLOCK_SIZE > sequence.num_computed:
            count -= end % BLOCK_SIZE  # chunks end with a block where they can
        plan.scheduled.append(Scheduled(sequence, count, Phase.PREFILL))
        return count

    def _make_room(self, sequence: Sequence, plan: Plan) -> bool:
        """A block for the sequence's next position, at the cost of later arrivals. False: it was
        itself the latest, and is preempted.
        """
        missing = blocks_for(sequence.num_computed + 1) - len(sequence.block_table)
        while missing > self.blocks.num_free:
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
        if sequence.in_first_prefill:
            sequence.statistics = None  # they start anew with the prompt
        sequence.num_computed = 0
        self.blocks.free(table)
        sequence.block_table = []
        sequence.status = Status.WAITING
        self.running.remove(sequence)
        insort(self.waiting, sequence, key=_arrival)
        plan.preempted += 1

    def _admit(self, prompt_budget: int, plan: Plan) -> None:
        """Start waiting sequences while tokens, seats and blocks last, in order of arrival."""
        while self.waiting and len(self.running) < self.max_running and prompt_budget > 0:
            sequence = self.waiting[0]
            needed = blocks_for(sequence.positions_after_next_token)
            if needed > self.blocks.num_free:
                return
            self.waiting.pop(0)
            insort(self.running, sequence, key=_arrival)
            sequence.status = Status.RUNNING
            sequence.block_table = self.blocks.allocate(needed)
            self._restore(sequence, plan)
            if sequence.phase is Phase.PREFILL:
                prompt_budget -= self._schedule_prompt(sequence, prompt_budget, plan)
            else:
                plan.scheduled.append(Scheduled(sequence, 1, Phase.DECODE))
                prompt_budget -= 1

    def _restore(self, sequence: Sequence, plan: Plan) -> None:
        """Bring a preempted sequence's decoded blocks back to the end of its new table."""
        if sequence.resume_at is None:
            return
        first, last = sequence.prefill_target // BLOCK_SIZE, blocks_for(sequence.resume_at)
        restored = tuple(sequence.block_table[first:last])
        plan.swaps_in.append(Swap(sequence, restored))
        for block in restored:
            self.blocks.mark(block, DECODED)
        sequence.finish_recompute()


def _arrival(sequence: Sequence) -> float:
    return sequence.arrival
