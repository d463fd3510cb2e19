"""Settings: flags beat the environment beats the file beats the defaults, and errors say what to do."""

import contextlib
import re
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sparserve.cli.options import with_settings
from sparserve.config import EngineSettings, ServerSettings, load_settings
from sparserve.errors import ConfigError

# A value other than the default for each setting, as a flag or the environment says it.
OTHER = {
    "model": ("folder", "folder"),
    "compress": ("fast", "fast"),
    "compress_text": ("a.txt, b.txt", "a.txt, b.txt"),
    "prune": ("0.2", 0.2),
    "prune_heads": ("0.1", 0.1),
    "prune_mlp": ("0.3", 0.3),
    "compress_cache": ("false", False),
    "backend": ("reference", "reference"),
    "device": ("cuda:1", "cuda:1"),
    "dtype": ("bfloat16", "bfloat16"),
    "attention_dtype": ("bfloat16", "bfloat16"),
    "mlp_dtype": ("int4", "int4"),
    "lm_head_dtype": ("int4+exact", "int4+exact"),
    "group_size": ("32", 32),
    "weight_planes": ("3+1", "3+1"),
    "down_planes": ("same", "same"),
    "activation_bits": ("8", 8),
    "kv_dtype": ("int8", "int8"),
    "index": ("index.safetensors", "index.safetensors"),
    "default_policy": ("core", "core"),
    "default_density": ("0.5", 0.5),
    "default_target_kl": ("0.25", 0.25),
    "min_density": ("0.4", 0.4),
    "max_target_kl": ("0.5", 0.5),
    "allowed_policies": ("core, exact", "core, exact"),
    "device_map": ("auto", "auto"),
    "max_memory_gib": ("1.5", 1.5),
    "threads": ("3", 3),
    "max_context": ("100", 100),
    "kv_cache_gib": ("0.5", 0.5),
    "gpu_memory_utilization": ("0.5", 0.5),
    "cuda_graphs": ("false", False),
    "core_copies": ("false", False),
    "max_running": ("4", 4),
    "max_batched_tokens": ("64", 64),
    "mixed_prefill_tokens": ("32", 32),
    "prefix_cache": ("false", False),
    "max_new_tokens": ("77", 77),
    "max_choices": ("2", 2),
    "default_max_tokens": ("9", 9),
    "host": ("0.0.0.0", "0.0.0.0"),
    "port": ("1234", 1234),
    "metrics_host": ("10.0.0.1", "10.0.0.1"),
    "metrics_port": ("4321", 4321),
    "max_waiting": ("0", 0),
    "max_waiting_tokens": ("1000", 1000),
    "max_stream_backlog": ("10", 10),
    "max_message_mib": ("2", 2),
    "max_metadata_kib": ("8", 8),
    "max_concurrent_streams": ("100", 100),
    "max_connection_age": ("2.5", 2.5),
    "max_connection_grace": ("1.5", 1.5),
    "drain_delay": ("3.5", 3.5),
    "drain_timeout": ("1.5", 1.5),
    "log_level": ("debug", "debug"),
    "log_format": ("json", "json"),
    "metrics_compat": ("vllm", "vllm"),
    "adapters": ("kserve, vllm", "kserve, vllm"),
    "adapters_host": ("10.0.0.1", "10.0.0.1"),
    "adapters_port": ("3333", 3333),
    "allow_public_adapters": ("true", True),
    "tls_cert": ("cert.pem", "cert.pem"),
    "tls_key": ("key.pem", "key.pem"),
    "tls_client_ca": ("ca.pem", "ca.pem"),
    "api_keys": ("keys.yaml", "keys.yaml"),
    "allow_insecure_keys": ("true", True),
    "open_reflection": ("true", True),
    "key_rpm": ("60", 60),
    "key_tpm": ("6000", 6000),
    "key_concurrent": ("2", 2),
    "share_prefix_cache": ("true", True),
}


@pytest.fixture
def file(tmp_path):
    """`file("port: 1")` -> its path."""

    def write(text: str | bytes):
        path = tmp_path / "settings.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_every_setting_is_held_by_a_test_here():
    assert set(OTHER) == set(ServerSettings.model_fields)


