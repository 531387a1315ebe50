"""COVID-CT (train -> val) and BUSI (five folds by group): methods with intervals by patient, calibration, neighbours.

python tests/benchmarks/medical_methods.py [covid|busi ...] [--methods a,b] [--seeds 0,1,2] [--epochs N] [--json FILE]
    [--backbone NAME] [--set key=value ...]

Of the finding (COVID; malignant among three classes): AUROC, AUPRC, and at the threshold that validation patients chose
F1, sensitivity and specificity; calibration error before and after temperature scaling. Value of all seeds' mean,
interval of the first seed's rows by patient. `knn` and `probe` read frozen features (adaptsuite.medical.probes).
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
import conftest  # noqa: E402, F401  finds the packages in a bare clone

DATA = Path(os.environ.get("ADAPTSUITE_DATA", ROOT.parent / "shared" / "data"))
METHODS = "linear,knn,probe,lora,bitfit,film,full"
SETS = {
    "covid": {"folder": "medical_covid_ct", "positive": ("COVID",), "test": "split=val", "cv": None},
    "busi": {"folder": "medical_busi", "positive": ("malignant",), "test": None, "cv": "fold"},
}
SHOWN = ("auroc", "auprc", "f1", "sensitivity", "specificity")


def table(name: str, domain, recipe):
    """The settled recipe and the table; of BUSI with a column of five folds that no group crosses."""
    from sklearn.model_selection import StratifiedGroupKFold

    from adaptsuite import experiment

    recipe, manifest = experiment.settle(domain, recipe)
    if SETS[name]["cv"]:
        label, fold = np.array([r.label for r in manifest.rows]), np.zeros(len(manifest), int)
        parts = StratifiedGroupKFold(5, shuffle=True, random_state=0).split(label, label, manifest.groups())
        for i, (_, test) in enumerate(parts):
            fold[test] = i
        rows = tuple(replace(r, extra={**r.extra, "fold": str(f)}) for r, f in zip(manifest.rows, fold, strict=True))
        manifest = replace(manifest, rows=rows, columns=(*manifest.columns, "fold"))
    return recipe, manifest


def frozen(method: str, domain, recipe, manifest) -> dict:
    """AUROC and AUPRC of the finding by neighbours or by the grid's best head, on the rows of each fold."""
    from adaptsuite import metrics
    from adaptsuite.manifest import split
    from adaptsuite.medical import clinical, findings, probes

    settings = findings.EvidenceSettings(**recipe.evidence)
    found, targets, classes = probes.features(domain, recipe, manifest), manifest.targets(), len(manifest.classes)
    ((_, columns),) = findings.findings(manifest.classes, manifest.task, settings).items()
    p, seen = np.zeros((len(manifest), classes)), np.zeros(len(manifest), bool)
    for fold in split(manifest, recipe.data.test, recipe.data.val, recipe.data.cv, recipe.seeds[0]):
        rows = np.concatenate([fold.train, fold.val])
        if method == "knn":
            x = found.read(1, False)
            p[fold.test] = probes.neighbours(x[rows], targets[rows], x[fold.test], classes)
        else:
            choices = [(b, pool) for b in probes.BLOCKS for pool in probes.POOLS]
            inputs = [found.read(*choice) for choice in choices]
            heads = probes.grid_heads([x[fold.train] for x in inputs], targets[fold.train], classes)
            scored = [
                (probes._score(head, x[fold.val], targets[fold.val], "accuracy"), i, rate)
                for i, (x, row) in enumerate(zip(inputs, heads, strict=True))
                for rate, head in zip(probes.RATES, row, strict=True)
            ]
            _, best, rate = max(scored)
            ((head,),) = probes.grid_heads([inputs[best][rows]], targets[rows], classes, (rate,))
            p[fold.test] = metrics.to_probabilities(probes._outputs(head, inputs[best][fold.test]), manifest.task)
        seen[fold.test] = True
    own = clinical.finding(p[seen][:, columns].sum(1).clip(0, 1), findings.truth(targets, columns)[seen])
    return clinical.evaluate(own, manifest.groups()[seen], ("auroc", "auprc", "f1", "ece"))


def trained(domain, recipe, manifest, folder: Path) -> tuple[dict, list, dict, dict]:
    from adaptsuite import experiment

    result = experiment.run(domain, recipe, manifest, folder)
    evidence = result["metrics"]["evidence"]
    finding = next(v for k, v in evidence.items() if k.startswith("Finding"))
    return finding["metrics"], finding.get("by_seed", []), evidence.get("Calibration before and after", {}), result


def cell(metric: dict | None) -> str:
    if not metric or metric["value"] is None:
        return f"{'-':^20}"
    low, high = metric["ci"] or (np.nan, np.nan)
    return f"{metric['value']:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", default=list(SETS))
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--backbone", default="embedded:vision-tiny")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    import torch

    from adaptsuite.commands import read_recipe
    from adaptsuite.medical.pipeline import DOMAIN

    torch.set_num_threads(1)
    rows = []
    for name in given.sets:
        own = SETS[name]
        if not (DATA / own["folder"] / "manifest.csv").is_file():
            print(f"{name}  skipped: {DATA / own['folder']} is absent")
            continue
        print(f"{name:6} {'method':8} {'trained':>9}  " + "  ".join(f"{m:20}" for m in SHOWN) + "  seeds AUROC | ECE")
        for method in given.methods.split(","):
            options = {
                "data": str(DATA / own["folder"]),
                "backbone": given.backbone,
                "method": "linear" if method in ("knn", "probe") else method,
                "test": own["test"],
                "cv": own["cv"],
                "epochs": given.epochs,
                "size": ("front_end.size", None),
                "setting": [
                    f"seeds={given.seeds}",
                    f"evidence.positive={','.join(own['positive'])}",
                    "evidence.near_duplicates=off",
                    "plan.device=cpu",
                    *given.settings,
                ],
            }
            recipe, manifest = table(name, DOMAIN, read_recipe(DOMAIN, options))
            if method in ("knn", "probe"):
                found, row = frozen(method, DOMAIN, recipe, manifest), {"trained": 0}
                found = {m: v for m, v in found.items() if m not in ("f1",)}
                tail = ""
            else:
                with tempfile.TemporaryDirectory() as folder:
                    found, seeds, calibrated, result = trained(DOMAIN, recipe, manifest, Path(folder) / "run")
                row = {"trained": result["params"]["trained"], "seeds": seeds, "calibration": calibrated}
                row["accuracy"] = result["metrics"]["test"]["accuracy"]
                error = calibrated.get("ece")
                tail = " ".join(f"{s['auroc']:.3f}" for s in seeds) + (
                    f" | {error['before']['value']:.3f} -> {error['after']['value']:.3f}" if error else ""
                )
                tail += f" | accuracy {row['accuracy']['value']:.3f}"
            rows.append({"set": name, "method": method, **row, "metrics": found})
            print(
                f"{name:6} {method:8} {row['trained']:>9,}  "
                + "  ".join(cell(found.get(m)) for m in SHOWN)
                + f"  {tail}",
                flush=True,
            )
            if given.json:
                given.json.write_text(json.dumps(rows, indent=1, default=float) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
