"""Requests of every kind at once: each gets what it gets alone, with the same seed, to the bit."""

import asyncio
import random

from sparserve.v1 import inference_pb2 as pb

REQUESTS = 200
CONCURRENT = 16

SCHEMA = """{"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
 "required": ["a", "b"], "additionalProperties": false}"""
GRAMMAR = 'root ::= "(" item ("," item)* ")"\nitem ::= [a-c]+'
STEMS = ["The sea is wide. " * 5, "Once upon a time, in a land far away, " * 3, ""]


def random_request(source: random.Random, index: int) -> pb.GenerateRequest:
    """Any combination of the options that make sense together."""
    request = pb.GenerateRequest(request_id=f"mixed-{index}")
    text = source.choice(STEMS) + "x" * source.randint(1, 60)
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
    request.sparsity.report = source.random() < 0.2
    request.cache_salt = source.choice(["", "", "tenant"])
    request.priority = source.choice([0, 0, 1, -1])
    return request


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
    response.usage.ClearField("cached_tokens")
    return response


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
    response.usage.ClearField("cached_tokens")
    return response


async def test_each_of_200_mixed_requests_equals_itself_alone(serving, connect):
    source = random.Random(2024)
    requests = [random_request(source, index) for index in range(REQUESTS)]
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
