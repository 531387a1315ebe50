"""Frozen features of `embedded:audio-tiny` on real recordings: ESC-10 by fold, spoken digits by unseen speaker.

python tests/benchmarks/audio_probe.py [--data DIR] [--weights FILE] [--seeds 3] [--json FILE] [--readouts]

Logistic regression on standardised features. The rows to beat stand beside it: random weights, log-mel statistics, and
descriptors that an engineer would measure, which need no network at all.
"""

import argparse
import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
import conftest  # noqa: E402, F401  finds the packages in a bare clone

from adaptsuite.audio.data import read  # noqa: E402
from adaptsuite.audio.features import Fbank, normalise  # noqa: E402
from adaptsuite.audio.pretrain import FRONT_END, columns, descriptors, forward, new_model  # noqa: E402

SETS = {"esc10": ("audio_esc10", "fold", 498), "fsdd": ("audio_fsdd", "speaker", 98)}
GATES = {"esc10": (0.82, 0.15), "fsdd": (0.53, 0.06)}  # accuracy, and lead over random weights


def load_clips(folder: Path, split: str, frames: int, every: int = 1) -> dict[str, np.ndarray | Tensor]:
    """log_mel (N, frames, 64) padded with silence, the sounding frames of each, labels, and the fold or speaker."""
    with open(folder / "manifest.csv", newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))[::every]
    fbank = Fbank(FRONT_END["num_mel_bins"], FRONT_END["low_hz"], FRONT_END["high_hz"])
    log_mel = torch.full((len(rows), frames, FRONT_END["num_mel_bins"]), float(fbank.floor))
    length = torch.zeros(len(rows), dtype=torch.long)
    for i, row in enumerate(rows):
        x = fbank(read(folder / row["path"], FRONT_END["sample_rate_hz"])[None])[0, :frames]
        log_mel[i, : len(x)], length[i] = x, len(x)
    label, part = (np.array([row[k] for row in rows]) for k in ("label", split))
    x = normalise(log_mel, FRONT_END["mean"], FRONT_END["std"])
    return {"x": x, "length": length, "label": label, "part": part}


@torch.no_grad()
def token_grid(model: nn.Module, x: Tensor, batch: int = 64) -> Tensor:
    return torch.cat([forward(model, part) for part in x.split(batch)])


