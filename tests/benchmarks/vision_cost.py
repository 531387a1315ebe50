"""What a step costs: exact FLOPs and bytes of vision methods, measured time and memory beside full fine-tuning.

    python tests/benchmarks/vision_cost.py [--pairs 9] [--batch 4] [--threads 1] [--exact-only]

First the exact counts on ViT-B/16 at 224 and 448 (a LoRA on q and v is what inter-layer down-sampling is held against).
Then one training step on ViT-S/16 at 224: all methods take their turns in one process, round by round, and the ratio to
full fine-tuning is the median over rounds, with quartiles. Bytes are what autograd has saved at the end of the forward.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
import conftest  # noqa: E402, F401  finds the packages in a bare clone

from adaptsuite import attach, budget  # noqa: E402

EXACT = (
    ("linear", {}),
    ("lora", {}),
    ("parallel_adapter", {}),
    ("convpass", {}),
    ("vpt", {"tokens": 100}),
    ("kadaptation", {}),
    ("vision.ila", {}),
    ("vision.ila_plus", {}),
    ("vision.ila_plus_plus", {}),
    ("vision.ila", {"train_cls": True}),
    ("full", {}),
)
MEASURED = ("full", "linear", "lora", "parallel_adapter", "vpt", "vision.ila", "vision.ila_plus_plus")


def vit(name: str, size: int, device: str = "cpu"):
    import timm

    with torch.device(device):
        return timm.create_model(name, num_classes=100, img_size=size)


def exact(size: int) -> None:
    print(f"\nViT-B/16 at {size}, per image, head of 100 classes")
    columns = f"{'GMAC':>8} {'step GFLOP':>11} {'of full':>8} {'of LoRA':>8} {'saved MB':>9}"
    print(f"{'method':<36} {'trained, no head':>16} {columns}")
    rows = {}
    for method, settings in EXACT:
        model = vit("vit_base_patch16_224", size, "meta")
        found = budget(model, method, torch.empty(1, 3, size, size, device="meta"), head="head", **settings)
        rows[method + "".join(f":{k}={v}" for k, v in settings.items())] = found
    full, lora = rows["full"].training_flops, rows["lora"].training_flops
    for name, b in rows.items():
        print(
            f"{name:<36} {b.params['trained_without_head']:>16,} {b.macs / 1e9:>8.3f} {b.training_flops / 1e9:>11.2f} "
            f"{b.training_flops / full:>8.3f} {b.training_flops / lora:>8.3f} {b.activation_bytes / 1e6:>9.1f}"
        )


def rows() -> list[dict]:
    """Inter-layer down-sampling at 224 against LoRA at full tokens, in training FLOPs: exact."""
    image = torch.empty(1, 3, 224, 224, device="meta")
    ila, lora = (
        budget(vit("vit_base_patch16_224", 224, "meta"), method, image, head="head").training_flops
        for method in ("vision.ila", "lora")
    )
    value = ila / lora
    return [
        {"row": "5 down-sampling FLOPs", "value": value, "bar": 0.6, "met": value <= 0.6, "peer": "LoRA, all tokens"}
    ]


def saved_bytes(model, image) -> int:
    """What autograd keeps of one forward: each storage once, parameters left out."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    seen = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = (storage, storage.nbytes())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(image)
    del out
    return sum(size for _, size in seen.values())


def step(model, optimizer, image, label) -> float:
    start = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    torch.nn.functional.cross_entropy(model(image), label).backward()
    optimizer.step()
    return time.perf_counter() - start


def measured(pairs: int, batch: int) -> None:
    image, label = torch.randn(batch, 3, 224, 224), torch.randint(0, 100, (batch,))
    runs = {}
    for method in MEASURED:
        torch.manual_seed(0)
        model = vit("vit_small_patch16_224", 224)
        handle = attach(model, method, head=() if method == "full" else "head")
        counted = budget(model, None, image)
        model.train()
        optimizer = torch.optim.AdamW([p for g in handle.trainable() for p in g["params"]], lr=1e-4)
        runs[method] = (model, optimizer, saved_bytes(model, image), counted)
        step(model, optimizer, image, label)
    times = {method: [] for method in runs}
    for turn in range(pairs):
        for method in list(runs) if turn % 2 else reversed(list(runs)):
            times[method].append(step(*runs[method][:2], image, label))
    full_bytes, full_flops = runs["full"][2], runs["full"][3].training_flops
    print(f"\nViT-S/16 at 224, batch {batch}, {pairs} rounds, {torch.get_num_threads()} thread(s): relative to full")
    print(f"{'method':<24} {'FLOPs':>7} {'bytes':>7} {'time':>7}  quartiles      saved MB")
    for method, (_, _, saved, counted) in runs.items():
        ratios = [a / b for a, b in zip(times[method], times["full"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if pairs > 1 else [ratios[0]] * 3
        print(
            f"{method:<24} {counted.training_flops / full_flops:>7.3f} {saved / full_bytes:>7.3f} {middle:>7.3f}  "
            f"{low:.3f}-{high:.3f}  {saved / 1e6:>10.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--exact-only", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for size in (224, 448):
        exact(size)
    if not options.exact_only:
        measured(options.pairs, options.batch)


if __name__ == "__main__":
    main()
