"""Ours and transformers, run as they are measured."""

import random

import pytest
import torch

from sparserve.bench.peers.transformers import Transformers
from sparserve.bench.policies import PolicySpec
from sparserve.bench.reads import Reads
from sparserve.bench.rounds import fresh_prompts
from sparserve.bench.systems import Run, Sparserve
from sparserve.engine.block_manager import blocks_for
from sparserve.model.backend import ForwardBatch, Phase, SequenceInput


@pytest.fixture
def prompts():
    source = random.Random(5)
    return lambda count, length: fresh_prompts(source, 256, count, length)


def test_decode_speed_counts_what_came_after_every_prompts_first_token():
    run = Run(ttft=2.0, total=5.0, new_tokens=40, tokens_at_ttft=10)
    assert run.decode_tokens_per_second == 10.0


def test_prompts_read_before_decode_from_one_step_on(tiny_engine, prompts):
    engine = tiny_engine(max_running=6, max_batched_tokens=96, mixed_prefill_tokens=32)
    staggered = Sparserve(engine).run(prompts(6, 70), 9)
    together = Sparserve(engine, prompts_cached=True).run(prompts(6, 70), 9)
    assert staggered.new_tokens == together.new_tokens == 6 * 9
    assert staggered.tokens_at_ttft > 6  # the first decoded while the last was read
    assert together.tokens_at_ttft == 6
    assert 0 < together.ttft < together.total
    assert not engine.has_work


def test_what_the_engine_reads_is_the_backends(tiny_engine):
    engine = tiny_engine()
    ours, info = Sparserve(engine), engine.backend.info
    assert (ours.format, ours.weight_bytes) == ("float32", info.weight_bytes)
    assert ours.kv_bytes_per_token == info.kv_bytes_per_token


@pytest.mark.parametrize("engine_of", ["tiny_engine", "native_engine"])
@pytest.mark.parametrize("count", [1, 4])
def test_a_policy_reads_what_its_prompts_chose_together(request, prompts, count, engine_of):
    engine = request.getfixturevalue(engine_of)(max_running=4, max_batched_tokens=96)
    info, given = engine.backend.info, prompts(count, 50)
    dense = Sparserve(engine, prompts_cached=True)
    core = Sparserve(engine, PolicySpec.parse("core:0.5"), prompts_cached=True)
    assert (dense.policy, core.policy) == ("dense", "core:0.5")
    whole, half = dense.run(given, 7).reads, core.run(given, 7).reads
    assert whole == Reads(info.weight_bytes / count, passes=1, density=1, union=1)
    assert (half.passes, half.density) == (1, 0.5)
    if count == 1:
        assert half.union == 0.5
    else:
        assert 0.5 < half.union < 1
    mlp_bytes = half.union * info.mlp_bytes
    expected = (info.weight_bytes - info.mlp_bytes + mlp_bytes) / count
    assert half.weight_bytes == pytest.approx(expected)
    # The union is of the cores that each prompt has alone.
    cores = [chosen_core(engine, prompt) for prompt in given]
    assert half.union == pytest.approx(torch.stack(cores).any(dim=0).double().mean().item())


def chosen_core(engine, prompt):
    """[layers, neurons] bool, by plain ranking of the prompt's scores."""
    table = range(blocks_for(len(prompt)))
    parts = SequenceInput(prompt, 0, table, Phase.PREFILL, collect_statistics=True)
    found = engine.backend.forward(ForwardBatch([parts])).statistics[0]
    scores = sum((part.scores().half().double() for part in found), start=0)
    best = scores.argsort(dim=1, descending=True, stable=True)[:, : scores.shape[1] // 2]
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, best, True)


def test_the_engine_keeps_its_own_backend(tiny_engine, prompts):
    engine = tiny_engine()
    backend = engine.backend
    Sparserve(engine).run(prompts(1, 20), 3)
    assert engine.backend is backend


@pytest.mark.parametrize("count", [1, 3])
def test_transformers_runs_with_our_threads_and_gives_them_back(
    tiny_model, tiny_engine, prompts, count
):
    ours, theirs = Sparserve(tiny_engine()), Transformers(tiny_model, threads=1)
    threads = torch.get_num_threads()
    run = theirs.run(prompts(count, 20), 6)
    assert (run.new_tokens, run.tokens_at_ttft) == (6 * count, count)
    assert 0 < run.ttft < run.total
    assert torch.get_num_threads() == threads
    assert (theirs.weight_bytes, theirs.kv_bytes_per_token) == (
        ours.weight_bytes,
        ours.kv_bytes_per_token,
    )
    assert theirs.format == ours.format
