"""The audit log: what was said of which input by which weights, in a file that only grows and shows every change.

One JSON line an output. It holds numbers and hashes alone: the input's UID as a keyed hash, adapter and base by their
fingerprints, outputs as numbers in the order of the adapter's labels. Versions and time are filled in here, so no text
of a patient can come in. Each line's hash covers the line and the hash of the line before, under a key that is kept
beside the log (LOG.key), or better elsewhere; LOG.head holds how many lines there are and the last hash. Who has no key
can neither change, take out, reorder or add a line, nor cut the end off, without `verify` finding it. What it cannot
find is that log and head were both removed, or put back to an older state: note `Verdict.last` elsewhere now and then.

A line is on the disk before `append` returns: append first, then release the output. What a killed writer left
half-written was never acknowledged, and the next one cuts it off. Locks are those of one host (`flock`).
"""

import contextlib
import datetime
import errno
import functools
import hashlib
import hmac
import json
import math
import numbers
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaptsuite.atomic import clear_errors, write_file
from adaptsuite.errors import DataError, ResourceError
from adaptsuite.report import collect_versions

START = "0" * 64  # the hash before the first line
FIELDS = ("n", "time", "input", "adapter", "base", "versions", "threshold", "output", "previous", "hash")
HEX = re.compile(r"[0-9a-f]{64}")
HALF = "half-written"
KEEP = "keep the file, and start another log"
VERSION = re.compile(r"[0-9][0-9A-Za-z.+]{0,40}")


