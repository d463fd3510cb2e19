"""API keys over real calls: who may call what, revoking by reload, what is told and what never is."""

import asyncio
import logging

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import example, given
from hypothesis import strategies as st

from sparserve.api.security import guard, keys
from sparserve.api.security.auth import ACCESS, Access
from sparserve.api.security.guard import check_exposure, exposure
from sparserve.api.security.keys import MAX_KEYS, KeyRing, append_key, new_key, parse_keys
from sparserve.client import AsyncClient, make_request
from sparserve.config import ServerSettings
from sparserve.errors import CallFailed, ConfigError
from sparserve.v1 import control_pb2, inference_pb2

UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
DENIED = grpc.StatusCode.PERMISSION_DENIED

# Who may make each call, decided here once more: an RPC that is new fails the test below.
DECIDED = {
    "InferenceService": dict.fromkeys(
        ["Generate", "GenerateStream", "Chat", "ChatStream", "Tokenize", "Detokenize", "Embed"],
        "any key",
    ),
    "ControlService": {
        **dict.fromkeys(
            ["ListModels", "GetModelInfo", "GetServerInfo", "GetLoad", "GetTokenizer", "Abort"],
            "any key",
        ),
        **dict.fromkeys(["LoadAdapter", "UnloadAdapter", "Drain"], "control"),
    },
}
SERVICES = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],
    control_pb2.DESCRIPTOR.services_by_name["ControlService"],
)


@pytest.fixture
def key_file(tmp_path):
    """A file of keys, in which `ann` may call and `root` control; with the keys as attributes."""

    class KeyFile:
        path = tmp_path / "keys.yaml"

        def add(self, name: str, **fields: object) -> str:
            key, line = new_key({"name": name, **fields})
            append_key(self.path, name, line)
            return key

        def remove(self, name: str) -> None:
            lines = self.path.read_text().splitlines(keepends=True)
            self.path.write_text("".join(line for line in lines if f"name: {name}," not in line))

    file = KeyFile()
    file.ann, file.root = file.add("ann"), file.add("root", control=True)
    return file


@pytest.fixture
def guarded(serving, key_file, monkeypatch):
    """`async with guarded(setting=…) as server`: it asks for the keys of `key_file`."""
    monkeypatch.setattr(guard, "RELOAD_SECONDS", 0.02)
    return lambda **settings: serving(api_keys=str(key_file.path), **settings)


