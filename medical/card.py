"""The model card of a run: what the adapter is for, what it was measured on, and where it is not to be trusted.

Sections follow Mitchell et al. 2019 (arXiv:1810.03993). It is made of the run's numbers, of hashes and of class names;
its few sentences come from the recipe's author or from the numbers. It takes no paths, no row and no patient's name,
and who fills `data` must not put them there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaptsuite.atomic import write_file
from adaptsuite.report import WORDS, cell, tabulate

NAMED = {
    **WORDS,
    "auprc": "AUPRC",
    "ppv": "PPV",
    "npv": "NPV",
    "brier": "Brier score",
    "log_loss": "log loss",
    "dice": "Dice",
    "jaccard": "Jaccard",
    "hd95_mm": "HD95 (mm)",
    "hd95_mm median": "HD95 (mm), median",
    "hd_mm": "Hausdorff distance (mm)",
    "hd_mm median": "Hausdorff distance (mm), median",
    "assd_mm": "mean surface distance (mm)",
    "assd_mm median": "mean surface distance (mm), median",
}
RESEARCH = "Research. Not a medical device; no decision about a patient may rest on it."
FEW = 20  # patients below which intervals are rough


@dataclass(frozen=True)
class Card:
    """The facts; what is empty is left out. A metric is {"value", "ci", "note"?}, a table a list of rows."""

    title: str
    intended_use: str = RESEARCH
    out_of_scope: Sequence[str] = ()
    model: Mapping[str, Any] = field(default_factory=dict)  # backbone, method, parameters, adapter and base hash ...
    data: Mapping[str, Any] = field(default_factory=dict)  # rows, patients, classes, sha256 of the table ...
    splits: Sequence[Mapping[str, Any]] = ()  # a row a part: rows, patients, positives
    leaks: Mapping[str, Any] = field(default_factory=dict)  # counts of `leaks.leak_report`
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # name -> metric, on rows held out
    part: str = "test"  # which rows those are
    units: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # `patients.frames_and_patients`
    operating_point: Mapping[str, Any] | None = None  # `operating_point.choose_threshold`
    achieved: Mapping[str, Any] | None = None  # `operating_point.achieved` on the rows held out
    temperature: float | None = None
    calibration: Sequence[Mapping[str, Any]] = ()  # `calibration.calibration`
    subgroups: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)  # column -> `subgroup_table`
    limits: Sequence[str] = ()  # beside those that follow from the numbers
    versions: Mapping[str, str] = field(default_factory=dict)


def card_sections(card: Card) -> list[dict[str, Any]]:
    """{"title", "text"?, "table"?} of each section, as `adaptsuite.report.Run.extra` takes them (escaped there)."""
    sections = [
        {"title": "Model", "table": _facts(card.model)},
        {"title": "Intended use", "text": " ".join([card.intended_use, *card.out_of_scope])},
        *(
            {
                "title": f"Subgroups by {_words(column)}",
                "text": " ".join(f"Suppressed: {row['why']}." for row in rows if row.get("why")),
                "table": _renamed([{k: v for k, v in row.items() if k != "why"} for row in rows]),
            }
            for column, rows in card.subgroups.items()
        ),
        {"title": f"Metrics on {card.part} rows", "table": _metrics(card.metrics)},
        {"title": "Patients against frames", "table": _units(card.units)},
        {"title": "Operating point", "text": _point_text(card), "table": _point_table(card)},
        {"title": "Calibration", "text": _temperature_text(card), "table": _calibration(card.calibration)},
        {"title": "Data", "table": _facts(card.data)},
        {"title": "Splits", "text": _leak_text(card.leaks), "table": list(card.splits)},
        {"title": "Limits", "text": " ".join(card_limits(card))},
        {"title": "Versions", "table": _facts(card.versions)},
    ]
    return [s for s in sections if s.get("text") or s.get("table")]


def card_limits(card: Card) -> list[str]:
    """Sentences that follow from the numbers, then the author's own."""
    limits = []
    if card.part != "test":
        limits.append(f"No test rows: {card.part} rows chose settings too, so these numbers are too good.")
    patients = card.data.get("patients")
    if isinstance(patients, int) and patients < FEW:
        limits.append(f"{patients} patients only: read the intervals as rough.")
    if card.operating_point is None:
        limits.append("No operating point was chosen: calls at .5 follow no clinical purpose.")
    elif not card.operating_point["reached"]:
        limits.append(f"The target {card.operating_point['target']} was not reached: the adapter has no threshold.")
    if card.achieved and card.achieved.get("met") is False:
        limits.append(f"On {card.part} rows the operating point misses its target {card.achieved['target']}.")
    if card.temperature is None:
        limits.append("Probabilities are not calibrated.")
    if any(row.get("why") for table in card.subgroups.values() for row in table):
        limits.append("Of suppressed subgroups nothing is known.")
    if not card.subgroups:
        limits.append("Subgroups were not examined.")
    return [*limits, *card.limits]


