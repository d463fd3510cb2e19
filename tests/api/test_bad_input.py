"""Requests that cannot work: the right status, a message that names value and limit, rich details."""

import asyncio
import math
import time

import grpc
import pytest

from sparserve.client import AsyncClient, Client, make_request
from sparserve.errors import CallFailed
from sparserve.v1 import control_pb2
from sparserve.v1 import inference_pb2 as pb

INVALID = grpc.StatusCode.INVALID_ARGUMENT
CONTEXT = 512  # of the tiny model


@pytest.fixture
def refusal(wire):
    """The error with which both Generate and GenerateStream answer a request."""

    async def refuse(request: pb.GenerateRequest) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as unary:
            await wire.inference.Generate(request)
        with pytest.raises(grpc.aio.AioRpcError) as stream:
            await wire.inference.GenerateStream(request).read()
        assert (unary.value.code(), unary.value.details()) == (
            stream.value.code(),
            stream.value.details(),
        )
        assert "Traceback" not in unary.value.details()
        return unary.value

    return refuse


def with_fields(**groups: dict[str, object]) -> pb.GenerateRequest:
    """A good request with some fields set: `with_fields(sampling={"top_k": 3})`."""
    request = pb.GenerateRequest(text="hello", stopping=pb.Stopping(max_tokens=2, ignore_eos=True))
    kinds = {"sampling": pb.Sampling, "stopping": pb.Stopping, "response": pb.ResponseOptions}
    for group, fields in groups.items():
        if isinstance(fields, dict):
            kind = kinds.get(group, pb.Sparsity)
            getattr(request, group).MergeFrom(kind(**fields))
        elif hasattr(fields, "DESCRIPTOR"):
            getattr(request, group).CopyFrom(fields)
        else:
            setattr(request, group, fields)
    return request


@pytest.mark.parametrize(
    ("request_", "field", "named"),
    [
        pytest.param(pb.GenerateRequest(), "prompt", ["no prompt", "text", "token_ids"], id="none"),
        pytest.param(pb.GenerateRequest(text=""), "prompt", ["empty"], id="empty text"),
        pytest.param(
            pb.GenerateRequest(token_ids=pb.TokenIds()), "prompt", ["empty"], id="empty ids"
        ),
        pytest.param(
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 259])),
            "token_ids.ids[1]",
            ["259", "outside the vocabulary of 259"],
            id="id above the vocabulary",
        ),
        pytest.param(
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[-1])),
            "token_ids.ids[0]",
            ["-1", "259"],
            id="negative id",
        ),
    ],
)
async def test_a_prompt_that_cannot_work_is_refused(refusal, details_of, request_, field, named):
    error = await refusal(request_)
    assert error.code() is INVALID
    (violation,) = details_of(error)["BadRequest"].field_violations
    assert (violation.field, violation.description) == (field, error.details())
    for part in named:
        assert part in error.details()


@pytest.mark.parametrize(
    "prompt",
    [
        pytest.param("x" * CONTEXT, id="text"),
        pytest.param([1] * CONTEXT, id="ids"),
        pytest.param("x" * 5_000_000, id="huge text"),
        pytest.param([1] * 5_000_000, id="huge ids"),
    ],
)
async def test_a_prompt_beyond_the_context_is_refused_with_the_limit(refusal, details_of, prompt):
    error = await refusal(make_request(prompt))
    assert error.code() is INVALID
    assert str(len(prompt)) in error.details()
    assert str(CONTEXT - 1) in error.details()
    details = details_of(error)
    (violation,) = details["BadRequest"].field_violations
    info = details["ErrorInfo"]
    assert (info.reason, info.domain) == ("PROMPT_TOO_LONG", "sparserve")
    assert info.metadata["max_prompt_tokens"] == str(CONTEXT - 1)
    assert violation.field == info.metadata["field"] in ("prompt", "text", "token_ids")


async def test_the_longest_prompt_that_fits_is_served(client):
    answer = await client.generate([1] * (CONTEXT - 1), max_tokens=5)
    assert answer.result.prompt_tokens == CONTEXT - 1


