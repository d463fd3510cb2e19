"""What healing's tests share: a small model with weights in bfloat16, a text, and few steps."""

from pathlib import Path

import pytest
import torch

from sparserve.compression.healing import Heal
from sparserve.config import EngineSettings
from sparserve.model.loader import LoadedModel, load_model


@pytest.fixture
def folder(write_tiny_checkpoint, tmp_path) -> Path:
    return write_tiny_checkpoint(tmp_path / "tiny", dtype=torch.bfloat16)


@pytest.fixture
def model(folder) -> LoadedModel:
    return load_model(str(folder), dtype="bfloat16", layers_at_use=True)


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"The {n}th fox jumps over {n * n} lazy dogs. " for n in range(60)))
    return path


@pytest.fixture
def settings(folder) -> EngineSettings:
    return EngineSettings(model=str(folder), device="cpu", threads=1, kv_cache_gib=0.01)


@pytest.fixture
def few() -> Heal:
    """Steps, windows and ranks."""
    return Heal(
        through="core:0.5", tokens=24 * 4 * 32, window=32, batch=4, generated=24, held_out=8, rank=8,
        evaluations=4, learning_rate=5e-3,
    )  # fmt: skip
