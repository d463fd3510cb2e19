"""Recipes of several steps, and what is made of folders that were pruned or healed."""

import json
import shutil

import pytest
import torch

from sparserve.compression.recipe import Recipe, parse_recipe, read_pruning
from sparserve.engine.factory import build_engine
from sparserve.errors import ConfigError, UnsupportedModel
from sparserve.healing import steps
from sparserve.healing.steps import follow, index_of
from sparserve.model.compress_folder import compress_folder
from sparserve.model.compressed_checkpoint import read_info
from sparserve.model.identity import hash_of_files
from sparserve.model.loader import load_model

HEAL = """
heal:
  {through: "%s", tokens: 1024, window: 32, batch: 4, generated: 24, held_out: 8, evaluations: 2, rank: 8,
   learning_rate: 0.001, after_rounding: %s}
"""
INT4 = """
compensate: lorc
quantizer: rtn
act_order: false
attention: {bits: 4, group_size: 32, rank: 32}
gate_up: {bits: 4, group_size: 32, rank: 32}
down: {bits: 4, group_size: 32, rank: 32}
"""
PRUNE = "prune: {mlp: 0.3, restore: none}\ncalibration: {windows: 4, tokens: 64}\n"
CALIBRATE = "calibrate: {windows: 2, prompt_tokens: 24, decode_tokens: 8, quick: true}\n"


def recipe(*parts: str) -> Recipe:
    return parse_recipe("name: steps\n" + "".join(parts), "steps")


def test_all_steps_one_after_another(folder, text, settings, tmp_path):
    out = tmp_path / "out"
    own = recipe(PRUNE, HEAL % ("core:0.5", "false"), INT4, CALIBRATE)
    made = follow(str(folder), own, [text], out, settings)
    info = read_info(out)
    assert info.formats.gate_up.bits == 4
    assert {own.intermediate_size for own in info.layer_sizes} == {67}
    assert info.added_biases == ("down",)
    assert info.healing["through"] == "core:0.5"
    assert info.source.hash == hash_of_files(folder)
    assert [before["name"] for before in info.earlier] == ["steps"]
    assert info.earlier[0]["prune"]["mlp"] == 0.3
    assert made.index == index_of(out)
    assert made.index.is_file()
    assert not (tmp_path / "out.steps").exists()
    changes = {"model": str(out), "index": str(made.index), "default_policy": "token"}
    engine = build_engine(settings.model_copy(update=changes)).engine
    assert engine.backend.config.down_bias


def test_steps_that_are_finished_are_not_done_again(folder, text, settings, tmp_path, monkeypatch):
    own, out = recipe(PRUNE, HEAL % ("dense", "false"), INT4), tmp_path / "out"
    compress = steps.compress_folder

    def stopped(model, recipe, *arguments, **named):
        if recipe.rounds:
            raise KeyboardInterrupt
        return compress(model, recipe, *arguments, **named)

    monkeypatch.setattr(steps, "compress_folder", stopped)
    with pytest.raises(KeyboardInterrupt):
        follow(str(folder), own, [text], out, settings)
    monkeypatch.undo()
    again = follow(str(folder), own, [text], out, settings)
    assert again.pruned is None
    assert again.healed is None
    assert again.rounded is not None


