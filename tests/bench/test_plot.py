"""The picture holds every figure of its report."""

import dataclasses

import pytest

from sparserve.bench.plot import draw
from sparserve.bench.sweep import Plan, Report, Row


def report(phase: str) -> Report:
    rows = [
        Row(
            system,
            "tiny",
            format,
            "dense",
            batch,
            context,
            8,
            speed,
            speed - 1,
            speed + 2,
            30.0,
            90.0,
            share,
            1_000_000,
            None,
            None,
            None,
            None,
        )
        for batch in (1, 4)
        for context in (128, 4096)
        for system, format, speed, share in (
            ("sparserve", "bfloat16", 80.0 * batch, 88.9),
            ("llama.cpp", "bfloat16", 40.0 * batch, 44.4),
            ("llama.cpp", "Q8_0", 60.0 * batch, 66.7),
        )
    ]
    plan = Plan(phase, [1, 4], [128, 4096], 8, rounds=3)
    return Report("0", "now", "2 x CPU", 2, 0.0, {"bfloat16": "reference"}, plan, rows, [])


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_bars_labels_and_bounds_are_the_rows(phase):
    given = report(phase)
    figure = draw(given)
    decode = phase == "decode"
    assert [panel.get_title() for panel in figure.axes] == ["one request", "4 at once"]
    for panel, batch in zip(figure.axes, (1, 4), strict=True):
        rows = [row for row in given.rows if row.batch == batch]
        heights = sorted(bar.get_height() for bar in panel.patches)
        assert heights == sorted(row.tokens_per_second for row in rows)
        shares = {row: f"\n{row.percent_of_byte_bound:.0f} %" if decode else "" for row in rows}
        assert sorted(text.get_text() for text in panel.texts) == sorted(
            f"{row.tokens_per_second:.0f}{shares[row]}" for row in rows
        )
        assert [tick.get_text() for tick in panel.get_xticklabels()] == ["128", "4,096"]
        assert panel.get_ylabel() == ("tokens/s" if decode else "prompt tokens/s")
        top = max(row.tokens_per_second_high for row in rows)
        assert panel.get_ylim()[1] > max(top, 90.0 if decode else 0)
    (legend,) = figure.legends
    names = {"sparserve bfloat16", "llama.cpp bfloat16", "llama.cpp Q8_0"}
    assert {text.get_text() for text in legend.get_texts()} == (
        names | {"byte bound (100 %)"} if decode else names
    )
    for word in ("tiny", phase, "2 threads", "3 alternated rounds", "30 GB/s"):
        assert word in figure.get_suptitle()


def test_a_label_is_moved_off_the_line_of_the_bound():
    given = report("decode")
    near = [dataclasses.replace(row, byte_bound_tokens_per_second=85.0) for row in given.rows]
    panel = draw(dataclasses.replace(given, rows=near)).axes[0]
    places = {text.get_text(): text.xy[1] for text in panel.texts}
    assert places["80\n89 %"] == 85.0  # over the line
    assert places["40\n44 %"] == 42.0  # over its whisker


def test_the_legend_is_within_the_picture(tmp_path):
    figure = draw(report("decode"))
    figure.savefig(tmp_path / "x.png")
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
