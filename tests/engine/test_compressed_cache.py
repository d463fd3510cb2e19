"""Models compressed when they are loaded: as the folder would be, made once, and anew for whatever is new."""

import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparserve.compression.recipe import Recipe, read_recipe
from sparserve.config import EngineSettings
from sparserve.engine import compressed_cache
from sparserve.engine.factory import build_engine, load_by_settings
from sparserve.engine.formats import with_dtype
from sparserve.errors import ConfigError, CorruptCheckpoint, ModelNotFound, UnsupportedModel
from sparserve.model import identity
from sparserve.model.compress_folder import compress_folder

RECIPE = "name: tested\nattention: {bits: 8}\ncalibration: {windows: 4, tokens: 64}\n"
ROUNDED = "name: rounded\nquantizer: rtn\n"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SPARSERVE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache/compressed"


@pytest.fixture
def source(write_tiny_checkpoint, tmp_path) -> Path:
    return write_tiny_checkpoint(tmp_path / "tiny", dtype=torch.bfloat16)


@pytest.fixture
def settings(source, cache, tmp_path) -> EngineSettings:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "text.txt").write_text("rivers and stones and birds that sing. " * 10)
    return EngineSettings(
        model=str(source),
        compress=str(tmp_path / "recipe.yaml"),
        compress_text=str(tmp_path / "text.txt"),
        kv_cache_gib=0.01,
        threads=1,
    )


@pytest.fixture
def runs(monkeypatch) -> list[Path]:
    """Where models were compressed to."""
    made = []

    def counted(model, recipe, texts, out, **told):
        made.append(out)
        return compress_folder(model, recipe, texts, out, **told)

    monkeypatch.setattr(compressed_cache, "compress_folder", counted)
    return made


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_the_second_load_finds_what_the_first_one_made(settings, runs, cache, tmp_path):
    told = []
    first = load_by_settings(settings, on_download=lambda *step: told.append(step))
    assert told == [("compressing layers", done, 2) for done in range(3)]
    again = load_by_settings(settings, on_download=lambda *step: told.append(step))
    assert len(told) == 3
    assert runs == [first.path] == [again.path]
    assert first.path.parent == cache
    assert first.name == again.name == "tiny"
    recipe = read_recipe(settings.compress)
    compress_folder(settings.model, recipe, settings.compress_texts, tmp_path / "out")
    assert weights(first.path) == weights(tmp_path / "out")


def test_a_gguf_file_has_its_folder_too(settings, cache, demo_bfloat16, monkeypatch):
    made = []
    monkeypatch.setattr(
        compressed_cache,
        "compress_folder",
        lambda model, recipe, texts, out, **told: made.append((model, out)),
    )
    path = demo_bfloat16.path
    own = settings.model_copy(update={"model": str(path)})
    name, folder = compressed_cache.compressed_folder(own, lambda *step: None)
    assert made == [(str(path), folder)]
    assert name == path.stem
    assert folder.name.startswith(f"{name}-tested-")
    assert folder.parent == cache


def test_it_is_served_in_the_formats_of_the_recipe(settings):
    built = build_engine(settings)
    assert built.model_name == "tiny"
    assert built.engine.backend.info.dtype == "int4 (attention int8, LM head int8)"


def change_weights(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, source / "model.safetensors")


