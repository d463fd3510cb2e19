"""Models for peers, and a cache of the tests' own for their files."""

from pathlib import Path

import pytest

from sparserve.model.loader import LoadedModel, load_model


@pytest.fixture
def peer_model(mergeable_folder: Path) -> LoadedModel:
    """Tiny, with a tokenizer that llama.cpp has words for."""
    return load_model(str(mergeable_folder))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSERVE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"
