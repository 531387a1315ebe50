"""The audit log: every change is found, a killed writer stops no other, several share it, and no text enters."""

import hashlib
import json
import multiprocessing
import os
import signal
import stat
import threading
import time

import numpy as np
import pytest

from adaptsuite.errors import DataError, ResourceError
from adaptsuite.medical import audit
from adaptsuite.medical.audit import FIELDS, open_log, verify

ADAPTER, BASE = "a" * 64, "b" * 64
UID = "1.2.826.0.1.3680043.8.498.1"


@pytest.fixture
def log(tmp_path):
    return open_log(tmp_path / "audit.jsonl")


def fill(log, count=6):
    for i in range(count):
        log.append(f"{UID}.{i}", ADAPTER, BASE, 0.5, [0.1 * i, 1 - 0.1 * i])
    return log.path.read_bytes().splitlines(keepends=True)


def rewrite(log, lines):
    log.path.write_bytes(b"".join(lines))
    return verify(log.path)


def test_entries_are_what_was_said_and_follow_one_another(log):
    lines = fill(log)
    entries = [json.loads(line) for line in lines]
    assert [tuple(entry) for entry in entries] == [FIELDS] * 6 and [entry["n"] for entry in entries] == list(range(6))
    assert entries[0]["previous"] == audit.START
    assert [e["previous"] for e in entries[1:]] == [e["hash"] for e in entries[:-1]]
    assert entries[3]["output"] == pytest.approx([0.3, 0.7]) and entries[3]["threshold"] == 0.5
    assert entries[3]["versions"]["adaptsuite"] and entries[3]["adapter"] == ADAPTER
    assert entries[3]["input"] == log.input_hash(f"{UID}.3") != log.input_hash(f"{UID}.4")
    verdict = verify(log.path)
    assert verdict.whole and verdict.entries == 6 and verdict.last == entries[-1]["hash"] and not verdict.notes


def test_each_label_can_have_a_threshold_of_its_own(log):
    assert log.append(UID, ADAPTER, BASE, [0.2, 0.7], [0.3, 0.1])["threshold"] == [0.2, 0.7]
    with pytest.raises(ValueError, match="threshold is no finite number"):
        log.append(UID, ADAPTER, BASE, [0.2, "Smith"], [0.3, 0.1])
    assert log.verify().whole and log.verify().entries == 1


def test_the_input_s_hash_cannot_be_made_without_the_key(log, tmp_path):
    assert log.input_hash(UID) != hashlib.sha256(UID.encode()).hexdigest()
    assert log.input_hash(UID) != open_log(tmp_path / "other.jsonl").input_hash(UID)
    assert log.input_hash(UID) == open_log(log.path).input_hash(UID)
    key = log.path.with_name("audit.jsonl.key")
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert key.read_text().strip() not in repr(log) and log.key.hex() == key.read_text().strip()


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda x: [*x[:2], x[2].replace(b'"threshold":0.5', b'"threshold":0.6'), *x[3:]], "line 3: was changed"),
        (lambda x: [*x[:5], x[5].replace(b"a" * 64, b"c" * 64)], "line 6: was changed"),
        (lambda x: [*x[:2], x[2].replace(b",", b", ", 1), *x[3:]], "line 3: is no entry of this log"),
        (lambda x: [*x[:2], *x[3:]], "line 3: 1 entries before it are missing"),
        (lambda x: x[1:], "line 1: 1 entries before it are missing"),
        (lambda x: [*x[:2], x[3], x[2], *x[4:]], "line 4: entry 2 stands where entry 4 belongs"),
        (lambda x: [*x[:3], x[2], *x[3:]], "line 4: entry 2 stands where entry 3 belongs"),
        (lambda x: x[:4], "the end is missing: 2 of 6 entries"),
        (lambda x: [], "the end is missing: 6 of 6 entries"),
        (lambda x: [*x[:4], x[4][:-30]], "the end is missing: 2 of 6 entries"),
        (lambda x: [*x, b"{}\n"], "line 7: is no entry"),
        (lambda x: [*x, b"[" * 100_000 + b"\n"], "line 7: is no entry"),
        (lambda x: [*x, x[5]], "line 7: entry 5 stands where entry 6 belongs"),
    ],
)
def test_every_change_is_found(log, change, problem):
    verdict = rewrite(log, change(fill(log)))
    assert not verdict.whole and any(found.startswith(problem) for found in verdict.problems), verdict.problems


