"""The demo in a toy setting: generated sounds, the embedded backbone, one report that compares the methods."""

import json

import pytest

from adaptsuite.audio import demo


@pytest.mark.slow
def test_the_demo_writes_a_report_that_compares_its_methods(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "EPOCHS", dict.fromkeys(demo.EPOCHS, 1))
    result = demo.run(tmp_path, classes=3, clips=12, methods=("linear", "audio.soft_moa"))
    page = (tmp_path / "audio" / "audio.soft_moa" / "report.html").read_text()
    assert result["report"].endswith("report.html") and page.count("linear") >= 1
    out = capsys.readouterr().out
    assert "method" in out and "audio.soft_moa" in out and "[" in out
    assert json.loads((tmp_path / "audio" / "linear" / "metrics.json").read_text())["test"]["accuracy"]["value"] >= 0
