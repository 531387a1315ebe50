"""`adapt`: one command, a sub-command for each domain. No torch is imported before a command runs."""

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

import adaptsuite
from adaptsuite.errors import UsageError, nearest

COMMANDS = ("audio", "vision", "medical", "vl")  # domains that have commands

app = typer.Typer(
    name="adapt",
    help="Fit pretrained foundation models to one domain with adapters of a few megabytes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"adaptsuite {adaptsuite.__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Fit pretrained foundation models to one domain with adapters of a few megabytes."""


@app.command()
def demo(
    out: str = typer.Option("runs/demo", help="Folder of the reports."),
) -> None:
    """Adapt the embedded backbones to generated data: no network, no files of yours, five minutes, one page."""
    import time

    from adaptsuite.demo import write_index

    start, found = time.perf_counter(), {}
    for number, domain in enumerate(COMMANDS, 1):
        typer.echo(f"\n[{number}/{len(COMMANDS)}] {domain}, after {time.perf_counter() - start:.0f} s")
        found[domain] = importlib.import_module(f"adaptsuite.{domain}.demo").run(out)
    seconds = time.perf_counter() - start
    typer.echo(f"\nall four  {write_index(out, found, seconds)}  ({seconds:.0f} s): open it in a browser")


@app.command()
def recipes(as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False) -> None:
    """List the recipes that come with each domain: method, backbone, expected cost and paper."""
    from adaptsuite.commands import Console
    from adaptsuite.recipe import load_recipe, shipped_recipes

    console, found = Console(as_json), []
    for domain in COMMANDS:
        for name in shipped_recipes(domain):
            recipe = load_recipe(name, domain)
            times = f"{recipe.plan['epochs']} epochs" + (
                f" x {len(recipe.seeds)} seeds" if len(recipe.seeds) > 1 else ""
            )
            console.say(f"{domain:<8} {name:<18} {recipe.method} on {recipe.backbone}")
            console.say(f"{'':<9}cost   {recipe.cost}; {times}")
            if recipe.paper:
                console.say(f"{'':<9}paper  {recipe.paper}")
            row = {"domain": domain, "name": name, "method": recipe.method, "backbone": recipe.backbone}
            found.append({**row, "cost": recipe.cost, "paper": recipe.paper, "epochs": recipe.plan["epochs"]})
    console.say("\nadapt DOMAIN train --recipe NAME --data YOURS --out runs/mine; --backbone and --set change it")
    console.result({"recipes": found})


@app.command()
def compose(
    expression: Annotated[str, typer.Argument(help="Such as '0.7*a + 0.3*b - c' or '(a + b) / 2'.")],
    adapter: Annotated[list[str], typer.Option(help="NAME=DIR, for each name: an adapter's folder or its run's.")],
    out: Annotated[str, typer.Option(help="Folder of the new adapter.")],
    rank: Annotated[int | None, typer.Option(help="Cut low-rank adapters to this rank; the error is said.")] = None,
    elementwise: Annotated[bool, typer.Option("--elementwise", help="Sum the factors apart, for one start.")] = False,
    head: Annotated[str | None, typer.Option(help="NAME of the adapter whose head and labels are kept.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Add, negate, scale and average saved adapters: a new adapter that changes the backbone as their sum does."""
    from adaptsuite.commands import Console
    from adaptsuite.compose import compose, summary

    record = compose(expression, _named(adapter), out, rank=rank, elementwise=elementwise, head=head)
    lines, facts = summary(record)
    console = Console(as_json)
    console.say(*lines)
    console.result(facts)


@app.command()
def serve(
    adapters: Annotated[str, typer.Option(help="Folder with adapters or runs directly below, all of one backbone.")],
    port: Annotated[int, typer.Option(help="Of this machine.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen at: this machine's own alone.")] = "127.0.0.1",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    batch_size: Annotated[int, typer.Option(help="Most files, or windows of sounds, in one forward.")] = 32,
) -> None:
    """Answer HTTP requests by many adapters of one backbone, whose requests share batches (extra: serve)."""
    from adaptsuite.serve import serve

    serve(adapters, host, port, device, batch_size, lambda line: print(line, flush=True))


def _named(pairs: Sequence[str]) -> dict[str, Path]:
    """NAME=DIR texts as a table; of a run's folder its adapter."""
    from adaptsuite.commands import adapter_folder

    found: dict[str, Path] = {}
    for pair in pairs:
        name, _, folder = pair.partition("=")
        if not name.isidentifier() or not folder or name in found:
            raise UsageError(f"--adapter {pair!r} is {'given twice' if name in found else 'not of the form NAME=DIR'}")
        found[name] = adapter_folder(folder)
    return found


for _domain in COMMANDS:
    app.add_typer(importlib.import_module(f"adaptsuite.{_domain}.cli").app, name=_domain)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    0 ok, 1 the work failed, 2 usage, 3 data, 4 adapter and base do not fit, 5 resource, 130 interrupted. What a user
    did wrong is one line on stderr; with ADAPTSUITE_DEBUG=1 the traceback is shown instead.
    """
    command = typer.main.get_command(app)
    try:
        code = command.main(list(sys.argv[1:] if arguments is None else arguments), "adapt", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output has gone: nothing is wrong here
        sys.stdout = open(os.devnull, "w")
        return 0
    except MemoryError as e:
        return _fail(f"out of memory: {e}", 5)
    except Exception as e:
        if os.environ.get("ADAPTSUITE_DEBUG"):
            raise
        if type(e).__name__ == "NoArgsIsHelpError":  # its message is the help itself
            typer.echo(e.format_message())
            return 2
        if hasattr(e, "format_message"):  # typer's own: a wrong option, a missing argument
            return _fail(_usage(e), 2)
        if type(e).__name__ == "Abort":
            return _fail("interrupted", 130)
        if hasattr(e, "exit_code"):
            return _fail(str(e), e.exit_code)
        if isinstance(e, LookupError) and e.args and isinstance(e.args[0], str):  # a role or name that a model lacks
            return _fail(e.args[0], 2)
        if isinstance(e, OSError):
            return _fail(f"{e.filename or 'file system'}: {e.strerror or e}", 5)
        return _fail(f"failed: {type(e).__name__}: {e} (ADAPTSUITE_DEBUG=1 shows where)", 1)


def _usage(error) -> str:
    """typer's message on one line, with the nearest options of the command where an option is unknown."""
    message = " ".join(error.format_message().split())
    name, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    if context is not None and message.startswith("No such command '"):
        word, group = message.split("'")[1], context.command.commands
        verbs = group["audio"].commands if "audio" in group else {}
        hint = f"it is a verb of a domain: adapt DOMAIN {word}" if word in verbs else nearest(word, group)
        message = f"no command {word!r} in {context.command_path}; {hint}"
    if name and context is not None and "No such option" in message:
        options = [o for p in context.command.params for o in p.opts if o.startswith("--")]
        message = f"no option {name} in {context.command_path}; {nearest(name, options)}"
    elif context is not None and ";" not in message:
        message += f" ({context.command_path} --help lists what there is)"
    return message


def _fail(message: str, code: int) -> int:
    """One line, whatever the message holds."""
    print("adapt: " + " ".join(message.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
