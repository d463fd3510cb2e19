"""Hub ids: what the Hugging Face cache holds is found, and nothing is asked of a network."""

import shutil
import socket
from pathlib import Path

import pytest
from huggingface_hub import constants

from sparserve.errors import ModelNotFound
from sparserve.model.hub import cached_model
from sparserve.model.loader import load_model


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty hub cache, on a machine whose network must not be tried."""

    def refuse(*args: object) -> None:
        raise AssertionError("the network was tried")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tmp_path / "hub"


def snapshot(cache: Path, revision: str = "main", commit: str = "0" * 40) -> Path:
    """The folder of org/toy at a revision, as huggingface_hub lays its cache out."""
    repo = cache / "models--org--toy"
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "refs" / revision).write_text(commit)
    folder = repo / "snapshots" / commit
    folder.mkdir(parents=True)
    return folder


def test_a_safetensors_model_loads_by_its_id(cache, tiny_folder):
    shutil.copytree(tiny_folder, snapshot(cache), dirs_exist_ok=True)
    model = load_model("org/toy")
    assert model.name == "org/toy"
    assert model.config.vocab_size == 259


def test_a_model_that_is_one_gguf_file_loads_by_its_id(cache, write_gguf):
    write_gguf(snapshot(cache) / "toy.Q8_0.gguf")
    model = load_model("org/toy")
    assert model.name == "org/toy"
    assert model.config.vocab_size == 262


def test_several_gguf_files_are_named(cache, write_gguf):
    folder = snapshot(cache)
    for name in ("a.gguf", "b.gguf"):
        write_gguf(folder / name)
    with pytest.raises(ModelNotFound, match=r"2 GGUF files.*a\.gguf, b\.gguf"):
        load_model("org/toy")
    assert load_model(str(folder / "b.gguf")).name == "b"


def test_a_revision_is_another_snapshot(cache, write_gguf):
    write_gguf(snapshot(cache) / "toy.gguf")
    folder = snapshot(cache, "v2", "1" * 40)
    write_gguf(folder / "toy.gguf")
    assert cached_model("org/toy@v2") == folder / "toy.gguf"
    assert cached_model(f"org/toy@{'1' * 40}") == folder / "toy.gguf"
    assert cached_model("org/toy") != folder / "toy.gguf"
    assert load_model("org/toy@v2").name == "org/toy@v2"


def test_a_model_that_is_not_there_is_told_with_the_way_to_get_it(cache):
    with pytest.raises(ModelNotFound, match=rf"{cache}.*`hf download org/other`"):
        load_model("org/other")
    snapshot(cache)
    with pytest.raises(ModelNotFound, match="`hf download org/toy --revision v9`"):
        load_model("org/toy@v9")


def test_a_folder_here_comes_before_the_cache(
    cache, tiny_folder, write_gguf, tmp_path, monkeypatch
):
    write_gguf(snapshot(cache) / "toy.gguf")
    shutil.copytree(tiny_folder, tmp_path / "org" / "toy")
    monkeypatch.chdir(tmp_path)
    model = load_model("org/toy")
    assert (model.name, model.config.vocab_size) == ("toy", 259)


@pytest.mark.parametrize("text", ["toy", "a/b/c", "/org/toy", "org/", "org/to y", "-org/a..b", ""])
def test_other_text_is_no_hub_id(text):
    assert cached_model(text) is None
    with pytest.raises(ModelNotFound, match=r"no model at .*Hugging Face cache.*smollm2"):
        load_model(f"{text}?")
