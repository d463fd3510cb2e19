"""Layers of different formats in one decoder: what forwards compute, on every level."""

import itertools
from dataclasses import replace

import pytest
import torch

from sparse_kernels import reference
from sparse_kernels.choice import ChoiceKind, NeuronChoice, core_words
from sparse_kernels.formats import BFLOAT16, DecoderFormats, LayerFormats, MatrixFormat
from sparse_kernels.pack import pack
from sparse_kernels.weights import ChoiceTensors, LayerShape

INT8, INT4 = MatrixFormat(8, 64), MatrixFormat(4, 64)
# Neighbours differ in bits, groups and ranks; so do the matrices of a layer.
LAYERS = (
    LayerFormats(INT4, INT4, INT4),
    LayerFormats(),
    LayerFormats(
        MatrixFormat(8, 32, rank=64), MatrixFormat(4, 128, rank=160), MatrixFormat(8, 128)
    ),
    LayerFormats(MatrixFormat(4, 32), BFLOAT16, MatrixFormat(4, 32, rank=32)),
    LayerFormats(MatrixFormat(4, 128), MatrixFormat(8, 64), BFLOAT16),
    LayerFormats(BFLOAT16, MatrixFormat(4, 32, rank=32), MatrixFormat(8, 32, rank=96)),
)
MIXED = DecoderFormats(
    *LAYERS[0].matrices, MatrixFormat(8, 64), overrides=tuple(enumerate(LAYERS))[1:]
)
# The same lower planes; all else may differ.
PLANES = DecoderFormats(
    INT8,
    MatrixFormat(4, 64, 1),
    MatrixFormat(4, 64, 1),
    overrides=(
        (1, LayerFormats(INT4, MatrixFormat(4, 32, 1, 32), MatrixFormat(4, 128, 1, 64))),
        (3, LayerFormats(BFLOAT16, MatrixFormat(4, 128, 1), MatrixFormat(4, 32, 1))),
    ),
)
SHAPES = {
    "plain": {"hidden_size": 192, "layers": [LayerShape(4, 2, 192)] * 6, "biases": True},
    "odd sizes": {
        "hidden_size": 100,
        "head_dim": 6,
        "layers": [LayerShape(5, 1, 33), LayerShape(2, 2, 130), *[LayerShape(5, 1, 90)] * 4],
    },
}
COUNTS = (1, 2, 9, 17, 40, 1)  # every way that a number of tokens is multiplied in
CHOSEN_COUNTS = (1, 2, 9, 16, 5, 1)
TABLE = [9, *range(8)]
# Typical error, of the largest value.
TYPICAL = {16: 5e-4, 8: 2e-2}


def exact_logits(tiny, tokens, choice=None, reads=None) -> torch.Tensor:
    cache = reference.empty_cache(tiny.config)
    hidden, _ = reference.forward(
        tiny.config, tiny.ends, tiny.layers, tokens, cache, formats=tiny.formats, reads=reads,
        choice=choice or NeuronChoice(), tensors=tiny.choice or ChoiceTensors(),
    )  # fmt: skip
    return reference.logits(tiny.config, tiny.ends, hidden)


