"""Entries of the cache: whole or absent, whoever is killed; the least used go first.

Run as a script, this file is the writer that is killed.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import conftest  # noqa: F401  (makes adaptsuite importable)

from adaptsuite.atomic import MARKER
from adaptsuite.cache import Cache, cache_folder
from adaptsuite.errors import ResourceError, UsageError

ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)


def write(folder, rows=ROWS):
    np.save(folder / "entered.npy", rows)


def put(cache, number, rows=ROWS):
    return cache.put({"number": number}, rows.nbytes, lambda folder: write(folder, rows))


def numbers(cache):
    return [number for number in range(9) if cache.get({"number": number}) is not None]


def used(cache, number, at):
    os.utime(cache.place({"number": number}) / MARKER, (at, at))


def test_an_entry_is_found_again_by_all_of_its_facts(tmp_path):
    put(Cache(tmp_path), 1)
    found = Cache(tmp_path).get({"number": 1})
    assert list(found) == ["entered"] and isinstance(found["entered"], np.memmap)
    np.testing.assert_array_equal(found["entered"], ROWS)
    assert Cache(tmp_path).get({"number": 2}) is None and Cache(tmp_path).get({"number": 1, "more": 0}) is None
    assert '"number": 1' in (Cache(tmp_path).place({"number": 1}) / "facts.json").read_text()


def test_the_entries_unused_for_longest_go_first(tmp_path):
    cache = Cache(tmp_path)
    for number in (1, 2, 3):
        put(cache, number)
        used(cache, number, number)
    size = sum(f.stat().st_size for f in cache.place({"number": 1}).iterdir())
    assert cache.get({"number": 1}) is not None  # now the last one used
    small = Cache(tmp_path, limit=2 * size + ROWS.nbytes)
    put(small, 4)
    assert numbers(small) == [1, 3, 4]
    put(Cache(tmp_path, limit=size), 5)
    assert numbers(small) == [5]


def test_an_entry_beyond_the_limit_is_refused_and_takes_no_other_s_place(tmp_path):
    put(Cache(tmp_path), 1)
    small = Cache(tmp_path, limit=ROWS.nbytes - 1)
    with pytest.raises(ResourceError, match=r"MiB .*limit of .*ADAPTSUITE_CACHE_GIB"):
        put(small, 2)
    assert numbers(small) == [1]


def test_an_entry_that_lost_bytes_is_none(tmp_path):
    cache = Cache(tmp_path)
    put(cache, 1)
    file = cache.place({"number": 1}) / "entered.npy"
    os.truncate(file, file.stat().st_size - 1)
    assert numbers(cache) == []
    np.testing.assert_array_equal(put(cache, 1)["entered"], ROWS)


def test_a_failed_writer_leaves_nothing(tmp_path):
    cache = Cache(tmp_path)

    def fails(folder):
        write(folder)
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        cache.put({"number": 1}, 1, fails)
    assert list(cache.folder.iterdir()) == []


def test_arrays_are_computed_once(tmp_path):
    cache = Cache(tmp_path)
    assert cache.arrays({"number": 1}, lambda: {"entered": ROWS})[1] is False
    again, found = cache.arrays({"number": 1}, lambda: pytest.fail("computed twice"))
    assert found and (again["entered"] == ROWS).all() and again["entered"].flags.writeable
    none, found = Cache(tmp_path, limit=1).arrays({"number": 2}, lambda: {"entered": ROWS})
    assert not found and none["entered"] is ROWS  # no room is no reason to stop


def test_the_user_s_folder_and_limit_are_where_they_are_said_to_be(monkeypatch, tmp_path):
    monkeypatch.setenv("ADAPTSUITE_CACHE", str(tmp_path))
    assert Cache().folder == tmp_path / "features"
    monkeypatch.delenv("ADAPTSUITE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "adaptsuite"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "adaptsuite"
    monkeypatch.setenv("ADAPTSUITE_CACHE_GIB", "0.5")
    assert Cache().limit == 1 << 29
    monkeypatch.setenv("ADAPTSUITE_CACHE_GIB", "much")
    with pytest.raises(UsageError, match="GiB"):
        Cache()


@pytest.mark.parametrize(("when", "before"), [("middle", False), ("before rename", True)])
def test_a_writer_killed_with_kill_9_leaves_the_entry_as_it_was(tmp_path, when, before):
    cache = Cache(tmp_path)
    if before:
        put(cache, 1)
    script = subprocess.Popen([sys.executable, __file__, str(tmp_path), when], stdout=subprocess.PIPE, text=True)
    assert script.stdout.readline().strip() == "now"  # it waits there
    script.send_signal(signal.SIGKILL)
    assert script.wait() == -signal.SIGKILL
    script.stdout.close()
    assert [p.name.startswith(".") for p in cache.folder.iterdir()].count(True) == 1  # what it had written
    found = cache.get({"number": 1})
    assert (found is None) if not before else (found["entered"] == ROWS).all()
    np.testing.assert_array_equal(put(cache, 1, ROWS + 1)["entered"], ROWS + 1)
    assert [p.name for p in cache.folder.iterdir()] == [cache.place({"number": 1}).name]


def main(folder: str, when: str) -> None:
    import time

    from adaptsuite import atomic

    def wait(*_):
        print("now", flush=True)
        time.sleep(600)

    def half(folder):
        write(folder)
        if when == "middle":
            os.truncate(folder / "entered.npy", 100)
            wait()

    atomic._put_in_place = wait  # marker and all files are on the disk
    Cache(folder).put({"number": 1}, 1, half)


if __name__ == "__main__":
    main(*sys.argv[1:])
