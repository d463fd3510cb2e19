"""The copy of what is in sequences' cores: the same bits, read from elsewhere."""

import ctypes
from dataclasses import replace

import pytest
import torch

from sparse_kernels.choice import NeuronChoice, core_words
from sparse_kernels.formats import DecoderFormats, MatrixFormat
from sparse_kernels.weights import LayerShape

# A copy is made when what is in the cores of a step comes again, and is read by that step and those after it; one
# after another that was read less than 16 times, when they have come 16 times.
TIMES = 17
COUNTS = (*(1,) * TIMES, 3, 16, 1)
SHAPES = {
    "odd sizes": {
        "hidden_size": 100,
        "head_dim": 6,
        "layers": [LayerShape(5, 1, 33), LayerShape(5, 1, 90)],
    },
    "wide": {"hidden_size": 1152, "layers": [LayerShape(3, 1, 1100)], "head_dim": 20},
}


def plan(bits: int, group: int, low: int = 0, down_low: int = 0, rank: int = 0) -> DecoderFormats:
    plain = MatrixFormat(bits, group)
    return DecoderFormats(
        attention=plain,
        gate_up=MatrixFormat(bits, group, low, rank),
        down=MatrixFormat(bits, group, down_low, rank),
        lm_head=plain,
    )


FORMATS = {
    "bfloat16": DecoderFormats(),
    "int8": plan(8, 64),
    "int8 in 4 + 4 bits, down too": plan(8, 32, 4, 4),
    "int8, 8 bits of inputs": replace(plan(8, 128), activation_bits=8),
    "int4": plan(4, 64),
    "int4 in 3 + 1 bits": plan(4, 64, 1, 1),
    "int4 in 2 + 2 bits": plan(4, 32, 2),
    "int4 and terms of rank 32": plan(4, 64, rank=32),
    "int8 and terms of rank 32": plan(8, 64, rank=32),
}


@pytest.fixture
def both(make_machine, make_run, random_tokens):
    """`both(tiny, choice, isa)`: two machines with a run each, with and without copies."""

    def make(tiny, choice, isa="auto", threads=2):
        machines = [
            make_machine(tiny, threads=threads, isa=isa, core_copies=copies)
            for copies in (True, False)
        ]
        tokens = random_tokens(sum(COUNTS))
        runs = [
            make_run(tokens, range(4), choice=choice, reads=torch.zeros(len(tiny.layers), 4).long())
            for _ in machines
        ]
        return machines, runs

    return make


def assert_equal_runs(run, other) -> None:
    for ours, theirs in zip(run.rows, other.rows, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(run.statistics, other.statistics)
    assert torch.equal(run.reads, other.reads)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("formats", FORMATS.values(), ids=FORMATS.keys())
def test_bits_are_those_without_it(formats, shape, cpu_levels, chooser, both, random_core):
    """Of outputs, statistics and reads, also where a core is another than before, or of no neurons."""
    tiny = chooser(formats, **shape)
    cores = [random_core(tiny, share, seed) for seed, share in enumerate((0.4, 0.8, 0.05, 0.0))]
    for isa in cpu_levels:
        machines, runs = both(tiny, None, isa)
        for core in cores:
            for machine, run in zip(machines, runs, strict=True):
                run.done, run.rows = 0, []
                run.choice = NeuronChoice(core, correction=1)
                for count in COUNTS:
                    machine.step((run, count))
            assert_equal_runs(*runs)


def test_a_layer_whose_neurons_are_all_in_the_core(chooser, both, cpu_levels):
    tiny = chooser(FORMATS["int8"], **SHAPES["odd sizes"])
    members = torch.rand(2, 90, generator=torch.Generator().manual_seed(1)) < 0.5
    members[0] = True
    for isa in cpu_levels:
        machines, runs = both(tiny, NeuronChoice(core_words(members)), isa)
        for machine, run in zip(machines, runs, strict=True):
            for count in COUNTS:
                machine.step((run, count))
        assert_equal_runs(*runs)


def test_sequences_share_it(chooser, both, make_run, random_core, cpu_levels):
    """And with a mate that has no core, or where there are other ones, for a while they do without."""
    tiny = chooser(FORMATS["int8"], **SHAPES["wide"])
    core, other = random_core(tiny, 0.4), random_core(tiny, 0.4, 9)
    for isa in cpu_levels:
        machines, runs = both(tiny, NeuronChoice(core), isa)
        seconds = [
            make_run(run.tokens[5:], range(4, 8), choice=NeuronChoice(other, correction=2))
            for run in runs
        ]
        mates = [make_run(run.tokens[9:], [8], choice=None) for run in runs]
        for machine, *members in zip(machines, runs, seconds, mates, strict=True):
            steps = [(run, 1) for run in members]
            two, one = steps[:2], steps[:1]
            for batch in (*(two,) * (TIMES + 1), steps, two, one, one, two):
                machine.step(*batch)
        assert_equal_runs(*runs)
        for ours, theirs in zip(seconds[0].rows, seconds[1].rows, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def clear_gates(machine) -> None:
    """Where the machine's model has its gates."""
    for layer in machine.packed.layers:
        for plane in (layer.gate.codes, layer.gate.low):
            if plane.data:
                ctypes.memset(plane.data, 0, plane.bytes)


@pytest.mark.parametrize("name", ["bfloat16", "int4 in 3 + 1 bits"])
@pytest.mark.parametrize("mates", [0, 1])
def test_it_is_read_instead_of_the_layers(name, mates, chooser, both, make_run, random_core):
    """After a mate with hardly another core has ended too, until another core comes."""
    tiny = chooser(FORMATS[name], **SHAPES["wide"])
    core, other = random_core(tiny, 0.4), random_core(tiny, 0.4, 9)
    machines, firsts = both(tiny, NeuronChoice(core))
    batches = [[first] for first in firsts]
    for first, batch in zip(firsts, batches, strict=True):
        for _ in range(mates):
            batch.append(
                make_run(
                    first.tokens,
                    range(4, 8),
                    choice=NeuronChoice(core | random_core(tiny, 0.05, 1)),
                )
            )

    def step() -> None:
        for machine, batch in zip(machines, batches, strict=True):
            machine.step(*((run, 1) for run in batch))

    for _ in range(TIMES):
        step()
    clear_gates(machines[0])
    step()
    for batch in batches:
        del batch[1:]
    step()
    assert_equal_runs(*firsts)
    for first in firsts:
        first.choice = NeuronChoice(other)
    step()
    assert not torch.equal(firsts[0].rows[-1][4], firsts[1].rows[-1][4])


def test_without_it_the_layers_are_read(chooser, both, random_core):
    tiny = chooser(FORMATS["bfloat16"], **SHAPES["wide"])
    (with_copy, without), runs = both(tiny, NeuronChoice(random_core(tiny, 0.5)))
    for machine, run in zip((with_copy, without), runs, strict=True):
        for _ in range(TIMES):
            machine.step((run, 1))
    clear_gates(without)
    with_copy.step((runs[0], 1))
    without.step((runs[1], 1))
    assert not torch.equal(runs[0].rows[-1][4], runs[1].rows[-1][4])
