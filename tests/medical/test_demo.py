"""The demo of medicine, on few patients."""

import pytest

from adaptsuite.medical import demo


@pytest.mark.slow
def test_the_demo_compares_methods_and_reads_a_study(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "EPOCHS", dict.fromkeys(demo.METHODS, 1))
    result = demo.run(tmp_path, patients=20, count=2, methods=("linear", "lora"))
    page = (tmp_path / "medical" / "lora" / "report.html").read_text()
    assert "lesion: ROC" in page and "linear" in page and result["report"].endswith("report.html")
    said = capsys.readouterr().out
    assert "study     clip.dcm" in said and "threshold for" in said
