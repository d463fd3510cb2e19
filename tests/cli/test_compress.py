"""`sparserve compress`, and `--compress` of the commands that load a model."""

import json
import signal
from pathlib import Path

import pytest
import torch
import yaml

from sparserve.client import AsyncClient
from sparserve.compression.recipe import read_recipe
from sparserve.model import compress_folder as module
from sparserve.model.catalog import DEMO_MODEL
from sparserve.model.compress_folder import compress_folder
from sparserve.model.loader import load_model

RECIPE = "name: tested\ngate_up: {group_size: 32}\ncalibration: {windows: 4, tokens: 64}\n"
SERVER = ("--port", "0", "--metrics-port", "0", "--threads", "1", "--kv-cache-gib", "0.01")


@pytest.fixture
def tiny(write_tiny_checkpoint, tmp_path) -> Path:
    return write_tiny_checkpoint(tmp_path / "tiny", dtype=torch.bfloat16, num_hidden_layers=3)


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("rivers and stones and birds that sing over green hills. " * 10)
    return path


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def compress(run_main, tiny, text, recipe, tmp_path):
    """`compress(…)` -> (exit status, stdout, stderr) of one that goes well without further flags."""
    arguments = ("compress", tiny, "--recipe", recipe, "--text", text, "--out", tmp_path / "out")
    return lambda *more: run_main(*arguments, *more)


def words(text: str) -> str:
    return " ".join(text.split())


def test_a_folder_is_made_and_what_it_costs_is_shown(compress, run_main, tmp_path):
    status, out, err = compress()
    assert status == 0
    rows = [line.split() for line in out.splitlines()]
    bits = {"q, k, v": "4.38", "output": "4.38", "gate, up": "4.75", "down": "4.38"}
    for kind, told in bits.items():
        (row,) = (row for row in rows if row[: len(kind.split())] == kind.split())
        assert row[len(kind.split())] == told
        assert row.count("%") == 3
    info = load_model(str(tmp_path / "out")).compressed.info
    assert f"{info.bits_per_decoder_weight:.2f} bits a weight of the layers" in out
    assert f"{info.bits_per_weight:.2f} of the whole model" in out
    command = err.splitlines()[-1].split()
    assert command == ["sparserve", "serve", "--model", str(tmp_path / "out")]
    status, out, _ = run_main(
        "generate", "rivers", *command[2:], "--max-tokens", "3", "--threads", "1"
    )
    assert status == 0
    assert out


def test_a_run_that_is_ended_says_how_it_goes_on_and_does(compress, text, monkeypatch, tmp_path):
    real = module._write_reports

    def interrupt(path, reports):
        real(path, reports)
        if len(reports) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "_write_reports", interrupt)
        status, _, err = compress()
    assert status != 0
    assert "the same command goes on where this one stopped" in words(err)
    assert not (tmp_path / "out").exists()
    status, _, err = compress()
    assert status == 0
    assert "going on after 2 of 3 layers" in err
    assert (tmp_path / "out").is_dir()