def bearer(key: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {key}")]


def client_of(server, key: str | None = None) -> AsyncClient:
    return AsyncClient(f"127.0.0.1:{server.port}", api_key=key)


async def outcome(wire, path: str, metadata, message: bytes = b"") -> tuple[grpc.StatusCode, str]:
    """Of any call, as raw bytes."""
    call = wire.channel.unary_stream(path)(message, metadata=metadata, timeout=30)
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details()
    return grpc.StatusCode.OK, ""


def keys_of(server):
    return server._guard._keys.value.entries


def failures_told(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]


async def test_every_rpc_has_a_decision_that_holds(guarded, connect, key_file, details_of):
    stranger = new_key({"name": "ann"})[0]  # the name does not help
    async with guarded() as server:
        wire = connect(server)
        for service in SERVICES:
            decided = DECIDED[service.name]
            assert set(decided) == {method.name for method in service.methods}
            for name, needed in decided.items():  # Drain is the last
                path = f"/{service.full_name}/{name}"
                refused = [
                    await outcome(wire, path, metadata) for metadata in (None, bearer(stranger))
                ]
                assert refused[0] == refused[1]
                assert refused[0][0] is UNAUTHENTICATED
                code, message = await outcome(wire, path, bearer(key_file.ann))
                if needed == "control":
                    assert (code, "ann" in message) == (DENIED, True)
                else:
                    assert code not in (UNAUTHENTICATED, DENIED)
                code, _ = await outcome(wire, path, bearer(key_file.root))
                assert code not in (UNAUTHENTICATED, DENIED)
        assert not server.is_ready  # root's Drain did it
    ours = {f"/{s.full_name}/{m.name}" for s in SERVICES for m in s.methods}
    assert {path for path in ACCESS if path.startswith("/sparserve.")} == ours


async def test_a_call_that_nobody_decided_on_is_for_control_and_one_that_is_not_there_for_none(
    guarded, connect, key_file, monkeypatch
):
    path = "/sparserve.v1.ControlService/ListModels"
    monkeypatch.setattr(
        "sparserve.api.security.auth.ACCESS",
        {name: access for name, access in ACCESS.items() if name != path},
    )
    async with guarded() as server:
        wire = connect(server)
        for key, code in ((key_file.ann, DENIED), (key_file.root, grpc.StatusCode.OK)):
            assert (await outcome(wire, path, bearer(key)))[0] is code
        for metadata, code in (
            (None, UNAUTHENTICATED),
            (bearer(key_file.ann), grpc.StatusCode.UNIMPLEMENTED),
        ):
            assert (await outcome(wire, "/sparserve.v1.ControlService/None", metadata))[0] is code


async def test_health_is_open_and_reflection_is_where_the_operator_says_so(
    guarded, connect, key_file
):
    reflect = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
    question = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
    for opened, code in ((False, UNAUTHENTICATED), (True, grpc.StatusCode.OK)):
        async with guarded(open_reflection=opened) as server:
            wire = connect(server)
            health = await wire.health.Check(health_pb2.HealthCheckRequest())
            assert health.status == health_pb2.HealthCheckResponse.SERVING
            watch = wire.health.Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            watch.cancel()
            for path in (reflect, reflect.replace("v1", "v1alpha")):
                assert (await outcome(wire, path, None, question))[0] is code
                with_key = await outcome(wire, path, bearer(key_file.ann), question)
                assert with_key[0] is grpc.StatusCode.OK


@pytest.mark.parametrize(
    ("written", "accepted"),
    [
        ([("authorization", "Bearer {}")], True),
        ([("authorization", "bearer  {}")], True),
        ([("authorization", "Basic {}")], False),
        ([("authorization", "{}")], False),
        ([("authorization", "Bearer")], False),
        ([("authorization", "Bearer {}x")], False),
        ([("authorization", "Bearer {}"), ("authorization", "Bearer {}")], False),
        ([("authorization-bin", b"Bearer {}")], False),
        ([("x-api-key", "{}")], False),
        ([("authorization", "Bearer " + "{}" * 200)], False),
    ],
)
async def test_a_key_comes_as_one_bearer_token(guarded, connect, key_file, written, accepted):
    metadata = [
        (name, value if isinstance(value, bytes) else value.format(*[key_file.ann] * 200))
        for name, value in written
    ]
    async with guarded() as server:
        code, _ = await outcome(
            connect(server), "/sparserve.v1.ControlService/ListModels", metadata
        )
    assert code is (grpc.StatusCode.OK if accepted else UNAUTHENTICATED)


async def test_a_refused_call_is_refused_before_its_message_is_read(guarded, connect):
    async with guarded() as server:
        wire = connect(server)
        generate = "/sparserve.v1.InferenceService/Generate"
        no_message = b"\xff" * 100  # with a key it would fail as INTERNAL
        assert (await outcome(wire, generate, None, no_message))[0] is UNAUTHENTICATED
        unended = wire.channel.stream_unary(generate)()  # nothing is sent at all
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await unended
        assert refused.value.code() is UNAUTHENTICATED


async def test_keys_come_and_go_with_their_file_and_what_runs_goes_on(
    guarded, key_file, controlled, until
):
    async with guarded() as server:
        reloads = server.engine.engine.metrics.key_reloads
        with controlled(server) as forward:
            forward.hold()
            async with client_of(server, key_file.ann) as ann:
                running = asyncio.ensure_future(ann.generate("hello", max_tokens=3))
                await until(lambda: server.engine.in_flight == 1)
                key_file.remove("ann")
                bob = key_file.add("bob")
                async with client_of(server, bob) as client:
                    await until(lambda: "bob" in keys_of(server))
                    assert await client.list_models()
                with pytest.raises(CallFailed) as refused:
                    await ann.list_models()
                assert refused.value.code == "UNAUTHENTICATED"
                forward.release()
                assert (await running).result.finish_reason
        await until(lambda: reloads.labels(outcome="ok")._value.get() >= 1)


async def test_a_call_that_was_opened_before_its_key_was_revoked_is_refused(
    guarded, connect, key_file, until
):
    path = "/sparserve.v1.InferenceService/GenerateStream"
    async with guarded() as server:
        wire = connect(server)
        call = wire.channel.stream_stream(path)(metadata=bearer(key_file.ann))
        await call.wait_for_connection()
        await asyncio.sleep(0.1)  # its headers are there
        key_file.remove("ann")
        await until(lambda: "ann" not in keys_of(server))
        await call.write(make_request("hello", max_tokens=1).SerializeToString())
        await call.done_writing()
        assert await call.code() is UNAUTHENTICATED


async def test_what_nobody_foresaw_in_one_file_does_not_keep_the_other_from_being_read(
    guarded, key_file, until, monkeypatch, caplog
):
    async with guarded() as server:
        failed = server.engine.engine.metrics.key_reloads.labels(outcome="failed")
        monkeypatch.setattr(keys, "parse_keys", lambda path, content: {}["sps_secret"])
        key_file.path.write_text("[]")
        await until(lambda: failed._value.get() == 1)
        (line,) = failures_told(caplog)
        assert "KeyError" in line
        assert "sps_secret" not in caplog.text


@pytest.mark.parametrize("broken", [None, b"", b"- {name: [", b"- {name: ann, sha256: 00}"])
async def test_a_broken_file_is_told_once_and_the_old_keys_stay(
    guarded, key_file, until, caplog, broken
):
    async with guarded() as server:
        failed = server.engine.engine.metrics.key_reloads.labels(outcome="failed")
        key_file.path.unlink() if broken is None else key_file.path.write_bytes(broken)
        await until(lambda: failed._value.get() == 1)
        await asyncio.sleep(0.1)
        assert failed._value.get() == 1
        (line,) = failures_told(caplog)
        assert str(key_file.path) in line
        async with client_of(server, key_file.ann) as client:
            assert await client.list_models()


async def test_a_file_without_keys_lets_nobody_in(guarded, key_file, until):
    async with guarded() as server:
        key_file.path.write_text("[]  # all are revoked\n")
        await until(lambda: not keys_of(server))
        async with client_of(server, key_file.root) as client:
            with pytest.raises(CallFailed, match="UNAUTHENTICATED"):
                await client.list_models()


async def test_requests_are_ended_by_their_own_key_or_one_with_control(
    guarded, key_file, controlled, until
):
    bob = key_file.add("bob")
    async with guarded() as server:
        with controlled(server) as forward:
            forward.hold()
            async with (
                client_of(server, key_file.ann) as ann,
                client_of(server, bob) as other,
                client_of(server, key_file.root) as root,
            ):
                # Two keys may use the same id: neither learns of the other.
                calls = [
                    asyncio.ensure_future(client.generate("hello", request_id="1", max_tokens=400))
                    for client in (ann, other)
                ]
                await until(lambda: server.engine.in_flight == 2)
                with pytest.raises(CallFailed, match="ALREADY_EXISTS"):
                    await ann.generate("hello", request_id="1")
                third = asyncio.ensure_future(ann.generate("hello", request_id="2"))
                await until(lambda: server.engine.in_flight == 3)
                assert await other.abort(["1", "2"]) == ("1",)
                assert await root.abort(["1", "2"]) == ("1", "2")
                forward.release()
                for call in (*calls, third):
                    assert (await call).result.finish_reason == "CANCELLED"


@pytest.mark.parametrize("shared", [False, True])
async def test_prompts_of_a_key_are_cached_for_it_alone_unless_shared(guarded, key_file, shared):
    fields = {"max_tokens": 1, "cache_salt": "s" * 256}
    async with guarded(share_prefix_cache=shared) as server:
        found = []
        for key in (key_file.ann, key_file.ann, key_file.root):
            async with client_of(server, key) as client:
                found.append((await client.generate("x" * 40, **fields)).result.cached_tokens)
    assert found == [0, 32, 32 if shared else 0]


async def test_the_log_tells_names_of_keys_and_neither_keys_nor_prompts(
    guarded, connect, key_file, until, caplog
):
    """Of calls that succeed, and of ones that fail in every way that a prompt can make one fail."""
    caplog.set_level(logging.DEBUG)
    secret = "Zerubbabel"
    requests = [
        make_request(f"the cat is {secret}", max_tokens=2),
        make_request(secret * 200),  # too long
        make_request(secret, regex=f"({secret}"),
        make_request(secret, json_schema=f'{{"type": "{secret}"}}'),
        make_request(secret, grammar=f"root ::= {secret}"),
        make_request(secret, stop=[secret * 40]),
        make_request(secret, model=secret),
        make_request(secret, temperature=9),
    ]
    async with guarded() as server:
        wire = connect(server)
        path = "/sparserve.v1.InferenceService/"
        metadata = bearer(key_file.ann)
        for request in requests:
            message = request.SerializeToString()
            await outcome(wire, f"{path}Generate", metadata, message)
            await outcome(wire, f"{path}GenerateStream", None, message)
        # No UTF-8, and no message at all: both fail where gRPC reads them.
        await outcome(wire, f"{path}Generate", metadata, b"\x1a\x0b\xff" + secret.encode())
        await outcome(wire, f"{path}Generate", metadata, secret.encode())
        role = inference_pb2.ChatRequest(messages=[{"role": secret, "content": secret}])
        await outcome(wire, f"{path}Chat", metadata, role.SerializeToString())
        text = inference_pb2.TokenizeRequest(text=secret).SerializeToString()
        await outcome(wire, f"{path}Tokenize", metadata, text)
        monkey = server.engine.engine.backend
        monkey.forward = lambda batch: 1 / 0
        await outcome(wire, f"{path}Generate", metadata, requests[0].SerializeToString())
        del monkey.forward
    lines = [
        " ".join([r.getMessage(), str(r.exc_text or ""), *map(str, vars(r).values())])
        for r in caplog.records
    ]
    access = [r for r in caplog.records if r.name == "sparserve.access"]
    assert {getattr(r, "key", None) for r in access if r.code != "UNAUTHENTICATED"} == {"ann"}
    assert {r.code for r in access} > {"OK", "UNAUTHENTICATED", "INVALID_ARGUMENT", "INTERNAL"}
    for hidden in (secret, key_file.ann, key_file.ann[4:20]):
        assert not [line for line in lines if hidden in line]


async def test_metrics_have_a_series_for_each_key_of_the_file(
    guarded, connect, key_file, until, http_get
):
    async with guarded() as server:
        async with client_of(server, key_file.ann) as ann:
            await ann.generate("hello", max_tokens=3, ignore_eos=True)
        await outcome(connect(server), "/sparserve.v1.ControlService/Drain", bearer(key_file.ann))
        await outcome(connect(server), "/sparserve.v1.ControlService/Drain", None)
        _, text = await http_get(server, "/metrics")
        model = f'model_name="{server.engine.engine.metrics.model_name}"'
        for series, value in {
            f'api_key_calls_total{{key="ann",{model}}}': 2,
            f'api_key_tokens_total{{key="ann",{model}}}': 8,
            f'api_key_limited_total{{key="root",{model}}}': 0,
            f'auth_refusals_total{{{model},reason="permission"}}': 1,
            f'auth_refusals_total{{{model},reason="key"}}': 1,
        }.items():
            assert f"sparserve_{series} {value}.0\n" in text
        key_file.remove("ann")
        await until(lambda: "ann" not in keys_of(server))
        for _ in range(100):
            _, text = await http_get(server, "/metrics")
            if 'key="ann"' not in text:
                break
            await asyncio.sleep(0.02)
        assert 'key="ann"' not in text
        assert 'key="root"' in text


def test_a_key_is_compared_with_all_whichever_it_is(tmp_path, monkeypatch):
    made = [new_key({"name": f"k{i}"}) for i in range(5)]
    ring = parse_keys(tmp_path, "".join(line for _, line in made).encode())
    compared = []
    real = keys.hmac.compare_digest
    monkeypatch.setattr(
        keys.hmac, "compare_digest", lambda a, b: bool(compared.append(1)) or real(a, b)
    )
    for number, (key, _) in enumerate(made):
        assert ring.find(key).name == f"k{number}"
    assert ring.find("none") is None
    assert len(compared) == 6 * 5


HASH = "0" * 64


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "it is empty"),
        (" \n\t\n", "it is empty"),
        ("just words", "valid list"),
        ("ann: 1", "valid list"),
        ("- ann", "key 1: "),
        ("- {name: ann}", "key 1, sha256: Field required"),
        (f"- {{name: a b, sha256: '{HASH}'}}", "key 1, name: String should match"),
        (f'- {{name: "a\\n", sha256: "{HASH}"}}', "key 1, name: String should match"),
        ("- {name: a, sha256: sps_plain}", "key 1, sha256: String should match"),
        (f"- {{name: a, sha256: '{HASH}', sps_plain}}", "key 1: Extra inputs"),
        ("- {name: a, sha256: !!bool sps_plain}", "it is no YAML"),
        (f"- {{name: a, sha256: '{HASH}', controll: true}}", "key 1: Extra inputs"),
        (f"- {{name: a, sha256: '{HASH}', control: 1}}", "control: Input should be a valid boolean"),
        (f"- {{name: a, sha256: '{HASH}', concurrent: -1}}", "concurrent: Input should be greater"),
        (f"- {{name: a, sha256: '{HASH}'}}\n" * 2, "key 2 has the name of an earlier one"),
        ("\n".join(f"- {{name: {n}, sha256: '{HASH}'}}" for n in "ab"), "key 2 has the hash of"),
        ("# one\n- {name: [", "line 2: it is no YAML"),
        ("[" * 1_000, "it is no YAML"),
        ("- 2001-99-99", "it is no YAML"),
        ("!!python/object/apply:os.abort []", "it is no YAML"),
        (b"\xff\xfe\xff", "it is not UTF-8"),
        ("\n".join(f"- {{name: k{i}, sha256: '{i:064x}'}}" for i in range(10, MAX_KEYS + 11)), "limit"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_told_by_place_and_never_quoted(tmp_path, text, told):
    with pytest.raises(ConfigError) as refused:
        parse_keys(tmp_path, text if isinstance(text, bytes) else text.encode())
    assert told in str(refused.value)
    assert "sps_plain" not in str(refused.value)


GOOD = f"- {{name: ann, sha256: '{HASH}', control: true, concurrent: 3}}\n# and more\n".encode()
MUTATED = st.tuples(
    st.integers(0, len(GOOD)), st.integers(0, 8), st.binary(max_size=8)
).map(lambda cut: GOOD[: cut[0]] + cut[2] + GOOD[cut[0] + cut[1] :])  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
ENTRY = st.fixed_dictionaries(
    {"name": VALUES | st.just("ann"), "sha256": VALUES | st.just(HASH)},
    optional={"control": VALUES, "concurrent": VALUES, "tokens_per_minute": VALUES, "x": VALUES},
)
DUMPED = st.lists(ENTRY, max_size=3).map(lambda entries: yaml.safe_dump(entries).encode())


@given(st.binary(max_size=200) | MUTATED | DUMPED)
@example(GOOD)
def test_any_file_gives_keys_or_a_config_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp()
    try:
        ring = parse_keys(path, content)
    except ConfigError:
        return
    assert isinstance(ring, KeyRing)
    for name, entry in ring.entries.items():
        assert name == entry.name
        assert len(bytes.fromhex(entry.sha256)) == 32
        assert isinstance(entry.control, bool)
    assert ring.find("") is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.com"])
def test_keys_in_plain_text_on_a_public_address_take_a_flag(host):
    pair = {"tls_cert": "c", "tls_key": "k"}
    with pytest.raises(ConfigError, match="--allow-insecure-keys"):
        check_exposure(ServerSettings(host=host, api_keys="k"))
    for more in ({}, {"api_keys": "k", **pair}, {"api_keys": "k", "allow_insecure_keys": True}):
        check_exposure(ServerSettings(host=host, **more))
    for more, told in (
        ({}, "without encryption or authentication"),
        (pair, "without authentication (--api-keys or --tls-client-ca)"),
        ({"api_keys": "k"}, "without encryption (--tls-cert), and API keys travel in plain text"),
    ):
        assert told in exposure(ServerSettings(host=host, **more))
    for more in ({**pair, "api_keys": "k"}, {**pair, "tls_client_ca": "a"}):
        assert exposure(ServerSettings(host=host, **more)) is None


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_keys_in_plain_text_on_this_machine_alone_are_nothing_to_warn_of(host):
    settings = ServerSettings(host=host, api_keys="k")
    check_exposure(settings)
    assert exposure(settings) is None


def test_no_call_of_ours_is_open():
    assert not [
        path for path, access in ACCESS.items() if access is Access.OPEN and "spars" in path
    ]
