"""Reports of speed and of quality on the same axes."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparserve.bench.plot_quality import LEAST_KL, Point, draw_quality, front, join
from sparserve.errors import ConfigError

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


def test_the_picture_has_every_point_and_a_line_for_each_format(reports, tmp_path):
    points = join(reports, 1, None)
    figure = draw_quality(points)
    (panel,) = figure.axes
    assert panel.get_xscale() == "log"
    expected = {(max(p.kl, LEAST_KL), p.speed) for p in points.points}
    drawn = [line for line in panel.lines if line.get_marker() in "osDX"]
    assert {(line.get_xdata()[0], line.get_ydata()[0]) for line in drawn} == expected
    assert sorted(line.get_marker() for line in drawn) == ["D", "D", "X", "o", "o", "o", "s"]
    joined = [list(line.get_ydata()) for line in panel.lines if line.get_linestyle() == "-"]
    assert sorted(joined) == [[40, 60], [100, 130, 140], [100, 140]]  # from dense on, by KL
    (best,) = (list(line.get_ydata()) for line in panel.lines if line.get_linestyle() == "--")
    assert best == [60, 100, 130, 140]
    texts = {text.get_text() for text in panel.texts}
    assert texts == {
        "sparserve int8", "token:0.6/planes", "token:0.5/planes", "core:0.5", "sparserve float32", "exact/draft=ngram", "llama.cpp Q8_0",
    }  # fmt: skip
    labels = [text.get_text() for text in panel.get_legend().get_texts()]
    assert labels == [f"sparserve {INT8}", "sparserve float32", "llama.cpp Q8_0"]
    assert "tiny" in figure.get_suptitle()
    figure.savefig(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_sizes_are_drawn_beside_speeds_where_all_are_known(reports):
    points = join(reports, 1, None)
    bits = dict(zip(points.points, (8.4, 8.4, 8.4, 8.4, 32, 8.5, 32), strict=True))
    sized = replace(points, points=[replace(p, bits=own) for p, own in bits.items()])
    speed, size = draw_quality(sized).axes
    drawn = {
        (line.get_xdata()[0], line.get_ydata()[0])
        for line in size.lines
        if line.get_marker() in "osDX"
    }
    # Policies have the size of their weights.
    assert drawn == {(3e-3, 8.4), (LEAST_KL, 32), (4e-3, 8.5)}
    (best,) = (list(line.get_ydata()) for line in size.lines if line.get_linestyle() == "--")
    assert best == [32, 8.4]
    assert "tokens/s" in speed.get_ylabel()
    assert "bits" in size.get_ylabel()


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
