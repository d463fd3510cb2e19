"""Layers compressed one after another: by what compensation promises, and against the kernels' own reference."""

from dataclasses import fields

import pytest
import torch

from sparse_kernels import reference
from sparse_kernels.weights import EndTensors, QuantizedMatrix
from sparserve.compression.recipe import Recipe
from sparserve.errors import ConfigError, CorruptCheckpoint
from sparserve.model.compressing import (
    CompressedLayer,
    check_recipe,
    compress_layers,
    compress_lm_head,
)
from sparserve.model.effective import effective
from sparserve.model.loader import load_model
from sparserve.model.packing import layer_tensors, pack_model
from sparserve.model.walk import Walk

STACKS = ["q, k, v", "output", "gate, up", "down"]


def windows(count: int, tokens: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, tokens), generator=torch.Generator().manual_seed(seed))


TEXT, UNSEEN = windows(8, 64, 1), windows(2, 64, 2)


def recipe_of(rank: int = 0, **settings: object) -> Recipe:
    parts = {name: {"rank": rank} for name in ("attention", "gate_up", "down")}
    return Recipe.model_validate({"name": "tested", **parts, **settings})


def last_states(
    model, layers: list[CompressedLayer] | None, token_ids: torch.Tensor = UNSEEN
) -> torch.Tensor:
    """What the layers make of `token_ids`; None: the model's own."""
    walk = Walk(model, token_ids)
    for index in range(model.config.num_layers):
        own = layers[index].tensors if layers else layer_tensors(model.weights.layers[index])
        served = effective(own)
        walk.add_attention(index, served)
        walk.add_feed_forward(served)
    return walk.x


def tensors_of(layer: CompressedLayer) -> dict[str, torch.Tensor]:
    found = {}
    for field in fields(layer.tensors):
        value = getattr(layer.tensors, field.name)
        if isinstance(value, QuantizedMatrix):
            parts = {"codes": value.codes, "scales": value.scales, "zeros": value.zeros}
            if value.factors is not None:
                parts |= {"b": value.factors.codes, "b_scales": value.factors.scales}
            found |= {f"{field.name}.{name}": part for name, part in parts.items()}
        elif value is not None:
            found[field.name] = value
    return found


def assert_same_bytes(left: CompressedLayer, right: CompressedLayer) -> None:
    mine, theirs = tensors_of(left), tensors_of(right)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name
    assert left.reports == right.reports


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
@pytest.mark.parametrize("compensate", ["lorc", "qera", "qera-diagonal"])
def test_outputs_come_nearer_with_compensation_and_with_its_rank(
    tiny_bfloat16, quantizer, compensate
):
    exact = last_states(tiny_bfloat16, None)

    def off(rank: int) -> float:
        kind = compensate if rank else "none"
        recipe = recipe_of(rank, quantizer=quantizer, compensate=kind)
        layers = list(compress_layers(tiny_bfloat16, recipe, TEXT))
        return float((last_states(tiny_bfloat16, layers) - exact).norm() / exact.norm())

    assert off(64) < off(32) < off(0) < 0.2


def test_gptq_is_nearer_than_rounding_to_nearest(tiny_bfloat16):
    exact = last_states(tiny_bfloat16, None)
    rounded, gptq = (
        list(compress_layers(tiny_bfloat16, recipe_of(quantizer=name), TEXT))
        for name in ("rtn", "gptq")
    )
    states = [last_states(tiny_bfloat16, layers) for layers in (rounded, gptq)]
    assert (states[1] - exact).norm() < (states[0] - exact).norm()


def test_outputs_as_target_make_up_for_what_went_wrong_before(tiny_bfloat16):
    """On the calibration's text, for there is no structure in random tokens that another one would share."""
    coarse = {"value_bits": 2}
    exact = last_states(tiny_bfloat16, None, TEXT)
    own = [
        list(compress_layers(tiny_bfloat16, recipe_of(target=target, **coarse), TEXT))
        for target in ("weights", "outputs")
    ]
    off = [(last_states(tiny_bfloat16, layers, TEXT) - exact).norm() for layers in own]
    assert off[1] < 0.95 * off[0]


