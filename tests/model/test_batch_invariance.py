"""A sequence's output is the same to the bit whatever shares its batch, however its prompt is cut,
wherever its blocks are."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_kernels.reference import block_of
from sparse_kernels.weights import LayerShape
from sparserve.model.backend import (
    BLOCK_SIZE,
    Backend,
    ForwardBatch,
    ForwardOutput,
    Phase,
    SequenceInput,
)
from sparserve.model.loader import load_model
from sparserve.sparsity.statistics import NeuronStatistics

NUM_BLOCKS = 64
MAX_TOKENS = 220  # several prefill tiles
MAX_BLOCKS = -(-MAX_TOKENS // BLOCK_SIZE)


@dataclass
class Run:
    """One sequence on a backend: tokens, the blocks it owns and all that came out so far."""

    tokens: Sequence[int]
    table: Sequence[int]
    temperature: float = 1.0
    done: int = 0
    rows: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    statistics: NeuronStatistics | None = None

    def span(self, count: int, phase: Phase) -> SequenceInput:
        return SequenceInput(
            self.tokens[self.done : self.done + count],
            self.done,
            self.table,
            phase,
            output_offsets=tuple(range(count)),
            temperature=self.temperature,
            collect_statistics=True,
        )

    def take(self, output: ForwardOutput, first_row: int, index: int, count: int) -> None:
        c = output.candidates
        for row in range(first_row, first_row + count):
            parts = (c.token_ids, c.logits, c.log_normalizer, c.log_normalizer_1)
            self.rows.append((*(part[row] for part in parts), c.full_logits(row).clone()))
        for part in output.statistics[index]:  # one for each block
            if self.statistics is None:
                self.statistics = part
            else:
                self.statistics += part
        self.done += count


Step = tuple[Run, int, Phase]


def forward(backend: Backend, *steps: Step) -> None:
    """One batch of steps of different runs."""
    output = backend.forward(ForwardBatch([run.span(count, phase) for run, count, phase in steps]))
    first_row = 0
    for index, (run, count, _) in enumerate(steps):
        run.take(output, first_row, index, count)
        first_row += count


def written_kv(backend: Backend, run: Run) -> torch.Tensor:
    """K and V of the run's positions, in their order."""
    blocks, config = backend.read_blocks(run.table), backend.config
    if backend.info.name == "cpu":  # of each layer the elements of the native layout
        blocks = blocks.view(len(blocks), config.num_layers, -1)
        shape = LayerShape(config.num_heads, config.num_kv_heads, config.intermediate_size)
        parts = [[block_of(shape, config.head_dim, 16, p) for p in block] for block in blocks]
        blocks = torch.stack([torch.stack([torch.stack(kv) for kv in part]) for part in parts])
    blocks = blocks.view(
        len(blocks), config.num_layers, 2, BLOCK_SIZE, config.num_kv_heads, config.head_dim
    )
    return blocks.movedim(3, 1).flatten(0, 1)[: run.done]


def assert_same(backend: Backend, run: Run, other_backend: Backend, other: Run) -> None:
    assert run.done == other.done
    for position, (ours, theirs) in enumerate(zip(run.rows, other.rows, strict=True)):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b), f"outputs differ at position {position}"
    assert torch.equal(written_kv(backend, run), written_kv(other_backend, other)), "KV differs"
    assert run.statistics.tokens == other.statistics.tokens
    assert torch.equal(run.statistics.sums, other.statistics.sums), "statistics differ"


