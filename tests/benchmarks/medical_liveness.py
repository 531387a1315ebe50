"""Which methods live on which medical backbones, and the published adapters that do not.

    python tests/benchmarks/medical_liveness.py [--pixels 56] [--json FILE]

Random weights, no download; pixels change the time, not what trains. First a matrix: every trained tensor gets a
gradient, the output in eval changes, the start is the backbone, train = eval = merged to 1e-5. Then published
configurations, rebuilt as their code has them: each must be refused with its reason, and the adapter that was meant
must be alive here, with as many values as are printed.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import conftest  # noqa: E402, F401  finds the packages in a bare clone

from adaptsuite.host import attach
from adaptsuite.liveness import verify_module
from adaptsuite.medical.presets import ATTENTION, FETALCLIP, LINEAR, PRESETS
from adaptsuite.verify import AGREE, IDENTITY, verify

COLUMNS = ("values", "alive", "exempt", "start", "train", "merged")  # tensors alive and exempt; differences
METHODS = {
    "lora": ("lora", {"sites": LINEAR}),
    "lora attn": ("lora", {"sites": ATTENTION}),
    "bottleneck": ("bottleneck", {}),
    "bitfit": ("bitfit", {}),
    "film": ("film", {}),
    "full": ("full", {}),
}


def fetalclip(pixels: int) -> nn.Module:
    """The image tower of FetalCLIP's configuration; the text tower is as small as can be."""
    from open_clip.model import CLIP

    text = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
    return CLIP(FETALCLIP["embed_dim"], {**FETALCLIP["vision_cfg"], "image_size": pixels}, text).visual


def dinov2(pixels: int) -> nn.Module:
    import timm

    return timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=pixels)


def backbones(pixels: int) -> Iterator[tuple[str, Callable[[], nn.Module], Tensor]]:
    from monai.networks.nets import UNETR, MILModel, SwinUNETR, ViT

    image = torch.randn(1, 3, pixels, pixels)
    encoder = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    yield "open_clip FetalCLIP", lambda: fetalclip(pixels), image
    yield "timm DINOv2 ViT-S/14", lambda: dinov2(pixels), image
    yield "MONAI SwinUNETR", lambda: SwinUNETR(1, 2, feature_size=24), torch.randn(1, 1, 64, 32, 32)
    yield (
        "MONAI ViT",
        lambda: ViT(1, (32,) * 3, (8,) * 3, 96, 192, 4, 4, classification=True),
        torch.randn(2, 1, 32, 32, 32),
    )
    yield "MONAI UNETR", lambda: UNETR(1, 2, (32,) * 3, 8, 96, 192, 4), torch.randn(2, 1, 32, 32, 32)
    yield "nn.TransformerEncoder", lambda: nn.TransformerEncoder(encoder, 4), torch.randn(2, 9, 64)
    yield "MONAI MILModel", lambda: MILModel(2, "att_trans", False, "resnet18"), torch.randn(2, 5, 3, 64, 64)


def matrix(pixels: int) -> list[dict[str, Any]]:
    columns = " ".join(f"{name:>{width}}" for name, width in zip(COLUMNS, (12, 6, 6, 8, 8, 8), strict=True))
    print(f"{'backbone':<22}{'method':<12}{columns}")
    rows = []
    for name, build, x in backbones(pixels):
        torch.manual_seed(0)
        model = build().eval()
        for label, (method, settings) in METHODS.items():
            start = time.perf_counter()
            handle = attach(model, method, sample=(x,), **settings)
            found = verify(handle, (x,), fresh=True)
            states = [r["state"].partition(":")[0] for r in found.rows]
            row = {
                "backbone": name,
                "method": label,
                "ok": found.ok and found.changes_output,
                "values": handle.parameters_count()["trained"],
                "alive_values": sum(r["values"] for r in found.rows if r["state"] == "alive"),
                **{state: states.count(state) for state in ("alive", "exempt", "dead")},
                **{key: getattr(found, key) for key in ("identity", "train_eval", "merged", "problems")},
                "shadow": len(found.shadow_sites),
                "seconds": round(time.perf_counter() - start, 1),
            }
            rows.append(row)
            gaps = " ".join(
                f"{'–' if v is None else f'{v:.0e}':>8}" for v in (found.identity, found.train_eval, found.merged)
            )
            verdict = "" if row["ok"] else f"  DEAD {found.problems}"
            print(
                f"{name:<22}{label:<12}{row['values']:>12,} {row['alive']:>6} {row['exempt']:>6} {gaps}{verdict}",
                flush=True,
            )
            handle.detach()
    return rows


