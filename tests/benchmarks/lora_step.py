"""Row 1: LoRA on the fused qkv of ViT-B/16 at 224, against full fine-tuning in FLOPs and against peft in time.

    python tests/benchmarks/lora_step.py [--turns 9] [--batch 1] [--threads 1]

FLOPs are exact, of forward and backward with attention counted. A step is forward, backward and AdamW; both libraries
have the same weights and take turns in one process, and the ratio is the median over turns with its quartiles: the
machine's own speed and load cancel.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from adaptsuite import attach, budget
from adaptsuite.costs import Turns, ratio, turns

RANK, ALPHA = 8, 16.0
QKV = {"sites": ("attn.qkv",)}
PEFT_NAMES = {"attn.qkv": "qkv", "attn.out": "attn.proj", "mlp.in": "fc1", "mlp.out": "fc2"}


def backbone() -> nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model("vit_base_patch16_224", num_classes=0)


def pair(sites: tuple[str, ...], model: nn.Module | None = None) -> tuple[nn.Module, nn.Module]:
    """(ours, peft's) with the same LoRA, moved away from its zero start."""
    import peft

    names = [PEFT_NAMES[site] for site in sites]
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names)
    ours, theirs = model or backbone(), peft.get_peft_model(backbone(), config).base_model.model
    handle = attach(ours, "lora", rank=RANK, alpha=ALPHA, sites=sites)
    generator, modules = torch.Generator().manual_seed(1), dict(theirs.named_modules())
    with torch.no_grad():
        for site in handle.sites:
            branch, twin = handle.adapter.branches[site.key], modules[site.path]
            for p, q in ((branch.down, twin.lora_A["default"].weight), (branch.up, twin.lora_B["default"].weight)):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
                q.copy_(p)
    return ours.train(), theirs.eval()  # no dropout in either


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def stepper(model: nn.Module, image: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(trained(model), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        model(image).square().mean().backward()
        optimizer.step()

    return step


def relative(found: Turns, a: str, b: str) -> tuple[float, list[float]]:
    """Median of a over b, and its quartiles."""
    of = ratio(found, a, b)
    return of["value"], of["quartiles"]


def row(name: str, value: float, bar: float, peer: str, spread: list[float] | None = None) -> dict:
    return {"row": name, "value": value, "bar": bar, "met": value <= bar, "peer": peer, "spread": spread}


def rows(count: int = 9, batch: int = 1) -> list[dict]:
    import peft

    with torch.device("meta"):
        model = backbone()
    full, lora = budget(model, "full"), budget(model, "lora", rank=RANK, **QKV)
    found = [row("1 LoRA FLOPs", lora.training_flops / full.training_flops, 0.68, "full fine-tuning")]
    image = torch.randn(batch, 3, 224, 224)
    ours, theirs = (stepper(m, image) for m in pair(QKV["sites"]))
    value, spread = relative(turns({"ours": ours, "peft": theirs}, count), "ours", "peft")
    return [*found, row("1 LoRA step", value, 1.02, f"peft {peft.__version__}", spread)]


def arguments(text: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    for name, value in (("turns", 9), ("batch", 1), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def show(found: list[dict]) -> None:
    for r in found:
        spread = f"  [{r['spread'][0]:.3f}, {r['spread'][1]:.3f}]" if r["spread"] else ""
        met = "met" if r["met"] else "missed"
        print(f"{r['row']:<28} {r['value']:<8.3g} bar {r['bar']:<7g} {met:<7} against {r['peer']}{spread}")


if __name__ == "__main__":
    options = arguments(__doc__)
    show(rows(options.turns, options.batch))
