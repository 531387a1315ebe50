"""Decoded files kept in memory, up to a bound."""

from typing import Any

from torch import Tensor

LIMIT = 2 << 30  # bytes


class Memory(dict):
    """What fits into `limit` bytes; what is beyond is read again each time."""

    def __init__(self, limit: int = LIMIT):
        super().__init__()
        self.limit, self.bytes = limit, 0

    @property
    def crowded(self) -> bool:
        """Whether more than half of it is taken, by earlier runs of the process for instance."""
        return self.bytes > self.limit / 2

    def keep(self, key: Any, value: Tensor) -> bool:
        """Whether it is kept."""
        if key not in self and self.bytes + value.nbytes <= self.limit:
            self[key], self.bytes = value, self.bytes + value.nbytes
        return key in self
