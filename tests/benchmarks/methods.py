"""Methods side by side: accuracy with intervals over folds and seeds, trained values, MACs, relative time.

python tests/benchmarks/methods.py DOMAIN [--data MANIFEST] [--cv COLUMN | --test COLUMN=VALUE] [--methods a,b]
    [--seeds 0,1,2] [--epochs N] [--random-weights] [--backbone NAME] [--set key=value ...] [--json FILE]
python tests/benchmarks/methods.py vision --cultivars 40 --shots 3 --separation 1.6

DOMAIN is audio or vision; without --data it is ESC-10 by folds, and Grocery from train to val. With --cultivars the
task is drawn (adaptsuite.vision.synthetic), by the seed, and its ceiling is printed. A method may carry settings of its
own, as vision.ila:residual=ones. The backbone kwt-1 is the network of one's own in tests/audio/kwt1.py, with its
published weights. Prints one row as soon as a method is done; times are relative to the first method of the process.
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

DATA = Path(os.environ.get("ADAPTSUITE_DATA", ROOT.parent / "shared" / "data"))
DOMAINS = {
    "audio": {
        "backbone": "embedded:audio-tiny",
        "data": DATA / "audio_esc10",
        "cv": "fold",
        "size": "front_end.frames",
        "methods": "linear,audio.prototypes,lora,bottleneck,audio.conformer,audio.dense_moa,audio.soft_moa,full",
    },
    "vision": {
        "backbone": "embedded:vision-tiny",
        "data": DATA / "vision_grocery_fine",
        "test": "split=val",
        "size": "front_end.size",
        "methods": "linear,bitfit,film,ssf,vpt,lora,kadaptation,fact,parallel_adapter,adaptformer,adapter_plus,"
        "convpass,vision.ila,vision.ila_plus,vision.ila_plus_plus,full",
    },
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domain", choices=DOMAINS)
    for name in ("data", "cv", "test", "methods", "backbone", "json"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--cultivars", type=int)
    parser.add_argument("--shots", type=int, default=3)
    parser.add_argument("--tests", type=int, default=10)
    parser.add_argument("--separation", type=float, default=1.6)
    parser.add_argument("--pixels", type=int, default=96)
    given = parser.parse_args()
    own = DOMAINS[given.domain]
    parts = given.cv is None and given.test is None and given.data is None and given.cultivars is None
    given.cv, given.test = (own.get("cv"), own.get("test")) if parts else (given.cv, given.test)
    for name in ("data", "methods", "backbone"):
        setattr(given, name, getattr(given, name) or str(own[name]))
    return given


def drawn(given: argparse.Namespace, folder: str) -> tuple[str, str]:
    """The table of a generated task, and what may be reached on it."""
    from adaptsuite.vision.synthetic import make_dataset, oracle

    c, s = given.cultivars, given.separation
    table = make_dataset(folder, cultivars=c, shots=given.shots, tests=given.tests, separation=s, size=given.pixels)
    known, seen = oracle(c, s), oracle(c, s, shots=given.shots)
    return str(
        table
    ), f"ceiling {known:.3f} with the means of the traits known, {seen:.3f} with {given.shots} leaves each"


def one(given: argparse.Namespace, domain, method: str, data: str) -> dict:
    """The result of a method over all seeds and folds, with its MACs and the mean seconds of a fit."""
    from adaptsuite import experiment
    from adaptsuite.commands import read_recipe

    name, _, own = method.partition(":")
    options = {
        "data": data,
        "backbone": given.backbone,
        "random_weights": given.random_weights,
        "method": name,
        "cv": given.cv,
        "test": given.test,
        "epochs": given.epochs,
        "size": (DOMAINS[given.domain]["size"], None),
        "setting": [f"seeds={given.seeds}", *filter(None, own.split(":")), *given.settings],
    }
    settled, manifest = experiment.settle(domain, read_recipe(domain, options))
    macs = experiment.budget_of(domain, settled).macs_per_item
    with tempfile.TemporaryDirectory() as folder:
        result, outcomes = experiment.train(domain, settled, manifest, folder)
    seconds = sum(o.fit.seconds for o in outcomes) / len(outcomes)
    return {"method": method, "random_weights": given.random_weights, "macs": macs, "fit": seconds, **result}


def main() -> None:
    import importlib

    given, rows = arguments(), []
    domain = importlib.import_module(f"adaptsuite.{given.domain}.pipeline").DOMAIN
    if given.backbone == "kwt-1":
        sys.path.insert(0, str(ROOT / "tests" / "audio"))
        import kwt1

        from adaptsuite.audio.backbones import register

        register("kwt-1", kwt1.builder(DATA / "weights_kwt1"))
    with tempfile.TemporaryDirectory() as folder:
        data = given.data
        if given.cultivars:
            data, ceiling = drawn(given, folder)
            print(ceiling)
        print(
            f"{'method':<28} {'trained':>9} {'no head':>9} {'MMAC':>7}  accuracy [95 % interval]   range over seeds"
            "   seconds  relative"
        )
        for method in given.methods.split(","):
            row = one(given, domain, method, data)
            rows.append(row)
            found = row["metrics"]["test"]["accuracy"]
            low, high = found["ci"]
            worst, best = found.get("range", [found["value"]] * 2)
            params = row["params"]
            print(
                f"{method:<28} {params['trained']:>9,} {params['trained_without_head']:>9,} {row['macs'] / 1e6:>7.1f}  "
                f"{found['value']:.3f} [{low:.3f}, {high:.3f}]      {worst:.3f} to {best:.3f}  {row['fit']:>8.1f}  "
                f"{row['fit'] / rows[0]['fit']:.2f}",
                flush=True,
            )
            if given.json:
                Path(given.json).write_text(json.dumps(rows, indent=1, default=str))


if __name__ == "__main__":
    main()