def random_tokens(count: int, seed: int) -> list[int]:
    return torch.randint(0, 259, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass
class Bench:
    """A backend whose blocks hold the rests of earlier sequences, and one for undisturbed runs."""

    crowded: Backend
    quiet: Backend

    def alone(self, tokens: Sequence[int], prefilled: int, temperature: float = 1.0) -> Run:
        """The prompt in one piece, then one token at a time, with nobody else."""
        run = Run(tokens, range(MAX_BLOCKS), temperature)
        forward(self.quiet, (run, prefilled, Phase.PREFILL))
        while run.done < len(tokens):
            forward(self.quiet, (run, 1, Phase.DECODE))
        return run

    def assert_as_alone(self, run: Run, prefilled: int) -> None:
        alone = self.alone(run.tokens[: run.done], prefilled, run.temperature)
        assert_same(self.crowded, run, self.quiet, alone)


# All that a family may add at once: biases, norms of heads, a window in one of the layers (across
# tiles of a prompt), frequencies that change with the position.
EVERYTHING = {
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 16,
    "attention_bias": True,
    "use_sliding_window": True,
    "sliding_window": 50,
    "max_window_layers": 1,
    "max_position_embeddings": 100,
    "rope_scaling": {"type": "dynamic", "factor": 2.5},
}
CHECKPOINTS = {
    "float32": ("reference", torch.float32, {}),
    "bfloat16": ("reference", torch.bfloat16, {}),
    "float16": ("reference", torch.float16, {}),
    "everything": ("reference", torch.float32, EVERYTHING),
    "everything in bfloat16": ("reference", torch.bfloat16, EVERYTHING),
    "native": ("cpu", torch.bfloat16, {}),
    "everything native": ("cpu", torch.bfloat16, EVERYTHING),
}


@pytest.fixture(scope="module", params=CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def bench(request, write_tiny_checkpoint, tmp_path_factory, make_backend) -> Bench:
    kind, dtype, overrides = request.param
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), dtype=dtype, **overrides)
    model = load_model(str(folder))
    assert model.weights.dtype == dtype
    # The crowd has two native threads, a run alone one.
    threads = 2 if kind == "cpu" else 1
    crowded = make_backend(model, NUM_BLOCKS, threads, kind)
    return Bench(crowded, make_backend(model, NUM_BLOCKS, kind=kind))


def cuts(draw: st.DrawFn, total: int, most: int) -> list[int]:
    """Sizes of pieces that add up to `total`."""
    points = draw(st.sets(st.integers(1, max(total - 1, 1)), max_size=most))
    bounds = [0, *sorted(p for p in points if p < total), total]
    return [b - a for a, b in itertools.pairwise(bounds)] if total else []


@st.composite
def plans(draw: st.DrawFn) -> tuple[int, list[tuple[int, Phase]]]:
    """(prompt tokens, steps): a prompt cut somehow, then decoded tokens in spans of some lengths."""
    prompt, decoded = draw(st.integers(1, MAX_TOKENS - 12)), draw(st.integers(0, 12))
    steps = [(count, Phase.PREFILL) for count in cuts(draw, prompt, 5)]
    return prompt, steps + [(count, Phase.DECODE) for count in cuts(draw, decoded, 6)]


