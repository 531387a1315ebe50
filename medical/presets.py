"""Where adapters go on medical backbones: sites by role, and published systems' settings with what was dead in them.

Roles hold for every family (adaptsuite.sites); a suffix such as "proj" would hit `attn.proj` and `patch_embed.proj`.
"""

from dataclasses import dataclass, field
from typing import Any

from adaptsuite.errors import UsageError, nearest

ATTENTION = ("attn.q", "attn.k", "attn.v", "attn.out")
MLP = ("mlp.in", "mlp.out")
LINEAR = (*ATTENTION, *MLP)
EVERYWHERE = (*LINEAR, "patch_embed?", "pointwise?")  # patch merging and 1 x 1 convolutions of decoders as well
SITES = {"attention": ATTENTION, "mlp": MLP, "linear": LINEAR, "everywhere": EVERYWHERE}

# open_clip configuration of FetalCLIP, as arXiv:2507.22802 uses it; weights are read with open_clip:CONFIG.json@FILE
FETALCLIP = {
    "embed_dim": 768,
    "vision_cfg": {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14},
    "text_cfg": {"context_length": 117, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12},
}


@dataclass(frozen=True)
class Preset:
    """A published system's adapter as it was meant: alive here. `dead` says what did not train in its own code."""

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    dead: str = ""


PRESETS = {
    "fetalclip-iqa-cls": Preset(
        "lora",
        {"rank": 8, "alpha": 16.0, "sites": ("mlp.in", "mlp.out", "attn.out")},
        "arXiv:2507.22802",
        "LoRA on the module nn.MultiheadAttention.out_proj, which is never called: 393,216 of 2,359,296 values",
    ),
    "fetalclip-iqa-seg": Preset(
        "lora",
        {"rank": 8, "alpha": 16.0, "sites": ("mlp.in", "mlp.out", "attn.out")},
        "arXiv:2507.22802",
        "the encoder runs under no_grad: all of its LoRA",
    ),
    "dinov2-radiology-lora": Preset(
        "lora",
        {"rank": 48, "alpha": 16.0, "dropout": 0.1, "sites": ("attn.qkv", *MLP)},
        "arXiv:2312.02366",
        "LoRA is used on the no_grad path only: all of it",
    ),
    "dinov2-radiology-bitfit": Preset(
        "bitfit", {}, "arXiv:2312.02366", "BitFit is used on the no_grad path only: all biases"
    ),
}


def preset(name: str) -> Preset:
    """The preset of a name. Raises UsageError with the nearest one."""
    if name not in PRESETS:
        raise UsageError(f"no preset {name!r}; {nearest(name, PRESETS)}")
    return PRESETS[name]
