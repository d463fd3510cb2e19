"""TLS and mTLS with real certificates: who gets in, rotation while streams run, files that cannot be used."""

import asyncio
import ssl
import time
from datetime import UTC, datetime

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from sparserve.api.security import guard
from sparserve.api.security.tls import certificate_files
from sparserve.client import AsyncClient, Client
from sparserve.client.connection import connection
from sparserve.config import ServerSettings
from sparserve.errors import CallFailed, ConfigError, InvalidRequest

OWN_CONNECTION = {"grpc.use_local_subchannel_pool": 1}  # or gRPC shares one among equal channels


@pytest.fixture
def authority(make_authority):
    return make_authority("one")


@pytest.fixture
def pair(authority, tmp_path):
    """Settings of a server with a certificate of `authority`."""
    chain, key = authority.issue(tmp_path, "server")
    return {"tls_cert": str(chain), "tls_key": str(key)}


@pytest.fixture
def quick_reloads(monkeypatch):
    monkeypatch.setattr(guard, "RELOAD_SECONDS", 0.02)


def client_of(server, authority, **more):
    """Over TLS, on a connection of its own."""
    return AsyncClient(
        f"grpcs://localhost:{server.port}", tls_ca=authority.pem, options=OWN_CONNECTION, **more
    )


async def models(client) -> tuple[str, ...]:
    async with client:
        return await client.list_models(timeout=10)


async def certificate_of(server) -> x509.Certificate:
    """What a new connection is shown."""
    pem = await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", server.port))
    return x509.load_pem_x509_certificate(pem.encode())


def serial(path) -> int:
    return x509.load_pem_x509_certificate(path.read_bytes()).serial_number


def counted(server, outcome: str) -> float:
    return server.engine.engine.metrics.tls_reloads.labels(outcome=outcome)._value.get()


async def test_clients_that_trust_the_authority_get_in_and_no_others(
    serving, authority, make_authority, pair
):
    async with serving(**pair) as server:
        assert await models(client_of(server, authority))
        plain = AsyncClient(f"127.0.0.1:{server.port}", options=OWN_CONNECTION)
        for stranger in (client_of(server, make_authority("other")), plain):
            with pytest.raises(CallFailed) as refused:
                await models(stranger)
            assert refused.value.code == "UNAVAILABLE"

        def synchronously() -> str:
            with Client(f"grpcs://localhost:{server.port}/", tls_ca=authority.pem) as client:
                return client.generate("hello", max_tokens=2, ignore_eos=True).result.finish_reason

        assert await asyncio.to_thread(synchronously) == "LENGTH"


async def test_with_a_client_authority_a_certificate_of_it_is_needed_and_enough(
    serving, authority, make_authority, pair, tmp_path
):
    clients = make_authority("clients")
    (tmp_path / "ca.pem").write_bytes(clients.pem)
    async with serving(**pair, tls_client_ca=str(tmp_path / "ca.pem")) as server:
        for identity in (None, authority.issue(tmp_path, "stranger")):
            shown = dict(zip(("tls_cert", "tls_key"), identity or (), strict=False))
            with pytest.raises(CallFailed) as refused:
                await models(client_of(server, authority, **shown))
            assert refused.value.code == "UNAVAILABLE"
        chain, key = clients.issue(tmp_path, "client")
        async with client_of(server, authority, tls_cert=chain, tls_key=key) as client:
            assert await client.list_models()
            assert await client.abort("none") == ()
            await client.drain(0)


async def test_a_rotated_certificate_is_shown_to_new_connections_while_old_streams_go_on(
    serving, authority, make_authority, pair, tmp_path, controlled, until, quick_reloads
):
    other = make_authority("other")
    async with serving(**pair) as server:
        metrics = server.engine.engine.metrics
        before = await certificate_of(server)
        assert metrics.tls_expiry._value.get() == before.not_valid_after_utc.timestamp()
        with controlled(server) as forward:
            forward.seconds = 0.02
            async with client_of(server, authority) as client:
                pieces = client.stream("hello", max_tokens=60, ignore_eos=True, temperature=0)
                await anext(pieces)
                chain, _ = other.issue(tmp_path, "server", days=2)  # over the files that there are
                await until(lambda: counted(server, "ok") == 1)
                after = await certificate_of(server)
                assert after.serial_number == serial(chain) != before.serial_number
                assert await models(client_of(server, other))
                with pytest.raises(CallFailed):
                    await models(client_of(server, authority))
                assert forward.calls < 60  # the stream did run meanwhile
                results = [piece.result async for piece in pieces]
        assert results[-1].completion_tokens == 60
        assert metrics.tls_expiry._value.get() == after.not_valid_after_utc.timestamp()


