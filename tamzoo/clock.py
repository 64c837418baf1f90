"""One session's time: when a snapshot is due, and when the budget is spent."""

import time


class Clock:
    """Starts when made.

    Args:
        budget: Seconds of wall time, the last snapshot included.
        snapshot_seconds: Between two snapshots.
    """

    def __init__(self, budget: float, snapshot_seconds: float) -> None:
        self.budget, self.snapshot_seconds = budget, snapshot_seconds
        self._started = self._last = time.monotonic()
        self._cost = 0.0  # seconds that the last snapshot took

    def snapshot_due(self) -> bool:
        return time.monotonic() - self._last >= self.snapshot_seconds

    def snapshot_ended(self, began: float) -> None:
        """Tells when, by time.monotonic, a snapshot that has just ended began."""
        self._last = time.monotonic()
        self._cost = self._last - began

    def spent(self) -> bool:
        return time.monotonic() - self._started + self._cost > self.budget
