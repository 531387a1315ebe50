"""`adapt medical`: the common verbs, for pictures, DICOM and NIfTI of patients; `predict` also takes whole studies."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from adaptsuite.commands import (
    AdapterFolder,
    Backbone,
    BatchSize,
    Console,
    Data,
    Device,
    Json,
    RandomWeights,
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
from adaptsuite.errors import DataError, UsageError

SIZE = "front_end.size"

app = domain_app(
    "medical",
    "Fit medical foundation models to one finding, with evidence by patient.",
    ("--image-size", SIZE, "Side of the input in pixels; by default the backbone's own (--set front_end.size=H,W)."),
    exports="monai-bundle, monai-bundle-adapter (weights apart), timm (for timm.create_model), torch, onnx or peft.",
    own=("predict",),
)

Sources = Annotated[
    list[str], typer.Argument(metavar="FILE...", help="Files or folders of them; with --format folders of studies.")
]
Format = Annotated[
    str | None, typer.Option("--format", help="Of studies: seg, sr, overlay (DICOM), nifti (a mask) or json.")
]
OutFolder = Annotated[str | None, typer.Option("--out", help="CSV of the labels; of studies the folder of findings.")]
Masks = Annotated[
    str | None, typer.Option("--masks", help="Folder that gets a mask (PNG) of each picture, by an adapter of masks.")
]
Audit = Annotated[str | None, typer.Option("--audit", help="Log that gets a line for each study.")]
AuditKey = Annotated[str | None, typer.Option("--audit-key", help="File of the log's key; by default LOG.key.")]
Secret = Annotated[
    str | None,
    typer.Option("--deidentify", help="File with a secret of 16 characters or more: patients and UIDs become hashes."),
]
BurnedIn = Annotated[
    bool, typer.Option("--allow-burned-in", help="Read files that say that text is burned into their pixels.")
]
Watch = Annotated[bool, typer.Option("--watch", help="Take study folders as they arrive in one folder.")]
Poll = Annotated[float | None, typer.Option("--poll", help="Seconds between looks at the folder; by default 5.")]
Settle = Annotated[
    float | None, typer.Option("--settle", help="Seconds without a change until a study is taken; by default 10.")
]
Once = Annotated[bool, typer.Option("--once", help="Take what is there, and stop.")]
Retry = Annotated[bool, typer.Option("--retry", help="Take studies that failed before once more.")]


@app.command()
def predict(
    adapter: AdapterFolder,
    files: Sources,
    form: Format = None,
    out: OutFolder = None,
    masks: Masks = None,
    audit: Audit = None,
    audit_key: AuditKey = None,
    deidentify: Secret = None,
    allow_burned_in: BurnedIn = False,
    watch: Watch = False,
    poll: Poll = None,
    settle: Settle = None,
    once: Once = False,
    retry: Retry = False,
    batch_size: BatchSize = None,
    device: Device = None,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Label files, or all files below folders; with --format, read studies and write findings of each to --out."""
    console = Console(as_json)
    timed = {"poll_s": poll, "settle_s": settle}
    if not watch and (once or retry or poll is not None or settle is not None):
        raise UsageError("--poll, --settle, --once and --retry need --watch")
    if form is None and not watch:
        if audit or audit_key or deidentify or allow_burned_in:
            raise UsageError("--audit, --audit-key, --deidentify and --allow-burned-in need --format")
        from adaptsuite.medical.pipeline import DOMAIN

        label = None
        if masks is not None:
            from adaptsuite.medical.seg_predict import write_masks

            label = partial(write_masks, out=masks)
        return predict_files(console, DOMAIN, adapter, files, batch_size, device, out, skip_bad, label)
    if masks is not None:
        raise UsageError("--masks is for pictures; masks of studies are --format nifti or seg")
    if out is None:
        raise UsageError("--out is missing: the folder that gets the findings of each study")
    if watch and len(files) > 1:
        raise UsageError(f"--watch looks at one folder, {len(files)} are given")
    from adaptsuite.medical import serve

    options = {
        "audit": audit,
        "audit_key": audit_key,
        "salt": None if deidentify is None else _secret(deidentify),
        "allow_burned_in": allow_burned_in,
        "device": device,
        "batch_size": batch_size,
        "say": console.say,
        "warn": console.warn,
    }
    folder, form = adapter_folder(adapter), form or "json"
    if watch:
        timed = {name: value for name, value in timed.items() if value is not None}
        found = serve.watch(folder, files[0], out, form, once=once, retry=retry, **timed, **options)
        console.say(", ".join(f"{count} {name}" for name, count in found.items()))
        console.result(found)
        if found["failed"] and not skip_bad:
            raise DataError(
                f"{found['failed']} folders failed: --retry takes them again, --skip-bad calls this a success"
            )
        return
    found = serve.predict_studies(folder, files, out, form, **options)
    console.result(found)
    if found["failed"] and not (skip_bad and found["studies"]):
        first, count = found["failed"][0], len(found["failed"])
        raise DataError(f"{count} of {count + len(found['studies'])} studies failed; the first: {first['reason']}")
    for row in found["failed"]:
        console.warn(f"study {row['study']} failed: {row['reason']}")


@app.command()
def probe(
    data: Data = None,
    backbone: Backbone = None,
    random_weights: RandomWeights = False,
    setting: Setting = None,
    test: Test = None,
    val: Val = None,
    seed: Seed = None,
    device: Device = None,
    size: Annotated[int | None, typer.Option("--image-size", help="Side of the input in pixels.")] = None,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Judge frozen features alone: nearest neighbours, and the best of a grid of linear heads; nothing is saved."""
    from adaptsuite.medical.pipeline import DOMAIN
    from adaptsuite.medical.probes import run

    console = Console(as_json)
    found = run(DOMAIN, read_recipe(DOMAIN, {**locals(), "size": (SIZE, size)}), console.say)
    for name in ("knn", "linear"):
        for metric, value in found[name].items():
            if value["ci"]:
                console.say(
                    f"{name:<7} {metric:<18} {value['value']:.3f}  [{value['ci'][0]:.3f}, {value['ci'][1]:.3f}]"
                )
    best = found["choice"]
    pooled = " and the mean patch" if best["mean_patch"] else ""
    console.say(f"head    reads the last {best['blocks']} CLS tokens{pooled}, rate {best['lr']:g}")
    console.result(found)


def _secret(path: str) -> str:
    """The text of a file, so that it is in no list of processes."""
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError):
        raise DataError(f"{path}: no file of text with a secret") from None


def main() -> int:
    """`adapt-medical ...` is `adapt medical ...`."""
    import sys

    from adaptsuite.cli import main as root

    return root(["medical", *sys.argv[1:]])
