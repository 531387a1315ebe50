"""Studies in, findings out: once for given folders (`predict_studies`), or as folders arrive (`watch`).

Each study gets a folder of its own, named by the hash of its UID: findings.json, and files of the format asked for. It
is written aside and renamed, after its line is in the audit log: nothing is released that the log does not know.
Nothing that is said or written here holds text of a header, except the objects of DICOM (adaptsuite.medical.deliver).
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adaptsuite.atomic import is_complete, sweep, write_folder
from adaptsuite.errors import DataError, Inexact, ResourceError, UsageError, nearest
from adaptsuite.interrupt import Signals
from adaptsuite.medical import results
from adaptsuite.medical.audit import AuditLog, open_log
from adaptsuite.medical.deliver import FORMATS, deliver, require_fitting, write_findings
from adaptsuite.medical.dicom_out import SHORTEST_SALT
from adaptsuite.medical.ledger import MOST_ATTEMPTS, Ledger
from adaptsuite.medical.reader import AdapterReader, Reader
from adaptsuite.medical.results import Result
from adaptsuite.medical.studies import Study, StudyFolder, open_folder
from adaptsuite.report import collect_versions

SCHEMA = 1
TICK_S = 0.1  # how soon a signal is noticed

Say = Callable[[str], None]


class Changed(Exception):
    """A folder is not what it was when it was taken."""


@dataclass(frozen=True)
class Service:
    """One adapter, and what becomes of what it says."""

    reader: Reader
    out: Path
    form: str = "json"
    log: AuditLog | None = None
    salt: str | None = None
    allow_burned_in: bool = False

    def __post_init__(self) -> None:
        if self.form not in FORMATS:
            raise UsageError(f"--format {self.form} is not known; {nearest(self.form, FORMATS)}")
        if self.salt is not None and len(self.salt) < SHORTEST_SALT:
            raise UsageError(f"a secret of {len(self.salt)} characters can be guessed, {SHORTEST_SALT} are needed")

    def examine(self, study: Study, folder: StudyFolder) -> tuple[list[Result], list[dict[str, str]]]:
        """Results of the series, and those left out with their reason. Raises what the first one did, if all are."""
        found, skipped, errors = [], [], []
        for series in study.series:
            try:
                require_fitting(series, self.form, self.reader.segments)
                found.append(self.reader.read(series))
            except ResourceError:
                raise
            except Exception as error:
                errors.append(_cleaned(error, series.name, folder))
                skipped.append({"file": series.name, "reason": str(errors[-1]).removeprefix(f"{series.name}: ")})
        if not found:
            raise errors[0]
        return found, skipped

    def publish(
        self,
        study: Study,
        folder: StudyFolder,
        found: Sequence[Result],
        skipped: Sequence[dict[str, str]],
        name: str,
        version: int = 1,
        state: str | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Writes a study's folder; check: raises when it may not appear any more. What findings.json holds."""
        algorithm, facts = self.reader.algorithm, {}

        def write(temp: Path) -> None:
            written = [
                path.name
                for result in found
                for path in deliver(
                    temp,
                    result,
                    self.form,
                    algorithm,
                    self.salt,
                    window=self.reader.window,
                    allow_burned_in=self.allow_burned_in,
                )
            ]
            facts.update(
                schema=SCHEMA,
                study=study.key,
                version=version,
                state=state,
                adapter=algorithm.adapter_sha256,
                base=algorithm.base_sha256,
                method=algorithm.name,
                versions=collect_versions(),
                temperature=self.reader.temperature,
                thresholds=results.thresholds(self.reader.points),
                format=self.form,
                files=written,
                skipped=[*skipped, *folder.skipped],
            )
            write_findings(temp, facts, found)
            check()
            if self.log is not None:
                points = [p.threshold for p in self.reader.points]
                numbers = [n for result in found for n in result.numbers]
                used = points[0] if len(points) == 1 else points or None
                try:
                    self.log.append(study.uid, algorithm.adapter_sha256, algorithm.base_sha256, used, numbers)
                except DataError as error:  # no fault of the study: all others would fail as well
                    raise ResourceError(str(error)) from error

        path = write_folder(self.out / name, write)
        return json.loads((path / "findings.json").read_text())

    def newest(self, study: Study, state: str) -> tuple[str, int, bool]:
        """(folder name, version, whether it is there already) for a study in a state: others' are never replaced."""
        version = 1
        while (self.out / (name := _named(study, version))).exists():
            if is_complete(self.out / name) and _state(self.out / name) == state:
                return name, version, True
            version += 1
        return name, version, False


