"""What arithmetic on adapters does to recordings: unlearning by negation, transfer by analogy and by average.

    python tests/benchmarks/compose_demo.py [exact,unlearn,transfer] [--seeds 0,1,2] [--json FILE]

exact: the change of every weight under 0.7*a + 0.3*b - c, ours and peft's combinations against float64.
unlearn (ESC-10, fold 1 is the test): lora on ten classes is `a`; trained on with one class alone it is `f`; what that
added is taken away again, a - k*(f - a). transfer (spoken digits, 30 clips a digit to test): `a` knows one speaker;
trained on with five digits of that speaker it is `c`, with five digits of another speaker `b`; a + b - c is asked for
the other's other five digits. The head is never trained after `a`: only adapters differ. Backbone: audio-tiny.
"""

import argparse
import copy
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
import conftest  # noqa: E402, F401  finds the packages in a bare clone

from adaptsuite import experiment  # noqa: E402
from adaptsuite.artifact import Record, load_adapter, read_adapter  # noqa: E402
from adaptsuite.compose import compose  # noqa: E402
from adaptsuite.host import attach  # noqa: E402
from adaptsuite.plan import Plan  # noqa: E402
from adaptsuite.recipe import DataSettings, Recipe, build  # noqa: E402
from adaptsuite.trainer import fit  # noqa: E402

DATA = Path(os.environ.get("ADAPTSUITE_DATA", ROOT.parent / "shared" / "data"))
FROZEN = 1e-12  # rate of a head that shall stay


class Lab:
    """One table, one backbone, and adapters that are trained on some of its rows and asked about others."""

    def __init__(self, table: Path, seed: int):
        from adaptsuite.audio.pipeline import DOMAIN

        torch.set_num_threads(1)
        recipe = Recipe("audio", "embedded:audio-tiny", method="lora", seeds=(seed,))
        recipe = replace(recipe, data=DataSettings(manifest=str(table)))
        self.domain, self.folder = DOMAIN, Path(tempfile.mkdtemp())
        self.recipe, self.manifest = experiment.settle(DOMAIN, recipe)
        self.plain = DOMAIN.model(self.recipe, self.manifest.classes)
        self.parts = experiment.Parts(DOMAIN, self.manifest)
        self.task = DOMAIN.task(self.recipe, self.manifest.classes)
        experiment.prepare_rows(DOMAIN, self.plain, self.manifest)

    def rows(self, wanted: Callable) -> np.ndarray:
        return np.array([i for i, row in enumerate(self.manifest.rows) if wanted(row)])

    def train(self, name: str, rows: np.ndarray, epochs: int, start: Record | None = None) -> Record:
        """A fresh adapter with its head, or one that goes on from `start` under the head of `start`."""
        plan = build(Plan, {**self.recipe.plan, "epochs": epochs, "seed": self.recipe.seeds[0]}, "plan")
        if start is None:
            handle = experiment.adapt(self.domain, self.recipe, self.manifest.classes)
        else:
            handle = self.load(start)
            plan = replace(plan, lr=plan.lr / 5, head_lr=FROZEN)
        fit(handle.model, self.task, self.parts.part(handle.model, rows), None, plan, None, handle)
        labels = list(self.manifest.classes)
        return read_adapter(handle.save(self.folder / name, labels=labels))

    def load(self, record: Record):
        model = copy.deepcopy(self.plain)
        return load_adapter(model, record, sample=self.domain.sample(model))

    def accuracy(self, record: Record, rows: np.ndarray) -> float:
        plan, model = build(Plan, self.recipe.plan, "plan"), self.load(record).model
        outputs = self.domain.outputs(model, self.task, self.parts.part(model, rows), plan)
        return float(np.mean(outputs.argmax(1) == self.manifest.subset(rows).targets(self.manifest.classes)))


def table(title: str, rows: dict[str, dict[str, list[float]]]) -> None:
    """Means over seeds, with the lowest and the highest."""
    columns = list(next(iter(rows.values())))
    print(f"\n{title}\n{'':<34}" + "".join(f"{c:>22}" for c in columns))
    for name, found in rows.items():
        cells = (f"{np.mean(v):.3f} ({min(v):.3f}-{max(v):.3f})" for v in found.values())
        print(f"{name:<34}" + "".join(f"{c:>22}" for c in cells), flush=True)


def ask(lab: Lab, rows: dict, adapters: dict[str, Record], parts: dict[str, np.ndarray]) -> None:
    for name, record in adapters.items():
        for part, indices in parts.items():
            rows.setdefault(name, {}).setdefault(part, []).append(lab.accuracy(record, indices))


def unlearn(seeds: Iterable[int], forget: str = "dog") -> dict:
    rows: dict = {}
    for seed in seeds:
        lab = Lab(DATA / "audio_esc10" / "manifest.csv", seed)
        train, test = (lab.rows(lambda r, t=t: (r.extra["fold"] == "1") == t) for t in (False, True))
        parts = {
            f"{forget} (test)": [i for i in test if lab.manifest.rows[i].label == forget],
            "nine others (test)": [i for i in test if lab.manifest.rows[i].label != forget],
        }
        a = lab.train("a", train, 6)
        f = lab.train("f", np.array([i for i in train if lab.manifest.rows[i].label == forget]), 20, a)
        found = {"a: ten classes": a, f"f: a, then {forget} alone": f}
        for k in (0.5, 1, 2, 4):
            found[f"a - {k}*(f - a)"] = compose(f"a - {k}*(f - a)", {"a": a, "f": f})
        cut = compose("a - 2*(f - a)", {"a": a, "f": f}, rank=a.method.rank)
        found[f"a - 2*(f - a), rank {a.method.rank}"] = cut
        print(f"rank {a.method.rank}: {cut.extra['composed']['relative_error']:.1%} of the exact change's norm is lost")
        ask(lab, rows, found, {name: np.array(part) for name, part in parts.items()})
    table(f"Unlearning {forget!r} on ESC-10: accuracy, mean (lowest-highest) over seeds", rows)
    return rows


