"""The walk through a model's layers: the numbers of the backends, and the planes of the kernels' own reference."""

from dataclasses import replace

import pytest
import torch

from sparse_kernels import reference
from sparse_kernels.choice import ChoiceKind, NeuronChoice
from sparse_kernels.formats import DecoderFormats, MatrixFormat
from sparse_kernels.weights import ChoiceTensors
from sparserve.calibration.factors import _by_gate, by_planes
from sparserve.calibration.layers import walk
from sparserve.compression.quantize import quantize_layer
from sparserve.model.backend import BLOCK_SIZE, ForwardBatch, Phase, SequenceInput
from sparserve.model.loader import load_model
from sparserve.model.packing import layer_tensors
from sparserve.model.reference import ReferenceBackend
from sparserve.sparsity.statistics import UNIT

TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(3))
INT8 = MatrixFormat(8, 64, 4)
PLANES = DecoderFormats(INT8, INT8, MatrixFormat(8, 64), INT8)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biases"])
def test_activations_are_those_of_the_reference_backend(tiny_model, with_biases, biased):
    model = with_biases(tiny_model) if biased else tiny_model
    backend = ReferenceBackend(model.config, model.weights, num_blocks=8, threads=1)
    layers = list(walk(model, DecoderFormats(), TOKENS))
    for window, token_ids in enumerate(TOKENS.tolist()):
        own = SequenceInput(token_ids, 0, range(3), Phase.PREFILL, collect_statistics=True)
        parts = backend.forward(ForwardBatch([own])).statistics[0]
        found = sum(part.sums for part in parts) * UNIT
        assert len(parts) == -(-len(token_ids) // BLOCK_SIZE)
        for layer, (mlp, inputs) in enumerate(layers):
            squares = mlp.activations(inputs[window, 1:]).square()
            scores = (squares / squares.sum(dim=1, keepdim=True)).sum(dim=0)
            torch.testing.assert_close(found[layer].float(), scores, atol=1e-4, rtol=1e-3)


@pytest.fixture(scope="module", params=[(8, 4), (4, 1), (4, 2)], ids=str)
def with_low_rank(request, write_tiny_checkpoint, write_compressed, tmp_path_factory):
    """A compressed model whose gate and up are in planes, and have large low-rank terms."""
    folder = tmp_path_factory.mktemp("compressed")
    source = write_tiny_checkpoint(folder / "in", dtype=torch.bfloat16)
    planes = MatrixFormat(request.param[0], 64, request.param[1], rank=32)
    formats = DecoderFormats(planes, planes, planes, MatrixFormat(8, 64))
    write_compressed(source, formats, folder / "out", low_rank=4)
    return load_model(str(folder / "out"), dtype="bfloat16", layers_at_use=True)


@pytest.mark.parametrize("kind", list(ChoiceKind))
def test_importance_and_noise_are_what_the_kernels_choose_by(tiny_bfloat16, kind):
    layer = quantize_layer(layer_tensors(tiny_bfloat16.weights.layers[0]), PLANES, "")
    check_choice(tiny_bfloat16, layer, PLANES, kind)


@pytest.mark.parametrize("kind", list(ChoiceKind))
def test_low_rank_terms_are_among_what_the_kernels_choose_by(with_low_rank, kind):
    compressed = with_low_rank.compressed
    check_choice(with_low_rank, compressed.layers[0], compressed.formats, kind)


def check_choice(model, layer, formats, kind):
    mlp, inputs = next(iter(walk(model, formats, TOKENS)))
    x = inputs.flatten(0, 1)
    planes = kind is ChoiceKind.PLANES
    factors, importance, noise = (by_planes if planes else _by_gate)(mlp, x)
    use = float(importance.quantile(0.4))
    complete = float(noise.quantile(0.7)) if planes else 0.0
    thresholds = torch.tensor([[use, complete, 0.0]])
    tensors = ChoiceTensors(**{f"{kind.value}_factors": factors[None]})
    chosen = reference.choose(
        layer,
        0,
        x.double(),
        NeuronChoice(None, kind, thresholds),
        tensors,
        formats,
    )
    # Rounding moves a few across a threshold.
    assert (chosen.used == (importance >= use)).double().mean() > 0.999
    if noise is not None:
        whole = (importance >= use) & (noise >= complete)
        assert (chosen.whole == whole).double().mean() > 0.999


def test_a_compressed_model_is_walked_as_it_is_stored(
    write_tiny_checkpoint, write_compressed, tmp_path
):
    """Integers and low-rank terms: what the same weights give in float32."""
    source = write_tiny_checkpoint(tmp_path / "in", dtype=torch.bfloat16)
    int4 = MatrixFormat(4, 32, rank=32)
    made = write_compressed(source, DecoderFormats(int4, int4, int4), tmp_path / "out")
    stored = load_model(str(tmp_path / "out"), dtype="bfloat16", layers_at_use=True)
    exact = replace(load_model(str(tmp_path / "out"), dtype="float32"), compressed=None)
    pairs = zip(
        walk(stored, made.formats, TOKENS), walk(exact, DecoderFormats(), TOKENS), strict=True
    )
    for (mlp, inputs), (expected_mlp, expected) in pairs:
        torch.testing.assert_close(inputs, expected)
        torch.testing.assert_close(mlp.activations(inputs), expected_mlp.activations(expected))
