"""NLVR and VQA-RAD by the embedded pair: plain LoRA, routed LoRA, routed bottlenecks, full, and the blind baselines.

python tests/benchmarks/vl_questions.py [nlvr|rad ...] [--methods "a;b"] [--seeds 0,1,2] [--epochs N]
    [--set key=value ...] [--json FILE]

NLVR: statements true or false of a picture, train -> test. VQA-RAD: the image-disjoint column `split`, closed and open
questions. A method may carry settings, as vl.routed_lora:routing=mul. Accuracy pooled over seeds, interval by group
(pictures made or asked together), and the range over seeds; gain: beyond the better blind baseline, paired by row. A
majority answer and a linear model of the question's words stand beside them: they need no network.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
import conftest  # noqa: E402, F401  finds the packages in a bare clone

DATA = Path(os.environ.get("ADAPTSUITE_DATA", ROOT.parent / "shared" / "data"))
METHODS = "lora;vl.routed_lora:routing=mul_expand;vl.routed_lora:routing=mul;vl.routed_bottleneck;full"
SETS = {
    # three boxes side by side, and a finer grid than the 32 pixels of pretraining
    "nlvr": {"folder": "vl_nlvr", "epochs": 15, "settings": ("front_end.size=32,128",)},
    "rad": {"folder": "vl_vqa_rad", "epochs": 6, "settings": ("front_end.size=64", "head.loss=ce")},
}


def floors(manifest, fold) -> dict[str, float]:
    """Accuracy on test rows of the most frequent answer, and of a linear model of the question's words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    from adaptsuite.vl.data import answers_of, text_of
    from adaptsuite.vl.scores import normalise_answer

    rows, seen = manifest.rows, [*fold.train, *fold.val]
    answers = np.array([normalise_answer(answers_of(row)[0]) for row in rows])
    words = TfidfVectorizer(ngram_range=(1, 2)).fit([text_of(rows[i]) for i in seen])
    x = words.transform([text_of(row) for row in rows])
    model = LogisticRegression(C=10, max_iter=1000).fit(x[seen], answers[seen])
    common = Counter(answers[seen]).most_common(1)[0][0]
    test = list(fold.test)
    return {
        "majority": float((answers[test] == common).mean()),
        "words, linear": float((model.predict(x[test]) == answers[test]).mean()),
    }


def one(name: str, given: argparse.Namespace, method: str) -> dict:
    """The result of a method over all seeds."""
    from dataclasses import replace

    from adaptsuite import experiment
    from adaptsuite.commands import read_recipe
    from adaptsuite.vl.data import load_vqa_rad
    from adaptsuite.vl.pipeline import DOMAIN

    own, (kind, *settings) = SETS[name], method.split(":")
    options = {
        "data": str(DATA / own["folder"]),
        "backbone": "embedded:vl-tiny",
        "method": kind,
        "test": "split=test",
        "epochs": given.epochs or own["epochs"],
        "size": ("front_end.size", None),
        "setting": [f"seeds={given.seeds}", *settings, *own["settings"], *given.settings],
    }
    recipe, manifest = experiment.settle(DOMAIN, read_recipe(DOMAIN, options))
    if name == "rad":  # tells closed questions from open ones
        kinds = load_vqa_rad(DATA / own["folder"])
        manifest = replace(manifest, rows=kinds.rows, columns=kinds.columns)
    with tempfile.TemporaryDirectory() as folder:
        result, outcomes = experiment.train(DOMAIN, recipe, manifest, folder)
    seconds = sum(o.fit.seconds for o in outcomes) / len(outcomes)
    return {"method": method, "fit": seconds, "floors": floors(manifest, outcomes[0].fold), **result}


def shown(metric: dict) -> str:
    low, high = metric["ci"]
    worst, best = metric.get("range", [metric["value"]] * 2)
    return f"{metric['value']:.3f} [{low:.3f}, {high:.3f}] ({worst:.3f} to {best:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", choices=(*SETS, []), default=[])
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--json", type=Path)
    given, found = parser.parse_args(), {}
    for name in given.sets or SETS:
        rows = found.setdefault(name, [])
        for method in given.methods.split(";"):
            row = one(name, given, method)
            if not rows:
                print(name, "  ".join(f"{k} {v:.3f}" for k, v in row["floors"].items()))
            rows.append(row)
            print(f"{method}  {row['params']['trained_without_head']:,} trained without head, {row['fit']:.0f} s a fit")
            for metric, value in row["metrics"]["test"].items():
                print(f"    {metric:<20} {shown(value)}", flush=True)
            if given.json:
                given.json.write_text(json.dumps(found, indent=1, default=str))


if __name__ == "__main__":
    main()