@given(
    drawn=st.lists(plans(), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 2**20),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_cut_of_any_mixed_batch_over_any_blocks_equals_each_sequence_alone(
    bench, drawn, order, seed
):
    ids = list(range(NUM_BLOCKS))
    order.shuffle(ids)
    runs = []
    for i, (_, steps) in enumerate(drawn):
        tokens = random_tokens(sum(count for count, _ in steps), seed + i)
        table = ids[i * MAX_BLOCKS : (i + 1) * MAX_BLOCKS]
        runs.append(Run(tokens, table, temperature=0.5 + 0.3 * i))
    waiting = [(run, list(steps)) for run, (_, steps) in zip(runs, drawn, strict=True)]
    while waiting := [(run, steps) for run, steps in waiting if steps]:
        chosen = order.sample(waiting, order.randint(1, len(waiting)))
        forward(bench.crowded, *[(run, *steps.pop(0)) for run, steps in chosen])
    for run, (prompt, _) in zip(runs, drawn, strict=True):
        bench.assert_as_alone(run, prompt)


def test_a_batch_of_prefill_chunks_and_decodes_equals_each_alone(bench):
    decoding = Run(random_tokens(75, 1), [9, 4, 7, 2, 5], temperature=0.7)
    forward(bench.crowded, (decoding, 70, Phase.PREFILL))
    chunked, fresh = Run(random_tokens(150, 2), range(20, 30)), Run(random_tokens(3, 3), [11])
    late = Run(random_tokens(18, 4), [13, 12])
    forward(bench.crowded, (late, 17, Phase.PREFILL), (chunked, 33, Phase.PREFILL))
    forward(
        bench.crowded,
        (decoding, 1, Phase.DECODE),
        (chunked, 90, Phase.PREFILL),
        (late, 1, Phase.DECODE),
        (fresh, 3, Phase.PREFILL),
    )
    forward(bench.crowded, (chunked, 27, Phase.PREFILL), (decoding, 4, Phase.DECODE))
    for run, prefilled in ((decoding, 70), (chunked, 150), (fresh, 3), (late, 17)):
        bench.assert_as_alone(run, prefilled)


@pytest.mark.parametrize(
    "pieces",
    [[1] * 66, [63, 1, 2], [64, 2], [65, 1], [5, 16, 16, 29]],
    ids=["single tokens", "63+1+2", "64+2", "65+1", "5+16+16+29"],
)
def test_a_prompt_in_chunks_equals_the_prompt_in_one_piece(bench, pieces):
    run = Run(random_tokens(66, 5), [3, 1, 4, 15, 9])
    for piece in pieces:
        forward(bench.crowded, (run, piece, Phase.PREFILL))
    bench.assert_as_alone(run, 66)


def test_a_prompt_around_a_tile_border_does_not_feel_its_length(bench):
    tokens = random_tokens(130, 6)
    whole = bench.alone(tokens, 130)
    for length in (1, 63, 64, 65, 127, 128, 129):
        part = Run(tokens[:length], range(9, 18))
        forward(bench.crowded, (part, length, Phase.PREFILL))
        for ours, theirs in zip(part.rows, whole.rows[:length], strict=True):
            assert torch.equal(ours[-1], theirs[-1])


@pytest.mark.parametrize("spans", [[7], [2, 5], [1, 1, 5], [3, 3, 1]], ids=str)
def test_several_decoded_tokens_at_once_equal_single_steps(bench, spans):
    run = Run(random_tokens(47, 8), [6, 8, 7])
    forward(bench.crowded, (run, 40, Phase.PREFILL))
    for count in spans:
        forward(bench.crowded, (run, count, Phase.DECODE))
    bench.assert_as_alone(run, 40)


def test_sixty_decodes_at_once_equal_each_alone(bench):
    runs = [Run(random_tokens(4, 100 + i), [i]) for i in range(60)]
    forward(bench.crowded, *[(run, 3, Phase.PREFILL) for run in runs])
    forward(bench.crowded, *[(run, 1, Phase.DECODE) for run in runs])
    for run in (runs[0], runs[17], runs[58], runs[59]):
        bench.assert_as_alone(run, 3)


def test_what_the_blocks_held_before_has_no_effect_even_if_it_was_not_finite(bench):
    everything = range(NUM_BLOCKS)
    # Bytes of 255 are NaN in bfloat16.
    poison = bench.crowded.read_blocks(everything)
    poison.fill_(255 if poison.dtype == torch.uint8 else float("nan"))
    before = bench.crowded.read_blocks(everything)
    bench.crowded.write_blocks(everything, poison)
    run = Run(random_tokens(100, 9), range(50, 57))
    forward(bench.crowded, (run, 10, Phase.PREFILL))
    forward(bench.crowded, (run, 80, Phase.PREFILL))
    forward(bench.crowded, (run, 10, Phase.DECODE))
    bench.crowded.write_blocks(everything, before)
    forward(bench.crowded, (again := Run(run.tokens, range(50, 57)), 90, Phase.PREFILL))
    forward(bench.crowded, (again, 10, Phase.DECODE))
    bench.assert_as_alone(again, 90)
    for ours, theirs in zip(run.rows, again.rows, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_blocks_written_back_elsewhere_go_on_as_if_they_had_never_moved(bench):
    run = Run(random_tokens(60, 10), [2, 30, 17, 5])
    forward(bench.crowded, (run, 41, Phase.PREFILL))
    forward(bench.crowded, (run, 9, Phase.DECODE))
    saved = bench.crowded.read_blocks(run.table)
    copy = saved.clone()
    intruder = Run(random_tokens(64, 11), run.table)
    forward(bench.crowded, (intruder, 64, Phase.PREFILL))
    assert torch.equal(saved, copy), "read_blocks returns a copy"
    run.table = [40, 3, 1, 62]
    bench.crowded.write_blocks(run.table, saved)
    assert torch.equal(bench.crowded.read_blocks(run.table), saved)
    forward(bench.crowded, (run, 10, Phase.DECODE))
    bench.assert_as_alone(run, 41)


def test_write_blocks_touches_no_other_block(bench):
    others = [i for i in range(NUM_BLOCKS) if i not in (7, 8)]
    before = bench.crowded.read_blocks(others)
    bench.crowded.write_blocks([8, 7], torch.ones_like(bench.crowded.read_blocks([7, 8])))
    assert torch.equal(bench.crowded.read_blocks(others), before)
    assert bool((bench.crowded.read_blocks([7]) == 1).all())


def test_statistics_come_only_for_those_who_asked(bench):
    tokens = random_tokens(20, 12)
    spans = [
        SequenceInput(tokens, 0, [0, 1], Phase.PREFILL),
        SequenceInput(tokens, 0, [2, 3], Phase.PREFILL, collect_statistics=True),
    ]
    output = bench.crowded.forward(ForwardBatch(spans))
    assert output.statistics[0] is None
    assert [part.tokens for part in output.statistics[1]] == [15, 4]
    assert len(output.candidates.token_ids) == 0, "no row was asked for"


def test_statistics_leave_out_position_0(bench):
    sums = []
    for first in (1, 200):
        tokens = [first, *random_tokens(1, 13)]
        run = Run(tokens, [5])
        forward(bench.crowded, (run, 1, Phase.PREFILL))
        assert run.statistics.tokens == 0
        assert not run.statistics.sums.any()
        forward(bench.crowded, (run, 1, Phase.PREFILL))
        assert run.statistics.tokens == 1
        sums.append(run.statistics.sums.sum(dim=1) / 2**32)
    torch.testing.assert_close(sums[0], torch.ones_like(sums[0]), atol=1e-6, rtol=0)


def test_output_rows_stand_in_the_order_of_the_batch_and_of_the_offsets(bench, all_logits):
    tokens = random_tokens(30, 14)
    run = bench.alone(tokens, 20)
    forward(bench.crowded, (decoding := Run(tokens, [4, 5]), 20, Phase.PREFILL))
    spans = [
        SequenceInput(tokens[20:23], 20, decoding.table, Phase.DECODE, output_offsets=(2, 0)),
        SequenceInput(tokens[:5], 0, [9], Phase.PREFILL),
        SequenceInput(tokens[:7], 0, [8], Phase.PREFILL, output_offsets=(6, 1, 4)),
    ]
    logits = all_logits(bench.crowded.forward(ForwardBatch(spans)))
    expected = torch.stack([run.rows[position][-1] for position in (22, 20, 6, 1, 4)])
    assert torch.equal(logits, expected)


def test_each_row_is_normalized_at_its_own_sequences_temperature(bench, all_logits):
    tokens = random_tokens(5, 15)
    spans = [
        SequenceInput(tokens, 0, [i], Phase.PREFILL, output_offsets=(3, 4), temperature=temperature)
        for i, temperature in enumerate((0.25, 3.0))
    ]
    output = bench.crowded.forward(ForwardBatch(spans))
    logits = all_logits(output).double()
    below_top = logits - logits.max(dim=1, keepdim=True).values
    temperatures = torch.tensor([0.25, 0.25, 3.0, 3.0])[:, None]
    for actual, scaled in (
        (output.candidates.log_normalizer, below_top / temperatures),
        (output.candidates.log_normalizer_1, below_top),
    ):
        torch.testing.assert_close(actual.double(), scaled.logsumexp(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "threads"), [("reference", 1), ("cpu", 2)])
def test_the_demo_model_alone_equals_itself_in_a_mixed_batch(request, make_backend, kind, threads):
    """The same at a real model's shapes, whose products and sums take other paths of the library,
    and on two threads, which may share a row's sum between them."""
    model = request.getfixturevalue("demo_model" if kind == "reference" else "demo_bfloat16")
    backend: Backend = make_backend(model, NUM_BLOCKS, threads, kind)
    alone = Run(random_tokens(75, 16), range(5))
    forward(backend, (alone, 72, Phase.PREFILL))
    for _ in range(3):
        forward(backend, (alone, 1, Phase.DECODE))
    run, mate = Run(alone.tokens, [11, 9, 12, 8, 13]), Run(random_tokens(70, 17), range(30, 36))
    other = Run(random_tokens(4, 18), [40])
    forward(backend, (mate, 30, Phase.PREFILL), (run, 41, Phase.PREFILL))
    forward(backend, (run, 31, Phase.PREFILL), (mate, 2, Phase.DECODE), (other, 3, Phase.PREFILL))
    forward(backend, (other, 1, Phase.DECODE), (mate, 5, Phase.DECODE), (run, 3, Phase.DECODE))
    assert_same(backend, run, backend, alone)