def statistics(tokens: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    mean = (tokens * weight).sum(1) / weight.sum(1)
    return mean, (((tokens - mean[:, None]).square() * weight).sum(1) / weight.sum(1) + 1e-6).sqrt()


def read_outs(model: nn.Module, clips: dict) -> dict[str, Tensor]:
    """Every way to make one vector of a clip's tokens."""
    x, length = clips["x"], clips["length"]
    tokens = token_grid(model, x)
    cols = columns(x.shape[1])
    middle = torch.arange(cols) * 16 + 8
    real = ((middle < length[:, None]) | (torch.arange(cols) == 0)).float()  # (N, columns)
    weight = torch.cat([torch.ones(len(x), 2), real.repeat(1, 4)], 1)[..., None]
    everything = torch.ones_like(weight)
    mean, std = statistics(tokens, everything)
    real_mean, real_std = statistics(tokens, weight)
    cls = tokens[:, 0]
    low = tokens.masked_fill(weight == 0, -1e4).amax(1)
    out = {
        "cls": cls,
        "mean": mean,
        "mean masked": real_mean,
        "cls+mean+std": torch.cat([cls, mean, std], 1),
        "cls+mean+std masked": torch.cat([cls, real_mean, real_std], 1),
        "mean+std masked": torch.cat([real_mean, real_std], 1),
        "mean+max masked": torch.cat([real_mean, low], 1),
    }
    grid = tokens[:, 2:].unflatten(1, (4, cols)).mean(1)  # (N, columns, D)
    share = (torch.arange(cols) + 0.5) / torch.ceil(length / 16).clamp(1, cols)[:, None]
    chunks = [grid * ((share >= i / 4) & (share < (i + 1) / 4))[..., None] for i in range(4)]
    chunks = [c.sum(1) / (c.abs().sum(2) > 0).sum(1, keepdim=True).clamp_min(1) for c in chunks]
    out["cls+mean+std masked+4 chunks"] = torch.cat([out["cls+mean+std masked"], *chunks], 1)
    by_row = [statistics(tokens[:, 2:].unflatten(1, (4, cols))[:, r], real[..., None]) for r in range(4)]
    out["cls+mean+std per row"] = torch.cat([cls, *(part for pair in by_row for part in pair)], 1)
    if x.shape[1] >= 4 * 124:  # four windows of 1.28 s
        windows = torch.stack([x[:, s : s + 128] for s in (0, 123, 246, 370)], 1).flatten(0, 1)
        t = token_grid(model, windows)
        w = torch.cat([t[:, 0], *statistics(t, torch.ones_like(t[..., :1]))], 1).unflatten(0, (len(x), 4))
        out["4 windows cls+mean+std, mean+max"] = torch.cat([w.mean(1), w.amax(1)], 1)
    return out


def accuracy(features: np.ndarray, clips: dict, strength: float = 0.1) -> tuple[float, list[float]]:
    """Mean and per left-out part; ridge-like logistic regression on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scores = []
    for part in np.unique(clips["part"]):
        test = clips["part"] == part
        scale = StandardScaler().fit(features[~test])
        fit = LogisticRegression(C=strength, max_iter=300).fit(scale.transform(features[~test]), clips["label"][~test])
        scores.append(float(fit.score(scale.transform(features[test]), clips["label"][test])))
    return float(np.mean(scores)), scores


def no_network(clips: dict) -> dict[str, np.ndarray]:
    """log-mel mean, deviation, maximum over the sounding frames; and the descriptors of adaptsuite.audio.pretrain."""
    x, length = clips["x"], clips["length"]
    cut = [x[i, : max(int(n), 16)] for i, n in enumerate(length)]
    plain = torch.stack([torch.cat([c.mean(0), c.std(0), c.amax(0)]) for c in cut])
    measured = torch.cat([descriptors(c[None]) for c in cut])
    return {"log-mel mean/std/max": plain.numpy(), "engineered descriptors": measured.numpy()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = os.environ.get("ADAPTSUITE_DATA", ROOT.parent / "shared" / "data")
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--weights", type=Path, default=ROOT / "audio" / "weights" / "audio-tiny.safetensors")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every", type=int, default=1, help="take every n-th digit")
    parser.add_argument("--readouts", action="store_true", help="compare all read-outs, not only cls+mean+std")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name, (folder, split, frames) in SETS.items():
        if not (arguments.data / folder / "manifest.csv").is_file():
            print(f"{name}  skipped: {arguments.data / folder} is absent")
            continue
        clips = load_clips(arguments.data / folder, split, frames, arguments.every if name == "fsdd" else 1)
        found[name] = judge(name, clips, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def judge(name: str, clips: dict, arguments: argparse.Namespace) -> dict:
    from safetensors.torch import load_file

    rows = {}

    def show(arm: str, read_out: str, features) -> None:
        mean, parts = accuracy(np.asarray(features), clips)
        rows.setdefault(arm, {})[read_out] = {"accuracy": round(mean, 4), "parts": [round(p, 4) for p in parts]}
        print(f"{name:6}  {arm:24} {read_out:34} {mean:.3f}  {' '.join(f'{p:.3f}' for p in parts)}", flush=True)

    main_one = "cls+mean+std masked"
    arms = {"embedded": 0} if arguments.weights.is_file() else {}
    arms |= {f"random weights seed {seed}": seed for seed in range(arguments.seeds)}
    for arm, seed in arms.items():
        model = new_model(seed).eval()
        if arm == "embedded":
            model.load_state_dict(load_file(arguments.weights))
        for read_out, features in read_outs(model, clips).items():
            if arguments.readouts or read_out == main_one:
                show(arm, read_out, features.numpy())
    for arm, features in no_network(clips).items():
        show(arm, "-", features)
    if "embedded" in rows and arguments.seeds:
        own = rows["embedded"][main_one]["accuracy"]
        chance = float(np.mean([r[main_one]["accuracy"] for arm, r in rows.items() if arm.startswith("random")]))
        least, lead = GATES[name]
        passed = own >= least and own >= chance + lead
        rows["gate"] = {"accuracy": own, "random": chance, "at_least": least, "lead": lead, "passed": bool(passed)}
        word = "passed" if passed else "MISSED"
        print(f"{name:6}  gate {word}: {own:.3f} >= {least}, lead over random {own - chance:+.3f} >= {lead}")
    return rows


if __name__ == "__main__":
    main()
