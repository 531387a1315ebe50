"""A saved adapter put to use: scored on labelled rows, reported on, and asked about files."""

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from adaptsuite import recipe as recipes
from adaptsuite.artifact import require_adapter
from adaptsuite.atomic import write_file
from adaptsuite.domain import Domain, Said
from adaptsuite.errors import DataError
from adaptsuite.experiment import Embedding, adapted_facts, complete, prepare_rows, restore, title, usable
from adaptsuite.host import Handle
from adaptsuite.manifest import Manifest, matching, write_csv
from adaptsuite.plan import Plan
from adaptsuite.recipe import Recipe
from adaptsuite.report import Run, read_run, write_run
from adaptsuite.trainer import predict_all


@dataclass
class Scored:
    """An adapter on labelled rows."""

    result: dict[str, Any]  # as `adapt … evaluate --json` prints it
    handle: Handle
    recipe: Recipe
    labels: list[str]
    subset: Manifest
    outputs: np.ndarray
    dataset: Any
    sections: list[dict[str, Any]]  # adaptsuite.domain.Domain.evidence


def score_adapter(
    domain: Domain,
    folder: str | Path,
    data: str,
    test: str | None = None,
    device: str | None = None,
    batch_size: int | None = None,
    skip_bad: bool = False,
) -> Scored:
    """Metrics of a saved adapter on the rows of `test`, else those with split=test, else all of the table."""
    start = time.perf_counter()
    handle, recipe, labels, record = restore(domain, folder)
    manifest = domain.table(replace(recipe.data, manifest=data))
    subset = usable(domain, manifest.subset(_test_rows(manifest, test)), skip_bad)
    remarks = prepare_rows(domain, handle.model, subset)
    dataset = domain.rows(handle.model, subset, domain.targets(subset, labels))
    raw, kept = _outputs(domain, handle, recipe, record, dataset, device, batch_size)
    outputs = domain.calibrated(raw, kept)
    metrics: dict[str, Any] = {"test": domain.evaluate(subset, labels, outputs)}
    facts = {**adapted_facts(domain, recipe, handle), **handle.parameters_count()}
    said = Said(subset, outputs, raw, kept, name=Path(folder).parent.name, seed=recipe.seeds[0], facts=facts)
    sections = domain.evidence(recipe, subset, [said], "test", None)
    if found := {s["title"]: s["facts"] for s in sections if s.get("facts")}:
        metrics["evidence"] = found
    result = {
        "metrics": metrics,
        "params": handle.parameters_count(),
        "adapter": str(folder),
        "rows": len(subset),
        "skipped": list(subset.skipped),
        "warnings": [*subset.notes, *remarks],
        "seconds": round(time.perf_counter() - start, 2),
    }
    return Scored(result, handle, recipe, labels, subset, outputs, dataset, sections)


def _outputs(domain, handle, recipe, record, dataset, device, batch_size) -> tuple[np.ndarray, dict[str, Any]]:
    """Scores before calibration, and what the adapter keeps for it."""
    plan, task = recipes.build(Plan, recipe.plan, "plan"), domain.task(recipe, record.labels)
    outputs = domain.outputs(handle.model, task, dataset, plan, batch_size, device)
    return outputs, record.kept


def _test_rows(manifest: Manifest, test: str | None) -> np.ndarray:
    if test is not None:
        return matching(manifest, "--test", test).nonzero()[0]
    official = [i for i, r in enumerate(manifest.rows) if r.extra.get("split") == "test"]
    return np.array(official or range(len(manifest)))


def report_adapter(
    domain: Domain,
    folder: Path,
    data: str | None,
    test: str | None,
    device: str | None,
    batch_size: int | None,
    out: str | None,
) -> dict[str, Any]:
    """A page on a saved adapter: on a table, or its own run's page made anew from the run's files."""
    if data is None:
        require_adapter(folder)
        return {"report": str(write_run(out or folder.parent, read_run(folder.parent)))}
    scored = score_adapter(domain, folder, data, test, device, batch_size)
    recipe, subset = scored.recipe, scored.subset
    page = Run(
        title=title(recipe.method, data),
        task=subset.task,
        labels=scored.labels,
        command=f"adapt {domain.name} report {folder} --data {data}" + (f" --test {test}" if test else ""),
        recipe=recipes.to_toml(recipe),
        adapted=adapted_facts(domain, recipe, scored.handle),
        params=scored.result["params"],
        adapter_bytes=(folder / "adapter.safetensors").stat().st_size,
        data={"table": subset.source.name, "rows": len(subset), "sha256": subset.digest},
        metrics=scored.result["metrics"],
        predictions=domain.predictions(subset, scored.labels, scored.outputs),
        warnings=scored.result["warnings"],
        extra=[
            *scored.sections,
            *scored.handle.method.sections(scored.handle),
            *domain.extra(scored.handle, scored.dataset, scored.outputs),
        ],
        seeds=recipe.seeds,
        seconds=scored.result["seconds"],
    )
    return {**scored.result, "report": str(write_run(out or folder.parent / "report", page))}


