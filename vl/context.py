"""How an image reaches the adapters of a text model that knows nothing of images.

The model is not changed and gets no new argument: what branches read lies in the context of the forward.
`with handle.using(features=V): model.generate(...)` puts it there for everything inside, in this thread alone; V is
encoded once, whatever the number of steps and beams. A backward that computes layers again finds the V of its own
forward, also when others ran in between. `Conditioned` makes V an argument: for `torch.export`, and for batches that
carry it.
"""

from typing import Any

from torch import Tensor, nn

from adaptsuite.bank import BANK
from adaptsuite.errors import UsageError


def aligned(features: Tensor | None, like: Tensor) -> Tensor:
    """V (B, N, D) on the device and in the precision of `like`, one row for each of its rows.

    features: (B, D) or (B, N, D). Where `like` has k times as many rows, as under beam search with k beams and in
    windowed attention, each row of V counts for the k that follow one another.
    Raises UsageError without features, and for numbers of rows that do not fit.
    """
    if features is None:
        raise UsageError("routing needs an image: run the model inside handle.using(features=V), or as Conditioned")
    if features.ndim not in (2, 3):
        raise UsageError(f"features are (B, D) or (B, N, D), these have {features.ndim} dimensions")
    features = features.to(like.device, like.dtype)
    if features.ndim == 2:
        features = features.unsqueeze(1)
    images, rows = features.shape[0], like.shape[0]  # len() would fix them in an exported graph
    if images != rows:
        if not images or rows % images:
            raise UsageError(f"features of {images} images do not fit a batch of {rows}")
        features = features.repeat_interleave(rows // images, 0)
    return features


def present(features: Tensor) -> Tensor:
    """(B, N, 1), 1 where a token of V (B, N, D) is one: rows of zeros stand for no image, or fill shorter ones up."""
    return (features != 0).any(-1, keepdim=True).to(features.dtype)


class Conditioned(nn.Module):
    """A text model whose forward takes the image's features as well: `model(input_ids=..., features=V)`.

    Adapters may be on the model already, or be attached to this module. V may be (B, D), or (B, N, D) of N tokens.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args: Any, features: Tensor, token_mask: Tensor | None = None, **kwargs: Any):
        return with_context(self, self.model, *args, context={"features": features, "token_mask": token_mask}, **kwargs)


def with_context(root: nn.Module, model: nn.Module, *args: Any, context: dict[str, Any], **kwargs: Any):
    """model(*args, **kwargs) with a context for the adapters on `root` or on `model`, pinned for its backward.

    For the forward of task models around a text model: `root` is the task model itself.
    """
    bank = getattr(root, BANK, None)
    bank = getattr(model, BANK, None) if bank is None else bank
    if bank is None:
        return model(*args, **kwargs)
    with bank.using(**context):
        output = model(*args, **kwargs)
        bank.pin(output)
    return output
