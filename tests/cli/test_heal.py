"""`sparserve heal`."""

import json

import pytest
import torch

from sparserve.cli.healing_display import curve
from sparserve.model.loader import load_model


@pytest.fixture
def heal(run_main, write_tiny_checkpoint, tmp_path):
    """`heal(…)` -> (exit status, stdout, stderr) of one that goes well without further flags."""
    tiny = write_tiny_checkpoint(tmp_path / "tiny", dtype=torch.bfloat16)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The {n}th fox jumps over {n * n} lazy dogs. " for n in range(60)))
    arguments = (
        "heal", tiny, "--text", text, "--out", tmp_path / "out", "--through", "core:0.4", "--device", "cpu",
        "--threads", "1", "--kv-cache-gib", "0.01", "--generate", "40", "--window", "32", "--batch", "4",
        "--tokens", "3072", "--evaluations", "3", "--rank", "8", "--learning-rate", "0.005",
    )  # fmt: skip
    return lambda *more: run_main(*arguments, *more)


def test_a_model_is_healed_and_served(heal, run_main, tmp_path):
    status, out, err = heal("--png", tmp_path / "curve.png")
    assert status == 0, err
    looks = json.loads((tmp_path / "out" / "healing.json").read_text())
    assert [own["step"] for own in looks] == [0, 8, 16, 24]
    told = " ".join(out.split())
    assert f"through core:0.4: {looks[0]['held_out']:.3g} before" in told
    assert f"step 8 of 24: KL held out {looks[1]['held_out']:.3f}" in " ".join(err.split())
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert load_model(str(tmp_path / "out")).config.down_bias
    status, out, err = run_main(
        "generate", "The", "--model", tmp_path / "out", "--max-tokens", "4", "--policy", "core",
        "--density", "0.4", "--threads", "1", "--kv-cache-gib", "0.01", "--temperature", "0",
    )  # fmt: skip
    assert status == 0, err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--tokens", "32"], "evaluations is 3, and 32 tokens are 1 steps of 4 x 32"),
        (["--through", "gate"], "policy 'gate' begins with 'gate'"),
        (["--through", "token:0.5"], "say which will be served, as in --dtype int8 --weight-planes"),
        (["--through", "token:0.2", "--dtype", "int8", "--weight-planes", "4+4"], "takes 0.35 of the bytes"),
        (["--learning-rate", "2"], "learning_rate: Input should be less than 1"),
        (["--original", "nowhere"], "no model at 'nowhere'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told(heal, tmp_path, flags, told):
    status, _, err = heal(*flags)
    assert status == 1
    assert told in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_a_dense_model_is_concentrated_and_kl_alone_is_told(heal, tmp_path):
    """Student and teacher are alike at first: there is no KL that the last one would be a part of."""
    status, out, err = heal(
        "--through", "dense", "--concentrate", "0.5", "--learning-rate", "0.001"
    )
    assert status == 0, err
    told = " ".join(out.split())
    assert "through dense: 0 before" in told
    assert " steps; the run ended" in told
    looks = json.loads((tmp_path / "out" / "healing.json").read_text())
    assert all(0 < own["training"] < 0.1 for own in looks[1:])
    assert looks[0]["objective"] == pytest.approx(0.5 * looks[0]["spread"])
    assert looks[0]["objective"] > 0.2  # which no step's KL has in it


def test_a_curve_is_bars():
    assert curve([8.0, 4.0, 2.0, 1.0]) == "█▄▂▁"
    assert len(curve([1.0] * 500, 32)) == 32
