"""Mean and standard deviation of log-mel values: what `front_end.mean` and `front_end.std` should be for a data set."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from adaptsuite.audio.backbones import FrontEnd
from adaptsuite.audio.data import inspect, read
from adaptsuite.audio.features import FRAME, HOP, Fbank
from adaptsuite.domain import Domain
from adaptsuite.errors import DataError, UsageError
from adaptsuite.experiment import read_table, rows_named, skipped_rows
from adaptsuite.manifest import split
from adaptsuite.recipe import Recipe

BLOCK = 6000  # frames read at once: a minute


def moments(path: Path, fbank: nn.Module, rate_hz: int) -> np.ndarray:
    """(3,) float64: frames of one file, sum and sum of squares of their log-mel values averaged over the bins.

    Every frame counts once and there is no padding, but for a file shorter than one frame. Longer files than a minute
    are read in blocks that follow each other by whole frames, so memory is bounded; at another rate than the model's
    the resampler then sees an edge at each block. Raises DataError for a damaged file.
    """
    total, seconds, start = np.zeros(3), inspect(path).seconds, 0
    while start == 0 or start < round(seconds * rate_hz):
        wave = read(path, rate_hz, start / rate_hz, (BLOCK * HOP + FRAME - HOP) / rate_hz)
        if start == 0 or len(wave) >= FRAME:
            with torch.no_grad():
                x = fbank(wave[None])[0, :BLOCK].double()
            total += [len(x), float(x.mean(1).sum()), float((x**2).mean(1).sum())]
        start += BLOCK * HOP
    return total


def mean_and_std(total: np.ndarray) -> dict[str, float]:
    """{"mean", "std", "frames"} of summed moments."""
    frames, values, squares = total
    mean = values / frames
    return {"mean": mean, "std": float(np.sqrt(max(squares / frames - mean**2, 0))), "frames": int(frames)}


def dataset_statistics(domain: Domain, recipe: Recipe) -> tuple[list[str], dict[str, Any]]:
    """Lines for a terminal, and {"mean", "std", "frames", "rows", "rates_hz", "seconds", "folds", "set", "skipped"}.

    Of the rows that training by this recipe would train on; with several folds, of each and of all rows that train in
    any. The filter bank is the recipe's backbone's, without one AST's own.
    """
    manifest, data = read_table(domain, recipe), recipe.data
    folds = split(manifest, data.test, data.val, data.cv, recipe.seeds[0], data.shots)
    fbank, rate_hz = _fbank(domain, recipe)
    used = np.unique(np.concatenate([fold.train for fold in folds])).tolist()
    with rows_named(manifest):
        clips = [inspect(manifest.rows[i].path) for i in used]
        found = {i: moments(clip.path, fbank, rate_hz) for i, clip in zip(used, clips, strict=True)}
    whole = mean_and_std(sum(found.values()))
    if whole["std"] == 0:
        raise DataError(f"{manifest.source.name}: all {len(used)} training files are digital silence")
    seconds = np.array([clip.seconds for clip in clips])
    settings = [f"front_end.{name}={whole[name]:.4f}" for name in ("mean", "std")]
    result = {
        **whole,
        "rows": len(used),
        "rates_hz": {str(rate): n for rate, n in Counter(clip.rate_hz for clip in clips).most_common()},
        "seconds": {"min": seconds.min(), "median": np.median(seconds), "max": seconds.max(), "total": seconds.sum()},
        "folds": [{"name": f.name, **mean_and_std(sum(found[i] for i in f.train.tolist()))} for f in folds],
        "set": settings,
        "skipped": list(manifest.skipped),
    }
    lines = [
        f"rows      {len(used)} of {len(manifest)} train" + (" in one fold or another" if len(folds) > 1 else ""),
        *(f"rate      {rate} Hz: {n} files" for rate, n in result["rates_hz"].items()),
        "length    {min:.2f} to {max:.2f} s, median {median:.2f} s, {total:.0f} s in all".format(**result["seconds"]),
        *(f"split     {fold}: {_text(own)}" for fold, own in zip(folds, result["folds"], strict=True)),
        f"log-mel   {_text(whole)} over {whole['frames']:,} frames at {rate_hz} Hz",
        *(f"skipped   {line}" for line in skipped_rows(manifest)),
        "use       " + " ".join(f"--set {setting}" for setting in settings),
    ]
    return lines, result


def _text(found: dict[str, Any]) -> str:
    return f"mean {found['mean']:.4f}, std {found['std']:.4f}"


def _fbank(domain: Domain, recipe: Recipe) -> tuple[nn.Module, int]:
    if not recipe.backbone:
        front = FrontEnd()
        return Fbank(front.num_mel_bins, front.low_hz, front.high_hz), front.sample_rate_hz
    model = domain.model(replace(recipe, method="linear"), ["a", "b"])
    if not model.input.statistics:
        raise UsageError(f"backbone {recipe.backbone!r} is no AST: it takes no mean and std")
    return model.input.fbank, model.front_end.sample_rate_hz
