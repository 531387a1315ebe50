"""SIGINT and SIGTERM that wait until a step is over."""

import signal
import threading
from typing import Any, NoReturn


class Signals:
    """Notes the first SIGINT or SIGTERM so that the step can end; a second one acts at once. Main thread only."""

    def __init__(self):
        self.caught: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._note) or signal.SIG_DFL
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        self.caught = number
        signal.signal(number, self.before[number])

    def take_effect(self) -> NoReturn:
        """What the signal would have done without us."""
        if self.caught == signal.SIGTERM:
            signal.raise_signal(signal.SIGTERM)
            raise SystemExit(128 + signal.SIGTERM)  # where SIGTERM is handled by going on
        raise KeyboardInterrupt