def test_what_another_recipe_left_is_forgotten(folder, text, settings, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def stopped(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "heal", stopped)
    with pytest.raises(KeyboardInterrupt):
        follow(str(folder), recipe(PRUNE, HEAL % ("dense", "false")), [text], out, settings)
    monkeypatch.undo()
    other = recipe(PRUNE.replace("0.3", "0.5"), HEAL % ("dense", "false"))
    made = follow(str(folder), other, [text], out, settings)
    assert made.pruned is not None
    assert {own.intermediate_size for own in read_info(out).layer_sizes} == {48}


def follow_to(step: str, monkeypatch, *arguments) -> None:
    """A run that is interrupted when this step begins."""

    def stopped(*arguments, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(steps, step, stopped)
        with pytest.raises(KeyboardInterrupt):
            follow(*arguments)


def test_what_comes_to_be_at_out_is_not_taken_for_its_own_result(
    folder, text, settings, tmp_path, monkeypatch
):
    own, out = recipe(PRUNE, HEAL % ("dense", "false")), tmp_path / "out"
    follow_to("heal", monkeypatch, str(folder), own, [text], out, settings)
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="out is there already"):
        follow(str(folder), own, [text], out, settings)
    assert (out / "mine.txt").read_text() == "mine"
    (out / "mine.txt").unlink()
    out.rmdir()
    assert follow(str(folder), own, [text], out, settings).pruned is None


def test_what_takes_the_place_of_its_own_result_is_not_taken_for_it(
    folder, text, settings, tmp_path, monkeypatch
):
    own, out = recipe(INT4, CALIBRATE), tmp_path / "out"
    follow_to("calibrate", monkeypatch, str(folder), own, [text], out, settings)
    out.rename(tmp_path / "kept")
    compress_folder(str(folder), recipe(INT4, "value_bits: 2\n"), [], out)
    with pytest.raises(ConfigError, match="out is there already"):
        follow(str(folder), own, [text], out, settings)


def test_steps_of_another_tokenizer_are_not_gone_on_with(
    folder, text, settings, tmp_path, monkeypatch
):
    own, out = recipe(PRUNE, HEAL % ("dense", "false")), tmp_path / "out"
    follow_to("heal", monkeypatch, str(folder), own, [text], out, settings)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"][-1]["content"] = "<other>"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert follow(str(folder), own, [text], out, settings).pruned is not None


def test_a_later_section_that_is_corrected_leaves_earlier_steps_as_they_are(
    folder, text, settings, tmp_path, monkeypatch
):
    parts, out = (PRUNE, HEAL % ("core:0.5", "false")), tmp_path / "out"
    coarse = INT4 + "value_bits: 2\n"
    times = []
    for rounding in (INT4, coarse):
        shutil.rmtree(out, ignore_errors=True)
        own = recipe(*parts, rounding, CALIBRATE)
        follow_to("calibrate", monkeypatch, str(folder), own, [text], out, settings)
        earlier = [tmp_path / "out.steps" / name for name in ("pruned", "healed")]
        times.append([path.stat().st_mtime_ns for path in earlier])
    assert times[0] == times[1]
    assert read_info(out).recipe["value_bits"] == 2
    fewer = CALIBRATE.replace("decode_tokens: 8", "decode_tokens: 4")
    made = follow(str(folder), recipe(*parts, coarse, fewer), [text], out, settings)
    assert (made.pruned, made.healed, made.rounded) == (None, None, None)
    assert made.index.is_file()


def test_healing_after_rounding_keeps_the_integers(folder, text, settings, tmp_path):
    coarse = INT4 + "value_bits: 2\n"
    own = recipe(coarse, HEAL % ("dense", "true"))
    made = follow(str(folder), own, [text], tmp_path / "out", settings)
    compress_folder(str(folder), recipe(coarse), [], tmp_path / "rounded")
    healed, rounded = (
        load_model(str(tmp_path / name), layers_at_use=True).compressed
        for name in ("out", "rounded")
    )
    assert made.healed.healed.best.held_out < made.healed.healed.looks[0].held_out
    for one, other in zip(healed.layers, rounded.layers, strict=True):
        assert torch.equal(one.gate.codes, other.gate.codes)
        assert not torch.equal(one.gate.factors.codes, other.gate.factors.codes)


def test_what_was_only_pruned_serves_in_any_format(folder, text, settings, tmp_path):
    own = read_pruning("none", ratio=0.1).model_copy(
        update={"calibration": recipe(PRUNE).calibration}
    )
    compress_folder(str(folder), own, [text], tmp_path / "pruned")
    for dtype in ("bfloat16", "int8"):
        changes = {"model": str(tmp_path / "pruned"), "dtype": dtype}
        engine = build_engine(settings.model_copy(update=changes)).engine
        assert engine.backend.info.dtype.startswith(dtype)
    compress_folder(str(tmp_path / "pruned"), recipe(INT4), [], tmp_path / "small")
    assert read_info(tmp_path / "small").layer_sizes == read_info(tmp_path / "pruned").layer_sizes
    with pytest.raises(UnsupportedModel, match="compressed already"):
        compress_folder(str(tmp_path / "small"), recipe(INT4), [], tmp_path / "again")


def test_steps_are_not_for_loading(folder, text, settings):
    changes = {"compress": "", "model": str(folder)}
    path = text.with_name("steps.yaml")
    path.write_text("name: steps\n" + INT4 + HEAL % ("dense", "false"))
    changes |= {"compress": str(path), "compress_text": str(text), "compress_cache": False}
    with pytest.raises(
        ConfigError, match=r"the recipe steps heals, which takes long: follow it once"
    ):
        build_engine(settings.model_copy(update=changes))


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ((PRUNE, HEAL % ("dense", "false"), INT4, CALIBRATE.replace("2", "4096", 1)),
         r"4096 were asked for: give more text, or lower calibrate.windows, calibrate.prompt_tokens or"),
        ((PRUNE, HEAL.replace("held_out: 8", "held_out: 4096") % ("dense", "false")), "healing needs 16384"),
        ((HEAL % ("core:0.5", "false"), "attention: {bits: 4}\ncalibration: {windows: 4096}\n"),
         "lower calibration.windows or calibration.tokens of the recipe"),
        ((PRUNE, HEAL % ("dense", "false"), INT4.replace("rank: 32", "rank: 512")), "rank of the recipe steps is 512"),
        ((HEAL % ("dense", "true"),), "heal.after_rounding is true, and the recipe steps rounds and prunes nothing"),
        ((PRUNE, HEAL % ("token:0.5", "false"), INT4), "in a recipe gate_up with low_bits"),
    ],
)  # fmt: skip
def test_steps_that_do_not_fit_are_refused_before_the_first_one(
    folder, text, settings, tmp_path, parts, told
):
    sixteen = "".join(
        f"{name}: {{bits: 16}}\n" for name in ("attention", "gate_up", "down", "lm_head")
    )
    own = recipe(*parts, "" if "bits: 4" in "".join(parts) else sixteen)
    with pytest.raises(ConfigError, match=told):
        follow(str(folder), own, [text], tmp_path / "out", settings)
    assert [path.name for path in tmp_path.glob("out*")] == []


