"""Features of frozen prefixes on disk: computed once, memory-mapped, shared by runs, seeds and folds.

An entry is a folder of .npy files, named by a hash of the facts that decide its values. It is written whole or not at
all (adaptsuite.atomic), and the ones that were not used for longest go when the limit is reached.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adaptsuite.atomic import MARKER, is_complete, remove_folder, sweep, write_folder
from adaptsuite.errors import ResourceError, UsageError
from adaptsuite.identity import json_hash

LIMIT_GIB = 20.0  # of all entries together
MIB, GIB = 1 << 20, 1 << 30


def cache_folder() -> Path:
    """ADAPTSUITE_CACHE, else the user's cache folder."""
    if given := os.environ.get("ADAPTSUITE_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adaptsuite"


def limit_bytes() -> int:
    """ADAPTSUITE_CACHE_GIB, else LIMIT_GIB."""
    given = os.environ.get("ADAPTSUITE_CACHE_GIB", str(LIMIT_GIB))
    try:
        return int(float(given) * GIB)
    except (ValueError, OverflowError):
        raise UsageError(f"ADAPTSUITE_CACHE_GIB={given!r}: expected a number of GiB") from None


class Cache:
    """Entries {name: array} by their facts, which JSON can hold; `limit` bytes of them at most."""

    def __init__(self, folder: str | Path | None = None, limit: int | None = None):
        self.folder = (cache_folder() if folder is None else Path(folder)) / "features"
        self.limit = limit_bytes() if limit is None else limit

    def place(self, facts: Mapping[str, Any]) -> Path:
        """The folder of an entry."""
        return self.folder / json_hash(facts)[:32]

    def get(self, facts: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
        """Memory-mapped arrays of a complete entry, which counts as used; None where there is none."""
        folder = self.place(facts)
        if not is_complete(folder):
            return None
        try:
            found = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
        except (OSError, ValueError):  # another run made room meanwhile, or it is damaged
            return None
        with contextlib.suppress(OSError):  # a folder of others, read-only
            os.utime(folder / MARKER)
        return found

    def put(self, facts: Mapping[str, Any], size: int, write: Callable[[Path], object]) -> dict[str, np.ndarray]:
        """The entry that `write(folder)` fills with .npy files of about `size` bytes.

        Raises ResourceError where they do not fit below the limit or on the disk.
        """

        def written(folder: Path) -> None:
            write(folder)
            (folder / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")  # for who wonders what this is

        self.make_room(size)
        write_folder(self.place(facts), written)
        found = self.get(facts)
        if found is None:
            raise ResourceError(f"{self.place(facts)}: cannot be read back")
        return found

    def arrays(
        self, facts: Mapping[str, Any], compute: Callable[[], dict[str, np.ndarray]]
    ) -> tuple[dict[str, np.ndarray], bool]:
        """Arrays in memory, and whether they were found; else they are computed, and kept where there is room."""
        found = self.get(facts)
        if found is not None:
            return {name: np.array(array) for name, array in found.items()}, True
        computed = compute()
        with contextlib.suppress(ResourceError):
            self.put(
                facts,
                sum(array.nbytes for array in computed.values()),
                lambda folder: [np.save(folder / f"{name}.npy", array) for name, array in computed.items()],
            )
        return computed, False

    def make_room(self, size: int) -> None:
        """Removes entries, those not used for longest first, until `size` bytes more keep to the limit."""
        if size > self.limit:
            raise ResourceError(
                f"{size / MIB:.0f} MiB of features are more than the cache's limit of {self.limit / MIB:.0f} MiB "
                "(ADAPTSUITE_CACHE_GIB)"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep(self.folder)
            for _, _, folder in self._by_age(keep=self.limit - size):
                with contextlib.suppress(OSError):  # another run may have been quicker, or still read it
                    remove_folder(folder)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise ResourceError(f"cannot write {self.folder}: {error.strerror or error}") from error
        if free < size * 1.05:
            raise ResourceError(
                f"{self.folder}: {free / MIB:.0f} MiB are free, {size / MIB:.0f} MiB of features are not"
            )

    def _by_age(self, keep: int) -> list[tuple[float, int, Path]]:
        """(last use, bytes, folder) of entries, oldest first, without which the others are at most `keep` bytes."""
        found = []
        for folder in self.folder.iterdir():
            with contextlib.suppress(OSError):
                size = sum(path.stat().st_size for path in folder.iterdir())
                found.append(((folder / MARKER).stat().st_mtime, size, folder))
        total, gone = sum(size for _, size, _ in found), []
        for entry in sorted(found):
            if total <= keep:
                break
            gone.append(entry)
            total -= entry[1]
        return gone
