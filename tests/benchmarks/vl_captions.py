"""Captions of generated scenes by the embedded pair: routing beside plain LoRA and a baseline that sees no picture.

python tests/benchmarks/vl_captions.py [--seeds 0,1,2] [--steps 600] [--rows "A;B"] [--tests 400] [--beams 1]
    [--tokens cls|patches|all] [--lr 3e-3] [--json FILE]

Both encoders are frozen. LoRA of rank 16 on query and value of all layers of the language model, equally many values in
every row, and V (CLS, if not said otherwise) as a visual prefix in every row; AdamW, batch 64, 6000 pictures of train
scenes with captions drawn anew at each step, the same in every row. Captions of pictures of other scenes are scored by
CIDEr-D and BLEU-4 against 5 captions each, which have the objects in random orders, and by how many of the four objects
(colour, shape, place) they name rightly: a caption in any order may have all of them.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
import conftest  # noqa: E402, F401  finds the packages in a bare clone

from adaptsuite.backbones import load_backbone  # noqa: E402
from adaptsuite.host import attach  # noqa: E402
from adaptsuite.vl import synthetic  # noqa: E402
from adaptsuite.vl.blind import blank_of  # noqa: E402
from adaptsuite.vl.captioner import CaptionModel, CaptionTask  # noqa: E402
from adaptsuite.vl.demo import pool, tokens_of  # noqa: E402
from adaptsuite.vl.scores import caption_scores  # noqa: E402
from adaptsuite.vl.settings import CaptionSettings  # noqa: E402

LORA = {"rank": 16, "alpha": 16.0, "sites": ("language_model:attn.q", "language_model:attn.v")}
ROWS = {"lora": {"method": "lora"}}
ROWS |= {f"lora+{name}": {"method": "vl.routed_lora", "routing": name} for name in ("add", "mul", "mul_expand")}
TEXT_ONLY = "text_only"
PICTURES, BATCH, REFERENCES = 6000, 64, 5


def objects_named(text: str, scene: int) -> float:
    """Share of the scene's objects that a caption names with their colour, shape and place."""
    colours, shapes = (values[0] for values in synthetic.objects(np.array([scene])))
    truth = {
        f"{synthetic.NAMES[c]} {synthetic.SHAPES[s]} {place}"
        for c, s, place in zip(colours, shapes, synthetic.POSITIONS, strict=True)
    }
    return len(truth & {part.strip() for part in text.split(",")}) / len(truth)


def train(pair, data, given, seed: int, settings: dict, blind: bool):
    """(handle of the adapter, the V of every picture where it is blind)."""
    torch.manual_seed(seed)
    model = CaptionModel(pair, CaptionSettings(words=30), given.tokens).eval()
    torch.manual_seed(seed)
    v, steps = tokens_of(data.features, given.tokens), given.steps
    sample = {**model.tokenizer(["red circle"] * 2), "features": v[:2]}
    handle = attach(model, sample=sample, head="head", **{**LORA, **settings})
    blank = blank_of(v) if blind else None
    groups = [{"params": g["params"], "scale": g["lr_scale"]} for g in handle.trainable()]
    optimizer = torch.optim.AdamW(groups, lr=given.lr, weight_decay=0.0)
    rng, task = np.random.default_rng([seed, 3]), CaptionTask()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = given.lr * group["scale"] * min((step + 1) / (0.05 * steps), 1 - step / steps)
        rows = rng.integers(0, len(data.scenes), BATCH)
        features = v[rows] if blank is None else blank.expand(BATCH, -1, -1)
        loss = task.loss(model, {**model.tokenizer(synthetic.captions(data.scenes[rows], rng)), "features": features})
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    model.eval()
    return handle, blank


def score(handle, blank, held, references, beams: int) -> dict:
    model, said = handle.model, []
    for start in range(0, len(held.scenes), 100):
        features = tokens_of(held.features[start : start + 100], model.tokens)
        features = features if blank is None else blank.expand(features.shape)
        said += map(model.tokenizer.decode, model.generate(features=features, num_beams=beams))
    found = caption_scores(said, references, held.scenes.tolist())
    named = [objects_named(text, scene) for text, scene in zip(said, held.scenes, strict=True)]
    return {**{name: found[name]["value"] for name in ("cider_d", "bleu4")}, "objects": float(np.mean(named))}


def summary(values: list[float]) -> str:
    return f"{np.mean(values):.3f}" + (f" +- {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--tests", type=int, default=400)
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--tokens", choices=("cls", "patches", "all"), default="cls")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--rows", help="some of the rows, by ;")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    pair, parts, rng = load_backbone("embedded:vl-tiny-decoder"), synthetic.split(), np.random.default_rng(0)
    data = pool(pair, rng.choice(parts["train"], PICTURES), 1, rng)
    held = pool(pair, rng.choice(parts["test"], given.tests, replace=False), 1, rng)
    references = list(zip(*[synthetic.captions(held.scenes, rng) for _ in range(REFERENCES)], strict=True))
    rows = {name: (settings, False) for name, settings in ROWS.items()}
    rows[TEXT_ONLY] = (ROWS["lora+mul_expand"], True)
    found: dict[str, list[dict]] = {}
    for seed in map(int, given.seeds.split(",")):
        for name in given.rows.split(";") if given.rows else rows:
            start = time.perf_counter()
            handle, blank = train(pair, data, given, seed, *rows[name])
            one = {
                **score(handle, blank, held, references, given.beams),
                "trained": handle.parameters_count()["trained"],
            }
            handle.detach()
            found.setdefault(name, []).append(one)
            shown = "  ".join(f"{key} {value:.3f}" for key, value in one.items() if key != "trained")
            print(
                f"seed {seed}  {name:16} {one['trained']:>7,} trained  {shown}  {time.perf_counter() - start:.0f} s",
                flush=True,
            )
            if given.json:
                given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"\n{given.steps} steps, {given.tests} pictures, {given.beams} beams")
    for name, ones in found.items():
        print(
            f"{name:16} "
            + "  ".join(f"{key} {summary([o[key] for o in ones])}" for key in ("cider_d", "bleu4", "objects"))
        )


if __name__ == "__main__":
    main()
