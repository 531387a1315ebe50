"""Pictures that are there twice: exactly, or almost (the next frame of a clip, a crop, another export).

Group names do not tell: BUSI has none, and 604 groups among 780 pictures. Two pictures are near-duplicates where the
Pearson correlation of their 32 x 32 greyscale thumbnails, each pixel the mean of its area, exceeds .95. That finds
neighbours, re-encodings and small crops; it does not find mirrored, rotated or strongly cropped copies, and of one
volume almost all slices are near-duplicates. Functions take arrays; `read_grey` reads ordinary picture files.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adaptsuite.errors import DataError, ResourceError

SIDE, ABOVE = 32, 0.95
BLOCK = 2048  # rows of one matrix product
MOST = 20_000_000  # pairs kept


@dataclass(frozen=True, eq=False)
class Pairs:
    """Rows that resemble each other: (M, 2) row numbers, the smaller first, and (M,) their correlation."""

    rows: np.ndarray
    correlation: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


def read_grey(path: str | Path) -> np.ndarray:
    """(H, W) float32 of a picture file, its first frame, in the file's own range. Raises DataError."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            wide = picture.mode.startswith(("I", "F"))
            return np.asarray(picture if wide else picture.convert("L"), dtype=np.float32)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: no picture that can be read: {type(error).__name__}") from None


def pixel_hash(pixels: np.ndarray) -> str:
    """sha256 of decoded pixels, equal for equal pictures whatever file holds them.

    Integers of any width hash by their values, and a colour picture whose channels are equal as the grey one.
    """
    pixels = np.asarray(pixels)
    if pixels.ndim == 3 and pixels.shape[-1] == 3 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    kind = "<i8" if pixels.dtype.kind in "biu" else "<f8"
    digest = hashlib.sha256(repr((pixels.shape, kind)).encode())
    digest.update(np.ascontiguousarray(pixels, dtype=kind).tobytes())
    return digest.hexdigest()


def exact_pairs(hashes: Sequence[str]) -> Pairs:
    """Every row with the first row that has its hash; correlation 1."""
    first: dict[str, int] = {}
    rows = [(first[h], i) for i, h in enumerate(hashes) if first.setdefault(h, i) != i]
    return Pairs(np.array(rows, dtype=np.int64).reshape(-1, 2), np.ones(len(rows)))


def thumbnail(pixels: np.ndarray, side: int = SIDE) -> np.ndarray:
    """(side, side) float32 of (H, W), or of (H, W, 3) weighted as luma; each pixel is the mean of its area."""
    from PIL import Image

    pixels = np.asarray(pixels, dtype=np.float32)
    if pixels.ndim == 3 and pixels.shape[-1] in (3, 4):
        pixels = pixels[..., :3] @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    if pixels.ndim != 2 or not np.isfinite(pixels).all():
        raise ValueError(f"one finite picture (H, W) or (H, W, 3) is expected, found shape {pixels.shape}")
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BOX))


def scan(paths: Iterable[str | Path], read: Callable[[Any], np.ndarray] = read_grey) -> tuple[list[str], np.ndarray]:
    """(hashes, thumbnails (N, 32, 32)) of files, one in memory at a time; read: path -> pixels."""
    hashes, thumbnails = [], []
    for path in paths:
        pixels = read(path)
        hashes.append(pixel_hash(pixels))
        thumbnails.append(thumbnail(pixels))
    return hashes, np.stack(thumbnails) if thumbnails else np.empty((0, SIDE, SIDE), dtype=np.float32)


