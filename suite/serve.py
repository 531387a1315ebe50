"""Many adapters of one backbone behind one model: requests for any of them share batches (adaptsuite.per_sample).

`Server` works in the process; `adaptsuite.serve_http` puts it on a port.
"""

import importlib
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from adaptsuite.artifact import Record, load_adapter, read_adapter
from adaptsuite.commands import adapter_folder
from adaptsuite.devices import pick_device, to_device
from adaptsuite.domain import Domain
from adaptsuite.errors import AdapterError, DataError, ResourceError, UsageError, nearest
from adaptsuite.experiment import recorded
from adaptsuite.host import Handle
from adaptsuite.method import DOMAINS
from adaptsuite.per_sample import refuse
from adaptsuite.recipe import Recipe

ALIKE = ("backbone", "random_weights", "front_end", "head")  # of the recipes: what the model around the adapters is


@dataclass(frozen=True, eq=False)
class Loaded:
    """An adapter on the model."""

    name: str  # given by whoever loaded it
    handle: Handle
    recipe: Recipe
    record: Record
    labels: list[str]


@dataclass(eq=False)
class Job:
    """One file, to be answered by one adapter."""

    adapter: Loaded
    dataset: Any
    items: list[Any]  # what the dataset gives: one for a picture, windows of a long sound
    answer: Future = field(default_factory=Future)


class Server:
    """Answers files by adapters that come and go, in batches of whatever was asked meanwhile.

    All adapters must be of one backbone with the same input and kind of head; classes, methods and settings may differ.
    The first one to be loaded decides. All methods may be called from any thread. A request is answered by the adapter
    that had its name when it came; if that one was unloaded before its turn, the request fails with LookupError.
    batch_size: most items of a forward.  wait_s: how long a first request waits for others.  most_items: of one file.
    """

    def __init__(
        self,
        domain: Domain,
        adapters: Mapping[str, str | Path] | None = None,
        device: str = "auto",
        batch_size: int = 32,
        wait_s: float = 0.003,
        most_waiting: int = 1024,
        most_items: int = 256,
    ):
        self.domain, self.device = domain, pick_device(device)
        self.batch_size, self.wait_s, self.most_items = batch_size, wait_s, most_items
        self.batches = self.items = 0  # done
        self._adapters: dict[str, Loaded] = {}
        self._model = self._recipe = self._task = None
        self._count = 0
        self._busy = threading.RLock()  # whoever changes the model or runs it
        self._waiting: queue.Queue[Job | None] = queue.Queue(most_waiting)
        for name, folder in (adapters or {}).items():
            self.load(name, folder)
        self._thread = threading.Thread(target=self._work, name="adaptsuite-server", daemon=True)
        self._thread.start()

    # ---- adapters

    def load(self, name: str, folder: str | Path) -> Loaded:
        """Puts an adapter's folder on the model, in place of the one that has the name.

        Raises AdapterError for one that is damaged or does not fit the backbone and the input of the others, UsageError
        for a method that cannot share a batch.
        """
        record, recipe, labels = recorded(self.domain, adapter_folder(folder))
        if recipe.data.task not in ("multiclass", "multilabel"):
            raise UsageError(f"{record.folder}: a server gives labels, this adapter is for task {recipe.data.task!r}")
        with self._busy:
            self._fits(recipe, record)
            if self._model is None:
                self._model = self.domain.model(recipe, labels).to(self.device).eval()
                self._recipe, self._task = recipe, self.domain.task(recipe, labels)
            self._count += 1
            own = f"served_{self._count}"
            handle = load_adapter(self._model, record, own, sample=self._sample())
            try:
                refuse(handle.bank, [own])
                self.domain.restored(handle, recipe, record.folder)
            except BaseException:
                handle.detach()
                raise
            before = self._adapters.pop(name, None)
            self._adapters[name] = Loaded(name, handle, recipe, record, labels)
            if before is not None:
                before.handle.detach()
            return self._adapters[name]

    def unload(self, name: str) -> None:
        """Takes it off the model. Raises LookupError for a name that is not there."""
        with self._busy:
            self.adapter(name)
            self._adapters.pop(name).handle.detach()

    def adapter(self, name: str) -> Loaded:
        """Raises LookupError with the nearest names."""
        found = self._adapters.get(name)
        if found is None:
            raise LookupError(f"no adapter {name!r} is loaded; {nearest(name, list(self._adapters))}")
        return found

    def adapters(self) -> list[Loaded]:
        return list(self._adapters.values())

    @property
    def waiting(self) -> int:
        """Requests that no batch has taken yet."""
        return self._waiting.qsize()

    def _fits(self, recipe: Recipe, record: Record) -> None:
        for name in ALIKE if self._recipe is not None else ():
            own, found = getattr(self._recipe, name), getattr(recipe, name)
            if own != found:
                raise AdapterError(f"{record.folder}: {name} is {found}, the adapters that are served have {own}")

    def _sample(self) -> Any:
        return to_device(self.domain.sample(self._model), self.device)

    # ---- requests

    def predict(self, name: str, file: str | Path, timeout_s: float | None = None) -> dict[str, Any]:
        """{"label", "scores": {label: number}} of a file, calibrated. Raises as `submit`, and TimeoutError."""
        answer = self.submit(name, file)
        try:
            return answer.result(timeout_s)
        except TimeoutError:
            answer.cancel()
            raise

    def submit(self, name: str, file: str | Path) -> Future:
        """What `predict` will give. The file is read before this returns.

        Raises LookupError for an unknown adapter, DataError for a file that cannot be used, ResourceError when too many
        requests wait.
        """
        adapter = self.adapter(name)
        if not self._thread.is_alive():
            raise ResourceError("the server was closed")
        dataset = self.domain.dataset(self._model, [Path(file)], None)
        if len(dataset) > self.most_items:
            raise DataError(f"{file}: read as {len(dataset)} windows, at most {self.most_items} are served at once")
        job = Job(adapter, dataset, [dataset[i] for i in range(len(dataset))])
        try:
            self._waiting.put_nowait(job)
        except queue.Full:
            raise ResourceError(f"{self._waiting.maxsize} requests wait already: try again later") from None
        return job.answer

    def close(self) -> None:
        """Answers what waits, then stops."""
        self._waiting.put(None)
        self._thread.join()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _work(self) -> None:
        job: Job | None = None
        while (job := self._waiting.get()) is not None:
            jobs, until = [job], time.monotonic() + self.wait_s
            while job is not None and sum(len(j.items) for j in jobs) < self.batch_size:
                try:
                    job = self._waiting.get(timeout=max(0.0, until - time.monotonic()))
                except queue.Empty:
                    break
                if job is not None:
                    jobs.append(job)
            self._answer([j for j in jobs if j.answer.set_running_or_notify_cancel()])
            if job is None:
                return

    def _answer(self, jobs: Sequence[Job]) -> None:
        with self._busy:
            gone = [j for j in jobs if self._adapters.get(j.adapter.name) is not j.adapter]
            jobs = [j for j in jobs if j not in gone]
            try:
                found = self._run(jobs) if jobs else []
            except Exception as error:
                if len(jobs) == 1:
                    jobs[0].answer.set_exception(error)
                else:  # one of them may be to blame
                    for job in jobs:
                        self._answer([job])
                jobs = found = []
        for job in gone:
            job.answer.set_exception(LookupError(f"adapter {job.adapter.name!r} was unloaded meanwhile"))
        for job, outputs in zip(jobs, found, strict=True):
            try:
                job.answer.set_result(self._said(job, outputs))
            except Exception as error:
                job.answer.set_exception(error)

    @torch.no_grad()
    def _run(self, jobs: Sequence[Job]) -> list[np.ndarray]:
        """(items, K) raw scores of each job."""
        loaded = list(self._adapters.values())
        place = {id(adapter): i for i, adapter in enumerate(loaded)}
        items = [(place[id(job.adapter)], item) for job in jobs for item in job.items]
        collate, found = getattr(jobs[0].dataset, "collate", default_collate), []
        for start in range(0, len(items), self.batch_size):
            part = items[start : start + self.batch_size]
            index = torch.tensor([i for i, _ in part])
            loaded[0].handle.activate(*(a.handle.name for a in loaded), per_sample=index)
            batch = to_device(collate([item for _, item in part]), self.device)
            found.append(self._task.predict(self._model, batch).float().cpu().numpy())
            self.batches, self.items = self.batches + 1, self.items + len(part)
        ends = np.cumsum([len(job.items) for job in jobs])[:-1]
        return np.split(np.concatenate(found), ends)

    def _said(self, job: Job, outputs: np.ndarray) -> dict[str, Any]:
        own = job.dataset.mean_by_row(outputs[:, : len(job.adapter.labels)])
        own = self.domain.calibrated(own, job.adapter.record.kept)
        return self.domain.answers(job.adapter.recipe, job.adapter.labels, own)[0]


