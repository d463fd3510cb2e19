"""The walk through a model's layers: the numbers of the backends, and the planes of the kernels' own reference."""

import pytest
import torch

from sparse_kernels import reference
from sparse_kernels.choice import ChoiceKind, NeuronChoice
from sparse_kernels.formats import DecoderFormats, MatrixFormat
from sparse_kernels.weights import ChoiceTensors
from sparserve.calibration.factors import _by_gate, _by_planes
from sparserve.calibration.layers import walk
from sparserve.compression.quantize import quantize_layer
from sparserve.model.backend import BLOCK_SIZE, ForwardBatch, Phase, SequenceInput
from sparserve.model.cpu import layer_tensors
from sparserve.model.reference import ReferenceBackend
from sparserve.sparsity.statistics import UNIT

TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(3))
INT8 = MatrixFormat(8, 64, 4)
PLANES = DecoderFormats(INT8, INT8, MatrixFormat(8, 64), INT8)


def test_activations_are_those_of_the_reference_backend(tiny_model):
    backend = ReferenceBackend(tiny_model.config, tiny_model.weights, num_blocks=8, threads=1)
    layers = list(walk(tiny_model, DecoderFormats(), TOKENS))
    for window, token_ids in enumerate(TOKENS.tolist()):
        own = SequenceInput(token_ids, 0, range(3), Phase.PREFILL, collect_statistics=True)
        parts = backend.forward(ForwardBatch([own])).statistics[0]
        found = sum(part.sums for part in parts) * UNIT
        assert len(parts) == -(-len(token_ids) // BLOCK_SIZE)
        for layer, (mlp, inputs) in enumerate(layers):
            squares = mlp.activations(inputs[window, 1:]).square()
            scores = (squares / squares.sum(dim=1, keepdim=True)).sum(dim=0)
            torch.testing.assert_close(found[layer].float(), scores, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", list(ChoiceKind))
def test_importance_and_noise_are_what_the_kernels_choose_by(tiny_bfloat16, kind):
    layer = tiny_bfloat16.weights.layers[0]
    mlp, inputs = next(iter(walk(tiny_bfloat16, PLANES, TOKENS)))
    x = inputs.flatten(0, 1)
    by_planes = kind is ChoiceKind.PLANES
    factors, importance, noise = (_by_planes if by_planes else _by_gate)(mlp, x)
    use = float(importance.quantile(0.4))
    complete = float(noise.quantile(0.7)) if by_planes else 0.0
    thresholds = torch.tensor([[use, complete, 0.0]])
    tensors = ChoiceTensors(**{f"{kind.value}_factors": factors[None]})
    chosen = reference.choose(
        quantize_layer(layer_tensors(layer), PLANES, ""),
        0,
        x.double(),
        NeuronChoice(None, kind, thresholds),
        tensors,
        PLANES,
    )
    # Rounding moves a few across a threshold.
    assert (chosen.used == (importance >= use)).double().mean() > 0.999
    if noise is not None:
        whole = (importance >= use) & (noise >= complete)
        assert (chosen.whole == whole).double().mean() > 0.999
