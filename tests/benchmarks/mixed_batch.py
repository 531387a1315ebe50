"""Many LoRA adapters in one batch: here against peft's `adapter_names`, and 256 adapters against 16.

    python tests/benchmarks/mixed_batch.py [--turns 9] [--threads 1]

ViT-S/16 at 224, rank 8 on the fused qkv, a batch of 16 rows of as many adapters, no gradient. Both have the
same weights. Variants take turns in one process, and a ratio is the median over turns with its quartiles: the machine's
own speed and load cancel.
"""

import argparse
import copy
import statistics

import torch
from lora_step import relative, row, show
from torch import Tensor, nn

from adaptsuite import attach, get_handle
from adaptsuite.costs import turns

BATCH, RANK = 16, 8


def backbone() -> nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model("vit_small_patch16_224").eval()


def ours(num: int) -> nn.Module:
    model = backbone()
    attach(model, "lora", "a0", rank=RANK, alpha=RANK, sites="attn.qkv")
    for i in range(1, num):  # as attach would, which looks the model through each time
        model.adapter_bank.adapters[f"a{i}"] = copy.deepcopy(model.adapter_bank.adapters["a0"])
    with torch.no_grad():
        for i in range(num):
            generator = torch.Generator().manual_seed(i)
            for p in get_handle(model, f"a{i}").trained().values():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
    return model


def pefts(model: nn.Module, num: int) -> nn.Module:
    """peft on the same backbone, with the values of our adapters."""
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["qkv"])
    found = peft.get_peft_model(backbone(), config, "a0")
    for i in range(1, num):
        found.add_adapter(f"a{i}", config)
    modules = dict(found.base_model.model.named_modules())
    with torch.no_grad():
        for i in range(num):
            handle = get_handle(model, f"a{i}")
            for site in handle.sites:
                branch, module = handle.adapter.branches[site.key], modules[site.path]
                module.lora_A[f"a{i}"].weight.copy_(branch.down)
                module.lora_B[f"a{i}"].weight.copy_(branch.up)
    return found.eval()


@torch.no_grad()
def rows(count: int = 9) -> list[dict]:
    """Row 6: time against peft at 16 adapters, 256 against 16, and the difference to one by one."""
    x = torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    few, many = ours(16), ours(256)
    other = pefts(few, 16)
    names, index = [f"a{i}" for i in range(BATCH)], torch.arange(BATCH)
    spread = torch.arange(BATCH) * (256 // BATCH)
    few_handle = get_handle(few, "a0")

    def run(model: nn.Module, rows: Tensor) -> Tensor:
        get_handle(model, "a0").activate(per_sample=rows)
        return model(x)

    def one_by_one() -> Tensor:
        found = []
        for i in range(BATCH):
            few_handle.activate(f"a{i}")
            found.append(few(x[i : i + 1]))
        return torch.cat(found)

    alone, mixed, theirs = one_by_one(), run(few, index), other(x, adapter_names=names)
    scale = float(alone.abs().max())
    differences = [float((t - alone).abs().max()) / scale for t in (mixed, theirs)]
    variants = {
        "ours 16": lambda: run(few, index),
        "ours 256": lambda: run(many, spread),
        "peft 16": lambda: other(x, adapter_names=names),
    }
    found = turns(variants, count)
    values = {name: statistics.median(found[name]) for name in variants}
    against_peft, peft_spread = relative(found, "ours 16", "peft 16")
    growth, growth_spread = relative(found, "ours 256", "ours 16")
    ms = {name: round(value * 1e3, 1) for name, value in values.items()}
    return [
        row("6 mixed batch of 16 adapters, time / peft", against_peft, 1.0, {"peft_ms": ms["peft 16"]}, peft_spread),
        row("6 mixed batch, 256 adapters / 16", growth, 1.3, {"ours_16_ms": ms["ours 16"]}, growth_spread),
        row("6 mixed batch, difference to one by one", differences[0], 1e-5, {"peft": differences[1]}, None),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"torch {torch.__version__}, {options.threads} thread(s), {options.turns} turns, B={BATCH}, ViT-S/16, r={RANK}"
    )
    show(rows(options.turns))


if __name__ == "__main__":
    main()
