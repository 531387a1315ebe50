"""Methods side by side, as `adapt DOMAIN compare` has them, on the data and the networks of this project's figures.

python tests/benchmarks/methods.py DOMAIN [--data MANIFEST] [--cv COLUMN | --test COLUMN=VALUE] [--methods a,b]
    [--seeds 0,1,2] [--epochs N] [--random-weights] [--backbone NAME] [--set key=value ...] [--out FOLDER]
python tests/benchmarks/methods.py vision --cultivars 40 --shots 3 --separation 1.6

DOMAIN is audio or vision; without --data it is ESC-10 by folds, and Grocery from train to val. With --cultivars the
task is drawn (adaptsuite.vision.synthetic), by the seed, and its ceiling is printed. The backbone kwt-1 is the network
of one's own in tests/audio/kwt1.py, with its published weights. Adapters, table and report go to --out; without it
nothing is left but what is printed.
"""

import argparse
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
    for name in ("data", "cv", "test", "methods", "backbone", "out"):
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


def recipe_of(given: argparse.Namespace, domain, data: str, method: str, settings: list[str]):
    from adaptsuite.commands import read_recipe

    options = {name: getattr(given, name) for name in ("backbone", "random_weights", "cv", "test", "epochs")}
    options |= {"size": (DOMAINS[given.domain]["size"], None), "data": data, "method": method}
    return read_recipe(domain, {**options, "setting": [f"seeds={given.seeds}", *settings, *given.settings]})


def main() -> None:
    import importlib

    from adaptsuite.compare import FULL, compare, methods_of
    from adaptsuite.compare_page import lines

    given = arguments()
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
        entries = methods_of(given.methods)
        recipes = {label: recipe_of(given, domain, data, name, settings) for label, name, settings in entries}
        full = recipe_of(given, domain, data, FULL, [])
        found = compare(domain, recipes, full, Path(given.out or folder), lambda line: print(line, flush=True))
    print(*lines(found["rows"]), *found["sentences"], sep="\n")


if __name__ == "__main__":
    main()