async def test_a_rotated_client_authority_shuts_out_the_old_ones_certificates(
    serving, authority, make_authority, pair, tmp_path, until, quick_reloads
):
    old, new, ca = make_authority("old"), make_authority("new"), tmp_path / "ca.pem"
    ca.write_bytes(old.pem)
    async with serving(**pair, tls_client_ca=str(ca)) as server:
        ids = {
            name: dict(
                zip(("tls_cert", "tls_key"), each.issue(tmp_path, f"{name}-client"), strict=True)
            )
            for name, each in (("old", old), ("new", new))
        }
        assert await models(client_of(server, authority, **ids["old"]))
        ca.write_bytes(new.pem)
        await until(lambda: counted(server, "ok") == 1)
        assert await models(client_of(server, authority, **ids["new"]))
        with pytest.raises(CallFailed, match="UNAVAILABLE"):
            await models(client_of(server, authority, **ids["old"]))


async def test_a_broken_rotation_is_told_once_and_the_old_certificate_stays(
    serving, authority, pair, tmp_path, until, caplog, quick_reloads
):
    chain, key = tmp_path / "server.crt", tmp_path / "server.key"
    async with serving(**pair) as server:
        before = serial(chain)
        for number, broken in enumerate(
            (b"", None, authority.issue(tmp_path, "x")[0].read_bytes())
        ):
            chain.unlink() if broken is None else chain.write_bytes(broken)
            await until(lambda number=number: counted(server, "failed") == number + 1)
            assert (await certificate_of(server)).serial_number == before
            assert await models(client_of(server, authority))
        await asyncio.sleep(0.1)
        assert counted(server, "failed") == 3
        told = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
        assert [str(chain) in line for line in told] == [True] * 3
        assert "No such file" in told[1]
        assert "is not the key of the certificate" in told[2]
        assert str(key) in told[2]
        new, _ = authority.issue(tmp_path, "server")
        await until(lambda: counted(server, "ok") >= 1)
        # Between the two writes a certificate may have stood there without its key.
        await until(lambda: server._guard._certificate.value.chain == new.read_bytes())
        assert (await certificate_of(server)).serial_number == serial(new)


def write(path, content: bytes):
    path.write_bytes(content)
    return str(path)


def pem_of(key, password: bytes | None = None) -> bytes:
    hidden = serialization.BestAvailableEncryption(password) if password else None
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        hidden or serialization.NoEncryption(),
    )


def no_key(authority, pair, folder):
    del pair["tls_key"]


def no_file(authority, pair, folder):
    pair["tls_cert"] = str(folder / "none")


def a_folder(authority, pair, folder):
    pair["tls_key"] = str(folder)


def no_pem(authority, pair, folder):
    pair["tls_cert"] = write(folder / "bad", b"-----BEGIN CERTIFICATE-----\nAAAA\n")


def no_private_key(authority, pair, folder):
    pair["tls_key"] = pair["tls_cert"]


def another_key(authority, pair, folder):
    pair["tls_key"] = str(authority.issue(folder, "other")[1])


def encrypted_key(authority, pair, folder):
    key = ec.generate_private_key(ec.SECP256R1())
    pair["tls_key"] = write(folder / "bad", pem_of(key, b"secret"))


def issuer_first(authority, pair, folder):
    chain = authority.pem + (folder / "server.crt").read_bytes()
    pair["tls_cert"] = write(folder / "bad", chain)


def curve(authority, pair, folder):
    paths = authority.issue(folder, "bad", key=ec.generate_private_key(ec.SECP521R1()))
    pair["tls_cert"], pair["tls_key"] = map(str, paths)


def edwards(authority, pair, folder):
    paths = authority.issue(folder, "bad", key=ed25519.Ed25519PrivateKey.generate())
    pair["tls_cert"], pair["tls_key"] = map(str, paths)


def bad_client_ca(authority, pair, folder):
    pair["tls_client_ca"] = write(folder / "bad", b"nothing")


def only_client_ca(authority, pair, folder):
    pair.clear()
    pair["tls_client_ca"] = write(folder / "ca.pem", authority.pem)


