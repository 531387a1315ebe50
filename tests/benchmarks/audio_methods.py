"""Methods side by side on real recordings: accuracy with intervals over folds and seeds, trained values, relative time.

python tests/benchmarks/audio_methods.py [--data MANIFEST] [--cv COLUMN] [--methods a,b] [--seeds 0,1,2] [--epochs N]
    [--random-weights] [--backbone NAME] [--set key=value ...] [--json FILE]

The backbone kwt-1 is the network of one's own in tests/audio/kwt1.py, with its published weights.
Prints one row as soon as a method is done. Times are relative to the first method, run in the same process.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
import conftest  # noqa: E402, F401  finds the packages in a bare clone

METHODS = "linear,audio.prototypes,lora,bottleneck,audio.conformer,audio.dense_moa,audio.soft_moa,full"
DATA = Path(os.environ.get("ADAPTSUITE_DATA", ROOT.parent / "shared" / "data"))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(DATA / "audio_esc10" / "manifest.csv"))
    parser.add_argument("--cv", default="fold")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--backbone", default="embedded:audio-tiny")
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--json")
    return parser.parse_args()


def main() -> None:
    from adaptsuite import experiment
    from adaptsuite.audio.pipeline import DOMAIN
    from adaptsuite.commands import read_recipe

    given, rows, first = arguments(), [], None
    if given.backbone == "kwt-1":
        sys.path.insert(0, str(ROOT / "tests" / "audio"))
        import kwt1

        from adaptsuite.audio.backbones import register

        register("kwt-1", kwt1.builder(DATA / "weights_kwt1"))
    print(
        f"{'method':<16} {'trained':>9} {'no head':>9}  accuracy [95 % interval]   range over seeds   seconds  relative"
    )
    for method in given.methods.split(","):
        options = {
            "data": given.data,
            "backbone": given.backbone,
            "random_weights": given.random_weights,
            "method": method,
            "cv": given.cv,
            "epochs": given.epochs,
            "size": ("front_end.frames", None),
            "setting": [f"seeds={given.seeds}", *given.settings],
        }
        with tempfile.TemporaryDirectory() as folder:
            result, outcomes = experiment.train(
                DOMAIN, *experiment.settle(DOMAIN, read_recipe(DOMAIN, options)), folder
            )
        seconds = sum(o.fit.seconds for o in outcomes) / len(outcomes)
        first = first or seconds
        found = result["metrics"]["test"]["accuracy"]
        low, high = found["ci"]
        spread = found.get("range", [found["value"]] * 2)
        params = result["params"]
        print(
            f"{method:<16} {params['trained']:>9,} {params['trained_without_head']:>9,}  {found['value']:.3f} "
            f"[{low:.3f}, {high:.3f}]      {spread[0]:.3f} to {spread[1]:.3f}  {seconds:>8.1f}  {seconds / first:.2f}",
            flush=True,
        )
        rows.append({"method": method, "random_weights": given.random_weights, "seconds": seconds, **result})
        if given.json:
            Path(given.json).write_text(json.dumps(rows, indent=1, default=str))


if __name__ == "__main__":
    main()
