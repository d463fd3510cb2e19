"""llama.cpp does the work that we do: the same greedy tokens from the same weights."""

import random

import numpy as np
import pytest

from sparserve.bench.peers.registry import open_peer
from sparserve.bench.rounds import fresh_prompts, wait_until_idle
from sparserve.config import EngineSettings
from sparserve.engine.factory import assemble_engine
from sparserve.engine.request import GenerationRequest, SamplingParams, StoppingParams
from sparserve.model.loader import load_model
from sparserve.model.weights import step_weight_bytes

pytest.importorskip("llama_cpp")


def generated(model, prompts, new_tokens) -> list[list[int]]:
    """By our own engine."""
    settings = EngineSettings(threads=1, kv_cache_gib=0.02)
    engine = assemble_engine(model, settings).engine
    stopping = StoppingParams(max_tokens=new_tokens, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        greedy = SamplingParams(temperature=0)
        engine.add(GenerationRequest(str(index), prompt, greedy, stopping))
    tokens = [[] for _ in prompts]
    while engine.has_work:
        for update in engine.step():
            tokens[int(update.request_id)] += [token.id for token in update.tokens]
    return tokens


@pytest.mark.parametrize(("count", "length"), [(1, 40), (3, 90)])
def test_it_makes_our_tokens(peer_model, monkeypatch, count, length):
    peer = open_peer("llama.cpp", "float32", lambda dtype: peer_model, 1)
    made, decode = [[] for _ in range(count)], peer._decode

    def spy(rows):
        found = decode(rows)
        wanted = [row for row in rows if row[3]]
        for (_, _, sequence, _), token in zip(wanted, found, strict=True):
            made[sequence].append(token)
        return found

    monkeypatch.setattr(peer, "_decode", spy)
    prompts = fresh_prompts(random.Random(2), 256, count, length)
    for _ in range(2):  # the second in the context of the first
        for tokens in made:
            tokens.clear()
        run = peer.run(prompts, 12)
    # Its KV is float16, so that near ties may fall otherwise.
    ours = np.array(generated(peer_model, prompts, 12))
    assert ours.shape == (count, 12)
    assert (ours == np.array(made)).mean() >= 0.9
    assert (run.new_tokens, run.tokens_at_ttft) == (12 * count, count)
    assert 0 < run.ttft < run.total


def test_its_bytes_are_those_of_its_file_and_16_bit_kv(peer_model):
    peer = open_peer("llama.cpp", "float32", lambda dtype: peer_model, 1)
    config = peer_model.config
    assert peer.weight_bytes == step_weight_bytes(config, peer_model.weights.dtype)
    assert peer.kv_bytes_per_token == 2 * 2 * config.num_layers * config.num_kv_heads * 16


@pytest.mark.parametrize("format", ["Q8_0", "Q4_0"])
def test_quantized_prompts_do_not_end_the_process(write_mergeable, tmp_path, format):
    sizes = {"hidden_size": 256, "intermediate_size": 512}
    model = load_model(str(write_mergeable(tmp_path / "m", **sizes)))
    peer = open_peer("llama.cpp", format, lambda dtype: model, 2)
    run = peer.run([tuple(range(64)), tuple(range(64, 128))], 4)
    assert (run.new_tokens, run.tokens_at_ttft) == (8, 2)


def test_it_uses_no_cpu_between_its_turns(peer_model):
    peer = open_peer("llama.cpp", "float32", lambda dtype: peer_model, 2)
    peer.run([tuple(range(40))], 8)
    wait_until_idle(patience=1)
