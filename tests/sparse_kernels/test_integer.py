"""Matrices of integers: what forwards compute with them, on every level."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_kernels import reference
from sparse_kernels.formats import BFLOAT16, DecoderFormats, MatrixFormat
from sparse_kernels.weights import LayerShape


def plan(bits: int, group: int = 64, low: int = 0, **others) -> DecoderFormats:
    """Everything in one format; `low` bits of gate and up in a plane of their own."""
    plain = MatrixFormat(bits, group)
    return DecoderFormats(
        **{
            "attention": plain,
            "gate_up": MatrixFormat(bits, group, low),
            "down": plain,
            "lm_head": plain,
            **others,
        }
    )


FORMATS = {
    "int8": plan(8),
    "int8, groups of 32": plan(8, 32),
    "int8, groups of 128": plan(8, 128),
    "int8 in 4 + 4 bits": plan(8, 64, 4),
    "int4": plan(4),
    "int4, groups of 32": plan(4, 32),
    "int4, groups of 128": plan(4, 128),
    "int4 in 3 + 1 bits": plan(4, 64, 1),
    "int4 in 2 + 2 bits": plan(4, 32, 2),
    "all matrices in planes": plan(
        8, 64, 4, attention=MatrixFormat(4, 64, 2), down=MatrixFormat(4, 128, 1)
    ),
    "mixed": plan(8, 64, down=MatrixFormat(4, 32), attention=BFLOAT16),
    "down alone": DecoderFormats(down=MatrixFormat(4, 64)),
}
SHAPES = {
    "plain": {"hidden_size": 192, "layers": [LayerShape(4, 2, 192)] * 2},
    "odd sizes": {"hidden_size": 100, "head_dim": 6, "layers": [LayerShape(5, 1, 33)] * 2},
    "wide": {"hidden_size": 1152, "layers": [LayerShape(3, 1, 1100)], "head_dim": 20},
    "partitions": {"hidden_size": 64, "layers": [LayerShape(2, 2, 2100)]},
}
COUNTS = (1, 2, 9, 17, 40, 1)  # every way that a number of tokens is multiplied in
NUM_TOKENS = sum(COUNTS)
# Typical error, of the largest value.
TYPICAL = {16: 5e-4, 8: 2e-2}


@pytest.fixture(scope="module")
def oracle() -> Callable[..., tuple[torch.Tensor, list[torch.Tensor]]]:
    """`oracle(tiny, tokens)` -> logits, each layer's norm scores."""

    def run(tiny, tokens):
        cache = reference.empty_cache(tiny.config)
        hidden, scores = reference.forward(tiny.config, tiny.ends, tiny.layers, tokens, cache)
        return reference.logits(tiny.config, tiny.ends, hidden), scores

    return run


def assert_near(ours: torch.Tensor, exact: torch.Tensor, typical: float, what: str) -> None:
    error = (ours.double() - exact).abs() / exact.abs().max()
    assert error.median() < typical, what
    assert error.max() < 20 * typical, what


def assert_equal(run, other) -> None:
    for position, (ours, theirs) in enumerate(zip(run.rows, other.rows, strict=True)):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b), f"position {position}"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("formats", FORMATS.values(), ids=FORMATS.keys())
def test_every_level_computes_what_the_weights_mean(
    formats, shape, levels, tiny_decoder, make_machine, make_run, random_tokens, oracle
):
    tiny = tiny_decoder(**shape, formats=formats)
    tokens = random_tokens(NUM_TOKENS)
    logits, scores = oracle(tiny, tokens)
    for isa, bits in itertools.product(levels, (16, 8)):
        own = replace(tiny, formats=replace(formats, activation_bits=bits))
        machine = make_machine(own, threads=2, isa=isa)
        run = make_run(tokens, [9, *range(8)])
        for count in COUNTS:
            machine.step((run, count))
        where = f"{isa}, {bits} bits"
        assert_near(torch.stack([row[4] for row in run.rows]), logits, TYPICAL[bits], where)
        for layer, expected in enumerate(scores):
            found = run.statistics.sum(dim=0)[layer, : expected.shape[1]].double() / 2**32
            assert_near(found, expected[1:].sum(dim=0), TYPICAL[bits], f"statistics, {where}")


