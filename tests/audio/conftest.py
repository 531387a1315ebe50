"""What the tests of the audio domain share."""

import json

import pytest

from adaptsuite.cli import main


@pytest.fixture
def adapt(capsys):
    """`adapt(verb, ..., code=0)` runs `adapt audio verb ...` here: (stdout, or its JSON under --json; stderr)."""

    def run(*arguments, code=0):
        found = main(["audio", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert found == code, err
        return json.loads(out) if "--json" in arguments and not code else out, err

    return run