def huge(authority, pair, folder):
    pair["tls_cert"] = write(folder / "bad", bytes((1 << 20) + 1))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (no_key, "--tls-cert is given without --tls-key"),
        (no_file, "none cannot be read: No such file"),
        (a_folder, "is no file"),
        (no_pem, "bad holds no certificates in PEM"),
        (no_private_key, "server.crt holds no private key in PEM"),
        (another_key, r"other.key is not the key of the certificate in .*server.crt \(CN=server\)"),
        (encrypted_key, "bad is encrypted"),
        (issuer_first, "bad begins with another certificate than that of .*server.key"),
        (curve, "bad.key is a key of the kind secp521r1"),
        (edwards, "bad.key is a key of the kind Ed25519PrivateKey"),
        (bad_client_ca, "bad holds no certificates in PEM"),
        (only_client_ca, "--tls-client-ca is given without --tls-cert"),
        (huge, "bad has more than 1 MiB"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_files_that_cannot_be_used_are_refused_by_name(authority, pair, tmp_path, spoil, told):
    spoil(authority, pair, tmp_path)
    with pytest.raises(ConfigError, match=told):
        certificate_files(ServerSettings(**pair))


@pytest.mark.parametrize(
    "key", [ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)]
)  # fmt: skip
async def test_other_kinds_of_keys_serve_too(serving, authority, tmp_path, key):
    chain, secret = authority.issue(tmp_path, "other", key=key)
    async with serving(tls_cert=str(chain), tls_key=str(secret)) as server:
        assert await models(client_of(server, authority))


async def test_an_expired_certificate_is_warned_of_with_its_date(
    serving, authority, tmp_path, caplog
):
    chain, key = authority.issue(tmp_path, "server", days=-3)
    async with serving(tls_cert=str(chain), tls_key=str(key)) as server:
        ended = server.engine.engine.metrics.tls_expiry._value.get()
        assert ended < time.time() - 2 * 86400
        with pytest.raises(CallFailed, match="UNAVAILABLE"):
            await models(client_of(server, authority))
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    date = datetime.fromtimestamp(ended, UTC).isoformat()
    assert line == f"{chain}: the certificate of CN=server expired on {date}"


@pytest.mark.parametrize(
    ("target", "arguments", "expected"),
    [
        ("localhost:1", {}, ("localhost:1", False, None)),
        ("grpc://host:1", {}, ("host:1", False, None)),
        ("grpcs://host:1/", {}, ("host:1", True, None)),
        ("host:1", {"tls_ca": b"pem"}, ("host:1", True, None)),
        ("grpcs://host:1", {"api_key": "k"}, ("host:1", True, "Bearer k")),
        ("grpc://host:1", {"api_key": "k"}, ("host:1", False, "Bearer k")),
        ("localhost:1", {"api_key": "k"}, ("localhost:1", False, "Bearer k")),
        ("127.0.0.2", {"api_key": "k"}, ("127.0.0.2", False, "Bearer k")),
        ("[::1]:1", {"api_key": "k"}, ("[::1]:1", False, "Bearer k")),
        ("dns:///localhost:1", {"api_key": "k"}, ("dns:///localhost:1", False, "Bearer k")),
        ("ipv4:127.0.0.1:1", {"api_key": "k"}, ("ipv4:127.0.0.1:1", False, "Bearer k")),
        ("unix:/run/s", {"api_key": "k"}, ("unix:/run/s", False, "Bearer k")),
    ],
)
def test_what_a_client_is_given_says_how_it_connects(target, arguments, expected):
    to = connection(target, **arguments)
    assert (to.target, to.credentials is not None, to.authorization) == expected
    assert "Bearer" not in repr(to)


@pytest.mark.parametrize(
    ("target", "arguments", "field"),
    [
        ("host:1", {"api_key": "k"}, "api_key"),
        ("dns:///host:1", {"api_key": "k"}, "api_key"),
        ("localhost.evil:1", {"api_key": "k"}, "api_key"),
        ("ipv4:10.0.0.1:1", {"api_key": "k"}, "api_key"),
        ("localhost:1", {"api_key": "a b"}, "api_key"),
        ("localhost:1", {"api_key": ""}, "api_key"),
        ("localhost:1", {"api_key": "é"}, "api_key"),
        ("localhost:1", {"api_key": 1}, "api_key"),
        ("grpc://host:1", {"tls_ca": b"pem"}, "tls_ca"),
        ("host:1", {"tls_cert": b"pem"}, "tls_cert"),
        ("host:1", {"tls_ca": "/no/such/file"}, "tls_ca"),
        ("host:1", {"tls_ca": 5}, "tls_ca"),
    ],
)
def test_what_means_nothing_or_gives_a_key_away_is_refused(target, arguments, field):
    with pytest.raises(InvalidRequest) as refused:
        connection(target, **arguments)
    assert refused.value.field == field


def test_credentials_of_grpc_stand_for_themselves():
    credentials = grpc.ssl_channel_credentials()
    assert connection("host:1", credentials, api_key="k").credentials is credentials
    for target, arguments in (("grpc://host:1", {}), ("host:1", {"tls_ca": b"pem"})):
        with pytest.raises(InvalidRequest):
            connection(target, credentials, **arguments)
