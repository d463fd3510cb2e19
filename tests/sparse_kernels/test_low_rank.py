"""Low-rank terms of integer matrices: what forwards compute with them, on every level."""

import ctypes
import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from sparse_kernels import _abi, native, reference
from sparse_kernels.choice import ChoiceKind, NeuronChoice, core_words
from sparse_kernels.decoder import model_arguments
from sparse_kernels.formats import DecoderFormats, MatrixFormat
from sparse_kernels.weights import ChoiceTensors, LayerShape


def plan(
    bits: int, group: int, rank: int, low: int = 0, down_low: int = 0, **others
) -> DecoderFormats:
    formats = {
        "attention": MatrixFormat(bits, group, 0, rank),
        "gate_up": MatrixFormat(bits, group, low, rank),
        "down": MatrixFormat(bits, group, down_low, rank),
        "lm_head": MatrixFormat(8, 64),
    }
    return DecoderFormats(**{**formats, **others})


FORMATS = {
    "int8": plan(8, 64, 32),
    "int8, groups of 32": plan(8, 32, 64),
    "int8, groups of 128, 4 + 4": plan(8, 128, 64, 4, 4),
    "int4": plan(4, 64, 32),
    "int4, groups of 32": plan(4, 32, 32),
    "int4, groups of 128": plan(4, 128, 64),
    "int4 in 3 + 1 bits": plan(4, 64, 64, 1, 1),
    "int4 in 2 + 2 bits": plan(4, 32, 32, 2, 2),
    "int4, large rank": plan(4, 128, 160, 1),
    "other ranks": plan(
        4, 64, 0, 1, gate_up=MatrixFormat(4, 64, 1, 96), down=MatrixFormat(8, 32, 4, 32)
    ),
    "attention alone": plan(8, 64, 32, gate_up=MatrixFormat(4, 64), down=DecoderFormats().down),
}
SHAPES = {
    "plain": {"hidden_size": 192, "layers": [LayerShape(4, 2, 192)] * 2, "biases": True},
    "odd sizes": {
        "hidden_size": 100,
        "head_dim": 6,
        "layers": [LayerShape(5, 1, 33), LayerShape(5, 1, 90)],
    },
    "wide": {"hidden_size": 1152, "layers": [LayerShape(3, 1, 1100)], "head_dim": 20},
}
# Each format in odd sizes, and some in those where many columns are cut into pieces.
CASES = [
    *((name, "odd sizes") for name in FORMATS),
    *((name, "plain") for name in ("int8", "int4", "int4, groups of 128", "other ranks")),
    *((name, "wide") for name in ("int8, groups of 32", "int4 in 3 + 1 bits")),
]
COUNTS = (1, 2, 9, 17, 40, 1)  # every way that a number of tokens is multiplied in
CHOSEN_COUNTS = (1, 2, 9, 16, 5, 1)
TABLE = [9, *range(8)]
# Typical error, of the largest value.
TYPICAL = {16: 5e-4, 8: 2e-2}


@pytest.fixture(scope="module")
def oracle() -> Callable[..., torch.Tensor]:
    """`oracle(tiny, tokens, choice)` -> logits."""

    def run(tiny, tokens, choice=None, reads=None):
        cache = reference.empty_cache(tiny.config)
        hidden, _ = reference.forward(
            tiny.config, tiny.ends, tiny.layers, tokens, cache, formats=tiny.formats, reads=reads,
            choice=choice or NeuronChoice(), tensors=tiny.choice or ChoiceTensors(),
        )  # fmt: skip
        return reference.logits(tiny.config, tiny.ends, hidden)

    return run


@pytest.fixture(scope="module")
def chooser(tiny_decoder) -> Callable:
    """`chooser(formats, **shape)`: a tiny decoder with low-rank terms whose sequences can choose."""

    def make(formats: DecoderFormats, **shape):
        tiny = tiny_decoder(**shape, formats=formats)
        layers, hidden = tiny.config.layers, tiny.config.hidden_size
        widest = max(layer.intermediate_size for layer in layers)
        generator = torch.Generator().manual_seed(3)
        factors = torch.rand(2, len(layers), widest, generator=generator) + 0.5
        pairs = torch.randn(len(layers), 2, 5, hidden, generator=generator) * hidden**-0.5
        corrections = [[(a.bfloat16(), b.bfloat16()) for a, b in pairs]]
        planes = factors[0] if formats.gate_up.low_bits else None
        return replace(tiny, choice=ChoiceTensors(planes, factors[1], corrections))

    return make


