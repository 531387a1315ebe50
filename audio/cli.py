"""`adapt audio`: the common verbs, for sounds, and `export`."""

from typing import Annotated

import typer

from adaptsuite.commands import AdapterFolder, Console, Json, adapter_folder, domain_app

app = domain_app(
    "audio",
    "Classify sounds with Audio Spectrogram Transformers and adapters.",
    ("--frames", "front_end.frames", "Input length in frames of 10 ms; by default the longest clip, at most 1024."),
)


@app.command()
def export(
    adapter: AdapterFolder,
    format: Annotated[str, typer.Option("--format", help="hf (for transformers), torch, onnx or peft.")],
    out: Annotated[str, typer.Option("--out", help="Folder for hf and peft, NAME.pt2 for torch, NAME.onnx.")],
    as_json: Json = False,
) -> None:
    """Write an adapter as a model that other tools load, after comparing the two."""
    from adaptsuite.audio.export import describe
    from adaptsuite.audio.export import export as write

    console = Console(as_json)
    found = write(adapter_folder(adapter), format, out)
    console.say(*describe(found))
    console.result(found)


def main() -> int:
    """`adapt-audio ...` is `adapt audio ...`."""
    import sys

    from adaptsuite.cli import main as root

    return root(["audio", *sys.argv[1:]])
