"""The scheduler's invariants, over random workloads on a backend that only keeps count."""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_kernels.choice import Score
from sparserve.engine.block_manager import (
    PREFILLED,
    BlockManager,
    StatisticsKind,
    blocks_for,
    prefix_keys,
)
from sparserve.engine.choosing import ChoiceState
from sparserve.engine.detokenizer import Detokenizer
from sparserve.engine.logits import LogitAdjuster
from sparserve.engine.refresh import Refresh
from sparserve.engine.request import GenerationRequest
from sparserve.engine.scheduler import Plan, Scheduler, Work
from sparserve.engine.sequence import Sequence, Status
from sparserve.engine.speculation import Speculation
from sparserve.model.backend import BLOCK_SIZE, BackendInfo, Phase
from sparserve.model.loader import LoadedModel
from sparserve.sparsity.chooser import ChoicePlan
from sparserve.sparsity.policy import DENSE

_ids = itertools.count()
NO_BYTES = BackendInfo("", "", "", 1, frozenset(), 0, 0, {}, 0, "", 0)
DENSE_PLAN = ChoicePlan(DENSE, 1.0)


def sequence_of(
    model: LoadedModel,
    prompt: int,
    output: int,
    *,
    alike: int = 0,
    cached: bool = False,
    priority: int = 0,
    more: str | int | None = None,
) -> Sequence:
    """A prompt whose first `alike` tokens are those of every other one. `more`: who drafts, or how often
    decoded tokens are computed again."""
    key = next(_ids)
    tokens = tuple(i % 256 if i < alike else (i + key) % 256 for i in range(prompt))
    request = GenerationRequest(str(key), tokens, priority=priority)
    return Sequence(
        request,
        max_tokens=output,
        detokenizer=Detokenizer(model.tokenizer),
        adjuster=LogitAdjuster(request, 259, ()),
        neurons=ChoiceState(DENSE_PLAN, NO_BYTES, lambda policy: DENSE_PLAN),
        keys=prefix_keys(tokens, "") if cached else (),
        speculation=(
            Speculation(tokens, output, 5, by_model=more == "model")
            if isinstance(more, str)
            else None
        ),
        refresh=Refresh(more, prompt) if isinstance(more, int) else None,
    )


def check_invariants(scheduler: Scheduler, plan: Plan) -> None:
    held = Counter(block for s in scheduler.running for block in s.block_table)
    blocks = scheduler.blocks
    assert len(held) == blocks.num_used
    assert blocks.num_used + blocks.num_free == blocks.num_blocks
    assert blocks.num_idle <= blocks.num_free
    for sequence in scheduler.running:
        shared = [index for index, block in enumerate(sequence.block_table) if held[block] > 1]
        assert all((index + 1) * BLOCK_SIZE <= sequence.prompt_len for index in shared)
        for index in shared:
            assert blocks.provenance(sequence.block_table[index]) == PREFILLED
    assert all(not s.block_table for s in scheduler.waiting)
    assert [s.order for s in scheduler.running] == sorted(s.order for s in scheduler.running)
    assert [s.order for s in scheduler.waiting] == sorted(s.order for s in scheduler.waiting)
    assert len(scheduler.running) <= scheduler.max_running
    assert sum(item.count for item in plan.scheduled) <= scheduler.max_batched_tokens
    assert len({item.sequence for item in plan.scheduled}) == len(plan.scheduled)
    decoding = {s for s in scheduler.running if s.phase is Phase.DECODE}
    assert decoding <= {item.sequence for item in plan.scheduled}
    for item in plan.scheduled:
        assert item.count >= 1
        end, computed = item.start + item.count, item.sequence.num_computed
        assert blocks_for(end) <= len(item.sequence.block_table)
        match item.work:
            case Work.PROMPT:
                assert item.start == computed < end <= item.sequence.prefill_target
            case Work.DECODE:
                assert item.start == computed
                assert end - item.sequence.prompt_len <= item.sequence.max_tokens
            case Work.DRAFT:
                assert (item.start, item.count) == (
                    computed + len(item.sequence.speculation.drafts),
                    1,
                )
            case Work.REFRESH:
                assert item.sequence.prompt_len <= item.start < end <= computed + 1


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
    wanting = [(item, len(item.outputs)) for item in plan.scheduled]
    scheduler.update(plan)
    for item, rows in wanting:
        if item.work is Work.DRAFT:
            item.sequence.speculation.drafts.append(1 if item.start % 3 else 2)
        elif rows:
            take_tokens(scheduler, item.sequence, rows)
    return plan


