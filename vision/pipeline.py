"""What the commands need of vision: its backbones, its methods' defaults, and what its reports show."""

from typing import Any

import numpy as np

from adaptsuite.host import Handle
from adaptsuite.image_data import Images
from adaptsuite.image_task import ImageDomain


class VisionDomain(ImageDomain):
    """Classification of photographs."""

    name = "vision"
    backbones = (
        "embedded:vision-tiny",
        "timm:NAME, of timm.list_models()",
        "file:FOLDER in timm's layout",
        "hf:FOLDER",
    )

    def defaults(self, method: str) -> dict[str, dict[str, Any]]:
        """Rates that trained well on few pictures; the patch embedding's bias is one of BitFit's (102,912 on ViT-B)."""
        sites = ("attn.qkv", "attn.out", "mlp.in", "mlp.out", "norm", "patch_embed?")
        settings = {"bitfit": {"sites": sites}}.get(method, {})
        lr = {"full": 1e-4, "linear": 1e-3, "kadaptation": 1e-3}.get(method, 5e-3)
        plan = {"lr": lr, "head_lr": 1e-3, "batch_size": 16, "epochs": 20}
        return {"method_settings": settings, "plan": plan}

    def extra(self, handle: Handle, dataset: Images, outputs: np.ndarray | None) -> list[dict[str, Any]]:
        """What the model looks at, what it confuses, and how alike its blocks attend."""
        from adaptsuite.vision.sections import sections

        return sections(handle, dataset, outputs)


DOMAIN = VisionDomain()