@pytest.mark.parametrize("changed", ["weights", "chat template", "text", "recipe"])
def test_what_was_made_of_something_else_is_not_served(settings, source, runs, tmp_path, changed):
    before = load_by_settings(settings)
    if changed == "weights":
        change_weights(source)
    elif changed == "chat template":
        (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    elif changed == "text":
        (tmp_path / "text.txt").write_text("Birds that sing over green hills and rivers. " * 10)
    else:
        (tmp_path / "recipe.yaml").write_text(RECIPE + "act_order: false\n")
    after = load_by_settings(settings)
    assert runs == [before.path, after.path]
    assert before.path != after.path
    if changed == "weights":
        assert torch.equal(after.weights.norm, 2 * before.weights.norm)
    if changed == "chat template":
        assert after.chat_template == "{{ messages[0].content }}"


def test_an_interrupted_load_goes_on(settings, runs, cache):
    def interrupt(what: str, done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_by_settings(settings, on_download=interrupt)
    told = []
    load_by_settings(settings, on_download=lambda what, done, total: told.append(done))
    assert told == [1, 2]


def test_servers_that_start_together_compress_once(settings, runs):
    with ThreadPoolExecutor(3) as pool:
        models = list(pool.map(lambda _: load_by_settings(settings), range(3)))
    assert len(runs) == 1
    assert {model.path for model in models} == set(runs)


def test_who_waits_for_another_process_says_so(settings, runs, caplog):
    caplog.set_level(logging.INFO, "sparserve")
    path = load_by_settings(settings).path
    with ThreadPoolExecutor(1) as pool:
        with compressed_cache._alone_with(path):
            waiting = pool.submit(load_by_settings, settings)
            give_up = time.monotonic() + 60
            while f"another process uses {path}: waiting for it" not in caplog.text:
                assert time.monotonic() < give_up
                time.sleep(0.01)
            assert not waiting.done()
        assert waiting.result().path == path
    assert runs == [path]


def test_without_the_cache_nothing_is_kept(settings, runs, cache, tmp_path, monkeypatch):
    at_exit = []
    monkeypatch.setattr(
        compressed_cache.atexit, "register", lambda *call, **how: at_exit.append((call, how))
    )
    monkeypatch.setattr(compressed_cache.tempfile, "tempdir", str(tmp_path))
    model = load_by_settings(settings.model_copy(update={"compress_cache": False}))
    assert not cache.exists()
    assert runs == [model.path]
    assert [layer.q.bits for layer in model.compressed.layers] == [8, 8]
    ((remove, *arguments), how) = at_exit[0]
    remove(*arguments, **how)
    assert not list(tmp_path.glob("sparserve-*"))


def test_the_original_of_an_evaluation_is_not_compressed(settings, runs):
    """And other formats are of the original's weights."""
    for dtype in ("float32", "bfloat16"):
        model = load_by_settings(with_dtype(settings, dtype))
        assert model.compressed is None
    assert with_dtype(settings, "auto") == settings
    assert not runs


def test_a_source_that_changed_since_is_told_and_a_younger_copy_is_not(
    settings, source, tmp_path, caplog
):
    compress_folder(
        settings.model, read_recipe(settings.compress), settings.compress_texts, tmp_path / "out"
    )
    served = EngineSettings(model=str(tmp_path / "out"))

    def warnings() -> list[str]:
        caplog.clear()
        load_by_settings(served)
        return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]

    future = time.time() + 60
    os.utime(source / "model.safetensors", (future, future))
    assert warnings() == []
    change_weights(source)
    os.utime(source / "model.safetensors", (future, future))
    (told,) = warnings()
    assert told.startswith(f"{source} has changed since: {tmp_path / 'out'} is what it was before")
    (source / "model.safetensors").unlink()
    (source / "config.json").unlink()
    assert warnings() == []


def test_a_damaged_folder_of_the_cache_is_named(settings):
    path = load_by_settings(settings).path
    (path / "layers/00001.safetensors").unlink()
    with pytest.raises(CorruptCheckpoint, match=str(path)):
        load_by_settings(settings)


@pytest.mark.parametrize(
    ("changes", "kind", "told"),
    [
        ({"compress_text": ""}, ConfigError, "give one .* --compress-text"),
        ({"compress_text": "/nowhere"}, ConfigError, "/nowhere cannot be read"),
        ({"compress": "best"}, ConfigError, "no recipe 'best': expected quality, balanced, fast"),
        (
            {"compress": ""},
            ConfigError,
            "nothing is compressed; name a recipe with --compress, or give --prune",
        ),
        ({"compress": "balanced"}, ConfigError, "390 tokens, enough for 0 windows of 512"),
        ({"backend": "reference"}, ConfigError, "only the cpu backend .*: the settings ask for it"),
        ({"device_map": "auto"}, ConfigError, "only the cpu backend .*: device_map is 'auto'"),
        ({"model": "/nowhere"}, ModelNotFound, "no model at '/nowhere'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_told_with_the_way_out(settings, changes, kind, told):
    with pytest.raises(kind, match=told):
        load_by_settings(settings.model_copy(update=changes))


def test_a_folder_that_is_compressed_is_not_compressed_again(settings, source, tmp_path):
    (tmp_path / "rounded.yaml").write_text(ROUNDED)
    compress_folder(str(source), read_recipe(str(tmp_path / "rounded.yaml")), [], tmp_path / "out")
    for keep in (True, False):
        own = {"model": str(tmp_path / "out"), "compress_cache": keep}
        with pytest.raises(UnsupportedModel, match=f"compressed already, from {source}"):
            load_by_settings(settings.model_copy(update=own))


def test_a_cache_that_cannot_be_written_is_told_with_the_way_out(settings, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSERVE_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"set SPARSERVE_CACHE_DIR .* --no-compress-cache"):
        load_by_settings(settings)


@pytest.mark.parametrize("path", ["a\0b", "pipe", 5000 * "x"])
def test_a_source_that_is_no_file_any_more_is_not_read(
    settings, source, tmp_path, monkeypatch, path
):
    """What a folder says of its source comes from outside: reading a pipe would never end."""
    out = tmp_path / "out"
    compress_folder(str(source), Recipe(name="rounded", quantizer="rtn"), [], out)
    os.mkfifo(tmp_path / "pipe")
    future = time.time() + 60
    os.utime(tmp_path / "pipe", (future, future))
    info = json.loads((out / "compression.json").read_text())
    info["source"]["path"] = str(tmp_path / path) if path == "pipe" else path
    (out / "compression.json").write_text(json.dumps(info))
    monkeypatch.setattr(identity, "hash_of_files", lambda path: pytest.fail(f"{path} is read"))
    assert load_by_settings(EngineSettings(model=str(out))).compressed is not None


def test_a_model_is_pruned_when_it_is_loaded(settings, runs):
    whole = load_by_settings(settings.model_copy(update={"compress": "", "compress_text": ""}))
    Path(settings.compress_text).write_text("rivers and stones and birds that sing. " * 500)
    pruned = {"compress": "", "prune_mlp": 0.25}
    for backend in ("reference", "cpu"):
        model = load_by_settings(settings.model_copy(update={**pruned, "backend": backend}))
        neurons = [own.intermediate_size for own in model.config.layers]
        assert sum(neurons) == pytest.approx(0.75 * whole.config.num_neurons, abs=1)
        assert model.rounded is None
    assert len(runs) == 1  # for both
    with_recipe = load_by_settings(settings.model_copy(update={"prune_mlp": 0.25}))
    assert with_recipe.rounded is not None
    assert with_recipe.config.num_neurons == sum(neurons)
    refused = {**pruned, "compress_text": ""}
    with pytest.raises(ConfigError, match=r"the recipe none needs a text"):
        load_by_settings(settings.model_copy(update=refused))
