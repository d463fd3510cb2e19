"""Turns, idleness and ratios of alternated measurements."""

import random
import statistics

import pytest

from sparserve.bench import rounds
from sparserve.bench.rounds import fresh_prompts, median_ratio, take_turns, text_prompts
from sparserve.bench.systems import Run
from sparserve.errors import SparserveError


class Named:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log = name, log

    def run(self, prompts, new_tokens):
        self._log.append(self.name)
        return Run(1.0, 2.0, new_tokens, len(self._log))


def test_each_round_begins_with_another_system_and_keeps_their_order():
    order: list[str] = []
    systems = [Named(name, order) for name in "abc"]
    for turn in range(4):
        runs = take_turns(systems, turn, [(1,)], 5)
        first = turn % 3
        # `tokens_at_ttft` says as which run of all it came.
        assert [run.tokens_at_ttft - 3 * turn for run in runs] == [
            (place - first) % 3 + 1 for place in range(3)
        ]
    assert "".join(order) == "abcbcacababc"


def test_prompts_are_of_the_vocabulary_and_never_the_same():
    source = random.Random(1)
    first, second = (fresh_prompts(source, 7, 3, 40) for _ in range(2))
    assert [len(prompt) for prompt in first] == [40] * 3
    assert {token for prompt in first for token in prompt} == set(range(7))
    assert len({*first, *second}) == 6


class Clock:
    """Stands in for the module `time`: a thread of this process spins until `stop`. A real one may get no
    CPU on a busy machine."""

    def __init__(self, stop: float) -> None:
        self._now, self._stop = 0.0, stop

    def monotonic(self) -> float:
        return self._now

    def process_time(self) -> float:
        return min(self._now, self._stop)

    def sleep(self, seconds: float) -> None:
        self._now += seconds


def test_a_thread_that_spins_is_waited_for_and_then_told(monkeypatch):
    monkeypatch.setattr(rounds, "time", Clock(stop=100))
    with pytest.raises(SparserveError, match=r"use 1.0 CPUs 0.3 s after the last run"):
        rounds.wait_until_idle(patience=0.3)
    clock = Clock(stop=0.2)
    monkeypatch.setattr(rounds, "time", clock)
    rounds.wait_until_idle()
    assert 0.2 < clock.monotonic() < 1


def test_the_ratio_is_the_median_of_the_rounds_own():
    ours, theirs = [10.0, 1.0, 30.0], [5.0, 4.0, 10.0]
    assert median_ratio(ours, theirs) == statistics.median([2.0, 0.25, 3.0])


def test_pieces_of_a_text_are_spread_over_it_and_go_round_its_end():
    source, text = random.Random(1), list(range(100))
    pieces = text_prompts(source, text, 4, 30)
    assert [len(piece) for piece in pieces] == [30] * 4
    first = pieces[0][0]
    assert [piece[0] for piece in pieces] == [(first + 25 * i) % 100 for i in range(4)]
    for piece in pieces:
        assert list(piece) == [(piece[0] + i) % 100 for i in range(30)]
    assert len({text_prompts(source, text, 1, 5)[0] for _ in range(20)}) > 10
    assert text_prompts(source, [7, 8, 9], 2, 8)[1][:3] in ((7, 8, 9), (8, 9, 7), (9, 7, 8))
