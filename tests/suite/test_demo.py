"""The page at the end of `adapt demo`, and how the command makes it of all domains."""

import importlib
import io

import numpy as np
import pytest
from PIL import Image

from adaptsuite.cli import COMMANDS, main
from adaptsuite.demo import SIDE, contact_sheet, exhibit


def test_small_pictures_keep_their_pixels_side_by_side():
    pictures = [np.full((4, 4, 3), 30, np.uint8), np.full((200, 100, 3), 200, np.uint8)]
    pictures[0][0, 0] = 255
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet(pictures))))
    assert sheet.shape == (SIDE, 2 * SIDE + 6, 3)
    assert (sheet[: SIDE // 4, : SIDE // 4] == 255).all() and (sheet[-1, 0] == 30).all() and (sheet[0, -1] == 200).all()


def test_the_demo_ends_with_one_page_that_links_every_report(tmp_path, monkeypatch, capsys):
    def pretend(name, value):
        def run(out):
            (out / name).mkdir()
            report = out / name / "report.html"
            report.write_text("")
            metric = {"value": value, "ci": [value - 0.1, value + 0.1]}
            picture = np.zeros((8, 8, 3), np.uint8)
            return {"report": str(report)} | exhibit(
                out / name, f"{name} <&>", "accuracy", metric, "chance", [picture], "adapt it"
            )

        return run

    for i, name in enumerate(COMMANDS):
        run = pretend(name, 0.5 + i / 10)
        monkeypatch.setattr(
            importlib.import_module(f"adaptsuite.{name}.demo"), "run", lambda out, run=run: run(tmp_path)
        )
    assert main(["demo", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "index.html").read_text()
    for i, name in enumerate(COMMANDS):
        assert f'href="{name}/report.html"' in page and f"{name} &lt;&amp;&gt;." in page
        assert f"0.{5 + i}00 <span>accuracy, 95 %: 0.{4 + i}00 to 0.{6 + i}00; chance</span>" in page
    out = capsys.readouterr().out
    assert "[1/4] audio" in out and str(tmp_path / "index.html") in out


@pytest.mark.parametrize("domain", COMMANDS)
def test_every_demo_says_how_to_go_on_with_files_of_one_s_own(domain):
    source = importlib.import_module(f"adaptsuite.{domain}.demo").__file__
    assert f"adapt {domain} train --data" in open(source, encoding="utf-8").read()
