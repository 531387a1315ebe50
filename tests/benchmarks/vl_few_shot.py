"""Retrieval by the embedded pair once it is aligned, and few-shot methods on a small CLIP, on generated pictures.

python tests/benchmarks/vl_few_shot.py retrieval|clip|few_shot --work FOLDER [--seeds 0,1,2] [--steps 1200]
    [--rows "A;B"] [--pictures 2000] [--shots 16] [--json FILE]

retrieval: `embedded:vl-tiny`, whose encoders were trained apart, aligned by captions of scenes (two a picture, 70 % of
the pictures), and the recalls on scenes that were never seen, beside exact chance.
clip: trains a CLIP of 3.7 M values on scenes with one to four of their objects named, into FOLDER.
few_shot: base-to-new of that CLIP on scenes of which one object is left, as none of its pictures was (32 classes, a
colour and a shape): base, new and H of each method, beside zero-shot, Tip-Adapter and a probe.
"""

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
import conftest  # noqa: E402, F401  finds the packages in a bare clone
import torch  # noqa: E402

from adaptsuite import experiment  # noqa: E402
from adaptsuite.recipe import DataSettings, Recipe  # noqa: E402
from adaptsuite.vl import synthetic  # noqa: E402
from adaptsuite.vl.contrast import contrastive  # noqa: E402
from adaptsuite.vl.data import text_of  # noqa: E402
from adaptsuite.vl.pipeline import DOMAIN  # noqa: E402
from adaptsuite.vl.scores import RECALLS, chance_recall  # noqa: E402
from adaptsuite.vl.two_tower import cosines, load_towers  # noqa: E402

CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 96, "layers": 3, "head_width": 24},
    "text_cfg": {"context_length": 40, "width": 64, "heads": 4, "layers": 3},
}
RETRIEVAL = {
    "projections alone": ("linear", {}),
    "lora, text": ("lora", {"sites": ("text_encoder:attn.q", "text_encoder:attn.v"), "rank": 8}),
    "lora, both": ("lora", {"sites": ("attn.q", "attn.v"), "rank": 8}),
    "full": ("full", {}),
}
QKV = ("attn.q", "attn.k", "attn.v")
FEW_SHOT = {
    "rpo": ("vl.rpo", {}, {}),
    "lora": ("lora", {"sites": QKV, "rank": 2, "alpha": 2.0}, {"lr": 2e-3}),
    "bitfit": ("bitfit", {}, {"lr": 1e-3}),
}


