"""Picture files to pixels: decoding, resizing, and the crops of evaluation."""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptsuite.errors import DataError
from adaptsuite.front_end import FrontEnd

FORMATS = {  # suffix -> Pillow's name
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".gif": "GIF",
    ".ppm": "PPM",
    ".pgm": "PPM",
}
SUFFIXES = tuple(FORMATS)
MOST_PIXELS = 89_478_485  # Pillow's own bound: a file of a few bytes can unpack to gigabytes
LEAST_SIDE = 8  # pixels
DEEP = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")  # modes with more than 8 bits


@dataclass(frozen=True)
class Picture:
    """What a file's header says."""

    path: Path
    width: int  # as it is shown, EXIF rotation applied
    height: int
    mode: str  # Pillow's
    format: str
    frames: int = 1


def inspect(path: Path) -> Picture:
    """Reads the header. Raises DataError that names the file and what is wrong with it."""
    with _opened(path) as image:
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise DataError(f"{path}: {width} x {height} pixels are more than {MOST_PIXELS:,}: cut it into tiles")
        if min(width, height) < LEAST_SIDE:
            raise DataError(f"{path}: {width} x {height} pixels, at least {LEAST_SIDE} a side are needed")
        with _decoding(path):
            # of a PNG that has none in front of its pixels, Pillow would decode all of it to look behind them
            turned = (image.format != "PNG" or "exif" in image.info) and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            frames = getattr(image, "n_frames", 1)
        width, height = (height, width) if turned else (width, height)
        return Picture(path, width, height, image.mode, image.format or "", frames)


def read(path: Path) -> Any:
    """A Pillow image in RGB, 8 bits, turned as its EXIF says, over white where it is transparent; of several the first.

    16-bit and float pictures are stretched from their own lowest to their highest value. Raises DataError for a file
    that is damaged or cut short.
    """
    from PIL import Image, ImageOps

    found = inspect(path)
    with _opened(path) as image:
        with _decoding(path):
            image.load()
        if found.mode in DEEP:
            values = np.asarray(image, dtype=np.float64)
            if not np.isfinite(values).all():
                raise DataError(f"{path}: holds NaN or infinite pixels")
            low, high = values.min(), values.max()
            image = Image.fromarray(((values - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8))
            return image.convert("RGB")
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")


def stored(path: Path) -> np.ndarray:
    """(H, W) or (H, W, C) numbers as the file has them, of a palette its numbers: for masks. Raises as `read`."""
    inspect(path)
    with _opened(path) as image, _decoding(path):
        return np.asarray(image)


def survey(path: Path) -> dict[str, Any]:
    """Facts of a file and what may be wrong with it, decoded: {"width", "height", "remarks"}. Raises as `read`."""
    found, image = inspect(path), read(path)
    low, high = np.asarray(image).min(), np.asarray(image).max()
    return {"width": found.width, "height": found.height, "remarks": remarks(found, one_colour=low == high)}


def remarks(found: Picture, one_colour: bool = False) -> list[str]:
    """What was changed in a picture or makes it doubtful."""
    said = []
    if found.frames > 1 and found.format != "MPO":
        said.append(f"{found.frames} frames, the first is read")
    if found.mode in DEEP:
        said.append("more than 8 bits, stretched between its own lowest and highest value")
    elif found.mode == "CMYK":
        said.append("CMYK, converted without its profile")
    elif found.mode in ("RGBA", "LA", "PA"):
        said.append("transparent, laid over white")
    wanted = FORMATS.get(found.path.suffix.lower())
    if wanted and found.format not in (wanted, "MPO"):
        said.append(f"a {found.format} with the suffix of a {wanted}")
    if one_colour:
        said.append("one colour all over")
    return said


def resized(path: Path, front: FrontEnd) -> Tensor:
    """(3, h, w) uint8 at the front end's size before the crop."""
    return fitted(read(path), front)


def fitted(image: Any, front: FrontEnd) -> Tensor:
    """The same of a Pillow image in RGB."""
    from PIL import Image, ImageOps

    height, width = front.resized
    method = getattr(Image.Resampling, front.interpolation.upper())
    if front.fit == "squash":
        image = image.resize((width, height), method)
    elif front.fit == "pad":
        image = ImageOps.pad(image, (width, height), method)
    else:
        image = ImageOps.fit(image, (width, height), method)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).contiguous()


# ---- evaluation


def crop(image: Tensor, size: tuple[int, int], top: int | None = None, left: int | None = None) -> Tensor:
    """A window of (..., H, W) pictures; without a corner their middle."""
    top = (image.shape[-2] - size[0]) // 2 if top is None else top
    left = (image.shape[-1] - size[1]) // 2 if left is None else left
    return image[..., top : top + size[0], left : left + size[1]]


def views(image: Tensor, size: tuple[int, int], kind: str) -> Iterator[Tensor]:
    """What a picture is scored by, its scores averaged. image (B, 3, H, W) uint8 -> (B, 3, *size) in [0, 1].

    none: the middle.  flip: that and its mirror image.  five_crop: the middle and four corners.  ten_crop: both.
    """
    bottom, right = image.shape[-2] - size[0], image.shape[-1] - size[1]
    corners = [(None, None)]
    if kind in ("five_crop", "ten_crop"):
        corners += [(0, 0), (0, right), (bottom, 0), (bottom, right)]
    for corner in corners:
        view = crop(image, size, *corner).float() / 255
        yield view
        if kind in ("flip", "ten_crop"):
            yield view.flip(-1)


# ---- files


def _opened(path: Path):
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are looked at here
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                return Image.open(path, formats=sorted(set(FORMATS.values())))
            finally:
                Image.MAX_IMAGE_PIXELS = limit
    except UnidentifiedImageError as e:
        kinds = ", ".join(sorted(set(FORMATS.values())))
        raise DataError(f"{path}: not readable as a picture; {kinds} are") from e
    except (OSError, ValueError, SyntaxError) as e:
        raise DataError(f"{path}: damaged ({_reason(e)})") from e


@contextlib.contextmanager
def _decoding(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as e:
        raise DataError(f"{path}: damaged or cut short ({_reason(e)})") from e


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:120].rstrip(".") or type(error).__name__
