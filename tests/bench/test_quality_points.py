"""Reports of speed and of quality on the same axes."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparserve.bench.quality_points import Point, front, join
from sparserve.errors import ConfigError

BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks"
INT8 = "int8 (gate and up in planes of 4 + 4 bits)"
SCORED = [
    ("sparserve", INT8, "dense", 3e-3),
    ("sparserve", INT8, "token:0.6/planes", 3e-2),
    ("sparserve", INT8, "token:0.5/planes", 0.09),
    ("sparserve", INT8, "core:0.5", 0.9),
    ("sparserve", "float32", "dense", 0.0),
    ("llama.cpp", "Q8_0", "dense", 4e-3),
    ("llama.cpp", "Q4_0", "dense", 0.3),  # not timed
]
TIMED = [
    ("sparserve", INT8, "dense", 100.0),
    ("sparserve", INT8, "token:0.6/planes", 130.0),
    ("sparserve", INT8, "token:0.5/planes", 140.0),
    ("sparserve", INT8, "core:0.5", 140.0),
    ("sparserve", "float32", "dense", 40.0),
    ("sparserve", "float32", "exact/draft=ngram", 60.0),  # is dense in what it says
    ("llama.cpp", "Q8_0", None, 90.0),  # reports had no policies once
    ("transformers", "float32", "dense", 20.0),  # not scored
]


@pytest.fixture
def reports(tmp_path):
    quality, decode = tmp_path / "eval.json", tmp_path / "decode.json"
    rows = [
        {"system": s, "format": f, "policy": p, "kl": kl, "kl_low": 0.9 * kl, "kl_high": 1.2 * kl}
        for s, f, p, kl in SCORED
    ]
    quality.write_text(json.dumps(rows))
    timed = [
        {
            "system": s, "format": f, "model": "tiny", "batch": batch, "context": context,
            "tokens_per_second": batch * speed, "tokens_per_second_low": batch * speed - 1,
            "tokens_per_second_high": batch * speed + 2, **({"policy": p} if p else {}),
        }
        for s, f, p, speed in TIMED
        for batch in (1, 4)
        for context in (128, 1024)
    ]  # fmt: skip
    decode.write_text(json.dumps({"rows": timed}))
    return quality, decode


def test_points_are_what_both_commands_measured(reports):
    points = join(reports, 4, None)
    assert (points.model, points.batch, points.context) == ("tiny", 4, 128)
    exact = ("sparserve", "float32", "exact/draft=ngram", 0.0)
    assert [(p.system, p.weights, p.policy, p.kl) for p in points.points] == [*SCORED[:-1], exact]
    assert [point.speed for point in points.points] == [400, 520, 560, 560, 160, 360, 240]
    assert (points.points[1].kl_low, points.points[1].kl_high) == pytest.approx((0.027, 0.036))
    assert (points.points[1].speed_low, points.points[1].speed_high) == (519, 522)
    assert sorted(points.unmatched) == ["llama.cpp Q4_0 dense", "transformers float32 dense"]
    assert join(reports, 1, 1024).points[0].speed == 100


def test_labels_tell_points_apart(reports):
    labels = [point.label for point in join(reports, 1, None).points]
    assert labels == [
        "int8", "int8 token:0.6/planes", "int8 token:0.5/planes", "int8 core:0.5", "float32", "llama.cpp Q8_0",
        "float32 exact/draft=ngram",
    ]  # fmt: skip
    quality, decode = reports
    for file in (quality, decode):
        file.write_text(file.read_text().replace('"format": "float32"', '"format": "int8 (whole)"'))
    labels = [point.label for point in join(reports, 1, None).points]
    assert labels[0] == INT8
    assert labels[4] == "int8 (whole)"
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("quality", "decode", "points"),
    [
        ("2026-11-23-policies-int8-quality", "2026-11-23-policies-int8-decode", 4),
        ("2026-11-22-quality-peers", "2026-11-22-decode-integers", 3),  # without policies
    ],
)
def test_reports_that_are_published_can_be_read(quality, decode, points):
    files = [BENCHMARKS / f"{name}.json" for name in (quality, decode)]
    found = join(files, 1, None)
    assert len(found.points) == points
    assert {(point.pruned, point.healed) for point in found.points} == {(0, None)}


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=9), st.booleans()
)
def test_the_front_is_what_nothing_else_is_better_than(values, less_is_better):
    points = [Point("s", "w", "dense", "", kl, kl, kl, speed, 0, 0) for kl, speed in values]
    sign = -1 if less_is_better else 1
    found = front(points, lambda p: p.speed, min if less_is_better else max)
    beaten = {
        (p.kl, p.speed)
        for p in points
        for q in points
        if q.kl <= p.kl and sign * q.speed >= sign * p.speed and (q.kl, q.speed) != (p.kl, p.speed)
    }
    assert [(p.kl, p.speed) for p in found] == sorted(set(values) - beaten)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda quality, decode: ([quality], 1, None),
            "no report of sparserve bench decode at batch 1",
        ),
        (lambda quality, decode: ([quality, decode], 2, None), "bench decode at batch 2 is among"),
        (lambda quality, decode: ([decode], 1, None), "no report of sparserve eval"),
        (lambda quality, decode: ([quality, decode], 1, 64), "context of 64; there are: 128, 1024"),
        (lambda quality, decode: ([quality, decode.parent / "none"], 1, None), "none is no report"),
    ],
)
def test_what_cannot_be_drawn_is_told(reports, change, told):
    with pytest.raises(ConfigError, match=told):
        join(*change(*reports))


@pytest.mark.parametrize(
    "text", ["[1, 2]", "{", '{"a": 1}', '[{"kl": 1}]', '{"rows": [{"system": "x"}]}']
)
def test_a_file_that_is_no_report_is_told(tmp_path, text):
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"other\.json is no report of"):
        join([file], 1, None)
