"""Choices of neurons: what a forward computes and reads where sequences make them."""

import itertools

import pytest
import torch

from sparse_kernels import reference
from sparse_kernels.choice import ChoiceKind, NeuronChoice, Score, core_members, core_words
from sparse_kernels.formats import DecoderFormats, MatrixFormat
from sparse_kernels.weights import LayerShape


def plan(bits: int, group: int, low: int, down_low: int = 0, **others) -> DecoderFormats:
    plain = MatrixFormat(bits, group)
    formats = {
        "attention": plain,
        "gate_up": MatrixFormat(bits, group, low),
        "down": MatrixFormat(bits, group, down_low),
        "lm_head": plain,
    }
    return DecoderFormats(**{**formats, **others})


FORMATS = {
    "bfloat16": DecoderFormats(),
    "int8": plan(8, 64, 0),
    "int8, groups of 32": plan(8, 32, 4),
    "int8 in 4 + 4 bits": plan(8, 64, 4),
    "int4 in 3 + 1 bits": plan(4, 64, 1),
    "int4 in 2 + 2 bits": plan(4, 128, 2),
    "int8, down in 4 + 4 bits": plan(8, 64, 4, 4),
    "int4, down in 3 + 1 bits": plan(4, 64, 1, 1),
    "int4, down in 2 + 2 bits": plan(4, 32, 2, 2),
}
SHAPES = {
    "plain": {"hidden_size": 192, "layers": [LayerShape(4, 2, 192)] * 2},
    "odd sizes": {
        "hidden_size": 100,
        "head_dim": 6,
        "layers": [LayerShape(5, 1, 33), LayerShape(5, 1, 90)],
    },
    "wide": {"hidden_size": 1152, "layers": [LayerShape(3, 1, 1100)], "head_dim": 20},
}
COUNTS = (1, 2, 9, 16, 5, 1)
# The emulator takes seconds for what others do at once: a token, a ragged tile, as many as can choose.
FEW_COUNTS = (1, 9, 16)
NUM_TOKENS = sum(COUNTS)
# Of a GPU's kernels these are all there are.
ON_EMULATOR = ("bfloat16", "int8 in 4 + 4", "int4, down in 2 + 2")
TYPICAL = {16: 1e-3, 8: 2e-2}


def thresholds(tiny, *values: float) -> torch.Tensor:
    return torch.tensor([values] * len(tiny.config.layers), dtype=torch.float32)


def decode(machine, run, counts=COUNTS):
    for count in counts:
        machine.step((run, count))
    return torch.stack([row[4] for row in run.rows])


def counts_for(isa: str) -> tuple[int, ...]:
    return FEW_COUNTS if isa == "emulator" else COUNTS


