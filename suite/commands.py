"""The verbs that every domain has: info, check, budget, doctor, lr-test, train, compare, evaluate, predict, embed,
report, demo, export.

`domain_app("audio", ...)` makes a typer application of them. Options mean the same in all domains. Human lines go to
stdout, or to stderr under --json, where stdout holds one JSON object.
"""

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any

import typer

from adaptsuite.errors import DataError, UsageError

Data = Annotated[str | None, typer.Option("--data", help="CSV with path,label, its folder, or a folder of classes.")]
Backbone = Annotated[
    str | None, typer.Option("--backbone", help="SOURCE:NAME, a path after hf: or file:, or an alias.")
]
RandomWeights = Annotated[bool, typer.Option("--random-weights", help="The architecture alone, seeded.")]
Method = Annotated[str | None, typer.Option("--method", help="lora, bottleneck, ... or DOMAIN.NAME.")]
Setting = Annotated[
    list[str] | None, typer.Option("--set", help="key=value: a method's setting, or SECTION.key of the recipe.")
]
RecipeName = Annotated[str | None, typer.Option("--recipe", help="A recipe's file or the name of a shipped one.")]
Test = Annotated[str | None, typer.Option("--test", help="COLUMN=VALUE[,VALUE]: rows held back to the end.")]
Val = Annotated[str | None, typer.Option("--val", help="COLUMN=VALUE or none: rows that pick the best epoch.")]
Cv = Annotated[str | None, typer.Option("--cv", help="COLUMN: one fold for each of its values.")]
Seed = Annotated[
    int | None, typer.Option("--seed", help="Seed of splits, starts and order (several: --set seeds=0,1).")
]
Epochs = Annotated[int | None, typer.Option("--epochs")]
Lr = Annotated[float | None, typer.Option("--lr", help="Largest learning rate.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size")]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or mps.")]
LastK = Annotated[str | None, typer.Option("--last-k", help="Adapt the last K blocks only (all: a table of every K).")]
Out = Annotated[str | None, typer.Option("--out", help="Folder of the run.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; human lines go to stderr.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out files that cannot be used, and list them.")]
Files = Annotated[list[str], typer.Argument(metavar="FILE...", help="Files or folders of them.")]
PredictionsOut = Annotated[str | None, typer.Option("--out", help="Also write the predictions to this CSV.")]
AdapterFolder = Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter's folder, or its run's.")]


class Console:
    """Where results and remarks go."""

    def __init__(self, as_json: bool):
        self.as_json = as_json
        self.silent = os.environ.get("RANK", "0") != "0"  # one process speaks for all of torchrun's

    def say(self, *lines: str) -> None:
        if self.silent:
            return
        for line in lines:
            print(line, file=sys.stderr if self.as_json else sys.stdout, flush=True)

    def warn(self, line: str) -> None:
        print(f"warning: {line}", file=sys.stderr, flush=True)

    def remarks(self, found: dict[str, Any]) -> None:
        """What a command that reads files has to say of them."""
        for row in found["skipped"]:
            self.warn(f"skipped {row['reason']}")
        for note in found["notes"]:
            self.warn(note)

    def result(self, value: dict[str, Any]) -> None:
        if self.as_json and not self.silent:
            print(json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain))


