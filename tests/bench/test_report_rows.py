"""What a report says of rows that are given."""

import json
from dataclasses import replace

import pytest

from sparserve.bench.plot_quality import draw_quality
from sparserve.bench.report_rows import Report, markdown, points_of


@pytest.fixture
def report(report_row):
    rows = [
        report_row("int8", 0.004, 100, 110, 120),
        report_row("int8 core:0.7", 0.05, 150, 160, 170, policy="core:0.7"),
        report_row("fast", 0.06, 130, 140, 150, recipe="fast"),
        report_row("llama.cpp Q8_0", 0.005, 40, 55, 50, system="llama.cpp"),
        report_row("llama.cpp Q4_0", 0.31, 90, 100, 70, system="llama.cpp"),
        report_row("openvino int8", 0.03, 40, 80, 85, system="openvino"),
    ]
    return Report(
        version="0", time="now", machine="2 x CPU", threads=2, cpus_used_by_others=0.01, command="sparserve report x",
        model="tiny", model_hash="h", text="wiki.txt", text_hash="t", windows=12, prompt_tokens=256,
        decode_tokens=64, baseline="llama.cpp Q8_0", tiers=[0.001, 0.005, 0.06], rows=rows,
    )  # fmt: skip


@pytest.fixture
def healed(report, report_row):
    """The same with what is pruned, and what is healed too."""
    cut = report_row("cut", 0.05, 155, 165, 150, recipe="cut", pruned=0.1984)
    mended = report_row("mended", 0.003, 150, 155, 160, recipe="mended", healed="core:0.5")
    return replace(report, rows=[*report.rows, cut, mended])


def tables(report):
    """[table, line, cell]"""
    found, before = [], ""
    for line in markdown(report).splitlines():
        if line.startswith("|"):
            if not before.startswith("|"):
                found.append([])
            found[-1].append([cell.strip() for cell in line.split("|")[1:-1]])
        before = line
    return found


def test_the_table_of_systems(report):
    systems = tables(report)[0]
    assert {len(cells) for cells in systems} == {8}
    assert systems[0][0] == "tiny"
    assert systems[0][-1] == "x llama.cpp Q8_0"
    assert systems[2] == [
        "sparserve int8", "4.38", "5.25", "0.004 (0.0036 to 0.0048)", "87.5%", "12.50", "110.0", "2.20x",
    ]  # fmt: skip
    assert [cells[0] for cells in systems[2:]] == [
        "sparserve int8", "sparserve int8 core:0.7", "sparserve fast", "llama.cpp Q8_0", "llama.cpp Q4_0",
        "openvino int8",
    ]  # fmt: skip
    told = markdown(report)
    assert "1 sequence after 128 tokens, 64 new ones; medians of 3 alternated rounds" in told
    assert "of the original" not in told
    assert "`sparserve report x`" in told.splitlines()


def test_what_is_pruned_or_healed_is_told_where_something_is(report, healed):
    systems = tables(healed)[0]
    assert {len(cells) for cells in systems} == {10}
    assert systems[0][1:5] == [
        "bits per decoder weight", "bits per weight of the file", "pruned", "healed through"
    ]  # fmt: skip
    assert {cells[0]: cells[3:5] for cells in systems[2:]} == {
        **{cells[0]: ["-", "-"] for cells in tables(report)[0][2:]},
        "sparserve cut": ["19.8%", "-"],
        "sparserve mended": ["-", "core:0.5"],
    }
    assert "Bits are of a weight of the original" in markdown(healed)
    only_healed = replace(healed, rows=[*healed.rows[:-2], healed.rows[-1]])
    assert "pruned" not in tables(only_healed)[0][0]
    assert "healed through" in tables(only_healed)[0][0]


def test_the_table_of_tiers(report):
    tiers = tables(report)[1]
    assert tiers[2:] == [
        ["0.001", "-", "-", "-"],
        ["0.005", "int8, KL 0.004, 110.0 tokens/s", "llama.cpp Q8_0, KL 0.005, 50.0 tokens/s", "2.40x"],
        ["0.06", "int8 core:0.7, KL 0.05, 160.0 tokens/s", "openvino int8, KL 0.03, 80.0 tokens/s", "2.00x"],
    ]  # fmt: skip


def test_the_table_of_what_features_bring(report, healed):
    features = tables(report)[2]
    assert features[2:] == [
        ["0.001", "sparsity", "-", "-", "-"],
        ["0.005", "sparsity", "int8, KL 0.004, 110.0 tokens/s", "-", "-"],
        ["0.06", "sparsity", "fast, KL 0.06, 140.0 tokens/s", "int8 core:0.7, KL 0.05, 160.0 tokens/s", "1.14x"],
    ]  # fmt: skip
    features = tables(healed)[2]
    assert [cells[1] for cells in features[2:]] == [
        *3 * ["sparsity"], *3 * ["pruning"], *3 * ["healing"]
    ]  # fmt: skip
    assert features[-1] == [
        "0.06", "healing", "int8 core:0.7, KL 0.05, 160.0 tokens/s", "mended, KL 0.003, 155.0 tokens/s", "0.97x",
    ]  # fmt: skip
    # Rivals have none, and a table of nothing is left out.
    rivals = [replace(row, policy="core:0.5") for row in report.rows[3:]]
    assert len(tables(replace(report, rows=[report.rows[0], *rivals]))) == 2


def test_json_has_rows_and_tiers_by_label(healed):
    told = json.loads(json.dumps(healed.as_json()))
    assert told["tiers"][1] == {
        "kl": 0.005, "ours": "mended", "peer": "llama.cpp Q8_0", "ratio": 3.2,
        "sparsity": {"without": "mended", "with": None, "ratio": None},
        "pruning": {"without": "mended", "with": None, "ratio": None},
        "healing": {"without": "int8", "with": "mended", "ratio": 1.409},
    }  # fmt: skip
    assert [row["label"] for row in told["rows"]] == [row.label for row in healed.rows]
    assert [(row["pruned"], row["healed"]) for row in told["rows"][-2:]] == [
        (0.1984, None), (0, "core:0.5")
    ]  # fmt: skip


def test_the_picture_is_of_all_rows(healed):
    points = points_of(healed)
    assert [point.label for point in points.points] == [row.label for row in healed.rows]
    assert (points.model, points.batch, points.context) == ("tiny", 1, 128)
    cut, mended = points.points[-2:]
    assert (cut.weights, cut.pruned, cut.healed, cut.bits) == ("cut", 0.1984, None, 4.375)
    assert (mended.speed, mended.pruned, mended.healed) == (155, 0, "core:0.5")
    speed, _ = draw_quality(points).axes
    assert [text.get_text() for text in speed.texts] == [
        "mended", "int8 core:0.7", "llama.cpp Q4_0", "openvino int8", "llama.cpp Q8_0"
    ]  # fmt: skip