@pytest.mark.parametrize("kind", ["text", "ids"])
async def test_a_huge_prompt_is_refused_before_its_tokens_are_looked_at(refusal, kind):
    huge = make_request("word " * 3_000_000 if kind == "text" else [1] * 15_000_000)
    begun = time.process_time()  # CPU time: a busy machine does not matter
    error = await refusal(huge)
    assert time.process_time() - begun < 1.2  # to walk through them twice takes 2 s and more
    assert error.code() is INVALID


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", v) for v in (-0.001, 2.001, math.nan, math.inf, -math.inf)],
        *[("top_p", v) for v in (0.0, -0.5, 1.001, math.nan, math.inf, -math.inf)],
        *[("top_k", v) for v in (-1, -(2**31))],
        *[("min_p", v) for v in (-0.01, 1.01, math.nan, math.inf)],
        *[("typical_p", v) for v in (0.0, -0.5, 1.01, math.nan)],
        *[("repetition_penalty", v) for v in (0.0, -1.0, 10.01, math.nan, math.inf)],
        *[("presence_penalty", v) for v in (-2.01, 2.01, math.nan, math.inf)],
        *[("frequency_penalty", v) for v in (-2.01, 2.01, math.nan, -math.inf)],
        *[("n", v) for v in (0, -1, -(2**31))],
    ],
)
async def test_a_sampling_value_out_of_range_is_refused(refusal, details_of, name, value):
    error = await refusal(with_fields(sampling={name: value}))
    assert error.code() is INVALID
    assert f"sampling.{name} is {value:g}; it must be" in error.details()
    (violation,) = details_of(error)["BadRequest"].field_violations
    assert violation.field == f"sampling.{name}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("temperature", 2.0),
        ("temperature", 1e-40),
        ("top_p", 1e-40),
        ("top_p", 1.0),
        ("top_k", 0),
        ("top_k", 2**31 - 1),
        ("seed", 0),
        ("seed", 2**64 - 1),
        ("min_p", 1.0),
        ("typical_p", 1e-40),
        ("repetition_penalty", 10.0),
        ("presence_penalty", -2.0),
        ("frequency_penalty", 2.0),
        ("n", 1),
        ("logit_bias", dict.fromkeys(range(259), 100.0)),
        ("allowed_token_ids", range(259)),
    ],
)
async def test_a_sampling_value_at_its_bound_is_served(wire, name, value):
    response = await wire.inference.Generate(with_fields(sampling={name: value}))
    assert response.choices[0].finished.reason == pb.FINISH_REASON_LENGTH


@pytest.mark.parametrize(
    ("fields", "field", "named"),
    [
        pytest.param(
            {"max_tokens": 0}, "max_tokens", "max_tokens is 0; it must be >= 1", id="none"
        ),
        pytest.param({"max_tokens": -5}, "max_tokens", "max_tokens is -5", id="negative"),
        pytest.param(
            {"stop": ["x"] * 17}, "stop", "17 stop strings given, the limit is 16", id="many"
        ),
        pytest.param({"stop": ["ok", "x" * 257]}, "stop", "257 characters; 1 to 256", id="long"),
        pytest.param({"stop": ["ok", ""]}, "stop", "0 characters; 1 to 256", id="empty"),
        pytest.param({"min_tokens": -1}, "min_tokens", "min_tokens is -1; it must be", id="min"),
        pytest.param(
            {"stop_token_ids": [1] * 257},
            "stop_token_ids",
            "257 stop tokens given, the limit is 256",
            id="many tokens",
        ),
    ],
)
async def test_a_stopping_value_out_of_range_is_refused(refusal, details_of, fields, field, named):
    error = await refusal(with_fields(stopping=fields))
    assert error.code() is INVALID
    assert named in error.details()
    (violation,) = details_of(error)["BadRequest"].field_violations
    assert violation.field == f"stopping.{field}"


async def test_as_many_and_as_long_stop_strings_as_allowed_are_served(wire):
    stops = [chr(0x4E00 + i) * 256 for i in range(16)]
    response = await wire.inference.Generate(with_fields(stopping={"stop": stops}))
    assert response.choices[0].finished.reason == pb.FINISH_REASON_LENGTH


