"""How alike the attention of two blocks is: mini-batch linear CKA (Nguyen et al., arXiv:2010.15327, section 2)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from adaptsuite.errors import UsageError
from adaptsuite.host import Handle
from adaptsuite.vision.grid import watched
from adaptsuite.vision.look import attention_maps, still

LEAST = 4  # samples of a batch: the unbiased HSIC divides by N - 3
IMAGES, BATCH = 32, 16  # of one matrix
KEPT_BYTES = 256 << 20  # attention of one block for one batch
WORK = 6e11  # parameters x tokens x pictures of one matrix on a CPU: about 20 s on two cores


def hsic(first: Tensor, second: Tensor) -> Tensor:
    """Unbiased HSIC of two Gram matrices (..., N, N) (Song et al. 2012; arXiv:2010.15327, eq. 3).

    Raises UsageError for N < 4.
    """
    n = first.shape[-1]
    if n < LEAST:
        raise UsageError(f"CKA of {n} pictures: at least {LEAST} a batch are needed")
    k, m = (g - torch.diag_embed(g.diagonal(dim1=-2, dim2=-1)) for g in (first, second))
    trace = (k * m).sum((-2, -1))
    sums = k.sum((-2, -1)) * m.sum((-2, -1)) / ((n - 1) * (n - 2))
    cross = (k.sum(-1) * m.sum(-1)).sum(-1) * 2 / (n - 2)  # 1' K M 1, both symmetric
    return (trace + sums - cross) / (n * (n - 3))


def cka(grams: Sequence[Tensor]) -> np.ndarray:
    """(L, L) CKA between L representations, of batches' Gram matrices (L, N, N); NaN where one does not vary.

    Numerators and denominators are averaged over batches before they are divided (eq. 2): the estimate then does not
    depend on the batch size.
    """
    found = torch.stack([hsic(g[:, None].double(), g[None].double()) for g in grams]).mean(0)
    own = found.diagonal()
    varies = own > 1e-20 * own.max()  # below is rounding: HSIC is of the fourth order
    norm = own.clamp(min=0).sqrt()
    return (found / (norm[:, None] * norm)).where(varies[:, None] & varies, torch.nan).cpu().numpy()


def gram(features: Tensor) -> Tensor:
    """(N, N) inner products of samples (N, ...), flattened and centred, which HSIC does not see but rounding does."""
    x = features.flatten(1)
    x = x - x.mean(0)
    return x @ x.T


@torch.no_grad()
def attention_cka(model: nn.Module, batches: Iterable[Tensor]) -> np.ndarray:
    """(blocks, blocks) CKA between the softmax attention of all heads, flattened, of every pair of blocks.

    batches: images (N, 3, H, W) as the model takes them, each N > 3.
    """
    grams: list[Tensor] = []
    for images in batches:
        own: list[Tensor] = []
        with attention_maps(model, lambda block, attention, own=own: own.append(gram(attention))):
            model(images)
        grams.append(torch.stack(own))
    return cka(grams)


def collapse(matrix: np.ndarray) -> float:
    """Mean CKA between different blocks: 1 where all attend alike, near 0 where each is on its own."""
    others = matrix[~np.eye(len(matrix), dtype=bool)]
    return float(np.nanmean(others)) if np.isfinite(others).any() else float("nan")


def batched(num: int, size: int) -> list[range]:
    """`num` samples in batches of at least `size` each, as even as can be; one batch where there are fewer."""
    edges = np.linspace(0, num, max(1, num // size) + 1).round().astype(int)
    return [range(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]


@dataclass
class Alike:
    """CKA between the blocks' attention, by name: of the backbone alone and adapted, or of one of them."""

    matrices: dict[str, np.ndarray]
    images: int
    batch: int  # the smallest
    joins: list[int]  # blocks behind which tokens are joined


def alike(
    model: nn.Module,
    handle: Handle | None,
    rows: Sequence[int],
    image: Callable[[int], Tensor],
    work: float | None = WORK,
) -> Alike:
    """CKA with some of the pictures image(row) (1, 3, H, W), as many as memory and, on a CPU, `work` allow.

    An adapter of which nothing but the head is trained attends as its backbone does: one matrix. Raises UsageError with
    the reason where it is left out.
    """
    if len(rows) < LEAST:
        raise UsageError(f"{len(rows)} pictures, at least {LEAST} are needed")
    tokens, values, joins = _sizes(model, image(rows[0]))
    size = min(BATCH, KEPT_BYTES // (4 * values))
    if size < LEAST:
        raise UsageError(f"the attention of {tokens} tokens has {values / 1e6:.0f} M values a picture and block")
    num = min(IMAGES, len(rows))
    if work is not None and next(model.parameters()).device.type == "cpu":
        num = min(num, max(size // 2, int(work / (tokens * sum(p.numel() for p in model.parameters())))))
    chosen = [rows[i] for i in np.linspace(0, len(rows) - 1, num).round().astype(int)]
    batches = [[chosen[i] for i in own] for own in batched(num, size)]

    def matrix() -> np.ndarray:
        return attention_cka(model, (torch.cat([image(row) for row in batch]) for batch in batches))

    found = Alike({}, num, min(map(len, batches)), joins)
    if handle is None or all(handle.kind(name) == "head" for name in handle.trained()):
        found.matrices["backbone"] = matrix()
        return found
    with still(model), handle.disabled():
        found.matrices["backbone alone"] = matrix()
    found.matrices["adapted"] = matrix()
    return found


@torch.no_grad()
def _sizes(model: nn.Module, image: Tensor) -> tuple[int, int, list[int]]:
    """Most tokens and most values of attention of any block, and the blocks behind which tokens are joined."""
    seen: list[tuple[int, int]] = []

    def see(block: int, attention: Tensor) -> None:
        seen.append((attention.shape[-1], attention.numel()))

    with watched(model, image.shape[2:]) as tokens, attention_maps(model, see):
        model(image)
    return (*map(max, zip(*seen, strict=True)), sorted(tokens.joins))
