"""Reads files that others made: regular files of JSON and safetensors, nothing that could run or lead elsewhere."""

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from adaptsuite.errors import AdapterError, ResourceError

LARGEST = 1e6  # no trained value comes near; what is beyond was not trained
MOST_JSON = 64 * 2**20  # bytes


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object with finite numbers from a regular file; AdapterError for anything else."""

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text} is not a finite number")
        return value

    with open_regular(path) as file:
        raw = file.read(MOST_JSON + 1)
    if not raw.strip() or len(raw) > MOST_JSON:
        raise AdapterError(
            f"{path} is {'larger than 64 MiB' if raw.strip() else 'empty'}: it is no record; copy it again"
        )
    try:
        facts = json.loads(raw.decode("utf-8"), parse_float=number, parse_constant=number)
    except (ValueError, RecursionError) as e:
        raise AdapterError(f"{path} is not JSON ({e}): truncated or damaged; copy it again") from e
    if not isinstance(facts, dict):
        raise AdapterError(
            f"{path} holds a {type(facts).__name__}, expected an object: this is not an adapter's record"
        )
    return facts


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; AdapterError for a file that is none."""
    from safetensors import SafetensorError, safe_open

    with open_regular(path) as file:
        if not file.read(1):
            raise AdapterError(f"{path} is empty: copy it again")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, KeyError, RuntimeError) as e:
        raise AdapterError(f"{path} is not a safetensors file ({e}): truncated or damaged; copy it again") from e


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for reading. Links are refused (they may lead anywhere), so are pipes and devices."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if path.is_symlink():
        raise AdapterError(f"{path} is a symbolic link, expected a regular file: copy the file itself")
    try:
        handle = os.open(path, flags)
    except FileNotFoundError as e:
        raise AdapterError(f"{path} is missing: give the folder that holds it, or copy it again") from e
    except OSError as e:
        raise ResourceError(f"cannot read {path}: {e.strerror}") from e
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise AdapterError(f"{path} is not a regular file")
        yield file


def check_values(where: str | Path, tensors: Mapping[str, Tensor], buffers: Sequence[str] = ()) -> None:
    """Raises AdapterError for NaN or Inf, and for trained values that no training gives.

    Buffers may be large (a variance); those of a base that was trained whole may be infinite too (a mask).
    """
    for name, t in tensors.items():
        if not t.is_floating_point() or not t.numel() or (name in buffers and name.startswith("base.")):
            continue
        largest = float(t.detach().abs().max())
        if not math.isfinite(largest):
            what = "NaN" if math.isnan(largest) else "Inf"
            raise AdapterError(
                f"{where}: {name} holds {what}, expected finite values: its training failed, train again"
            )
        if largest > LARGEST and name not in buffers:
            raise AdapterError(
                f"{where}: {name} holds values up to {largest:.1e}, at most {LARGEST:.0e} is expected: damaged, or its "
                "training diverged; train again with a lower rate"
            )