# ---- published configurations, as their own code builds them


class Frozen(nn.Module):
    """An encoder that is run under no_grad below a head that trains."""

    def __init__(self, encoder: nn.Module, width: int):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.encoder(x)
        return self.head(features)


def in_peft(model: nn.Module, **settings: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(**settings))


def published(pixels: int) -> Iterator[tuple[str, nn.Module, Tensor]]:
    image = torch.randn(1, 3, pixels, pixels)
    iqa = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["c_fc", "c_proj", "out_proj"]}
    yield "fetalclip-iqa-cls", in_peft(fetalclip(pixels), **iqa), image
    yield "fetalclip-iqa-seg", Frozen(in_peft(fetalclip(pixels), **iqa), FETALCLIP["embed_dim"]), image
    radiology = {"r": 48, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["qkv", "fc1", "fc2"]}
    yield "dinov2-radiology-lora", Frozen(in_peft(dinov2(pixels), **radiology), 384), image
    biases = dinov2(pixels)
    for n, p in biases.named_parameters():
        p.requires_grad_(n.endswith("bias"))
    yield "dinov2-radiology-bitfit", Frozen(biases, 384), image
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 4)
    mlp = {"r": 8, "target_modules": ["linear1", "linear2"]}
    yield "peft-transformer-encoder-layer", in_peft(encoder, **mlp), torch.randn(2, 9, 64)


def dead(pixels: int) -> list[dict[str, Any]]:
    rows = []
    for name, model, x in published(pixels):
        found = verify_module(model, (x,))
        values = {state: sum(r["values"] for r in found.rows if r["state"] == state) for state in ("alive", "dead")}
        rows.append({"name": name, "refused": not found.ok, **values, "problems": found.problems})
        verdict = "NOT REFUSED" if found.ok else "refused"
        print(f"{name}: {verdict}, {values['dead']:,} of {sum(values.values()):,} dead")
        for problem in found.problems:
            print(f"    {problem}", flush=True)
        del model
        if name in PRESETS:
            rows[-1]["here"] = alive(name, pixels, x)
    return rows


def alive(name: str, pixels: int, x: Tensor) -> dict[str, Any]:
    """The adapter that was meant, on the same backbone by this package."""
    preset = PRESETS[name]
    settings = {**preset.settings, **({"dropout": 0.0} if "dropout" in preset.settings else {})}
    torch.manual_seed(0)
    model = (fetalclip if name.startswith("fetalclip") else dinov2)(pixels).eval()
    handle = attach(model, preset.method, sample=(x,), **settings)
    found, count = verify(handle, (x,), fresh=True), handle.parameters_count()["trained"]
    living = sum(r["values"] for r in found.rows if r["state"] == "alive")
    print(
        f"    here: {count:,} values, {living:,} alive, {len(found.shadow_sites)} sites read without a call", flush=True
    )
    return {"values": count, "alive": living, "ok": found.ok}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels", type=int, default=56, help="side of the image towers' input")
    parser.add_argument("--json", help="file of all rows")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = {"matrix": matrix(arguments.pixels), "published": dead(arguments.pixels)}
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=1)
    bad = [r for r in rows["matrix"] if not r["ok"] or r["values"] != r["alive_values"] and not r["exempt"]]
    bad += [
        r
        for r in rows["published"]
        if not r["refused"] or r.get("here", {}).get("values") != r.get("here", {}).get("alive")
    ]
    limits = f"start {IDENTITY:.0e}, train = eval = merged {AGREE:.0e}"
    print(f"{len(rows['matrix'])} pairs, {len(rows['published'])} published; {len(bad)} against expectation ({limits})")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
