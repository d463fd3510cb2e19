"""What a report says of rows that are given."""

import json

import pytest

from sparserve.bench.plot_quality import draw_quality
from sparserve.bench.report_rows import Report, Row, markdown, points_of, tiers_of


def row(
    label: str, kl: float, *rounds: float, system: str = "sparserve", policy: str = "dense"
) -> Row:
    speed = sorted(rounds)[len(rounds) // 2]
    return Row(
        system=system, label=label, format=label.removeprefix(f"{system} ").split()[0], recipe="fast" if "fast" in label else None,
        policy=policy, bits_decoder=4.375, bits_file=5.25, kl=kl, kl_low=0.9 * kl, kl_high=1.2 * kl, top1=0.875,
        perplexity=12.5, density=1.0, batch=1, context=128, new_tokens=64, tokens_per_second=speed,
        tokens_per_second_low=min(rounds), tokens_per_second_high=max(rounds), rounds=rounds,
        read_ceiling_gb_s=24.0, percent_of_byte_bound=50.0, ratio=speed / 50,
    )  # fmt: skip


ROWS = [
    row("int8", 0.004, 100, 110, 120),
    row("int8 core:0.7", 0.05, 150, 160, 170, policy="core:0.7"),
    row("fast", 0.06, 130, 140, 150),
    row("llama.cpp Q8_0", 0.005, 40, 55, 50, system="llama.cpp"),
    row("llama.cpp Q4_0", 0.31, 90, 100, 70, system="llama.cpp"),
    row("openvino int8", 0.03, 40, 80, 85, system="openvino"),
]


@pytest.fixture
def report():
    return Report(
        version="0", time="now", machine="2 x CPU", threads=2, cpus_used_by_others=0.01, command="sparserve report x",
        model="tiny", model_hash="h", text="wiki.txt", text_hash="t", windows=12, prompt_tokens=256,
        decode_tokens=64, baseline="llama.cpp Q8_0", tiers=[0.001, 0.004, 0.005, 0.06, 0.4], rows=ROWS,
    )  # fmt: skip


def test_a_tier_is_the_fastest_of_each_within_its_kl(report):
    found = [
        [None if each is None else each.label for each in (tier.ours, tier.dense, tier.peer)]
        for tier in tiers_of(report.rows, report.tiers)
    ]
    assert found == [
        [None, None, None],
        ["int8", "int8", None],
        ["int8", "int8", "llama.cpp Q8_0"],
        ["int8 core:0.7", "fast", "openvino int8"],
        ["int8 core:0.7", "fast", "llama.cpp Q4_0"],
    ]


def test_ratios_of_tiers_are_medians_of_the_rounds_own(report):
    # 100 / 40, 110 / 55, 120 / 50; then 150 / 40, 160 / 80, 170 / 85; then 150 / 90, 160 / 100, 170 / 70
    assert [tier.ratio for tier in tiers_of(report.rows, report.tiers)] == [
        None,
        None,
        2.4,
        2,
        1.667,
    ]


def test_the_tables_of_the_readme(report):
    lines = markdown(report).splitlines()
    tables = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    systems, tiers = tables[: 2 + len(ROWS)], tables[2 + len(ROWS) :]
    assert {len(cells) for cells in systems} == {8}
    assert {len(cells) for cells in tiers} == {5}
    assert systems[0][0] == "tiny"
    assert systems[0][-1] == "x llama.cpp Q8_0"
    assert systems[2] == [
        "sparserve int8", "4.38", "5.25", "0.004 (0.0036 to 0.0048)", "87.5%", "12.50", "110.0", "2.20x",
    ]  # fmt: skip
    assert [cells[0] for cells in systems[2:]] == [
        "sparserve int8", "sparserve int8 core:0.7", "sparserve fast", "llama.cpp Q8_0", "llama.cpp Q4_0",
        "openvino int8",
    ]  # fmt: skip
    assert tiers[2] == ["0.001", "-", "-", "-", "-"]
    assert tiers[4] == [
        "0.005", "int8, KL 0.004, 110.0 tokens/s", "int8, KL 0.004, 110.0 tokens/s",
        "llama.cpp Q8_0, KL 0.005, 50.0 tokens/s", "2.40x",
    ]  # fmt: skip
    assert "1 sequence after 128 tokens, 64 new ones; medians of 3 alternated rounds" in markdown(
        report
    )
    assert "`sparserve report x`" in lines


def test_json_has_the_tiers_by_label(report):
    told = json.loads(json.dumps(report.as_json()))
    assert told["tiers"][2] == {
        "kl": 0.005, "ours": "int8", "dense": "int8", "peer": "llama.cpp Q8_0", "ratio": 2.4,
    }  # fmt: skip
    assert [row["label"] for row in told["rows"]] == [row.label for row in ROWS]


def test_the_picture_names_every_row_and_every_size_once(report):
    speed, size = draw_quality(points_of(report)).axes
    labels = {row.label for row in ROWS}
    assert {text.get_text() for text in speed.texts} == labels
    assert {text.get_text() for text in size.texts} == labels - {"int8 core:0.7"}
    legend = [text.get_text() for text in speed.get_legend().get_texts()]
    assert legend[:3] == ["sparserve int8", "sparserve fast", "llama.cpp Q8_0"]