def test_nothing_given_means_the_defaults(monkeypatch):
    settings = load_settings(ServerSettings, dict.fromkeys(OTHER))
    defaults = {name: field.default for name, field in ServerSettings.model_fields.items()}
    assert settings.model_dump() == defaults
    assert type(settings) is ServerSettings


@pytest.mark.parametrize("name", OTHER)
def test_each_setting_can_come_from_each_source(name, file, monkeypatch):
    said, value = OTHER[name]
    for settings in (
        load_settings(ServerSettings, {name: said}),
        load_settings(ServerSettings, {}, file(f"{name}: {said}")),
    ):
        assert getattr(settings, name) == value
    monkeypatch.setenv(f"SPARSERVE_{name.upper()}", said)
    assert getattr(load_settings(ServerSettings, {}), name) == value


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(file, monkeypatch):
    config = file("port: 1\nmax_running: 2\nmax_waiting: 3\n")
    monkeypatch.setenv("SPARSERVE_PORT", "10")
    monkeypatch.setenv("SPARSERVE_MAX_RUNNING", "20")
    settings = load_settings(ServerSettings, {"port": "100"}, config)
    assert (settings.port, settings.max_running, settings.max_waiting) == (100, 20, 3)
    assert settings.drain_timeout == 30


def test_0_as_a_flag_is_a_value_and_not_an_absence(monkeypatch):
    monkeypatch.setenv("SPARSERVE_PORT", "10")
    assert load_settings(ServerSettings, {"port": 0}).port == 0


def test_the_engine_alone_takes_its_part_of_the_environment(monkeypatch):
    monkeypatch.setenv("SPARSERVE_THREADS", "3")
    monkeypatch.setenv("SPARSERVE_PORT", "not looked at")
    assert load_settings(EngineSettings, {}).threads == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("backend", "gpu"),
        ("dtype", "int7"),
        ("mlp_dtype", "auto"),
        ("lm_head_dtype", "float32"),
        ("group_size", "many"),
        ("weight_planes", "4+2"),
        ("down_planes", "4+4"),
        ("activation_bits", "16.0"),
        ("threads", "-1"),
        ("threads", "many"),
        ("max_context", "-1"),
        ("kv_cache_gib", "inf"),
        ("kv_cache_gib", "nan"),
        ("kv_cache_gib", "-1"),
        ("max_running", "0"),
        ("max_running", "1025"),
        ("max_batched_tokens", "0"),
        ("default_max_tokens", "0"),
        ("default_max_tokens", str(2**31)),
        ("port", "65536"),
        ("port", "tcp://10.0.0.1:50051"),
        ("port", ""),
        ("metrics_port", "-1"),
        ("max_waiting", "-1"),
        ("max_waiting", "99999999999"),
        ("max_message_mib", "0"),
        ("max_connection_age", "inf"),
        ("max_connection_age", "1e12"),
        ("drain_delay", "-0.1"),
        ("drain_delay", "inf"),
        ("drain_timeout", "-0.1"),
        ("drain_timeout", "inf"),
        ("log_level", "loud"),
    ],
)
def test_a_wrong_value_is_named_with_the_setting_and_its_three_ways(name, value, monkeypatch):
    monkeypatch.setenv(f"SPARSERVE_{name.upper()}", value)
    with pytest.raises(ConfigError) as error:
        load_settings(ServerSettings, {})
    text = str(error.value)
    assert text.startswith(f"{name} is {value!r}: ")
    assert f"--{name.replace('_', '-')}, SPARSERVE_{name.upper()} or {name} in the" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [("group_size", "48", "'auto', 32, 64 or 128"), ("activation_bits", "4", "16 or 8")],
)
def test_a_number_that_is_no_choice_is_told_with_the_choices(name, value, allowed):
    for said in (value, int(value)):
        with pytest.raises(ConfigError, match=rf"^{name} is {value}: Input should be {allowed} \("):
            load_settings(EngineSettings, {name: said})