@pytest.mark.parametrize(
    ("path", "value", "field", "named"),
    [
        ("sampling.logit_bias", {3: 100.5}, "sampling.logit_bias[3]", "is 100.5; it must be"),
        ("sampling.logit_bias", {3: math.nan}, "sampling.logit_bias[3]", "is nan"),
        ("sampling.logit_bias", dict.fromkeys(range(1025), 0.0), "sampling.logit_bias",
         "1025 biases given, the limit is 1024"),
        ("response.top_logprobs", 65, "response.top_logprobs", "is 65; it must be in [0, 64]"),
        ("response.top_logprobs", -1, "response.top_logprobs", "is -1"),
        ("response.prompt_logprobs", 65, "response.prompt_logprobs", "is 65"),
        ("response.prompt_logprobs", -1, "response.prompt_logprobs", "is -1"),
        ("priority", 101, "priority", "is 101; it must be in [-100, 100]"),
        ("priority", -(2**31), "priority", "it must be in [-100, 100]"),
        ("cache_salt", "s" * 257, "cache_salt", "257 characters, the limit is 256"),
        ("user", "u" * 257, "user", "257 characters, the limit is 256"),
        ("constraint", pb.Constraint(), "constraint", "the constraint is empty"),
        ("constraint", pb.Constraint(json_object=False), "constraint.json_object", "false"),
        ("constraint", pb.Constraint(choice=pb.Choices()), "constraint.choice", "no options"),
    ],
)  # fmt: skip
async def test_a_value_that_cannot_work_is_refused(refusal, details_of, path, value, field, named):
    error = await refusal(with_path(path, value))
    assert error.code() is INVALID
    assert named in error.details()
    (violation,) = details_of(error)["BadRequest"].field_violations
    assert violation.field == field


@pytest.mark.parametrize("value", [0.0, -0.5, 1.5, math.nan, math.inf])
async def test_a_density_out_of_range_is_refused(refusal, details_of, value):
    error = await refusal(with_fields(sparsity={"density": value}))
    assert error.code() is INVALID
    assert f"density is {value:g}" in error.details()
    assert "(0, 1]" in error.details()
    (violation,) = details_of(error)["BadRequest"].field_violations
    assert violation.field == "sparsity.density"


@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf])
async def test_a_target_kl_out_of_range_is_refused(refusal, details_of, value):
    error = await refusal(with_fields(sparsity={"target_kl": value}))
    assert error.code() is INVALID
    assert f"target_kl is {value:g}" in error.details()
    (violation,) = details_of(error)["BadRequest"].field_violations
    assert violation.field == "sparsity.target_kl"


@pytest.mark.parametrize("value", [6, 77, -1])
async def test_a_policy_outside_the_enum_is_refused(refusal, details_of, value):
    error = await refusal(with_fields(sparsity={"policy": value}))
    assert error.code() is INVALID
    assert str(value) in error.details()
    (violation,) = details_of(error)["BadRequest"].field_violations
    assert violation.field == "sparsity.policy"


async def test_an_overlong_request_id_is_refused_and_the_longest_is_served(
    refusal, details_of, wire
):
    error = await refusal(with_fields(request_id="i" * 257))
    assert error.code() is INVALID
    assert "257 characters, the limit is 256" in error.details()
    (violation,) = details_of(error)["BadRequest"].field_violations
    assert violation.field == "request_id"
    response = await wire.inference.Generate(with_fields(request_id="i" * 256))
    assert response.request_id == "i" * 256


async def test_an_unknown_model_is_not_found(server, wire, refusal, details_of):
    error = await refusal(with_fields(model="gpt-9"))
    served = (await wire.control.ListModels(control_pb2.ListModelsRequest())).models[0].name
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert "'gpt-9'" in error.details()
    assert repr(served) in error.details()
    resource = details_of(error)["ResourceInfo"]
    assert (resource.resource_type, resource.resource_name) == ("model", "gpt-9")
    named = await wire.inference.Generate(with_fields(model=served))
    assert named.model == served
    with pytest.raises(grpc.aio.AioRpcError) as info:
        await wire.control.GetModelInfo(control_pb2.GetModelInfoRequest(model="gpt-9"))
    assert info.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("character", ["x", "\U0010ffff", "\n", "%"])