def take_tokens(scheduler: Scheduler, sequence: Sequence, rows: int) -> None:
    for _ in range(rows):
        sequence.append(1)
        assert sequence.num_computed == sequence.prompt_len + len(sequence.output_token_ids) - 1
        if len(sequence.output_token_ids) == sequence.max_tokens:
            scheduler.remove(sequence)
            return
        if sequence.speculation is None:
            return
        if not sequence.speculation.is_right:
            sequence.speculation.verified()
            return
        scheduler.keep(sequence)


@settings(max_examples=150, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(
            st.integers(1, 90),
            st.integers(1, 60),
            st.integers(0, 90),
            st.integers(-1, 1),
            st.sampled_from([None, None, "ngrams", "model", 1, 3, 20]),
        ),
        min_size=1,
        max_size=8,
    ),
    max_running=st.integers(1, 5),
    budget=st.integers(5, 70),
    mixed_budget=st.integers(1, 70),
    extra_blocks=st.integers(0, 12),
    late=st.integers(0, 7),
    cached=st.booleans(),
)
def test_every_sequence_finishes_and_every_block_comes_back(
    tiny_model, shapes, max_running, budget, mixed_budget, extra_blocks, late, cached
):
    longest = max(blocks_for(prompt + output) for prompt, output, *_ in shapes)
    scheduler = Scheduler(
        BlockManager(longest + extra_blocks), max_running, budget, min(mixed_budget, budget)
    )
    sequences = [
        sequence_of(
            tiny_model, prompt, output, alike=alike, cached=cached, priority=priority, more=more
        )
        for prompt, output, alike, priority, more in shapes
    ]
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


def test_a_long_prompt_beside_decodes_takes_small_steps(tiny_model):
    scheduler = Scheduler(BlockManager(100), 4, 400, mixed_prefill_tokens=32)
    scheduler.add(sequence_of(tiny_model, 300, 50))
    assert [item.count for item in step(scheduler).scheduled] == [300], "nobody else waits"
    scheduler.add(sequence_of(tiny_model, 300, 50))
    assert [item.count for item in step(scheduler).scheduled] == [1, 32]


def test_short_prompts_pass_a_long_one_that_still_gets_half(tiny_model):
    scheduler = Scheduler(BlockManager(200), 8, 64)
    long, *short = (sequence_of(tiny_model, length, 2) for length in (1000, 64, 32, 48))
    for sequence in (long, *short):
        scheduler.add(sequence)
    counts = {item.sequence: item.count for item in step(scheduler).scheduled}
    assert counts == {long: 32, short[1]: 32}
    step(scheduler)  # the shortest decodes
    assert [s.phase for s in short] == [Phase.PREFILL, Phase.DECODE, Phase.PREFILL]
    while any(s.phase is Phase.PREFILL and s.status is not Status.FINISHED for s in short):
        step(scheduler)
    assert long.phase is Phase.PREFILL


def test_a_higher_priority_is_seated_first(tiny_model):
    scheduler = Scheduler(BlockManager(50), max_running=1, max_batched_tokens=64)
    low, high = sequence_of(tiny_model, 4, 2), sequence_of(tiny_model, 4, 2, priority=1)
    scheduler.add(low)
    scheduler.add(high)
    assert [item.sequence for item in step(scheduler).scheduled] == [high]


def finish_all(scheduler: Scheduler) -> None:
    while scheduler.running or scheduler.waiting:
        step(scheduler)


def test_a_prompt_that_begins_alike_computes_only_the_rest(tiny_model):
    scheduler = Scheduler(BlockManager(50), max_running=2, max_batched_tokens=200)
    scheduler.add(sequence_of(tiny_model, 70, 2, alike=70, cached=True))
    finish_all(scheduler)
    assert scheduler.blocks.num_used == 0
    assert scheduler.blocks.num_idle == 4, "four whole blocks of the prompt are kept"
    scheduler.add(second := sequence_of(tiny_model, 70, 2, alike=40, cached=True))
    plan = step(scheduler)
    assert [item.count for item in plan.scheduled] == [70 - 32]
    assert (plan.prefix_queries, plan.prefix_hits, second.cached_tokens) == (64, 32, 32)


def test_the_last_token_of_a_prompt_is_always_computed(tiny_model):
    scheduler = Scheduler(BlockManager(50), max_running=2, max_batched_tokens=200)
    for _ in range(2):
        scheduler.add(sequence_of(tiny_model, 64, 2, alike=64, cached=True))
        plan = step(scheduler)
        finish_all(scheduler)
    assert [item.count for item in plan.scheduled] == [16]


