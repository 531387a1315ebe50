"""`adapt vl`: the common verbs, for questions about pictures; `predict` is vl's own."""

from pathlib import Path
from typing import Annotated

import typer

from adaptsuite.commands import (
    AdapterFolder,
    BatchSize,
    Console,
    Data,
    Device,
    Json,
    PredictionsOut,
    adapter_folder,
    domain_app,
)
from adaptsuite.errors import UsageError

app = domain_app(
    "vl",
    "Answer questions about pictures: adapters through which an image acts in a text model.",
    ("--image-size", "front_end.size", "Side of the pictures in pixels; by default the backbone's own."),
    exports="torch or onnx.",
    own=("predict", "embed"),
)


@app.command()
def predict(
    adapter: AdapterFolder,
    images: Annotated[list[str] | None, typer.Argument(metavar="IMAGE...", help="Pictures to ask about.")] = None,
    question: Annotated[list[str] | None, typer.Option("--question", help="May be given several times.")] = None,
    data: Data = None,
    batch_size: BatchSize = None,
    device: Device = None,
    out: PredictionsOut = None,
    as_json: Json = False,
) -> None:
    """Answer questions about pictures: --question about each IMAGE, or every row of --data."""
    if (data is None) == (not images and not question):
        raise UsageError("IMAGE... and --question are missing, or --data: a .jsonl or .csv of {image, question}")
    if data is None and not question:
        raise UsageError("--question is missing: what is asked about each picture")
    from adaptsuite.manifest import write_csv
    from adaptsuite.vl.classifier import load
    from adaptsuite.vl.data import image_of, load_table, text_of

    console = Console(as_json)
    if data is not None:
        rows = load_table(data, need_answers=False).rows
        asked = [(row.rel if image_of(row) else "", image_of(row), text_of(row)) for row in rows]
    else:
        asked = [(path, Path(path), text) for path in images for text in question] if images else [
            ("", None, text) for text in question
        ]  # fmt: skip
    answerer = load(adapter_folder(adapter), device or "auto", batch_size)
    said = answerer.predict([path for _, path, _ in asked], [text for *_, text in asked])
    found = [
        {"image": name, "question": text, "answer": next(iter(scores)), "scores": scores}
        for (name, _, text), scores in zip(asked, said, strict=True)
    ]
    for row in found:
        best = "  ".join(f"{answer} {score:.3f}" for answer, score in list(row["scores"].items())[:3])
        console.say(f"{row['image'] or '-'}\t{row['question']}\t{row['answer']}\t{best}")
    if out is not None:
        write_csv(
            Path(out),
            [
                {**{k: v for k, v in row.items() if k != "scores"}, "score": row["scores"][row["answer"]]}
                for row in found
            ],
        )
    console.result({"predictions": found})


def main() -> int:
    """`adapt-vl ...` is `adapt vl ...`."""
    import sys

    from adaptsuite.cli import main as root

    return root(["vl", *sys.argv[1:]])
