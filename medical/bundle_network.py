"""A network whose weights are those of a base and what an adapter changed in them: a base of other values is refused.

This file is copied into a MONAI Bundle as scripts/network.py: it needs torch and safetensors, and nothing of ours.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

DOWN, UP = ".down", ".up"  # of a change whose rank is low: up @ down is added


def adapted(network: nn.Module, base: str, adapter: str, prefix: str = "") -> nn.Module:
    """`network` with these weights, in eval mode. base: a state dict; adapter: `changes`; prefix: of the base's names.

    Raises SystemExit, one line, where the base's tensors are not those that the adapter was trained on.
    """
    tensors = torch.load(base, map_location="cpu", weights_only=True)
    with safe_open(adapter, framework="pt") as file:
        expected, change = file.metadata()["base"], {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    found = fingerprint(tensors)
    if found != expected:
        raise SystemExit(  # no traceback: MONAI would bury an exception below its own
            f"{base}: not the base that {Path(adapter).name} was trained on (sha256 of its tensors is {found[:12]}, "
            f"expected {expected[:12]}): put that base there"
        )
    network.load_state_dict(applied({f"{prefix}{k}": v for k, v in tensors.items()}, change))
    return network.eval()


def applied(state: Mapping[str, Tensor], change: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state after `changes`."""
    new = dict(state)
    for name, value in change.items():
        if name.endswith(UP):
            weight = name.removesuffix(UP)
            delta = value.double() @ change[f"{weight}{DOWN}"].double()
            new[weight] = (state[weight].double() + delta.view_as(state[weight])).to(state[weight].dtype)
        elif not name.endswith(DOWN):
            new[name] = value
    return new


def changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of `after` is not in `before`: tensors as they are, or where that is smaller the two factors of a change.

    The rank is the number of singular values that stand out of the rounding of the sum in float32.
    """
    found: dict[str, Tensor] = {}
    for name, value in after.items():
        old = before.get(name)
        if old is not None and torch.equal(old, value):
            continue
        found[name] = value.clone()
        if old is None or value.ndim < 2 or value.dtype != torch.float32:
            continue
        left, size, right = torch.linalg.svd((value.double() - old.double()).flatten(1), full_matrices=False)
        rows, columns = len(left), right.shape[1]
        rounding = torch.finfo(value.dtype).eps * float(value.abs().max()) * (rows**0.5 + columns**0.5)
        rank = max(1, int((size > rounding).sum()))
        if rank * (rows + columns) < rows * columns:
            root = size[:rank].sqrt()
            del found[name]
            found[f"{name}{UP}"] = (left[:, :rank] * root).float().contiguous()
            found[f"{name}{DOWN}"] = (root[:, None] * right[:rank]).float().contiguous()
    return found


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over name, shape, dtype and bytes of all tensors, sorted by name (adaptsuite.identity.fingerprint)."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        kind = str(value.dtype).removeprefix("torch.")
        digest.update(f"{name}\0{list(value.shape)}\0{kind}\0".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
