"""`sparserve keys`, and keys and TLS between `serve` and the commands that call it."""

import asyncio
import hashlib
import re
import stat

import pytest
import yaml

ANY_PORTS = ("--port", "0", "--metrics-port", "0")
SMALL = ("--threads", "1", "--kv-cache-gib", "0.05")


def test_a_new_key_goes_to_stdout_and_its_hash_to_the_file(run_main, tmp_path):
    file = tmp_path / "keys.yaml"
    status, key, told = run_main("keys", "new", "ann", "--file", file)
    assert (status, key.count("\n")) == (0, 1)
    assert re.fullmatch(r"sps_[\w-]{43}\n", key)
    assert str(file) in told
    assert key.strip() not in told
    assert yaml.safe_load(file.read_text()) == [
        {"name": "ann", "sha256": hashlib.sha256(key.strip().encode()).hexdigest()}
    ]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_keys_are_added_behind_what_stands_there(run_main, tmp_path, monkeypatch):
    file = tmp_path / "keys.yaml"
    run_main("keys", "new", "ann", "--file", file)
    file.write_text("# ours\n" + file.read_text().rstrip("\n"))
    monkeypatch.setenv("SPARSERVE_API_KEYS", str(file))
    limits = ("--requests-per-minute", "60", "--tokens-per-minute", "0", "--concurrent", "2")
    assert run_main("keys", "new", "on", "--control", *limits)[0] == 0
    text = file.read_text()
    assert text.startswith("# ours\n- {name: ann")
    ann, on = yaml.safe_load(text)
    assert set(ann) == {"name", "sha256"}
    assert on.pop("sha256") != ann["sha256"]
    assert on == {
        "name": "on", "control": True, "requests_per_minute": 60, "tokens_per_minute": 0, "concurrent": 2,
    }  # fmt: skip


def test_without_a_file_the_line_is_printed_beside_the_key(run_main):
    status, key, told = run_main("keys", "new", "ann")
    line = yaml.safe_load(told.splitlines()[-1])
    assert status == 0
    assert line[0]["sha256"] == hashlib.sha256(key.strip().encode()).hexdigest()


@pytest.mark.parametrize(
    ("before", "arguments", "told"),
    [
        ("", ["a b"], "name is 'a b'"),
        ("", ["ann", "--concurrent", "-1"], "concurrent is -1"),
        ("same", ["ann"], "has a key named ann already"),
        ("[]\n", ["ann"], "line 2: it is no YAML"),
        ("- {name: x}\n", ["ann"], "key 1, sha256: Field required"),
        (None, ["ann"], "cannot be written"),
    ],
)
def test_what_cannot_be_added_is_refused_and_the_file_stays(
    run_main, tmp_path, before, arguments, told
):
    file = tmp_path / ("folder" if before is None else "keys.yaml")
    if before is None:
        file = file / "keys.yaml"
    elif before == "same":
        run_main("keys", "new", "ann", "--file", file)
    elif before:
        file.write_text(before)
    kept = file.read_text() if file.exists() else None
    status, out, err = run_main("keys", "new", *arguments, "--file", file)
    assert (status, out) == (1, "")
    assert told in err
    assert (file.read_text() if file.exists() else None) == kept


async def test_serve_and_generate_meet_over_tls_with_a_key_until_it_is_revoked(
    spawn, run_main, tiny_folder, make_authority, tmp_path, monkeypatch
):
    authority, ca = make_authority("ours"), tmp_path / "ca.pem"
    ca.write_bytes(authority.pem)
    certificate, secret = authority.issue(tmp_path, "server")
    file = tmp_path / "keys.yaml"
    key = run_main("keys", "new", "ann", "--file", file)[1].strip()
    served = await spawn(
        "serve", "--model", tiny_folder, *ANY_PORTS, *SMALL,
        "--tls-cert", certificate, "--tls-key", secret, "--api-keys", file,
    )  # fmt: skip
    await served.ready()

    async def generate(*more: object) -> tuple[int, str, str]:
        target = f"grpcs://localhost:{served.port}"
        command = ("generate", "hello", "--server", target, "--tls-ca", ca, "--max-tokens", "2")
        return await asyncio.to_thread(run_main, *command, *more)

    assert (await generate("--api-key", key))[0] == 0
    status, _, told = await generate()
    assert status == 1
    assert "UNAUTHENTICATED" in told
    monkeypatch.setenv("SPARSERVE_API_KEY", key)
    assert (await generate())[0] == 0
    file.write_text("[]\n")
    while "the file of API keys changed" not in await served.line():
        pass
    status, _, told = await generate()
    assert status == 1
    assert "UNAUTHENTICATED" in told
    served.process.terminate()
    assert await served.ended() == 0
    lines = [line for line in served.lines if "sparserve.access" in line]
    assert sum("key=ann" in line for line in lines) == 2
    assert not [line for line in served.lines if key in line or "hello" in line]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--tls-cert", "none.pem", "--tls-key", "none.pem"], "none.pem cannot be read"),
        (["--api-keys", "none.yaml"], "none.yaml cannot be read"),
        (["--host", "0.0.0.0", "--api-keys", "none.yaml"], "--allow-insecure-keys"),
    ],
)
def test_serve_refuses_what_it_cannot_use_before_it_loads_a_model(run_main, flags, told):
    status, _, err = run_main("serve", "--model", "no-such-model", *ANY_PORTS, *flags)
    assert status == 1
    assert told in err
    assert "no-such-model" not in err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--tls-ca", "ca.pem"], "--tls-ca: for a running server"),
        (["--server", "example.com:1", "--api-key", "k"], "in plain text"),
        (["--server", "localhost:1", "--client-cert", "c"], "tls_cert and tls_key"),
        (["--server", "localhost:1", "--tls-ca", "none.pem"], "none.pem cannot be read"),
    ],
)
def test_flags_of_a_connection_that_mean_nothing_are_refused(run_main, flags, told):
    status, _, err = run_main("generate", "hello", *flags)
    assert status == 1
    assert told in err