def errors(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    return (found.double() - exact).abs() / exact.abs().max()


def decoded(machine, run, counts, *, prompts: bool = False) -> torch.Tensor:
    for count in counts:
        machine.step((run, count), prompts=prompts)
    return torch.stack([row[4] for row in run.rows])


@pytest.mark.parametrize("shape", SHAPES)
def test_every_level_computes_what_the_weights_mean(
    shape, levels, tiny_decoder, make_machine, make_run, random_tokens
):
    tiny, tokens = tiny_decoder(**SHAPES[shape], formats=MIXED), random_tokens(sum(COUNTS))
    exact = exact_logits(tiny, tokens)
    for isa, bits in itertools.product(levels, (16, 8)):
        own = replace(tiny, formats=replace(MIXED, activation_bits=bits))
        machine = make_machine(own, threads=2, isa=isa)
        off = errors(decoded(machine, make_run(tokens, TABLE), COUNTS), exact)
        assert off.median() < TYPICAL[bits], f"{isa}, {bits} bits"
        assert off.max() < 20 * TYPICAL[bits], f"{isa}, {bits} bits"
        if bits == 16:
            off = errors(decoded(machine, make_run(tokens, TABLE), COUNTS, prompts=True), exact)
            assert off.median() < 1e-2, f"{isa}, prompts"  # AMX rounds to bfloat16
            assert off.max() < 0.2, f"{isa}, prompts"


@pytest.mark.parametrize("prompts", [False, True])
def test_any_cut_batch_and_threads_give_the_bits_of_one_piece_alone(
    prompts, levels, tiny_decoder, make_machine, make_run, random_tokens
):
    tiny = tiny_decoder(**SHAPES["odd sizes"], formats=MIXED)
    cuts = ((1, 40, 1, 1, 7, 3), (40, 5, 2, 4, 1, 1), (3, 4, 5, 1, 17, 23))
    for isa in levels:
        quiet, machine = (make_machine(tiny, threads=n, isa=isa) for n in (1, 3))
        runs = [
            make_run(random_tokens(53, seed), range(10 * seed, 10 * seed + 4)) for seed in range(3)
        ]
        for counts in zip(*cuts, strict=True):
            machine.step(*zip(runs, counts, strict=True), prompts=prompts)
        for run in runs:
            alone = quiet.alone(run.tokens, prompts=prompts)
            for ours, theirs in zip(run.rows, alone.rows, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("formats", [MIXED, PLANES], ids=["mixed", "planes"])
def test_choices_of_neurons(formats, levels, tiny_decoder, make_machine, make_run, random_tokens):
    tiny, tokens = tiny_decoder(**SHAPES["odd sizes"], formats=formats), random_tokens(34)
    generator = torch.Generator().manual_seed(3)
    factors = torch.rand(2, 6, 130, generator=generator) + 0.5
    planes = factors[0] if formats is PLANES else None
    tiny = replace(tiny, choice=ChoiceTensors(planes, factors[1]))
    core = core_words(torch.rand(6, 130, generator=generator) < 0.5)
    choices = [
        NeuronChoice(core),
        NeuronChoice(core, ChoiceKind.GATE, torch.tensor([[0.2, 0, 0]] * 6)),
    ]
    if planes is not None:
        thresholds = torch.tensor([[0.05, 0.05, 0.2]] * 6)
        choices.append(NeuronChoice(None, ChoiceKind.PLANES, thresholds))
    for choice in choices:
        expected = torch.zeros(6, 4, dtype=torch.int64)
        exact = exact_logits(tiny, tokens, choice, expected)
        for isa in levels:
            reads = torch.zeros_like(expected)
            machine = make_machine(tiny, threads=2, isa=isa)
            run = make_run(tokens, TABLE, choice=choice, reads=reads)
            off = errors(decoded(machine, run, CHOSEN_COUNTS), exact)
            assert off.median() < 1e-3, f"{isa}, {choice.kind}"
            # Numbers just at a threshold may be rounded across it.
            assert (reads - expected).abs().max() <= max(3, 0.01 * int(expected.max()))


def test_a_layer_must_be_in_its_own_format(tiny_decoder):
    tiny = tiny_decoder(**SHAPES["plain"], formats=MIXED)
    (_, first), *others = MIXED.overrides
    swapped = replace(MIXED, overrides=((1, replace(first, gate_up=INT8)), *others))
    with pytest.raises(ValueError, match="layer 1: gate is not in the format int8"):
        pack(tiny.config, tiny.ends, tiny.layers, swapped)
    beyond = replace(MIXED, overrides=(*MIXED.overrides, (6, LayerFormats())))
    with pytest.raises(ValueError, match="formats are given for layer 6; the last one is 5"):
        pack(tiny.config, tiny.ends, tiny.layers, beyond)
