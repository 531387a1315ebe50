import contextlib
import ctypes
import json
import os
import resource
import stat

import pytest
import torch
from safetensors.torch import save_file

from adaptsuite.atomic import MARKER, check_target, is_complete, sweep, write_file, write_folder
from adaptsuite.errors import ResourceError, UsageError


def writer(**files):
    def write(folder):
        for name, text in files.items():
            (folder / name).write_text(text)

    return write


def content(folder):
    return {p.name: p.read_text() for p in folder.iterdir() if p.name != MARKER}


def hidden(folder):
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


@contextlib.contextmanager
def file_limit(size):
    """Writes beyond `size` bytes fail, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_folder_is_written_and_replaced_as_a_whole(tmp_path):
    target = tmp_path / "deep" / "adapter"
    write_folder(target, writer(a="1", b="2"))
    assert content(target) == {"a": "1", "b": "2"}
    write_folder(target, writer(c="3"))
    assert content(target) == {"c": "3"}
    assert is_complete(target) and hidden(target.parent) == []


def test_modes_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        folder = write_folder(tmp_path / "a", lambda f: save_file({"w": torch.zeros(3)}, f / "w.safetensors"))
    finally:
        os.umask(old)
    assert stat.S_IMODE((folder / "w.safetensors").stat().st_mode) == 0o640
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750


@pytest.mark.parametrize("exchange", [True, False])
def test_failed_writer_leaves_the_old_folder(tmp_path, monkeypatch, exchange):
    if not exchange:  # a system that cannot swap two names
        monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    target = write_folder(tmp_path / "a", writer(a="old"))

    def fails(folder):
        (folder / "a").write_text("new")
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        write_folder(target, fails)
    assert content(target) == {"a": "old"} and hidden(tmp_path) == []
    write_folder(target, writer(a="new"))
    assert content(target) == {"a": "new"} and hidden(tmp_path) == []


@pytest.mark.parametrize("through_safetensors", [True, False])
def test_full_disk_is_a_resource_error_and_the_old_folder_intact(tmp_path, through_safetensors):
    target = write_folder(tmp_path / "a", writer(a="old"))

    def large(folder):
        if through_safetensors:
            save_file({"w": torch.zeros(100_000)}, folder / "w.safetensors")
        else:
            (folder / "a").write_bytes(bytes(400_000))

    with file_limit(10_000), pytest.raises(ResourceError, match=r"cannot write .*: .* before is intact"):
        write_folder(target, large)
    assert content(target) == {"a": "old"} and is_complete(target) and hidden(tmp_path) == []
    file = write_file(tmp_path / "file", "old")
    with file_limit(10_000), pytest.raises(ResourceError, match="cannot write"):
        write_file(file, bytes(400_000))
    assert file.read_text() == "old" and hidden(tmp_path) == []


def test_place_that_cannot_be_written_is_a_resource_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write .*/file/a"):
        write_folder(tmp_path / "file" / "a", writer(a="1"))
    with pytest.raises(ResourceError, match="cannot write /proc/a"):
        write_folder("/proc/a", writer(a="1"))


def test_folder_of_others_is_never_deleted(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("dear")
    with pytest.raises(UsageError, match=r"photos holds files that would be lost \(a.jpg\): give another folder"):
        write_folder(tmp_path / "photos", writer(a="1"))
    ours = write_folder(tmp_path / "ours", writer(a="1"))
    check_target(ours)
    (ours / "notes.txt").write_text("dear")
    with pytest.raises(UsageError, match="notes.txt"):
        write_folder(ours, writer(a="2"))
    assert content(ours) == {"a": "1", "notes.txt": "dear"}
    with pytest.raises(UsageError, match="is a file, expected a folder"):
        check_target(ours / "notes.txt")


def test_empty_folder_is_taken(tmp_path):
    (tmp_path / "a").mkdir()
    assert is_complete(write_folder(tmp_path / "a", writer(a="1")))


@pytest.mark.parametrize("damage", ["no marker", "short file", "file gone", "marker cut"])
def test_incomplete_folder_is_seen(tmp_path, damage):
    folder = write_folder(tmp_path / "a", writer(a="12345"))
    if damage == "no marker":
        (folder / MARKER).unlink()
    elif damage == "short file":
        (folder / "a").write_text("123")
    elif damage == "file gone":
        (folder / "a").unlink()
    else:
        (folder / MARKER).write_text((folder / MARKER).read_text()[:-3])
    assert not is_complete(folder)


def test_sweep_removes_what_dead_writers_left_and_puts_back_what_was_aside(tmp_path):
    dead = 2**22 + 1  # above the largest process id of Linux
    for name in (f".a.temp-{dead}", f".b.temp-{os.getppid()}", f".c.temp-{dead}-aside", f".d.temp-{dead}-aside"):
        (tmp_path / name).mkdir()
    (tmp_path / f".e.json.temp-{dead}").write_text("half")
    (tmp_path / "d").mkdir()
    sweep(tmp_path)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == [f".b.temp-{os.getppid()}", "c", "d"]  # a live writer's is not ours to remove


def test_marker_lists_sizes(tmp_path):
    def write(folder):
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text("12")

    folder = write_folder(tmp_path / "a", write)
    assert json.loads((folder / MARKER).read_text()) == {"files": {"sub/b": 2}}
    assert is_complete(folder)
