"""Frozen features of `embedded:vision-tiny`: groceries, breast ultrasound, chest tomograms, generated cultivars.

python tests/benchmarks/vision_probe.py [--data DIR] [--weights FILE] [--sets NAME ...] [--seeds 3] [--json FILE]

Logistic regression on standardised features, its strength chosen inside the training part, for every row by the same
rule. The rows to beat stand beside it: the same network with random weights, the descriptors that an engineer would
measure (adaptsuite.vision.pretrain), and 16 x 16 pixels, the floor that the data sets' own descriptions have.
"""

import argparse
import csv
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
import conftest  # noqa: E402, F401  finds the packages in a bare clone

from adaptsuite.backbones import record_of  # noqa: E402
from adaptsuite.metrics import bootstrap  # noqa: E402
from adaptsuite.vision.backbones import calibrate, vision_transformer  # noqa: E402
from adaptsuite.vision.pretrain import cells, descriptors, normalise, read_out  # noqa: E402
from adaptsuite.vision.synthetic import make_dataset, oracle  # noqa: E402

STRENGTHS = (0.01, 0.1, 1.0)  # of the logistic regression: C
SHOTS = 10  # of a cultivar
GATES = {  # accuracy at least, and lead over the mean of random weights
    "grocery-val": (0.25, 0.06),
    "grocery-blocks": (0.68, 0.15),
    "covid-ct": (0.71, None),
    "busi": (0.62, None),
}
STRETCH = {"grocery-val": 0.412, "grocery-blocks": 0.80, "covid-ct": 0.749, "busi": 0.682}


@dataclass
class Judged:
    """Images and how they are parted: each part is left out once, or only those of `tests`."""

    x: Tensor  # (N, 3, S, S) uint8
    label: np.ndarray
    part: np.ndarray  # also what strengths are chosen by, inside the training part
    group: np.ndarray  # what the intervals resample
    tests: tuple[int, ...]
    note: str = ""


def read(folder: Path, size: int) -> tuple[Tensor, list[dict[str, str]]]:
    """Middle squares at `size` px, as the model's own configuration crops, and the rows of the manifest."""
    with open(folder / "manifest.csv", newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    x = torch.zeros(len(rows), 3, size, size, dtype=torch.uint8)
    for i, row in enumerate(rows):
        with Image.open(folder / row["path"]) as image:
            image = image.convert("RGB")
            w, h = image.size
            scale = size / min(w, h)
            image = image.resize((max(round(w * scale), size), max(round(h * scale), size)), Image.Resampling.BICUBIC)
            left, top = (image.width - size) // 2, (image.height - size) // 2
            image = image.crop((left, top, left + size, top + size))
        x[i] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return x, rows


def column(rows: list[dict[str, str]], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows])


def blocks(rows: list[dict[str, str]], count: int = 3) -> np.ndarray:
    """Contiguous thirds of the file numbers inside each class: neighbouring photos, of one shelf, mostly stay together.

    The set names no groups; photos of one shelf that lie across a border still are in two blocks.
    """
    label, number = column(rows, "label"), np.array([int(re.findall(r"\d+", row["path"])[-1]) for row in rows])
    part = np.zeros(len(rows), int)
    for own in np.unique(label):
        at = np.flatnonzero(label == own)
        part[at[np.argsort(number[at])]] = np.arange(len(at)) * count // len(at)
    return part


def grocery(data: Path, size: int) -> dict[str, Judged]:
    x, rows = read(data / "vision_grocery_fine", size)
    label, group, train = column(rows, "label"), column(rows, "group"), column(rows, "split") == "train"
    part = np.full(len(rows), 3)
    part[train] = blocks([row for row, t in zip(rows, train, strict=True) if t])
    val = Judged(x, label, part, group, (3,), "official train and val")
    cv = Judged(x[torch.from_numpy(train)], label[train], part[train], group[train], (0, 1, 2), "thirds of each class")
    return {"grocery-val": val, "grocery-blocks": cv}


def grouped(folder: Path, size: int) -> Judged:
    """Five folds that no group crosses, with the classes' shares."""
    from sklearn.model_selection import StratifiedGroupKFold

    x, rows = read(folder, size)
    label, group = column(rows, "label"), column(rows, "group")
    part = np.zeros(len(rows), int)
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0).split(label, label, group)
    for i, (_, test) in enumerate(folds):
        part[test] = i
    return Judged(x, label, part, group, (0, 1, 2, 3, 4), "five grouped folds")


def cultivars(separation: float, size: int) -> Judged:
    """40 cultivars of one species, SHOTS leaves of each to learn from and ten to be told."""
    with tempfile.TemporaryDirectory() as folder:
        x, rows = read(make_dataset(folder, shots=SHOTS, separation=separation, size=size).parent, size)
    number = np.arange(len(rows)) % (SHOTS + 10)  # of the leaf in its cultivar
    part = np.where(number < SHOTS, number % 3, 3)
    told, known = oracle(separation=separation), oracle(separation=separation, shots=SHOTS)
    note = f"oracle {told:.3f}, with {SHOTS} shots {known:.3f}"
    return Judged(x, column(rows, "label"), part, column(rows, "group"), (3,), note)


def predict(features: np.ndarray, judged: Judged) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """(N, K) probabilities of the rows that were left out once, which rows, and the strength chosen for each part."""
    label, part = judged.label, judged.part
    classes, chosen = np.unique(label), []
    out = np.zeros((len(label), len(classes)))
    for test in judged.tests:
        train = part != test
        scores = [_inner(features[train], label[train], part[train], c) for c in STRENGTHS]
        chosen.append(STRENGTHS[int(np.argmax(scores))])
        model = _fit(features[train], label[train], chosen[-1])
        columns = np.searchsorted(classes, model.classes_)
        out[np.ix_(part == test, columns)] = model.predict_proba(features[part == test])
    rows = np.isin(part, judged.tests)
    return out[rows], rows, chosen


