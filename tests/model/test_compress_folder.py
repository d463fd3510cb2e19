"""A model compressed into a folder: the parts joined, resumed, refused."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from sparserve.compression.recipe import Recipe
from sparserve.compression.sections import Prune
from sparserve.errors import ConfigError, UnsupportedModel
from sparserve.model.compress_folder import compress_folder
from sparserve.model.compressing import compress_layers, compress_lm_head
from sparserve.model.loader import load_model
from sparserve.model.mixed import allocate
from sparserve.model.text import read_windows

LAYERS = 4
PART = {"group_size": 32, "rank": 32}
RECIPE = Recipe.model_validate(
    {
        "name": "tested", "compensate": "qera", "attention": PART, "gate_up": PART, "down": PART,
        "calibration": {"windows": 4, "tokens": 64},
    }
)  # fmt: skip
ROUNDED = Recipe(name="rounded", quantizer="rtn")


@pytest.fixture(scope="module")
def source(write_tiny_checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "tiny"
    return write_tiny_checkpoint(folder, dtype=torch.bfloat16, num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("rivers and stones and birds that sing over green hills. " * 10)
    return path


@pytest.fixture(scope="module")
def whole(source, text, tmp_path_factory):
    """(a folder that was made in one go, what was told of it)"""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, compress_folder(str(source), RECIPE, [text], out)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_folder_holds_what_the_recipe_makes_of_each_matrix(source, text, whole):
    out, made = whole
    original = load_model(str(source), dtype="bfloat16", layers_at_use=True)
    windows = read_windows(original, [text], 4, 64)
    model = load_model(str(out), dtype="bfloat16", layers_at_use=True)
    layers = list(compress_layers(original, RECIPE, windows.token_ids))
    for layer, stored in zip(layers, model.compressed.layers, strict=True):
        assert torch.equal(layer.tensors.q.codes, stored.q.codes)
        assert torch.equal(layer.tensors.down.factors.codes, stored.down.factors.codes)
        assert torch.equal(layer.tensors.gate_up_basis, stored.gate_up_basis)
    head = compress_lm_head(original, RECIPE)
    assert torch.equal(model.compressed.ends.lm_head.codes, head.codes)
    assert [list(own) for own in made.reports] == [layer.reports for layer in layers]


def test_the_folder_says_how_it_was_made(source, text, whole):
    out, made = whole
    told = json.loads((out / "compression.json").read_text())
    assert Recipe.model_validate(told["recipe"]) == RECIPE
    assert told["texts"] == [hashlib.blake2b(text.read_bytes(), digest_size=32).hexdigest()]
    assert told["source"]["path"] == str(source)
    assert told["bits_per_decoder_weight"] == made.info.bits_per_decoder_weight > 4
    reports = json.loads((out / "reports.json").read_text())
    assert reports == [[asdict(report) for report in layer] for layer in made.reports]
    assert made.seconds > 0


def interrupt(source: Path, text: Path, out: Path, after: int, recipe: Recipe = RECIPE) -> None:
    def on_layer(done: int, total: int) -> None:
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_folder(str(source), recipe, [text], out, on_layer=on_layer)
    assert not out.exists()


def steps(source: Path, text: Path, out: Path) -> list[int]:
    """The layers that were finished whenever a run told of them."""
    told = []
    compress_folder(
        str(source), RECIPE, [text], out, on_layer=lambda done, total: told.append((done, total))
    )
    assert {total for _, total in told} == {LAYERS}
    return [done for done, _ in told]


@pytest.mark.parametrize("after", [0, 1, 3, LAYERS])
def test_an_interrupted_run_goes_on_to_the_same_bytes(source, text, whole, tmp_path, after):
    interrupt(source, text, tmp_path / "out", after)
    assert steps(source, text, tmp_path / "out") == list(range(after, LAYERS + 1))
    assert contents(tmp_path / "out") == contents(whole[0])


def test_layers_without_their_reports_are_made_again(source, text, whole, tmp_path):
    interrupt(source, text, tmp_path / "out", 3)
    reports = tmp_path / "out.partial/reports.json"
    reports.write_text(reports.read_text()[:-10])
    assert steps(source, text, tmp_path / "out") == list(range(LAYERS + 1))
    assert contents(tmp_path / "out") == contents(whole[0])


@pytest.mark.parametrize("changed", ["source", "text", "recipe"])
def test_layers_of_another_source_text_or_recipe_are_not_gone_on_with(
    source, text, whole, write_tiny_checkpoint, tmp_path, changed
):
    others = [source, text, RECIPE]
    if changed == "source":
        others[0] = write_tiny_checkpoint(
            tmp_path / "tiny", dtype=torch.bfloat16, num_hidden_layers=LAYERS, seed=1
        )
    elif changed == "text":
        others[1] = tmp_path / "other.txt"
        others[1].write_text(text.read_text()[::-1])
    else:
        others[2] = RECIPE.model_copy(update={"act_order": False})
    interrupt(*others[:2], tmp_path / "out", 2, others[2])
    assert steps(source, text, tmp_path / "out") == list(range(LAYERS + 1))
    assert contents(tmp_path / "out") == contents(whole[0])


def test_formats_that_a_recipe_lets_be_chosen(source, text, tmp_path):
    """What the folder is made of is the recipe with them filled in, what it says of itself the recipe as given."""
    mixed = Recipe.model_validate(
        {
            "name": "mixed", "mixed": {"target_bits": 6}, "calibration": {"windows": 4, "tokens": 64},
        }
    )  # fmt: skip
    steps = []
    made = compress_folder(
        str(source), mixed, [text], tmp_path / "out",
        on_choice=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert steps
    assert steps[-1][0] == steps[-1][1]
    assert made.predicted_kl > 0
    assert 5 < made.info.bits_per_decoder_weight <= 6
    assert Recipe.model_validate_json(json.dumps(made.info.recipe)) == mixed
    original = load_model(str(source), dtype="bfloat16", layers_at_use=True)
    windows = read_windows(original, [text], 4, 64)
    filled_in = allocate(original, mixed, windows.token_ids).recipe
    compress_folder(str(source), filled_in, [text], tmp_path / "filled")
    weights = [
        {name: own for name, own in contents(folder).items() if name.endswith(".safetensors")}
        for folder in (tmp_path / "out", tmp_path / "filled")
    ]
    assert weights[0] == weights[1]


def test_a_recipe_without_calibration_reads_no_text(source, tmp_path):
    made = compress_folder(str(source), ROUNDED, [tmp_path / "nowhere"], tmp_path / "out")
    assert made.info.texts == ()
    assert all(report.rounded > 0 for layer in made.reports for report in layer)


def refused(tmp_path: Path, *arguments: object) -> str:
    with pytest.raises((ConfigError, UnsupportedModel)) as error:
        compress_folder(*arguments, tmp_path / "out")
    assert not list(tmp_path.glob("out*")), "nothing is begun"
    return str(error.value)


def test_what_cannot_be_compressed_is_told_before_anything_is_written(
    source, text, whole, tmp_path
):
    ranks = RECIPE.model_copy(update={"down": RECIPE.down.model_copy(update={"rank": 128})})
    longer = RECIPE.model_copy(
        update={"calibration": RECIPE.calibration.model_copy(update={"windows": 9})}
    )
    model = str(source)
    assert "--text" in (none := refused(tmp_path, model, RECIPE, []))
    assert "--compress-text" in none
    assert "560 tokens, enough for 8 windows of 64; 9" in refused(tmp_path, model, longer, [text])
    assert "rank 64 at most; lower it" in refused(tmp_path, model, ranks, [text])
    assert "cannot be read" in refused(tmp_path, model, RECIPE, [tmp_path])
    assert f"compressed already, from {source}" in refused(tmp_path, str(whole[0]), RECIPE, [text])


def test_a_second_run_to_the_same_folder_is_refused_and_mixes_nothing(
    source, text, whole, tmp_path
):
    refusals = []

    def on_layer(done: int, total: int) -> None:
        if done == 2:
            with pytest.raises(ConfigError) as error:
                compress_folder(str(source), ROUNDED, [], tmp_path / "out")
            refusals.append(str(error.value))

    compress_folder(str(source), RECIPE, [text], tmp_path / "out", on_layer=on_layer)
    assert len(refusals) == 1
    assert "another process compresses to" in refusals[0]
    assert contents(tmp_path / "out") == contents(whole[0])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("", "is there already; remove it"),
        ("x" * 250, "cannot be written"),
        ("file/out", "cannot be written"),
        ("link", "is there already; remove it"),
    ],
)
def test_what_can_be_no_new_folder_is_told_before_anything_is_written(
    source, tmp_path, monkeypatch, name, told
):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=told):
        compress_folder(str(source), ROUNDED, [], Path(name))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_a_folder_that_is_there_is_not_written_over(source, whole):
    before = contents(whole[0])
    with pytest.raises(ConfigError, match="is there already"):
        compress_folder(str(source), ROUNDED, [], whole[0])
    assert contents(whole[0]) == before


@pytest.mark.parametrize("kind", ["partial", "file"])
def test_what_cannot_be_written_is_told_before_anything_is_pruned(source, text, tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out = tmp_path / "file" / "out"
        (tmp_path / "file").touch()
    else:
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial" / "mine.txt").write_text("mine")
    pruning = Recipe(name="pruning", prune=Prune(mlp=0.3), calibration=RECIPE.calibration)
    told = []
    with pytest.raises(ConfigError, match=r"no unfinished checkpoint|cannot be written"):
        compress_folder(
            str(source), pruning, [text], out, on_prune=lambda done, total: told.append(done)
        )
    assert told == []
