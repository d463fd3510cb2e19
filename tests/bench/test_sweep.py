"""The figures of a sweep against their definitions, on systems whose speed is made up."""

import itertools
from types import SimpleNamespace

import pytest

from sparserve.bench import sweep
from sparserve.bench.reads import Reads
from sparserve.bench.rounds import fresh_prompts
from sparserve.bench.sweep import Plan, run_sweep, share_of_allowed_time
from sparserve.bench.systems import Run

CEILING = 20.0  # GB/s


class Made:
    """Each run takes the next of `seconds` for a decode step, and so long for the prompt."""

    weight_bytes, kv_bytes_per_token = 10_000_000, 1000

    def __init__(
        self, name, seconds, format="bfloat16", weight_bytes=10_000_000, policy="dense", reads=None
    ):
        self.name, self.format, self.weight_bytes, self.policy = name, format, weight_bytes, policy
        self._reads = itertools.repeat(reads) if reads is None else itertools.chain(reads)
        self._seconds = itertools.chain([1.0], seconds)  # the first warms up
        self.prompts = []

    def run(self, prompts, new_tokens):
        self.prompts.append(prompts)
        step, batch = next(self._seconds), len(prompts)
        return Run(step, step * new_tokens, batch * new_tokens, batch, next(self._reads))


@pytest.fixture
def probes(monkeypatch):
    """Sizes that the ceiling was measured over."""
    asked = []

    def probe(buffer_bytes, threads, seconds):
        asked.append(buffer_bytes)
        return SimpleNamespace(gb_per_s=CEILING + 2 * len(asked))

    monkeypatch.setattr(sweep, "read_probe", probe)
    return asked


def swept(plan, ours, peers=()):
    told = []
    report = run_sweep(
        ours,
        peers,
        plan,
        model="m",
        prompts=lambda source, count, length: fresh_prompts(source, 50, count, length),
        threads=2,
        backends={system.format: "reference" for system in ours},
        on_progress=lambda *what: told.append(what),
    )
    return report, told


def test_decode_rows_are_those_of_their_definitions(probes):
    plan = Plan("decode", [4], [100], 21, rounds=3)
    report, told = swept(
        plan, [Made("sparserve", [0.2, 0.1, 0.4])], [Made("peer", [0.4, 0.3, 0.2])]
    )
    ours, peer = report.rows
    step_bytes = 10_000_000 + 4 * 1000 * (100 + 10)
    assert probes == [step_bytes] * 3  # one serves both, in every round anew
    assert (ours.tokens_per_second, peer.tokens_per_second) == (20.0, 13.33)
    assert (ours.tokens_per_second_low, ours.tokens_per_second_high) == (10.0, 40.0)
    assert ours.read_ceiling_gb_s == 24.0
    bounds = [4 * gb * 1e9 / step_bytes for gb in (22, 24, 26)]
    assert ours.byte_bound_tokens_per_second == pytest.approx(bounds[1], abs=0.01)
    shares = sorted(100 * speed / bound for speed, bound in zip((20, 40, 10), bounds, strict=True))
    assert ours.percent_of_byte_bound == round(shares[1], 1)
    (ratio,) = report.ratios  # the rounds' own are 2, 3 and .5
    assert (ratio.ratio_low, ratio.ratio, ratio.ratio_high) == (0.5, 2.0, 3.0)
    assert told[0] == ("decode", 0, 8)
    assert told[-1] == ("decode", 8, 8)


def test_prefill_counts_the_tokens_of_the_prompts_until_all_had_their_first(probes):
    plan = Plan("prefill", [2], [64], 1, rounds=1)
    report, _ = swept(plan, [Made("sparserve", [0.5])])
    assert report.rows[0].tokens_per_second == 2 * 64 / 0.5
    assert probes == [10_000_000 + 2 * 1000 * 64]


def test_all_systems_get_the_same_prompts_and_every_round_others(probes):
    ours, peer = Made("sparserve", [1, 1, 1]), Made("peer", [1, 1, 1])
    swept(Plan("decode", [2], [30], 4, rounds=3), [ours], [peer])
    assert ours.prompts == peer.prompts
    assert len({prompt for prompts in ours.prompts for prompt in prompts}) == 2 * 4


def test_formats_are_compared_at_the_same_bits(probes):
    own = ("bfloat16", "float16", "int8-g32", "int4 (LM head int8)")
    ours = [Made("sparserve", [1], format) for format in own]
    formats = ("bfloat16", "float32", "Q8_0", "Q6_K", "Q4_0", "Q4_K_M", "int8")
    peers = [Made("a", [1], format) for format in formats]
    report, _ = swept(Plan("decode", [1], [30], 4, rounds=1), ours, peers)
    assert [(r.format, r.peer_format) for r in report.ratios] == [
        ("bfloat16", "bfloat16"),
        ("int8-g32", "Q8_0"),
        ("int8-g32", "int8"),
        ("int4 (LM head int8)", "Q4_0"),
        ("int4 (LM head int8)", "Q4_K_M"),
    ]


