"""`adapt vision`: the common verbs, for pictures; `inspect` and `export` are vision's own."""

from pathlib import Path
from typing import Annotated

import typer

from adaptsuite.commands import (
    Backbone,
    Console,
    Data,
    Device,
    Json,
    RandomWeights,
    Setting,
    SkipBad,
    Test,
    adapter_folder,
    domain_app,
    read_recipe,
)
from adaptsuite.errors import UsageError

SIZE = "front_end.size"

app = domain_app(
    "vision",
    "Recognise what only experts tell apart: vision transformers and adapters.",
    (
        "--image-size",
        SIZE,
        "Side of the input in pixels; by default the backbone's own (two sides: --set front_end.size=H,W).",
    ),
    exports="timm (a folder for timm.create_model), torch, onnx or peft.",
)


@app.command()
def inspect(
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="ADAPTER FILE", help="With --backbone only files, with --data no files."),
    ] = None,
    data: Data = None,
    test: Test = None,
    backbone: Backbone = None,
    random_weights: RandomWeights = False,
    setting: Setting = None,
    size: Annotated[int | None, typer.Option("--image-size", help="Of --backbone: side of its input.")] = None,
    device: Device = None,
    out: Annotated[str | None, typer.Option("--out", help="Folder of the page, the pictures and the numbers.")] = None,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Show what an adapter or a plain backbone looks at: rollout, Grad-CAM, and how alike its blocks attend."""
    if out is None:
        raise UsageError("--out is missing: the folder that gets the page, the pictures and the numbers")
    if backbone is None and not sources:
        raise UsageError("ADAPTER is missing: an adapter's folder, or --backbone")
    if backbone is None and (random_weights or size is not None or setting):
        raise UsageError("--random-weights, --image-size and --set need --backbone: an adapter has its own")
    if test is not None and data is None:
        raise UsageError("--test needs --data: it names rows of a table")
    from adaptsuite.vision.inspect import inspect_source
    from adaptsuite.vision.pipeline import DOMAIN

    console, files = Console(as_json), list(sources or ())
    if backbone is not None:
        source = read_recipe(DOMAIN, {**locals(), "size": (SIZE, size)})
    else:
        source = adapter_folder(files.pop(0))
    found = inspect_source(DOMAIN, source, files, Path(out), data, test, device, skip_bad, console.say)
    console.remarks(found)
    for line in found["left_out"]:
        console.warn(line)
    for name, value in found.get("collapse", {}).items():
        console.say(f"attention  {name}: mean CKA of different blocks {'–' if value is None else f'{value:.3f}'}")
    console.say(f"page  {found['page']}")
    console.result(found)


def main() -> int:
    """`adapt-vision ...` is `adapt vision ...`."""
    import sys

    from adaptsuite.cli import main as root

    return root(["vision", *sys.argv[1:]])
