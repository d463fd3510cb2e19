"""lm_head_dtype int4+exact against bfloat16 on the demo model: every request gets the same answer."""

from dataclasses import replace

import pytest
import torch
from prometheus_client import generate_latest

from sparserve.config import EngineSettings
from sparserve.engine.engine import Engine
from sparserve.engine.factory import assemble_engine
from sparserve.engine.request import (
    GenerationRequest,
    OutputParams,
    SamplingParams,
    StoppingParams,
)

PROMPTS = (
    "The history of computing begins with",
    "def quicksort(items):\n    if len(items) <= 1:\n        return items\n",
    "Once upon a time, in a land far away, there lived a",
)
# What few candidates decide.
NARROW = {
    "greedy": SamplingParams(temperature=0),
    "greedy, whatever else": SamplingParams(temperature=0, top_k=3, top_p=0.5, min_p=0.1),
    "top_k": SamplingParams(temperature=0.8, top_k=5, seed=1),
    "top_k of one": SamplingParams(temperature=1.3, top_k=1, seed=2),
    "top_k and all others": SamplingParams(
        temperature=1.1, top_k=12, top_p=0.9, min_p=0.02, typical_p=0.9, seed=3
    ),
}
# What depends on every token, in its normalizer at least.
WIDE = {
    "temperature": SamplingParams(temperature=0.9, seed=4),
    "top_p": SamplingParams(temperature=0.9, top_p=0.95, seed=5),
    "min_p": SamplingParams(temperature=1.2, min_p=0.05, seed=6),
    "typical_p": SamplingParams(temperature=1.0, typical_p=0.9, seed=7),
    "top_k beyond the candidates": SamplingParams(temperature=1.5, top_k=400, seed=8),
    "penalties": SamplingParams(temperature=0, repetition_penalty=1.3, frequency_penalty=0.2),
    "bias": SamplingParams(temperature=0.5, top_k=4, logit_bias=((260, 5.0), (300, -3.0)), seed=9),
    "allowed tokens": SamplingParams(temperature=0, allowed_token_ids=tuple(range(500, 600))),
}


@pytest.fixture(scope="module")
def engines(demo_bfloat16) -> dict[str, Engine]:
    def make(dtype: str) -> Engine:
        settings = EngineSettings(max_context=256, kv_cache_gib=0.25, lm_head_dtype=dtype)
        return assemble_engine(demo_bfloat16, settings).engine

    return {dtype: make(dtype) for dtype in ("bfloat16", "int4+exact")}


@pytest.fixture(autouse=True)
def one_thread():
    """The backend leaves torch one; what other tests set is theirs."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def requests(engine: Engine, kinds: dict[str, SamplingParams]) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            f"{kind} {index}",
            engine.tokenizer.encode(prompt, 255),
            sampling,
            StoppingParams(max_tokens=10, ignore_eos=True),
        )
        for kind, sampling in kinds.items()
        for index, prompt in enumerate(PROMPTS)
    ]


def tokens_of(counts: Engine, kind: str) -> float:
    value = counts.metrics.registry.get_sample_value("sparserve_lm_head_rows_total", {"kind": kind})
    assert value is not None
    return value


def answers(engine: Engine, batch: list[GenerationRequest], finish_all) -> dict:
    return {key: (update.text, update.tokens) for key, update in finish_all(engine, batch).items()}


def test_few_candidates_give_the_same_tokens(engines, finish_all):
    exact, ours = engines["bfloat16"], engines["int4+exact"]
    for kind, sampling in NARROW.items():
        batch = requests(exact, {kind: sampling})
        expected = answers(exact, batch, finish_all)
        first = batch[0]  # alone, and with the others
        assert answers(ours, [first], finish_all) == {
            (first.request_id, 0): expected[first.request_id, 0]
        }
        before = tokens_of(ours, "scan")
        assert answers(ours, batch, finish_all) == expected
        assert tokens_of(ours, "scan") > before, "the scan was enough"
        assert all(token.logprob is None for _, tokens in expected.values() for token in tokens)
    rescored = ours.metrics.registry.get_sample_value("sparserve_lm_head_rescored_total")
    assert rescored > tokens_of(ours, "scan")
    assert tokens_of(ours, "whole") == 0
    assert b"sparserve_lm_head_rows_total" in generate_latest(ours.metrics.exposition())


def test_whatever_needs_more_gets_it(engines, finish_all):
    exact, ours = engines["bfloat16"], engines["int4+exact"]
    logprobs = [
        replace(request, output=OutputParams(logprobs=True, top_logprobs=3))
        for request in requests(exact, {"greedy with logprobs": NARROW["greedy"]})
    ]
    batch = logprobs + requests(exact, NARROW) + requests(exact, WIDE)
    expected = answers(exact, batch, finish_all)
    assert answers(ours, batch, finish_all) == expected
    assert tokens_of(ours, "whole") > 0
    for request in logprobs:
        _, tokens = expected[request.request_id, 0]
        assert all(token.logprob == token.top[0].logprob < 0 for token in tokens)


def test_the_backend_tells_what_it_reads(engines):
    exact, ours = (engines[dtype].backend.info for dtype in ("bfloat16", "int4+exact"))
    assert ours.dtype == "bfloat16 (LM head int4+exact)"
    config = engines["bfloat16"].backend.config
    saved = config.vocab_size * config.hidden_size * 2 * 0.6
    assert ours.weight_bytes < exact.weight_bytes - saved
