"""Events of one hour and of ten minutes, built from ESC-10 clips at known times: recall, precision, peak memory.

python tests/benchmarks/audio_long.py [--data FOLDER] [--method linear] [--epochs 1] [--frames 300] [--hop 1]
    [--threshold 0.4] [--smooth 5] [--merge 1] [--seed 0] [--json FILE]

An adapter learns the clips of folds 1-3 (but one source of each class) and a background class, all over low noise; the
recordings hold clips of fold 4, 5 to 25 s apart, up to 6 dB louder or softer. A true event is a clip without the
silence around it. It is found when one detection of its label covers half of it; a detection is right when it and an
event of its label share half of the shorter one. Each recording is read in a process of its own, whose peak memory must
not grow with the length. The settings were chosen on recordings of fold 3 with an adapter of folds 1 and 2.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
import conftest  # noqa: E402, F401  finds the packages in a bare clone
import numpy as np  # noqa: E402

RATE_HZ, NOISE, BACKGROUND = 16000, 2e-3, "background"


def arguments() -> argparse.Namespace:
    data = Path(os.environ.get("ADAPTSUITE_DATA", ROOT.parent / "shared" / "data")) / "audio_esc10"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(data))
    parser.add_argument("--method", default="linear")
    parser.add_argument("--epochs", default="1")
    parser.add_argument("--hop", type=float, default=1.0)
    parser.add_argument("--frames", default="300")
    parser.add_argument("--threshold", type=float, default=0.4)
    parser.add_argument("--smooth", type=int, default=5)
    parser.add_argument("--merge", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    parser.add_argument("--detect", nargs=2, metavar=("ADAPTER", "RECORDING"), help=argparse.SUPPRESS)
    return parser.parse_args()


def training_set(folder: Path, rows: list[dict[str, str]], data: Path, rng: np.random.Generator) -> Path:
    """Clips of folds 1-3 over noise, and as many clips of noise alone as a class has."""
    import soundfile

    lines = ["path,label,part,group"]
    kept_back = {row["label"]: row["group"] for row in rows if row["fold"] == "3"}  # training wants to test something
    for i, row in enumerate(r for r in rows if r["fold"] in "123"):
        part = "check" if row["group"] == kept_back[row["label"]] else "train"
        wave, _ = soundfile.read(data / row["path"])
        soundfile.write(folder / f"{i}.wav", wave + NOISE * rng.normal(size=len(wave)), RATE_HZ, subtype="FLOAT")
        lines.append(f"{i}.wav,{row['label']},{part},{row['group']}")
    for i in range(24):
        noise = NOISE * 10 ** rng.uniform(-0.5, 0.5) * rng.normal(size=5 * RATE_HZ)
        soundfile.write(folder / f"noise{i}.wav", noise, RATE_HZ, subtype="FLOAT")
        lines.append(f"noise{i}.wav,{BACKGROUND},{'train' if i else 'check'},noise{i}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder / "manifest.csv"


def record(path: Path, minutes: int, rows: list[dict[str, str]], data: Path, rng: np.random.Generator) -> list[dict]:
    """Writes a recording piece by piece; its true events."""
    import soundfile

    clips, truth, at = [r for r in rows if r["fold"] == "4"], [], 0
    with soundfile.SoundFile(path, "w", RATE_HZ, 1, subtype="PCM_16") as file:
        while at < minutes * 60 * RATE_HZ:
            row = clips[rng.integers(len(clips))]
            wave = soundfile.read(data / row["path"])[0] * 10 ** rng.uniform(-0.3, 0.3)
            gap = int(rng.uniform(5, 25) * RATE_HZ)
            heard = np.flatnonzero(np.abs(wave) > NOISE)
            if at + gap + len(wave) <= minutes * 60 * RATE_HZ and len(heard):
                times = [(at + gap + int(i)) / RATE_HZ for i in (heard[0], heard[-1] + 1)]
                truth.append({"label": row["label"], "start_s": times[0], "end_s": times[1]})
                piece = np.concatenate([np.zeros(gap), wave])
            else:
                piece = np.zeros(minutes * 60 * RATE_HZ - at)
            at += len(piece)
            file.write(np.clip(piece + NOISE * rng.normal(size=len(piece)), -1, 1))
    return truth


def detect(adapter: str, recording: str, given: argparse.Namespace) -> None:
    """In a process of its own: events, seconds and peak memory, as one JSON object."""
    from dataclasses import asdict

    from adaptsuite import audio

    classifier = audio.load(adapter, device="cpu")
    start = time.perf_counter()
    settings = {"hop_s": given.hop, "threshold": given.threshold, "merge_s": given.merge, "smooth": given.smooth}
    events = [asdict(event) for event in classifier.events(recording, ignore=(BACKGROUND,), **settings)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"events": events, "seconds": time.perf_counter() - start, "peak_bytes": peak}))


def shared(a: dict, b: dict) -> float:
    """Seconds that two events of one label have in common."""
    return (min(a["end_s"], b["end_s"]) - max(a["start_s"], b["start_s"])) if a["label"] == b["label"] else 0.0


def length(event: dict) -> float:
    return event["end_s"] - event["start_s"]


def main() -> None:
    given = arguments()
    if given.detect:
        return detect(*given.detect, given)
    import csv

    from adaptsuite.cli import main as adapt

    data, rng, table = Path(given.data), np.random.default_rng(given.seed), []
    rows = list(csv.DictReader((data / "manifest.csv").open()))
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        (folder / "clips").mkdir()
        manifest = training_set(folder / "clips", rows, data, rng)
        options = [
            "--data",
            manifest,
            "--backbone",
            "embedded:audio-tiny",
            "--method",
            given.method,
            "--test",
            "part=check",
        ]
        options += [
            "--val",
            "none",
            "--frames",
            given.frames,
            "--epochs",
            given.epochs,
            "--seed",
            given.seed,
            "--device",
            "cpu",
        ]
        if adapt(["audio", "train", *map(str, options), "--out", str(folder / "run")]) != 0:
            sys.exit(1)
        for minutes in (10, 60):
            path = folder / f"{minutes}.flac"
            truth = record(path, minutes, rows, data, rng)
            command = [sys.executable, __file__, *sys.argv[1:], "--detect", folder / "run", path]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            found = json.loads(done.stdout)
            events = found.pop("events")
            hits = [any(shared(e, t) >= length(t) / 2 for e in events) for t in truth]
            right = [any(shared(e, t) >= min(length(t), length(e)) / 2 for t in truth) for e in events]
            by_label = {
                label: [sum(h for h, t in zip(hits, truth, strict=True) if t["label"] == label), count]
                for label in sorted({t["label"] for t in truth})
                for count in [sum(t["label"] == label for t in truth)]
            }
            counts = {"events": len(truth), "found": sum(hits), "detections": len(events), "right": sum(right)}
            table.append({"minutes": minutes, **counts, **found, "by_label": by_label})
            print(
                f"{minutes:>3} min  recall {sum(hits) / len(truth):.3f} ({sum(hits)} of {len(truth)})  precision "
                f"{sum(right) / max(len(events), 1):.3f} ({sum(right)} of {len(events)})  {found['seconds']:.0f} s  "
                f"peak {found['peak_bytes'] / 2**20:.0f} MiB",
                flush=True,
            )
    print("found of true, one hour: " + ", ".join(f"{k} {a}/{b}" for k, (a, b) in table[-1]["by_label"].items()))
    ratio = table[1]["peak_bytes"] / table[0]["peak_bytes"]
    print(f"peak memory of one hour / of ten minutes: {ratio:.3f}")
    if given.json:
        Path(given.json).write_text(json.dumps(table, indent=1))
    if not 0.9 <= ratio <= 1.1:
        sys.exit("peak memory grows with the length of the recording")


if __name__ == "__main__":
    main()
