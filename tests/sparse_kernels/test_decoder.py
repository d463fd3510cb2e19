"""The native decoder against its plain meaning, and its bits against themselves."""

import ctypes
import itertools
import threading
import time
from array import array
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_kernels import _abi, reference
from sparse_kernels import decoder as decoder_module
from sparse_kernels.decoder import PHASES
from sparse_kernels.formats import BFLOAT16, DecoderFormats, MatrixFormat
from sparse_kernels.weights import (
    DecoderConfig,
    EndTensors,
    Factors,
    LayerShape,
    LayerTensors,
    Matrix,
    QuantizedMatrix,
)

SHAPES = {
    "plain": {},
    "one neuron": {"layers": [LayerShape(4, 4, 1)]},
    "odd sizes": {"hidden_size": 100, "head_dim": 6, "layers": [LayerShape(4, 1, 33)] * 2},
    "hidden 48, head 20": {"hidden_size": 48, "head_dim": 20, "layers": [LayerShape(3, 1, 500)]},
    "large head, large vocabulary": {
        "head_dim": 64,
        "vocab_size": 1000,
        "layers": [LayerShape(4, 4, 96)],
    },
    "biases": {"biases": True},
    "norms of heads": {"head_norms": True, "biases": True, "head_dim": 20},
    "windows": {"layers": [LayerShape(4, 2, 96, window=w) for w in (1, 17, 0)]},
    "a window beyond a chunk": {"layers": [LayerShape(4, 1, 96, window=150)]},
    "tied": {"tied": True},
    "frequencies of each position": {"rope_rows": 40, "rope_scale": 1.3},
    "partitions of several blocks": {"hidden_size": 48, "layers": [LayerShape(2, 2, 1100)]},
    "more partitions than 16": {"hidden_size": 32, "layers": [LayerShape(2, 1, 8300)]},
    "large epsilon": {"rms_norm_eps": 0.5},
    "layers that differ": {
        "layers": [LayerShape(2, 1, 500), LayerShape(8, 2, 33, window=9), LayerShape(3, 3, 96)]
    },
}
NUM_TOKENS = 300  # chunks of attention are 128 positions
# Typical error, of the largest value: inputs have 16 bits of mantissa with AMX and on a GPU, the others are
# float32. Single values are further off, for a key or value in the middle of two bfloat16 numbers may become
# either.
TYPICAL = dict.fromkeys(("portable", "avx2", "avx512"), 5e-06) | dict.fromkeys(
    ("amx", "emulator", "cuda"), 0.0001
)
LARGEST = 1e-3
# With 8 bits queries and weights of values have 16, and a key or value that becomes another number moves
# further.
TYPICAL_INT8, LARGEST_INT8 = 1e-4, 4e-3


def assert_near(
    ours: torch.Tensor, exact: torch.Tensor, isa: str, what: str, kv_bits: int = 16
) -> None:
    error = (ours.double() - exact).abs() / exact.abs().max()
    assert error.median() < (TYPICAL[isa] if kv_bits == 16 else TYPICAL_INT8), (what, isa)
    assert error.max() < (LARGEST if kv_bits == 16 else LARGEST_INT8), (what, isa)


def assert_near_kv(ours: torch.Tensor, exact: torch.Tensor, kv_bits: int) -> None:
    """What is near the middle of two numbers of the cache may become either."""
    if kv_bits == 16:
        torch.testing.assert_close(ours, exact, atol=1e-3, rtol=2**-7)
        return
    largest = exact.abs().amax(dim=-1, keepdim=True)  # of a token, which has one scale
    error = (ours - exact).abs()
    assert (error <= 1.1 / 127 * largest).all()
    assert (error <= 1e-6 * largest).double().mean() > 0.95


@pytest.fixture(scope="module")
def oracle() -> Callable[..., tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list]]:
    """`oracle(tiny, tokens, kv_bits)` -> hidden, logits, each layer's norm scores, KV."""

    def run(tiny, tokens, kv_bits=16):
        cache = reference.empty_cache(tiny.config)
        hidden, scores = reference.forward(
            tiny.config, tiny.ends, tiny.layers, tokens, cache, kv_bits
        )
        return hidden, reference.logits(tiny.config, tiny.ends, hidden), scores, cache

    return run


