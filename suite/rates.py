"""The learning rate and weight decay that validation rows choose (`lr_grid` and `weight_decay_grid` of a recipe).

One fit for each pair, all from the same start: the best decay depends on the rate (arXiv:1803.09820, section 4.4).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adaptsuite import recipe as recipes
from adaptsuite.checkpoint import copied
from adaptsuite.errors import AdapterError, Diverged, UsageError
from adaptsuite.manifest import Fold
from adaptsuite.plan import Plan
from adaptsuite.reading import check_values
from adaptsuite.recipe import Recipe
from adaptsuite.trainer import FitResult, rank

NAMES = {"lr": "lr", "weight_decay": "wd"}  # what grids are of


@dataclass
class Choice:
    """The plan that was best on the validation rows, and what became of all of them."""

    plan: Plan
    fit: FitResult
    # a row for each plan: lr, head_lr where set, weight_decay of a grid, the monitor, best_epoch, stopped, chosen
    table: list[dict[str, Any]]
    notes: list[str]  # for the reader of the result


def plans_of(recipe: Recipe, fold: Fold, seed: int) -> list[Plan]:
    """A plan for each pair of the recipe's grids; without a grid the recipe's own.

    A rate stands in for plan.lr, and head_lr keeps its ratio to it: one factor for all groups, as schedules have it.
    Raises UsageError for a grid that cannot be, and where there are no validation rows to choose by.
    """
    plan = recipes.build(Plan, {**recipe.plan, "seed": seed}, "plan")
    grids = {"lr_grid": "the learning rate", "weight_decay_grid": "the weight decay", "refit": "the number of epochs"}
    asked = [name for name in grids if getattr(recipe, name)]
    if asked and not len(fold.val):
        raise UsageError(
            f"{asked[0]} chooses {grids[asked[0]]} on validation rows, and {fold.name} has none: go without --val "
            "none, or without the choice (--set lr_grid= --set weight_decay_grid= --set refit=false)"
        )
    rates = _changes(
        recipe, "lr_grid", plan, lambda lr: {"lr": lr, "head_lr": plan.head_lr and plan.head_lr * lr / plan.lr}
    )
    decays = _changes(recipe, "weight_decay_grid", plan, lambda decay: {"weight_decay": decay})
    return [replace(plan, **rate, **decay) for rate in rates for decay in decays]


def _changes(recipe: Recipe, grid: str, plan: Plan, change: Callable[[float], dict[str, Any]]) -> list[dict[str, Any]]:
    """What each value of a grid changes of the plan; nothing where the grid is empty."""
    values, names = getattr(recipe, grid), [f"{value:g}" for value in getattr(recipe, grid)]
    if len(set(names)) < len(names):
        raise UsageError(f"{grid}={','.join(names)} names {'a rate' if grid == 'lr_grid' else 'a decay'} twice")
    try:
        for value in values:
            replace(plan, **change(value))
    except UsageError as error:
        raise UsageError(f"{grid}: {error}") from None
    return [change(value) for value in values] or [{}]


def _varied(plan: Plan, plans: Sequence[Plan]) -> dict[str, float]:
    """What tells a plan from the others, the rate always: lr, head_lr where set, weight_decay where it has a grid."""
    row = {"lr": plan.lr} if plan.head_lr is None else {"lr": plan.lr, "head_lr": plan.head_lr}
    return row | ({"weight_decay": plan.weight_decay} if len({p.weight_decay for p in plans}) > 1 else {})


def _label(row: dict[str, Any], between: str = " ") -> str:
    return between.join(_named(key, row[key], between) for key in NAMES if key in row)


def _named(key: str, value: float, between: str = " ") -> str:
    return f"{NAMES[key]}{between}{value:g}"


def choose(
    handle,
    plans: Sequence[Plan],
    fitted: Callable[[Plan, Path], FitResult],
    monitor: str,
    out: Path,
    say: Callable[[str], None],
) -> Choice:
    """Fits every plan in out/lr-RATE, from the handle's state of now, and leaves the best one's weights in place.

    With a grid of decays the folders are lr-RATE-wd-DECAY.
    The best as epochs are ranked (`trainer.rank`), of equals the first; one that diverges, or grows weights that no
    adapter may hold, comes after all others. Raises Diverged where none has a finite monitor.
    """
    start, best, table, notes = copied(handle.state()), None, [], []
    for plan in plans:
        handle.load_state(start)
        row = _varied(plan, plans)
        try:
            fit, state = fitted(plan, out / _label(row, "-")), copied(handle.state())
            check_values(_label(row), state, sorted(state.keys() - handle.trained().keys()))
        except (Diverged, AdapterError) as error:
            table.append({**row, monitor: None, "best_epoch": None, "stopped": "diverged", "chosen": False})
            notes.append(f"{_label(row)} diverged: {error}")
            say(f"rate      {_label(row).removeprefix('lr ')}  diverged")
            continue
        value, place = fit.best.get(monitor), rank(fit.best, monitor)
        table.append({**row, monitor: value, "best_epoch": fit.best_epoch, "stopped": fit.stopped, "chosen": False})
        shown = "none" if value is None else f"{value:.3f}"
        say(f"rate      {_label(row).removeprefix('lr ')}  {monitor} {shown} at epoch {fit.best_epoch}")
        if place is not None and (best is None or place > best[0]):
            best = place, plan, fit, table[-1], state
    if best is None:
        raise Diverged(f"no rate of lr_grid gave a finite {monitor} on the validation rows. {'. '.join(notes)}")
    _, plan, fit, row, state = best
    handle.load_state(state)
    row["chosen"] = True
    say(f"chosen    {_label(row).removeprefix('lr ')}")
    return Choice(plan, fit, table, [*notes, *_remarks(row, table)])


def _remarks(chosen: dict[str, Any], table: Sequence[dict[str, Any]]) -> list[str]:
    grids = {key: list(dict.fromkeys(row[key] for row in table)) for key in ("lr", "weight_decay") if key in chosen}
    notes = [
        f"validation rows chose {_named(key, chosen[key])} of {', '.join(f'{value:g}' for value in values)} and its "
        "epoch: validation scores are too good; test rows had no part in the choice"
        for key, values in grids.items()
    ]
    for key, values in grids.items():
        for end, limit, beyond in (("lowest", min(values), "lower"), ("highest", max(values), "higher")):
            if chosen[key] == limit > 0 and len(values) > 2:
                notes.append(f"{_named(key, limit)} is the {end} that was tried: a {beyond} one may be better")
    return notes


def section(rows: Sequence[dict[str, Any]], monitor: str) -> dict[str, Any]:
    """What the report says of the rates that were tried."""
    return {
        "title": "Learning rates and weight decays" if "weight_decay" in rows[0] else "Learning rates",
        "text": f"Each was fitted from the same start and judged by {monitor} on validation rows at its best epoch. "
        "Test rows had no part in the choice.",
        "table": [
            {**row, **{key: f"{row[key]:g}" for key in ("lr", "head_lr", "weight_decay") if key in row}} for row in rows
        ],
    }