def test_no_byte_of_the_log_can_change(log):
    lines = fill(log, 2)
    whole = b"".join(lines)
    for place in (*range(0, len(whole), 7), len(whole) - 1):
        changed = bytearray(whole)
        changed[place] ^= 1
        assert not rewrite(log, [bytes(changed)]).whole, place
    assert rewrite(log, lines).whole


def test_a_forged_chain_is_found_without_the_key(log, tmp_path):
    lines = fill(log)
    other = open_log(tmp_path / "forged.jsonl")
    fill(other, 3)
    forged = other.path.read_bytes().splitlines(keepends=True)
    assert "line 1: was changed, or written with another key" in rewrite(log, forged).problems
    log.path.with_name("audit.jsonl.head").write_bytes(other.path.with_name("forged.jsonl.head").read_bytes())
    assert "audit.jsonl.head is missing or was changed" in rewrite(log, lines).problems


def test_the_head_of_another_log_with_the_same_key_is_found(log, tmp_path):
    fill(log, 2)
    other = open_log(tmp_path / "other.jsonl", tmp_path / "audit.jsonl.key")
    fill(other, 2)
    log.path.with_name("audit.jsonl.head").write_bytes(tmp_path.joinpath("other.jsonl.head").read_bytes())
    assert verify(log.path).problems == ("audit.jsonl.head does not belong to this end of the log",)


def test_a_head_that_is_gone_or_put_back_is_found(log):
    head = log.path.with_name("audit.jsonl.head")
    lines = fill(log, 2)
    old = head.read_bytes()
    lines = fill(log, 3)
    head.write_bytes(old)
    assert verify(log.path).problems == ("audit.jsonl.head does not belong to this end of the log",)
    head.unlink()
    assert verify(log.path).problems == ("audit.jsonl.head is missing or was changed",)
    head.write_bytes(old)
    assert rewrite(log, lines[:2]).whole  # both put back: the one thing that only a noted `last` shows


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x[:-1], "its end, or its head, is not what was last written"),
        (lambda x: [], "all 4 entries are missing"),
        (lambda x: [*x[:3], x[3].replace(b"0.5", b"0.6")], "its last line was changed"),
        (lambda x: [*x, b"nonsense\n"], "its last line was changed"),
        (lambda x: [*x[:2], x[2][:50]], "its end, or its head, is not what was last written"),
    ],
)
def test_a_damaged_log_is_not_continued(log, change, message):
    lines = change(fill(log, 4))
    rewrite(log, lines)
    with pytest.raises(DataError, match=message):
        log.append(UID, ADAPTER, BASE, None, 1)
    assert log.path.read_bytes() == b"".join(lines)


def test_a_log_without_its_head_is_not_continued(log):
    for count in (1, 2):
        fill(log, 1)
        head = log.path.with_name("audit.jsonl.head")
        kept = head.read_bytes()
        head.unlink()
        with pytest.raises(DataError, match="or its head"):
            log.append(UID, ADAPTER, BASE, None, 1)
        head.write_bytes(kept)
        assert verify(log.path).entries == count


# killed writers


def test_what_a_killed_writer_left_is_noted_and_cut_off_by_the_next(log):
    lines = fill(log, 3)
    verdict = rewrite(log, [*lines, lines[2][:40]])
    assert verdict.whole and verdict.notes == ("line 4 is half-written: it was never acknowledged",)
    log.append(UID, ADAPTER, BASE, 0.5, 1)
    verdict = verify(log.path)
    assert verdict.whole and verdict.entries == 4 and not verdict.notes


def test_a_writer_killed_before_the_head_has_written(log, monkeypatch):
    seal = audit.AuditLog._seal

    def killed(self, entries, last):
        if entries:
            raise KeyboardInterrupt
        seal(self, entries, last)

    for count in (1, 3):
        with monkeypatch.context() as patch:
            patch.setattr(audit.AuditLog, "_seal", killed)
            with pytest.raises(KeyboardInterrupt):
                log.append(UID, ADAPTER, BASE, 0.5, 1)
        assert verify(log.path).whole and verify(log.path).entries == count
        log.append(UID, ADAPTER, BASE, 0.5, 1)
        assert verify(log.path).whole and verify(log.path).entries == count + 1


def test_killed_twice_between_a_line_and_the_head_the_log_is_whole(log, monkeypatch):
    seal, allowed = audit.AuditLog._seal, []

    def killed(self, entries, last):
        if not allowed:
            raise KeyboardInterrupt
        seal(self, entries, last)
        allowed.pop()

    monkeypatch.setattr(audit.AuditLog, "_seal", killed)
    for count in (1, 2, 3):
        allowed.append(True)  # for the start, later for the line that was left behind; not for its own
        with pytest.raises(KeyboardInterrupt):
            log.append(UID, ADAPTER, BASE, 0.5, 1)
        assert verify(log.path).whole and verify(log.path).entries == count


