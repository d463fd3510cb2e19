"""Bytes given out where they help most: of several ways to store each thing, one each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Option:
    size: int  # bytes
    loss: float


def ladder(options: Sequence[Option]) -> list[int]:
    """Places in `options` of the smallest one and of those that are worth their bytes, by rising size: the
    lower convex hull, on which losses fall, and each step gains less per byte than the one before."""
    steps: list[int] = []
    for place in sorted(range(len(options)), key=lambda i: (options[i].size, options[i].loss)):
        if steps and options[place].loss >= options[steps[-1]].loss:
            continue
        while len(steps) > 1 and _gain(options, steps[-1], place) >= _gain(options, *steps[-2:]):
            steps.pop()
        steps.append(place)
    return steps


def give_out(
    items: Sequence[Sequence[Option]],
    *,
    most_bytes: float = float("inf"),
    most_loss: float = float("-inf"),
) -> list[int]:
    """Of each item the place of its option.

    All begin at the first of their ladder; steps are taken by their gain per byte, the earlier item first among
    equals, until the losses together are at most `most_loss`; those that are not needed then are taken back, the
    last one first. An item whose next step does not fit into `most_bytes` gets none any more.
    """
    ladders = [ladder(options) for options in items]
    chosen = [0] * len(items)
    size, loss = totals(items, [steps[0] for steps in ladders])
    offers = [
        (-_gain(options, *steps[number : number + 2]), item, number)
        for item, (options, steps) in enumerate(zip(items, ladders, strict=True))
        for number in range(len(steps) - 1)
    ]
    # An item's gains fall, so its steps come in their order.
    taken: list[tuple[int, float]] = []  # (item, what the step gained)
    for _, item, number in sorted(offers):
        if loss <= most_loss:
            break
        before, after = (items[item][place] for place in ladders[item][number : number + 2])
        if chosen[item] == number and size + after.size - before.size <= most_bytes:
            chosen[item] += 1
            size += after.size - before.size
            loss += after.loss - before.loss
            taken.append((item, before.loss - after.loss))
    kept: set[int] = set()  # items with a step that is needed, and so all before it
    for item, gain in reversed(taken):
        if item not in kept and loss + gain <= most_loss:
            chosen[item] -= 1
            loss += gain
        else:
            kept.add(item)
    return [steps[number] for steps, number in zip(ladders, chosen, strict=True)]


def totals(items: Sequence[Sequence[Option]], places: Sequence[int]) -> tuple[int, float]:
    """(bytes, loss) of these options together."""
    chosen = [options[place] for options, place in zip(items, places, strict=True)]
    return sum(own.size for own in chosen), sum(own.loss for own in chosen)


def _gain(options: Sequence[Option], before: int, after: int) -> float:
    """Per byte."""
    less, more = options[before], options[after]
    return (less.loss - more.loss) / (more.size - less.size)