@dataclass(frozen=True)
class Verdict:
    """What `verify` found: a log without problems is whole. notes: what a killed writer left, no sign of tampering."""

    entries: int
    last: str  # hash of the last entry
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class AuditLog:
    """The log at a path, and its key; `open_log` makes both."""

    path: Path
    key: bytes = field(repr=False)

    def input_hash(self, uid: str) -> str:
        """HMAC-SHA256 of a UID: whoever has the key finds the same input again, and nobody else."""
        if not isinstance(uid, str) or not uid:
            raise ValueError("the input's UID is no text, or empty")
        return hmac.new(self._key("input"), uid.encode(), hashlib.sha256).hexdigest()

    def append(
        self,
        uid: str,
        adapter: str,
        base: str,
        threshold: float | Sequence[float] | None,
        output: float | Sequence[float],
    ) -> dict[str, Any]:
        """Writes one line and returns its entry, once it is on the disk.

        uid: of the study, series or image; only its hash is written.  adapter, base: sha256 in hexadecimal.
        threshold: the one applied, or one for each label, None without one.  output: one number or several, as the
        adapter's labels stand.
        Raises ValueError for anything else, DataError where the log does not continue its head (it was damaged: keep
        it, start another), and ResourceError where it cannot be written: the output may not be released then.
        """
        facts = {
            "input": self.input_hash(uid),
            "adapter": _hexadecimal(adapter, "adapter"),
            "base": _hexadecimal(base, "base"),
            "versions": _versions(),
            "threshold": None if threshold is None else _numbers(threshold, "threshold"),
            "output": _numbers(output, "output"),
        }
        with clear_errors(self.path), _locked(self.path) as handle:
            previous, n, size = self._end(handle)
            entry = {"n": n, "time": _now(), **facts, "previous": previous}
            entry["hash"] = self._hash(entry)
            _write(handle, _line(entry), size)
            self._seal(n + 1, entry["hash"])  # fails: log ahead of its head by one, as after a kill
        return entry

    def verify(self) -> Verdict:
        """Reads the whole log; a problem names its line, from 1 on. Raises DataError where there is no log."""
        if not self.path.is_file():
            raise DataError(f"{self.path} is no audit log: no such file")
        with _locked(self.path, shared=True) as handle:
            return self._read(handle)

    def _read(self, handle: int) -> Verdict:
        entries, last, problems, notes = 0, START, [], []
        with os.fdopen(os.dup(handle), "rb") as file:
            for number, raw in enumerate(file, 1):
                entry, problem = self._parsed(raw, entries, last)
                if problem == HALF:
                    notes.append(f"line {number} is {HALF}: it was never acknowledged")
                elif problem:
                    problems.append(f"line {number}: {problem}")
                if entry is not None:  # go on from what it says of itself: one change is one problem
                    entries, last = entry["n"] + 1, entry["hash"]
        return Verdict(entries, last, (*problems, *self._head_problems(entries, last)), tuple(notes))

    def _parsed(self, raw: bytes, n: int, previous: str) -> tuple[dict[str, Any] | None, str]:
        """The entry of a line that should be entry `n` after the hash `previous`, and what is wrong with it."""
        entry = _entry(raw)
        if entry is None:
            return None, "is no entry of this log" if raw.endswith(b"\n") else HALF
        if not self._signed(entry):
            return entry, "was changed, or written with another key"
        if entry["n"] > n:
            return entry, f"{entry['n'] - n} entries before it are missing or stand elsewhere"
        if entry["n"] < n:
            return entry, f"entry {entry['n']} stands where entry {n} belongs"
        return entry, "" if entry["previous"] == previous else "does not continue the line before"

    def _head_problems(self, entries: int, last: str) -> list[str]:
        head = self._head()
        if head is None:
            return [f"{self._head_path.name} is missing or was changed"] if entries else []
        if entries < head[0]:
            return [f"the end is missing: {head[0] - entries} of {head[0]} entries"]
        if entries > head[0] + 1 or (entries == head[0] and last != head[1]):
            return [f"{self._head_path.name} does not belong to this end of the log"]
        return []

    def _end(self, handle: int) -> tuple[str, int, int]:
        """Hash and number to continue with, and the log's length without what a killed writer left."""
        raw, size = _last_line(handle)
        head = self._head()
        if not raw:
            if head is None:
                self._seal(0, START)
            elif head[0]:
                raise DataError(f"{self.path}: all {head[0]} entries are missing; {KEEP}")
            return START, 0, size
        entry = _entry(raw)
        if entry is None or not self._signed(entry):
            raise DataError(f"{self.path}: its last line was changed; {KEEP}")
        if head not in ((entry["n"] + 1, entry["hash"]), (entry["n"], entry["previous"])):  # killed before the head
            raise DataError(f"{self.path}: its end, or its head, is not what was last written; {KEEP}")
        if head[0] == entry["n"]:  # killed once more before the head, it would be two lines behind
            self._seal(entry["n"] + 1, entry["hash"])
        return entry["hash"], entry["n"] + 1, size

    def _signed(self, entry: Mapping[str, Any]) -> bool:
        return hmac.compare_digest(entry["hash"], self._hash(entry))

    def _head(self) -> tuple[int, str] | None:
        """(entries, last hash), None where there is no head with this key's seal."""
        try:
            head = json.loads(self._head_path.read_text())
            sealed = hmac.compare_digest(head["seal"], self._head_seal(head["entries"], head["last"]))
            return (head["entries"], head["last"]) if sealed else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _seal(self, entries: int, last: str) -> None:
        head = {"entries": entries, "last": last, "seal": self._head_seal(entries, last)}
        write_file(self._head_path, json.dumps(head) + "\n")

    @property
    def _head_path(self) -> Path:
        return self.path.with_name(self.path.name + ".head")

    def _head_seal(self, entries: int, last: str) -> str:
        return hmac.new(self._key("head"), f"{entries}:{last}".encode(), hashlib.sha256).hexdigest()

    def _hash(self, entry: Mapping[str, Any]) -> str:
        content = {name: value for name, value in entry.items() if name != "hash"}
        return hmac.new(self._key("line"), _canonical(content), hashlib.sha256).hexdigest()

    def _key(self, purpose: str) -> bytes:
        return hmac.new(self.key, purpose.encode(), hashlib.sha256).digest()


