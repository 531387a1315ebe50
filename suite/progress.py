"""What a run tells while it trains: lines and a bar on stderr, log.jsonl, TensorBoard."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from adaptsuite.atomic import clear_errors, write_file
from adaptsuite.errors import UsageError
from adaptsuite.plan import Plan

LOG = "log.jsonl"


class Progress:
    """Silent in all but the main process; a bar only where stderr is a terminal.

    log.jsonl: one object a line, {"event": "start" | "resume" | "epoch" | "warning" | "end", "step": int, ...}.
    """

    def __init__(self, out: Path | None, plan: Plan, main: bool):
        from rich.console import Console

        self.console = Console(stderr=True, quiet=not main)
        self.notes: list[str] = []
        self.log = self.board = None
        self.step = 0
        if plan.tensorboard and out is None:
            raise UsageError("tensorboard needs an output folder: give out")
        if not main or out is None:
            return
        self.log = out / LOG
        if plan.tensorboard:
            self.board = _board(out / "tensorboard")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self.board is not None:
            self.board.close()

    def start(self, step: int, notes: list[str], **facts: Any) -> None:
        """Begins the log, or cuts it back to what the checkpoint at `step` knows; notes: of earlier starts."""
        self.notes = list(dict.fromkeys(notes + self.notes))
        if self.log is None:
            return
        lines = self.log.read_text().splitlines(keepends=True) if self.log.exists() and step else []
        write_file(self.log, "".join(line for line in lines if _step_of(line) <= step))
        self.event("resume" if step else "start", step=step, **facts)

    def line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Said, logged, and kept for the report."""
        self.notes.append(text)
        self.line(f"warning: {text}")
        self.event("warning", text=text)

    def event(self, kind: str, **facts: Any) -> None:
        self.step = facts.pop("step", self.step)
        if self.log is not None:
            with clear_errors(self.log), self.log.open("a") as log:
                log.write(json.dumps({"event": kind, "step": self.step, **facts}) + "\n")

    def epoch(self, row: dict[str, Any], epochs: int, monitor: str) -> None:
        """`epoch  3/20  loss 0.412  accuracy 0.871  41 s`, and the row in the logs."""
        scores = {"loss": row["loss"], **({monitor: row["val"].get(monitor)} if row["val"] else {})}
        values = "  ".join(f"{name} {'none' if v is None else format(v, '.3f')}" for name, v in scores.items())
        seconds = f"{row['seconds']:.0f} s" if row["seconds"] >= 10 else f"{row['seconds']:.1f} s"
        self.line(f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  {values}  {seconds}")
        self.event("epoch", **row)
        if self.board is not None:
            scores = {f"val/{name}": value for name, value in row["val"].items()}
            for name, value in {"train/loss": row["loss"], "train/lr": row["lr"], **scores}.items():
                if value is not None:
                    self.board.add_scalar(name, value, row["step"])
            self.board.flush()

    @contextlib.contextmanager
    def steps(self, epoch: int, epochs: int, total: int, done: int) -> Iterator[Callable[[], None]]:
        """A bar over the steps of one epoch that leaves no trace; yields the function that moves it on by one."""
        if not self.console.is_terminal or self.console.quiet:
            yield lambda: None
            return
        from rich.progress import Progress as Bar

        with Bar(console=self.console, transient=True) as bar:
            task = bar.add_task(f"epoch {epoch + 1}/{epochs}", total=total, completed=done)
            yield lambda: bar.advance(task)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # the line that a killed writer left unfinished
        return float("inf")


def _board(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("tensorboard=true needs an extra: pip install 'adaptsuite[logs]'") from None
    return SummaryWriter(folder)
