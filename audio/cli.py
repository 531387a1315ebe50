"""`adapt audio`: the common verbs, for sounds."""

from adaptsuite.commands import domain_app

app = domain_app(
    "audio",
    "Classify sounds with Audio Spectrogram Transformers and adapters.",
    ("--frames", "front_end.frames", "Input length in frames of 10 ms; by default the longest clip, at most 1024."),
)


def main() -> int:
    """`adapt-audio ...` is `adapt audio ...`."""
    import sys

    from adaptsuite.cli import main as root

    return root(["audio", *sys.argv[1:]])
