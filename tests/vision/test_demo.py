"""The demo of pictures, on few and small ones."""

import pytest

from adaptsuite.vision import demo


@pytest.mark.slow
def test_the_demo_writes_one_report_that_compares_its_methods(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "EPOCHS", dict.fromkeys(demo.METHODS, 1))
    monkeypatch.setattr(demo, "PIXELS", 96)
    result = demo.run(tmp_path, cultivars=3, shots=4, tests=3, methods=("linear", "vision.ila"))
    page = (tmp_path / "vision" / "vision.ila" / "report.html").read_text()
    assert "linear" in page and "vision.ila" in page and result["report"].endswith("report.html")
    said = capsys.readouterr().out
    assert "ceiling" in said and said.count("epoch") == 0  # its own lines are few
