"""Formats by part and layer: what is predicted, where the bits go, and what then is written and served."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from sparse_kernels.formats import MatrixFormat
from sparse_kernels.weights import EndTensors
from sparserve.compression.quantize import quantize_layer
from sparserve.compression.recipe import PARTS, Recipe
from sparserve.errors import ConfigError
from sparserve.model import mixed
from sparserve.model.backend import ForwardBatch, Phase, SequenceInput
from sparserve.model.compressed_writer import CheckpointWriter, first_info
from sparserve.model.compressing import compress_layers, compress_lm_head
from sparserve.model.effective import effective
from sparserve.model.loader import LoadedModel, load_model
from sparserve.model.mixed import allocate
from sparserve.model.native import NativeBackend
from sparserve.model.packing import layer_tensors, make_decoder

LAYERS = 4
UNSCALED = {"scale_columns": False}
INT4, INT8 = {"bits": 4, "group_size": 64}, {"bits": 8, "group_size": 64}


def windows(count: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, tokens), generator=torch.Generator().manual_seed(1))


TEXT = windows(8, 48)


def recipe_of(settings: dict | None = None, /, **target: object) -> Recipe:
    return Recipe.model_validate({"name": "tested", "mixed": target, **(settings or {})})


@pytest.fixture(scope="module")
def model(write_tiny_checkpoint, tmp_path_factory) -> LoadedModel:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("mixed"), num_hidden_layers=LAYERS)
    return load_model(str(folder), dtype="bfloat16", layers_at_use=True)


@pytest.fixture(scope="module")
def ladder(model):
    """Allocations to rising sizes."""
    return [allocate(model, recipe_of(target_bits=bits), TEXT) for bits in (4.5, 5, 6, 7, 8)]


def test_more_bits_are_never_predicted_worse(ladder):
    for fewer, more in pairwise(ladder):
        assert fewer.bits < more.bits
        assert fewer.kl > more.kl


def test_a_size_is_met_but_for_less_than_a_step(ladder):
    # The largest is gate and up of a layer from 4 to 8 bits.
    step = 4 * 2 * 96 / (LAYERS * (3 * 96 + 6 * 32))
    for found, bits in zip(ladder, (4.5, 5, 6, 7, 8), strict=True):
        assert bits - step < found.bits <= bits


def test_targets_beyond_the_choices_are_told_with_what_there_is(model):
    for bits in (4.3, 8.4):
        with pytest.raises(ConfigError, match=r"target_bits .* is .*; .* have 4.375 to 8.375 bits"):
            allocate(model, recipe_of(target_bits=bits), TEXT)
    least, most = (allocate(model, recipe_of(target_bits=bits), TEXT) for bits in (4.375, 8.375))
    assert (least.bits, most.bits) == (4.375, 8.375)
    told = rf"target_kl .* is 1e-06; the least .* is {most.kl:.3g}, .* with 8.38 bits"
    with pytest.raises(ConfigError, match=told):
        allocate(model, recipe_of(target_kl=1e-6), TEXT)
    everything = allocate(model, recipe_of(target_kl=most.kl * 1.001), TEXT)
    assert everything.kl <= most.kl * 1.001
    assert allocate(model, recipe_of(target_kl=100), TEXT).recipe == least.recipe


def test_a_kl_is_reached_with_fewer_bits_the_larger_it_is(model, ladder):
    worst, best = ladder[0].kl, ladder[-1].kl
    aims = [worst * 0.9, (worst + best) / 2, best * 1.5]
    found = [allocate(model, recipe_of(target_kl=aim), TEXT) for aim in aims]
    assert all(own.kl <= aim for own, aim in zip(found, aims, strict=True))
    assert found[0].bits < found[1].bits < found[2].bits


def test_a_layer_that_rounding_hurts_gets_the_bits(write_tiny_checkpoint, tmp_path):
    """An input of gate and up that the norm makes small, and they large again: the model is the same, and the
    scales of its groups are too coarse for all else."""
    folder = write_tiny_checkpoint(tmp_path / "in", num_hidden_layers=LAYERS)
    planted = load_model(str(folder), dtype="bfloat16")
    layer = planted.weights.layers[2]
    layer.mlp_norm[7] /= 64
    for weight in (layer.w_gate, layer.w_up):
        weight[:, 7] *= 64
    # Room for half of the steps from 4 to 8 bits of gate and up.
    recipe = recipe_of(UNSCALED, target_bits=4.9, choices=[INT4, INT8])
    before = load_model(str(folder), dtype="bfloat16", layers_at_use=True)
    assert allocate(before, recipe, TEXT).recipe.formats().layer(2).gate_up.bits == 4
    formats = allocate(planted, recipe, TEXT).recipe.formats()
    assert [formats.layer(i).gate_up.bits for i in range(LAYERS)] == [4, 4, 8, 4]


def test_what_is_predicted_is_the_sum_of_what_each_part_loses(
    write_tiny_checkpoint, make_backend, all_logits, tmp_path
):
    """Measured part by part with the reference backend, the LM head too."""
    model = load_model(str(write_tiny_checkpoint(tmp_path / "in")), dtype="bfloat16")
    exact = load_model(str(model.path), dtype="float32")
    exact = replace(exact, weights=rounded_to_bfloat16(exact, model))
    tokens = windows(2, 40)

    def log_probabilities(weights) -> torch.Tensor:
        rows = []
        for window in tokens.tolist():
            backend = make_backend(replace(exact, weights=weights))
            whole = SequenceInput(window, 0, range(3), Phase.PREFILL, output_offsets=range(40))
            rows.append(all_logits(backend.forward(ForwardBatch([whole]))))
        return torch.cat(rows).double().log_softmax(dim=1)

    def loss(weights) -> float:
        wanted, found = log_probabilities(exact.weights), log_probabilities(weights)
        return float((wanted.exp() * (wanted - found)).sum(dim=1).mean())

    head = compress_lm_head(model, recipe_of(target_kl=1)).dequantize()
    expected = loss(replace(exact.weights, lm_head=head))
    for index in range(2):
        for part in PARTS:
            plan = replace(recipe_formats(16), **{part: MatrixFormat(4, 64)})
            layers = list(exact.weights.layers)
            layers[index] = effective(
                quantize_layer(layer_tensors(model.weights.layers[index]), plan, "")
            )
            expected += loss(replace(exact.weights, layers=layers))
    found = allocate(model, recipe_of(UNSCALED, target_kl=100), tokens)
    assert found.kl == pytest.approx(expected, rel=1e-3)


def recipe_formats(bits: int):
    parts = {name: {"bits": bits} for name in PARTS}
    return Recipe.model_validate({"name": "a", **parts}).formats().layer(0)


def rounded_to_bfloat16(exact: LoadedModel, rounded: LoadedModel):
    """The weights of `rounded` in the data type of `exact`."""
    own = rounded.weights
    layers = [effective(layer_tensors(layer)) for layer in own.layers]
    return replace(
        exact.weights,
        embedding=own.embedding.float(),
        layers=layers,
        lm_head=own.lm_head.float(),
    )


@pytest.mark.parametrize("settings", [{}, {"compensate": "qera"}, {"compensate": "qera-diagonal"}])
def test_it_is_the_same_each_time(model, settings):
    recipe = recipe_of(settings, target_bits=6)
    found = [allocate(model, recipe, TEXT) for _ in range(2)]
    assert found[0] == found[1]


def test_low_rank_terms_are_a_choice(model):
    ranked = {"bits": 4, "group_size": 64, "rank": 32}
    recipe = recipe_of({"compensate": "qera"}, target_kl=100, choices=[INT4, ranked])
    cheapest = allocate(model, recipe, TEXT)
    assert cheapest.recipe.compensate == "none", "there is nothing to compensate with"
    recipe = recipe_of({"compensate": "qera"}, target_kl=cheapest.kl / 3, choices=[INT4, ranked])
    better = allocate(model, recipe, TEXT)
    assert better.recipe.compensate == "qera"
    formats = better.recipe.formats()
    ranks = [own.rank for i in range(LAYERS) for own in formats.layer(i).matrices]
    assert set(ranks) <= {0, 32}
    assert max(ranks) == 32


def test_bfloat16_is_a_choice_without_loss(model):
    choices = [INT4, {"bits": 16}]
    found = allocate(model, recipe_of(target_bits=10, choices=choices), TEXT)
    formats = found.recipe.formats()
    assert {own.bits for i in range(LAYERS) for own in formats.layer(i).matrices} == {4, 16}
    whole = allocate(model, recipe_of(target_bits=16, choices=choices), TEXT)
    head = allocate(
        model, recipe_of({"lm_head": {"bits": 16}}, target_bits=15.9, choices=choices), TEXT
    )
    assert 0 < whole.kl < 1e-3, "the LM head's"
    assert head.kl < found.kl


def test_bfloat16_for_all_is_told(model):
    recipe = recipe_of(
        {"lm_head": {"bits": 16}}, target_bits=16, choices=[{"bits": 4}, {"bits": 16}]
    )
    with pytest.raises(
        ConfigError, match=r"chooses 16 bits for all matrices, .* give less target_bits"
    ):
        allocate(model, recipe, TEXT)


def test_adjacent_layers_share_formats_where_there_are_many(model, monkeypatch):
    monkeypatch.setattr(mixed, "MOST_BLOCKS", 2)
    formats = allocate(model, recipe_of(target_bits=6), TEXT).recipe.formats()
    assert formats.layer(0) == formats.layer(1)
    assert formats.layer(2) == formats.layer(3)
    assert formats.layer(1) != formats.layer(2)


def test_progress_rises_to_the_end(model):
    seen = []
    allocate(model, recipe_of(target_bits=6), TEXT, lambda *step: seen.append(step))
    done, totals = zip(*seen, strict=True)
    assert list(done) == sorted(set(done))
    assert set(totals) == {done[-1]}
    assert len(seen) == LAYERS


def test_a_rank_that_a_matrix_does_not_have_is_told(model):
    ranked = {"bits": 4, "group_size": 64, "rank": 128}
    recipe = recipe_of({"compensate": "lorc"}, target_kl=1, choices=[INT4, ranked])
    with pytest.raises(ConfigError, match=r"attention.rank of the recipe tested is 128"):
        allocate(model, recipe, TEXT)


def test_what_is_allocated_is_written_and_served(model, make_backend, all_logits, tmp_path):
    found = allocate(model, recipe_of(target_bits=5.6), TEXT)
    recipe = found.recipe
    info = first_info(model, recipe.model_dump(mode="json"), recipe.formats())
    writer = CheckpointWriter(tmp_path / "out", info)
    layers = list(compress_layers(model, recipe, TEXT))
    for layer in layers[:2]:
        writer.write_layer(layer.index, layer.tensors)
    # As after an interruption.
    writer = CheckpointWriter(tmp_path / "out", info)
    done = map(writer.read_layer, writer.finished_layers())
    for layer in compress_layers(model, recipe, TEXT, done):
        writer.write_layer(layer.index, layer.tensors)
    weights = model.weights
    writer.finish(EndTensors(weights.embedding, weights.norm, compress_lm_head(model, recipe)))
    made = load_model(str(tmp_path / "out"), dtype="bfloat16", layers_at_use=True)
    stored = made.compressed
    assert stored.formats == recipe.formats()
    assert len({stored.formats.layer(i) for i in range(LAYERS)}) > 1
    assert stored.info.bits_per_decoder_weight == pytest.approx(found.bits)
    assert Recipe.model_validate(stored.info.recipe) == recipe
    decoder = make_decoder(made.config, made.weights, stored.formats, threads=1, compressed=stored)
    ours, plain = (
        decoded(backend, all_logits)
        for backend in (
            NativeBackend(made.config, decoder, num_blocks=2),
            make_backend(load_model(str(tmp_path / "out"), dtype="float32")),
        )
    )
    torch.testing.assert_close(ours, plain, rtol=0, atol=0.05 * float(plain.std()))


def decoded(backend, all_logits) -> torch.Tensor:
    """A prompt, and some tokens one by one."""
    tokens = windows(1, 24)[0].tolist()
    parts = [SequenceInput(tokens[:20], 0, range(2), Phase.PREFILL, output_offsets=range(20))]
    parts += [
        SequenceInput([tokens[i]], i, range(2), Phase.DECODE, output_offsets=[0])
        for i in range(20, 24)
    ]
    return torch.cat([all_logits(backend.forward(ForwardBatch([part]))) for part in parts])
