"""`adapt vl`: the common verbs, for questions about pictures and captions of them; `predict` is vl's own."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from adaptsuite.commands import (
    AdapterFolder,
    Backbone,
    BatchSize,
    Console,
    Data,
    Device,
    DryRun,
    Epochs,
    Json,
    Lr,
    Method,
    Out,
    PredictionsOut,
    RandomWeights,
    RecipeName,
    Seed,
    Setting,
    Test,
    Val,
    adapter_folder,
    domain_app,
    predict_files,
)
from adaptsuite.errors import UsageError

app = domain_app(
    "vl",
    "Answer questions about pictures, or describe them: adapters through which an image acts in a text model.",
    ("--image-size", "front_end.size", "Side of the pictures in pixels; by default the backbone's own."),
    exports="torch or onnx.",
    own=("predict", "embed"),
)


@app.command()
def predict(
    adapter: AdapterFolder,
    images: Annotated[list[str] | None, typer.Argument(metavar="IMAGE...", help="Pictures.")] = None,
    question: Annotated[
        list[str] | None, typer.Option("--question", help="About each picture; may be given several times.")
    ] = None,
    choice: Annotated[
        list[str] | None, typer.Option("--choice", help="What the answer is one of; may be given several times.")
    ] = None,
    data: Data = None,
    batch_size: BatchSize = None,
    device: Device = None,
    out: PredictionsOut = None,
    as_json: Json = False,
) -> None:
    """Answer --question about each IMAGE, write a caption of each or name its class, as the adapter was trained to;
    with --data, for every row of a table."""
    from adaptsuite.manifest import write_csv
    from adaptsuite.vl.classifier import data_task, load

    folder = adapter_folder(adapter)
    if choice and (data is not None or data_task(folder) not in ("vqa", "")):
        raise UsageError("--choice is for --question; rows of --data have a column choices")
    if data_task(folder) in ("few_shot", "base_to_new"):
        return _classes(Console(as_json), adapter, data, images or [], question or [], batch_size, device, out)
    console, says = Console(as_json), _captions if data_task(folder) == "caption" else partial(_answers, choice or [])
    found = says(lambda: load(folder, device or "auto", batch_size), data, images or [], question or [])
    for row in found:
        best = "  ".join(f"{answer} {score:.3f}" for answer, score in list(row.get("scores", {}).items())[:3])
        shown = [row["image"] or "-", *(row[name] for name in ("question", "answer", "caption") if name in row)]
        console.say("\t".join([*shown, best] if best else shown))
    if out is not None:
        write_csv(Path(out), [_flat(row) for row in found])
    console.result({"predictions": found})


def _answers(
    choices: list[str], loaded: Callable[[], Any], data: str | None, images: list[str], questions: list[str]
) -> list[dict]:
    """{"image", "question", "answer", "scores"} of each question about each picture; choices: of all questions."""
    from adaptsuite.vl.data import choices_of, image_of, load_table, text_of

    if (data is None) == (not images and not questions):
        raise UsageError("IMAGE... and --question are missing, or --data: a .jsonl or .csv of {image, question}")
    if data is None and not questions:
        raise UsageError("--question is missing: what is asked about each picture")
    if data is not None:
        rows = load_table(data, need_answers=False).rows
        asked = [(row.rel if image_of(row) else "", image_of(row), text_of(row)) for row in rows]
        choices = list(map(choices_of, rows))
    else:
        asked = [(path, Path(path) if path else None, text) for path in images or [""] for text in questions]
    said = loaded().predict([path for _, path, _ in asked], [text for *_, text in asked], choices=choices)
    return [
        {"image": name, "question": text, "answer": next(iter(scores)), "scores": scores}
        for (name, _, text), scores in zip(asked, said, strict=True)
    ]


def _captions(loaded: Callable[[], Any], data: str | None, images: list[str], questions: list[str]) -> list[dict]:
    """{"image", "caption"} of each picture, or of those of a table, each once."""
    from adaptsuite.vl.data import captions_by_image, load_table

    if questions:
        raise UsageError("--question: this adapter writes captions, it answers no questions")
    if (data is None) == (not images):
        raise UsageError("IMAGE... is missing, or --data: a .jsonl or .csv of {image, captions}")
    if data is None:
        return [{"image": p, "caption": text} for p, text in zip(images, loaded().caption(images), strict=True)]
    paths, _ = captions_by_image(table := load_table(data, "caption"))
    names = {row.path: row.rel for row in table.rows}
    return [{"image": names[p], "caption": text} for p, text in zip(paths, loaded().caption(paths), strict=True)]


def _classes(
    console: Console, adapter: str, data: str | None, images: list[str], questions: list[str], batch_size, device, out
) -> None:
    if data is not None or questions or not images:
        raise UsageError("IMAGE... alone is expected: this adapter names the classes of pictures")
    from adaptsuite.vl.pipeline import DOMAIN

    predict_files(console, DOMAIN, adapter, images, batch_size, device, out, skip_bad=False)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A prediction as a line of a CSV."""
    score = {"score": row["scores"][row["answer"]]} if "scores" in row else {}
    return {**{k: v for k, v in row.items() if k != "scores"}, **score}


@app.command("few-shot")
def few_shot(
    data: Data = None,
    backbone: Backbone = None,
    random_weights: RandomWeights = False,
    method: Method = None,
    shots: Annotated[int, typer.Option("--shots", help="Training pictures of each class.")] = 16,
    all_classes: Annotated[bool, typer.Option("--all-classes", help="Train all classes instead of half.")] = False,
    setting: Setting = None,
    recipe_name: RecipeName = None,
    test: Test = None,
    val: Val = None,
    seed: Seed = None,
    epochs: Epochs = None,
    lr: Lr = None,
    batch_size: BatchSize = None,
    device: Device = None,
    out: Out = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Adapt CLIP to a few pictures of half of the classes, and tell apart the other half by names too.

    By vl.rpo where no method is named, beside zero-shot, Tip-Adapter and a linear probe of the same shots. What `train`
    does with data.task=base_to_new (few_shot with --all-classes) and data.shots.
    """
    method = method or (None if recipe_name else "vl.rpo")
    options = {name: value for name, value in locals().items() if name not in ("shots", "all_classes", "setting")}
    task = "few_shot" if all_classes else "base_to_new"
    train = next(command.callback for command in app.registered_commands if command.callback.__name__ == "train")
    train(**options, setting=[f"data.task={task}", f"data.shots={shots}", *(setting or [])])


def main() -> int:
    """`adapt-vl ...` is `adapt vl ...`."""
    import sys

    from adaptsuite.cli import main as root

    return root(["vl", *sys.argv[1:]])
