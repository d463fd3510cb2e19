"""Requests of every kind at once: each gets what it gets alone, with the same seed, to the bit."""

import asyncio
import random
from functools import partial

from sparserve.v1 import inference_pb2 as pb

REQUESTS = 120
CONCURRENT = 16

SCHEMA = """{"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
 "required": ["a", "b"], "additionalProperties": false}"""
GRAMMAR = 'root ::= "(" item ("," item)* ")"\nitem ::= [a-c]+'
STEMS = ["The sea is wide. " * 5, "Once upon a time, in a land far away, " * 3, ""]


def random_request(source: random.Random, index: int) -> pb.GenerateRequest:
    """Any combination of the options that make sense together."""
    request = pb.GenerateRequest(request_id=f"mixed-{index}")
    text = source.choice(STEMS) + "x" * source.randint(2, 60)  # a core needs two tokens
    if source.random() < 0.3:
        request.token_ids.ids.extend(text.encode())
    else:
        request.text = text
    _sampling(source, request.sampling)
    _stopping(source, request.stopping)
    constraints = [
        {"json_schema": SCHEMA}, {"regex": "[a-f]{3,9}(-[0-9]+)?"}, {"grammar": GRAMMAR},
        {"choice": pb.Choices(options=["yes", "no", "yes and no"])}, {"json_object": True},
    ]  # fmt: skip
    if source.random() < 0.4:
        request.constraint.CopyFrom(pb.Constraint(**source.choice(constraints)))
        del request.sampling.allowed_token_ids[:]  # they would forbid what the constraint asks for
        request.stopping.min_tokens = 0
    request.response.token_ids = True
    request.response.logprobs = source.random() < 0.7
    request.response.top_logprobs = source.choice([0, 0, 3])
    if source.random() < 0.15:
        request.response.prompt_logprobs = source.choice([0, 2])
    request.response.skip_special_tokens = source.random() < 0.7
    request.sparsity.CopyFrom(_sparsity(source))
    request.cache_salt = source.choice(["", "", "tenant"])
    request.priority = source.choice([0, 0, 1, -1])
    return request


def _sparsity(source: random.Random) -> pb.Sparsity:
    """A policy of any kind, with an index."""
    if source.random() < 0.3:
        return pb.Sparsity(report=source.random() < 0.5)
    refresh = source.choice([0, 0, 3, 8])
    core, exact = pb.SPARSITY_POLICY_CORE, pb.SPARSITY_POLICY_EXACT
    token = {"policy": pb.SPARSITY_POLICY_TOKEN, "choice": pb.SPARSITY_CHOICE_GATE}
    kinds = [
        {"policy": core, "density": source.choice([0.3, 0.6, 1.0]), "refresh_interval": refresh},
        {"policy": core, "predictor": source.choice([1, 2, 3])},
        {"policy": core, "predictor": 1, "score": source.choice([2, 3]), "alpha": 0.2},
        {**token, "density": source.choice([0.6, 0.75]), "refresh_interval": refresh},
        {**token, "density": 0.5, "core_density": 0.5},
        {
            "policy": exact,
            "draft": source.choice([0, 1, 2, 3]),
            "draft_tokens": source.choice([1, 4]),
        },
        {"policy": pb.SPARSITY_POLICY_AUTO, "target_kl": source.choice([0.05, 0.2])},
    ]
    return pb.Sparsity(**source.choice(kinds), report=source.random() < 0.2)


def _sampling(source: random.Random, sampling: pb.Sampling) -> None:
    sampling.seed = source.randrange(1 << 40)
    sampling.temperature = source.choice([0.0, 0.5, 1.0, 1.6])
    sampling.n = source.choice([1, 1, 1, 2, 3])
    for name, values in {
        "top_k": [1, 20, 200], "top_p": [0.3, 0.95], "min_p": [0.01, 0.2], "typical_p": [0.4, 0.9],
        "repetition_penalty": [0.8, 1.3], "presence_penalty": [-0.5, 1.0],
        "frequency_penalty": [0.2, 2.0],
    }.items():  # fmt: skip
        if source.random() < 0.25:
            setattr(sampling, name, source.choice(values))
    if source.random() < 0.2:
        sampling.logit_bias[source.randrange(259)] = source.uniform(-100, 20)
    if source.random() < 0.15:
        sampling.allowed_token_ids.extend(source.sample(range(259), 60))


