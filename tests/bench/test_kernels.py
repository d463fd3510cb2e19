"""Figures of the phases against their definitions and against the packed weights."""

from array import array
from types import SimpleNamespace

import pytest
import torch

from sparse_kernels import native
from sparse_kernels.decoder import PHASES
from sparse_kernels.formats import DecoderFormats
from sparse_kernels.kv_memory import HostMemory
from sparse_kernels.weights import DecoderConfig, LayerShape
from sparserve.bench import kernels
from sparserve.bench.kernels import (
    LEVELS,
    Plan,
    Point,
    check_plan,
    choose_levels,
    phase_bytes,
    phase_operations,
    run_kernels,
)
from sparserve.config import EngineSettings
from sparserve.engine.factory import make_decoders
from sparserve.errors import ConfigError
from sparserve.model.native import NativeBackend
from sparserve.model.weights import layer_shapes

CEILINGS = (20.0, 10.0, 40.0)  # GB/s


@pytest.fixture
def mixed() -> DecoderConfig:
    """Two layers of different shapes, one of them with a window of 8 positions."""
    layers = [LayerShape(4, 2, 96), LayerShape(2, 1, 32, window=8)]
    return DecoderConfig(64, 50, 16, 1e-5, torch.ones(8), layers)


@pytest.fixture
def ceilings(monkeypatch):
    """Sizes that the ceiling was measured over; the ceilings are made up."""
    asked = []

    def probe(buffer_bytes, threads, seconds):
        asked.append(buffer_bytes)
        return SimpleNamespace(gb_per_s=CEILINGS[len(asked) - 1])

    monkeypatch.setattr(kernels, "read_probe", probe)
    return asked


class Made:
    """A decoder whose every phase takes so many seconds, per step."""

    threads, kv_block_bytes, formats, kv_bits = 2, 4096, DecoderFormats(), 16

    def __init__(self, config, *seconds):
        self.config, self._seconds = config, iter(seconds)
        self.batches = []

    def forward(self, sequences, kv, *, output_rows, temperatures, prompts, phase_seconds):
        assert not prompts  # of bfloat16 weights there is one way
        assert len(output_rows) == len(temperatures) == len(sequences)
        assert max(max(s.block_table) for s in sequences) < kv.nbytes // self.kv_block_bytes
        self.batches.append(sequences)
        phase_seconds[:] = array("d", [next(self._seconds)] * len(PHASES))

    def new_kv(self, blocks):
        return HostMemory(blocks * self.kv_block_bytes)


def test_weights_of_all_phases_are_those_that_a_step_reads(tiny_bfloat16):
    config = tiny_bfloat16.config
    vectors = [s[0] for s in layer_shapes(config, 0).values() if len(s) == 1] * config.num_layers
    head = config.vocab_size * config.hidden_size
    for dtype, head_bytes in (("bfloat16", 2 * head), ("int4", head + 3 * config.vocab_size)):
        own = EngineSettings(threads=1, dtype=dtype)
        (decoder,) = make_decoders(tiny_bfloat16, own, ["portable"])
        info = NativeBackend(config, decoder, num_blocks=1).info
        found = phase_bytes(decoder.config, Point("decode", 3, 20), decoder.formats)
        matrices = info.weight_bytes - 4 * (sum(vectors) + config.hidden_size)
        assert sum(found.values()) - found["attention"] == matrices
        assert found["attention"] == 3 * 21 * 2 * 2 * 2 * 2 * config.head_dim
        assert found["mlp"] == info.mlp_bytes
        assert found["head"] == head_bytes
        assert sorted(found) == sorted(PHASES)


@pytest.mark.parametrize(
    ("point", "all_seen", "window_seen", "pairs", "window_pairs"),
    [
        (Point("decode", 1, 5), 6, 6, 6, 6),
        (Point("decode", 3, 20), 21, 8, 21, 8),
        (Point("prefill", 1, 20), 20, 20, 210, 36 + 12 * 8),
    ],
)
def test_attention_reads_and_computes_what_is_seen(
    mixed, point, all_seen, window_seen, pairs, window_pairs
):
    kv, ops = phase_bytes(mixed, point), phase_operations(mixed, point)
    assert kv["attention"] == point.batch * (2 * all_seen + window_seen) * 2 * 16 * 2
    int8 = phase_bytes(mixed, point, kv_bits=8)
    assert int8["attention"] == point.batch * (2 * all_seen + window_seen) * 2 * (16 + 2)
    assert {**int8, "attention": 0} == {**kv, "attention": 0}
    assert ops["attention"] == point.batch * (4 * pairs + 2 * window_pairs) * 4 * 16
    tokens = point.batch * point.new_tokens
    assert ops["mlp"] == 2 * tokens * 3 * 64 * (96 + 32)
    assert ops["head"] == 2 * point.batch * 64 * 50


