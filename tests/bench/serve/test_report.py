"""All targets by turns, the report's JSON, and the picture of it."""

import json
from dataclasses import fields

import numpy as np
import pytest

from sparserve.bench.plot_serve import draw_serve, read_reports
from sparserve.bench.serve.datasets import Prompt
from sparserve.bench.serve.load import sweep
from sparserve.bench.serve.measure import measure
from sparserve.bench.serve.openai import OpenAi
from sparserve.bench.serve.records import Record, Run
from sparserve.bench.serve.report import Plan, spoilt_by_lag
from sparserve.bench.serve.summary import Latency, summarize
from sparserve.bench.serve.targets import Sparserve, Wish
from sparserve.errors import ConfigError, SparserveError


def a_plan(loads, **others):
    told = {"rounds": 2, "warmup": 1, "seed": 3, "timeout": 30.0, "percentiles": (50, 99)}
    return Plan(loads, slos={"ttft": 1000.0}, dataset="made up", **{**told, **others})


def prompts(number):
    return Prompt([number % 251, number // 1_000_000 % 251, 9], 4)


@pytest.fixture
async def report(serving, http_server, make_load):
    http_server.seconds_per_token = 0.005
    async with serving() as server:
        targets = [
            Sparserve([f"127.0.0.1:{server.port}"], Wish()),
            OpenAi("peer", http_server.url, Wish()),
        ]
        loads = sweep(make_load(count=6), "concurrency", [1, 3])
        return await measure(targets, prompts, a_plan(loads))


async def test_targets_take_turns_with_the_same_prompts(report, http_server):
    told = [(row.label, row.target) for row in report.rows]
    assert told == [(f"{n} at once", name) for n in (1, 3) for name in ("sparserve", "peer")]
    for row in report.rows:
        assert (row.summary.completed, row.summary.failed) == (12, 0)
        assert [each.completed for each in row.rounds] == [6, 6]
        assert row.summary.good_requests_per_second == row.summary.requests_per_second
    sent = [tuple(body["prompt"]) for body in http_server.bodies[1:]]  # after the one that warms up
    assert len(set(sent)) == len(sent) == 24, "no stage asks what another has asked"
    assert [(ratio.label, ratio.other) for ratio in report.ratios] == [
        ("1 at once", "peer"),
        ("3 at once", "peer"),
    ]
    assert all(ratio.low <= ratio.ratio <= ratio.high for ratio in report.ratios)
    assert [each["counted_by"] for each in report.targets] == ["the server", "the server's usage"]
    assert len(report.read_ceilings_gb_s) == 2


async def test_json_has_what_every_figure_is_made_of(report, tmp_path):
    found = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert found["plan"]["loads"][0]["arrivals"]["rate"] == "inf"
    names = {field.name for field in fields(Record)} - {"origin"}
    for row, told in zip(report.rows, found["rows"], strict=True):
        again = []
        for run in told["runs"]:
            assert all(set(record) == names for record in run["records"])
            again += [Record(**{**record, "sparsity": None}) for record in run["records"]]
        seconds = sum(run["seconds"] for run in told["runs"])
        runs = [Run(again, seconds, 0.0, [], None)]
        figures = summarize(runs, (50, 99), {"ttft": 1000.0})
        for name in ("ttft", "tpot", "itl", "e2e", "held_back"):
            one, other = getattr(figures, name), getattr(row.summary, name)
            assert one.mean == pytest.approx(other.mean, abs=2e-3)
            assert one.percentiles == pytest.approx(other.percentiles, abs=2e-3)
        assert figures.output_tokens_per_second == row.summary.output_tokens_per_second
        assert told["summary"]["ttft"]["median"] == pytest.approx(row.summary.ttft.median)


async def test_the_picture_is_drawn_from_the_json_alone(report, tmp_path):
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report.as_json()))
    figure = draw_serve(read_reports([file, file]))
    left, right = figure.axes
    lines = {line.get_label(): line for line in left.get_lines()}
    assert {"sparserve, median", "peer, median", "p99"} <= lines.keys()
    rows = [row.summary for row in report.rows if row.target == "sparserve"] * 2
    x, y = lines["sparserve, median"].get_data()
    np.testing.assert_allclose(x, [row.output_tokens_per_second for row in rows])
    np.testing.assert_allclose(y, [row.ttft.median for row in rows])
    assert "ITL" in right.get_ylabel()
    assert {text.get_text() for text in left.texts} == {"1", "3"}


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"rows": 3}', '{"plan": {"dataset": "", "rounds": 1}, "machine": "", "rows": [{}]}']
)  # fmt: skip
def test_what_is_no_report_is_not_drawn(tmp_path, content):
    file = tmp_path / "other.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match="no report of sparserve bench serve"):
        read_reports([file])


async def test_a_server_that_answers_nothing_is_an_error(http_server, make_load):
    http_server.status = 503
    target = OpenAi("peer", http_server.url, Wish())
    with pytest.raises(ConfigError, match=r"peer at .* fails to answer: HTTP 503"):
        await measure([target], prompts, a_plan([make_load(count=2)]))
    with pytest.raises(SparserveError, match="every request failed; the first: HTTP 503"):
        await measure([target], prompts, a_plan([make_load(count=2)], warmup=0))


def test_a_late_generator_is_told(make_record):
    records = [make_record(0.0, [0.1, 0.15, 0.2])]
    quick = summarize([Run(records, 1.0, 0.0, [0.0] * 50, None)], (99,), {})
    late = summarize([Run(records, 1.0, 0.0, [0.02] * 50, None)], (99,), {})
    assert spoilt_by_lag(quick) == ""
    assert "20.0 ms late (p99), 40% of the median ITL" in spoilt_by_lag(late)
    assert Latency.of([0.02] * 50, (99,)) == late.loop_lag
