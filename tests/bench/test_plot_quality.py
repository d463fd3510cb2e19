"""The picture of speed over quality."""

from dataclasses import replace
from itertools import pairwise

import pytest

from sparserve.bench.plot_quality import LEAST_KL, draw_quality
from sparserve.bench.quality_points import Point, Points

# (weights, policy, KL, tokens/s, bits, pruned, healed)
OURS = [
    ("float32", "dense", 0.0, 40, 32.0, 0.0, None),
    ("float32", "exact/draft=ngram", 0.0, 60, 32.0, 0.0, None),
    ("int8", "dense", 3e-3, 100, 8.4, 0.0, None),
    ("int8", "token:0.6/planes", 3e-2, 130, 8.4, 0.0, None),
    ("int8", "token:0.5/planes", 0.09, 140, 8.4, 0.0, None),
    ("int8", "core:0.5", 0.9, 140, 8.4, 0.0, None),
    ("cut", "dense", 0.25, 110, 7.5, 0.1, None),
    ("cut-healed", "dense", 0.06, 110, 7.5, 0.1, "core:0.5"),
    ("cut-healed", "core:0.5", 0.08, 150, 7.5, 0.1, "core:0.5"),
    ("healed", "kl:0.05", 0.2, 90, 16.0, 0.0, "dense"),
]
RIVALS = [
    ("llama.cpp", "Q8_0", 4e-3, 90, 8.5),
    ("llama.cpp", "Q4_0", 0.3, 85, 4.5),
    ("openvino", "int8", 0.04, 95, 8.1),
]
FRONT = ["float32 exact/draft=ngram", "int8", "int8 token:0.6/planes", "cut-healed core:0.5"]


def point(system, weights, policy, kl, speed, bits, pruned=0.0, healed=None):
    name = weights if system == "sparserve" else f"{system} {weights}"
    label = name if policy == "dense" else f"{name} {policy}"
    return Point(
        system, weights, policy, label, kl, 0.9 * kl, 1.2 * kl, speed, speed - 2, speed + 3, bits, pruned, healed
    )  # fmt: skip


@pytest.fixture
def points():
    ours = [point("sparserve", *row) for row in OURS]
    rivals = [point(system, format, "dense", *row) for system, format, *row in RIVALS]
    return Points([*ours, *rivals], (), "tiny", 1, 128)


def marks(panel):
    """{(KL, height): (marker, fill style)} of all, {(KL, height)} of rings."""
    lines = [line for line in panel.lines if line.get_linestyle() == "None"]
    places = [(line.get_xdata()[0], line.get_ydata()[0]) for line in lines]
    both = list(zip(places, lines, strict=True))
    told = {
        at: (line.get_marker(), line.get_fillstyle())
        for at, line in both
        if line.get_fillstyle() != "none"
    }
    return told, {at for at, line in both if line.get_fillstyle() == "none"}


def heights(panel, style):
    return [list(line.get_ydata()) for line in panel.lines if line.get_linestyle() == style]


def test_marks_tell_policies_pruned_and_healed_apart(points):
    speed, size = draw_quality(points).axes
    assert speed.get_xscale() == "log"
    marked, rings = marks(speed)
    assert set(marked) == {(max(p.kl, LEAST_KL), p.speed) for p in points.points}
    assert marked[LEAST_KL, 40] == ("o", "full")
    assert marked[LEAST_KL, 60] == ("X", "full")
    assert marked[3e-2, 130] == ("D", "full")
    assert marked[0.9, 140] == ("s", "full")
    assert marked[0.2, 90] == ("v", "full")
    assert {at for at, (_, fill) in marked.items() if fill == "left"} == {
        (0.25, 110), (0.06, 110), (0.08, 150)
    }  # fmt: skip
    assert rings == {(0.06, 110), (0.08, 150), (0.2, 90)}
    # Policies have the size of their weights.
    assert set(marks(size)[0]) == {
        (LEAST_KL, 32), (3e-3, 8.4), (0.25, 7.5), (0.06, 7.5), (0.2, 16), (4e-3, 8.5), (0.3, 4.5), (0.04, 8.1)
    }  # fmt: skip


def test_the_front_of_ours_and_that_of_rivals_are_steps(points):
    speed, size = draw_quality(points).axes
    assert heights(speed, "--") == [[60, 100, 130, 150]]
    assert heights(speed, ":") == [[90, 95]]
    assert heights(size, "--") == [[32, 8.4, 7.5]]
    assert heights(size, ":") == [[8.5, 8.1, 4.5]]
    drawn = [line.get_drawstyle() for line in speed.lines if line.get_linestyle() in ("--", ":")]
    assert set(drawn) == {"steps-post"}
    # Of each weights dense and the policies of one kind, by KL.
    assert sorted(heights(speed, "-")) == [[40, 60], [90], [100, 130, 140], [100, 140], [110, 150]]


def test_only_what_is_on_a_front_has_a_label(points, tmp_path):
    figure = draw_quality(points)
    speed, size = figure.axes
    assert [text.get_text() for text in speed.texts] == [*FRONT, "openvino int8", "llama.cpp Q8_0"]
    assert [text.get_text() for text in size.texts[:3]] == ["float32", "int8", "cut-healed"]
    assert "tiny" in figure.get_suptitle()
    figure.savefig(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_legend_has_what_is_there(points):
    def told(found):
        (legend,) = draw_quality(found).legends
        return [text.get_text() for text in legend.get_texts()]

    kinds = ["dense", "core", "token", "exact", "kl"]
    assert told(points) == ["sparserve", "llama.cpp", "openvino", *kinds, "pruned", "healed"]
    assert told(replace(points, points=points.points[2:4])) == ["sparserve", "dense", "token"]
    odd = replace(points.points[0], policy="new:1")  # files come from elsewhere
    assert told(replace(points, points=[odd])) == ["sparserve", "new"]


def test_labels_of_many_points_stay_apart_and_inside(points):
    many = [
        point("sparserve", f"a-recipe-of-a-long-name-{i}", "core:0.7+token:0.5/planes", 1e-3 * 1.2**i, 50 + 1.1 * i, 4.0)
        for i in range(40)
    ]  # fmt: skip
    figure = draw_quality(replace(points, points=[*many, *points.points[-3:]]))
    figure.draw_without_rendering()
    panel = figure.axes[0]
    # Of the text alone, without the line to its mark.
    extents = [text.get_bbox_patch().get_window_extent() for text in panel.texts]
    ours = extents[:40]
    assert len(ours) == 40
    letters = 7 * panel.figure.dpi / 72  # that they are high
    assert all(other.y0 - one.y0 >= letters for one, other in pairwise(ours))
    assert all(panel.bbox.x0 - 2 <= each.x0 and each.x1 <= panel.bbox.x1 + 2 for each in extents)


def test_sizes_are_drawn_only_where_all_are_known(points):
    first, *others = points.points
    figure = draw_quality(replace(points, points=[replace(first, bits=None), *others]))
    (panel,) = figure.axes
    assert "tokens/s" in panel.get_ylabel()
    assert "speed and size" not in figure.get_suptitle()