def assert_same_rows(run, other) -> None:
    for ours, theirs in zip(run.rows, other.rows, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


def oracle(tiny, tokens, choice) -> tuple[torch.Tensor, torch.Tensor]:
    reads = torch.zeros(len(tiny.config.layers), 4, dtype=torch.int64)
    cache = reference.empty_cache(tiny.config)
    hidden, _ = reference.forward(
        tiny.config, tiny.ends, tiny.layers, tokens, cache,
        choice=choice, tensors=tiny.choice, formats=tiny.formats, reads=reads,
    )  # fmt: skip
    return reference.logits(tiny.config, tiny.ends, hidden), reads


def assert_near(ours: torch.Tensor, exact: torch.Tensor, typical: float, what: str) -> None:
    error = (ours.double() - exact).abs() / exact.abs().max()
    assert error.median() < typical, what


def all_kinds(tiny, random_core) -> dict[str, NeuronChoice]:
    core = random_core(tiny, 0.5)
    kinds = {
        "core": NeuronChoice(core),
        "core with a correction": NeuronChoice(core, correction=1),
        "gate": NeuronChoice(None, ChoiceKind.GATE, thresholds(tiny, 0.2, 0, 0), correction=2),
        "gate in a core": NeuronChoice(core, ChoiceKind.GATE, thresholds(tiny, 0.1, 0, 0)),
    }
    if tiny.choice.planes_factors is not None:
        kinds |= {
            "planes": NeuronChoice(None, ChoiceKind.PLANES, thresholds(tiny, 0.1, 0, 0.3)),
            "planes, some whole": NeuronChoice(
                None, ChoiceKind.PLANES, thresholds(tiny, 0.05, 0.05, 0.2)
            ),
            "planes in a core": NeuronChoice(
                core, ChoiceKind.PLANES, thresholds(tiny, 0.05, 0.03, 0.1), correction=1
            ),
        }
    return kinds


def test_words_of_a_core_are_its_members():
    members = torch.rand(3, 150) < 0.5
    words = core_words(members)
    assert words.shape == (3, 3)
    assert torch.equal(core_members(words, 150), members)
    for layer, neuron in itertools.product(range(3), range(150)):
        word = int(words[layer, neuron // 64]) & (2**64 - 1)
        assert bool(word >> neuron % 64 & 1) == bool(members[layer, neuron])


@pytest.mark.soak_on_emulator("wide", unless=ON_EMULATOR)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("formats", FORMATS.values(), ids=FORMATS.keys())
def test_every_level_computes_what_a_choice_means(
    formats, shape, levels, chooser, make_machine, make_run, random_tokens, random_core
):
    tiny, tokens = chooser(formats, **shape), random_tokens(NUM_TOKENS)
    for (name, choice), isa in itertools.product(all_kinds(tiny, random_core).items(), levels):
        counts = counts_for(isa)
        logits, expected = oracle(tiny, tokens[: sum(counts)], choice)
        machine = make_machine(tiny, threads=2, isa=isa)
        reads = torch.zeros_like(expected)
        run = make_run(tokens, [9, *range(8)], choice=choice, reads=reads)
        assert_near(decode(machine, run, counts), logits, TYPICAL[16], f"{isa}, {name}")
        # Numbers just at a threshold may be rounded across it.
        assert (reads - expected).abs().max() <= max(3, 0.01 * int(expected.max())), name
        if choice.kind is None:
            assert torch.equal(reads, expected)


@pytest.mark.parametrize("name", ["bfloat16", "int8, down in 4 + 4 bits"])
def test_a_bias_of_down_is_added_once_whatever_is_chosen(
    name, levels, chooser, make_machine, make_run, random_tokens, random_core
):
    """Alone and beside a dense sequence, in steps of one token and of many."""
    tiny = chooser(FORMATS[name], **SHAPES["odd sizes"], biases=True)
    tokens, other = random_tokens(sum(FEW_COUNTS)), random_tokens(len(FEW_COUNTS), 5)
    kinds = all_kinds(tiny, random_core) | {"nothing": NeuronChoice(random_core(tiny, 0.0))}
    for (kind, choice), isa in itertools.product(kinds.items(), levels):
        logits, _ = oracle(tiny, tokens, choice)
        machine = make_machine(tiny, threads=2, isa=isa)
        run = make_run(tokens, [9, *range(8)], choice=choice)
        assert_near(decode(machine, run, FEW_COUNTS), logits, TYPICAL[16], f"{isa}, {kind}")
        beside, dense = make_run(tokens[:10], [10], choice=choice), make_run(other, [11])
        for count in FEW_COUNTS[:2]:
            machine.step((beside, count), (dense, 1))
        for ours, theirs in zip(beside.rows, run.rows[:10], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.soak_on_emulator(unless=ON_EMULATOR)
@pytest.mark.parametrize("formats", FORMATS.values(), ids=FORMATS.keys())
def test_all_neurons_are_dense_to_the_bit(
    formats, levels, chooser, make_machine, make_run, random_tokens, random_core
):
    for shape, isa in itertools.product(SHAPES.values(), levels):
        tiny, tokens = chooser(formats, **shape), random_tokens(NUM_TOKENS)
        machine = make_machine(tiny, isa=isa)
        dense = make_run(tokens, [9, *range(8)])
        decode(machine, dense, counts_for(isa))
        everything = [NeuronChoice(random_core(tiny, 2.0)), NeuronChoice()]
        everything += [
            NeuronChoice(None, kind, thresholds(tiny, 0, 0, 0)) for kind in machine.decoder.choices
        ]
        for choice in everything:
            run = make_run(tokens, [9, *range(8)], choice=choice)
            decode(machine, run, counts_for(isa))
            assert_same_rows(run, dense)


@pytest.mark.soak_on_emulator(unless=ON_EMULATOR)
@pytest.mark.parametrize("formats", FORMATS.values(), ids=FORMATS.keys())
def test_bits_depend_on_the_sequence_alone(
    formats, levels, chooser, make_machine, make_run, random_tokens, random_core
):
    """Not on batch mates with other choices, the cut, threads, or who came before."""
    tiny = chooser(formats, **SHAPES["plain"])
    kinds = [*all_kinds(tiny, random_core).values(), None]
    kinds.append(NeuronChoice(random_core(tiny, 0.3, seed=8)))
    tokens = [random_tokens(8, seed) for seed in range(len(kinds))]
    for isa in levels:
        machine = make_machine(tiny, isa=isa)
        alone = [
            make_run(t, [i], choice=choice)
            for i, (t, choice) in enumerate(zip(tokens, kinds, strict=True))
        ]
        for run in alone:
            decode(machine, run, [1] * 8)
        others = make_machine(tiny, threads=3, isa=isa)
        together = [replace_run(run, make_run, 2 * i) for i, run in enumerate(alone)]
        for _ in range(3):
            others.step(*((run, 1) for run in together))
        for first in range(0, len(together), 3):
            others.step(*((run, 5) for run in reversed(together[first : first + 3])))
        for run, own in zip(together, alone, strict=True):
            assert_same_rows(run, own)


def replace_run(run, make_run, block: int):
    return make_run(run.tokens, [block], choice=run.choice)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "bfloat16"])
def test_vectors_and_tiles_give_equal_bits(
    name, cpu_levels, chooser, make_machine, make_run, random_tokens, random_core
):
    if "amx" not in cpu_levels:
        pytest.skip("this CPU has no tiles")
    tiny, tokens = chooser(FORMATS[name], **SHAPES["wide"]), random_tokens(NUM_TOKENS)
    for choice in all_kinds(tiny, random_core).values():
        choice = replace_correction(choice)
        runs = [make_run(tokens, [9, *range(8)], choice=choice) for _ in range(2)]
        for run, isa in zip(runs, ("avx512", "amx"), strict=True):
            machine = make_machine(tiny, isa=isa)
            decode(machine, run)
        assert_same_rows(*runs)


def replace_correction(choice: NeuronChoice) -> NeuronChoice:
    """A correction's numbers are bfloat16, whose products differ between the levels."""
    return NeuronChoice(choice.core, choice.kind, choice.thresholds)


def test_the_union_is_read_once(chooser, make_machine, make_run, random_tokens, random_core):
    tiny = chooser(FORMATS["int8"], **SHAPES["plain"])
    cores = [random_core(tiny, 0.3, seed) for seed in range(3)]
    runs = [
        make_run(
            random_tokens(4, i),
            [i],
            choice=NeuronChoice(core),
            reads=torch.zeros(2, 4, dtype=torch.int64),
        )
        for i, core in enumerate(cores)
    ]
    machine = make_machine(tiny, threads=2)
    union = torch.full((2, 4), 7)
    machine.step(*((run, 2) for run in runs), union_reads=union)
    members = torch.stack([core_members(core, 192) for core in cores])
    assert torch.equal(union, members.any(dim=0).sum(dim=1, keepdim=True).expand(2, 4))
    for run, own in zip(runs, members, strict=True):
        assert torch.equal(run.reads, 2 * own.sum(dim=1, keepdim=True).expand(2, 4))
    machine.step(*((make_run([1], [9 + i]), 1) for i in range(2)), union_reads=union)
    assert union.tolist() == [[192] * 4] * 2


@pytest.mark.parametrize("score", [Score.COUNT, Score.SIGNED_COUNT])
@pytest.mark.parametrize("share", [0.03, 0.4, 1.0])
def test_counts_of_the_strongest(
    score, share, chooser, levels, make_machine, make_run, random_tokens
):
    tiny, tokens = chooser(FORMATS["bfloat16"], **SHAPES["plain"]), random_tokens(NUM_TOKENS)
    for isa in levels:
        machine = make_machine(tiny, threads=2, isa=isa)
        run = make_run(tokens, [9, *range(8)], score=score, score_share=share)
        decode(machine, run)
        counts = run.statistics.sum(dim=0) / 2**32
        if score is Score.COUNT:
            counted = int(torch.tensor(share).double().mul(192).ceil())
            assert counts.sum(dim=1).tolist() == [counted * (NUM_TOKENS - 1)] * 2
        assert torch.equal(counts, counts.round())
        assert counts.max() <= NUM_TOKENS - 1
