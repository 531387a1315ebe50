"""The report of the demo: the table as a picture beside what can be known blind, and questions with two answers."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adaptsuite.figures import ACCENT, SOFT, WARM, canvas, embed
from adaptsuite.report import Run, write_run
from adaptsuite.vl import synthetic
from adaptsuite.vl.blind import BLIND

SHOWN = 8  # questions on the page
NAMES = {"lora": "plain LoRA", "text_only": "question alone", "image_only": "image alone"}


def write_page(folder: Path, result: Mapping[str, Any], asked, said: Mapping[str, np.ndarray]) -> Path:
    """report.html of the demo's result.  said: row -> (N,) answers of plain LoRA and of one routing to `asked`."""
    routed = list(said)[-1]
    table, counts = result["table"], result["params"]
    rows = [{"row": _name(name), "trained": counts[name]["trained"], "accuracy": table[name]} for name in table]
    text = (
        "Every row trains the same number of values and sees the same questions in the same order. The dashed lines "
        "are counted, not estimated: more cannot be known from the question alone, or from the image alone."
    )
    run = Run(
        title="vl · plain LoRA and routing on questions about generated scenes",
        command="adapt vl demo",
        adapted={"backbone": "embedded:vl-tiny", "method": f"vl.routed_lora ({_name(routed)})"},
        params=counts[routed],
        data={"test questions": len(asked.rows), "answers": len(synthetic.ANSWERS), "steps": result["steps"]},
        metrics={"test": {"accuracy": table[routed], "plain LoRA": table["lora"]}},
        comparison=rows,
        extra=[
            {"title": "What the image adds", "text": text, "figure": _table_figure(table, result["bounds"])},
            {"title": "Questions and answers", "text": _counted(asked.answer, said), "figure": _scenes(asked, said)},
        ],
        limits=["Scenes, questions and both encoders are generated and small: a mechanism, no benchmark."],
        seconds=result["seconds"],
    )
    return write_run(folder, run)


def _name(row: str) -> str:
    return NAMES.get(row, row.replace("lora+", "routing: "))


def _counted(truth: np.ndarray, said: Mapping[str, np.ndarray]) -> str:
    (plain, routed), right = said, {name: own == truth for name, own in said.items()}
    only = [np.mean(right[a] & ~right[b]) for a, b in ((routed, plain), (plain, routed))]
    return (
        f"The first {SHOWN} of the test. Over all of it only {_name(routed)} is right in {only[0]:.0%}, only "
        f"{_name(plain)} in {only[1]:.0%}."
    )


def _table_figure(table: Mapping[str, Mapping], bounds: Mapping[str, float]) -> str:
    with canvas(7.2, 0.42 * len(table) + 0.8) as figure:
        axis = figure.subplots()
        for y, (name, metric) in enumerate(table.items()):
            color = "#8a96a1" if name in BLIND else ACCENT
            axis.barh(y, metric["value"], color=SOFT if name in BLIND else "#a9c3d7", height=0.6)
            axis.plot(metric["ci"], [y, y], color=color, lw=2.5)
            known = f", at most {bounds[name]:.3f} can be known" if name in bounds else ""
            axis.text(max(metric["ci"]) + 0.008, y, f"{metric['value']:.3f}{known}", va="center")
        for bound in bounds.values():
            axis.axvline(bound, color=WARM, ls="--", lw=1)
        axis.set_yticks(range(len(table)), [_name(name) for name in table])
        axis.set(ylim=(len(table) - 0.5, -0.5), xlim=(0, 1), xlabel="share of questions answered rightly")
        axis.tick_params(axis="y", length=0)
        return embed(figure)


def _scenes(asked, said: Mapping[str, np.ndarray]) -> str:
    texts = [text for _, text in synthetic.questions(asked.pool.level)]
    with canvas(8.6, 5.8) as figure:
        for i, axis in enumerate(figure.subplots(2, SHOWN // 2).flat):
            axis.imshow(asked.pool.pictures[asked.rows[i]].transpose(1, 2, 0), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            axis.set_title(textwrap.fill(texts[asked.question[i]].replace(" ?", "?"), 30), fontsize=8.5)
            marks = {name: "✓" if own[i] == asked.answer[i] else "✗" for name, own in said.items()}
            lines = [f"{marks[name]} {_name(name)}: {synthetic.ANSWERS[own[i]]}" for name, own in said.items()]
            axis.set_xlabel("\n".join(lines), fontsize=8.5, loc="left")
        return embed(figure)