def adapters_below(root: str | Path) -> dict[str, Path]:
    """Name of a folder directly below -> the adapter in it. Raises DataError without one."""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    found = {
        p.name: adapter_folder(p) for p in sorted(root.iterdir()) if (adapter_folder(p) / "adapter.json").is_file()
    }
    if not found:
        raise DataError(f"{root}: no adapter in the folders directly below")
    return found


def domain_of(folder: Path) -> Domain:
    """The domain that an adapter was trained in, by its record."""
    name = (read_adapter(folder).extra.get("recipe") or {}).get("domain")
    if name not in DOMAINS:
        raise AdapterError(f"{folder}: saved outside the commands, by no domain: it tells nothing of its input")
    return importlib.import_module(f"adaptsuite.{name}.pipeline").DOMAIN


def serve(
    root: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    batch_size: int = 32,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """All adapters below a folder on a port, until SIGINT or SIGTERM (adaptsuite.serve_http)."""
    from adaptsuite import serve_http

    serve_http.require()
    found = adapters_below(root)
    with Server(domain_of(next(iter(found.values()))), found, device, batch_size) as server:
        for adapter in server.adapters():
            say(f"adapter   {adapter.name}  {adapter.record.method.name}  {len(adapter.labels)} labels")
        say(f"serving   {len(found)} adapters of {adapter.recipe.backbone} at http://{host}:{port}")
        serve_http.run(server, root, host, port)