async def test_an_answer_to_long_names_fits_into_the_metadata_of_a_call(
    server, wire, refusal, details_of, controlled, until, character
):
    """Clients take 8 KiB of it; with more the call would end in another status."""
    error = await refusal(with_fields(model=character * 100_000))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert details_of(error)["ResourceInfo"].resource_name.startswith(character * 100)
    with controlled(server) as forward:
        forward.hold()
        longest = with_fields(request_id=character * 256)
        first = asyncio.ensure_future(wire.inference.Generate(longest))
        await until(lambda: server.engine.in_flight == 1)
        error = await refusal(longest)
        assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    await first


async def test_a_request_id_in_flight_is_refused_until_its_request_ends(
    server, wire, refusal, details_of, controlled, until
):
    with controlled(server) as forward:
        forward.hold()
        first = wire.inference.GenerateStream(with_fields(request_id="mine"))
        await until(lambda: forward.calls == 1)
        error = await refusal(with_fields(request_id="mine"))
        assert error.code() is grpc.StatusCode.ALREADY_EXISTS
        assert "'mine'" in error.details()
        (violation,) = details_of(error)["BadRequest"].field_violations
        assert violation.field == "request_id"
    kinds = []
    while (event := await first.read()) is not grpc.aio.EOF:
        kinds.append(event.WhichOneof("event"))
    assert kinds[-1] == "summary"  # the duplicate did the first no harm
    again = await wire.inference.Generate(with_fields(request_id="mine"))
    assert again.request_id == "mine"


async def test_a_request_id_is_free_as_soon_as_its_summary_is_read(server, connect):
    """Not only when the call's status has come: a client may start the next one at once."""
    one, other = connect(server), connect(server)
    for _ in range(30):
        call = one.inference.GenerateStream(with_fields(request_id="mine"))
        while (await call.read()).WhichOneof("event") != "summary":
            pass
        await other.inference.Generate(with_fields(request_id="mine"))


async def test_a_message_over_the_limit_is_refused_by_grpc(serving, connect):
    async with serving(max_message_mib=1) as server:
        wire = connect(server)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await wire.inference.Generate(make_request("x" * (1 << 20)))
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await wire.inference.Generate(make_request("x" * ((1 << 20) - 100)))
        assert error.value.code() is INVALID  # arrived, and is too long a prompt
        assert (await wire.inference.Generate(with_fields())).usage.completion_tokens == 2


# Every field that is not built: its path, a value that asks for something, one that asks for nothing.
NOT_BUILT = [("adapter", "lora", "")]


def with_path(path: str, value: object) -> pb.GenerateRequest:
    group, _, name = path.rpartition(".")
    return with_fields(**({group: {name: value}} if group else {name: value}))


@pytest.mark.parametrize(("path", "asking", "nothing"), NOT_BUILT)
async def test_a_field_that_is_not_built_is_unimplemented_unless_it_asks_for_nothing(
    refusal, details_of, wire, path, asking, nothing
):
    error = await refusal(with_path(path, asking))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert path in error.details()
    info = details_of(error)["ErrorInfo"]
    assert (info.reason, info.domain, info.metadata["field"]) == (
        "NOT_BUILT_YET",
        "sparserve",
        path,
    )
    if nothing is not None:
        response = await wire.inference.Generate(with_path(path, nothing))
        assert response.usage.completion_tokens == 2


CORE, TOKEN, EXACT = pb.SPARSITY_POLICY_CORE, pb.SPARSITY_POLICY_TOKEN, pb.SPARSITY_POLICY_EXACT


