"""What inference.json says of pictures with labels, pictures with masks, and volumes with masks.

Pictures are opened and resized by Pillow, as for adapters, in the `converter` of MONAI's PILReader: MONAI's own Resize
is another filter. Of three ultrasound pictures at 96 pixels its bicubic differs from Pillow's by up to 54 % of the
range (mean 2 %), with anti_aliasing by up to 12 % (mean .6 %).
"""

from collections.abc import Sequence
from typing import Any

from adaptsuite.front_end import FrontEnd
from adaptsuite.images import DEEP, SUFFIXES
from adaptsuite.medical import volumes
from adaptsuite.medical.area_rule import PIXEL
from adaptsuite.medical.bundle import METADATA

OPENED = {  # as adaptsuite.images.read: turned, over white where transparent, deep ones stretched to their own range
    "stretched": "$lambda v: ((v - v.min()) / max(v.max() - v.min(), 1e-12) * 255).round().astype('uint8')",
    "deep": "$lambda image: Image.fromarray(@stretched(np.asarray(image, dtype='float64'))).convert('RGB')",
    "transparent": "$lambda image: image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info",
    "over_white": "$lambda image: Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)",
    "shallow": "$lambda image: (@over_white(image.convert('RGBA')) if @transparent(image) else image).convert('RGB')",
    "opened": f"$lambda image: @deep(image) if image.mode in {DEEP} else @shallow(ImageOps.exif_transpose(image))",
}
LABELLED = f"$lambda p: torch.where((p > {PIXEL}).any(0, keepdim=True), p.argmax(0, keepdim=True) + 1, 0)"


def classification(front: FrontEnd, multilabel: bool, normalises: bool) -> dict[str, Any]:
    """A CSV of probabilities; normalises: the network does it by itself."""
    path = "pathlib.Path(@output_dir, 'predictions.csv')"
    named = "['network_data_format']['outputs']['pred']['channel_def'].values()"
    facts = f"json.loads(pathlib.Path(@bundle_root, '{METADATA}').read_text(encoding='utf-8')){named}"
    return {
        "suffixes": f"${SUFFIXES}",
        **OPENED,
        "fitted": f"$lambda image: {_fit('@opened(image)', front)}",
        "preprocessing": _compose(_load("@fitted"), *_crop(front), *_scaled(front, normalises)),
        "inferer": {"_target_": "SimpleInferer"},
        "postprocessing": _compose(
            {"_target_": "Activationsd", "keys": "pred", "sigmoid" if multilabel else "softmax": True}
        ),
        # the saver's own rows have no header; names come from where MONAI does not read them as expressions
        "header": f"$','.join('\"' + name.replace('\"', '\"\"') + '\"' for name in ['path', *{facts}])",
        "initialize": [f"${path}.write_text(@header + chr(10), encoding='utf-8')"],
        "handlers": [
            {
                "_target_": "ClassificationSaver",
                "output_dir": "@output_dir",
                "overwrite": False,
                "batch_transform": "$lambda batch: [item['image'].meta for item in batch]",
                "output_transform": "$monai.handlers.from_engine(['pred'])",
            }
        ],
    }


def _compose(*transforms: Any) -> dict[str, Any]:
    return {"_target_": "Compose", "transforms": list(transforms)}


def _load(converter: str) -> dict[str, Any]:
    return {
        "_target_": "LoadImaged",
        "keys": "image",
        "reader": "PILReader",
        "converter": converter,
        "reverse_indexing": False,
        "ensure_channel_first": True,
    }


def _fit(image: str, front: FrontEnd) -> str:
    """An expression that resizes as adaptsuite.images.fitted does."""
    tall, wide = front.resized
    filter = f"Image.Resampling.{front.interpolation.upper()}"
    if front.fit == "squash":
        return f"{image}.resize(({wide}, {tall}), {filter})"
    return f"ImageOps.{'pad' if front.fit == 'pad' else 'fit'}({image}, ({wide}, {tall}), {filter})"


def _crop(front: FrontEnd) -> list[dict[str, Any]]:
    """The middle: MONAI's CenterSpatialCrop rounds the other way for odd sizes in even ones."""
    (height, width), (tall, wide) = front.size, front.resized
    if front.resized == front.size:
        return []
    top, left = (tall - height) // 2, (wide - width) // 2
    ends = {"roi_start": [top, left], "roi_end": [top + height, left + width]}
    return [{"_target_": "SpatialCropd", "keys": "image", **ends}]


