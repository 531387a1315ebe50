"""`make demo` for medicine: generated ultrasound of patients, four methods beside each other, and a study read."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from adaptsuite import experiment
from adaptsuite.demo import exhibit
from adaptsuite.images import read
from adaptsuite.recipe import Recipe
from adaptsuite.report import comparison_row, read_run

METHODS = ("linear", "bitfit", "lora", "full")
EPOCHS = {"linear": 6, "bitfit": 6, "lora": 6, "full": 4}
BACKBONE, TARGET = "embedded:vision-tiny", "sensitivity>=0.9"


def run(out: str | Path, patients: int = 96, count: int = 4, methods: tuple[str, ...] = METHODS) -> dict:
    """Writes OUT/medical/data, a run for each method, and what the last adapter says of a DICOM clip; returns the
    result of the last run."""
    from adaptsuite.medical import load
    from adaptsuite.medical.pipeline import DOMAIN
    from adaptsuite.medical.synthetic import make_dataset, sample_patient, write_clip

    folder = Path(out) / "medical"
    table = make_dataset(folder / "data", patients, count)
    print(f"data      {table}: generated ultrasound, {patients} patients, {count} frames each", flush=True)
    print(f"\n{'method':<10} {'trained':>10}  AUROC [95 % of patients]   seconds", flush=True)
    rows, result = [], {}
    for method in sorted(methods, key=lambda m: m == "lora"):  # last: its report shows the others beside it
        recipe = Recipe("medical", BACKBONE, method=method)
        data = replace(recipe.data, manifest=str(table))
        evidence = {"operating_point": TARGET, "subgroups": ("site", "age")}
        recipe = replace(recipe, data=data, plan={"epochs": EPOCHS[method]}, evidence=evidence)
        settled, manifest = experiment.settle(DOMAIN, recipe)
        result = experiment.run(DOMAIN, settled, manifest, folder / method, comparison=rows)
        row = comparison_row(read_run(folder / method), "auroc")
        rows.append(row)
        low, high = row["auroc"]["ci"]
        value = f"{row['auroc']['value']:.3f} [{low:.3f}, {high:.3f}]"
        print(f"{row['method']:<10} {row['trained']:>10,}  {value}   {row['seconds']:.0f}", flush=True)
    found = result["metrics"]["evidence"]["Finding: lesion"]["metrics"]
    pair = "  ".join(f"{name} {found[name]['value']:.2f}" for name in ("sensitivity", "specificity"))
    print(f"\nthreshold for {TARGET} on validation patients; on test patients {pair}")
    clip = write_clip(folder / "study" / "clip.dcm", sample_patient(np.random.default_rng(7), lesion=True))
    said = load(folder / "lora", device="cpu").predict(clip) if "lora" in methods else {}
    for name, probability in said.items():
        print(f"study     {clip.name}: {name} {probability:.3f}")
    print(f"\nreport    {result['report']}")
    pictures = sorted(folder.glob("data/images/*-0.png"))
    return result | exhibit(
        folder,
        f"Lesions in the ultrasound of {patients} patients, found by LoRA",
        "AUROC",
        rows[-1]["auroc"],
        "chance 0.500",
        [np.asarray(read(path)) for path in pictures[1:8:2]],
        "adapt medical train --data TABLE.csv --recipe fixed --out runs/mine",
    )
