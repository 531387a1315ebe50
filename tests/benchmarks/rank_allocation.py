"""AdaLoRA and IncreLoRA beside LoRA of one fixed rank, with as many trained values: accuracy, and who got the rank.

python tests/benchmarks/rank_allocation.py [--rank 4] [--epochs 5] [--seeds 0,1,2] [--test fold=1 | --cv fold]
    [--sites attn.q,attn.k,attn.v,attn.out] [--methods lora,adalora,increlora] [--backbone embedded:audio-tiny]
    [--data audio_esc10] [--set key=value ...] [--json FILE]

The projections of attention compete. They are equally wide: there a budget of triples is one of trained values, but for
the one that each triple has more. With mlp.in and mlp.out among the sites a triple costs more at some than at others,
and the table tells what it came to. Prints accuracy with its interval over groups, then for each allocator the mean
rank of each role in each block, and how alike the allocations of two runs are (Pearson's r over sites).
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
import conftest  # noqa: E402, F401  finds the packages in a bare clone

DATA = Path(os.environ.get("ADAPTSUITE_DATA", ROOT.parent / "shared" / "data"))


def settings(rank: int) -> dict[str, list[str]]:
    """Own settings of each method; the scale is 1 at the end for all of them, on average."""
    start = rank + rank // 2
    return {
        "lora": [f"rank={rank}", f"alpha={rank}"],
        "adalora": [f"rank={rank}", f"start_rank={start}", f"alpha={start}", "interval=5"],
        "increlora": [f"rank={rank}", f"alpha={rank}", "top=9"],
    }


def one(given: argparse.Namespace, method: str, own: list[str]) -> dict:
    """Result of a method over all seeds and folds, and the ranks of each of its adapters by site."""
    from adaptsuite import experiment
    from adaptsuite.artifact import read_adapter
    from adaptsuite.audio.pipeline import DOMAIN
    from adaptsuite.commands import read_recipe

    options = {
        "data": given.data,
        "backbone": given.backbone,
        "method": method,
        "cv": given.cv,
        "test": None if given.cv else given.test,
        "epochs": given.epochs,
        "size": ("front_end.frames", None),
        "setting": [f"seeds={given.seeds}", f"sites={given.sites}", *own, *given.settings],
    }
    settled, manifest = experiment.settle(DOMAIN, read_recipe(DOMAIN, options))
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        result, outcomes = experiment.train(DOMAIN, settled, manifest, folder)
        records = [read_adapter(outcome.adapter) for outcome in outcomes]
    ranks = [record.extra.get("ranks", {}) for record in records]
    sites = {site.key: (site.role, site.block) for site in records[0].sites}
    seconds = (time.process_time() - start) / len(outcomes)
    return {"method": method, "settings": own, "ranks": ranks, "sites": sites, "cpu_seconds": seconds, **result}


def grid(row: dict) -> list[str]:
    """Mean rank over seeds and folds: a line for each role, a column for each block."""
    blocks = sorted({block for _, block in row["sites"].values()})
    lines = [f"{'':<10}" + "".join(f"{block:>6}" for block in blocks) + f"{'all':>7}"]
    for role in dict.fromkeys(role for role, _ in row["sites"].values()):
        of_role = [
            np.mean([r[key] for r in row["ranks"] for key, place in row["sites"].items() if place == (role, block)])
            for block in blocks
        ]
        lines.append(f"{role:<10}" + "".join(f"{mean:>6.1f}" for mean in of_role) + f"{np.mean(of_role):>7.1f}")
    return lines


def agreement(row: dict) -> float:
    """Mean correlation of two allocations over the sites."""
    ranks = [[own[key] for key in row["sites"]] for own in row["ranks"]]
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in itertools.combinations(ranks, 2)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--test", default="fold=1")
    parser.add_argument("--cv")
    parser.add_argument("--sites", default="attn.q,attn.k,attn.v,attn.out")
    parser.add_argument("--methods", default="lora,adalora,increlora")
    parser.add_argument("--backbone", default="embedded:audio-tiny")
    parser.add_argument("--data", default=str(DATA / "audio_esc10"))
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--json")
    given, rows = parser.parse_args(), []
    print(f"{'method':<11} {'no head':>9}  accuracy [95 % interval]  range over seeds  CPU s a run")
    for method in given.methods.split(","):
        rows.append(row := one(given, method, settings(given.rank)[method]))
        found, trained = row["metrics"]["test"]["accuracy"], row["params"]["trained_without_head"]
        worst, best = found.get("range", [found["value"]] * 2)
        low, high = found["ci"]
        shown = f"{found['value']:.3f} [{low:.3f}, {high:.3f}]     {worst:.3f} to {best:.3f}"
        print(f"{method:<11} {trained:>9,}  {shown}  {row['cpu_seconds']:>9.1f}", flush=True)
        if given.json:
            Path(given.json).write_text(json.dumps(rows, indent=1, default=str))
    for row in rows:
        if not any(row["ranks"]):
            continue
        print(f"\n{row['method']}: mean rank by block; allocations agree with r = {agreement(row):.2f}")
        print("\n".join(grid(row)))


if __name__ == "__main__":
    main()
