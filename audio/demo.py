"""`make demo` for sounds: the embedded backbone, generated clips, four methods, one report; no network, no files."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from adaptsuite import experiment
from adaptsuite.demo import exhibit
from adaptsuite.recipe import Recipe, load_recipe
from adaptsuite.report import comparison_row, read_run

METHODS = ("linear", "lora", "audio.soft_moa", "full")
EPOCHS = {"linear": 4, "lora": 6, "audio.soft_moa": 6, "full": 4}


def run(out: str | Path, classes: int = 6, clips: int = 30, methods: tuple[str, ...] = METHODS) -> dict:
    """Writes OUT/audio/data, a run for each method, and the report beside the recipe's own run; returns its result."""
    from adaptsuite.audio.pipeline import DOMAIN
    from adaptsuite.audio.synthetic import make_dataset

    folder = Path(out) / "audio"
    table = make_dataset(folder / "data", num_classes=classes, clips_per_class=clips)
    print(f"data      {table}: generated sounds, {classes} classes, {clips} clips each", flush=True)
    print(f"\n{'method':<16} {'trained':>10}  accuracy [95 % interval]   seconds", flush=True)
    rows, result = [], {}
    for method in sorted(methods, key=lambda m: m == "audio.soft_moa"):  # last: its report shows the others beside it
        shipped = load_recipe("soft-moa", "audio", DOMAIN.sections)
        recipe = shipped if method == shipped.method else Recipe("audio", shipped.backbone, method=method)
        data = replace(recipe.data, manifest=str(table), test="fold=4", val="fold=3")
        recipe = replace(recipe, data=data, plan={**recipe.plan, "epochs": EPOCHS[method], "batch_size": 16})
        settled, manifest = experiment.settle(DOMAIN, recipe)
        result = experiment.run(DOMAIN, settled, manifest, folder / method, comparison=rows)
        row = comparison_row(read_run(folder / method))
        rows.append(row)
        low, high = row["accuracy"]["ci"]
        value = f"{row['accuracy']['value']:.3f} [{low:.3f}, {high:.3f}]"
        print(f"{row['method']:<16} {row['trained']:>10,}  {value}   {row['seconds']:.0f}", flush=True)
    print(f"\nreport    {result['report']}")
    sounds = sorted(path for label in sorted(folder.glob("data/*/")) for path in sorted(label.glob("*.wav"))[:1])
    return result | exhibit(
        folder,
        f"{classes} kinds of generated sound, told apart by Soft-MoA",
        "accuracy",
        rows[-1]["accuracy"],
        f"chance {1 / classes:.3f}",
        [spectrogram(path) for path in sounds[:4]],
        "adapt audio train --data FOLDER_OF_CLASSES --recipe soft-moa --out runs/mine",
    )


def spectrogram(path: Path) -> np.ndarray:
    """(F, T, 3) uint8, low tones below, of a mono file."""
    import matplotlib
    import soundfile
    import torch

    from adaptsuite.audio.features import Fbank

    wave, _ = soundfile.read(path, dtype="float32")
    mel = Fbank()(torch.from_numpy(wave)[None])[0].T.flip(0).numpy()
    low, high = np.percentile(mel, (5, 99.5))
    shade = np.clip((mel - low) / (high - low), 0, 1)
    return (matplotlib.colormaps["magma"](shade)[..., :3] * 255).astype(np.uint8)
