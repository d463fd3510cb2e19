"""Figures from records whose times are known."""

import numpy as np
import pytest

from sparserve.bench.serve.records import Run, Sparsity, Usage
from sparserve.bench.serve.summary import (
    Latency,
    is_good,
    parse_slos,
    peak_concurrency,
    peak_rate,
    summarize,
)
from sparserve.errors import ConfigError

LEVELS = (50, 90, 99.9)


def test_percentiles_are_numpys():
    seconds = np.random.default_rng(1).exponential(0.3, 777)
    found = Latency.of(seconds.tolist(), LEVELS)
    for level in LEVELS:
        expected = np.percentile(1000 * seconds, level)
        assert found.percentiles[f"{level:g}"] == pytest.approx(expected, abs=1e-3)
    assert found.mean == pytest.approx(1000 * seconds.mean(), abs=1e-3)
    assert found.median == pytest.approx(1000 * np.median(seconds), abs=1e-3)
    assert Latency.of([], LEVELS) is None


def test_every_figure_of_a_run(make_record):
    records = [
        make_record(0.0, [0.5, 0.7, 1.1], prompt_tokens=10, completion_tokens=3),
        # Held back for a second, and its pieces carry more tokens than there are pieces.
        make_record(1.0, [2.5, 3.5], sent=2.0, prompt_tokens=6, completion_tokens=5),
        make_record(1.5, [1.9], prompt_tokens=99, error="UNAVAILABLE"),
        make_record(3.0, [4.0], prompt_tokens=4),
    ]
    records[1].tokens = [2, 3]
    found = summarize([Run(records, 4.0, 0.25, [0.001, 0.003], None)], LEVELS, {"ttft": 600.0})
    assert (found.completed, found.failed, found.failures) == (3, 1, {"UNAVAILABLE": 1})
    assert (found.input_tokens, found.output_tokens) == (20, 9)
    assert found.requests_per_second == 0.75
    assert found.good_requests_per_second == 0.25, "only the first has its first token in time"
    assert found.output_tokens_per_second == 9 / 4
    assert found.total_tokens_per_second == 29 / 4
    assert found.peak_output_tokens_per_second == 3, "in the fourth second"
    assert found.peak_concurrency == 2
    assert found.tokens_per_piece == 1.5
    assert found.ttft.mean == pytest.approx(1000 * (0.5 + 1.5 + 1.0) / 3, abs=1e-3)
    assert found.ttft_from_send.mean == pytest.approx(1000 * (0.5 + 0.5 + 1.0) / 3, abs=1e-3)
    assert found.tpot.mean == pytest.approx(1000 * (0.3 + 0.25) / 2, abs=1e-3)
    assert found.itl.mean == pytest.approx(1000 * (0.2 + 0.4 + 1.0) / 3, abs=1e-3)
    assert found.e2e.mean == pytest.approx(1000 * (1.1 + 2.5 + 1.0) / 3, abs=1e-3)
    assert found.e2e_from_send.mean == pytest.approx(1000 * (1.1 + 1.5 + 1.0) / 3, abs=1e-3)
    assert found.held_back.percentiles["99.9"] == pytest.approx(1000, abs=5)
    assert found.loop_lag.mean == 2
    assert found.generator_cpu_seconds == 0.25
    assert found.quality is found.server_rss_mib is found.server_rss_growth is None


def test_runs_of_one_load_are_put_together(make_record):
    runs = [
        Run([make_record(0.0, [1.0])], 1.0, 0.1, [], None),
        Run([make_record(0.0, [3.0])], 3.0, 0.1, [], None),
    ]
    found = summarize(runs, LEVELS, {})
    assert found.output_tokens_per_second == 0.5
    assert found.ttft.mean == 2000
    assert found.loop_lag is None


def test_what_failed_whole_has_no_latency(make_record):
    found = summarize([Run([make_record(0.0, [], error="X")], 1.0, 0.0, [], None)], LEVELS, {})
    assert (found.ttft, found.e2e, found.output_tokens_per_second) == (None, None, 0)


def test_requests_are_good_that_keep_every_slo(make_record):
    record = make_record(0.0, [0.1, 0.2, 0.3])
    assert is_good(record, {})
    assert is_good(record, {"ttft": 100, "tpot": 100.001, "e2e": 300})
    assert not is_good(record, {"ttft": 99})
    assert not is_good(record, {"ttft": 100, "tpot": 99})
    assert not is_good(record, {"e2e": 299})
    assert not is_good(make_record(0.0, [0.1], error="X"), {})
    assert is_good(make_record(0.0, [0.1]), {"tpot": 1}), "one token has no time between tokens"


@pytest.mark.parametrize(
    "text", ["ttft", "ttft:0", "ttft:x", "wait:3", "ttft:1,ttft:2", "ttft:nan"]
)
def test_what_is_no_slo_is_refused(text):
    with pytest.raises(ConfigError, match="--goodput has"):
        parse_slos(text)


def test_slos_are_milliseconds_by_name():
    assert parse_slos("ttft:200, tpot:50.5") == {"ttft": 200, "tpot": 50.5}
    assert parse_slos("") == {}


def test_peaks(make_record):
    records = [make_record(0.0, [0.1, 0.2, 1.1, 1.9]), make_record(0.5, [1.2])]
    assert peak_rate(records) == 3
    assert peak_rate([]) == 0
    assert peak_concurrency(records) == 2
    one_after_another = [make_record(0.0, [1.0]), make_record(1.0, [2.0])]
    assert peak_concurrency(one_after_another) == 1


def test_sparsity_is_the_mean_over_tokens(make_record):
    def told(times, policy, density, kl):
        sparsity = Sparsity(policy, density, 100 * density, 0.0, 4, 1, kl)
        return make_record(0.0, times, sparsity=sparsity)

    records = [told([1.0], "core", 0.4, 0.1), told([1.0, 2.0, 3.0], "token", 0.6, 0.2)]
    found = summarize([Run(records, 3.0, 0.0, [], None)], LEVELS, {}).quality
    assert found.policies == {"core": 1, "token": 1}
    assert found.density == pytest.approx(0.55)
    assert found.predicted_kl == pytest.approx(0.175)
    assert (found.drafted_tokens, found.accepted_tokens) == (8, 2)
    records.append(told([1.0], "core", 0.5, None))
    assert summarize([Run(records, 3.0, 0.0, [], None)], LEVELS, {}).quality.predicted_kl is None
    dense = [told([1.0], "dense", 1.0, None)]
    assert summarize([Run(dense, 3.0, 0.0, [], None)], LEVELS, {}).quality is None


def test_memory_growth_is_that_of_a_warm_server():
    sizes = [100, 150, 200, 200, 200, 205, 210, 206]
    usage = Usage(1.0, [(10.0 * at, size) for at, size in enumerate(sizes)])
    assert usage.growth == pytest.approx(210 / 200 - 1)
    assert Usage(1.0, usage.rss[:6]).growth is None, "too short to tell"
