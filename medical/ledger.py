"""The ledger of a watched folder: which study folders were taken, in which state, and what became of them.

It lies in the output folder and holds no text: a study folder is told by the keyed hash of its path, its state by that
of the names, sizes and times of its files. Each folder has a file of its own, written whole or not at all, so that a
process killed anywhere finds what was finished. One process at a time has the ledger.
"""

import contextlib
import hashlib
import hmac
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adaptsuite.atomic import clear_errors, write_file
from adaptsuite.errors import DataError, ResourceError, UsageError
from adaptsuite.medical.audit import HEX, make_key

MOST_ATTEMPTS = 3  # of a state at which the process was killed each time
IDENTITY = 32  # digits
LOCK, ABOUT, KEY = "ledger.lock", "about.json", "key"


class Ledger:
    """Entries {"folder", "versions": [{"version", "state", "status", "attempts", "studies", "reason"}]}.

    status: started, done or failed.  Use as `with Ledger.opened(out, facts) as ledger`.
    """

    def __init__(self, folder: Path, key: bytes):
        self.folder, self.key = folder, key
        self.entries: dict[str, dict[str, Any]] = {}
        for path in folder.glob("?" * IDENTITY + ".json"):
            self.entries[path.stem] = _read(path)

    @classmethod
    @contextlib.contextmanager
    def opened(cls, out: Path, facts: Mapping[str, Any]) -> Iterator["Ledger"]:
        """The ledger of an output folder, locked.

        facts: what its entries are about (adapter, format); a ledger about something else is refused with UsageError,
        one that another process has with ResourceError.
        """
        with clear_errors(out), _locked(out):
            folder = out / "ledger"
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / KEY).exists():
                make_key(folder / KEY)
            if not (folder / ABOUT).exists():
                write_file(folder / ABOUT, json.dumps(dict(facts)) + "\n")
            if (other := _read(folder / ABOUT)) != dict(facts):
                changed = ", ".join(sorted(k for k in {*other, *facts} if other.get(k) != facts.get(k)))
                raise UsageError(f"{out}: its ledger is about another {changed}: give another --out")
            key = (folder / KEY).read_text().strip()
            if not HEX.fullmatch(key):
                raise DataError(f"{folder / KEY} holds no key: 64 hexadecimal digits are expected")
            yield cls(folder, bytes.fromhex(key))

    def identity(self, path: Path) -> str:
        """Of a study folder, by its path."""
        return self._digest(["folder", str(path.absolute())])[:IDENTITY]

    def state(self, path: Path) -> str | None:
        """Of the files below a folder, None without any; hidden ones are left out, links are not followed."""
        found = []
        for folder, folders, files in os.walk(path, followlinks=False):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in files:
                file = Path(folder) / name
                with contextlib.suppress(FileNotFoundError):  # it has gone: the state is another one anyhow
                    if not name.startswith("."):
                        s = file.lstat()
                        found.append([file.relative_to(path).as_posix(), s.st_size, s.st_mtime_ns])
        return self._digest(["state", sorted(found)]) if found else None

    def find(self, identity: str, state: str) -> dict[str, Any] | None:
        """What is written of a folder in a state."""
        versions = self.entries.get(identity, {}).get("versions", ())
        return next((v for v in versions if v["state"] == state), None)

    def versions(self, identity: str) -> int:
        """How many states of a folder were taken."""
        return len(self.entries.get(identity, {}).get("versions", ()))

    def start(self, identity: str, state: str) -> dict[str, Any]:
        """Notes that a state is taken, before it is; what was noted of it before is kept but for its outcome."""
        entry = self.entries.setdefault(identity, {"folder": identity, "versions": []})
        own = self.find(identity, state)
        if own is None:
            own = {"version": len(entry["versions"]) + 1, "state": state, "attempts": 0}
            entry["versions"].append(own)
        own |= {"status": "started", "attempts": own["attempts"] + 1, "studies": [], "reason": None}
        self._save(entry)
        return own

    def end(self, identity: str, state: str, status: str, studies: list[str], reason: str | None = None) -> None:
        """done or failed; studies: names of the folders that were written."""
        own = self.find(identity, state)
        own |= {"status": status, "studies": studies, "reason": reason, "attempts": 0}
        self._save(self.entries[identity])

    def drop(self, identity: str, state: str) -> None:
        """As if the state had not been taken."""
        entry = self.entries[identity]
        entry["versions"] = [v for v in entry["versions"] if v["state"] != state]
        self._save(entry)

    def _save(self, entry: Mapping[str, Any]) -> None:
        write_file(self.folder / f"{entry['folder']}.json", json.dumps(entry, indent=1) + "\n")

    def _digest(self, value: Any) -> str:
        return hmac.new(self.key, json.dumps(value).encode(), hashlib.sha256).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error}); remove it, and what it is about is done again") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: damaged; remove it, and what it is about is done again")
    return found


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:
        raise ResourceError("watching a folder needs the file locks of a POSIX system") from None
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResourceError(f"{out}: another process watches with this output folder") from None
        yield
    finally:
        os.close(handle)