def test_where_the_last_step_cannot_write_is_told_before_the_first_one(
    folder, text, settings, tmp_path
):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("mine")
    own = recipe(PRUNE, HEAL % ("dense", "false"), INT4)
    with pytest.raises(ConfigError, match="no unfinished checkpoint; remove it"):
        follow(str(folder), own, [text], tmp_path / "out", settings)
    assert [path.name for path in tmp_path.glob("out*")] == ["out.partial"]


def test_the_recipe_none_must_prune():
    with pytest.raises(ConfigError, match="the recipe none rounds nothing, and nothing is pruned"):
        read_pruning("none")


def test_what_is_there_already_is_not_taken_for_a_step(folder, text, settings, tmp_path):
    own, out = recipe(INT4, CALIBRATE), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="out is there already"):
        follow(str(folder), own, [text], out, settings)
    out.rename(tmp_path / "out.steps")
    with pytest.raises(
        ConfigError, match=r"out\.steps is there, and is not of an unfinished recipe"
    ):
        follow(str(folder), own, [text], out, settings)
    assert (tmp_path / "out.steps" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ((PRUNE, HEAL % ("dense", "false"), INT4), "the recipe steps needs a text"),
        ((INT4, CALIBRATE), "the recipe steps calibrates, which needs a text"),
    ],
)
def test_a_missing_text_is_told_at_once(folder, settings, tmp_path, parts, told):
    with pytest.raises(ConfigError, match=told):
        follow(str(folder), recipe(*parts), [], tmp_path / "out", settings)
    assert [path.name for path in tmp_path.glob("out*")] == []


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        ((INT4, HEAL % ("dense", "true")), "out.state"),
        ((INT4, HEAL % ("dense", "true")), "out.written"),
        ((INT4, CALIBRATE), "out.index.safetensors"),
        ((INT4, CALIBRATE), "out.index.safetensors.partial"),
    ],
)
def test_files_of_others_beside_it_are_not_written_over(
    folder, text, settings, tmp_path, parts, name
):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=rf"{name} would be written over, and is not what"):
        follow(str(folder), recipe(*parts), [text], tmp_path / "out", settings)
    assert [path.name for path in tmp_path.glob("out*")] == [name]
    assert (tmp_path / name).read_text() == "mine"
