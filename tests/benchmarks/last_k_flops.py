"""Row 3: training FLOPs and activation bytes of LoRA in the last k blocks of ViT-S/16, against the closed formula.

    python tests/benchmarks/last_k_flops.py

Of frozen blocks, F_lin and F_att the FLOPs of a block's linear layers and of its attention products: F below the first
adapted block; from there 2 F_lin + 3 F_att, as weights get no gradient; 3 of the adapters and the head, 1 of the
embedding. What the formula leaves out is that the first adapted block's own qkv and `down` need no gradient of their
input; with that the count is exact, as tests/suite/test_last_k.py holds.
"""

from lora_step import RANK, row, show

from adaptsuite import budget

TOKENS, DIM, DEPTH, CLASSES = 197, 384, 12, 10


def formula(k: int) -> float:
    """FLOPs of one step on one image with LoRA on qkv in the last k blocks and a trained head."""
    linear, attention = 12 * TOKENS * DIM**2, 2 * TOKENS**2 * DIM
    adapter = 4 * TOKENS * DIM * RANK
    passed = k * (2 * linear + 3 * attention + 3 * adapter)
    embed, head = 196 * 768 * DIM, 3 * DIM * CLASSES
    return 2 * ((DEPTH - k) * (linear + attention) + passed + embed + head)


def table() -> list[dict]:
    """For every k: FLOPs counted and by the formula, activation bytes, and both over full fine-tuning."""
    import timm
    import torch

    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_224", num_classes=CLASSES)
    full, found = budget(model, "full"), []
    for k in range(1, DEPTH + 1):
        own = budget(model, "lora", rank=RANK, alpha=RANK, sites=("attn.qkv",), head="head", last_k=k)
        expected = formula(k) * own.batch
        found.append(
            {
                "k": k,
                "flops": own.training_flops,
                "formula": expected,
                "of_full": own.training_flops / full.training_flops,
                "bytes_of_full": own.activation_bytes / full.activation_bytes,
            }
        )
    return found


def rows() -> list[dict]:
    worst = max(abs(r["flops"] / r["formula"] - 1) for r in table())
    return [row("3 last-k FLOPs off formula", worst, 0.02, "full fine-tuning")]


if __name__ == "__main__":
    print("| k | GFLOP | formula | FLOPs of full | activation bytes of full |\n|---|---|---|---|---|")
    for r in table():
        counted = f"| {r['k']} | {r['flops'] / 1e9:.2f} | {r['formula'] / 1e9:.2f} "
        print(f"{counted}| {r['of_full']:.3f} | {r['bytes_of_full']:.3f} |")
    show(rows())
