"""Row 4: 20 epochs of a linear probe on cached features, the cache being built among them, against the online probe.

    python tests/benchmarks/cached_probe.py [--pairs 9] [--size 96] [--shots 10] [--threads 1]

Runs are those of `adapt vision train` on generated leaves, with ViT-S/16 of random weights, without the report's
pictures. The clock runs while the cache is found empty, built and verified, and while `fit` trains and validates: not
while files are decoded, the adapter is audited and saved, or the head is started. Both take turns in one process, and
the ratio is the median over pairs with its quartiles; with one thread time is the process's own.
"""

import argparse
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
import conftest  # noqa: E402, F401  finds the packages in a bare clone

from adaptsuite import experiment  # noqa: E402
from adaptsuite.commands import read_recipe  # noqa: E402
from adaptsuite.vision.pipeline import VisionDomain  # noqa: E402
from adaptsuite.vision.synthetic import make_dataset  # noqa: E402

CULTIVARS = 4
BAR = 0.1  # a tenth of the online probe's time


class Plain(VisionDomain):
    """Without the pictures of the report."""

    def extra(self, handle, dataset, outputs):
        return []


class Clock:
    """Seconds inside of functions of adaptsuite.experiment."""

    def __init__(self, *names: str):
        self.seconds = 0.0
        self.now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        for name in names:
            setattr(experiment, name, self.clocked(getattr(experiment, name)))

    def clocked(self, function):
        def run(*args, **kwargs):
            start = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += self.now() - start

        return run


def recipe(table: Path, size: int, cache: str):
    options = {"data": str(table), "backbone": "timm:vit_small_patch16_224", "random_weights": True}
    options |= {"method": "linear", "epochs": 20, "size": ("front_end.size", size)}
    settings = ("augment.flip=false", "augment.crop=middle", "head.start=random")
    return experiment.settle(Plain(), read_recipe(Plain(), {**options, "setting": (*settings, f"plan.cache={cache}")}))


def taken(clock: Clock, table: Path, size: int, cache: str) -> tuple[float, list[float]]:
    """Seconds of a run, and its losses."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        os.environ["ADAPTSUITE_CACHE"] = f"{folder}/cache"  # empty
        clock.seconds, said = 0.0, []
        _, (outcome,) = experiment.train(Plain(), *recipe(table, size, cache), f"{folder}/run", said.append)
        assert any("computed" in line for line in said) == (cache == "auto"), said
        return clock.seconds, [row["loss"] for row in outcome.fit.history]


def rows(pairs: int = 9, size: int = 96, shots: int = 10) -> list[dict]:
    clock, ratios = Clock("cached", "fit"), []
    with tempfile.TemporaryDirectory() as folder:
        table = make_dataset(folder, CULTIVARS, shots, shots // 2, size=size)
        table.write_text(table.read_text().replace(",test,", ",val,"))  # nothing is scored but in epochs
        for turn in range(pairs):
            seconds, losses = {}, {}
            for cache in ("auto", "off") if turn % 2 else ("off", "auto"):
                seconds[cache], losses[cache] = taken(clock, table, size, cache)
            gap = max(abs(a - b) for a, b in zip(losses["auto"], losses["off"], strict=True))
            assert gap < 1e-4, f"the losses differ by {gap}"
            ratios.append(seconds["auto"] / seconds["off"])
            print(f"cached {seconds['auto']:.2f} s  online {seconds['off']:.2f} s  {ratios[-1]:.4f}", file=sys.stderr)
    low, value, high = statistics.quantiles(ratios, n=4) if pairs > 1 else ratios * 3
    peer = "the online probe"
    return [
        {"row": "4 cached probe", "value": value, "bar": BAR, "met": value <= BAR, "peer": peer, "spread": [low, high]}
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("pairs", 9), ("size", 96), ("shots", 10), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for row in rows(options.pairs, options.size, options.shots):
        low, high = row["spread"]
        met = "met" if row["met"] else "missed"
        print(f"{row['row']}  {row['value']:.4f} [{low:.4f}, {high:.4f}] of {row['peer']}, bar {row['bar']}: {met}")


if __name__ == "__main__":
    main()
