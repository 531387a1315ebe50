"""`adapt medical`: the common verbs, for pictures, DICOM and NIfTI of patients."""

from adaptsuite.commands import domain_app

SIZE = "front_end.size"

app = domain_app(
    "medical",
    "Fit medical foundation models to one finding, with evidence by patient.",
    ("--image-size", SIZE, "Side of the input in pixels; by default the backbone's own (--set front_end.size=H,W)."),
    exports="monai-bundle, timm (a folder for timm.create_model), torch, onnx or peft.",
)


def main() -> int:
    """`adapt-medical ...` is `adapt medical ...`."""
    import sys

    from adaptsuite.cli import main as root

    return root(["medical", *sys.argv[1:]])
