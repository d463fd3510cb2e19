"""Finished stages are kept, but only for the same inputs."""

import pytest
import torch

from sparserve.calibration.stages import Stages
from sparserve.errors import ConfigError


class Counted:
    def __init__(self):
        self.times = 0

    def __call__(self):
        self.times += 1
        return {"a": torch.tensor([1.5, float("inf")]), "b": torch.arange(3)}


def test_a_stage_runs_once_and_gives_the_same_after_a_restart(tmp_path):
    compute = Counted()
    for _ in range(2):
        stages = Stages(tmp_path / "part", {"text": "x"})
        for _ in range(2):
            found = stages.run("one", compute)
            assert torch.equal(found["a"], torch.tensor([1.5, float("inf")]))
            assert torch.equal(found["b"], torch.arange(3))
    assert compute.times == 1
    stages.run("one more", compute)
    assert compute.times == 2


@pytest.mark.parametrize("damage", ["inputs", "file"])
def test_results_of_other_inputs_or_a_damaged_file_count_as_none(tmp_path, damage):
    compute = Counted()
    Stages(tmp_path / "part", {"text": "x"}).run("one", compute)
    if damage == "file":
        (tmp_path / "part").write_bytes((tmp_path / "part").read_bytes()[:-3])
    Stages(tmp_path / "part", {"text": "y" if damage == "inputs" else "x"}).run("one", compute)
    assert compute.times == 2


def test_what_cannot_be_kept_is_told(tmp_path):
    stages = Stages(tmp_path / "none" / "part", {})
    with pytest.raises(ConfigError, match="cannot be written"):
        stages.run("one", Counted())