@pytest.mark.parametrize("compensate", ["lorc", "qera", "qera-diagonal"])
def test_reports_say_what_the_matrices_of_a_layer_are_off(tiny_bfloat16, compensate):
    recipe = recipe_of(32, compensate=compensate, scale_columns=False)
    layer = next(iter(compress_layers(tiny_bfloat16, recipe, TEXT)))
    assert [report.name for report in layer.reports] == [f"layer 0: {name}" for name in STACKS]
    walk, weights = Walk(tiny_bfloat16, TEXT), tiny_bfloat16.weights.layers[0]
    x = walk.norm(walk.x, weights.attn_norm).flatten(0, 1).double()
    served = effective(layer.tensors)
    whole = torch.cat((weights.wq, weights.wk, weights.wv)).double()
    made = torch.cat((served.wq, served.wk, served.wv)).double()
    codes = torch.cat([m.dequantize() for m in (layer.tensors.q, layer.tensors.k, layer.tensors.v)])
    size = (x @ whole.T).square().sum()
    report = layer.reports[0]
    assert report.rounded == pytest.approx(float((x @ (whole - codes).T).square().sum() / size))
    assert report.compensated == pytest.approx(float((x @ (whole - made).T).square().sum() / size))
    assert all(own.compensated < own.rounded for own in layer.reports)
    # 128 rows: 4 bits, 3 bytes a group of 64, B with 8 bits and two groups of 64 codes; A once.
    columns = tiny_bfloat16.config.hidden_size
    total = 128 * (columns * 4 + 24 + 32 * 8 + 24) + 32 * columns * 16
    assert report.bits == pytest.approx(total / (128 * columns))


def test_scales_of_downs_factors_are_about_those_of_its_integers(tiny_bfloat16):
    """An activation becomes an integer for both."""
    for layer in compress_layers(tiny_bfloat16, recipe_of(32, compensate="qera"), TEXT):
        down = layer.tensors.down
        assert 0.5 < float(down.factors.scales.max() / down.scales.max()) < 2


def test_the_kernels_reference_computes_what_the_walk_does(tiny_bfloat16):
    """Of a layer with low-rank terms, attention included."""
    recipe, weights = recipe_of(32, compensate="qera"), tiny_bfloat16.weights
    layers = list(compress_layers(tiny_bfloat16, recipe, TEXT))
    decoder = pack_model(tiny_bfloat16.config, weights).config
    states, _ = reference.forward(
        decoder,
        EndTensors(weights.embedding, weights.norm),
        [layer.tensors for layer in layers],
        UNSEEN[0].tolist(),
        reference.empty_cache(decoder),
        formats=recipe.formats(),
    )
    walked = last_states(tiny_bfloat16, layers)[0]
    # The reference rounds KV to bfloat16.
    assert float((states - walked).norm() / walked.norm()) < 2e-3


@pytest.mark.parametrize("target", ["weights", "outputs"])
def test_interrupted_and_repeated_runs_give_the_same_bytes(tiny_bfloat16, target):
    recipe = recipe_of(32, compensate="qera", target=target)
    whole = list(compress_layers(tiny_bfloat16, recipe, TEXT))
    done = [whole[0].tensors]
    (rest,) = compress_layers(tiny_bfloat16, recipe, TEXT, iter(done))
    assert rest.index == 1
    assert_same_bytes(rest, whole[1])
    for own, again in zip(whole, compress_layers(tiny_bfloat16, recipe, TEXT), strict=True):
        assert_same_bytes(own, again)


def test_groups_that_do_not_divide_have_a_smaller_last_one(write_tiny_checkpoint, tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "odd", intermediate_size=112, hidden_size=96)
    model = load_model(str(folder), dtype="bfloat16", layers_at_use=True)
    part = {"group_size": 64, "rank": 32}
    recipe = recipe_of(compensate="qera", attention=part, gate_up=part, down=part)
    layers = list(compress_layers(model, recipe, TEXT))
    assert layers[0].tensors.down.scales.shape == (112, 2)
    assert layers[0].tensors.gate.scales.shape == (112, 2)
    assert all(report.compensated < 0.02 for report in layers[1].reports)


def test_matrices_of_16_bits_stay_as_they_are(tiny_bfloat16):
    recipe = recipe_of(attention={"bits": 16}, down={"bits": 8})
    layer = next(iter(compress_layers(tiny_bfloat16, recipe, TEXT)))
    own = tiny_bfloat16.weights.layers[0]
    assert torch.equal(layer.tensors.q, own.wq)
    assert torch.equal(layer.tensors.output, own.wo)
    assert [report.name for report in layer.reports] == ["layer 0: gate, up", "layer 0: down"]
    assert layer.tensors.down.bits == 8


