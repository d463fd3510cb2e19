"""Healing from a model and a text to a folder that serves."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from sparserve.cli.healing_display import HealingDisplay
from sparserve.compression.healing import Heal
from sparserve.compression.recipe import parse_recipe
from sparserve.errors import ConfigError
from sparserve.healing import pipeline, training
from sparserve.healing.pipeline import LOOKS, heal
from sparserve.model.compress_folder import compress_folder
from sparserve.model.compressed_checkpoint import read_info
from sparserve.model.loader import load_model

PRUNED = """
name: pruned
attention: {bits: 16}
gate_up: {bits: 16}
down: {bits: 16}
lm_head: {bits: 16}
prune: {mlp: 0.4, heads: 0.3, restore: none}
calibration: {windows: 4, tokens: 64}
"""


class Stopped(Exception):
    pass


def changed(how: Heal, **changes: object) -> Heal:
    return Heal(**(how.model_dump() | changes))


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def test_a_pruned_model_comes_nearer_to_its_original(folder, text, few, settings, tmp_path):
    compress_folder(str(folder), parse_recipe(PRUNED, "pruned"), [text], tmp_path / "pruned")
    steps = []
    how = changed(few, through="dense")
    made = heal(
        str(tmp_path / "pruned"), how, [text], tmp_path / "healed", settings, on_step=steps.append
    )
    looks = made.healed.looks
    assert looks[0].step == 0
    assert made.healed.best.held_out < 0.9 * looks[0].held_out
    assert [own.step for own in steps] == list(range(how.steps + 1))
    info = read_info(tmp_path / "healed")
    before = read_info(tmp_path / "pruned")
    assert info.layer_sizes == before.layer_sizes
    assert info.source == before.source
    assert info.healing["through"] == "dense"
    assert info.healing["held_out_after"] == made.healed.best.held_out
    assert json.loads((tmp_path / "healed" / LOOKS).read_text())[0]["held_out"] == looks[0].held_out
    model = load_model(str(tmp_path / "healed"))
    assert model.config.down_bias
    assert model.config.num_parameters < load_model(str(folder)).config.num_parameters
    assert not list(tmp_path.glob("healed.*"))  # nothing of the run is left beside it


@pytest.mark.parametrize(
    ("through", "concentrate"), [("core:0.5", 0.0), ("token:0.6", 0.0), ("dense", 0.5)]
)
def test_a_run_that_was_interrupted_makes_the_same_bytes(
    folder, text, few, settings, tmp_path, through, concentrate
):
    few = changed(few, through=through, learning_rate=1e-3, concentrate=concentrate)
    settings = settings.model_copy(update={"dtype": "int8", "weight_planes": "4+4"})
    heal(str(folder), few, [text], tmp_path / "whole", settings)

    def stop(progress: training.Progress) -> None:
        if progress.step == 14:
            raise Stopped

    seen = []
    with pytest.raises(Stopped):
        heal(str(folder), few, [text], tmp_path / "again", settings, on_step=stop)
    heal(str(folder), few, [text], tmp_path / "again", settings, on_step=seen.append)
    assert seen[0].step == 13  # after the second look of four
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "whole")
    assert (tmp_path / "again" / LOOKS).read_bytes() == (tmp_path / "whole" / LOOKS).read_bytes()


@pytest.mark.parametrize(
    "change", ["seed", "kv_dtype", "backend", "tokenizer", "kv_dtype, nothing written"]
)
def test_what_another_run_left_is_not_gone_on_with(
    folder, text, few, settings, tmp_path, caplog, change
):
    def stop(progress: training.Progress) -> None:
        if progress.step == 7:
            raise Stopped

    if change.endswith("nothing written"):
        few = changed(few, generated=0)
    with pytest.raises(Stopped):
        heal(str(folder), few, [text], tmp_path / "out", settings, on_step=stop)
    if change == "seed":
        few = changed(few, seed=1)
    elif change == "tokenizer":
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["added_tokens"][-1]["content"] = "<other>"
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    else:
        own = {"backend": "reference"} if change == "backend" else {"kv_dtype": "int8"}
        settings = settings.model_copy(update=own)
    seen = []
    heal(str(folder), few, [text], tmp_path / "out", settings, on_step=seen.append)
    goes_on = change.endswith("nothing written")
    assert seen[0].step == (7 if goes_on else 0)
    assert ("beginning anew" in caplog.text) != goes_on
    if not goes_on:
        heal(str(folder), few, [text], tmp_path / "fresh", settings)
        assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "fresh")


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto is the CPU only without a GPU")
def test_a_run_goes_on_where_auto_is_the_device_that_was_named(
    folder, text, few, settings, tmp_path
):
    def stop(progress: training.Progress) -> None:
        if progress.step == 7:
            raise Stopped

    with pytest.raises(Stopped):
        heal(str(folder), few, [text], tmp_path / "out", settings, on_step=stop)
    seen, auto = [], settings.model_copy(update={"device": "auto"})
    heal(str(folder), few, [text], tmp_path / "out", auto, on_step=seen.append)
    assert seen[0].step == 7


def test_a_diverging_run_stops_and_keeps_the_best(
    folder, text, few, settings, tmp_path, monkeypatch
):
    compress_folder(str(folder), parse_recipe(PRUNED, "pruned"), [text], tmp_path / "pruned")
    how = changed(few, through="dense", evaluations=24, patience=24)
    rates = training._rate
    # From the eighth step on far too fast.
    monkeypatch.setattr(training, "_rate", lambda at, of: 500.0 if at >= 8 else rates(at, of))
    made = heal(str(tmp_path / "pruned"), how, [text], tmp_path / "healed", settings)
    assert made.healed.diverged
    assert 9 <= made.healed.steps < 16
    assert made.healed.best.step <= 9
    assert made.healed.best.held_out < made.healed.looks[0].held_out


def test_a_loss_that_is_no_number_ends_a_run(folder, text, few, settings, tmp_path, monkeypatch):
    compress_folder(str(folder), parse_recipe(PRUNED, "pruned"), [text], tmp_path / "pruned")
    how, display = changed(few, through="dense"), HealingDisplay()
    step = training._Run._step
    monkeypatch.setattr(
        training._Run, "_step", lambda run, at: math.nan if at == 9 else step(run, at)
    )
    made = heal(
        str(tmp_path / "pruned"), how, [text], tmp_path / "healed", settings, on_step=display.step
    )
    assert made.healed.diverged
    assert made.healed.steps == 10
    looks = json.loads((tmp_path / "healed" / LOOKS).read_text())
    assert looks[-1]["training"] is None


def test_a_run_without_progress_ends_early(folder, text, few, settings, tmp_path):
    how = changed(few, learning_rate=1e-12, evaluations=24, patience=2)
    with pytest.raises(ConfigError, match="no look at the held-out windows was better"):
        heal(str(folder), how, [text], tmp_path / "healed", settings)


def test_too_short_a_text_is_refused(folder, few, settings, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short")
    how = changed(few, generated=4)
    told = r"0 windows of 32, and 4 are generated; healing needs 32, of which 8 are held out"
    with pytest.raises(ConfigError, match=told):
        heal(str(folder), how, [short], tmp_path / "healed", settings)


def test_the_teacher_must_be_what_the_student_was_made_of(
    folder, write_tiny_checkpoint, text, few, settings, tmp_path
):
    compress_folder(str(folder), parse_recipe(PRUNED, "pruned"), [text], tmp_path / "pruned")
    write_tiny_checkpoint(folder, dtype=torch.bfloat16, seed=9)
    with pytest.raises(ConfigError, match=r"is no longer what it was at .*name it with --original"):
        heal(str(tmp_path / "pruned"), few, [text], tmp_path / "healed", settings)


def test_concentrating_makes_activations_less_spread(folder, text, few, settings, tmp_path):
    def spread_of(name: str) -> float:
        from sparserve.healing.stored import network_of
        from sparserve.healing.through import Through

        model = load_model(str(tmp_path / name), dtype="bfloat16", layers_at_use=True)
        through, network = Through(), network_of(model)
        through.begin(0, watch=True)
        network(torch.arange(64)[None], through)
        return float(through.spread().detach())

    heal(str(folder), few, [text], tmp_path / "plain", settings)
    heal(str(folder), changed(few, concentrate=10.0), [text], tmp_path / "concentrated", settings)
    assert spread_of("concentrated") < 0.998 * spread_of("plain")


def test_evaluations_beyond_steps_are_refused(few):
    with pytest.raises(
        ValueError, match="evaluations is 25, and 3072 tokens are 24 steps of 4 x 32"
    ):
        changed(few, evaluations=25)


def test_what_another_tokenizer_reads_is_no_teacher(
    folder, write_tiny_checkpoint, few, settings, tmp_path
):
    other = write_tiny_checkpoint(tmp_path / "other", dtype=torch.bfloat16)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["added_tokens"][-1]["content"] = "<other>"
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="have different tokenizers"):
        heal(str(folder), few, [], tmp_path / "healed", settings, original=str(other))


def test_a_named_original_teaches_and_what_it_writes_is_enough(
    folder, write_tiny_checkpoint, few, settings, tmp_path
):
    other = write_tiny_checkpoint(tmp_path / "other", dtype=torch.bfloat16, seed=4)
    how = changed(few, through="dense", generated=40)
    made = heal(str(folder), how, [], tmp_path / "healed", settings, original=str(other))
    assert made.healed.best.held_out < made.healed.looks[0].held_out
    assert made.info.healing["teacher_name"] == "other"
    # And once more, what was healed.
    again = heal(
        str(tmp_path / "healed"), changed(how, seed=1), [], tmp_path / "again", settings, original=str(other)
    )  # fmt: skip
    assert again.healed.looks[0].held_out < made.healed.looks[0].held_out
    assert again.info.added_biases == ("down",)


def test_windows_beyond_the_context_are_refused(folder, text, few, settings, tmp_path):
    with pytest.raises(ConfigError, match="windows of 1024 tokens exceed the context of tiny, 512"):
        heal(str(folder), changed(few, window=1024, tokens=10**6), [text], tmp_path / "o", settings)


@pytest.mark.parametrize("name", ["out.state", "out.written"])
def test_files_of_others_are_not_written_over(folder, text, few, settings, tmp_path, name):
    for content in (b"mine", save({"mine": torch.zeros(1)}, {"format": "pt"})):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=rf"{name} would be written over, and is not what"):
            heal(str(folder), few, [text], tmp_path / "out", settings)
        assert [path.name for path in tmp_path.glob("out*")] == [name]
        assert (tmp_path / name).read_bytes() == content


def test_a_model_that_lost_nothing_is_told(folder, text, few, settings, tmp_path, monkeypatch):
    how = changed(few, through="dense")
    with pytest.raises(ConfigError, match="through dense: there is nothing to heal"):
        heal(str(folder), how, [text], tmp_path / "out", settings, original=str(folder))
    # Its own teacher: known before that writes.
    monkeypatch.setattr(pipeline, "write_text", None)
    with pytest.raises(ConfigError, match="through dense: there is nothing to heal"):
        heal(str(folder), how, [text], tmp_path / "out", settings)
    assert [path.name for path in tmp_path.glob("out*")] == []


@pytest.mark.parametrize("weight", [math.nan, math.inf, 3e38])
def test_a_model_without_finite_logits_is_told(folder, text, few, settings, tmp_path, weight):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3] = weight
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        ConfigError, match=r"tiny has logits that are no finite numbers, through core"
    ):
        heal(str(folder), changed(few, generated=0), [text], tmp_path / "out", settings)
    assert [path.name for path in tmp_path.glob("out*")] == []


def test_what_cannot_be_written_is_told_before_anything_is_learned(
    folder, text, few, settings, tmp_path
):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("mine")
    steps = []
    with pytest.raises(ConfigError, match="no unfinished checkpoint; remove it"):
        heal(str(folder), few, [text], tmp_path / "out", settings, on_step=steps.append)
    assert not steps
    assert (tmp_path / "out.partial" / "mine.txt").read_text() == "mine"


def test_settings_that_make_another_model_are_refused(folder, text, few, settings, tmp_path):
    pruning = settings.model_copy(update={"prune": 0.2})
    with pytest.raises(ConfigError, match="make a folder by `sparserve compress`, and heal that"):
        heal(str(folder), few, [text], tmp_path / "out", pruning)
