"""A text, and calibrations of the tiny model on it."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from sparserve.calibration.pipeline import calibrate
from sparserve.calibration.plan import QUICK, CalibrationPlan, Effort
from sparserve.config import EngineSettings
from sparserve.model.loader import LoadedModel
from sparserve.sparsity.index import NeuronIndex

WORDS = [
    "the",
    "a",
    "of",
    "neuron",
    "layer",
    "weight",
    "sum",
    "is",
    "was",
    "big",
    "small",
    "green",
    "river",
    "stone",
    "bird",
    "sings",
    "over",
]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    generator = random.Random(0)
    path.write_text(" ".join(generator.choice(WORDS) for _ in range(1200)))
    return path


@pytest.fixture
def calibrated_to(tiny_model: LoadedModel, text_file: Path) -> Callable[..., NeuronIndex]:
    """`calibrated_to(out, model=…, on_progress=…, effort=…, **settings)`: a small calibration."""

    def run(
        out: Path,
        *,
        model: LoadedModel = tiny_model,
        on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
        effort: Effort = QUICK,
        prompt_tokens: int = 40,
        **settings: object,
    ) -> NeuronIndex:
        own = {"backend": "reference", "threads": 1, "kv_cache_gib": 0.01, **settings}
        plan = CalibrationPlan([text_file], out, 6, prompt_tokens, 12, effort)
        return calibrate(model, EngineSettings(**own), plan, on_progress)

    return run