def _scaled(front: FrontEnd, normalises: bool) -> list[dict[str, Any]]:
    scale = {"_target_": "ScaleIntensityRanged", "keys": "image", "a_min": 0, "a_max": 255, "b_min": 0, "b_max": 1}
    normal = {"_target_": "NormalizeIntensityd", "keys": "image", "channel_wise": True}
    if normalises:
        return [scale]
    return [scale, {**normal, "subtrahend": list(front.mean), "divisor": list(front.std)}]


def pictures_with_masks(front: FrontEnd) -> dict[str, Any]:
    """A PNG of labels beside each picture, at its size: 0, or k for class k, as adaptsuite.medical.seg_predict has it.

    The network normalises by itself.
    """
    height, width = front.size
    fit = _fit("Image.fromarray(np.moveaxis(np.asarray(x), 0, -1).astype('uint8'))", front)
    save = {"_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir", "output_dtype": "$np.uint8"}
    inner = f"(min({height}, round(tall / wide * {width})), min({width}, round(wide / tall * {height})))"
    return {
        "suffixes": f"${SUFFIXES}",
        **OPENED,
        "resized": f"$lambda x: monai.data.MetaTensor(np.moveaxis(np.asarray({fit}), -1, 0).astype('f4'), meta=x.meta)",
        "preprocessing": _compose(
            _load("@opened"), {"_target_": "Lambdad", "keys": "image", "func": "@resized"}, *_scaled(front, True)
        ),
        "inferer": {"_target_": "SimpleInferer"},
        # the picture's place within the input
        "inner": f"$lambda tall, wide: {inner if front.fit == 'pad' else front.size}",
        "placed": f"$lambda p, h, w: p[:, round(({height} - h) / 2):, round(({width} - w) / 2):][:, :h, :w]",
        "at_size": "$lambda p, size: torch.nn.functional.interpolate(@placed(p, *@inner(*size))[None], size, "
        "mode='bilinear', align_corners=False)[0]",
        "size": "$lambda item: tuple(int(n) for n in item['image'].meta['spatial_shape'])[::-1]",
        "labelled": LABELLED,
        "postprocessing": _compose(
            {"_target_": "Activationsd", "keys": "pred", "sigmoid": True},
            "$lambda item: {**item, 'pred': @labelled(@at_size(item['pred'], @size(item))).transpose(1, 2)}",
            {**save, "output_postfix": "mask", "output_ext": ".png", "resample": False, "separate_folder": False},
        ),
    }


def volumes_with_masks(
    size: Sequence[int],
    codes: str = "SPL",
    window_hu: tuple[float, float] | None = None,
    spacing_mm: Sequence[float] | None = None,
    overlap: float = 0.5,
) -> dict[str, Any]:
    """A mask beside each NIfTI file, on its grid: 0, or k for class k, as adaptsuite.medical.seg_volume has it.

    codes: where the axes of what the network sees grow to.  window_hu: (centre, width).
    """
    centre, width = window_hu or (0.5, 1.0)
    ends = {"a_min": centre - width / 2, "a_max": centre + width / 2, "b_min": 0, "b_max": 1, "clip": True}
    scale = [{"_target_": "ScaleIntensityRanged", "keys": "image", **ends}] if window_hu else []
    spacing = {"_target_": "Spacingd", "keys": "image", "mode": "bilinear"}
    invert = {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image"}
    save = {"_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir", "output_dtype": "$np.uint8"}
    return {
        "suffixes": f"${volumes.SUFFIXES}",
        "preprocessing": _compose(
            {"_target_": "LoadImaged", "keys": "image", "reader": "NibabelReader", "ensure_channel_first": True},
            {
                "_target_": "Orientationd",
                "keys": "image",
                "axcodes": codes,
                "labels": [["L", "R"], ["P", "A"], ["I", "S"]],
            },
            *scale,
            *([{**spacing, "pixdim": list(spacing_mm)}] if spacing_mm else []),
            {"_target_": "EnsureTyped", "keys": "image", "dtype": "$torch.float32"},
        ),
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": list(size),
            "sw_batch_size": 1,
            "overlap": overlap,
            "mode": "gaussian",
        },
        "labelled": LABELLED,
        "postprocessing": _compose(
            {"_target_": "Activationsd", "keys": "pred", "sigmoid": True},
            {**invert, "nearest_interp": False, "to_tensor": True},
            {"_target_": "Lambdad", "keys": "pred", "func": "@labelled"},
            {**save, "output_postfix": "mask", "output_ext": ".nii.gz", "resample": False, "separate_folder": False},
        ),
    }
