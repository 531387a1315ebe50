"""`adapt audio`: the common verbs, for sounds; `predict` also finds events, `stats` is audio's own."""

from pathlib import Path
from typing import Annotated

import typer

from adaptsuite.commands import (
    AdapterFolder,
    Backbone,
    BatchSize,
    Console,
    Cv,
    Data,
    Device,
    Files,
    Json,
    RandomWeights,
    RecipeName,
    Seed,
    Setting,
    SkipBad,
    Test,
    Val,
    adapter_folder,
    domain_app,
    predict_files,
    read_recipe,
)
from adaptsuite.errors import UsageError

FRAMES = "front_end.frames"

app = domain_app(
    "audio",
    "Classify sounds with Audio Spectrogram Transformers and adapters.",
    ("--frames", FRAMES, "Input length in frames of 10 ms; by default the longest clip, at most 1024."),
    exports="hf (for transformers), torch, onnx or peft.",
    own=("predict",),
)

Events = Annotated[bool, typer.Option("--events", help="When each label is heard, in recordings of any length.")]
Hop = Annotated[float | None, typer.Option("--hop", help="Seconds from window to window; by default half a window.")]
Threshold = Annotated[float | None, typer.Option("--threshold", help="Least probability of a label; by default 0.5.")]
MinDuration = Annotated[float | None, typer.Option("--min-duration", help="Seconds: shorter events are dropped.")]
Merge = Annotated[float | None, typer.Option("--merge", help="Seconds: gaps of at most this in a label are closed.")]
Smooth = Annotated[int | None, typer.Option("--smooth", help="Windows of a running median, odd.")]
Ignore = Annotated[str | None, typer.Option("--ignore", help="LABEL[,LABEL]: never events, such as background.")]
Format = Annotated[
    str | None, typer.Option("--format", help="csv, jsonl (one table), raven, audacity (one for each recording).")
]
Out = Annotated[str | None, typer.Option("--out", help="CSV of the labels; with --events table, or folder of tables.")]


@app.command()
def predict(
    adapter: AdapterFolder,
    files: Files,
    events: Events = False,
    hop: Hop = None,
    threshold: Threshold = None,
    min_duration: MinDuration = None,
    merge: Merge = None,
    smooth: Smooth = None,
    ignore: Ignore = None,
    form: Format = None,
    out: Out = None,
    batch_size: BatchSize = None,
    device: Device = None,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Label files, or all files below folders; with --events, say when each label is heard in them."""
    given = {
        "hop_s": hop,
        "threshold": threshold,
        "min_duration_s": min_duration,
        "merge_s": merge,
        "smooth": smooth,
        "ignore": None if ignore is None else tuple(ignore.split(",")),
    }
    given = {name: value for name, value in given.items() if value is not None}
    console = Console(as_json)
    if not events:
        if given or form is not None:
            raise UsageError("--hop, --threshold, --min-duration, --merge, --smooth, --ignore, --format need --events")
        from adaptsuite.audio.pipeline import DOMAIN

        return predict_files(console, DOMAIN, adapter, files, batch_size, device, out, skip_bad)
    if form is not None and out is None:
        raise UsageError(f"--format {form} needs --out, where to write it")
    from adaptsuite.audio.classifier import detect
    from adaptsuite.audio.events import as_row, write_events

    target = None if out is None else (Path(out), form or "csv")

    def say(found) -> None:
        for e in found.events:
            console.say(f"{found.path}\t{e.start_s:.3f}\t{e.end_s:.3f}\t{e.label}\t{e.score:.3f}")

    found, remarks = detect(adapter_folder(adapter), files, given, target, say, device, batch_size, skip_bad)
    console.remarks(remarks)
    written = [] if target is None else [str(path) for path in write_events(*target, found)]
    rows = [{"path": str(recording.path), **as_row(e)} for recording in found for e in recording.events]
    console.say(f"{len(rows)} events in {len(found)} recordings" + "".join(f"  {path}" for path in written[:1]))
    console.result({"events": rows, **remarks, "out": written})


@app.command()
def stats(
    data: Data = None,
    backbone: Backbone = None,
    random_weights: RandomWeights = False,
    setting: Setting = None,
    recipe_name: RecipeName = None,
    test: Test = None,
    val: Val = None,
    cv: Cv = None,
    seed: Seed = None,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Mean and std of the training rows' log-mel values, as settings to copy, with their rates and lengths."""
    options = {**locals(), "size": (FRAMES, None)}
    from adaptsuite.audio.pipeline import DOMAIN
    from adaptsuite.audio.stats import dataset_statistics

    console = Console(as_json)
    lines, found = dataset_statistics(DOMAIN, read_recipe(DOMAIN, options))
    console.say(*lines)
    console.result(found)


def main() -> int:
    """`adapt-audio ...` is `adapt audio ...`."""
    import sys

    from adaptsuite.cli import main as root

    return root(["audio", *sys.argv[1:]])