def _cleaned(error: Exception, name: str, folder: StudyFolder) -> Exception:
    """The error without text of headers; of a library, whose words may quote the file, its kind alone."""
    if isinstance(error, UsageError | DataError):
        return type(error)(folder.clean(str(error)))
    if os.environ.get("ADAPTSUITE_DEBUG"):
        raise error
    return DataError(f"{name}: cannot be read ({type(error).__name__})")


def _named(study: Study, version: int) -> str:
    return study.key if version == 1 else f"{study.key}-v{version}"


def _state(folder: Path) -> str | None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return json.loads((folder / "findings.json").read_text()).get("state")
    return None


def service(
    adapter: str | Path | Reader,
    out: str | Path,
    form: str = "json",
    *,
    audit: str | Path | None = None,
    audit_key: str | Path | None = None,
    salt: str | None = None,
    device: str | None = None,
    batch_size: int | None = None,
    allow_burned_in: bool = False,
) -> Service:
    """Loads an adapter for studies. Raises UsageError for an unknown format or a short salt before that."""
    empty = Service(None, Path(out), form, None, salt, allow_burned_in)  # refuses first
    log = None if audit is None else open_log(audit, audit_key)
    if isinstance(adapter, str | Path):
        adapter = AdapterReader(adapter, device, batch_size, allow_burned_in)
    return replace(empty, reader=adapter, log=log)


# ---- given folders


def predict_studies(
    adapter: str | Path | Reader,
    folders: Sequence[str | Path],
    out: str | Path,
    form: str = "json",
    *,
    say: Say = lambda line: None,
    warn: Say = lambda line: None,
    **options: Any,
) -> dict[str, Any]:
    """What an adapter says of every study in folders (or DICOM and NIfTI files), written to OUT/<hash of its UID>.

    Returns {"studies": [facts of findings.json with "out"], "failed": [{"study", "reason"}], "skipped": [{"file",
    "reason"}]}. options: of `service`. A folder of before is replaced. Raises DataError, where one study is asked for
    and fails what it failed with, and where two folders hold the same study.
    """
    opened = [open_folder(folder) for folder in folders]
    studies = [(study, folder) for folder in opened for study in folder.studies]
    if twice := [s.key for i, (s, _) in enumerate(studies) if s.key in {o.key for o, _ in studies[:i]}]:
        raise DataError(f"study {twice[0]}: two of the folders hold it; give one, or the folder above both")
    skipped = [s for folder in opened for s in folder.skipped]
    if not studies:
        why = f"; {skipped[0]['file']}: {skipped[0]['reason']}" if skipped else ""
        raise DataError(f"{opened[0].name}: no image in it{why}")
    own = service(adapter, out, form, **options)
    found, failed, errors = [], [], []
    for study, folder in studies:
        try:
            said, left = own.examine(study, folder)
            facts = own.publish(study, folder, said, left, study.key)
        except (UsageError, DataError, Inexact) as error:
            clean = type(error)(folder.clean(str(error)))
            failed.append({"study": study.key, "reason": str(clean)})
            errors.append(clean)
            continue
        found.append({**facts, "out": str(own.out / study.key)})
        for line in lines(facts, own.out / study.key):
            say(line)
        for line in remarks(facts, left):
            warn(line)
    for s in skipped:
        warn(f"{s['file']} was left out: {s['reason']}")
    if len(studies) == 1 and errors:
        raise errors[0]
    return {"studies": found, "failed": failed, "skipped": skipped}