def core(tiny, share: float) -> torch.Tensor:
    layers = tiny.config.layers
    widest = max(layer.intermediate_size for layer in layers)
    generator = torch.Generator().manual_seed(0)
    return core_words(torch.rand(len(layers), widest, generator=generator) < share)


def thresholds(tiny, *values: float) -> torch.Tensor:
    return torch.tensor([values] * len(tiny.config.layers), dtype=torch.float32)


def all_kinds(tiny) -> dict[str, NeuronChoice]:
    kinds = {
        "core with a correction": NeuronChoice(core(tiny, 0.5), correction=1),
        "gate": NeuronChoice(None, ChoiceKind.GATE, thresholds(tiny, 0.2, 0, 0)),
    }
    if tiny.choice.planes_factors is not None:
        kinds["planes"] = NeuronChoice(
            None, ChoiceKind.PLANES, thresholds(tiny, 0.05, 0.05, 0.2), correction=1
        )
    return kinds


def decode(machine, run, counts=COUNTS, *, prompts: bool = False) -> torch.Tensor:
    for count in counts:
        machine.step((run, count), prompts=prompts)
    return torch.stack([row[4] for row in run.rows])


def assert_near(ours: torch.Tensor, exact: torch.Tensor, typical: float, what: str) -> None:
    error = (ours.double() - exact).abs() / exact.abs().max()
    assert error.median() < typical, what
    assert error.max() < 20 * typical, what


def assert_equal(run, other) -> None:
    for position, (ours, theirs) in enumerate(zip(run.rows, other.rows, strict=True)):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b), f"position {position}"


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_every_level_computes_what_the_terms_mean(
    name, shape, levels, tiny_decoder, make_machine, make_run, random_tokens, oracle
):
    formats = FORMATS[name]
    tiny = tiny_decoder(**SHAPES[shape], formats=formats)
    tokens = random_tokens(sum(COUNTS))
    logits = oracle(tiny, tokens)
    for isa, bits in itertools.product(levels, (16, 8)):
        own = replace(tiny, formats=replace(formats, activation_bits=bits))
        machine = make_machine(own, threads=2, isa=isa)
        found = decode(machine, make_run(tokens, TABLE))
        assert_near(found, logits, TYPICAL[bits], f"{isa}, {bits} bits")
        if bits == 16:
            found = decode(machine, make_run(tokens, TABLE), prompts=True)
            assert_near(found, logits, 1e-2, f"{isa}, prompts")  # AMX rounds to bfloat16


@pytest.mark.parametrize("name", ["qkv", "output", "gate_up", "down"])
def test_every_term_counts(name, tiny_decoder, random_tokens, oracle):
    """The terms are large enough for the tests to see each of them."""
    tiny, tokens = tiny_decoder(**SHAPES["plain"], formats=FORMATS["int4"]), random_tokens(20)
    logits = oracle(tiny, tokens)
    layers = [
        replace(layer, **{f"{name}_basis": getattr(layer, f"{name}_basis") * 0})
        for layer in tiny.layers
    ]
    without = oracle(replace(tiny, layers=layers), tokens)
    error = (without - logits).abs().median() / logits.abs().max()
    assert error > 5 * TYPICAL[16]


def test_factors_of_zero_are_no_term(levels, tiny_decoder, make_machine, random_tokens):
    """To the bit: a code that is its zero adds exactly nothing."""
    tokens = random_tokens(40)
    for rank, bits in ((32, 4), (64, 8)):
        formats = plan(bits, 64, rank)
        tiny = tiny_decoder(**SHAPES["plain"], formats=formats)
        layers = []
        for layer in tiny.layers:
            names = ("q", "k", "v", "output", "gate", "up", "down")
            matrices = {name: getattr(layer, name) for name in names}
            layers.append(
                replace(
                    layer,
                    **{
                        name: replace(m, factors=replace(m.factors, scales=m.factors.scales * 0))
                        for name, m in matrices.items()
                    },
                )
            )
        plain = tiny_decoder(**SHAPES["plain"], formats=plan(bits, 64, 0))
        for isa in levels:
            with_terms = make_machine(replace(tiny, layers=layers), isa=isa).alone(tokens)
            assert_equal(with_terms, make_machine(plain, isa=isa).alone(tokens))