@pytest.mark.parametrize(
    ("fields", "field", "named"),
    [
        ({"density": 0.5}, "density", "density is 0.5, but policy dense reads all neurons; take core or exact"),
        ({"policy": pb.SPARSITY_POLICY_DENSE, "density": 0.5}, "density", "policy dense"),
        ({"policy": CORE, "density": 0.5, "target_kl": 0.1}, "target_kl", "density or target_kl, not both"),
        ({"policy": CORE, "alpha": 0.2}, "alpha", "alpha is for counts"),
        ({"policy": CORE, "score": pb.SPARSITY_SCORE_COUNT, "alpha": 1.5}, "alpha", "alpha is 1.5"),
        ({"policy": CORE, "score": 9}, "score", "score 9 is not in the enum"),
        ({"policy": CORE, "predictor": -1}, "predictor", "predictor -1 is not in the enum"),
        ({"policy": CORE, "choice": 3}, "choice", "choice 3 is not in the enum"),
        ({"policy": EXACT, "draft": 4}, "draft", "draft 4 is not in the enum"),
        ({"policy": CORE, "choice": pb.SPARSITY_CHOICE_GATE}, "choice", "choice is for policy"),
        ({"policy": CORE, "core_density": 0.5}, "core_density", "core_density is for policy"),
        ({"policy": TOKEN, "core_density": math.nan}, "core_density", "core_density is nan"),
        ({"policy": CORE, "first_layer": 2}, "first_layer", "first_layer is 2; it must be from 0 to 1"),
        ({"policy": CORE, "last_layer": 3}, "last_layer", "last_layer is 3; it must be from 1 to 2"),
        ({"policy": CORE, "density": 0.4, "first_layer": 1}, "density", "take a higher density"),
        ({"policy": CORE, "refresh_interval": -1}, "refresh_interval", "refresh_interval is -1"),
        ({"refresh_interval": 16}, "refresh_interval", "not for policy dense"),
        ({"policy": EXACT, "draft_tokens": 0}, "draft_tokens", "draft_tokens is 0"),
        ({"policy": CORE, "draft_tokens": 2}, "draft_tokens", "draft_tokens is for policy exact"),
    ],
)  # fmt: skip
async def test_a_policy_that_cannot_work_is_refused(refusal, details_of, fields, field, named):
    error = await refusal(with_fields(sparsity=fields))
    assert error.code() is INVALID
    assert named in error.details()
    (violation,) = details_of(error)["BadRequest"].field_violations
    assert violation.field == f"sparsity.{field}"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"policy": TOKEN}, "policy"),
        ({"policy": pb.SPARSITY_POLICY_AUTO}, "policy"),
        ({"policy": CORE, "target_kl": 0.1}, "target_kl"),
        ({"policy": CORE, "predictor": pb.SPARSITY_PREDICTOR_SIMILARITY}, "predictor"),
    ],
)
async def test_what_needs_an_index_names_the_command_that_makes_one(
    refusal, details_of, fields, field
):
    error = await refusal(with_fields(sparsity=fields))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "sparserve calibrate" in error.details()
    info = details_of(error)["ErrorInfo"]
    assert (info.reason, info.metadata["field"]) == ("SPARSITY_UNAVAILABLE", f"sparsity.{field}")


@pytest.mark.parametrize(
    ("fields", "code", "named"),
    [
        ({"policy": EXACT}, grpc.StatusCode.FAILED_PRECONDITION, "exact is not allowed on this server; allowed: dense, core"),
        ({"policy": CORE, "density": 0.5}, INVALID, "density is 0.5; this server reads 0.6 at least"),
        ({"policy": CORE, "target_kl": 0.5}, INVALID, "target_kl is 0.5; this server grants 0.1 at most"),
    ],
)  # fmt: skip
async def test_the_operators_bounds_are_kept(serving, connect, fields, code, named):
    bounds = {"allowed_policies": "core", "min_density": 0.6, "max_target_kl": 0.1}
    async with serving(**bounds) as server:
        wire = connect(server)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await wire.inference.Generate(with_fields(sparsity=fields))
        assert (error.value.code(), named in error.value.details()) == (code, True)
        info = await wire.control.GetServerInfo(control_pb2.GetServerInfoRequest())
        assert list(info.policies) == [pb.SPARSITY_POLICY_DENSE, CORE]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    "fields", [{"policy": CORE}, {"policy": EXACT, "draft": pb.SPARSITY_DRAFT_CORE}]
)
async def test_a_core_of_a_prompt_of_one_token_is_refused(refusal, details_of, fields, n):
    asked = with_fields(sparsity=fields, sampling={"n": n})
    asked.token_ids.ids.append(5)
    error = await refusal(asked)
    assert error.code() is INVALID
    assert "the prompt has one token" in error.details()
    (violation,) = details_of(error)["BadRequest"].field_violations
    assert violation.field == "sparsity.predictor"


