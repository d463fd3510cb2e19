"""When decoded tokens are computed again with all neurons."""

from __future__ import annotations

from sparserve.sparsity.chooser import ChoicePlan


class Refresh:
    """Every `interval`-th decoded token's step is a dense pass over all tokens since the last one.

    It rewrites their KV. Positions alone say when: neither batch mates nor preemption change what is
    computed, and a pass may be cut into several steps, which computes the same.
    """

    def __init__(self, interval: int, first: int) -> None:
        """`first`: the first decoded position."""
        self.interval = interval
        self.passes = 0
        self._begin = first
        self.reached = first  # the pass begins or goes on here

    @classmethod
    def of(cls, plan: ChoicePlan, first: int) -> Refresh | None:
        """Where the plan's policy asks for it."""
        interval = plan.policy.refresh_interval
        return cls(interval, first) if interval else None

    @property
    def due(self) -> int:
        """The position with which the next pass ends: its token is the newest then."""
        return self._begin + self.interval - 1

    def advance(self, count: int) -> None:
        """`count` more positions were computed densely."""
        self.reached += count
        if self.reached > self.due:
            self._begin = self.reached
            self.passes += 1