@pytest.mark.soak_on_emulator("int8 KV", unless=("odd", "norms of heads", "windows"))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_level_computes_what_the_model_means(
    shape, kv_bits, levels, tiny_decoder, make_machine, make_run, random_tokens, oracle
):
    tiny = tiny_decoder(**shape)
    tokens = random_tokens(NUM_TOKENS)
    hidden, logits, scores, cache = oracle(tiny, tokens, kv_bits)
    for isa in levels:
        machine = make_machine(tiny, threads=2, isa=isa, kv_bits=kv_bits)
        run = make_run(tokens, [*range(11, 19), *range(11), 20])
        for count in (1, 200, 10, 89):  # with and without few tokens, a long context, a ragged end
            machine.step((run, count))
        assert machine.decoder.isa == ("cuda" if isa == "emulator" else isa)
        found_logits = torch.stack([row[4] for row in run.rows])
        found_hidden = torch.stack([row[5] for row in run.rows])
        assert_near(found_logits, logits, isa, "logits", kv_bits)
        assert_near(found_hidden, hidden, isa, "hidden states", kv_bits)
        sums = run.statistics.sum(dim=0).double() / 2**32
        for layer, expected in enumerate(scores):
            wanted = expected[1:].sum(dim=0)  # without the attention sink
            found, beyond = sums[layer].tensor_split([len(wanted)])
            assert_near(found, wanted, isa, f"statistics of layer {layer}", kv_bits)
            assert not beyond.any()
        for blocks, exact in zip(machine.kv_of(run), cache, strict=True):
            for ours, theirs in zip(zip(*blocks, strict=True), exact, strict=True):
                assert_near_kv(torch.cat(ours)[:NUM_TOKENS], theirs, kv_bits)


def test_the_oracle_does_not_depend_on_how_tokens_are_cut(tiny_decoder, random_tokens, oracle):
    tiny = tiny_decoder(layers=SHAPES["windows"]["layers"], rope_rows=20)
    tokens = random_tokens(60)
    whole, _, scores, _ = oracle(tiny, tokens)
    cache, parts = reference.empty_cache(tiny.config), []
    for begin, end in itertools.pairwise((0, 1, 37, 38, 60)):
        part = tokens[begin:end]
        parts.append(reference.forward(tiny.config, tiny.ends, tiny.layers, part, cache))
    torch.testing.assert_close(torch.cat([hidden for hidden, _ in parts]), whole)
    for layer, expected in enumerate(scores):
        torch.testing.assert_close(torch.cat([own[layer] for _, own in parts]), expected)


# --- candidates ---