@pytest.mark.parametrize(
    "fields",
    [
        {"policy": pb.SPARSITY_POLICY_UNSPECIFIED},
        {"policy": pb.SPARSITY_POLICY_DENSE},
        {"density": 1.0},
        {"target_kl": 0.0},
        {"target_kl": 0.5},
        {"report": False},
    ],
)
async def test_a_dense_request_is_served_however_it_is_said(wire, fields):
    response = await wire.inference.Generate(with_fields(sparsity=fields))
    assert response.sparsity.policy == pb.SPARSITY_POLICY_DENSE


def test_every_field_of_a_request_is_held_by_a_test_here():
    """A field added to the protocol must be served or refused, and this file must know which."""
    served = {
        "request_id", "model", "text", "token_ids", "constraint", "priority", "cache_salt", "user",
        *(f"sampling.{name}" for name in (
            "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty",
            "presence_penalty", "frequency_penalty", "seed", "n", "logit_bias", "allowed_token_ids",
        )),
        *(f"stopping.{name}" for name in (
            "max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "include_stop",
        )),
        *(f"response.{name}" for name in (
            "text", "token_ids", "logprobs", "top_logprobs", "prompt_logprobs", "skip_special_tokens",
        )),
        *(f"sparsity.{name}" for name in (
            "policy", "density", "target_kl", "report", "choice", "core_density", "predictor", "score",
            "alpha", "first_layer", "last_layer", "refresh_interval", "draft", "draft_tokens",
        )),
    }  # fmt: skip
    chat = {field.name for field in pb.ChatRequest.DESCRIPTOR.fields}
    generate = {field.name for field in pb.GenerateRequest.DESCRIPTOR.fields}
    assert generate - chat == {"text", "token_ids"}
    assert chat - generate == {"messages", "tools", "continue_final_message", "template_arguments"}
    fields = set()
    for field in pb.GenerateRequest.DESCRIPTOR.fields:
        if field.name in ("sampling", "stopping", "response", "sparsity"):
            fields |= {f"{field.name}.{inner.name}" for inner in field.message_type.fields}
        else:
            fields.add(field.name)
    assert fields == served | {path for path, _, _ in NOT_BUILT}


@pytest.mark.parametrize("count", [0, 1025])
async def test_abort_takes_1_to_1024_ids(wire, details_of, count):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await wire.control.Abort(control_pb2.AbortRequest(request_ids=["x"] * count))
    assert error.value.code() is INVALID
    assert f"{count} ids given; 1 to 1024" in error.value.details()
    (violation,) = details_of(error.value)["BadRequest"].field_violations
    assert violation.field == "request_ids"


async def test_abort_tells_which_ids_it_does_not_know(wire):
    ids = [f"unknown {i}" for i in range(1024)]
    response = await wire.control.Abort(control_pb2.AbortRequest(request_ids=ids))
    assert (list(response.aborted), list(response.not_found)) == ([], ids)
    twice = await wire.control.Abort(control_pb2.AbortRequest(request_ids=["x", "x"]))
    assert list(twice.not_found) == ["x"]


async def test_both_clients_raise_call_failed_with_the_violations(server, client):
    with pytest.raises(CallFailed) as failed:
        await client.generate("hello", max_tokens=0)
    with pytest.raises(CallFailed) as streamed:
        async for _ in client.stream("hello", max_tokens=0):
            pass

    def plain() -> CallFailed:
        with (
            Client(f"127.0.0.1:{server.port}") as connected,
            pytest.raises(CallFailed) as failed,
        ):
            connected.generate("hello", max_tokens=0)
        return failed.value

    for error in (failed.value, streamed.value, await asyncio.to_thread(plain)):
        assert error.code == "INVALID_ARGUMENT"
        assert error.violations == {"stopping.max_tokens": error.message}
        assert error.retry_after is None


async def test_a_client_whose_server_is_not_there_raises_unavailable():
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(CallFailed) as failed:
            await client.generate("hello")
    assert failed.value.code == "UNAVAILABLE"