def lines(facts: dict[str, Any], out: Path) -> list[str]:
    """Findings of a study for people, one fact a line."""
    version = f"  version {facts['version']}" if facts["version"] > 1 else ""
    said = [f"study   {facts['study']}{version}  {out}"]
    for series in facts["series"]:
        head = f"series  {series['series']}  {series['modality']}  {len(series['frames'])} frames"
        whole, parts = series["whole"], []
        for name, own in whole["findings"].items():
            score = own.get("probability", own.get("share"))
            point = facts["thresholds"][name]
            parts.append(
                f"{name} {score:.3f} {'present' if own['present'] else 'absent'} (from {point['threshold']:.3g} on)"
            )
        if not parts:
            parts = [f"{name} {p:.3f}" for name, p in whole["probabilities"].items()]
        measured = [f"{n} {v['volume_ml']:.2f} ml" for n, v in whole.get("measures", {}).items() if "volume_ml" in v]
        said.append("  ".join([head, *parts, *measured]))
    return said


def remarks(facts: dict[str, Any], skipped: Sequence[Mapping[str, str]]) -> list[str]:
    """What is doubtful in a study, or was left out of it."""
    said = [f"{s['file']} was left out: {s['reason']}" for s in skipped]
    said += [f"series {series['series']} {note}" for series in facts["series"] for note in series["notes"]]
    return [f"study {facts['study']}: {line}" for line in said]


# ---- folders that arrive


def watch(
    adapter: str | Path | Reader,
    incoming: str | Path,
    out: str | Path,
    form: str = "json",
    *,
    poll_s: float = 5.0,
    settle_s: float = 10.0,
    once: bool = False,
    retry: bool = False,
    say: Say = lambda line: None,
    warn: Say = lambda line: None,
    **options: Any,
) -> dict[str, Any]:
    """Takes each folder directly below `incoming` once it has not changed for `settle_s`, and again when files change.

    Stops by SIGINT or SIGTERM after the study at hand; once: after what is there now. {"done", "failed", "waiting"}:
    numbers of folders. retry: takes those that failed again. options: of `service`. Killed anywhere, the next start
    goes on: finished studies are in the ledger or lie in `out`, and are not done again. Raises UsageError where `out`
    lies in `incoming`, ResourceError where another process watches with the same `out`, or the disk fails.
    """
    incoming, out = Path(incoming), Path(out)
    if not incoming.is_dir():
        raise DataError(f"{incoming}: no such folder")
    if out.resolve().is_relative_to(incoming.resolve()):
        raise UsageError(f"{out} lies in the folder that is watched: what is written there would arrive as a study")
    if not poll_s > 0 or not settle_s >= 0:
        raise UsageError(f"--poll {poll_s:g} and --settle {settle_s:g}: seconds above 0, and from 0 on, are expected")
    own = service(adapter, out, form, **options)
    algorithm = own.reader.algorithm
    facts = {"adapter": algorithm.adapter_sha256, "format": form, "de-identification": own.salt is not None}
    with Ledger.opened(out, facts) as ledger, Signals() as signals:
        sweep(out)
        watcher = _Watcher(own, ledger, incoming, settle_s, retry, say, warn)
        watcher.look()
        if once and watcher.pending:
            _sleep(settle_s, signals)
        while True:
            watcher.look()
            watcher.take(lambda: bool(signals.caught))
            if once or signals.caught:
                break
            _sleep(poll_s, signals)
            if signals.caught:
                break
        if signals.caught:
            say(f"stopped by a signal: {watcher.done} done, {watcher.failed} failed")
            signals.take_effect()
    for _ in range(len(watcher.pending)):
        warn("a folder is still arriving: it was left for the next time")
    return {"done": watcher.done, "failed": watcher.failed, "waiting": len(watcher.pending)}


def _sleep(seconds: float, signals: Signals) -> None:
    until = time.monotonic() + seconds
    while not signals.caught and (left := until - time.monotonic()) > 0:
        time.sleep(min(TICK_S, left))


