"""What every alternated measurement needs: fresh prompts, idle rivals, a rotated order, medians."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence

from sparserve.bench.systems import Prompts, Run, System
from sparserve.errors import SparserveError

# (what is measured, done, total)
BenchProgress = Callable[[str, int, int], None]

IDLE_PATIENCE = 5.0  # seconds; OpenMP's and oneTBB's threads spin for some milliseconds
IDLE_SLICE = 0.02
IDLE_SHARE = 0.2  # of one CPU


def fresh_prompts(source: random.Random, vocab_size: int, count: int, length: int) -> Prompts:
    """Random token ids, so that nothing of them is cached yet."""
    return [tuple(source.randrange(vocab_size) for _ in range(length)) for _ in range(count)]


def text_prompts(
    source: random.Random, token_ids: Sequence[int], count: int, length: int
) -> Prompts:
    """Pieces of a text, as far from each other as it allows; a short one is read from its beginning again."""
    start = source.randrange(len(token_ids))
    begins = [start + index * len(token_ids) // count for index in range(count)]
    return [
        tuple(token_ids[place % len(token_ids)] for place in range(begin, begin + length))
        for begin in begins
    ]


def take_turns(
    systems: Sequence[System],
    turn: int,
    prompts: Prompts,
    new_tokens: int,
    on_run: Callable[[], None] = lambda: None,
) -> list[Run]:
    """One round, a run of each system on the same prompts; in the order of `systems`.

    Each round begins with another system, so that none always follows the same state of the machine.
    """
    found: dict[int, Run] = {}
    for place in range(len(systems)):
        index = (turn + place) % len(systems)
        wait_until_idle()
        found[index] = systems[index].run(prompts, new_tokens)
        on_run()
    return [found[index] for index in range(len(systems))]


def wait_until_idle(patience: float = IDLE_PATIENCE) -> None:
    """Wait until no thread of this process spins: a rival's pool would take the next one's CPU time.

    Raises SparserveError where that does not happen.
    """
    give_up = time.monotonic() + patience
    while True:
        used, started = time.process_time(), time.monotonic()
        time.sleep(IDLE_SLICE)
        share = (time.process_time() - used) / (time.monotonic() - started)
        if share < IDLE_SHARE:
            return
        if time.monotonic() > give_up:
            raise SparserveError(
                f"threads of this process use {share:.1f} CPUs {patience:g} s after the last run; nothing "
                "measured beside them would be right: leave out the peer that ran before"
            )


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Of the ratios in each round: what slows the machine down for a while slows both."""
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return round(statistics.median(ratios), 3)
