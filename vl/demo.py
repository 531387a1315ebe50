"""`make demo` for images and text: questions about generated scenes, plain LoRA beside routing, and blind baselines.

Both encoders are frozen and have never met. Every row of the table trains the same number of values, has the image as
a prefix of its words, and sees the same questions in the same order; only what happens in the bottleneck differs.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptsuite.atomic import write_file
from adaptsuite.backbones import load_backbone
from adaptsuite.demo import exhibit
from adaptsuite.host import Handle, attach
from adaptsuite.vl import synthetic
from adaptsuite.vl.blind import BLIND, blank_of
from adaptsuite.vl.paired import AnswerSettings, AnswerTask, PairedModel
from adaptsuite.vl.scores import mean_interval

BACKBONE = "embedded:vl-tiny"
SITES = ("text_encoder:attn.q", "text_encoder:attn.v")
LORA = {"rank": 16, "alpha": 16.0, "sites": SITES}
ROUTINGS = ("add", "mul", "mul_expand")
ROWS: dict[str, dict[str, Any]] = {"lora": {"method": "lora"}}
ROWS |= {f"lora+{name}": {"method": "vl.routed_lora", "routing": name} for name in ROUTINGS}
BLIND_ROW = ROUTED = "lora+mul_expand"  # what the blind baselines train, and what the page shows beside plain LoRA


@dataclass(frozen=True)
class Pool:
    """Scenes of one part with one picture each, as the image encoder sees it."""

    level: int
    scenes: np.ndarray  # (N,)
    pictures: np.ndarray  # (N, 3, 32, 32) uint8
    features: Tensor  # (N, 1 + patches, D)

    def asked(self, rng: np.random.Generator, rows: np.ndarray | None = None) -> "Questions":
        """One drawn question about each of the rows."""
        rows = np.arange(len(self.scenes)) if rows is None else rows
        asked = synthetic.ask(self.scenes[rows], self.level, rng)
        return Questions(self, rows, asked.question, asked.answer)


@dataclass(frozen=True)
class Questions:
    """N questions about rows of a pool."""

    pool: Pool
    rows: np.ndarray  # (N,)
    question: np.ndarray
    answer: np.ndarray

    def batch(self, model: PairedModel, at: slice = slice(None), blind: str = "", blank: Tensor | None = None) -> dict:
        """What `AnswerTask` takes; blind: "text_only" or "image_only"."""
        text = _texts(model, self.pool.level)
        number = torch.from_numpy(self.question[at]) if blind != "image_only" else torch.tensor(-1)
        ids, mask = (text[key][number].expand(len(self.rows[at]), -1) for key in ("input_ids", "attention_mask"))
        longest = int(mask.sum(1).max())
        features = tokens_of(self.pool.features, model.tokens)[self.rows[at]]
        if blind == "text_only":
            features = blank.expand(features.shape)
        target = torch.eye(len(synthetic.ANSWERS))[torch.from_numpy(self.answer[at])]
        return {
            "features": features,
            "input_ids": ids[:, :longest],
            "attention_mask": mask[:, :longest],
            "target": target,
        }


def tokens_of(features: Tensor, tokens: str) -> Tensor:
    """V of all tokens (N, 1 + patches, D): cls, patches or all."""
    return {"cls": features[:, :1], "patches": features[:, 1:], "all": features}[tokens]


def _texts(model: PairedModel, level: int) -> dict[str, Tensor]:
    """Every question of a level, and an empty one behind them."""
    if getattr(model, "asked", None) is None or model.asked[0] != level:
        texts = [text for _, text in synthetic.questions(level)]
        model.asked = (level, model.tokenizer([*texts, ""]))
    return model.asked[1]


@torch.no_grad()
def pool(pair: nn.Module, scenes: np.ndarray, level: int, rng: np.random.Generator, size: int = 500) -> Pool:
    pictures = [synthetic.render(scenes[start : start + size], rng) for start in range(0, len(scenes), size)]
    features = torch.cat([pair.encode_image(torch.from_numpy(part)) for part in pictures])
    return Pool(level, scenes, np.concatenate(pictures), features)


def train(
    pair: nn.Module,
    data: Pool,
    steps: int,
    seed: int,
    *,
    method: str,
    tokens: str = "cls",
    blind: str = "",
    lr: float = 3e-3,
    batch: int = 128,
    settings: AnswerSettings | None = None,
    **changes: Any,
) -> tuple[Handle, Tensor]:
    """An adapter trained for so many steps of freshly drawn questions, and the mean V of the pool.

    AdamW, 5 % warm-up, linear decay. Equal seeds give equal starts, questions and order in every row.
    """
    torch.manual_seed(seed)
    model = PairedModel(pair, len(synthetic.ANSWERS), settings, tokens).eval()
    torch.manual_seed(seed)
    sample = data.asked(np.random.default_rng(0), np.arange(2)).batch(model)
    sample.pop("target")
    handle = attach(model, method, sample=sample, head="head", **{**LORA, **changes})
    blank = blank_of(tokens_of(data.features, tokens))
    task, rng = AnswerTask("ce"), np.random.default_rng([seed, 3])
    groups = [{"params": g["params"], "scale": g["lr_scale"]} for g in handle.trainable()]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
    model.train()
    for step in range(steps):
        rate = lr * min((step + 1) / (0.05 * steps), 1 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        rows = rng.integers(0, len(data.scenes), batch)
        loss = task.loss(model, data.asked(rng, rows).batch(model, blind=blind, blank=blank))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    model.eval()
    return handle, blank


@torch.no_grad()
def answers(handle: Handle, asked: Questions, blind: str = "", blank: Tensor | None = None, size: int = 500):
    """(N,) the number of the answer in `synthetic.ANSWERS` to each question."""
    found = []
    for start in range(0, len(asked.rows), size):
        batch = asked.batch(handle.model, slice(start, start + size), blind, blank)
        found.append(AnswerTask().predict(handle.model, batch).argmax(1).numpy())
    return np.concatenate(found)


def answer_row(
    pair: nn.Module, data: Pool, asked: Questions, steps: int, seed: int, settings: Mapping[str, Any], blind: str = ""
) -> tuple[np.ndarray, dict[str, int], float]:
    """(N,) answers of one row of a table, its parameter counts, and seconds; the pair is as before."""
    start = time.perf_counter()
    handle, blank = train(pair, data, steps, seed, blind=blind, **settings)
    said, counts = answers(handle, asked, blind, blank), handle.parameters_count()
    handle.detach()
    return said, counts, time.perf_counter() - start


def score_row(pair: nn.Module, data: Pool, asked: Questions, *row: Any) -> tuple[np.ndarray, dict[str, int], float]:
    """The same with (N,) 1 where the answer is right."""
    said, *facts = answer_row(pair, data, asked, *row)
    return (said == asked.answer).astype(float), *facts


def run(
    out: str | Path,
    steps: int = 500,
    pictures: int = 6000,
    tests: int = 4000,
    level: int = 1,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> dict[str, Any]:
    """Writes OUT/vl/table.json and the report beside it; returns the table: {"table": {row: {"value", "ci"}}, "bounds",
    "params", ...}."""
    from adaptsuite.vl.demo_page import write_page

    start = time.perf_counter()
    pair = load_backbone(BACKBONE)
    parts, rng = synthetic.split(), np.random.default_rng(0)
    data = pool(pair, rng.choice(parts["train"], pictures), level, rng)
    held = pool(pair, rng.choice(parts["test"], tests), level, rng)
    asked, bounds = held.asked(rng), synthetic.bounds(level)
    say(f"data      {pictures} generated scenes to train on, {tests} of others to test; both encoders are frozen")
    say(f"\n{'row':<16} {'trained':>8} {'with head':>10}  accuracy [95 % of scenes]   seconds")
    table, counts, said = {}, {}, {}
    rows = {name: (settings, "") for name, settings in ROWS.items()}
    rows |= {name: (ROWS[BLIND_ROW], name) for name in BLIND}
    for name, (settings, blind) in rows.items():
        said[name], counts[name], seconds = answer_row(pair, data, asked, steps, 0, settings, blind)
        table[name] = mean_interval((said[name] == asked.answer).astype(float), held.scenes.tolist())
        low, high = table[name]["ci"]
        note = f"   at most {bounds[name]:.3f} can be known blind" if name in bounds else ""
        say(
            f"{name:<16} {counts[name]['trained_without_head']:>8,} {counts[name]['trained']:>10,}  "
            f"{table[name]['value']:.3f} [{low:.3f}, {high:.3f}]   {seconds:.0f}{note}"
        )
    result = {
        "table": table,
        "bounds": bounds,
        "params": counts,
        "steps": steps,
        "level": level,
        "seconds": round(time.perf_counter() - start, 1),
    }
    folder = Path(out) / "vl"
    path = write_file(folder / "table.json", json.dumps(result, indent=1) + "\n")
    report = write_page(folder, result, asked, {"lora": said["lora"], ROUTED: said[ROUTED]})
    say(f"\nreport    {report}")
    shown = exhibit(
        folder,
        "Questions about scenes of four shapes: routing lets the image act inside LoRA",
        "accuracy",
        table[ROUTED],
        f"blind {bounds['text_only']:.3f}",
        list(held.pictures[:4].transpose(0, 2, 3, 1)),
        "adapt vl train --data QUESTIONS.jsonl --backbone embedded:vl-tiny --method vl.routed_lora --out runs/mine",
    )
    return {**result, "file": str(path), "report": str(report), **shown}