def _plain(value: Any):
    """numpy numbers and arrays, tuples, paths."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def domain_app(
    name: str, help: str, size: tuple[str, str, str], exports: str, own: Collection[str] = ()
) -> typer.Typer:
    """The verbs of one domain. size: (option, dotted recipe field, help) of the input's size, as `--frames`.

    exports: the formats that its `export` knows, for help.  own: verbs that the domain adds itself because they do more
    there, or goes without; `predict` and `embed` can be among them.
    """
    app = typer.Typer(name=name, help=help, no_args_is_help=True, pretty_exceptions_enable=False)
    Size = Annotated[int | None, typer.Option(size[0], help=size[2])]

    def domain():
        return importlib.import_module(f"adaptsuite.{name}.pipeline").DOMAIN

    def recipe(options: dict[str, Any]):
        return read_recipe(domain(), {**options, "size": (size[1], options.pop("size", None))})

    @app.command()
    def info(
        backbone: Backbone = None,
        random_weights: RandomWeights = False,
        setting: Setting = None,
        size: Size = None,
        as_json: Json = False,
    ) -> None:
        """List methods, recipes and backbones; with --backbone, what that one is and where adapters can go."""
        from adaptsuite.inspection import backbone_info, domain_info

        console = Console(as_json)
        if backbone is None:
            lines, found = domain_info(domain())
        else:
            lines, found = backbone_info(domain(), recipe(dict(locals(), method="linear")))
        console.say(*lines)
        console.result(found)

    @app.command()
    def check(
        data: Data = None,
        setting: Setting = None,
        recipe_name: RecipeName = None,
        test: Test = None,
        val: Val = None,
        cv: Cv = None,
        seed: Seed = None,
        skip_bad: SkipBad = False,
        as_json: Json = False,
    ) -> None:
        """Read every row and every file of a data set, and say what is wrong before anything is trained."""
        from adaptsuite.inspection import check_data

        console = Console(as_json)
        lines, found = check_data(domain(), recipe(locals()))
        console.say(*lines)
        console.result(found)
        if not found["ok"]:
            raise DataError(found["problems"][0] if len(found["problems"]) == 1 else _several(found["problems"]))

    @app.command()
    def budget(
        data: Data = None,
        backbone: Backbone = None,
        random_weights: RandomWeights = False,
        method: Method = None,
        setting: Setting = None,
        recipe_name: RecipeName = None,
        batch_size: BatchSize = None,
        last_k: LastK = None,
        size: Size = None,
        as_json: Json = False,
    ) -> None:
        """Parameters, MACs, activation bytes and file size of a training, before it is run."""
        from adaptsuite.budget import describe, describe_depths
        from adaptsuite.experiment import budget_of, budgets_of

        console = Console(as_json)
        if last_k == "all":
            depths = budgets_of(domain(), recipe(locals()))
            console.say(*describe_depths(depths))
            console.result({"last_k": [{"last_k": k, **own.as_dict()} for k, own in depths.items()]})
            return
        setting = [*(setting or ()), *([] if last_k is None else [f"last_k={last_k}"])]
        found = budget_of(domain(), recipe(locals()))
        console.say(*describe(found))
        for note in found.notes:
            console.warn(note)
        counted = found.as_dict()  # MACs are compared by the item; the batch is a choice of the recipe
        console.result({**counted, "macs": counted.pop("macs_per_item"), "macs_of_batch": counted["macs"]})

    @app.command()
    def doctor(
        backbone: Backbone = None,
        random_weights: RandomWeights = False,
        method: Method = None,
        setting: Setting = None,
        recipe_name: RecipeName = None,
        seed: Seed = None,
        size: Size = None,
        as_json: Json = False,
    ) -> None:
        """Whether a method lives on a backbone: every trained tensor gets a gradient, train = eval = merged."""
        from adaptsuite.inspection import examine

        console = Console(as_json)
        lines, found = examine(domain(), recipe(locals()))
        console.say(*lines)
        console.result(found)
        if not found["ok"]:
            raise UsageError("; ".join(found["problems"]))

    @app.command("lr-test")
    def lr_test(
        data: Data = None,
        backbone: Backbone = None,
        random_weights: RandomWeights = False,
        method: Method = None,
        setting: Setting = None,
        recipe_name: RecipeName = None,
        test: Test = None,
        val: Val = None,
        cv: Cv = None,
        seed: Seed = None,
        batch_size: BatchSize = None,
        device: Device = None,
        size: Size = None,
        low: Annotated[float, typer.Option("--low", help="The first learning rate.")] = 1e-5,
        high: Annotated[float, typer.Option("--high", help="The last one, unless the loss diverges before.")] = 10.0,
        steps: Annotated[int, typer.Option("--steps", help="How many rates, one step each.")] = 100,
        rise: Annotated[str, typer.Option("--rise", help="exponential or linear.")] = "exponential",
        out: Out = None,
        skip_bad: SkipBad = False,
        as_json: Json = False,
    ) -> None:
        """Let the learning rate climb for some steps, and say how large it may be; with --out the picture."""
        from adaptsuite import experiment
        from adaptsuite.range_test import climb, run

        console, rates = Console(as_json), climb(low, high, steps, rise)
        settled, manifest = experiment.settle(domain(), recipe(locals()))
        found = run(domain(), settled, manifest, rates, out, console.say)
        console.say(found["line"], *([f"report  {found['report']}"] if out else []))
        console.result(found)

    @app.command()
    def train(
        data: Data = None,
        backbone: Backbone = None,
        random_weights: RandomWeights = False,
        method: Method = None,
        setting: Setting = None,
        recipe_name: RecipeName = None,
        test: Test = None,
        val: Val = None,
        cv: Cv = None,
        seed: Seed = None,
        epochs: Epochs = None,
        lr: Lr = None,
        batch_size: BatchSize = None,
        device: Device = None,
        size: Size = None,
        out: Out = None,
        skip_bad: SkipBad = False,
        dry_run: DryRun = False,
        as_json: Json = False,
    ) -> None:
        """Fit an adapter, score it on rows it never saw, and write adapter, evidence and report to --out."""
        from adaptsuite import experiment

        console = Console(as_json)
        settled, manifest = experiment.settle(domain(), recipe(locals()))
        lines, plan = experiment.preview(domain(), settled, manifest)
        console.say(*lines)
        if dry_run:
            return console.result({"dry_run": True, **plan})
        if out is None:
            raise UsageError("--out is missing: the folder that gets the adapter and the report")
        result = experiment.run(domain(), settled, manifest, Path(out), console.say)
        if experiment.is_main():
            console.say(*experiment.summary(result))
            console.result(result)

    @app.command()
    def compare(
        methods: Annotated[
            str, typer.Option("--methods", help="a,b:rank=4,full: METHOD or METHOD:key=value (lists: x/y).")
        ],
        data: Data = None,
        backbone: Backbone = None,
        random_weights: RandomWeights = False,
        setting: Setting = None,
        recipe_name: RecipeName = None,
        test: Test = None,
        val: Val = None,
        cv: Cv = None,
        seed: Seed = None,
        epochs: Epochs = None,
        batch_size: BatchSize = None,
        device: Device = None,
        size: Size = None,
        turns: Annotated[int, typer.Option("--turns", help="How often steps and forwards are timed.")] = 9,
        out: Out = None,
        skip_bad: SkipBad = False,
        as_json: Json = False,
    ) -> None:
        """Train methods on the same rows, and set score, size, work and time of each beside full fine-tuning."""
        from adaptsuite import compare as bench
        from adaptsuite.compare_page import lines

        if out is None:
            raise UsageError("--out is missing: the folder that gets the adapters, the table and the report")
        if turns < 1:
            raise UsageError(f"--turns {turns}: expected a whole number from 1")
        console, options = Console(as_json), locals()

        def own(method: str, settings: list[str]):
            return recipe({**options, "method": method, "setting": [*(setting or ()), *settings]})

        given = {label: own(name, settings) for label, name, settings in bench.methods_of(methods)}
        found = bench.compare(domain(), given, own(bench.FULL, []), Path(out), console.say, turns)
        console.say(*lines(found["rows"]), *found["sentences"], f"report  {found['report']}")
        console.result(found)

    @app.command()
    def evaluate(
        adapter: AdapterFolder,
        data: Data = None,
        test: Test = None,
        batch_size: BatchSize = None,
        device: Device = None,
        skip_bad: SkipBad = False,
        as_json: Json = False,
    ) -> None:
        """Score a saved adapter on labelled rows: those of --test, else those with split=test, else all."""
        from adaptsuite import applied, experiment

        console = Console(as_json)
        folder = adapter_folder(adapter)
        found = applied.score_adapter(domain(), folder, _data(data), test, device, batch_size, skip_bad)
        console.say(*(f"warning   {text}" for text in found.result["warnings"]))
        console.say(*(f"skipped   {text}" for text in experiment.skipped_rows(found.subset)))
        console.say(*experiment.summary(found.result))
        console.result(found.result)

    def predict(
        adapter: AdapterFolder,
        files: Files,
        batch_size: BatchSize = None,
        device: Device = None,
        out: PredictionsOut = None,
        skip_bad: SkipBad = False,
        as_json: Json = False,
    ) -> None:
        """Label files, or all files below folders."""
        predict_files(Console(as_json), domain(), adapter, files, batch_size, device, out, skip_bad)

    if "predict" not in own:
        app.command()(predict)

    def embed(
        sources: Annotated[
            list[str],
            typer.Argument(metavar="[ADAPTER] FILE...", help="With --backbone only files or folders of them."),
        ],
        backbone: Backbone = None,
        random_weights: RandomWeights = False,
        windows: Annotated[
            bool, typer.Option("--windows", help="A row for each window that a file is read as, not for each file.")
        ] = False,
        batch_size: BatchSize = None,
        device: Device = None,
        size: Size = None,
        out: Annotated[str | None, typer.Option("--out", help="Table to write: .npz or .csv.")] = None,
        skip_bad: SkipBad = False,
        as_json: Json = False,
    ) -> None:
        """Write what a linear head would read of files: the features of an adapter or of a plain backbone."""
        from adaptsuite import applied

        if out is None or Path(out).suffix not in (".npz", ".csv"):
            raise UsageError("--out is missing: the table to write, .npz or .csv" if out is None else _no_table(out))
        if backbone is None and (random_weights or size is not None):
            raise UsageError("--random-weights and the input's size need --backbone: an adapter has its own")
        console = Console(as_json)
        source = recipe(locals()) if backbone is not None else adapter_folder(sources[0])
        files = sources if backbone is not None else sources[1:]
        if not files:
            raise UsageError("FILE... is missing: files or folders of them, after the adapter's folder")
        found = applied.embed_files(domain(), source, files, device, batch_size, windows, skip_bad)
        applied.write_features(Path(out), found)
        console.remarks(found)
        rows, dim = found["features"].shape
        console.say(f"features  {rows} x {dim}  {out}")
        console.result({"out": out, "rows": rows, "features": dim, "skipped": found["skipped"]})

    if "embed" not in own:
        app.command()(embed)

    @app.command()
    def report(
        adapter: AdapterFolder,
        data: Data = None,
        test: Test = None,
        batch_size: BatchSize = None,
        device: Device = None,
        out: Out = None,
        as_json: Json = False,
    ) -> None:
        """Write one HTML page of evidence on a saved adapter: on --data, else on its own run's test rows."""
        from adaptsuite import applied

        console = Console(as_json)
        folder = adapter_folder(adapter)
        found = applied.report_adapter(domain(), folder, data, test, device, batch_size, out)
        console.say(f"report  {found['report']}")
        console.result(found)

    @app.command()
    def demo(
        out: Annotated[str, typer.Option("--out", help="Folder of the reports.")] = "runs/demo", as_json: Json = False
    ) -> None:
        """Adapt the embedded backbone to generated data: no network, no files of yours, a minute or two."""
        run = importlib.import_module(f"adaptsuite.{name}.demo").run
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            found = run(out)
        Console(as_json).result(found)

    @app.command()
    def export(
        adapter: AdapterFolder,
        format: Annotated[str, typer.Option("--format", help=exports)],
        out: Annotated[str, typer.Option("--out", help="Folder, or NAME.pt2 for torch and NAME.onnx.")],
        as_json: Json = False,
    ) -> None:
        """Write an adapter as a model that other tools load, after comparing the two."""
        from adaptsuite.export import describe

        console = Console(as_json)
        write = importlib.import_module(f"adaptsuite.{name}.export").export
        found = write(adapter_folder(adapter), format, out)
        console.say(*describe(found))
        console.result(found)

    return app