@pytest.mark.parametrize("name", ["int8", "int4, groups of 32", "all matrices in planes", "mixed"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_prompts_are_near_what_the_weights_mean(
    name, shape, levels, tiny_decoder, make_machine, make_run, random_tokens, oracle
):
    tiny, tokens = tiny_decoder(**shape, formats=FORMATS[name]), random_tokens(NUM_TOKENS)
    logits, _ = oracle(tiny, tokens)
    for isa in levels:
        machine = make_machine(tiny, threads=2, isa=isa)
        run = make_run(tokens, [9, *range(8)])
        for count in COUNTS:
            machine.step((run, count), prompts=True)
        found = torch.stack([row[4] for row in run.rows])
        assert_near(found, logits, 1e-2, isa)  # AMX rounds weights and inputs to bfloat16


RICH = {
    "hidden_size": 192,
    "layers": [LayerShape(4, 2, 200), LayerShape(2, 1, 1100, window=20)],
    "biases": True,
}


@pytest.fixture(scope="module")
def crowd(levels, tiny_decoder, make_machine):
    """Of each level and plan machines of 1 and 3 threads."""
    plans = (plan(8), plan(4, 32), replace(plan(4, 128), activation_bits=8))
    return [
        [make_machine(tiny_decoder(**RICH, formats=formats), 40, n, isa) for n in (1, 3)]
        for formats in plans
        for isa in levels
    ]


@given(
    pieces=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=1, max_size=4),
    prompts=st.booleans(),
    seed=st.integers(0, 2**20),
)
@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_cut_and_batch_gives_the_bits_of_one_piece_alone(
    crowd, make_run, random_tokens, pieces, prompts, seed
):
    for quiet, machine in crowd:
        runs = [
            make_run(random_tokens(sum(sizes), seed + i), range(10 * i, 10 * i + 10))
            for i, sizes in enumerate(pieces)
        ]
        for step in itertools.zip_longest(*pieces):
            batch = [(run, n) for run, n in zip(runs, step, strict=True) if n]
            machine.step(*batch, prompts=prompts)
        for run in runs:
            assert_equal(run, quiet.alone(run.tokens, prompts=prompts))


def test_tiles_and_vectors_give_the_same_bits(
    cpu_levels, tiny_decoder, make_machine, random_tokens
):
    if "amx" not in cpu_levels:
        pytest.skip("this CPU has no tiles")
    tokens = random_tokens(70)
    for formats in (plan(8), plan(8, 32), plan(4, 128), replace(plan(4), activation_bits=8)):
        tiny = tiny_decoder(**RICH, formats=formats)
        runs = [make_machine(tiny, isa=isa).alone(tokens) for isa in ("avx512", "amx")]
        assert_equal(*runs)


@pytest.mark.parametrize(("bits", "low"), [(8, 4), (4, 1), (4, 2)])
def test_planes_give_the_bits_of_whole_codes(
    bits, low, levels, tiny_decoder, make_machine, random_tokens
):
    split = MatrixFormat(bits, 64, low)
    parts = dict.fromkeys(("attention", "down", "lm_head"), split)
    tokens = random_tokens(40)
    for isa, prompts in itertools.product(levels, (False, True)):
        runs = [
            make_machine(tiny_decoder(**RICH, formats=formats), isa=isa).alone(
                tokens, prompts=prompts
            )
            for formats in (plan(bits), plan(bits, 64, low, **parts))
        ]
        assert_equal(*runs)


@pytest.mark.parametrize("prompts", [False, True])
def test_a_sequence_that_is_not_finite_harms_nobody_else(
    prompts, levels, tiny_decoder, make_machine, make_run, random_tokens
):
    tiny, tokens = tiny_decoder(**RICH, formats=plan(8)), random_tokens(40)
    for isa in levels:
        quiet, machine = make_machine(tiny, isa=isa), make_machine(tiny, threads=2, isa=isa)
        blocks = machine.num_blocks
        bad, good = make_run(tokens, [blocks - 1, 9, 10]), make_run(tokens, [3, 2, 1])
        machine.step((bad, 30), (good, 30), prompts=prompts)
        with machine.changed_kv() as kv:
            kv.view(torch.bfloat16)[-64:] = float("nan")  # in the bad one's first block
        for count in (1, 2, 7):
            machine.step((bad, count), (good, count), prompts=prompts)
        assert_equal(good, quiet.alone(tokens, prompts=prompts))
        assert bad.rows[30][4].isnan().all()
