"""The same promise on the real model: batched, chunked and preempted runs equal one at a time."""

import pytest
import torch

from sparserve.config import EngineSettings
from sparserve.engine.engine import Engine
from sparserve.engine.factory import assemble_engine
from sparserve.engine.request import GenerationRequest, SamplingParams, StoppingParams
from sparserve.model.kv_cache import bytes_per_block
from sparserve.model.loader import LoadedModel

PROMPTS = (
    "The history of computing begins with",
    "def quicksort(items):\n    if len(items) <= 1:\n        return items\n",
    "In the beginning was the word, " * 12,
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "Once upon a time, in a land far away, there lived a " * 6,
    "Das ist ein Haus. Das ist ein",
)


def requests(engine: Engine) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            str(index),
            engine.tokenizer.encode(prompt, 255),
            SamplingParams(temperature=0.0 if index % 2 else 0.9, seed=index),
            StoppingParams(max_tokens=24),
        )
        for index, prompt in enumerate(PROMPTS)
    ]


def run(engine: Engine, batch: list[GenerationRequest]) -> dict[str, tuple[object, ...]]:
    tokens: dict[str, tuple[object, ...]] = {request.request_id: () for request in batch}
    for request in batch:
        engine.validate(request)
        engine.add(request)
    while engine.has_work:
        for update in engine.step():
            tokens[update.request_id] += update.tokens
    return tokens


def small_context(**settings: object) -> EngineSettings:
    return EngineSettings(**{"max_context": 256, "kv_cache_gib": 0.25, **settings})


@pytest.fixture(scope="module", params=[pytest.param("reference", marks=pytest.mark.soak), "cpu"])
def model(request) -> LoadedModel:
    """In the dtype that the backend of that name is for, so that it is chosen."""
    name = {"reference": "demo_model", "cpu": "demo_bfloat16"}[request.param]
    loaded: LoadedModel = request.getfixturevalue(name)
    return loaded


@pytest.fixture(scope="module")
def alone(model: LoadedModel) -> dict[str, tuple[object, ...]]:
    engine = assemble_engine(model, small_context(max_running=1)).engine
    assert (engine.backend.info.name == "cpu") == (model.weights.dtype == torch.bfloat16)
    return {k: v for request in requests(engine) for k, v in run(engine, [request]).items()}


@pytest.mark.parametrize("case", ["batched", "chunked", "preempted"])
def test_output_equals_that_of_the_request_alone(model, alone, case):
    settings = {"max_running": 6}
    if case == "chunked":
        settings["max_batched_tokens"] = 48
    if case == "preempted":
        settings["kv_cache_gib"] = 17 * bytes_per_block(model.config, model.weights.dtype) / 2**30
    engine = assemble_engine(model, small_context(**settings)).engine
    assert run(engine, requests(engine)) == alone
    assert (engine.metrics.preemptions._value.get() > 0) == (case == "preempted")
