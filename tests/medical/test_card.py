"""The model card says what the numbers say, names its limits, and lets no text become markup."""

from dataclasses import replace

import numpy as np
import pytest

from adaptsuite.medical.calibration import calibration, fit_temperature
from adaptsuite.medical.card import Card, card_limits, card_sections, markdown, write_card
from adaptsuite.medical.clinical import evaluate, finding
from adaptsuite.medical.operating_point import achieved, choose_threshold
from adaptsuite.medical.patients import frames_and_patients
from adaptsuite.medical.subgroups import subgroup_table
from adaptsuite.report import Run, render


@pytest.fixture(scope="module")
def card():
    rng = np.random.default_rng(0)
    patients = np.arange(240) // 4
    truth = patients % 3 == 0
    logits = 3 * (2 * truth - 1 + rng.normal(size=240) + 0.5 * rng.normal(size=60)[patients])
    temperature = fit_temperature(logits, truth, "multilabel")
    p = 1 / (1 + np.exp(-logits / temperature))
    record = choose_threshold(p, truth, "sensitivity>=0.95", patients, repeats=50)
    found = finding(p, truth, record["value"])
    site = np.where(patients < 56, np.where(patients < 30, "A", "B"), "DOE^JANE")
    return Card(
        title="COVID-CT, LoRA",
        model={"backbone": "embedded:medical-grey", "adapter sha256": "ab" * 32},
        data={"rows": 240, "patients": 60},
        splits=[{"part": "test", "rows": 240, "patients": 60}],
        leaks={"pairs": 3, "across parts": 0},
        metrics=evaluate(found, patients, repeats=50),
        units=frames_and_patients(found, patients, ("auroc",), repeats=50),
        operating_point=record,
        achieved=achieved(record, p, truth, patients, repeats=50),
        temperature=temperature,
        calibration=calibration(logits, truth, temperature, patients, "multilabel", repeats=50),
        subgroups={"site": subgroup_table(found, "site", site, patients, repeats=50)},
        versions={"adaptsuite": "0.1"},
    )


def test_the_card_holds_the_run_s_numbers(card):
    text = markdown(card)
    auroc = card.metrics["auroc"]
    assert f"| AUROC | {auroc['value']:.3f} ({auroc['ci'][0]:.3f}–{auroc['ci'][1]:.3f})" in text
    assert f"sensitivity&gt;=0.95: {card.operating_point['value']:.4g}, chosen on 240 validation rows" in text
    assert "of 60 patients, 80 rows positive" in text and "Research. Not a medical device" in text
    assert f"Logits are divided by {card.temperature:.3g}" in text and "less certain than trained" in text
    assert "groups suppressed" in text and "DOE" not in text
    titles = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        "Model", "Intended use", "Subgroups by site", "Metrics on test rows", "Patients against frames",
        "Operating point", "Calibration", "Data", "Splits", "Limits", "Versions",
    ]  # fmt: skip


def test_every_row_of_a_table_has_as_many_cells_as_its_header(card):
    block = []
    for line in [*markdown(card).splitlines(), ""]:
        if line.startswith("|"):
            block.append(line.replace("\\|", "").count("|"))
        elif block:
            assert len(set(block)) == 1 and len(block) > 2
            block = []


def test_the_limits_are_those_of_the_numbers(card):
    assert card_limits(card) == ["Of suppressed subgroups nothing is known."]
    bare = Card("x", part="val", data={"patients": 7}, limits=["Only adults."])
    assert card_limits(bare) == [
        "No test rows: val rows chose settings too, so these numbers are too good.",
        "7 patients only: read the intervals as rough.",
        "No operating point was chosen: calls at .5 follow no clinical purpose.",
        "Probabilities are not calibrated.",
        "Subgroups were not examined.",
        "Only adults.",
    ]
    missed = replace(card, achieved={**card.achieved, "met": False})
    assert "On test rows the operating point misses its target sensitivity>=0.95." in card_limits(missed)
    none = choose_threshold([0.9, 0.8, 0.7, 0.2], [0, 1, 1, 0], "ppv>=0.9", repeats=5)
    unreached = replace(card, operating_point=none, achieved=None)
    assert "The target ppv>=0.9 was not reached: the adapter has no threshold." in card_limits(unreached)
    assert "the nearest is 0.667" in markdown(unreached)


def test_text_cannot_become_markup(card, tmp_path):
    hostile = "<script>alert(1)</script> [x](http://e.vil) `a` | b\n# c"
    text = markdown(replace(card, title=hostile, data={hostile: hostile}, limits=[hostile]))
    assert "<script" not in text and "[x](" not in text and "\n# c" not in text and " | b #" not in text
    path = write_card(tmp_path / "MODEL_CARD.md", card)
    assert path.read_text(encoding="utf-8") == markdown(card)


def test_the_report_takes_the_card_s_sections(card):
    page = render(Run("t", extra=card_sections(replace(card, limits=["<b>bold</b>"]))))
    assert "Subgroups by site" in page and "<b>bold" not in page and "&lt;b&gt;bold" in page
    assert [section["title"] for section in card_sections(Card("x"))] == ["Intended use", "Limits"]