def train_clip(folder: Path, steps: int, batch: int = 256, lr: float = 1.5e-3) -> None:
    """From fresh weights, by CLIP's loss; a caption names one to four of a scene's objects and where they are."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "clip.json").write_text(json.dumps(CLIP))
    towers = load_towers(f"open_clip:{folder / 'clip.json'}", random_weights=True)
    model, rng, scenes = towers.model.train().requires_grad_(True), np.random.default_rng(0), synthetic.split()["train"]
    groups = [[p for p in model.parameters() if (p.ndim > 1) == wide] for wide in (True, False)]
    decays = [{"params": group, "weight_decay": 0.1 * (i == 0)} for i, group in enumerate(groups)]
    optimizer = torch.optim.AdamW(decays, lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    start, pairs = time.perf_counter(), torch.arange(batch)
    for step in range(steps):
        drawn = rng.choice(scenes, batch)
        texts = [" , ".join(text.split(" , ")[: rng.integers(1, 5)]) for text in synthetic.captions(drawn, rng)]
        image, text = torch.from_numpy(synthetic.render(drawn, rng)), towers.tokenizer(texts)
        loss = contrastive(towers.scale.clamp(max=100) * cosines(towers.see(image), towers.read(**text)), pairs)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"{step:5}  loss {loss:.3f}  {time.perf_counter() - start:.0f} s", flush=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, str(folder / "clip.safetensors"))


def draw_shots(folder: Path, each: int = 64, train: int = 24) -> Path:
    """Folders of classes: scenes of which one object is left, the first `train` of each class for training."""
    from PIL import Image

    if folder.is_dir():
        return folder
    rng, half = np.random.default_rng(5), synthetic.CELL
    drawn = rng.choice(synthetic.split()["test"], 32 * each * 2)
    colours, shapes = synthetic.objects(drawn)
    seen: dict[str, int] = {}
    for i, picture in enumerate(synthetic.render(drawn, rng)):
        place = int(rng.integers(4))
        name = f"{synthetic.NAMES[colours[i, place]]} {synthetic.SHAPES[shapes[i, place]]}"
        seen[name] = seen.get(name, -1) + 1
        if seen[name] >= each:
            continue
        y, x = half * (place // 2), half * (place % 2)
        cell = picture[:, y : y + half, x : x + half]
        ground = np.median(np.concatenate([cell[:, 0], cell[:, -1], cell[:, :, 0], cell[:, :, -1]], 1), 1)
        alone = np.clip(ground[:, None, None] + 10 * rng.standard_normal(picture.shape), 0, 255).astype(np.uint8)
        alone[:, y : y + half, x : x + half] = cell
        path = folder / ("train" if seen[name] < train else "test") / name
        path.mkdir(parents=True, exist_ok=True)
        Image.fromarray(alone.transpose(1, 2, 0)).save(path / f"{seen[name]}.png")
    return folder


def metrics_of(recipe: Recipe, out: Path) -> dict[str, float]:
    settled, manifest = experiment.settle(DOMAIN, recipe)
    result, _ = experiment.train(DOMAIN, settled, manifest, out, lambda line: None)
    found = {name: metric["value"] for name, metric in result["metrics"]["test"].items()}
    return {**found, "trained": result["params"]["trained"], "seconds": result["seconds"]}


def bag_of_words(recipe: Recipe) -> dict[str, float]:
    """Recalls of a model that knows which words fit a picture and nothing of which belong together, counted.

    Words of a scene differ by its four colours alone, so that it cannot tell scenes of the same colours apart.
    """
    table = DOMAIN.table(recipe.data)
    rows = [row for row in table.rows if row.extra["split"] == "test"]
    words = {row.path: frozenset(text_of(row).split()) for row in rows}
    captions, pictures = Counter(words[row.path] for row in rows), Counter(words.values())
    own = Counter(row.path for row in rows)
    to_text = {k: np.mean([chance_recall(k, captions[w], own[p]) for p, w in words.items()]) for k in RECALLS}
    to_image = {k: np.mean([chance_recall(k, pictures[words[row.path]]) for row in rows]) for k in RECALLS}
    return {
        **{f"image_to_text_r{k}": float(v) for k, v in to_text.items()},
        **{f"text_to_image_r{k}": float(v) for k, v in to_image.items()},
    }


def recipes(arguments, folder: Path) -> dict[str, Recipe]:
    if arguments.part == "retrieval":
        table = folder / "captions" / "captions.jsonl"
        if not table.is_file():
            synthetic.make_captions(table.parent, arguments.pictures, each=2)
        data = DataSettings(manifest=str(table), task="retrieval")
        plan = {"epochs": arguments.epochs or 15, "device": "cpu"}
        return {
            name: Recipe("vl", "embedded:vl-tiny", method=method, method_settings=settings, data=data, plan=plan)
            for name, (method, settings) in RETRIEVAL.items()
        }
    backbone = f"open_clip:{folder / 'clip.json'}@{folder / 'clip.safetensors'}"
    data = DataSettings(manifest=str(draw_shots(folder / "shots")), task="base_to_new", shots=arguments.shots)
    more = {"device": "cpu", **({"epochs": arguments.epochs} if arguments.epochs else {})}
    options = {"data": data, "head": {"template": arguments.template}}
    return {
        name: Recipe("vl", backbone, method=method, method_settings=settings, plan={**plan, **more}, **options)
        for name, (method, settings, plan) in FEW_SHOT.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("retrieval", "clip", "few_shot"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--rows", help="some of the rows, by ;")
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--template", default="{}")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.part == "clip":
        return train_clip(arguments.work, arguments.steps)
    found: dict[str, list[dict[str, float]]] = {}
    rows = recipes(arguments, arguments.work)
    if arguments.part == "retrieval":
        print("bag of words      ", json.dumps(bag_of_words(next(iter(rows.values())))), flush=True)
    for seed in map(int, arguments.seeds.split(",")):
        for name in arguments.rows.split(";") if arguments.rows else rows:
            recipe = replace(rows[name], seeds=(seed,))
            out = arguments.work / f"{arguments.part}-{name.replace(' ', '-')}-{seed}-{time.time_ns()}"
            found.setdefault(name, []).append(metrics_of(recipe, out))
            last = {k: round(v, 3) for k, v in found[name][-1].items()}
            print(f"seed {seed}  {name:18} {json.dumps(last)}", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print()
    for name, values in found.items():
        mean = {k: float(np.mean([v[k] for v in values])) for k in values[0]}
        spread = {k: float(np.std([v[k] for v in values], ddof=1)) if len(values) > 1 else 0.0 for k in values[0]}
        line = "  ".join(f"{k} {mean[k]:.3f} +- {spread[k]:.3f}" for k in mean if k not in ("trained", "seconds"))
        print(f"{name:18} {mean['trained']:,.0f} trained, {len(values)} seeds: {line}")


if __name__ == "__main__":
    main()