def write_until_killed(path):
    log = open_log(path)
    while True:
        log.append(UID, ADAPTER, BASE, 0.5, [0.5] * 50)


def test_a_log_outlives_kill_9(tmp_path):
    path, context = tmp_path / "audit.jsonl", multiprocessing.get_context("fork")
    rng, last = np.random.default_rng(0), 0
    for round in range(40):
        if round >= 8 and last > 8:
            break
        writer = context.Process(target=write_until_killed, args=(path,))
        writer.start()
        time.sleep((0.05 + 0.1 * rng.random()) * (1 + round // 8))  # a busy machine takes longer to begin
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        if path.exists() and path.with_name("audit.jsonl.key").exists():
            verdict = verify(path)
            assert verdict.whole and verdict.entries >= last, verdict
            last = verdict.entries
    assert last > 8


def write_some(path, count):
    log = open_log(path)
    for i in range(count):
        log.append(f"{UID}.{os.getpid()}.{i}", ADAPTER, BASE, 0.5, i)


def test_several_processes_and_threads_share_a_log(tmp_path):
    path, context = tmp_path / "audit.jsonl", multiprocessing.get_context("fork")
    writers = [context.Process(target=write_some, args=(path, 12)) for _ in range(4)]  # the first one makes the key
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    threads = [threading.Thread(target=write_some, args=(path, 6)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    verdict = verify(path)
    assert verdict.whole and verdict.entries == 4 * 12 + 3 * 6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["audit.jsonl", "audit.jsonl.head", "audit.jsonl.key"]


def test_a_disk_that_is_full_leaves_the_log_as_it_was(log, monkeypatch):
    lines = fill(log, 2)
    with monkeypatch.context() as patch:
        write = os.write
        patch.setattr(audit.os, "write", lambda handle, line: write(handle, line[:20]))
        with pytest.raises(ResourceError, match="No space left on device"):
            log.append(UID, ADAPTER, BASE, 0.5, 1)
    assert log.path.read_bytes() == b"".join(lines) and verify(log.path).whole


# no text


@pytest.mark.parametrize(
    "uid, adapter, base, threshold, output",
    [
        (UID, "DOE^JANE", BASE, 0.5, 1),
        (UID, ADAPTER, ADAPTER.upper(), 0.5, 1),
        (UID, ADAPTER, BASE, "DOE^JANE", 1),
        (UID, ADAPTER, BASE, 0.5, "DOE^JANE"),
        (UID, ADAPTER, BASE, 0.5, ["DOE^JANE"]),
        (UID, ADAPTER, BASE, 0.5, {"DOE^JANE": 1}),
        (UID, ADAPTER, BASE, 0.5, [float("nan")]),
        (UID, ADAPTER, BASE, True, 1),
        ("", ADAPTER, BASE, 0.5, 1),
        (None, ADAPTER, BASE, 0.5, 1),
    ],
)
def test_only_numbers_and_hashes_are_taken_and_a_refusal_repeats_nothing(log, uid, adapter, base, threshold, output):
    with pytest.raises(ValueError) as error:
        log.append(uid, adapter, base, threshold, output)
    assert "DOE" not in str(error.value) and not log.path.read_bytes()


def test_no_text_of_the_input_is_in_any_file_of_the_log(log, tmp_path):
    log.append("DOE^JANE", ADAPTER, BASE, None, np.float32(0.25))
    log.append("DOE^JANE", ADAPTER, BASE, np.float64(0.5), np.array([0.25, 0.75]))
    assert not any(b"DOE" in path.read_bytes() for path in tmp_path.iterdir())
    first, second = (json.loads(line) for line in log.path.read_bytes().splitlines())
    assert first["output"] == 0.25 and second["output"] == [0.25, 0.75] and first["input"] == second["input"]


# keys


def test_a_key_may_lie_elsewhere_and_a_log_without_its_key_is_not_opened(tmp_path):
    key = tmp_path / "vault" / "key"
    log = open_log(tmp_path / "audit.jsonl", key)
    fill(log, 2)
    assert verify(log.path, key).whole and not (tmp_path / "audit.jsonl.key").exists()
    with pytest.raises(DataError, match="has no key .*: name the file that holds it"):
        verify(log.path)
    assert not (tmp_path / "audit.jsonl.key").exists()
    key.write_text("short\n")
    with pytest.raises(DataError, match="64 hexadecimal digits"):
        verify(log.path, key)
    with pytest.raises(DataError, match="no audit log"):
        verify(tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()
