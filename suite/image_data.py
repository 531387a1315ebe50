"""Picture files to tensors: resized once, kept as bytes in memory, one item a row."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptsuite.front_end import FrontEnd
from adaptsuite.images import Picture, inspect, remarks, resized
from adaptsuite.memory import Memory


class Images:
    """Map-style dataset: {"image": (3, h, w) uint8 before the crop, "label", "item"}."""

    input = "image"  # what a cache of features stands in for

    def __init__(
        self, paths: Sequence[Path], targets: np.ndarray | None, front_end: FrontEnd, memory: Memory | None = None
    ):
        self.paths, self.front_end = list(paths), front_end
        self.targets = None if targets is None else torch.as_tensor(targets)
        self._memory = Memory() if memory is None else memory  # shared by the parts and folds of one run

    @property
    def item_targets(self) -> np.ndarray | None:
        """(N,) or (N, K) targets, without reading a file."""
        return None if self.targets is None else self.targets.numpy()

    def load(self) -> None:
        """Reads into memory as much as fits: what is damaged there is found now. Raises DataError."""
        for path in self.paths:
            if not self._memory.keep(self._key(path), self.image(path)):
                return

    def remarks(self) -> list[str]:
        """What was changed in these files or makes them doubtful, said once for all of them."""
        found: dict[str, list[str]] = {}
        seen = [inspect(path) for path in self.paths]
        for picture in seen:
            image = self._memory.get(self._key(picture.path))
            for remark in remarks(picture, image is not None and bool((image == image.flatten()[0]).all())):
                found.setdefault(remark, []).append(picture.path.name)
        said = []
        if away := sum(self._key(path) not in self._memory for path in self.paths):
            said.append(
                f"{away} of {len(self)} pictures do not fit into memory and are read each time: "
                "a damaged one stops the run at its turn, unless `check` or --skip-bad found it before"
            )
        for what, names in found.items():
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            said.append(f"{len(names)} of {len(seen)} files: {what}: {', '.join(names[:5])}{more}")
        return [*said, *size_remarks(seen, self.front_end)]

    def image(self, path: Path) -> Tensor:
        image = self._memory.get(self._key(path))
        return resized(path, self.front_end) if image is None else image

    def _key(self, path: Path) -> tuple:
        f = self.front_end
        return path, f.resized, f.interpolation, f.fit

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.image(self.paths[index])
        if self.targets is None:  # what has none is read once: keeping it would only fill the memory
            return {"image": image, "item": index}
        self._memory.keep(self._key(self.paths[index]), image)
        return {"image": image, "item": index, "label": self.targets[index]}

    def mean_by_row(self, outputs: np.ndarray) -> np.ndarray:
        """One item is one row."""
        return outputs


def size_remarks(seen: Sequence[Picture], front: FrontEnd) -> list[str]:
    """What is said once of the sizes of a command's files."""
    height, width = front.resized
    small = [p for p in seen if p.width < width and p.height < height]
    found = []
    if small:
        sizes = Counter((p.width, p.height) for p in small).most_common(1)[0][0]
        found.append(
            f"{len(small)} of {len(seen)} pictures are smaller than the {width} x {height} they are resized to (most "
            f"{sizes[0]} x {sizes[1]}): nothing is gained by that"
        )
    odd = [
        p
        for p in seen
        if front.fit == "crop" and max(p.width * height, p.height * width) > 2 * min(p.width * height, p.height * width)
    ]
    if odd:
        found.append(
            f"{len(odd)} of {len(seen)} pictures are more than twice as long as wide: front_end.fit=crop keeps their "
            "middle only; --set front_end.fit=squash keeps all"
        )
    return found
