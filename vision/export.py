"""`adapt vision export`: see `adaptsuite.image_export` for the formats."""

from pathlib import Path
from typing import Any

from adaptsuite import export as exports
from adaptsuite.image_export import FORMATS
from adaptsuite.vision.pipeline import DOMAIN


def export(folder: str | Path, format: str, out: str | Path) -> dict[str, Any]:
    """Writes a vision adapter as one of FORMATS, as `adaptsuite.export.export` says."""
    return exports.export(DOMAIN, FORMATS, folder, format, out)