@pytest.mark.parametrize("vocab", [50, 256, 257, 1000])
def test_candidates_are_the_head_of_the_sorted_row(
    vocab, levels, tiny_decoder, make_machine, random_tokens
):
    tiny = tiny_decoder(vocab_size=vocab)
    # Equal rows of the LM head give equal logits: the lower id comes first.
    tiny.ends.lm_head[vocab // 2 :] = tiny.ends.lm_head[: vocab - vocab // 2].clone()
    tokens = random_tokens(30)
    for isa in levels:
        run = make_machine(tiny, isa=isa).alone(tokens, temperature=0.01)
        for ids, logits, cold, normal, row, _ in run.rows:
            order = sorted(range(vocab), key=lambda i, row=row: (-float(row[i]), i))
            assert ids.tolist() == order[: min(256, vocab)]
            assert torch.equal(logits, row[ids.long()])
            below = row.double() - row.max().double()
            assert float(normal) == pytest.approx(float(below.logsumexp(0)), abs=1e-5)
            assert float(cold) == pytest.approx(float((below / 0.01).logsumexp(0)), abs=1e-5)


def test_rows_come_as_asked_for_and_repeated(
    levels, tiny_decoder, make_machine, make_part, random_tokens
):
    tiny, tokens = tiny_decoder(), random_tokens(40)
    machine = make_machine(tiny, isa=levels[-1])
    run = machine.alone(tokens)
    rows = machine.decoder.forward(
        [make_part(tokens[:25], 0, [9, 8]), make_part(tokens, 0, [3, 4, 5])],
        machine.kv,
        output_rows=[64, 3, 25, 3],
        temperatures=[1.0, 2.0, 1.0, 0.5],
        hidden_rows=[30, 0],
    )
    assert torch.equal(rows.logits, torch.stack([run.rows[i][4] for i in (39, 3, 0, 3)]))
    assert torch.equal(rows.hidden, torch.stack([run.rows[i][5] for i in (5, 0)]))
    assert rows.log_normalizers[1] != rows.log_normalizers[3]
    assert rows.log_normalizers_1[1] == rows.log_normalizers_1[3]
    nothing = machine.decoder.forward([make_part(tokens, 0, [3, 4, 5])], machine.kv)
    assert [len(part) for part in nothing] == [0] * 6


def test_phases_are_timed_and_change_nothing(
    levels, tiny_decoder, make_machine, make_part, random_tokens
):
    machine = make_machine(tiny_decoder(), isa=levels[-1])
    part = make_part(random_tokens(40), 0, [0, 1, 2])
    ask = {"output_rows": [39], "temperatures": [1.0]}
    untimed = [row.clone() for row in machine.decoder.forward([part], machine.kv, **ask)]
    seconds = array("d", [-1.0] * len(PHASES))
    started = time.perf_counter()
    timed = machine.decoder.forward([part], machine.kv, **ask, phase_seconds=seconds)
    taken = time.perf_counter() - started
    assert PHASES == ("qkv", "attention", "output", "mlp", "head", "candidates")
    assert all(phase > 0 for phase in seconds)
    assert sum(seconds) < taken
    assert all(map(torch.equal, timed, untimed))
    for wrong in (array("d", [0.0] * 5), array("f", [0.0] * 6)):
        with pytest.raises(ValueError, match="; expected 6 of type"):
            machine.decoder.forward([part], machine.kv, phase_seconds=wrong)


def test_only_logits_are_overwritten_by_the_next_forward(
    levels, tiny_decoder, make_machine, make_run
):
    machine = make_machine(tiny_decoder(), isa=levels[-1])
    run = make_run(list(range(40)), range(3))
    first = machine.step((run, 20))
    before = [part.clone() for part in first]
    second = machine.step((run, 20))
    for field, part, kept in zip(first._fields, first, before, strict=True):
        assert torch.equal(part, kept) == (field != "logits"), field
    assert torch.equal(first.logits, second.logits)


def test_the_head_alone_gives_the_logits_of_a_forward(
    levels, tiny_decoder, make_machine, random_tokens
):
    tiny = tiny_decoder(vocab_size=1000)
    for isa in levels:
        machine = make_machine(tiny, threads=2, isa=isa)
        rows = machine.alone(random_tokens(70)).rows
        hidden = torch.stack([row[5] for row in rows])
        expected = torch.stack([row[4] for row in rows])
        for piece in (slice(0, 70), slice(3, 4), slice(10, 27)):
            assert torch.equal(machine.decoder.logits(hidden[piece]), expected[piece])
        every_other = machine.decoder.logits(hidden[::2])
        assert torch.equal(every_other, expected[::2]), "not contiguous"


# --- bits ---

RICH = {
    "layers": [LayerShape(6, 2, 500, window=40), LayerShape(3, 1, 33)],
    "head_dim": 20,
    "hidden_size": 100,
    "biases": True,
    "head_norms": True,
    "rope_rows": 90,
}
MAX_TOKENS = 180
RUN_BLOCKS = -(-MAX_TOKENS // 16)
NUM_BLOCKS = 4 * RUN_BLOCKS
MOST_EMULATED_TOKENS = 120  # in all runs of an example


def assert_equal_runs(machine, run, other_machine, other) -> None:
    assert run.done == other.done
    for position, (ours, theirs) in enumerate(zip(run.rows, other.rows, strict=True)):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b), f"position {position}"
    used = -(-run.done // 16)
    assert torch.equal(run.statistics[:used], other.statistics[:used])
    last = run.done % 16 or 16
    for ours, theirs in zip(machine.kv_of(run), other_machine.kv_of(other), strict=True):
        for index, (a, b) in enumerate(zip(ours[:used], theirs[:used], strict=True)):
            written = last if index == used - 1 else 16
            assert all(torch.equal(x[:written], y[:written]) for x, y in zip(a, b, strict=True)), (
                "KV differs"
            )


@pytest.fixture(scope="module")
def crowd(kv_bits, levels, tiny_decoder, make_machine):
    """Of each level machines of 1, 2 and 3 threads; the first for undisturbed runs."""
    tiny = tiny_decoder(**RICH)
    return {
        isa: [make_machine(tiny, NUM_BLOCKS, threads, isa, kv_bits) for threads in (1, 1, 2, 3)]
        for isa in levels
    }


@st.composite
def pieces(draw: st.DrawFn) -> list[int]:
    """Sizes of the pieces that a sequence is computed in."""
    total = draw(st.integers(1, MAX_TOKENS))
    bounds = draw(st.sets(st.integers(1, MAX_TOKENS), max_size=6))
    bounds = [0, *sorted(b for b in bounds if b < total), total]
    return [b - a for a, b in itertools.pairwise(bounds)]


@given(
    plans=st.lists(pieces(), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**20),
)
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_cut_batch_blocks_and_threads_give_the_bits_of_one_piece_alone(
    crowd, make_run, random_tokens, plans, order, threads, seed
):
    ids = list(range(NUM_BLOCKS))
    order.shuffle(ids)
    schedule = []  # (sequence, count) of each batch
    waiting = [(i, list(plan)) for i, plan in enumerate(plans)]
    while waiting := [(i, plan) for i, plan in waiting if plan]:
        chosen = order.sample(waiting, order.randint(1, len(waiting)))
        schedule.append([(i, plan.pop(0)) for i, plan in chosen])
    for isa, machines in crowd.items():
        if isa == "emulator" and sum(map(sum, plans)) > MOST_EMULATED_TOKENS:
            continue
        runs = [
            make_run(
                random_tokens(sum(plan), seed + i),
                ids[i * RUN_BLOCKS : (i + 1) * RUN_BLOCKS],
                0.5 + 0.3 * i,
            )
            for i, plan in enumerate(plans)
        ]
        for batch in schedule:
            machines[threads].step(*[(runs[i], count) for i, count in batch])
        for run in runs:
            alone = machines[0].alone(run.tokens, run.temperature)
            assert_equal_runs(machines[threads], run, machines[0], alone)


@pytest.mark.soak_on_emulator("int8 KV")
def test_token_by_token_gives_the_bits_of_one_piece(crowd, make_run, random_tokens):
    tokens = random_tokens(MAX_TOKENS, 3)
    for machines in crowd.values():
        run = make_run(tokens, range(20, 20 + RUN_BLOCKS))
        for _ in tokens:
            machines[2].step((run, 1))
        assert_equal_runs(machines[2], run, machines[0], machines[0].alone(tokens))


def test_a_long_context_in_steps_gives_the_bits_of_one_piece(
    kv_bits, levels, tiny_decoder, make_machine, make_run, random_tokens
):
    """Several threads share the chunks of one token's context, and merge them."""
    shapes = [LayerShape(4, 1, 64), LayerShape(2, 2, 64, window=300)]
    tiny = tiny_decoder(layers=shapes, head_dim=20)
    for isa in levels:
        first = 340 if isa == "emulator" else 1000  # several chunks, and beyond the window
        tokens = random_tokens(first + 100)
        quiet, machine = (make_machine(tiny, 69, n, isa, kv_bits) for n in (1, 3))
        run = make_run(tokens, range(69))
        for count in (first, 1, 1, 2, 16, 17, 1, 62):
            machine.step((run, count))
        alone = quiet.alone(tokens)
        assert_equal_runs(machine, run, quiet, alone)


@pytest.mark.parametrize("neurons", [1, 33, 1100, 8300])
def test_few_and_many_tokens_add_up_neurons_alike(
    neurons, levels, tiny_decoder, make_machine, make_run, random_tokens
):
    shape = {"hidden_size": 48, "head_dim": 20, "layers": [LayerShape(1, 1, neurons)] * 2}
    tiny, tokens = tiny_decoder(**shape), random_tokens(60)
    for isa in levels:
        quiet, machine = make_machine(tiny, 4, 1, isa), make_machine(tiny, 4, 3, isa)
        run = make_run(tokens, range(4))
        for count in (1, 4, 5, 16, 17, 17):
            machine.step((run, count))
        assert_equal_runs(machine, run, quiet, quiet.alone(tokens))


def test_forty_sequences_at_once_equal_each_alone(
    kv_bits, levels, tiny_decoder, make_machine, make_run, random_tokens
):
    tiny = tiny_decoder(**RICH)
    for isa in levels:
        machine = make_machine(tiny, 40, 3, isa, kv_bits)
        quiet = make_machine(tiny, 2, 1, isa, kv_bits)
        runs = [make_run(random_tokens(6, i), [39 - i]) for i in range(40)]
        machine.step(*[(run, 4) for run in runs])
        for _ in range(2):
            machine.step(*[(run, 1) for run in runs])
        for run in runs[::13]:
            assert_equal_runs(machine, run, quiet, quiet.alone(run.tokens))


@pytest.mark.soak_on_emulator("int8 KV")
def test_repetition_gives_the_same_bits(crowd, make_run, random_tokens):
    for machines in crowd.values():
        first = machines[3].alone(random_tokens(100))
        for _ in range(10):
            again = machines[3].alone(random_tokens(100))
            assert_equal_runs(machines[3], again, machines[3], first)


def test_what_blocks_held_before_has_no_effect_even_if_it_was_not_finite(
    crowd, make_run, random_tokens
):
    for machines in crowd.values():
        tokens = random_tokens(75)
        expected = machines[0].alone(tokens)
        with machines[2].changed_kv() as kv:
            kv.view(torch.bfloat16).fill_(float("nan"))
        run = make_run(tokens, range(9, 14))
        for count in (3, 40, 20, 12):
            machines[2].step((run, count))
        with machines[2].changed_kv() as kv:
            kv.zero_()
        again = make_run(tokens, range(9, 14))
        machines[2].step((again, 75))
        assert_equal_runs(machines[2], again, machines[0], expected)
        for ours, theirs in zip(run.rows, expected.rows, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("vocab", [50, 1000, 20000])
def test_a_sequence_that_is_not_finite_harms_nobody_else(
    vocab, kv_bits, levels, tiny_decoder, make_machine, make_run, random_tokens
):
    tiny, tokens = tiny_decoder(vocab_size=vocab), random_tokens(40)
    for isa in levels:
        quiet = make_machine(tiny, isa=isa, kv_bits=kv_bits)
        machine = make_machine(tiny, threads=2, isa=isa, kv_bits=kv_bits)
        bad = make_run(tokens, [machine.num_blocks - 1, 9, 10])
        good = make_run(tokens, [3, 2, 1])
        machine.step((bad, 30), (good, 30))
        # Of the bad one's first block: values, or with 8 bits scales of keys and values.
        with machine.changed_kv() as kv:
            kv.view(torch.bfloat16)[-32:] = float("nan")
        for count in (1, 2, 7):
            machine.step((bad, count), (good, count))
        assert_equal_runs(machine, good, quiet, quiet.alone(tokens))
        for ids, _, _, _, row, _ in bad.rows[30:]:
            assert row.isnan().all()
            assert ids.tolist() == list(range(min(256, vocab))), "no number: by id"


def test_what_is_seen_shows_even_where_a_window_leaves_it_alone_in_its_chunk(
    kv_bits, levels, tiny_decoder, make_machine, make_run, random_tokens
):
    tiny = tiny_decoder(layers=[LayerShape(4, 2, 96, window=2)])
    for isa in levels:
        machine = make_machine(tiny, isa=isa, kv_bits=kv_bits)
        run = make_run(random_tokens(129), range(9))
        machine.step((run, 128))
        with machine.changed_kv() as kv:
            kv.view(torch.bfloat16).view(machine.num_blocks, -1)[7] = float("nan")
        machine.step((run, 1))  # sees position 127, the last of a chunk of 128, and itself
        assert run.rows[128][4].isnan().all(), isa


@pytest.mark.parametrize("name", ["k", "v"])
def test_keys_and_values_that_overflow_reach_those_that_see_them(
    name, levels, tiny_decoder, make_machine, random_tokens
):
    tiny = tiny_decoder()
    getattr(tiny.layers[0], name)[3] = 3e38
    for isa in levels:
        finite = []
        for kv_bits in (16, 8):
            rows = make_machine(tiny, isa=isa, kv_bits=kv_bits).alone(random_tokens(40)).rows
            finite.append([bool(row[4].isfinite().all()) for row in rows])
        assert finite[0] == finite[1], isa
        assert not all(finite[0])


def test_keys_and_values_of_zeros(
    kv_bits, levels, tiny_decoder, make_machine, random_tokens, oracle
):
    tiny, tokens = tiny_decoder(), random_tokens(40)
    tiny.layers[0].v.zero_()
    tiny.layers[1].k.zero_()
    _, logits, _, _ = oracle(tiny, tokens, kv_bits)
    for isa in levels:
        run = make_machine(tiny, isa=isa, kv_bits=kv_bits).alone(tokens)
        assert_near(torch.stack([row[4] for row in run.rows]), logits, isa, "logits", kv_bits)


@pytest.mark.parametrize("head_dim", [512, 1024])
def test_the_largest_sums_of_whole_numbers_fit(
    head_dim, levels, tiny_decoder, make_machine, random_tokens, oracle
):
    """All numbers of a query and of a key are their largest multiple."""
    tiny = tiny_decoder(head_dim=head_dim, layers=[LayerShape(2, 1, 33)])
    still = replace(tiny.config, rope_frequencies=torch.zeros(1, head_dim // 2))
    tiny, tokens = replace(tiny, config=still), random_tokens(200)
    for matrix in (tiny.layers[0].q, tiny.layers[0].k):
        matrix.copy_(matrix[:1] * head_dim**-0.25)
    _, logits, _, _ = oracle(tiny, tokens, 8)
    for isa in levels:
        run = make_machine(tiny, isa=isa, kv_bits=8).alone(tokens)
        assert_near(torch.stack([row[4] for row in run.rows]), logits, isa, "logits", 8)


def test_activations_that_overflow_count_nowhere(levels, tiny_decoder, make_machine, random_tokens):
    tiny = tiny_decoder()
    tiny.layers[0].gate[5] = tiny.layers[0].up[5] = 1e25
    for isa in levels:
        run = make_machine(tiny, isa=isa).alone(random_tokens(100))
        assert not all(row[5].isfinite().all() for row in run.rows)
        assert (run.statistics >= 0).all()
        # Each token's scores are 1 in sum, up to rounding.
        assert (run.statistics.sum(dim=2) <= 16 * (2**32 + 96)).all()


def test_the_lowest_temperature_leaves_the_largest_alone(levels, tiny_decoder, make_machine):
    for isa in levels:
        run = make_machine(tiny_decoder(), isa=isa).alone([1, 2, 3], temperature=1e-44)
        for _, logits, cold, *_ in run.rows:
            assert logits[0] > logits[1]
            assert cold == 0


def test_no_block_but_its_own_is_written(crowd, make_run, random_tokens):
    for machines in crowd.values():
        machine = machines[2]
        with machine.changed_kv() as kv:
            kv.fill_(7)
        run = make_run(random_tokens(40), [5, 11, 2])
        machine.step((run, 40))
        everyone = make_run([], range(NUM_BLOCKS))
        for blocks in machine.blocks_of(everyone):
            untouched = (blocks.view(torch.uint8) == 7).all(dim=1)
            assert [i for i in range(NUM_BLOCKS) if not untouched[i]] == [2, 5, 11]
        with machine.changed_kv() as kv:
            kv.zero_()


# --- tensor parallelism ---


def half(tiny, rank: int):
    """One of two ranks: half of the heads and of the neurons of each layer."""

    def rows(tensor: Matrix | None) -> Matrix | None:
        if not isinstance(tensor, QuantizedMatrix):
            return None if tensor is None else tensor.chunk(2)[rank].contiguous()
        factors = tensor.factors
        if factors is not None:
            factors = Factors(rows(factors.codes), rows(factors.scales))
        codes, scales, zeros = (rows(t) for t in (tensor.codes, tensor.scales, tensor.zeros))
        return replace(tensor, codes=codes, scales=scales, zeros=zeros, factors=factors)

    def columns(tensor: Matrix | None) -> Matrix | None:
        """Of a low-rank term it has all of B."""
        if not isinstance(tensor, QuantizedMatrix):
            return None if tensor is None else tensor.chunk(2, dim=1)[rank].contiguous()
        codes, scales, zeros = (columns(t) for t in (tensor.codes, tensor.scales, tensor.zeros))
        return replace(tensor, codes=codes, scales=scales, zeros=zeros)

    config = tiny.config
    shapes = [
        LayerShape(s.num_heads // 2, s.num_kv_heads // 2, s.intermediate_size // 2, s.window)
        for s in config.layers
    ]
    own = DecoderConfig(
        config.hidden_size,
        config.vocab_size,
        config.head_dim,
        config.rms_norm_eps,
        config.rope_frequencies,
        shapes,
    )
    layers = [
        LayerTensors(
            q=rows(layer.q),
            k=rows(layer.k),
            v=rows(layer.v),
            output=columns(layer.output),
            gate=rows(layer.gate),
            up=rows(layer.up),
            down=rows(layer.down) if tiny.formats.down.quantized else columns(layer.down),
            attention_norm=layer.attention_norm,
            mlp_norm=layer.mlp_norm,
            q_bias=rows(layer.q_bias),
            k_bias=rows(layer.k_bias),
            v_bias=rows(layer.v_bias),
            # A part of the sum over all ranks: one of them has it.
            output_bias=None if rank else layer.output_bias,
            down_bias=layer.down_bias if rank else None,
            qkv_basis=layer.qkv_basis,
            output_basis=columns(layer.output_basis),
            gate_up_basis=layer.gate_up_basis,
            down_basis=layer.down_basis,
        )
        for layer in tiny.layers
    ]
    ends = EndTensors(tiny.ends.embedding, tiny.ends.norm, tiny.ends.lm_head)
    return type(tiny)(own, ends, layers, tiny.formats)


@pytest.mark.parametrize(
    ("biases", "format"),
    [(False, BFLOAT16), (True, BFLOAT16), (True, MatrixFormat(4, 32, rank=32))],
    ids=str,
)
def test_two_ranks_with_half_the_heads_and_neurons_are_the_whole_model(
    biases, format, cpu_levels, tiny_decoder, make_machine, make_run, random_tokens, monkeypatch
):
    shapes = [LayerShape(4, 2, 200), LayerShape(8, 4, 96)]
    tiny = tiny_decoder(biases=biases, layers=shapes, formats=DecoderFormats(*3 * [format]))
    barrier, sums = threading.Barrier(2), {}

    def hook(rank: int) -> Callable[..., None]:
        def add_up(context: int | None, data: "ctypes._Pointer[ctypes.c_float]", n: int) -> None:
            assert context == 1 + rank
            array = (ctypes.c_float * n).from_address(ctypes.addressof(data.contents))
            own = torch.frombuffer(array, dtype=torch.float32)
            sums[rank] = own.clone()
            barrier.wait(20)
            own.copy_(sums[0] + sums[1])
            barrier.wait(20)  # before the next sums come

        return add_up

    real = decoder_module.model_arguments
    kind = dict(_abi.sk_reduce._fields_)["add_up"]
    hooks = [kind(hook(rank)) for rank in range(2)]

    def make_rank(rank: int, isa: str):
        def hooked(*args, **kwargs):
            arguments = real(*args, **kwargs)
            arguments.reduce.add_up, arguments.reduce.context = hooks[rank], 1 + rank
            return arguments

        with monkeypatch.context() as patch:
            patch.setattr(decoder_module, "model_arguments", hooked)
            return make_machine(half(tiny, rank), threads=1 + rank, isa=isa)

    tokens = random_tokens(60)
    for isa in cpu_levels:
        whole = make_machine(tiny, isa=isa).alone(tokens)
        runs = [make_run(tokens, range(4)) for _ in range(2)]
        machines = [make_rank(rank, isa) for rank in range(2)]

        def work(rank: int, runs=runs, machines=machines) -> None:
            for count in (40, 1, 3, 16):  # with few and with many tokens
                machines[rank].step((runs[rank], count))

        other = threading.Thread(target=work, args=(1,))
        other.start()
        work(0)
        other.join()
        for first, second, expected in zip(runs[0].rows, runs[1].rows, whole.rows, strict=True):
            assert torch.equal(first[4], second[4])
            # Inputs of integers are rounded by groups, which ranks have in parts.
            tolerance = 2e-2 if format.quantized else 2e-3
            torch.testing.assert_close(first[4], expected[4], atol=tolerance, rtol=1e-4)
        for name in range(2):  # their neurons, side by side
            neurons = [run.statistics[:, name].sum(0) for run in runs]
            size = tiny.config.layers[name].intermediate_size // 2
            assert all(part[:size].any() for part in neurons)