def test_what_was_left_of_something_else_is_told_to_be_dropped(
    compress, tiny, recipe, text, tmp_path
):
    def interrupt(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_folder(
            str(tiny), read_recipe("fast").model_copy(update={"quantizer": "rtn"}), [],
            tmp_path / "out", on_layer=interrupt,
        )  # fmt: skip
    status, _, err = compress()
    assert status == 0
    assert "beginning anew: what an earlier run left is of another" in words(err)


@pytest.mark.parametrize("name", ["quality", "balanced", "fast"])
def test_a_shipped_recipe_can_be_printed_and_followed(run_main, tmp_path, name):
    status, out, _ = run_main("compress", "--show-recipe", name)
    assert status == 0
    assert yaml.safe_load(out)["name"] == name
    (tmp_path / "own.yaml").write_text(out)
    assert read_recipe(str(tmp_path / "own.yaml")) == read_recipe(name)


def test_help_names_every_shipped_recipe_and_tells_of_the_text(run_main):
    status, out, _ = run_main("compress", "--help")
    assert status == 0
    for told in ("fast", "balanced", "quality", "--text", "--out", "needs --text"):
        assert told in words(out)


def test_a_text_that_nothing_needs_is_told(compress, recipe):
    recipe.write_text("name: rounded\nquantizer: rtn\n")
    status, _, err = compress()
    assert status == 0
    assert "warning: the recipe rounded needs no text" in words(err)


def test_the_model_may_come_from_the_environment_and_is_the_demo_model_else(
    run_main, tiny, tmp_path, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    _, shown, _ = run_main("compress", "--help")
    assert f"default: {DEMO_MODEL}" in words(shown)
    monkeypatch.setenv("SPARSERVE_MODEL", str(tiny))
    (tmp_path / "rounded.yaml").write_text("name: rounded\nquantizer: rtn\n")
    flags = ("--recipe", tmp_path / "rounded.yaml", "--out", tmp_path / "out")
    status, shown, _ = run_main("compress", *flags)
    assert status == 0
    assert "tiny by rounded" in shown


def test_errors_are_one_line_and_nothing_is_left(run_main, compress, tiny, text, tmp_path):
    (tmp_path / "wrong.yaml").write_text("name: wrong\nbits: 4\n")
    (tmp_path / "model.gguf").write_text("")
    cases = [
        (compress("--recipe", "best"), "there is no recipe 'best': expected quality, balanced, fast"),
        (compress("--recipe", tmp_path / "wrong.yaml"), "bits is no setting; there are name"),
        (compress("--recipe", "balanced"), "560 tokens, enough for 1 windows of 512; 24 were asked"),
        (compress("--text", "/nowhere"), "/nowhere cannot be read as UTF-8 text"),
        (compress("--out", tiny), f"{tiny} is there already"),
        (compress("--out", "."), ". is there already; remove it, or take another --out"),
        (compress("--out", tmp_path / (250 * "x")), "xxx.partial cannot be written"),
        (run_main("compress", tiny, "--out", tmp_path / "out"), "the recipe balanced needs a text"),
        (run_main("compress", tmp_path / "model.gguf", "--text", text, "--out", tmp_path / "out"),
         "does not start with the GGUF magic"),
        (run_main("compress", "/nowhere", "--text", text, "--out", tmp_path / "out"), "no model at"),
        (run_main("compress", "--show-recipe", "best"), "there are: quality, balanced, fast"),
    ]  # fmt: skip
    for (status, _, err), told in cases:
        assert status == 1
        assert err.startswith("error: ")
        assert told in words(err)
    assert not list(tmp_path.glob("out*"))


def test_eval_compares_what_it_compresses_with_the_original(
    run_main, tiny, text, recipe, tmp_path, monkeypatch
):
    monkeypatch.setenv("SPARSERVE_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "other.txt").write_text("Trains and ships and aeroplanes that travel far. " * 10)
    flags = ("--model", tiny, "--compress", recipe, "--compress-text", text, "--threads", "1",
             "--kv-cache-gib", "0.01", "--windows", "4", "--prompt-tokens", "40", "--decode-tokens", "8",
             "--formats", "auto,bfloat16", "--json", tmp_path / "rows.json")  # fmt: skip
    status, _, err = run_main("eval", text, *flags)
    assert status == 1
    assert f"the compressed model was calibrated on {text}" in words(err)
    status, _, _ = run_main("eval", tmp_path / "other.txt", *flags)
    assert status == 0
    compressed, exact = json.loads((tmp_path / "rows.json").read_text())
    assert compressed["format"] == "int4-g32 (attention g64, down g64, LM head int8)"
    assert compressed["kl"] > 100 * exact["kl"]


async def test_serve_compresses_what_it_loads_and_finds_it_the_next_time(
    spawn, serving, tiny, text, recipe, tmp_path
):
    """Also without the cache: then nothing is left when the server ends."""

    async def generate(port: int) -> tuple[str, str]:
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            info = await client.server_info()
            result = await client.generate("over green", temperature=0, max_tokens=12)
            return info.backend.dtype, result.text

    compress_folder(str(tiny), read_recipe(str(recipe)), [text], tmp_path / "made/tiny")
    model = load_model(str(tmp_path / "made/tiny"), dtype="bfloat16", layers_at_use=True)
    async with serving(model=model, backend="cpu") as server:
        expected = await generate(server.port)
    (tmp_path / "scratch").mkdir()
    environment = {
        "SPARSERVE_CACHE_DIR": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "scratch"),
    }  # fmt: skip
    flags = ("serve", "--model", tiny, "--compress", recipe, "--compress-text", text, *SERVER)
    compressed = []
    for more in ((), (), ("--no-compress-cache",)):
        served = await spawn(*flags, *more, env=environment)
        await served.ready()
        assert served.lines[-1].startswith("serving tiny on ")
        assert await generate(served.port) == expected
        served.signal(signal.SIGTERM)
        assert await served.ended() == 0
        compressed.append("compressing tiny by the recipe tested" in "\n".join(served.lines))
    assert compressed == [True, False, True]
    assert len(list(tmp_path.glob("cache/compressed/tiny-tested-*/compression.json"))) == 1
    assert not list((tmp_path / "scratch").glob("sparserve-*"))
