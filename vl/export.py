"""`adapt vl export`: the paired model as one graph, picture and word numbers in, logits out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptsuite import export as exports
from adaptsuite.export import Job, Writer, write_onnx, write_torch
from adaptsuite.vl.paired import PrefixedModel
from adaptsuite.vl.pipeline import DOMAIN


class Answering(nn.Module):
    """image (B, 3, H, W) in [0, 1], input_ids and attention_mask (B, T) -> logits (B, K); of captions (B, T, words),
    at each word those of the next."""

    def __init__(self, model: PrefixedModel):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids, attention_mask, image=image)


def _graph(write: Callable[..., float]) -> Writer:
    def run(job: Job) -> tuple[float, list[str]]:
        model, facts = job.model, job.domain.describe(job.model)
        of_input = {"front_end": facts["front_end"], "tokenizer": facts["tokenizer"]}
        said = exports.metadata(job, **of_input)
        one = job.recipe.data.task == "caption" or job.recipe.head.get("loss") == "ce"  # word, or answer
        said["activation"] = "softmax" if one else "sigmoid"
        inputs = _inputs(model, job.domain.sample(model, 3))
        gap = exports.write_graph(job, write, Answering(model), inputs, said)
        length, (height, width) = inputs["input_ids"].shape[1], model.front_end.size
        return gap, [
            f"input image (B, 3, {height}, {width}) float32 in [0, 1], input_ids and attention_mask "
            f"(B, {length}) int64 by the tokenizer of the metadata, padded with 0; output logits",
            "every row needs an image: rows without one are a matter of the library alone",
        ]

    return run


def _inputs(model: PrefixedModel, sample: dict[str, Tensor]) -> dict[str, Tensor]:
    """Padded to the longest text that there may be."""
    text = {}
    for name in ("input_ids", "attention_mask"):
        given = sample[name]
        text[name] = torch.zeros(len(given), model.tokenizer.max_length, dtype=given.dtype)
        text[name][:, : given.shape[1]] = given
    return {"image": sample["image"], **text}


FORMATS: dict[str, Writer] = {"torch": _graph(write_torch), "onnx": _graph(write_onnx)}


def export(folder: str | Path, format: str, out: str | Path) -> dict[str, Any]:
    """Writes a vl adapter as one of FORMATS, as `adaptsuite.export.export` says."""
    return exports.export(DOMAIN, FORMATS, folder, format, out)