def test_every_wrong_value_is_told_at_once():
    with pytest.raises(ConfigError) as error:
        load_settings(ServerSettings, {"port": "x", "dtype": "y"})
    assert [line.split(" ")[0] for line in str(error.value).splitlines()] == ["dtype", "port"]


@pytest.mark.parametrize("value", ["", "sparse", "core,sparse", "core;exact"])
def test_policies_that_do_not_exist_are_refused_with_those_that_do(value):
    with pytest.raises(ConfigError, match="names out of dense, core, token, exact, auto"):
        load_settings(ServerSettings, {"allowed_policies": value})


def test_dense_is_always_allowed_and_the_default_policy_must_be():
    settings = load_settings(ServerSettings, {"allowed_policies": "core, token"})
    assert settings.policies == {"dense", "core", "token"}
    assert load_settings(ServerSettings, {}).policies == {"dense", "core", "token", "exact", "auto"}
    with pytest.raises(ConfigError, match="default_policy is exact, which is not in"):
        load_settings(ServerSettings, {"allowed_policies": "core", "default_policy": "exact"})


def test_values_that_contradict_each_other_are_both_named():
    with pytest.raises(ConfigError, match="max_batched_tokens 512 is below max_running 600"):
        load_settings(ServerSettings, {"max_running": "600"})


@pytest.mark.parametrize(
    "name",
    ["dtype", "attention_dtype", "mlp_dtype", "lm_head_dtype", "group_size", "weight_planes",
     "down_planes", "activation_bits"],
)  # fmt: skip
def test_a_recipe_and_a_setting_of_formats_are_not_both_followed(name):
    said, value = OTHER[name]
    with pytest.raises(
        ConfigError, match=rf"{name} is {re.escape(str(value))}, and compress fast, a recipe"
    ):
        load_settings(EngineSettings, {"compress": "fast", name: said})


def test_texts_are_files_with_commas_between(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    settings = load_settings(EngineSettings, {"compress_text": "~/a b.txt, c.txt,"})
    assert settings.compress_texts == [Path("/home/me/a b.txt"), Path("c.txt")]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        pytest.param("prot: 1", "prot is no setting", id="unknown key"),
        pytest.param("port:", "port is None", id="no value"),
        pytest.param("port: 1.5", "port is 1.5", id="fraction"),
        pytest.param("port: [1]", "port is [1]", id="list"),
        pytest.param("- port", "must be lines of", id="not a mapping"),
        pytest.param("just words", "must be lines of", id="words"),
        pytest.param("1: 2", "must be lines of", id="number as a key"),
        pytest.param("port: [", "line 1, column 8", id="bad YAML"),
        pytest.param(b"\xff\xfe\x00", "cannot be read", id="not UTF-8"),
        pytest.param("!!python/object/apply:os.abort []", "cannot be read", id="code"),
    ],
)
def test_a_wrong_settings_file_is_one_clear_line(file, text, told):
    with pytest.raises(ConfigError) as error:
        load_settings(ServerSettings, {}, file(text))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "{}"])
def test_a_settings_file_may_be_empty(file, text):
    assert load_settings(ServerSettings, {}, file(text)) == load_settings(ServerSettings, {})


def test_a_settings_file_that_is_not_there_or_a_folder_is_named(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match=str(path)):
            load_settings(ServerSettings, {}, path)


@given(st.dictionaries(st.sampled_from(list(OTHER)), st.text(max_size=12)))
def test_any_values_give_settings_or_a_config_error(values):
    with contextlib.suppress(ConfigError):
        assert isinstance(load_settings(ServerSettings, values), ServerSettings)


@pytest.mark.parametrize(
    ("flags", "expected"), [([], True), (["--prefix-cache"], True), (["--no-prefix-cache"], False)]
)
def test_a_setting_that_is_on_or_off_is_a_flag_with_its_opposite(flags, expected):
    seen = []

    @with_settings(ServerSettings)
    def command(settings: ServerSettings) -> None:
        seen.append(settings)

    app = typer.Typer()
    app.command()(command)
    CliRunner().invoke(app, flags, catch_exceptions=False)
    assert [settings.prefix_cache for settings in seen] == [expected]