def test_rows_are_medians_of_the_rounds_beside_their_own_ceiling(mixed, ceilings):
    plan = Plan(["avx2", "amx"], [3], 20, 0, rounds=3)
    # A step to warm up, then 8 in each of the rounds.
    slow = Made(mixed, 1.0, *[0.01] * 8, *[0.02] * 8, *[0.04] * 4, *[0.06] * 4)
    fast = Made(mixed, 1.0, *[0.001] * 24)
    told = []
    report = run_kernels([slow, fast], plan, model="m", on_progress=lambda *what: told.append(what))
    rows = {(row.level, row.phase): row for row in report.rows}
    assert list(rows) == [(level, p) for level in plan.levels for p in (*PHASES, "step")]
    mlp, size = rows["avx2", "mlp"], 3 * 64 * (96 + 32) * 2
    assert (mlp.step, mlp.batch, mlp.context, mlp.bytes) == ("decode", 3, 20, size)
    assert mlp.milliseconds == pytest.approx(20)  # of 10, 20 and 50
    assert mlp.gb_per_second == round(size / 1e9 / 0.02, 2)
    shares = [size / 1e7 / s / c for s, c in zip((0.01, 0.02, 0.05), CEILINGS, strict=True)]
    assert mlp.percent_of_ceiling == round(sorted(shares)[1], 1)
    assert mlp.gflops == round(2 * 3 * 3 * 64 * 128 / 1e9 / 0.02, 2)
    step, bytes_of = rows["amx", "step"], phase_bytes(mixed, plan.points[0])
    assert step.milliseconds == pytest.approx(6)
    assert step.bytes == sum(bytes_of.values())
    assert report.read_ceiling_gb_s == 20.0
    assert ceilings == [max(step.bytes, 2 * 65536)] * 3
    assert told[0] == ("kernels", 0, 8)
    assert told[-1] == ("kernels", 8, 8)


def test_a_decode_step_stands_after_its_context_and_a_prompt_at_the_beginning(mixed, ceilings):
    decoder = Made(mixed, *[0.01] * 11)
    plan = Plan(["avx2"], [2], 20, 33, rounds=1)
    run_kernels([decoder], plan, model="m", on_progress=lambda *_: None)
    decode, prompt = decoder.batches[0], decoder.batches[-1]
    assert [(s.start, len(s.token_ids), list(s.block_table)) for s in decode] == [
        (20, 1, [0, 1]),
        (20, 1, [2, 3]),
    ]
    assert [(s.start, len(s.token_ids), list(s.block_table)) for s in prompt] == [
        (0, 33, [0, 1, 2])
    ]


def test_levels_are_those_of_this_cpu_in_their_order():
    highest = native.cpu_features().highest_isa
    assert LEVELS == ("portable", "avx2", "avx512", "amx")
    assert choose_levels("auto") == list(LEVELS[: LEVELS.index(highest) + 1])
    assert choose_levels(f"{highest}, portable,{highest}") == sorted(
        {"portable", highest}, key=LEVELS.index
    )


def test_levels_that_cannot_be_had_are_refused(monkeypatch):
    monkeypatch.setattr(kernels, "cpu_features", lambda: SimpleNamespace(highest_isa="avx2"))
    assert choose_levels("auto") == ["portable", "avx2"]
    with pytest.raises(
        ConfigError, match="this CPU has no avx512, amx; give some of portable, avx2"
    ):
        choose_levels("avx2,avx512,amx")
    with pytest.raises(ConfigError, match="named 'sse'; there are: auto, portable"):
        choose_levels("sse")


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        (Plan(["avx2"], [1], 512, 0, 1), "513 tokens exceed the model's context of 512"),
        (Plan(["avx2"], [1], 16, 513, 1), "513 tokens exceed the model's context of 512"),
        (Plan(["avx2"], [65537], 16, 0, 1), "65537 tokens exceeds the limit of 65536"),
    ],
)
def test_steps_too_large_are_refused(plan, told):
    with pytest.raises(ConfigError, match=told):
        check_plan(plan, 512)
