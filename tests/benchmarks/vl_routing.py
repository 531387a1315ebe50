"""Routing functions on the questions about generated scenes, beside plain LoRA and blind baselines.

python tests/benchmarks/vl_routing.py table|patches [--weights FILE] [--seeds 0,1,2] [--steps 500,1500] [--rows "A;B"]
    [--level 1] [--json FILE]

table: V is the image's CLS token. patches: V is its 16 patches, and what reads them token by token is compared with
plain LoRA on the same prefix and with the pooled mean. LoRA of rank 16 on query and value of both layers of the text
encoder, 8,192 values in every row, and the visual prefix in every row; AdamW 3e-3, batch 128, 6000 pictures of training
scenes, questions drawn anew at each step; accuracy on 4000 questions about pictures of other scenes.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
import conftest  # noqa: E402, F401  finds the packages in a bare clone

from adaptsuite.backbones import bind, load_backbone, record_of  # noqa: E402
from adaptsuite.vl import synthetic  # noqa: E402
from adaptsuite.vl.backbones import encoder_pair  # noqa: E402
from adaptsuite.vl.blind import BLIND  # noqa: E402
from adaptsuite.vl.demo import BLIND_ROW, ROWS, pool, score_row  # noqa: E402

ROUTED = "vl.routed_lora"
TABLE = {
    **ROWS,
    "lora+gate": {"method": ROUTED, "routing": "gate"},
    "lora+xvv": {"method": ROUTED, "routing": "xvv", "reading": "tokens"},
}
ATTENDED = {
    f"{routing}, attended": {"method": ROUTED, "routing": routing, "reading": "attended"}
    for routing in ("mul_expand", "mul", "gate", "add")
}
PATCHES = {
    "lora": {"method": "lora"},
    "mul_expand, pooled": {"method": ROUTED, "routing": "mul_expand"},
    **ATTENDED,
    "mul, pooled": {"method": ROUTED, "routing": "mul"},
    "xvv": {"method": ROUTED, "routing": "xvv", "reading": "tokens"},
    "xvv_relu": {"method": ROUTED, "routing": "xvv_relu", "reading": "tokens"},
}
PATCHES = {name: {**settings, "tokens": "patches"} for name, settings in PATCHES.items()}
PICTURES, TESTS = 6000, 4000


def loaded(weights: Path | None):
    if weights is None:
        return load_backbone("embedded:vl-tiny")
    from safetensors.torch import load

    data = weights.read_bytes()
    pair = encoder_pair(record_of(data))
    pair.load_state_dict(load(data))
    return bind(pair.float().eval(), weights.name)


def summary(values: list[float]) -> str:
    spread = f" +- {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}  ({len(values)} seeds)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("table", "patches"))
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", default="500,1500")
    parser.add_argument("--rows", help="some of the rows, by ;")
    parser.add_argument("--level", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    pair, level = loaded(arguments.weights), arguments.level
    parts, rng = synthetic.split(), np.random.default_rng(0)
    data = pool(pair, rng.choice(parts["train"], PICTURES), level, rng)
    asked = pool(pair, rng.choice(parts["test"], TESTS), level, rng).asked(rng)
    rows = {name: (settings, "") for name, settings in (TABLE if arguments.part == "table" else PATCHES).items()}
    if arguments.part == "table":
        rows |= {name: (ROWS[BLIND_ROW], name) for name in BLIND}
    wanted = arguments.rows.split(";") if arguments.rows else list(rows)
    found: dict[str, dict[str, list[float]]] = {}
    for steps in map(int, arguments.steps.split(",")):
        for seed in map(int, arguments.seeds.split(",")):
            for name in wanted:
                if rows[name][1] and steps != int(arguments.steps.split(",")[0]):
                    continue  # bounds hold at any length
                right, counts, seconds = score_row(pair, data, asked, steps, seed, *rows[name])
                values = found.setdefault(str(steps), {}).setdefault(name, [])
                values.append(float(right.mean()))
                print(f"{steps:5}  seed {seed}  {name:22} {values[-1]:.3f}  {seconds:.0f} s", flush=True)
                if arguments.json:
                    arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"\ntrained in every row, without the head: {counts['trained_without_head']:,}")
    for steps, table in found.items():
        for name, values in table.items():
            print(f"{steps:>5} steps  {name:22} {summary(values)}")
    for name, bound in synthetic.bounds(level).items() if arguments.part == "table" else ():
        limit = bound + 3 * (bound * (1 - bound) / TESTS) ** 0.5
        print(f"{name}: at most {bound:.4f} can be known, {limit:.4f} with three standard errors of {TESTS} questions")


if __name__ == "__main__":
    main()
