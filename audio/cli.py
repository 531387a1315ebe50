"""`adapt audio`: the common verbs, for sounds."""

from adaptsuite.commands import (
    Backbone,
    Console,
    Cv,
    Data,
    Json,
    RandomWeights,
    RecipeName,
    Seed,
    Setting,
    SkipBad,
    Test,
    Val,
    domain_app,
    read_recipe,
)

FRAMES = "front_end.frames"

app = domain_app(
    "audio",
    "Classify sounds with Audio Spectrogram Transformers and adapters.",
    ("--frames", FRAMES, "Input length in frames of 10 ms; by default the longest clip, at most 1024."),
)


@app.command()
def stats(
    data: Data = None,
    backbone: Backbone = None,
    random_weights: RandomWeights = False,
    setting: Setting = None,
    recipe_name: RecipeName = None,
    test: Test = None,
    val: Val = None,
    cv: Cv = None,
    seed: Seed = None,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Mean and std of the training rows' log-mel values, as settings to copy, with their rates and lengths."""
    options = {**locals(), "size": (FRAMES, None)}
    from adaptsuite.audio.pipeline import DOMAIN
    from adaptsuite.audio.stats import dataset_statistics

    console = Console(as_json)
    lines, found = dataset_statistics(DOMAIN, read_recipe(DOMAIN, options))
    console.say(*lines)
    console.result(found)


def main() -> int:
    """`adapt-audio ...` is `adapt audio ...`."""
    import sys

    from adaptsuite.cli import main as root

    return root(["audio", *sys.argv[1:]])