def test_of_16_bits_are_two_formats(probes):
    """They are compared where the peer's own is not among ours."""
    ours, peers = [Made("sparserve", [1], "bfloat16")], [Made("a", [1], "float16")]
    report, _ = swept(Plan("decode", [1], [30], 4, rounds=1), ours, peers)
    assert [(r.format, r.peer_format) for r in report.ratios] == [("bfloat16", "float16")]


def test_one_ceiling_serves_sizes_that_hardly_differ(probes):
    ours = [Made("sparserve", [1], "float32", 20_000_000), Made("sparserve", [1])]
    peers = [Made("a", [1]), Made("b", [1], "Q8_0", 5_000_000)]
    swept(Plan("decode", [1], [30], 4, rounds=1), ours, peers)
    assert len(probes) == 3  # a's is the one of ours


def test_every_point_of_the_plan_has_its_rows(probes):
    plan = Plan("decode", [1, 3], [10, 20], 4, rounds=1)
    report, told = swept(plan, [Made("sparserve", itertools.repeat(1.0))])
    assert [(r.batch, r.context) for r in report.rows] == [(1, 10), (1, 20), (3, 10), (3, 20)]
    assert [done for _, done, _ in told] == list(range(9))


@pytest.mark.parametrize(
    ("dense", "sparse", "bytes_read", "share"),
    [(1.0, 0.5, 0.5, 1), (1.0, 1.0, 0.5, 0), (2.0, 1.6, 0.6, 0.5), (1.0, 1.2, 0.6, -0.5),
     (1.0, 0.4, 0.6, 1.5), (1.0, 0.9, 1.0, None), (1.0, 1.1, 1.2, None)],
)  # fmt: skip
def test_the_share_of_the_allowed_time_that_is_saved(dense, sparse, bytes_read, share):
    """Half the bytes in half the time: all that was allowed."""
    assert share_of_allowed_time(dense, sparse, bytes_read) == (share and pytest.approx(share))


def test_a_policy_is_compared_with_its_own_format_dense_round_by_round(probes):
    kv = 2 * 1000 * (100 + 10)  # of both sequences
    half = [
        Reads((10_000_000 + kv) / 4 - kv / 2, 1.0, d, u)
        for d, u in ((0.5, 0.9),) * 3 + ((0.6, 0.8),)
    ]
    ours = [
        Made("sparserve", [9.0, 9.0, 9.0], "int8"),
        Made("sparserve", [0.2, 0.4, 0.1], "bfloat16"),
        Made("sparserve", [0.1, 0.3, 0.1], "bfloat16", policy="core:0.5", reads=half),
        Made("sparserve", [9.0, 9.0, 9.0], "int4", policy="core:0.5", reads=half),
    ]
    plan = Plan("decode", [2], [100], 21, rounds=3)
    report, _ = swept(plan, ours, [Made("peer", [0.4, 0.4, 0.4])])
    int8, dense, sparse, alone, peer = report.rows
    assert [row.policy for row in report.rows] == ["dense"] * 2 + ["core:0.5"] * 2 + ["dense"]
    for row in (int8, dense, alone, peer):
        assert row.share_of_allowed_time is row.against_dense is None
    assert (peer.density, peer.union) == (None, None)
    assert sparse.bytes_per_token == (10_000_000 + kv) // 4  # half of the dense ones
    assert dense.bytes_per_token == (10_000_000 + kv) // 2
    assert sparse.share_of_allowed_time == 0.5  # the rounds' own: 1, 1/2 and 0
    assert sparse.against_dense == 1.333  # 2, 4/3 and 1
    assert sparse.density == pytest.approx((0.5 + 0.5 + 0.6) / 3, abs=1e-4)  # not of the warm-up
    assert sparse.union == pytest.approx((0.9 + 0.9 + 0.8) / 3, abs=1e-4)
    assert sparse.byte_bound_tokens_per_second == pytest.approx(
        sparse.read_ceiling_gb_s * 1e9 / sparse.bytes_per_token, rel=0.01
    )
    assert set(probes) == {10_000_000 + kv, (10_000_000 + kv) // 2}
    compared = [(r.format, r.policy) for r in report.ratios]
    assert compared == [("bfloat16", "dense"), ("bfloat16", "core:0.5")]