def test_layers_follow_their_own_formats(tiny_bfloat16):
    ranked = {"bits": 8, "group_size": 32, "rank": 32}
    overrides = [{"layers": [1], "down": {"bits": 16}, "gate_up": ranked}]
    recipe = recipe_of(compensate="qera", overrides=overrides)
    first, second = compress_layers(tiny_bfloat16, recipe, TEXT)
    plain = next(iter(compress_layers(tiny_bfloat16, recipe_of(), TEXT)))
    assert_same_bytes(first, plain)
    assert torch.equal(second.tensors.down, tiny_bfloat16.weights.layers[1].w_down)
    up = second.tensors.up
    assert (up.bits, up.group_size, up.factors.codes.shape[1]) == (8, 32, 32)
    assert second.tensors.q.bits == 4
    assert [report.name for report in second.reports] == [f"layer 1: {own}" for own in STACKS[:3]]


def test_overrides_that_do_not_fit_the_model_are_refused(tiny_model):
    # Of what all layers have anyway, too.
    for part in ({"bits": 8}, {"bits": 4}):
        recipe = recipe_of(overrides=[{"layers": "1-2", "down": part}])
        with pytest.raises(
            ConfigError, match="are of layer 2, and the last layer of this model is 1"
        ):
            check_recipe(tiny_model.config, recipe)
    recipe = recipe_of(compensate="qera", overrides=[{"layers": 1, "down": {"rank": 96}}])
    with pytest.raises(
        ConfigError, match=r"down.rank of the recipe tested is 96, and down of this"
    ):
        check_recipe(tiny_model.config, recipe)


def test_fewer_levels_cost_quality_and_no_bits(tiny_bfloat16):
    reports = [
        next(iter(compress_layers(tiny_bfloat16, recipe_of(value_bits=bits), TEXT))).reports
        for bits in (None, 3)
    ]
    for whole, fewer in zip(*reports, strict=True):
        assert fewer.rounded > 2 * whole.rounded
        assert fewer.bits == whole.bits


def test_data_free_recipes_need_no_text(tiny_bfloat16):
    recipe = recipe_of(32, quantizer="rtn", compensate="lorc")
    for own, other in zip(
        compress_layers(tiny_bfloat16, recipe), compress_layers(tiny_bfloat16, recipe, TEXT),
        strict=True,
    ):  # fmt: skip
        assert_same_bytes(own, other)
        assert all(report.compensated < report.rounded for report in own.reports)
    with pytest.raises(ConfigError, match="needs a text to calibrate on and got none; give one"):
        next(compress_layers(tiny_bfloat16, recipe_of()))


def test_the_lm_head_is_rounded_or_left(tiny_bfloat16, write_tiny_checkpoint, tmp_path):
    whole = recipe_of(lm_head={"bits": 16})
    assert compress_lm_head(tiny_bfloat16, recipe_of()).bits == 8
    assert compress_lm_head(tiny_bfloat16, whole) is tiny_bfloat16.weights.lm_head
    folder = write_tiny_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    tied = load_model(str(folder), dtype="bfloat16", layers_at_use=True)
    assert compress_lm_head(tied, whole) is None


def test_a_rank_beyond_a_matrix_is_refused(tiny_model):
    recipe = recipe_of(compensate="qera", down={"rank": 96})
    with pytest.raises(
        ConfigError, match=r"down.rank of the recipe tested is 96, and down of this"
    ):
        check_recipe(tiny_model.config, recipe)


def test_damaged_weights_and_inputs_are_told(tiny_bfloat16):
    damaged = load_model(str(tiny_bfloat16.path), dtype="bfloat16")
    damaged.weights.layers[1].wv[3, 5] = float("nan")
    found = compress_layers(damaged, recipe_of(quantizer="rtn"))
    next(found)
    with pytest.raises(CorruptCheckpoint, match="layer 1: q, k, v holds values that are not fin"):
        next(found)
    damaged.weights.embedding[7] = float("inf")
    with pytest.raises(ConfigError, match="inputs of layer 0: q, k, v are not finite in 1 of 64"):
        next(compress_layers(damaged, recipe_of(), torch.arange(64)[None]))


def test_scaled_columns_are_taken_back(tiny_bfloat16):
    """8 bits are near enough that norms or rows of v left as they were would show."""
    eight = {name: {"bits": 8} for name in ("attention", "gate_up", "down")}
    exact = last_states(tiny_bfloat16, None)
    for settings in ({"quantizer": "rtn"}, {"quantizer": "gptq"}):
        recipe = recipe_of(**eight, **settings)
        layers = list(compress_layers(tiny_bfloat16, recipe, TEXT))
        norms = [
            tiny_bfloat16.weights.layers[0].attn_norm,
            tiny_bfloat16.weights.layers[0].mlp_norm,
        ]
        tensors = layers[0].tensors
        assert not torch.equal(tensors.attention_norm, norms[0].float())
        assert not torch.equal(tensors.mlp_norm, norms[1].float())
        off = (last_states(tiny_bfloat16, layers) - exact).norm() / exact.norm()
        assert off < 0.02
