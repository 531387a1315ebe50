"""Lets plain `pytest` import adaptsuite from a bare clone, and counts what was skipped for want of real data."""

import importlib.util
import json
import os
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path

import hypothesis
import pytest

# a busy machine is no failure
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")

CACHE = os.path.join(tempfile.gettempdir(), f"adaptsuite-cache-{os.getpid()}")
os.environ["ADAPTSUITE_CACHE"] = CACHE  # not the user's own

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("ADAPTSUITE_DATA", ROOT.parent / "shared" / "data"))
NO_DATA = "real data absent: set ADAPTSUITE_DATA"


class CloneFinder:
    """Finds the packages where pyproject's package-dir says they are."""

    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name in cls.folders:
            folder = ROOT / cls.folders[name]
            return importlib.util.spec_from_file_location(
                name, folder / "__init__.py", submodule_search_locations=[str(folder)]
            )
        return None


if importlib.util.find_spec("adaptsuite") is None:
    sys.meta_path.insert(0, CloneFinder)


@pytest.fixture
def data_dir():
    """`data_dir("audio_esc10")` is that folder of data or weights; the test is skipped where it is absent."""

    def folder(name: str) -> Path:
        if not (DATA / name / "README.md").is_file():
            pytest.skip(f"{NO_DATA} ({name})")
        return DATA / name

    return folder


@pytest.fixture
def adapt(request, capsys):
    """`adapt(verb, ..., code=0)` runs `adapt DOMAIN verb ...` here, the domain being the test's folder: (stdout, or its
    JSON under --json; stderr)."""
    from adaptsuite.cli import main

    def run(*arguments, code=0):
        capsys.readouterr()  # what was said before
        found = main([request.path.parent.name, *map(str, arguments)])
        out, err = capsys.readouterr()
        assert found == code, err
        return json.loads(out) if "--json" in arguments and not code else out, err

    return run


def pytest_sessionfinish():
    shutil.rmtree(CACHE, ignore_errors=True)


def pytest_terminal_summary(terminalreporter):
    skipped = [r for r in terminalreporter.stats.get("skipped", ()) if NO_DATA in str(r.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} tests skipped: {NO_DATA}")