def near_pairs(thumbnails: np.ndarray, above: float = ABOVE, block: int = BLOCK) -> Pairs:
    """All pairs of (N, ...) thumbnails that correlate above a number, by matrix products of blocks of rows.

    N^2 pairs are compared in memory of block^2: 10,000 pictures take seconds. A picture of one value correlates with
    none. Raises ResourceError beyond 20 million pairs: `above` is then too low for pictures of this kind.
    """
    flat = np.asarray(thumbnails, dtype=np.float64)
    flat = flat.reshape(len(flat), int(np.prod(flat.shape[1:])))
    flat = flat - flat.mean(1, keepdims=True)
    norm = np.linalg.norm(flat, axis=1, keepdims=True)
    unit = np.divide(flat, norm, out=np.zeros_like(flat), where=norm > 1e-6 * flat.shape[1] ** 0.5).astype(np.float32)
    found, values, count = [], [], 0
    for top in range(0, len(unit), block):
        for left in range(top, len(unit), block):
            product = unit[top : top + block] @ unit[left : left + block].T
            i, j = np.nonzero(np.triu(product > above, 1) if left == top else product > above)
            found.append(np.stack([i + top, j + left], 1))
            values.append(product[i, j].astype(float))
            count += len(i)
            if count > MOST:
                raise ResourceError(f"more than {MOST:,} pairs correlate above {above}: compare fewer, or go higher")
    return Pairs(np.concatenate(found) if found else np.empty((0, 2), dtype=np.int64), np.concatenate([*values, []]))


def all_pairs(hashes: Sequence[str], thumbnails: np.ndarray, above: float = ABOVE) -> Pairs:
    """`near_pairs`, and the exact ones that are not among them: equal pictures of one value."""
    near, exact = near_pairs(thumbnails, above), exact_pairs(hashes)
    known = set(map(tuple, near.rows.tolist()))
    new = np.array([tuple(pair) not in known for pair in exact.rows.tolist()], dtype=bool)
    rows = np.concatenate([near.rows, exact.rows[new]])
    return Pairs(rows, np.concatenate([near.correlation, exact.correlation[new]]))


def merged_groups(pairs: Pairs, groups: Sequence[Any] | None = None, rows: int | None = None) -> np.ndarray:
    """(N,) int64 proposal of groups: those given, joined wherever a pair connects two; numbered by first appearance.

    groups: (N,) patients for instance; none: each of `rows` rows is its own.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    own = np.arange(rows) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    ends = own[pairs.rows].T if len(pairs) else np.empty((2, 0), dtype=int)
    size = int(own.max()) + 1 if len(own) else 0
    graph = coo_matrix((np.ones(ends.shape[1], dtype=bool), tuple(ends)), shape=(size, size))
    joined = connected_components(graph, directed=False)[1][own] if size else own
    _, first, inverse = np.unique(joined, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(np.int64)


def leak_report(
    pairs: Pairs,
    parts: Sequence[str] | None = None,
    labels: Sequence[Any] | None = None,
    groups: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """What the pairs mean for a table: counts, and the pairs that matter, the most alike first.

    parts: (N,) train, val or test, empty for a row not in use.  Pairs are {"rows": [i, j], "correlation"}, with the two
    parts or labels: rows are numbers, so that the report names no file. `across_parts` are leaks; `across_labels`, of
    two labels, are errors of the table in one of the two rows; `across_groups` asks for merged groups.
    """
    columns: Mapping[str, Sequence[Any] | None] = {"parts": parts, "labels": labels, "groups": groups}
    report: dict[str, Any] = {"pairs": len(pairs), "rows": len(np.unique(pairs.rows))}
    order = np.argsort(-pairs.correlation, kind="stable")
    for name, cells in columns.items():
        if cells is None:
            continue
        cells = np.asarray(cells)
        left, right = cells[pairs.rows[order]].T if len(pairs) else (cells[:0], cells[:0])
        differ = (left != right) & ((left != "") & (right != "") if name == "parts" else True)
        report[f"across_{name}"] = [
            {"rows": pairs.rows[k].tolist(), "correlation": round(float(pairs.correlation[k]), 4)}
            | ({} if name == "groups" else {name: [str(a), str(b)]})
            for k, a, b in zip(order[differ], left[differ], right[differ], strict=True)
        ]
    return report


def require_no_near_leak(pairs: Pairs, parts: Sequence[str], where: Sequence[str], source: str) -> None:
    """Raises DataError that names up to five pairs of rows in two parts. where: (N,) words for each row, as line 17."""
    found = leak_report(pairs, parts)["across_parts"]
    if found:
        shown = [
            f"{where[p['rows'][0]]} in {p['parts'][0]} and {where[p['rows'][1]]} in {p['parts'][1]}" for p in found
        ]
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise DataError(
            f"{source}: pictures of two parts are the same or nearly so: {', '.join(shown[:5])}{more}; "
            "give them one group (merged_groups proposes them), or one part"
        )
