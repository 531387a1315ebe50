"""Draws overview.png, the picture of the README: python notebooks/overview.py"""

import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image

from adaptsuite.audio import synthetic as sounds
from adaptsuite.medical import synthetic as patients
from adaptsuite.vision import synthetic as pictures
from adaptsuite.vl import synthetic as scenes

INK, BLOCK, ADAPTER, SOFT = "#26323d", "#dde3e9", "#c4622d", "#8a96a1"
DOMAINS = {
    "audio": ("recordings of any length", "animals, machines, speech"),
    "vision": ("pictures", "cultivars, leaves, groceries"),
    "medical": ("DICOM, NIfTI, frames", "findings, masks, SR reports"),
    "vl": ("pictures and words", "answers, captions, retrieval"),
}
GIVEN = (
    ("an adapter", "a few megabytes, bound to its backbone"),
    ("a report", "intervals by group, calibration, pictures"),
    ("commands", "check  budget  train  predict  serve  export"),
)


def samples() -> dict[str, np.ndarray]:
    """One drawn sample of each domain: a spectrogram, a leaf, an ultrasound frame, a scene."""
    rng = np.random.default_rng(7)
    wave = sounds.render([sounds.scene(sounds.sample_latent(rng), 32000, rng)], 32000, rng)[0].numpy()
    frames = np.lib.stride_tricks.sliding_window_view(wave, 512)[::160] * np.hanning(512)
    power = np.log(np.abs(np.fft.rfft(frames))[:, :160].T + 1e-3)
    with tempfile.TemporaryDirectory() as folder:
        pictures.make_dataset(folder, cultivars=1, shots=1, tests=1, separation=4.0, size=160)
        leaf = np.asarray(Image.open(next(Path(folder).glob("*/*.png"))).convert("RGB"))
    frame, _ = next(iter(patients.frames(patients.sample_patient(rng, True), 1)))
    scene = scenes.render(np.array([12345]), rng)[0].transpose(1, 2, 0)
    return {"audio": power[::-1], "vision": leaf, "medical": frame, "vl": scene}


def box(axis, x: float, y: float, width: float, height: float, color: str, edge: str = "none", radius: float = 0.6):
    style = f"round,pad=0,rounding_size={radius}"
    axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor=edge, lw=1.2))


def arrow(axis, x: float, to: float, y: float) -> None:
    axis.add_patch(FancyArrowPatch((x, y), (to, y), arrowstyle="-|>", mutation_scale=16, color=SOFT, lw=1.6))


def main() -> None:
    figure = plt.figure(figsize=(12, 4.3), dpi=110, facecolor="white")
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, 120), ylim=(0, 43))
    axis.axis("off")
    for row, (name, image) in enumerate(samples().items()):
        y, (data, uses) = 33.2 - row * 9.9, DOMAINS[name]
        small = figure.add_axes((2 / 120, y / 43, 11 / 120, 8 / 43))
        small.imshow(image, aspect="auto", cmap="magma" if name == "audio" else "gray")
        small.axis("off")
        axis.text(14.4, y + 5.7, f"adapt {name}", fontsize=12, weight="bold", color=INK, family="monospace")
        axis.text(14.4, y + 3.2, data, fontsize=9.5, color=INK)
        axis.text(14.4, y + 1.0, uses, fontsize=9.5, color=SOFT)
    arrow(axis, 38, 43, 21.5)
    axis.text(60, 39.3, "frozen backbone", fontsize=13, weight="bold", color=INK, ha="center")
    axis.text(60, 36.6, "timm · transformers · open_clip · MONAI · yours", fontsize=9.5, color=SOFT, ha="center")
    for block in range(6):
        x = 45.2 + block * 5
        box(axis, x, 9, 3.8, 24.5, BLOCK)
        box(axis, x + 2.5, 26.5, 2.1, 3.6, ADAPTER, radius=0.4)
        box(axis, x + 2.5, 13, 2.1, 3.6, ADAPTER, radius=0.4)
    axis.text(59.5, 21.4, "its weights, keys and class stay as they are", fontsize=8.5, color=INK, ha="center")
    box(axis, 50.2, 4.2, 1.5, 2.4, ADAPTER, radius=0.3)
    axis.text(52.6, 4.7, "adapters: all that is trained", fontsize=10, color=ADAPTER, weight="bold")
    arrow(axis, 76.5, 81.5, 21.5)
    for row, (name, what) in enumerate(GIVEN):
        y = 28 - row * 10.8
        box(axis, 84, y, 34, 8.6, "#f6f8fa", "#d5dce3")
        axis.text(86, y + 5.2, name, fontsize=12.5, weight="bold", color=INK)
        axis.text(86, y + 2.1, what, fontsize=9.2, color=INK)
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
