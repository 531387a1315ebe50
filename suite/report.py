"""The run folder: recipe.toml, run.json, metrics.json, predictions.csv, and one self-contained page, report.html."""

import csv
import datetime
import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from adaptsuite import __version__, figures
from adaptsuite.atomic import write_file
from adaptsuite.errors import DataError
from adaptsuite.evidence import Predictions, evidence, support
from adaptsuite.manifest import write_csv

REPORT, RECORD, METRICS = "report.html", "run.json", "metrics.json"
PREDICTIONS, RECIPE = "predictions.csv", "recipe.toml"
LIBRARIES = (
    "torch torchvision torchaudio timm transformers open_clip_torch monai accelerate safetensors numpy scipy "
    "scikit-learn soundfile pydicom nibabel peft"
).split()
HEADLINE = 4  # metrics that get a card
WORDS = {
    "auroc": "AUROC",
    "f1": "F1",
    "ece": "calibration error (ECE)",
    "top5_accuracy": "top-5 accuracy",
    "macro_f1": "macro F1",
    "map": "mean average precision",
    "macs": "MACs",
    "macs_per_item": "MACs per item",
    "training_flops": "training FLOPs per step",
    "activation_bytes": "activations kept",
    "peak_bytes": "peak of one step",
    "optimizer_bytes": "optimiser state",
    "open_clip_torch": "open_clip",
}


