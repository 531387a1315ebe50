"""LoRA here against LoRA in peft, on the same weights: outputs, gradients, trained parameters and step times.

    python tests/benchmarks/peft_parity.py [--steps 30] [--threads 1]

Steps alternate in one process, and the ratio is the median over pairs of neighbours: the machine's own speed and load
cancel. One step is forward, backward and AdamW on a batch of 4.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import peft
import torch
from torch import nn

from adaptsuite.host import attach
from adaptsuite.peft_bridge import to_peft

RANK, ALPHA = 6, 12.0
WIDTH = dict(hidden_size=192, num_hidden_layers=6, num_attention_heads=3, intermediate_size=768)


def ast() -> tuple[nn.Module, dict]:
    from transformers import ASTConfig, ASTModel

    torch.manual_seed(0)
    model = ASTModel(ASTConfig(**WIDTH, max_length=256, num_mel_bins=128))
    return model, {"input_values": torch.randn(4, 256, 128)}


def vit() -> tuple[nn.Module, dict]:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**WIDTH, image_size=160, patch_size=16))
    return model, {"pixel_values": torch.randn(4, 3, 160, 160)}


def pair(build, sites: tuple[str, ...]) -> tuple[nn.Module, dict, nn.Module, dict, dict]:
    """Our host and its LoRA parameters, peft's model and its, by one name for both; and the input."""
    model, inputs = build()
    handle = attach(model, "lora", rank=RANK, alpha=ALPHA, sites=sites)
    with torch.no_grad():
        for p in handle.trained().values():
            p.add_(torch.randn_like(p), alpha=0.02)
    with tempfile.TemporaryDirectory() as folder:
        twin = peft.PeftModel.from_pretrained(build()[0], to_peft(handle, Path(folder) / "peft"), is_trainable=True)
    ours, theirs = {}, {}
    for name, p in handle.trained().items():
        _, key, part = name.split(".")
        ours[f"{key.replace('/', '.')}.{part}"] = p
    for name, p in twin.named_parameters():
        if p.requires_grad:
            name = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            theirs[name.replace("lora_A", "down").replace("lora_B", "up")] = p
    return model, ours, twin.base_model.model, theirs, inputs


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict) -> float:
    start = time.perf_counter()
    optimizer.zero_grad()
    model(**inputs).last_hidden_state.square().mean().backward()
    optimizer.step()
    return time.perf_counter() - start


def compare(name: str, build, sites: tuple[str, ...], steps: int) -> None:
    model, ours, twin, theirs, inputs = pair(build, sites)
    model.eval(), twin.eval()
    with torch.no_grad():
        gap = float((model(**inputs).last_hidden_state - twin(**inputs).last_hidden_state).abs().max())
    for m in (model, twin):
        m(**inputs).last_hidden_state.square().mean().backward()
    assert ours.keys() == theirs.keys()
    gradient = max(float((p.grad - theirs[k].grad).abs().max() / p.grad.abs().max()) for k, p in ours.items())
    counts = [sum(p.numel() for p in params.values()) for params in (ours, theirs)]
    runs = [(m, torch.optim.AdamW(p.values(), lr=1e-4)) for m, p in ((model, ours), (twin, theirs))]
    for m, optimizer in runs:
        m.train()
        step(m, optimizer, inputs)
    times = []
    for number in range(steps):
        order = runs if number % 2 else runs[::-1]
        pair_times = [step(m, optimizer, inputs) for m, optimizer in order]
        times.append(pair_times if number % 2 else pair_times[::-1])
    mine, peers = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
    low, ratio, high = statistics.quantiles([a / b for a, b in times], n=4)
    row = f"{name:<14} {gap:>8.1e} {gradient:>9.1e} {counts[0]:>10,} {counts[1]:>10,}"
    print(f"{row} {mine:>7.1f} {peers:>7.1f} {ratio:>6.3f}  {low:.3f}-{high:.3f}", flush=True)


def ast_base_counts() -> tuple[int, int]:
    """Trained by LoRA r=6 on q and v of AST-base, ours and peft's; shapes alone, on the meta device."""
    from transformers import ASTConfig, ASTModel

    with torch.device("meta"):
        ours, theirs = ASTModel(ASTConfig()), ASTModel(ASTConfig())
    handle = attach(ours, "lora", rank=RANK)
    twin = peft.get_peft_model(theirs, peft.LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"]))
    return handle.parameters_count()["trained"], sum(p.numel() for p in twin.parameters() if p.requires_grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"torch {torch.__version__}, peft {peft.__version__}, {options.threads} thread(s), {options.steps} steps each"
    )
    print("LoRA r=6, d=192, 6 layers; gradient: largest relative difference; ratio ours / peft with quartiles")
    print(f"{'host':<14} {'output':>8} {'gradient':>9} {'trained':>10} {'peft':>10} {'ms':>7} {'peft':>7} {'ratio':>6}")
    every = ("attn.qkv", "attn.out", "mlp.in", "mlp.out")
    for name, build, sites in (
        ("AST q,v", ast, ("attn.q", "attn.v")),
        ("AST all", ast, every),
        ("ViT q,v", vit, ("attn.q", "attn.v")),
        ("ViT all", vit, every),
    ):
        compare(name, build, sites, options.steps)
    print("AST-base r=6 q,v trained: ours {:,}, peft {:,}".format(*ast_base_counts()))


if __name__ == "__main__":
    main()