def test_the_least_recently_used_prompt_is_forgotten_first_from_its_end(tiny_model):
    scheduler = Scheduler(BlockManager(9), max_running=1, max_batched_tokens=200)
    first, second = (sequence_of(tiny_model, 49, 1, cached=True) for _ in range(2))
    for sequence in (first, second):
        scheduler.add(sequence)
        finish_all(scheduler)
    blocks = scheduler.blocks
    assert (blocks.num_idle, blocks.num_free) == (6, 9)
    blocks.free(blocks.allocate(4))  # one more than were free
    held = [len(found := blocks.share(s.keys)) for s in (first, second)]
    assert held == [2, 3]
    assert found


def test_a_request_for_statistics_shares_only_blocks_that_have_them():
    blocks = BlockManager(4)
    keys = prefix_keys(range(48), "")
    table = blocks.allocate(3)
    statistics = torch.zeros(1, 2, dtype=torch.float16)
    norm, count = StatisticsKind(), StatisticsKind(Score.COUNT, 0.1)
    for block, key, kind in zip(table, keys, (norm, None, norm), strict=True):
        blocks.publish(block, key, kind, statistics if kind else None)
    assert len(blocks.share(keys)) == 3
    assert len(blocks.share(keys, with_statistics=norm)) == 1
    blocks.publish(table[1], keys[1], norm, statistics)  # known, and now with statistics
    assert len(blocks.share(keys, with_statistics=norm)) == 3
    assert blocks.share(keys, with_statistics=count) == []


def test_a_block_keeps_the_latest_kinds_of_statistics():
    blocks = BlockManager(1)
    key, table = prefix_keys(range(16), ""), blocks.allocate(1)
    kinds = [StatisticsKind(Score.COUNT, share) for share in (0.1, 0.2, 0.3)]
    for number, kind in enumerate(kinds):
        blocks.publish(table[0], key[0], kind, torch.full((1, 2), number).half())
    assert blocks.share(key, with_statistics=kinds[0]) == []
    for number, kind in enumerate(kinds[1:], 1):
        (found,) = blocks.share(key, with_statistics=kind)
        assert found.statistics[kind].tolist() == [[number, number]]


def test_keys_tell_tokens_their_past_and_their_salt_apart():
    base = prefix_keys(range(40), "")
    assert len(base) == 2, "whole blocks only"
    assert prefix_keys(range(32), "") == base
    assert prefix_keys([*range(16), 99, *range(17, 32)], "")[0] == base[0]
    assert prefix_keys([*range(16), 99, *range(17, 32)], "")[1] != base[1]
    assert prefix_keys([99, *range(1, 32)], "")[1] != base[1], "an earlier block counts"
    assert not set(prefix_keys(range(32), "tenant")) & set(base)


def test_a_block_cannot_be_freed_twice():
    blocks = BlockManager(4)
    taken = blocks.allocate(2)
    assert blocks.provenance(taken[0]) == PREFILLED
    blocks.free(taken)
    with pytest.raises(KeyError):
        blocks.free(taken)


def test_a_draft_gives_its_block_back_to_whoever_needs_it(tiny_model):
    scheduler = Scheduler(BlockManager(9), max_running=2, max_batched_tokens=200)
    drafting = sequence_of(tiny_model, 63, 30, more="model")
    later = sequence_of(tiny_model, 60, 30)
    for sequence in (drafting, later):
        scheduler.add(sequence)
    for _ in range(5):
        assert not step(scheduler).preempted
    assert len(drafting.speculation.drafts) == 4
    assert (len(drafting.block_table), scheduler.blocks.num_free) == (5, 0)
    assert later.num_computed == 64
    assert not step(scheduler).preempted
    assert (len(drafting.block_table), len(later.block_table)) == (4, 5)
    assert len(drafting.speculation.drafts) == 1, "it begins again"


def test_drafts_of_a_step_are_bounded(tiny_model, monkeypatch):
    monkeypatch.setattr("sparserve.engine.scheduler.MAX_DRAFTS", 7)
    scheduler = Scheduler(BlockManager(100), max_running=4, max_batched_tokens=100)
    for _ in range(3):
        scheduler.add(sequence_of(tiny_model, 20, 60, more="ngrams"))
    counts = [[item.count for item in step(scheduler).scheduled] for _ in range(4)]
    assert counts[-1] == [6, 3, 1], "five each, until there are seven"


def test_a_long_pass_takes_what_a_step_has_room_for(tiny_model):
    scheduler = Scheduler(BlockManager(50), max_running=3, max_batched_tokens=10)
    scheduler.add(sequence_of(tiny_model, 4, 60, more=20))
    scheduler.add(sequence_of(tiny_model, 4, 60))
    plans = [step(scheduler) for _ in range(30)]
    passes = [
        [(item.start, item.count) for item in plan.scheduled if item.work is Work.REFRESH]
        for plan in plans
    ]
    assert [p[0] for p in passes if p] == [(4, 9), (13, 9), (22, 2)]