def open_log(path: str | Path, key: str | Path | None = None) -> AuditLog:
    """The log at `path`, with the key of the file `key` (default: LOG.key); a new key is made where there is no log.

    Raises DataError where the log is there and its key is not, or the key's file holds none.
    """
    path = Path(path)
    key = path.with_name(path.name + ".key") if key is None else Path(key)
    if not key.exists():
        with clear_errors(key), _locked(path) as handle:
            if not key.exists():  # nobody else made it meanwhile
                if os.fstat(handle).st_size:
                    raise DataError(f"{path} has no key {key}: name the file that holds it")
                make_key(key)
    text = key.read_text().strip()
    if not HEX.fullmatch(text):
        raise DataError(f"{key} holds no key: 64 hexadecimal digits are expected")
    return AuditLog(path, bytes.fromhex(text))


def verify(path: str | Path, key: str | Path | None = None) -> Verdict:
    """`AuditLog.verify` of the log at `path`. Raises DataError where there is no log or no key."""
    if not Path(path).is_file():
        raise DataError(f"{path} is no audit log: no such file")
    return open_log(path, key).verify()


def make_key(path: Path) -> None:
    """A key that its owner alone can read, whole under its name."""
    temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(handle, secrets.token_hex(32).encode() + b"\n")
        os.fsync(handle)
        os.link(temp, path)  # never over a key that is there
    finally:
        os.close(handle)
        temp.unlink()


@contextlib.contextmanager
def _locked(path: Path, shared: bool = False) -> Iterator[int]:
    """A handle of the log that no other process has at the same time, or none that writes."""
    try:
        import fcntl
    except ImportError:
        raise ResourceError("the audit log needs the file locks of a POSIX system") from None
    if not shared:
        path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDONLY if shared else os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def _last_line(handle: int) -> tuple[bytes, int]:
    """The last whole line, empty where there is none, and where it ends."""
    size = start = os.fstat(handle).st_size
    tail = b""
    while start > 0 and tail.count(b"\n") < 2:
        step = min(start, 65536)
        start -= step
        tail = os.pread(handle, step, start) + tail
    whole = tail[: tail.rfind(b"\n") + 1]
    return whole[whole.rfind(b"\n", 0, -1) + 1 :], size - len(tail) + len(whole)


def _entry(raw: bytes) -> dict[str, Any] | None:
    """What a line holds, None where this module cannot have written it."""
    try:
        entry = json.loads(raw)
        exact = type(entry) is dict and tuple(entry) == FIELDS and raw == _line(entry)
    except (ValueError, RecursionError):
        return None
    if not exact or type(entry["n"]) is not int:
        return None
    hashes = (entry["hash"], entry["previous"])
    return entry if all(isinstance(h, str) and HEX.fullmatch(h) for h in hashes) else None


def _write(handle: int, line: bytes, size: int) -> None:
    """Puts a line after the first `size` bytes, whole and to the disk, or leaves the log at these."""
    if os.fstat(handle).st_size > size:
        os.ftruncate(handle, size)
    try:
        if os.write(handle, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(handle)
    except BaseException:
        os.ftruncate(handle, size)
        raise


@functools.cache
def _versions() -> dict[str, str]:
    return {name: found for name, found in collect_versions().items() if VERSION.fullmatch(found)}


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":"), sort_keys=True, allow_nan=False).encode()


def _now() -> str:
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%S.%fZ}"


def _hexadecimal(text: Any, name: str) -> str:
    if not isinstance(text, str) or not HEX.fullmatch(text):
        raise ValueError(f"{name} is no sha256: 64 lower-case hexadecimal digits are expected")
    return text


def _number(value: Any, name: str) -> float | int:
    """Raises without repeating the value: it might be somebody's name."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name} is no finite number: the audit log holds numbers and hashes alone")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _numbers(values: Any, name: str) -> float | int | list[float | int]:
    if isinstance(values, str | bytes | Mapping):
        raise ValueError(f"{name} is no number: the audit log holds numbers and hashes alone")
    if hasattr(values, "tolist"):
        values = values.tolist()  # of numpy and torch
    return [_number(v, name) for v in values] if isinstance(values, Sequence) else _number(values, name)