def label_files(
    domain: Domain,
    folder: str | Path,
    files: Sequence[str],
    device: str | None = None,
    batch_size: int | None = None,
    skip_bad: bool = False,
) -> dict[str, Any]:
    """{"predictions": [{"path", "label", "scores": {label: probability}}], "skipped": [{"path", "reason"}], "notes"}.

    Folders are searched for files of the domain. Raises DataError as `readable`.
    """
    handle, recipe, labels, record = restore(domain, folder)
    paths, skipped, remarks = readable(domain, files, skip_bad)
    dataset = domain.dataset(handle.model, paths, None)
    outputs = domain.calibrated(*_outputs(domain, handle, recipe, record, dataset, device, batch_size))
    answers = domain.answers(recipe, labels, outputs)
    predictions = [{"path": str(path), **said} for path, said in zip(paths, answers, strict=True)]
    return {
        "predictions": predictions,
        "skipped": skipped,
        "notes": [*remarks, *domain.notes(handle.model, paths)],
    }


REMARKS = 5  # on single files, in the commands that label them; `check` lists all


def readable(
    domain: Domain, files: Sequence[str], skip_bad: bool = False
) -> tuple[list[Path], list[dict[str, str]], list[str]]:
    """(files, skipped, remarks): files and all those below folders, each looked at whole, in order and once.

    A file that cannot be used raises DataError, or with skip_bad is listed as {"path", "reason"}; none left raises too.
    remarks: what is doubtful in the others, such as digital silence.
    """
    good, skipped, remarks = [], [], []
    for path in dict.fromkeys(_expand(domain, files)):
        try:
            remarks += [f"{path}: {remark}" for remark in domain.look(path)["remarks"]]
            good.append(path)
        except DataError as e:
            if not skip_bad:
                raise DataError(f"{e}; --skip-bad goes on without such files") from e
            skipped.append({"path": str(path), "reason": str(e)})
    if not good:
        raise DataError(f"no file could be read; the first: {skipped[0]['reason']}")
    if len(remarks) > REMARKS:
        remarks[REMARKS:] = [f"and {len(remarks) - REMARKS} more such remarks"]
    return good, skipped, remarks


def embed_files(
    domain: Domain,
    source: str | Path | Recipe,
    files: Sequence[str],
    device: str | None = None,
    batch_size: int | None = None,
    each_item: bool = False,
    skip_bad: bool = False,
) -> dict[str, Any]:
    """What a linear head would read of files: {"paths", "features" (N, D) float32, "skipped", "notes"}.

    source: an adapter's folder, or a recipe with a backbone. each_item: a row for each item that a file is read as (a
    window), with "starts" where the domain's data set tells them, instead of the mean over a file.
    """
    if isinstance(source, Recipe):
        paths, skipped, remarks = readable(domain, files, skip_bad)
        recipe = complete(domain, replace(source, method="linear"), paths)
        labels: Sequence[str] = ("a", "b")
        model = domain.model(recipe, labels)
    else:
        handle, recipe, labels, _ = restore(domain, source)
        model, (paths, skipped, remarks) = handle.model, readable(domain, files, skip_bad)
    dataset, plan = domain.dataset(model, paths, None), recipes.build(Plan, recipe.plan, "plan")
    task = Embedding(domain.task(recipe, labels))
    raw, _ = predict_all(model, task, dataset, batch_size or plan.batch_size, device or plan.device)
    found = {
        "paths": [str(p) for p in paths],
        "skipped": skipped,
        "notes": [*remarks, *domain.notes(model, paths)],
    }
    if not each_item:
        return {**found, "features": dataset.mean_by_row(raw).astype(np.float32)}
    rows = getattr(dataset, "rows", range(len(paths)))
    starts = {"starts": dataset.starts} if hasattr(dataset, "starts") else {}
    return {**found, "paths": [str(paths[row]) for row in rows], **starts, "features": raw}


def write_features(path: Path, found: dict[str, Any]) -> None:
    """`embed_files` as .npz (arrays paths, starts, features) or .csv (path, start, f0, f1, ...), by the name's end."""
    if path.suffix == ".npz":
        file = io.BytesIO()
        np.savez(file, **{k: np.asarray(found[k]) for k in ("paths", "starts", "features") if k in found})
        write_file(path, file.getvalue())
        return
    starts = [{"start": float(s)} for s in found["starts"]] if "starts" in found else [{}] * len(found["paths"])
    rows = zip(found["paths"], starts, found["features"], strict=True)
    write_csv(path, [{"path": p, **s, **{f"f{i}": float(v) for i, v in enumerate(f)}} for p, s, f in rows])


def _expand(domain: Domain, files: Sequence[str]):
    for name in files:
        path = Path(name)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in domain.suffixes and p.is_file())
            if not found:
                raise DataError(f"{path}: no {', '.join(domain.suffixes)} file below this folder")
            yield from found
        elif path.exists():
            yield path
        else:
            raise DataError(f"{path}: no such file or folder")


def write_predictions(path: Path, predictions: Sequence[dict[str, Any]]) -> None:
    """One row a file: path, label, and a column of scores for each label; what else a prediction has comes last."""
    own = ("path", "label", "scores")
    more = [{k: v for k, v in p.items() if k not in own} for p in predictions]
    write_csv(
        path,
        [{"path": p["path"], "label": p["label"], **p["scores"], **m} for p, m in zip(predictions, more, strict=True)],
    )