@dataclass(frozen=True)
class Run:
    """Everything that the folder and the page show; what is empty is left out.

    A metric is {"value", "ci": [low, high] or None, "note"?}, as `adaptsuite.metrics.evaluate` gives it; over several
    folds or seeds it also has "spread": {"folds" or "seeds": {"mean", "std", "n"}} (`adaptsuite.experiment.pooled`).
    A table is a list of rows {column: cell}; a cell is text, a number, None or a metric.
    """

    title: str
    task: str = "multiclass"
    labels: Sequence[str] = ()
    command: str = ""  # the shell line that makes this run again
    recipe: str = ""  # TOML, as resolved
    adapted: Mapping[str, Any] = field(default_factory=dict)  # backbone, method, sites ...
    params: Mapping[str, int] = field(default_factory=dict)  # trained, trained_without_head, total
    adapter_bytes: int | None = None
    budget: Mapping[str, Any] | None = None
    data: Mapping[str, Any] = field(default_factory=dict)  # the data card: rows, classes, groups, splits, sha256 ...
    metrics: Mapping[str, Any] = field(default_factory=dict)  # "test", "val": {name: metric}; folds, lr_grid: tables
    curves: Sequence[Mapping[str, Any]] = ()  # {"name", "history", "best_epoch"} of each training
    monitor: str = "accuracy"
    predictions: Predictions | None = None
    comparison: Sequence[Mapping[str, Any]] = ()  # a table of several runs (`comparison_row`)
    warnings: Sequence[str] = ()  # skipped files, notes of the training
    limits: Sequence[str] = ()  # beside those that follow from the numbers
    extra: Sequence[Mapping[str, Any]] = ()  # {"title", "text"?, "table"?, "figure"?, "caption"?} of a domain
    seeds: Sequence[int] = (0,)
    seconds: float | None = None
    versions: Mapping[str, str] = field(default_factory=lambda: collect_versions())
    host: Mapping[str, Any] = field(default_factory=lambda: host_facts())
    finished: str = field(default_factory=lambda: f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC")


def write_run(out: str | Path, run: Run) -> Path:
    """Writes the run's files into `out`, each whole or not at all, and returns the page's path."""
    out = Path(out)
    record = {f.name: getattr(run, f.name) for f in fields(run) if f.name not in ("recipe", "metrics", "predictions")}
    record["extra"] = [{**s, **({"figure": figures.embed(s["figure"])} if s.get("figure") else {})} for s in run.extra]
    if run.recipe:
        write_file(out / RECIPE, run.recipe)
    write_file(out / RECORD, _json(_shareable(record)))
    write_file(out / METRICS, _json(run.metrics))
    if run.predictions is not None:
        write_csv(out / PREDICTIONS, prediction_rows(run))
    return write_file(out / REPORT, render(run))


def read_run(out: str | Path) -> Run:
    """The run of a folder that `write_run` filled. Raises DataError where there is none that can be read."""
    out = Path(out)
    try:
        record = json.loads((out / RECORD).read_text())
        record["metrics"] = json.loads((out / METRICS).read_text())
        record["recipe"] = (out / RECIPE).read_text() if (out / RECIPE).exists() else ""
        if (out / PREDICTIONS).exists():
            record["predictions"] = _read_predictions(out / PREDICTIONS, record["labels"], record["task"])
        return Run(**record)
    except FileNotFoundError as error:
        raise DataError(f"{out} is no run folder: {Path(error.filename).name} is missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{out}: the run's files cannot be read: {error}") from None


def prediction_rows(run: Run) -> list[dict[str, Any]]:
    """predictions.csv: path, group, run, label, predicted, probability (of the predicted), p(LABEL) for each label."""
    said = run.predictions
    rows = []
    for i, scores in enumerate(said.probabilities):
        rows.append(
            {
                "path": said.paths[i],
                **({"group": said.groups[i]} if said.groups is not None else {}),
                **({"run": said.runs[i]} if said.runs is not None else {}),
                "label": _names(run, said.targets[i]),
                "predicted": _names(run, scores >= 0.5 if run.task == "multilabel" else scores.argmax()),
                "probability": round(float(scores.max()), 6),
                **{f"p({label})": round(float(p), 6) for label, p in zip(run.labels, scores, strict=True)},
            }
        )
    return rows


def comparison_row(run: Run, metric: str = "accuracy", part: str = "test", **more: Any) -> dict[str, Any]:
    """One row of a comparison table: method, trained parameters, the metric, seconds; `more` adds columns."""
    return {
        "method": run.adapted.get("method", run.title),
        "trained": run.params.get("trained"),
        metric: run.metrics.get(part, {}).get(metric),
        "seconds": run.seconds,
        **more,
    }


def collect_versions() -> dict[str, str]:
    """Of python, this package and the libraries that are installed; nothing is imported for it."""
    versions = {"adaptsuite": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def host_facts() -> dict[str, Any]:
    """What the timing depends on, without names of machines or people."""
    facts: dict[str, Any] = {"system": f"{platform.system()} {platform.machine()}", "processors": os.cpu_count()}
    torch = sys.modules.get("torch")
    if torch is not None:
        facts["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            facts["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return facts


# ---- the page


def render(run: Run) -> str:
    """The HTML of report.html; whatever comes from data is escaped, and nothing in it can run or load."""
    part = next((name for name in ("test", "val") if run.metrics.get(name)), None)
    view = {
        "run": run,
        "part": part,
        "headline": list(run.metrics[part].items())[:HEADLINE] if part else [],
        "scores": _score_table(run),
        "adapted": _adapted(run),
        "curves": figures.learning_curves(run.curves, run.monitor),
        "folds": _fold_table(run, part),
        "sections": [
            {
                "text": "",
                "table": None,
                "caption": "",
                **s,
                "figure": figures.embed(s["figure"]) if s.get("figure") else None,
            }
            for s in run.extra
        ],
        "limits": [*known_limits(run, part), *run.limits],
        "evidence": None,
    }
    if run.predictions is not None and len(run.predictions.paths) and run.labels:
        view["evidence"] = evidence(run.predictions, run.labels, run.task)
    return page("report.html.j2", **view)


def page(template: str, **view: Any) -> str:
    """A template of this package, filled without folders of this user; what comes from data is escaped."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "cell": cell,
        "words": _words,
        "tabulate": tabulate,
        "folded": _folded,
        "plus_minus": plus_minus,
    }
    return environment.get_template(template).render(_shareable(view))


def _score_table(run: Run) -> list[dict[str, Any]]:
    parts = [name for name in ("test", "val") if run.metrics.get(name)]
    names = dict.fromkeys(name for part in parts for name in run.metrics[part])
    full = {"test": "test", "val": "validation"}
    rows = [{"metric": _words(n), **{full[p]: run.metrics[p].get(n) for p in parts}} for n in names]
    for row, name in zip(rows, names, strict=True):  # of the part that counts
        spread = run.metrics[parts[0]].get(name, {}).get("spread", {})
        row |= {f"{full[parts[0]]} over {key}": plus_minus(own) for key, own in spread.items()}
    return rows


def plus_minus(spread: Mapping[str, float]) -> str:
    """Mean, standard deviation, and over how many."""
    return f"{cell(spread['mean'])} ± {cell(spread['std'])} ({spread['n']})"


def _fold_table(run: Run, part: str | None) -> list[dict[str, Any]]:
    """One row per fold and seed, with the headline metrics of the part that counts."""
    rows = []
    for fold in run.metrics.get("folds", ()) if len(run.metrics.get("folds", ())) > 1 else ():
        row = {}
        for key, value in fold.items():
            if isinstance(value, Mapping) and key in ("test", "val"):
                row |= {_words(n): v for n, v in list(value.items())[:HEADLINE]} if key == part else {}
            else:
                row[_words(key)] = f"{value:g}" if key == "lr" else value
        rows.append(row)
    return rows


def _adapted(run: Run) -> dict[str, Any]:
    facts = dict(run.adapted)
    trained, total = run.params.get("trained"), run.params.get("total")
    if trained is not None:
        share = f" ({trained / total:.3%} of {total:,})" if total else ""
        facts["trained parameters"] = f"{trained:,}{share}"
    if "trained_without_head" in run.params:
        facts["without the head"] = run.params["trained_without_head"]
    if run.adapter_bytes is not None:
        facts["adapter file"] = _size("bytes", run.adapter_bytes)
    for name, value in (run.budget or {}).items():
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "adapter_bytes":
            facts[_words(name)] = _size(name, value)
    return facts


def known_limits(run: Run, part: str | None) -> list[str]:
    """What a careful reader should know, as far as the numbers themselves tell."""
    limits = []
    if part == "val":
        limits.append("There were no test rows. Validation rows chose the epoch, so these numbers are too good.")
    said = run.predictions
    if said is not None and len(said.paths):
        rows = len(set(said.paths))
        groups = rows if said.groups is None else len(set(said.groups))
        if groups == rows:
            limits.append(
                "Intervals take every row as independent. If several come from one source (a speaker, a patient, "
                "a recording), they are too narrow: name the source in a column 'group'."
            )
        if groups < 20:
            limits.append(f"Only {groups} groups stand behind these numbers: read the intervals as rough.")
        few = [label for label, n in zip(run.labels, support(said, len(run.labels)), strict=True) if n < 5]
        if few:
            shown = ", ".join(few[:8]) + (f" and {len(few) - 8} more" if len(few) > 8 else "")
            limits.append(f"Fewer than 5 held-out rows of {shown}: say nothing of these classes alone.")
    if part and any(m.get("ci") and m["ci"][0] == m["ci"][1] for m in run.metrics[part].values()):
        limits.append("An interval without width means that no error was seen, not that there is none.")
    if part and len(run.seeds) == 1:
        limits.append("One seed: how much the result moves with another start is not known.")
    if part:
        limits.append("Intervals cover which rows were drawn, not the choice of settings, nor data of another origin.")
    return limits


# ---- cells and text


def tabulate(rows: Sequence[Mapping[str, Any]], bars: str = "") -> dict[str, Any]:
    """Columns and cells of a table for the template.

    bars: draw metrics on a scale of 0 to 1 ("unit") or of the column's own range ("column").
    """
    columns = []
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        numeric = all(v is None or isinstance(v, int | float | np.number) or _is_metric(v) for v in values)
        columns.append({"name": name, "numeric": numeric, "scale": _scale(values, bars)})
    cells = [[_cell(row.get(c["name"]), c["scale"]) for c in columns] for row in rows]
    return {"columns": columns, "rows": cells}


def _scale(values: Sequence[Any], bars: str) -> tuple[float, float] | None:
    """Ends of a column's bars; None for a column without."""
    found = [v for v in values if _is_metric(v) and v["value"] is not None]
    ends = [end for v in found for end in (v["value"], *(v.get("ci") or ()))]
    if not bars or not ends:
        return None
    space = 0.05 * (max(ends) - min(ends)) or 0.05
    return (0.0, 1.0) if bars == "unit" else (min(ends) - space, max(ends) + space)


def _is_metric(value: Any) -> bool:
    return isinstance(value, Mapping) and "value" in value


def _cell(value: Any, scale: tuple[float, float] | None) -> dict[str, Any]:
    """Text, interval and the places, in percent of the scale, of a bar."""
    if not _is_metric(value):
        return {"text": cell(value), "interval": "", "bar": None}
    interval = value.get("ci")
    shown = {"text": cell(value["value"]), "interval": _interval(interval), "bar": None}
    if scale and value["value"] is not None:
        ends = [*(interval or [value["value"]] * 2), value["value"]]
        places = [100 * (end - scale[0]) / (scale[1] - scale[0]) for end in ends]
        low, high, dot = (round(min(100, max(0, place)), 1) for place in places)
        shown["bar"] = {"low": low, "width": round(high - low, 1), "dot": dot}
    return shown


def _interval(ends: Sequence[float] | None) -> str:
    return f"{cell(float(ends[0]))}–{cell(float(ends[1]))}" if ends else ""


def cell(value: Any) -> str:
    """A table cell or fact as text."""
    if value is None:
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{int(value):,}"
    if isinstance(value, float | np.floating):
        if not math.isfinite(value):
            return "–"
        digits = 3 if abs(value) < 10 else 1 if abs(value) < 100 else 0
        return f"{value:,.{digits}f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {cell(v)}" for key, v in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(cell, value))
    return str(value)


def _size(name: str, value: float) -> str:
    if "bytes" in name:
        return f"{value / 1e6:,.2f} MB" if value >= 1e5 else f"{value / 1e3:,.1f} kB"
    if any(word in name for word in ("macs", "flops")):
        return f"{value / 1e9:,.3f} G"
    return cell(value)


def _folded(command: str) -> str:
    """A long shell line with an option a line."""
    return command if len(command) < 80 else command.replace(" --", " \\\n  --")


def _words(name: str) -> str:
    return WORDS.get(name, str(name).replace("_", " "))


def _names(run: Run, target: Any) -> str:
    if run.task == "multilabel":
        return ";".join(label for label, there in zip(run.labels, target, strict=True) if there)
    return run.labels[int(target)]


def _shareable(value: Any) -> Any:
    """The same without this user's folders: the working folder becomes '.', the home '~'."""
    if isinstance(value, str):
        for root, short in ((Path.cwd(), "."), (Path.home(), "~")):
            if len(root.parts) > 1:
                value = value.replace(f"{root}{os.sep}", f"{short}{os.sep}")
        return value
    if isinstance(value, Mapping):
        return {_shareable(key): _shareable(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_shareable(v) for v in value]
    if isinstance(value, Run):
        parts = {f.name: getattr(value, f.name) for f in fields(value) if f.name != "predictions"}
        return Run(**_shareable(parts))
    return value


def _json(value: Any) -> str:
    return json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """Plain JSON values; a number that is none becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(v) for key, v in value.items()}
    if isinstance(value, np.ndarray):
        return _finite(value.tolist())
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _read_predictions(path: Path, labels: Sequence[str], task: str) -> Predictions:
    with path.open(newline="") as file:
        rows = [{_unquoted(k): _unquoted(v) for k, v in row.items()} for row in csv.DictReader(file)]
    number = {label: k for k, label in enumerate(labels)}
    if task == "multilabel":
        targets = np.array([[label in row["label"].split(";") for label in labels] for row in rows], dtype=int)
    else:
        targets = np.array([number[row["label"]] for row in rows], dtype=int)
    return Predictions(
        paths=[row["path"] for row in rows],
        targets=targets,
        probabilities=np.array([[float(row[f"p({label})"]) for label in labels] for row in rows]),
        groups=[row["group"] for row in rows] if rows and "group" in rows[0] else None,
        runs=[row["run"] for row in rows] if rows and "run" in rows[0] else None,
    )


def _unquoted(text: str) -> str:
    """Without the quote that keeps a spreadsheet from running the cell."""
    return text[1:] if text[:1] == "'" and text[1:2] in tuple("=+-@\t\r") else text
