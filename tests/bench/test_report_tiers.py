"""What is fastest at each limit of KL."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparserve.bench.report_tiers import FEATURES, Row, tiers_of


@pytest.fixture(scope="module")
def rows(report_row) -> list[Row]:
    return [
        report_row("int8", 0.004, 100, 110, 120),
        report_row("int8 core:0.7", 0.05, 150, 160, 170, policy="core:0.7"),
        report_row("fast", 0.06, 130, 140, 150),
        report_row("cut", 0.3, 155, 165, 150, pruned=0.2),
        report_row("cut-healed", 0.06, 180, 165, 150, pruned=0.2, healed="core:0.5"),
        report_row("cut-healed core:0.5", 0.07, 210, 220, 200, pruned=0.2, healed="core:0.5", policy="core:0.5"),
        report_row("llama.cpp Q8_0", 0.005, 40, 55, 50, system="llama.cpp"),
        report_row("llama.cpp Q4_0", 0.31, 90, 100, 70, system="llama.cpp"),
        report_row("openvino int8", 0.03, 40, 80, 85, system="openvino"),
    ]  # fmt: skip


def told(rows, kl):
    (tier,) = tiers_of(rows, [kl])
    return json.loads(json.dumps(tier.as_json()))


def test_ours_beside_the_peer(rows):
    tiers = tiers_of(rows, [0.001, 0.004, 0.005, 0.05, 0.4])
    found = [
        [None if each is None else each.label for each in (tier.ours, tier.peer)] for tier in tiers
    ]
    assert found == [
        [None, None],
        ["int8", None],
        ["int8", "llama.cpp Q8_0"],
        ["int8 core:0.7", "openvino int8"],
        ["cut-healed core:0.5", "llama.cpp Q4_0"],
    ]
    # Medians of the rounds' own: 100 / 40, 110 / 55, 120 / 50; 150 / 40, 160 / 80, 170 / 85; 210 / 90, 220 / 100, 200 / 70
    assert [tier.ratio for tier in tiers] == [None, None, 2.4, 2, 2.333]


def test_each_feature_with_and_without_it(rows):
    assert told(rows, 0.06) == {
        "kl": 0.06, "ours": "cut-healed", "peer": "openvino int8", "ratio": 2.062,
        "sparsity": {"without": "cut-healed", "with": "int8 core:0.7", "ratio": 0.97},
        "pruning": {"without": "int8 core:0.7", "with": "cut-healed", "ratio": 1.031},
        "healing": {"without": "int8 core:0.7", "with": "cut-healed", "ratio": 1.031},
    }  # fmt: skip
    assert told(rows, 0.3)["sparsity"] == {
        "without": "cut-healed", "with": "cut-healed core:0.5", "ratio": 1.333
    }  # fmt: skip
    assert told(rows, 0.3)["healing"]["without"] == "int8 core:0.7"
    assert told(rows, 0.005)["pruning"] == {"without": "int8", "with": None, "ratio": None}
    only_healed = [row for row in rows if row.healed is not None]
    assert told(only_healed, 0.06)["healing"] == {
        "without": None, "with": "cut-healed", "ratio": None
    }  # fmt: skip


@given(
    st.lists(
        st.tuples(
            st.floats(0, 1), st.floats(1, 9), st.booleans(), st.booleans(), st.booleans()
        ), max_size=8,
    ),
    st.floats(0, 1),
)  # fmt: skip
def test_the_better_of_with_and_without_is_the_fastest_of_ours(report_row, values, limit):
    rows = [
        report_row(
            f"{index}", kl, speed, policy="core:0.5" if sparse else "dense", pruned=0.1 * pruned,
            healed="dense" if healed else None,
        )
        for index, (kl, speed, sparse, pruned, healed) in enumerate(values)
    ]  # fmt: skip
    (tier,) = tiers_of(rows, [limit])
    for name, has in FEATURES.items():
        pair = tier.features[name]
        both = [row for row in (pair.without, pair.having) if row is not None]
        assert all(row.kl <= limit for row in both)
        assert pair.having is None or has(pair.having)
        assert pair.without is None or not has(pair.without)
        fastest = max((row.tokens_per_second for row in both), default=None)
        assert fastest == (tier.ours.tokens_per_second if tier.ours else None)
