"""How far from the head each part of a host stands, and the learning rate that follows (BEiT, arXiv:2106.08254)."""

from collections.abc import Callable

from torch import nn

from adaptsuite.errors import UsageError
from adaptsuite.sites import BANK, INPUTS, component_info, find_sites

TOKENS = ("token", "pos", "emb")  # in the names of parameters on a component itself that belong to its embedding
LAST = ("rel_pos_bias",)  # acts in every block: with the head, as in BEiT's code


def layer_factor(model: nn.Module, decay: float) -> Callable[[str], float]:
    """A function: dotted name of a parameter or a module of `model` -> decay ** its distance, its share of the rate.

    With decay 1 no block needs to be known. Raises UsageError where none is.
    """
    if decay == 1:
        return lambda path: 1.0
    try:
        distance = layer_distance(model)
    except LookupError as error:
        raise UsageError(f"layer_decay={decay:g} needs blocks, so that a layer has a depth: {error}") from None
    return lambda path: decay ** distance(path)


def layer_distance(model: nn.Module) -> Callable[[str], int]:
    """A function: dotted name of a parameter or a module of `model` -> L + 1 - id, layers from it to the head.

    Of a component with L blocks the embedding has the id 0, block i has i + 1, what follows the last block (final norm,
    pooling, head) has L + 1; what stands between two blocks, as Swin's merging does, counts with the block before.
    Outside every component, as heads of task models are, the distance is 0. Raises LookupError without blocks.
    """
    sites = find_sites(model, "block")
    depth = {c.prefix: c.num_blocks for c in component_info(model)}
    blocks = {site.path: depth[site.component] - site.block for site in sites}
    outside = _outside(model, blocks)

    def distance(path: str) -> int:
        above = path
        while above not in blocks and above:
            above = above.rpartition(".")[0]
        if above in blocks:
            return blocks[above]
        within = path and f"{path}."
        found = (outside[name] for name in outside if name == path or name.startswith(within))
        return next(found, 0)

    return distance


def _outside(model: nn.Module, blocks: dict[str, int]) -> dict[str, int]:
    """L + 1 - id of every parameter that is in no block, in the order of the model."""
    roots = {}
    for info in component_info(model):
        there = any(path == info.prefix for path, _ in model.named_modules())
        roots[info.prefix if there else info.prefix.rpartition(".")[0]] = info  # open_clip's text tower has no module
    passed = dict.fromkeys(roots, 0)  # blocks seen so far
    found: dict[str, int] = {}
    for name in (name for name, _ in model.named_parameters() if not name.startswith(f"{BANK}.")):
        root = max((r for r in roots if not r or name.startswith(f"{r}.")), key=len, default=None)
        block = next((path for path in blocks if name.startswith(f"{path}.")), None)
        if root is None:
            found[name] = 0
        elif block is not None:
            passed[root] = roots[root].num_blocks + 1 - blocks[block]
        else:
            found[name] = roots[root].num_blocks + 1 - _id(name, root, passed[root], roots[root])
    return found


def _id(name: str, root: str, passed: int, info) -> int:
    """Layer of a parameter outside the blocks, of which `passed` stand before it in the model."""
    parts = name.removeprefix(f"{root}.").split(".")
    last = info.num_blocks + 1
    if any(path and name.startswith(f"{path}.") for path in (info.final_norm, info.head)) or parts[0] in LAST:
        return last
    if len(parts) == 1 and not any(word in name for word in TOKENS):
        return last  # such as the projections of open_clip, which the model lists first
    if len(parts) == 1 or any(part in INPUTS for part in parts):
        return 0
    return last if passed == info.num_blocks else passed