def _stopping(source: random.Random, stopping: pb.Stopping) -> None:
    stopping.max_tokens = source.randint(1, 40)
    stopping.ignore_eos = source.random() < 0.5
    stopping.include_stop = source.random() < 0.5
    if source.random() < 0.3:
        stopping.stop.extend(source.sample(["a", "e", "th", "{", "0"], 2))
    if source.random() < 0.3:
        stopping.stop_token_ids.extend(source.sample(range(200), 3))
    if source.random() < 0.2:
        stopping.min_tokens = source.randint(0, stopping.max_tokens)


async def unary(wire, request: pb.GenerateRequest) -> pb.GenerateResponse:
    """What does not depend on the clock or on the cache."""
    response = await wire.inference.Generate(request)
    response.ClearField("timings")
    return steady(response)


async def streamed(wire, request: pb.GenerateRequest) -> pb.GenerateResponse:
    """A stream put together as the unary response would have been."""
    response = pb.GenerateResponse()
    choices = [pb.Choice(index=i) for i in range(max(request.sampling.n, 1))]
    async for event in wire.inference.GenerateStream(request):
        match event.WhichOneof("event"):
            case "started":
                response.request_id, response.model = event.started.request_id, event.started.model
            case "prompt":
                response.prompt.CopyFrom(event.prompt)
            case "delta":
                choices[event.delta.index].text += event.delta.text
                choices[event.delta.index].tokens.extend(event.delta.tokens)
            case "finished":
                choices[event.finished.index].finished.CopyFrom(event.finished)
            case "summary":
                response.usage.CopyFrom(event.summary.usage)
                response.sparsity.CopyFrom(event.summary.sparsity)
    response.choices.extend(choices)
    return steady(response)


def steady(response: pb.GenerateResponse) -> pb.GenerateResponse:
    """Without what depends on the cache, and on the room that others left for drafts and dense passes."""
    response.usage.ClearField("cached_tokens")
    report = response.sparsity
    if report.policy == pb.SPARSITY_POLICY_EXACT or report.refreshes:
        for name in ("density", "mlp_bytes_per_token", "bytes_per_token", "drafted_tokens", "accepted_tokens"):  # fmt: skip
            report.ClearField(name)
    return response


async def test_each_of_many_mixed_requests_equals_itself_alone(serving, connect, tiny_index):
    source = random.Random(2024)
    requests = [random_request(source, index) for index in range(REQUESTS)]
    serving = partial(serving, index=str(tiny_index))
    async with serving(prefix_cache=False, max_running=1) as quiet:
        wire = connect(quiet)
        alone = [await unary(wire, request) for request in requests]
    await check_together(serving, connect, requests, alone, kv_cache_gib=0.004)
    preemptions = await check_together(serving, connect, requests, alone, kv_cache_gib=0.0003)
    assert preemptions > 0


async def check_together(serving, connect, requests, alone, *, kv_cache_gib: float) -> int:
    """All requests again, CONCURRENT at a time, every other one streamed. -> preemptions"""
    seats = asyncio.Semaphore(CONCURRENT)
    settings = {"max_context": 320, "max_running": CONCURRENT, "max_batched_tokens": 96}
    async with serving(kv_cache_gib=kv_cache_gib, **settings) as server:
        wire = connect(server)

        async def one(index: int) -> pb.GenerateResponse:
            async with seats:
                return await (streamed if index % 2 else unary)(wire, requests[index])

        together = await asyncio.gather(*(one(index) for index in range(REQUESTS)))
        metrics = server.engine.engine.metrics
        assert metrics.prefix_cache_hits._value.get() > 0
        assert server.engine.engine.used_blocks == 0
        preemptions = int(metrics.preemptions._value.get())
    for request, expected, response in zip(requests, alone, together, strict=True):
        assert response == expected, f"{request}"
    return preemptions