@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("name", ["int8", "int4", "int4, groups of 32", "other ranks"])
def test_any_cut_batch_and_threads_give_the_bits_of_one_piece_alone(
    name, prompts, levels, tiny_decoder, make_machine, make_run, random_tokens
):
    layers = [LayerShape(4, 2, 200), LayerShape(2, 1, 600, window=20)]
    tiny = tiny_decoder(hidden_size=100, layers=layers, biases=True, formats=FORMATS[name])
    cuts = ((1, 40, 1, 1, 7, 3), (40, 5, 2, 4, 1, 1), (3, 4, 5, 1, 17, 23))
    for isa in levels:
        quiet, machine = (make_machine(tiny, threads=n, isa=isa) for n in (1, 3))
        runs = [
            make_run(random_tokens(53, seed), range(10 * seed, 10 * seed + 4)) for seed in range(3)
        ]
        for counts in zip(*cuts, strict=True):
            machine.step(*zip(runs, counts, strict=True), prompts=prompts)
        for run in runs:
            assert_equal(run, quiet.alone(run.tokens, prompts=prompts))


def test_planes_give_the_bits_of_whole_codes(levels, tiny_decoder, make_machine, random_tokens):
    tokens = random_tokens(40)
    for bits, low in ((8, 4), (4, 1), (4, 2)):
        split = MatrixFormat(bits, 64, low, 32)
        plans = (plan(bits, 64, 32), plan(bits, 64, 32, low, low, attention=split))
        for isa, prompts in itertools.product(levels, (False, True)):
            runs = [
                make_machine(tiny_decoder(**SHAPES["plain"], formats=formats), isa=isa).alone(
                    tokens, prompts=prompts
                )
                for formats in plans
            ]
            assert_equal(*runs)


@pytest.mark.parametrize(
    ("name", "shape"), [case for case in CASES if FORMATS[case[0]].gate_up.rank]
)
def test_choices_with_terms(
    name, shape, levels, chooser, make_machine, make_run, random_tokens, oracle
):
    tiny, tokens = chooser(FORMATS[name], **SHAPES[shape]), random_tokens(sum(CHOSEN_COUNTS))
    for what, choice in all_kinds(tiny).items():
        expected = torch.zeros(len(tiny.config.layers), 4, dtype=torch.int64)
        logits = oracle(tiny, tokens, choice, expected)
        for isa in levels:
            machine = make_machine(tiny, threads=2, isa=isa)
            reads = torch.zeros_like(expected)
            run = make_run(tokens, TABLE, choice=choice, reads=reads)
            found = decode(machine, run, CHOSEN_COUNTS)
            error = (found.double() - logits).abs() / logits.abs().max()
            assert error.median() < 1e-3, f"{isa}, {what}"
            # Numbers just at a threshold may be rounded across it.
            assert (reads - expected).abs().max() <= max(3, 0.01 * int(expected.max())), what


@pytest.mark.parametrize("name", ["int8, groups of 128, 4 + 4", "int4 in 3 + 1 bits", "int4"])
def test_all_neurons_are_dense_and_choices_of_others_change_nothing(
    name, levels, chooser, make_machine, make_run, random_tokens
):
    for shape, isa in itertools.product(("plain", "odd sizes"), levels):
        tiny, tokens = chooser(FORMATS[name], **SHAPES[shape]), random_tokens(sum(CHOSEN_COUNTS))
        machine, crowded = (make_machine(tiny, threads=n, isa=isa) for n in (1, 3))
        dense = make_run(tokens, TABLE)
        decode(machine, dense, CHOSEN_COUNTS)
        everything = [NeuronChoice(core(tiny, 2.0)), NeuronChoice()]
        everything += [
            NeuronChoice(None, kind, thresholds(tiny, 0, 0, 0)) for kind in machine.decoder.choices
        ]
        for choice in everything:
            run = make_run(tokens, TABLE, choice=choice)
            decode(machine, run, CHOSEN_COUNTS)
            assert_equal(run, dense)
        kinds = [*all_kinds(tiny).values(), None]
        runs = [make_run(tokens[:9], [i], choice=kind) for i, kind in enumerate(kinds)]
        for _ in range(9):
            crowded.step(*((run, 1) for run in runs))
        for i, (run, kind) in enumerate(zip(runs, kinds, strict=True)):
            alone = make_run(tokens[:9], [i], choice=kind)
            decode(machine, alone, (2, 7))
            assert_equal(run, alone)