def _inner(features: np.ndarray, label: np.ndarray, part: np.ndarray, strength: float) -> float:
    """Accuracy with each part of the training rows left out in turn."""
    hits = [
        _fit(features[part != p], label[part != p], strength).predict(features[part == p]) == label[part == p]
        for p in np.unique(part)
    ]
    return float(np.concatenate(hits).mean())


def _fit(features: np.ndarray, label: np.ndarray, strength: float):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 200 steps are enough, and the same for every row
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=200)).fit(features, label)


@torch.no_grad()
def network(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.cat([read_out(model.forward_features(normalise(part))) for part in x.split(64)])


def arms(weights: Path, seeds: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name -> uint8 images to features."""
    from safetensors.torch import load

    data = weights.read_bytes()
    record = record_of(data)
    own = vision_transformer(record["config"]).eval()
    own.load_state_dict(load(data))
    found = {"embedded": network(own)}
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = vision_transformer(record["config"])
        calibrate(model, record["pretrained_cfg"])
        found[f"random weights seed {seed}"] = network(model)
    found["engineered descriptors"] = lambda x: torch.cat([descriptors(cells(part)) for part in x.split(64)])
    found["16 x 16 pixels"] = lambda x: F.interpolate(x.float(), size=16, mode="area").flatten(1)
    return found


def main() -> None:
    names = [*GATES, "cultivars-1.6", "cultivars-2.4"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = os.environ.get("ADAPTSUITE_DATA", ROOT.parent / "shared" / "data")
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--weights", type=Path, default=ROOT / "vision" / "weights" / "vision-tiny.safetensors")
    parser.add_argument("--sets", nargs="*", default=names, choices=names)
    parser.add_argument("--seeds", type=int, default=3, help="networks with random weights")
    parser.add_argument("--size", type=int, default=96, help="px of a side that all rows see")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found, compared = {}, arms(arguments.weights, arguments.seeds)
    for judged_together in gather(arguments, names):
        for name, judged in judged_together.items():
            if name in arguments.sets:
                found[name] = judge(name, judged, compared)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def gather(arguments: argparse.Namespace, names: list[str]):
    """{name: Judged} of each source that is there and asked for."""
    sources = {
        "vision_grocery_fine": (names[:2], lambda folder: grocery(arguments.data, arguments.size)),
        "medical_covid_ct": (["covid-ct"], lambda folder: {"covid-ct": grouped(folder, arguments.size)}),
        "medical_busi": (["busi"], lambda folder: {"busi": grouped(folder, arguments.size)}),
    }
    for source, (own, load) in sources.items():
        if not set(own) & set(arguments.sets):
            continue
        if (arguments.data / source / "manifest.csv").is_file():
            yield load(arguments.data / source)
        else:
            print(f"{' '.join(own)}  skipped: {arguments.data / source} is absent")
    for name in names[4:]:
        if name in arguments.sets:
            yield {name: cultivars(float(name.partition("-")[2]), arguments.size)}


def judge(name: str, judged: Judged, compared: dict[str, Callable[[Tensor], Tensor]]) -> dict:
    """Prints and returns every row of one set, and its gate."""
    rows = {"set": {"images": len(judged.label), "classes": len(np.unique(judged.label)), "note": judged.note}}
    print(f"{name:15} {len(judged.label)} images, {len(np.unique(judged.label))} classes, {judged.note}")
    classes = np.unique(judged.label)
    for arm, features in compared.items():
        with torch.no_grad():
            values = features(judged.x).float().numpy()
        out, taken, chosen = predict(values, judged)
        target = np.searchsorted(classes, judged.label[taken])
        accuracy = float((out.argmax(1) == target).mean())
        low, high = bootstrap(out, target, judged.group[taken], "accuracy", probabilities=True)
        parts = [float((out.argmax(1) == target)[judged.part[taken] == p].mean()) for p in judged.tests]
        rows[arm] = {
            "accuracy": round(accuracy, 4),
            "interval": [round(low, 4), round(high, 4)],
            "parts": [round(p, 4) for p in parts],
            "features": values.shape[1],
            "C": chosen,
        }
        each = " ".join(f"{p:.3f}" for p in parts) if len(parts) > 1 else ""
        print(f"{name:15} {arm:24} {values.shape[1]:4}  {accuracy:.3f} [{low:.3f}, {high:.3f}]  {each}", flush=True)
    random = [row["accuracy"] for arm, row in rows.items() if arm.startswith("random")]
    if name in GATES and random:
        own, (least, lead) = rows["embedded"]["accuracy"], GATES[name]
        ahead = own - float(np.mean(random))
        passed = own >= least and (lead is None or ahead >= lead)
        rows["gate"] = {"at_least": least, "lead": lead, "ahead": round(ahead, 4), "passed": bool(passed)}
        rows["gate"] |= {"stretch": STRETCH[name], "stretched": own >= STRETCH[name]}
        word, wanted = "passed" if passed else "MISSED", "" if lead is None else f", lead over random >= {lead}"
        print(f"{name:15} gate {word}: {own:.3f} >= {least}{wanted} ({ahead:+.3f}); stretch {STRETCH[name]}")
    return rows


if __name__ == "__main__":
    main()
