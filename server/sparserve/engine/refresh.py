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
        self._interval = interval
        self.passes = 0  # that are over
        self._begin = first
        self._has_ended = False
        self.reached = first  # the pass begins or goes on here

    @classmethod
    def of(cls, plan: ChoicePlan, first: int) -> Refresh | None:
        """Where the plan's policy asks for it."""
        interval = plan.policy.refresh_interval
        return cls(interval, first) if interval else None

    @property
    def due(self) -> int | None:
        """The position with which the next pass ends: its token is the newest then. None: there is none."""
        return None if self._has_ended else self._last

    @property
    def _last(self) -> int:
        return self._begin + self._interval - 1

    def end(self) -> None:
        """Decoding is dense from now on."""
        self._has_ended = True

    def advance(self, count: int) -> None:
        """`count` more positions were computed densely."""
        self.reached += count
        if self.reached > self._last:
            self._begin = self.reached
            self.passes += 1