def test_vectors_and_tiles_differ_by_rounding_alone(
    cpu_levels, tiny_decoder, make_machine, random_tokens
):
    """Products with a basis are in bfloat16, whose sums differ between the levels; all others do not."""
    tiny, tokens = tiny_decoder(**SHAPES["plain"], formats=FORMATS["int4"]), random_tokens(40)
    first, *others = (
        torch.stack([row[4] for row in make_machine(tiny, isa=isa).alone(tokens).rows])
        for isa in cpu_levels
    )
    for other in others:
        assert_near(other, first.double(), TYPICAL[16], "levels")


class TestRefused:
    """What a description of low-rank terms may not be."""

    @pytest.fixture
    def described(self, tiny_decoder):
        """A description, its layers, and what keeps it alive."""
        packed = tiny_decoder(formats=FORMATS["int4"]).packed()
        return model_arguments(packed, threads=1), packed

    @pytest.mark.parametrize(
        ("matrix", "name", "value", "status", "told"),
        [
            ("qkv", "rank", 33, "BAD_SIZE", "qkv.rank is 33; it can be multiples of 32 up to 512"),
            ("down", "rank", 544, "BAD_SIZE", "down.rank is 544"),
            ("output", "rank", 2**32 - 32, "BAD_SIZE", "output.rank is 4294967264"),
            ("down", "rank", 64, "BAD_SIZE", "down has "),
            (
                "down_basis",
                "rank",
                32,
                "UNSUPPORTED",
                "only matrices of layers have low-rank terms",
            ),
            ("output_basis", "codes", _abi.sk_plane(), "NULL_POINTER", "output_basis is missing"),
            ("gate_up_basis", "rows", 64, "BAD_SIZE", "gate_up_basis is 64 x 64"),
            ("down_basis", "columns", 100, "BAD_SIZE", "down_basis is 32 x 100"),
        ],
    )
    def test_matrices(self, described, matrix, name, value, status, told):
        arguments, packed = described
        setattr(getattr(packed.layers[0], matrix), name, value)
        self.refuse(arguments, status, told)

    def test_bfloat16_with_a_rank(self, tiny_decoder):
        packed = tiny_decoder().packed()
        packed.layers[1].gate.rank = 32
        self.refuse(model_arguments(packed, threads=1), "UNSUPPORTED", "gate.rank is 32; with bfl")

    def test_a_head_with_a_rank(self, described):
        arguments, _ = described
        arguments.lm_head.rank = 32
        self.refuse(arguments, "UNSUPPORTED", "lm_head.rank is 32; only matrices of layers")

    def test_a_basis_of_integers(self, described):
        arguments, packed = described
        layer = packed.layers[0]
        layer.qkv_basis.codes = layer.down.codes
        layer.qkv_basis.scales, layer.qkv_basis.zeros = layer.down.scales, layer.down.zeros
        layer.qkv_basis.group_size = 64
        layer.qkv_basis.scales_count = layer.qkv_basis.zeros_count = 32
        self.refuse(arguments, "UNSUPPORTED", "qkv_basis has 4 bits; it can have 16")

    @pytest.mark.parametrize(
        ("other", "told"),
        [
            (MatrixFormat(4, 64, 0, 64), "rank of gate is 32 and of up 64"),
            (MatrixFormat(8, 64, 0, 32), "gate has 4 bits and up 8"),
        ],
    )
    def test_gate_and_up_that_differ(self, other, told, described, tiny_decoder):
        arguments, packed = described
        formats = replace(FORMATS["int4"], gate_up=other)
        another = tiny_decoder(formats=formats).packed()
        packed.layers[0].up = another.layers[0].up
        self.refuse(arguments, "BAD_VALUE", told)

    def refuse(self, arguments: _abi.sk_model_args, status: str, told: str) -> None:
        library, info = native.load(), native.new_struct(_abi.sk_model_info)
        found = library.sk_model_create(ctypes.byref(arguments), ctypes.byref(info))
        text = library.sk_last_error().decode()
        assert found == _abi.sk_status[f"SK_STATUS_{status}"], text
        assert told in text
