"""Folders and files that appear whole or not at all.

Temporary sibling, fsync of every file, marker with the sizes, rename, fsync of the parent: killed anywhere, what was
there before or what is new can be read. Modes follow the umask (safetensors alone would write 0600).
"""

import contextlib
import ctypes
import glob
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from adaptsuite.errors import ResourceError, UsageError

MARKER = "complete.json"


def write_folder(path: str | Path, writer: Callable[[Path], object]) -> Path:
    """Makes `path` the folder that `writer(folder)` fills, and returns it.

    A folder already there is replaced as a whole, if `write_folder` made it and nobody added to it (`check_target`).
    Raises ResourceError when disk, rights or file handles are missing; the folder as it was is then intact.
    """
    path = Path(path)
    with clear_errors(path):
        check_target(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, path.name)
        temp = _sibling(path)
        try:
            temp.mkdir()
            writer(temp)
            _seal(temp)
            _put_in_place(temp, path)
            _fsync(path.parent)
        finally:
            shutil.rmtree(temp, ignore_errors=True)  # what was not finished, or the folder that was replaced
    return path


def write_file(path: str | Path, content: str | bytes) -> Path:
    """Writes one file whole or not at all, and returns its path. Raises ResourceError as `write_folder`."""
    path = Path(path)
    with clear_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = _sibling(path)
        try:
            temp.write_bytes(content.encode() if isinstance(content, str) else content)
            _fsync(temp)
            os.replace(temp, path)
            _fsync(path.parent)
        finally:
            temp.unlink(missing_ok=True)
    return path


def check_target(path: str | Path) -> None:
    """Raises UsageError when `write_folder(path, ...)` would delete files that it did not write.

    Call it before hours of work, so that the refusal does not come at their end.
    """
    path = Path(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise UsageError(f"{path} is a file, expected a folder: give another name")
    present = {p.relative_to(path).as_posix() for p in path.rglob("*") if not p.is_dir()}
    foreign = sorted(present - {MARKER} - _listed(path).keys())
    if foreign:
        raise UsageError(f"{path} holds files that would be lost ({', '.join(foreign[:3])}): give another folder")


def is_complete(path: str | Path) -> bool:
    """True when `path` was written by `write_folder` and every file still has its size."""
    path = Path(path)
    listed = _listed(path)
    return bool(listed) and all((path / n).is_file() and (path / n).stat().st_size == s for n, s in listed.items())


def remove_folder(path: str | Path) -> None:
    """Deletes a folder so that a half-deleted one is never seen under its name."""
    temp = _sibling(Path(path))
    os.rename(path, temp)
    shutil.rmtree(temp, ignore_errors=True)


def sweep(parent: str | Path, name: str | None = None) -> None:
    """Removes what killed writers left in `parent` (of one target, or of all), and puts back a folder moved aside."""
    for temp in Path(parent).glob(f".{glob.escape(name or '') or '*'}.temp-*"):
        target, _, writer = temp.name[1:].rpartition(".temp-")
        pid, _, aside = writer.partition("-")
        if pid.isdigit() and int(pid) != os.getpid() and _alive(int(pid)):
            continue
        if aside and not (temp.parent / target).exists():
            os.rename(temp, temp.parent / target)
        elif temp.is_dir():
            shutil.rmtree(temp, ignore_errors=True)
        else:
            temp.unlink(missing_ok=True)


def _sibling(path: Path) -> Path:
    return path.parent / f".{path.name}.temp-{os.getpid()}"


def _listed(folder: Path) -> dict[str, int]:
    """File -> bytes of the folder's marker; empty when there is none that can be read."""
    try:
        return dict(json.loads((folder / MARKER).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _seal(folder: Path) -> None:
    """Modes by umask, fsync of all files, then the marker: a marker on disk means that the files are."""
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    with (folder / MARKER).open("x") as marker:
        mode = stat.S_IMODE(os.fstat(marker.fileno()).st_mode)
        for file in files.values():
            file.chmod(mode)
            _fsync(file)
        json.dump({"files": {name: file.stat().st_size for name, file in files.items()}}, marker)
        marker.flush()
        os.fsync(marker.fileno())
    for directory in [*(p for p in folder.rglob("*") if p.is_dir()), folder]:
        _fsync(directory)


def _put_in_place(temp: Path, path: Path) -> None:
    """Renames `temp` to `path`; a folder that is there trades places with it in one call where the system can."""
    if not path.exists() or not any(path.iterdir()):
        if path.exists() and os.name == "nt":
            path.rmdir()
        os.rename(temp, path)
    elif not _exchange(temp, path):
        aside = temp.with_name(f"{temp.name}-aside")
        os.rename(path, aside)  # killed here, `sweep` puts it back
        try:
            os.rename(temp, path)
        except OSError:
            os.rename(aside, path)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two names atomically (renameat2, Linux); False where that cannot be done."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, exchange = -100, 2
    return rename(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0


def _fsync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # directories cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _alive(pid: int) -> bool:
    if os.name == "nt":  # signal 0 ends a process there
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """Disk full, read-only, no handles -> ResourceError; safetensors wraps the system's error in its own class."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, SafetensorError) and "os error" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ResourceError(f"cannot write {path}: {reason}; what was there before is intact") from error