def markdown(card: Card) -> str:
    """The card as Markdown; text that came with the data cannot become markup."""
    lines = [f"# {_escaped(card.title)}"]
    for section in card_sections(card):
        lines += ["", f"## {_escaped(section['title'])}"]
        if section.get("text"):
            lines += ["", _escaped(section["text"])]
        if section.get("table"):
            lines += ["", *_table(section["table"])]
    return "\n".join(lines) + "\n"


def write_card(path: str | Path, card: Card) -> Path:
    """Writes the card as Markdown, whole or not at all, and returns its path."""
    return write_file(path, markdown(card))


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    table = tabulate(rows)
    header = [_escaped(column["name"]) for column in table["columns"]]
    lines = [_line(header), _line(["--:" if column["numeric"] else "---" for column in table["columns"]])]
    for row in table["rows"]:
        shown = (f"{c['text']} ({c['interval']})" if c["interval"] else c["text"] for c in row)
        lines.append(_line([_escaped(text) for text in shown]))
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: Any) -> str:
    """One line of text without markup: HTML, links, code, emphasis and cell borders show as they are."""
    text = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{c}" if c in "\\`*[]|" else c for c in text)


def _words(name: str) -> str:
    rest = " against the rest"
    if name.endswith(rest):
        return _words(name.removesuffix(rest)) + rest
    return NAMED.get(name, str(name).replace("_", " "))


def _facts(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"fact": _words(name), "value": cell(value)} for name, value in facts.items()]


def _metrics(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = [{"metric": _words(name), "value": m, "of": m.get("of"), "note": m.get("note")} for name, m in found.items()]
    kept = [key for key in ("metric", "value", "of", "note") if any(row[key] is not None for row in rows)]
    return [{key: _of(row[key]) if key == "of" else row[key] for key in kept} for row in rows]


def _renamed(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{_words(name): value for name, value in row.items()} for row in rows]


def _calibration(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "metric": _words(row["metric"])} for row in rows]


def _of(pair: Sequence[int] | None) -> str | None:
    return None if pair is None else f"{pair[0]:,} of {pair[1]:,}"


def _units(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "metric": _words(name),
            "by patients": {"value": m["value"], "ci": m["patients"]},
            "by frames": {"value": m["value"], "ci": m["frames"]},
            "wider by": m["wider"],
        }
        for name, m in found.items()
    ]


def _point_text(card: Card) -> str:
    record = card.operating_point
    if record is None:
        return ""
    behind = f"{record['rows']} validation rows of {record['patients']} patients, {record['positives']} rows positive"
    if not record["reached"]:
        return f"{record['target']} was asked for on {behind}. {' '.join(record['notes'])}."
    area = f" of the image above {record['pixel']:g}" if "pixel" in record else ""
    notes = "".join(f" {note}." for note in record["notes"])
    return f"{record['target']}: {record['value']:.4g}{area}, chosen on {behind}. Rule: {record['rule']}.{notes}"


def _point_table(card: Card) -> list[dict[str, Any]]:
    if card.operating_point is None:
        return []
    val, test = card.operating_point["val"], (card.achieved or {}).get("test", {})
    return [
        {"metric": _words(n), "validation": m, **({card.part: test.get(n)} if test else {})} for n, m in val.items()
    ]


def _temperature_text(card: Card) -> str:
    if card.temperature is None:
        return ""
    sure = "less" if card.temperature > 1 else "more"
    return f"Logits are divided by {card.temperature:.3g}, fitted on validation rows: {sure} certain than trained."


def _leak_text(counts: Mapping[str, Any]) -> str:
    return "; ".join(f"{_words(name)}: {cell(value)}" for name, value in counts.items())