class _Watcher:
    """Folders that wait, and what becomes of them."""

    def __init__(self, own: Service, ledger: Ledger, incoming: Path, settle_s: float, retry: bool, say: Say, warn: Say):
        self.own, self.ledger, self.incoming, self.settle_s = own, ledger, incoming, settle_s
        self.say, self.warn = say, warn
        self.again = {v["state"] for e in ledger.entries.values() for v in e["versions"] if v["status"] == "failed"}
        self.again = self.again if retry else set()
        self.pending: dict[Path, tuple[str, float]] = {}  # folder -> state, since when it is seen in it
        self.done = self.failed = 0
        self._told = False

    def look(self) -> None:
        """Notes every folder that is not in the ledger as it is now."""
        now, seen = time.monotonic(), {}
        for path in sorted(self.incoming.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_symlink() or not path.is_dir():
                if not self._told:
                    self.warn("files directly in the watched folder, and links, are not taken: a study is a folder")
                self._told = True
                continue
            state = self.ledger.state(path)
            if state is None or self._finished(path, state):
                continue
            before = self.pending.get(path)
            seen[path] = before if before and before[0] == state else (state, now)
        self.pending = seen

    def _finished(self, path: Path, state: str) -> bool:
        found = self.ledger.find(self.ledger.identity(path), state)
        return found is not None and found["status"] != "started" and state not in self.again

    def take(self, stopped: Callable[[], bool]) -> None:
        """Everything that has settled, one after the other."""
        for path, (state, since) in [*self.pending.items()]:
            if stopped():
                return
            if time.monotonic() - since >= self.settle_s:
                self.pending.pop(path)
                self.again.discard(state)
                self._take(path, state)

    def _take(self, path: Path, state: str) -> None:
        identity = self.ledger.identity(path)
        before = self.ledger.find(identity, state)
        if before is not None and before["status"] == "started" and before["attempts"] >= MOST_ATTEMPTS:
            why = f"the process was killed {before['attempts']} times while it was at it"
            return self._failed(identity, state, [], f"a folder ({identity[:8]} in the ledger): {why}")
        entry, shown = self.ledger.start(identity, state), "a folder"
        names: list[str] = []
        reasons: list[str] = []
        try:
            folder = open_folder(path)
            shown = f"folder {folder.name}"
            if entry["version"] > 1 and entry["attempts"] == 1:
                self.say(f"{shown}: version {entry['version']}, files were added or changed: it is done anew")
            self._studies(folder, path, state, names, reasons)
        except Changed:
            self.ledger.drop(identity, state)
            self.say(f"{shown} changed while it was read: it waits again")
            return
        except ResourceError:  # a disk that is full is no fault of the study's
            with contextlib.suppress(ResourceError):
                self.ledger.drop(identity, state)
            raise
        except DataError as error:  # of the folder itself: a DICOMDIR that leads out of it
            reasons.append(str(error).replace(str(path), "it").replace(str(path.resolve()), "it"))
        if reasons:
            more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
            return self._failed(identity, state, names, f"{shown}: {reasons[0]}{more}")
        self.done += 1
        self.ledger.end(identity, state, "done", names)

    def _failed(self, identity: str, state: str, names: list[str], reason: str) -> None:
        self.failed += 1
        self.ledger.end(identity, state, "failed", names, reason)
        self.warn(f"{reason}; not tried again without --retry")

    def _studies(self, folder: StudyFolder, path: Path, state: str, names: list[str], reasons: list[str]) -> None:
        if not folder.studies:
            why = f"; {folder.skipped[0]['file']}: {folder.skipped[0]['reason']}" if folder.skipped else ""
            reasons.append(f"no image in it{why}")
        for study in folder.studies:
            name, version, there = self.own.newest(study, state)
            if not there:  # else: killed between its appearance and the ledger
                try:
                    found, left = self.own.examine(study, folder)
                except (UsageError, DataError, ResourceError) as error:  # too large for this machine: only this one
                    reasons.append(f"study {study.key}: {folder.clean(str(error))}")
                    continue
                try:
                    self._publish(study, folder, found, left, (name, version, state, self._check(path, state)))
                except (UsageError, DataError, Inexact) as error:
                    reasons.append(f"study {study.key}: {folder.clean(str(error))}")
                    continue
            names.append(name)

    def _check(self, path: Path, state: str) -> Callable[[], None]:
        def check() -> None:
            if self.ledger.state(path) != state:
                raise Changed

        return check

    def _publish(self, study: Study, folder: StudyFolder, found, left, place: tuple) -> None:
        facts = self.own.publish(study, folder, found, left, *place)
        for line in lines(facts, self.own.out / place[0]):
            self.say(line)
        for line in remarks(facts, [*left, *folder.skipped]):
            self.warn(line)