def transfer(seeds: Iterable[int], own: str = "george", other: str = "jackson") -> dict:
    rows: dict = {}
    for seed in seeds:
        lab = Lab(DATA / "audio_fsdd" / "manifest.csv", seed)

        def spoken(speaker: str, part: str, digits: str, lab=lab) -> np.ndarray:
            """20 takes of each digit to train on, the other 30 to test."""

            def wanted(row) -> bool:
                training = 5 <= int(row.extra["take"]) < 25
                return row.extra["speaker"] == speaker and row.label in digits and training == (part == "train")

            return lab.rows(wanted)

        known, unseen = "01234", "56789"
        a = lab.train("a", spoken(own, "train", known + unseen), 8)
        b = lab.train("b", spoken(other, "train", known), 4, a)
        c = lab.train("c", spoken(own, "train", known), 4, a)
        d = lab.train("d", spoken(other, "train", known + unseen), 4, a)
        terms = {"a": a, "b": b, "c": c}
        found = {f"a: {own}, ten digits": a, f"b: a, then {other}, five digits": b}
        found |= {
            "a + b - c": compose("a + b - c", terms),
            "a + b - c, elementwise": compose("a + b - c", terms, elementwise=True),
            "(a + b) / 2": compose("(a + b) / 2", {"a": a, "b": b}),
            f"a, then {other}, ten digits": d,
        }
        parts = {
            f"{other}, known digits": spoken(other, "test", known),
            f"{other}, unseen": spoken(other, "test", unseen),
        }
        parts[f"{own}, ten digits"] = spoken(own, "test", known + unseen)
        ask(lab, rows, found, parts)
    table(f"From {own} to {other}, five digits unseen: accuracy, mean (lowest-highest) over seeds", rows)
    return rows


def exact(seeds: Iterable[int]) -> dict:
    """|found - sum| / |sum| over all weights, for adapters of one start and of three."""
    import peft

    from adaptsuite.peft_bridge import to_peft
    from adaptsuite.testing import HOSTS
    from adaptsuite.verify import perturb

    weights, rows = {"a": 0.7, "b": 0.3, "c": -1.0}, {}
    for seed in seeds:
        for start in ("one start", "three starts"):
            with tempfile.TemporaryDirectory() as folder:
                records, deltas = {}, {}
                for number, name in enumerate(weights):
                    torch.manual_seed(seed + (number if start == "three starts" else 0))
                    model = HOSTS["hf_vit"]().model
                    handle = attach(model, "lora")
                    perturb(handle.trained().values(), 10 * seed + number)
                    to_peft(handle, Path(folder) / f"peft-{name}")
                    records[name] = read_adapter(handle.save(Path(folder) / name))
                    branches = handle.adapter.branches.items()
                    deltas[name] = {k: (b.up.double() @ b.down.double() * b.scale).detach() for k, b in branches}
                expected = {k: sum(w * deltas[n][k] for n, w in weights.items()) for k in deltas["a"]}
                found = {}
                for name, options in {"ours": {}, "ours, rank 8": {"rank": 8}, "apart": {"elementwise": True}}.items():
                    if name == "apart" and start == "three starts":
                        continue  # refused
                    composed = load_adapter(HOSTS["hf_vit"]().model, compose("0.7*a + 0.3*b - c", records, **options))
                    found[name] = {k: b.delta().double() for k, b in composed.adapter.branches.items()}
                twin = peft.PeftModel.from_pretrained(HOSTS["hf_vit"]().model, Path(folder) / "peft-a", "a")
                for name in ("b", "c"):
                    twin.load_adapter(Path(folder) / f"peft-{name}", name)
                for kind in ("linear", "cat", "svd"):
                    options = {"svd_rank": 8} if kind == "svd" else {}
                    twin.add_weighted_adapter(list(weights), list(weights.values()), kind, kind, **options)
                    paths = {k: twin.base_model.model.get_submodule(k.replace("/", ".")) for k in expected}
                    found[f"peft {kind}"] = {k: m.get_delta_weight(kind).double() for k, m in paths.items()}
            size = sum(float(v.square().sum()) for v in expected.values())
            for name, own in found.items():
                gap = sum(float((own[k].detach() - v).square().sum()) for k, v in expected.items())
                rows.setdefault(name, {}).setdefault(start, []).append((gap / size) ** 0.5)
    print("\n0.7*a + 0.3*b - c: distance from the float64 sum, of its norm, mean over seeds")
    for name, found in rows.items():
        print(f"{name:<16}" + "".join(f"{start:>16} {np.mean(v):>9.1e}" for start, v in found.items()))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="?", default="exact,unlearn,transfer")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--json")
    given = parser.parse_args()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    kinds = {"exact": exact, "unlearn": unlearn, "transfer": transfer}
    found = {name: kinds[name](seeds) for name in given.parts.split(",")}
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
