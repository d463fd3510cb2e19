"""The scheduler's invariants, over random workloads on a backend that only keeps count."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparserve.engine.block_manager import PREFILLED, BlockManager, blocks_for
from sparserve.engine.detokenizer import Detokenizer
from sparserve.engine.request import GenerationRequest
from sparserve.engine.scheduler import Plan, Scheduler
from sparserve.engine.sequence import Sequence, Status
from sparserve.model.backend import BLOCK_SIZE, Phase
from sparserve.model.loader import LoadedModel

_ids = itertools.count()


def sequence_of(model: LoadedModel, prompt: int, output: int) -> Sequence:
    request = GenerationRequest(str(next(_ids)), tuple(i % 256 for i in range(prompt)))
    return Sequence(request, output, Detokenizer(model.tokenizer))


def check_invariants(scheduler: Scheduler, plan: Plan) -> None:
    held = [block for s in scheduler.running for block in s.block_table]
    assert len(held) == len(set(held)) == scheduler.blocks.num_used
    assert all(not s.block_table for s in scheduler.waiting)
    assert [s.arrival for s in scheduler.running] == sorted(s.arrival for s in scheduler.running)
    assert [s.arrival for s in scheduler.waiting] == sorted(s.arrival for s in scheduler.waiting)
    assert len(scheduler.running) <= scheduler.max_running
    assert sum(item.count for item in plan.scheduled) <= scheduler.max_batched_tokens
    assert len({item.sequence for item in plan.scheduled}) == len(plan.scheduled)
    decoding = {s for s in scheduler.running if s.phase is Phase.DECODE}
    assert decoding <= {item.sequence for item in plan.scheduled}
    for item in plan.scheduled:
        assert item.count >= 1
        end = item.sequence.num_computed + item.count
        assert blocks_for(end) <= len(item.sequence.block_table)
        if item.phase is Phase.PREFILL:
            assert end <= item.sequence.prefill_target


def step(scheduler: Scheduler) -> Plan:
    """One engine step without a model: every wanted token is token 1."""
    plan = scheduler.schedule()
    check_invariants(scheduler, plan)
    for swap in plan.swaps_out:
        swap.sequence.host_blocks = torch.tensor(swap.blocks)
    for swap in plan.swaps_in:
        assert swap.sequence.host_blocks is not None
        assert len(swap.sequence.host_blocks) == len(swap.blocks)
        swap.sequence.host_blocks = None
    wanting = [item.sequence for item in plan.scheduled if item.wants_token]
    scheduler.update(plan)
    for sequence in wanting:
        sequence.output_token_ids.append(1)
        assert sequence.num_computed == sequence.prompt_len + len(sequence.output_token_ids) - 1
        if len(sequence.output_token_ids) == sequence.max_tokens:
            scheduler.remove(sequence)
    return plan


@settings(max_examples=150, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 60)), min_size=1, max_size=8),
    max_running=st.integers(1, 5),
    budget=st.integers(5, 70),
    extra_blocks=st.integers(0, 12),
    late=st.integers(0, 7),
)
def test_every_sequence_finishes_and_every_block_comes_back(
    tiny_model, shapes, max_running, budget, extra_blocks, late
):
    longest = max(blocks_for(prompt + output) for prompt, output in shapes)
    scheduler = Scheduler(BlockManager(longest + extra_blocks), max_running, budget)
    sequences = [sequence_of(tiny_model, *shape) for shape in shapes]
    for sequence in sequences[late:]:
        scheduler.add(sequence)
    steps = 0
    while scheduler.running or scheduler.waiting or steps < 3:
        if steps == 3:
            for sequence in sequences[:late]:
                scheduler.add(sequence)
        plan = step(scheduler)
        assert plan.scheduled or not (scheduler.running or scheduler.waiting), "no progress"
        steps += 1
        assert steps < 10_000
    finished = sequences if steps > 3 else sequences[late:]
    assert all(s.status is Status.FINISHED for s in finished)
    assert all(len(s.output_token_ids) == s.max_tokens for s in finished)
    assert scheduler.blocks.num_used == 0


def test_the_latest_arrival_gives_way_and_keeps_what_it_decoded(tiny_model):
    scheduler = Scheduler(BlockManager(6), max_running=2, max_batched_tokens=64)
    first, second = sequence_of(tiny_model, 30, 50), sequence_of(tiny_model, 20, 50)
    scheduler.add(first)
    scheduler.add(second)
    plans = []
    while not any(plan.preempted for plan in plans):
        plans.append(step(scheduler))
    assert scheduler.running == [first]
    assert scheduler.waiting == [second]
    # 20 prompt tokens: block 0 is prefilled and thrown away, block 1 holds decoded tokens too.
    assert [len(swap.blocks) for swap in plans[-1].swaps_out] == [len(second.host_blocks)]
    assert second.prefill_target == BLOCK_SIZE
    assert second.resume_at == second.prompt_len + len(second.output_token_ids) - 1


def test_a_sequence_preempted_again_while_it_recomputes_swaps_what_was_written(tiny_model):
    scheduler = Scheduler(BlockManager(5), max_running=2, max_batched_tokens=4)
    first, second = sequence_of(tiny_model, 14, 40), sequence_of(tiny_model, 40, 30)
    scheduler.add(first)
    while first.phase is Phase.PREFILL:
        step(scheduler)
    # Preempted before, with 8 decoded positions that end with block 2.
    second.output_token_ids = [1] * 9
    second.resume_at, second.prefill_target = 48, 32
    second.host_blocks = torch.zeros(1)
    scheduler.add(second)
    plans = [step(scheduler)]
    assert len(second.block_table) == 4, "three with KV, one for the next token"
    while not plans[-1].preempted:
        assert second.num_computed < 32
        plans.append(step(scheduler))
    assert [len(swap.blocks) for swap in plans[-1].swaps_out] == [1]
    assert (second.resume_at, second.prefill_target) == (48, 32)
    while scheduler.running or scheduler.waiting:
        step(scheduler)
    assert len(second.output_token_ids) == 30


def test_a_prompt_shares_the_budget_with_running_decodes(tiny_model):
    scheduler = Scheduler(BlockManager(100), max_running=4, max_batched_tokens=40)
    running = [sequence_of(tiny_model, 4, 50) for _ in range(2)]
    for sequence in running:
        scheduler.add(sequence)
    step(scheduler)
    scheduler.add(sequence_of(tiny_model, 90, 2))
    counts = [sorted(item.count for item in step(scheduler).scheduled) for _ in range(3)]
    assert counts == [[1, 1, 32], [1, 1, 32], [1, 1, 26]], "chunks end with a block"


def test_a_block_cannot_be_freed_twice():
    blocks = BlockManager(4)
    taken = blocks.allocate(2)
    assert blocks.provenance(taken[0]) == PREFILLED
    blocks.free(taken)
    with pytest.raises(KeyError):
        blocks.free(taken)
