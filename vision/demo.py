"""`make demo` for pictures: the embedded backbone, generated leaves, four methods beside the ceiling, one report."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from adaptsuite import experiment
from adaptsuite.demo import exhibit
from adaptsuite.images import read
from adaptsuite.recipe import Recipe
from adaptsuite.report import comparison_row, read_run

METHODS = ("linear", "lora", "full", "vision.ila")
EPOCHS = {"linear": 8, "lora": 10, "full": 8, "vision.ila": 15}
BACKBONE, SEPARATION = "embedded:vision-tiny", 4.0
PIXELS = 144  # veins and teeth are too fine for 96
# a mirrored leaf is another cultivar: two of its traits have a side
AUGMENT = {"flip": False}


def run(
    out: str | Path, cultivars: int = 8, shots: int = 16, tests: int = 12, methods: tuple[str, ...] = METHODS
) -> dict:
    """Writes OUT/vision/data, a run for each method, and the report beside the last one's run; returns its result."""
    from adaptsuite.vision.pipeline import DOMAIN
    from adaptsuite.vision.synthetic import make_dataset, oracle

    folder = Path(out) / "vision"
    table = make_dataset(
        folder / "data", cultivars=cultivars, shots=shots, tests=tests, separation=SEPARATION, size=PIXELS
    )
    ceiling, shown = (oracle(cultivars, SEPARATION, shots=seen) for seen in (None, shots))
    print(f"data      {table}: generated leaves, {cultivars} cultivars, {shots} to train on and {tests} to test each")
    print(
        f"ceiling   {ceiling:.3f} with the cultivars' traits known, {shown:.3f} with those of {shots} leaves",
        flush=True,
    )
    print(f"\n{'method':<22} {'trained':>10}  {'MMACs':>6}  accuracy [95 % interval]   seconds", flush=True)
    rows, result = [], {}
    for method in methods:
        recipe = Recipe("vision", BACKBONE, method=method, augment=AUGMENT)
        data = replace(recipe.data, manifest=str(table))
        recipe = replace(recipe, data=data, plan={"epochs": EPOCHS[method]}, front_end={"ratio": 1.1, "size": PIXELS})
        settled, manifest = experiment.settle(DOMAIN, recipe)
        macs = experiment.budget_of(DOMAIN, settled).macs_per_item / 1e6
        result = experiment.run(DOMAIN, settled, manifest, folder / method, comparison=rows)
        row = comparison_row(read_run(folder / method), **{"MMACs": round(macs, 1)})
        rows.append(row)
        low, high = row["accuracy"]["ci"]
        value = f"{row['accuracy']['value']:.3f} [{low:.3f}, {high:.3f}]"
        line = f"{row['method']:<22} {row['trained']:>10,}  {row['MMACs']:>6.1f}  {value}   {row['seconds']:.0f}"
        print(line, flush=True)
    print(f"{'ceiling':<22} {'':>10}  {'':>6}  {ceiling:.3f}")
    print(f"\nreport    {result['report']}")
    leaves = sorted(folder.glob("data/*/*-000.png"))
    return result | exhibit(
        folder,
        f"{cultivars} cultivars from {shots} leaves each, told apart by an inter-layer adapter",
        "accuracy",
        rows[-1]["accuracy"],
        f"chance {1 / cultivars:.3f}",
        [np.asarray(read(path)) for path in leaves[:4]],
        "adapt vision train --data FOLDER_OF_CLASSES --recipe fixed --out runs/mine",
    )