def predict_files(
    console: Console,
    domain,
    adapter: str,
    files: list[str],
    batch_size: int | None,
    device: str | None,
    out: str | None,
    skip_bad: bool,
    label: Callable[..., dict[str, Any]] | None = None,
) -> None:
    """The verb `predict`: a label for each file; label: in place of `adaptsuite.applied.label_files`."""
    from adaptsuite import applied

    found = (label or applied.label_files)(domain, adapter_folder(adapter), files, device, batch_size, skip_bad)
    for row in found["predictions"]:
        best = sorted(row["scores"].items(), key=lambda item: -item[1])[:3]
        console.say(f"{row['path']}\t{row['label']}\t" + "  ".join(f"{k} {v:.3f}" for k, v in best))
    console.remarks(found)
    if out is not None:
        applied.write_predictions(Path(out), found["predictions"])
    console.result(found)


def read_recipe(domain, options: dict[str, Any]):
    """The recipe that the options of a command make: file or shipped one, then options, then --set in their order."""
    from adaptsuite.method import method_class
    from adaptsuite.recipe import Recipe, load_recipe, with_settings

    name = options.get("recipe_name")
    recipe = load_recipe(name, domain.name, domain.sections) if name else Recipe(domain=domain.name)
    values = {
        "backbone": options.get("backbone"),
        "random_weights": options.get("random_weights") or None,
        "method": options.get("method"),
        "seeds": None if options.get("seed") is None else (options["seed"],),
    }
    if values["method"] not in (None, recipe.method):
        values["method_settings"] = {}  # those of the recipe are its own method's
    recipe = _changed(recipe, values)
    data = {"manifest": options.get("data"), **{k: options.get(k) for k in ("test", "val", "cv")}}
    data["skip_bad"] = options.get("skip_bad") or None
    recipe = _changed(recipe, {"data": _changed(recipe.data, data)})
    plan = {k: options.get(k) for k in ("epochs", "lr", "batch_size", "device")}
    plan = {k: v for k, v in plan.items() if v is not None}
    recipe = _changed(recipe, {"plan": {**recipe.plan, **plan}})
    if "lr" in plan:  # one rate: there is nothing to choose from
        recipe = _changed(recipe, {"lr_grid": ()})
    (section, _, field), value = options["size"][0].partition("."), options["size"][1]
    if value is not None:
        recipe = _changed(recipe, {section: {**getattr(recipe, section), field: value}})
    fields = method_class(recipe.method) if recipe.method else None
    return with_settings(recipe, options.get("setting") or (), fields, domain.sections)


def _changed(value, changes: dict[str, Any]):
    from dataclasses import replace

    return replace(value, **{k: v for k, v in changes.items() if v is not None})


def adapter_folder(path: str | Path) -> Path:
    """The adapter folder itself, or the one inside a run's folder."""
    folder = Path(path)
    return folder / "adapter" if (folder / "adapter" / "adapter.json").is_file() else folder


def _data(data: str | None) -> str:
    if data is None:
        raise UsageError("--data is missing: a CSV with path,label or a folder of classes")
    return data


def _no_table(out: str) -> str:
    return f"--out {out}: a name that ends in .npz or .csv is expected"


def _several(problems: list[str]) -> str:
    return f"{len(problems)} problems, the first: {problems[0]}"
