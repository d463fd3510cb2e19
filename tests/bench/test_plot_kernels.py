"""The picture of the phases holds every figure of its report."""

import pytest

from sparse_kernels.decoder import PHASES
from sparserve.bench.kernels import WHOLE, Plan, Report, Row
from sparserve.bench.plot_kernels import draw


@pytest.fixture
def report() -> Report:
    plan = Plan(["portable", "amx"], [1, 8], 128, 256, rounds=3)
    rows = [
        Row(level, p.kind, phase, p.batch, p.context, i * speed, 1000, 2.0, 40.0 + i, 7.0 * i)
        for p in plan.points
        for level, speed in (("portable", 3.0), ("amx", 1.0))
        for i, phase in enumerate((*PHASES, WHOLE), 1)
    ]
    return Report("0", "now", "2 x CPU", "tiny", "int8", 2, 0.0, 30.0, plan, rows)


def test_bars_and_labels_are_the_rows(report):
    figure = draw(report)
    assert [panel.get_title() for panel in figure.axes] == [
        "decode, batch 1, after 128 tokens",
        "decode, batch 8, after 128 tokens",
        "prompt of 256 tokens",
    ]
    for panel, second in zip(figure.axes, ("47 %", "47 %", "49 GFLOP/s"), strict=True):
        bars = [(bar.get_y(), bar.get_height()) for bar in panel.patches]
        assert bars[0::2] == [(3 * i * (i - 1) / 2, 3 * i) for i in range(1, 7)]  # one on another
        assert bars[1::2] == [(i * (i - 1) / 2, i) for i in range(1, 7)]
        assert [text.get_text() for text in panel.texts] == [
            f"21.0 ms\n{second}",
            f"7.0 ms\n{second}",
        ]
        assert [tick.get_text() for tick in panel.get_xticklabels()] == ["portable", "amx"]
        assert panel.get_ylim()[1] > 63
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(PHASES)
    for word in ("tiny", "2 threads", "3 alternated rounds", "30 GB/s"):
        assert word in figure.get_suptitle()
