"""`adapt vision inspect`: what a model looks at in given pictures, as a page, a PNG for each, and numbers."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from adaptsuite import applied, experiment
from adaptsuite.atomic import write_file
from adaptsuite.devices import pick_device
from adaptsuite.errors import UsageError
from adaptsuite.manifest import matching
from adaptsuite.metrics import to_probabilities
from adaptsuite.recipe import Recipe
from adaptsuite.report import Run, render
from adaptsuite.trainer import predict_all
from adaptsuite.vision.cka import Alike, collapse
from adaptsuite.vision.grid import Tokens
from adaptsuite.vision.pictures import look_figure, png
from adaptsuite.vision.sections import (
    PICTURED,
    Subject,
    attention_section,
    confusions,
    drawn,
    look,
    looks_section,
    measured,
)

SHOWN = 12  # pictures of files on one page
PAGE, RECORD = "inspect.html", "inspect.json"


def inspect_source(
    domain,
    source: Path | Recipe,
    files: Sequence[str],
    out: Path,
    data: str | None = None,
    test: str | None = None,
    device: str | None = None,
    skip_bad: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Writes PAGE, RECORD and a PNG for each picture into `out`; the record, as `adapt vision inspect --json` has it.

    source: an adapter's folder, or a recipe with a backbone, which says nothing of classes.  files: pictures or folders
    of them, all of which are drawn; or data: a table, of whose rows (those of `test`, else as `evaluate` takes them)
    right and wrong answers are drawn.
    """
    if bool(files) == (data is not None):
        raise UsageError("either FILE... or --data is needed, and not both")
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file, a folder is expected")
    subject, facts = _subject(domain, source, files, data, test, device, skip_bad)
    places, chosen = drawn(subject) if subject.truth is not None else _first(subject, data is not None)
    found = measured(subject, None)
    looks, record = _looked(subject, places, out, say)
    if not record["pngs"] and found is None:
        raise UsageError("; ".join(subject.left_out))
    record = {**facts, **record, **_attention(found), "left_out": subject.left_out, "page": str(out / PAGE)}
    page = Run(
        f"What {facts['backbone']} looks at",
        adapted={name: facts[name] for name in ("adapter", "backbone", "method") if name in facts},
        extra=[
            *looks_section(subject, looks, chosen),
            *confusions(subject),
            *attention_section(found),
            *_blocks_section(record["blocks"]),
        ],
        seeds=facts["seeds"],
        warnings=[*facts["notes"], *(f"left out: {row['path']}: {row['reason']}" for row in facts["skipped"])],
    )
    write_file(out / PAGE, render(page))
    write_file(out / RECORD, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return record


def _looked(subject: Subject, places: Sequence[int], out: Path, say: Callable[[str], None]):
    """(looks of the page, {"pictures", "blocks", "pngs"}); each picture is drawn and said in its turn."""
    looks, pictures, written, tokens = [], [], [], None
    for place in places:
        own, numbers = look(subject, place)
        tokens = numbers.pop("tokens", None)
        if own.heats:
            name = f"{len(written):03d}-{Path(own.name).stem}.png"
            written.append(str(write_file(out / name, png(look_figure([own])))))
        if len(looks) < SHOWN:
            looks.append(own)
        pictures.append(numbers)
        say(_line(numbers))
    return looks, {"pictures": pictures, "blocks": _blocks(tokens, pictures), "pngs": written}


def _subject(domain, source, files, data, test, device, skip_bad) -> tuple[Subject, dict[str, Any]]:
    """The subject of a command, and what the record says of it."""
    if isinstance(source, Recipe):
        return _backbone(domain, source, files, test, device, skip_bad)
    facts: dict[str, Any] = {"adapter": str(source)}
    if data is not None:
        scored = applied.score_adapter(domain, source, data, test, device, None, skip_bad)
        handle, recipe, labels, skipped = scored.handle, scored.recipe, scored.labels, list(scored.subset.skipped)
        dataset, outputs, notes = scored.dataset, scored.outputs, scored.result["warnings"]
    else:
        handle, recipe, labels, _ = experiment.restore(domain, source)
        paths, skipped, notes = applied.readable(domain, files, skip_bad)
        dataset, task = domain.dataset(handle.model, paths, None), domain.task(recipe, labels)
        outputs, _ = predict_all(handle.model, task, dataset, device=device or "auto")
    rows, probabilities = np.arange(len(dataset)), to_probabilities(outputs, recipe.data.task)
    facts |= {"backbone": recipe.backbone, "method": recipe.method, "seeds": list(recipe.seeds)}
    subject = Subject(handle.model, dataset, rows, probabilities, labels, handle, recipe.data.task)
    return subject, {**facts, "skipped": skipped, "notes": notes}


def _backbone(domain, recipe: Recipe, files, test, device, skip_bad) -> tuple[Subject, dict[str, Any]]:
    if files:
        paths, skipped, notes = applied.readable(domain, files, skip_bad)
    else:
        manifest = experiment.read_table(domain, recipe)
        chosen = slice(None) if test is None else matching(manifest, "--test", test)
        paths, skipped, notes = [r.path for r in np.array(manifest.rows)[chosen]], list(manifest.skipped), []
    recipe = experiment.complete(domain, replace(recipe, method="linear"), paths)
    model = domain.model(recipe, ("a", "b")).to(pick_device(device or "auto"))
    subject = Subject(model, domain.dataset(model, paths, None), np.arange(len(paths)))
    return subject, {"backbone": recipe.backbone, "seeds": list(recipe.seeds), "skipped": skipped, "notes": notes}


def _first(subject: Subject, some: bool) -> tuple[np.ndarray, str]:
    """All pictures; some: a few from all over. What the page says of them."""
    num = len(subject.rows)
    if some:
        places = np.unique(np.linspace(0, num - 1, min(2 * PICTURED, num)).round().astype(int))
        return places, f"{len(places)} of {num} rows, from all over the table."
    return np.arange(num), f"The first {SHOWN} of {num} pictures; each has a PNG of its own." if num > SHOWN else ""


def _line(numbers: dict[str, Any]) -> str:
    said = f"\t{numbers['label']}\t{numbers['probability']:.3f}" if "label" in numbers else ""
    entropy = f"\trollout entropy {numbers['rollout_entropy'][-1]:.3f}" if "rollout_entropy" in numbers else ""
    return f"{numbers['path']}{said}{entropy}"


def _attention(found: Alike | None) -> dict[str, Any]:
    """Numbers of the matrices; what is not defined is null."""
    if found is None:
        return {}
    return {
        "cka": {name: [[_number(v) for v in row] for row in matrix] for name, matrix in found.matrices.items()},
        "collapse": {name: _number(collapse(matrix)) for name, matrix in found.matrices.items()},
        "cka_pictures": found.images,
        "cka_batch": found.batch,
    }


def _blocks(tokens: Tokens | None, pictures: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a block: the tokens that enter it, and the mean entropy of the rollout behind it."""
    if tokens is None:
        return []
    means = np.mean([p["rollout_entropy"] for p in pictures if "rollout_entropy" in p], 0)
    rows = []
    for block, mean in enumerate(means):
        grid, joined = tokens.place(block).grid, block in tokens.joins
        row = {"block": block, "grid": list(grid), "tokens": tokens.prefix + math.prod(grid)}
        rows.append({**row, "rollout_entropy": _number(mean), "joined_behind": joined})
    return rows


def _blocks_section(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    text = "Rollout entropy: 1 where all patches count alike in what a head would read behind the block."
    table = [
        {
            "block": row["block"],
            "grid": " x ".join(map(str, row["grid"])),
            "tokens": row["tokens"],
            "rollout entropy": row["rollout_entropy"],
            "behind it": "tokens are joined" if row["joined_behind"] else "",
        }
        for row in rows
    ]
    return [{"title": "Tokens of each block", "text": text, "table": table}] if rows else []


def _number(value: float) -> float | None:
    return round(float(value), 6) if math.isfinite(value) else None
