"""The learning rate that validation rows choose (`lr_grid` of a recipe): one fit for each, all from the same start."""

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


@dataclass
class Choice:
    """The plan that was best on the validation rows, and what became of all of them."""

    plan: Plan
    fit: FitResult
    table: list[dict[str, Any]]  # a row for each rate: lr, head_lr where set, the monitor, best_epoch, stopped, chosen
    notes: list[str]  # for the reader of the result


def plans_of(recipe: Recipe, fold: Fold, seed: int) -> list[Plan]:
    """A plan for each rate of the recipe's grid; without a grid the recipe's own.

    A rate stands in for plan.lr, and head_lr keeps its ratio to it: one factor for all groups, as schedules have it.
    Raises UsageError for a grid that cannot be, and where there are no validation rows to choose by.
    """
    plan = recipes.build(Plan, {**recipe.plan, "seed": seed}, "plan")
    if (recipe.lr_grid or recipe.refit) and not len(fold.val):
        what = "lr_grid chooses the learning rate" if recipe.lr_grid else "refit chooses the number of epochs"
        raise UsageError(
            f"{what} on validation rows, and {fold.name} has none: go without --val none, or without the choice "
            "(--set lr_grid= --set refit=false)"
        )
    rates = [f"{rate:g}" for rate in recipe.lr_grid]
    if len(set(rates)) < len(rates):
        raise UsageError(f"lr_grid={','.join(rates)} names a rate twice")
    try:
        return [
            replace(plan, lr=rate, head_lr=None if plan.head_lr is None else plan.head_lr * rate / plan.lr)
            for rate in recipe.lr_grid
        ] or [plan]
    except UsageError as error:
        raise UsageError(f"lr_grid: {error}") from None


def choose(
    handle,
    plans: Sequence[Plan],
    fitted: Callable[[Plan, Path], FitResult],
    monitor: str,
    out: Path,
    say: Callable[[str], None],
) -> Choice:
    """Fits every plan in out/lr-RATE, from the handle's state of now, and leaves the best one's weights in place.

    The best as epochs are ranked (`trainer.rank`), of equals the first; one that diverges, or grows weights that no
    adapter may hold, comes after all others. Raises Diverged where none has a finite monitor.
    """
    start, best, table, notes = copied(handle.state()), None, [], []
    for plan in plans:
        handle.load_state(start)
        row = {"lr": plan.lr} if plan.head_lr is None else {"lr": plan.lr, "head_lr": plan.head_lr}
        try:
            fit, state = fitted(plan, out / f"lr-{plan.lr:g}"), copied(handle.state())
            check_values(f"lr {plan.lr:g}", state, sorted(state.keys() - handle.trained().keys()))
        except (Diverged, AdapterError) as error:
            table.append({**row, monitor: None, "best_epoch": None, "stopped": "diverged", "chosen": False})
            notes.append(f"lr {plan.lr:g} diverged: {error}")
            say(f"rate      {plan.lr:g}  diverged")
            continue
        value, place = fit.best.get(monitor), rank(fit.best, monitor)
        table.append({**row, monitor: value, "best_epoch": fit.best_epoch, "stopped": fit.stopped, "chosen": False})
        say(f"rate      {plan.lr:g}  {monitor} {'none' if value is None else f'{value:.3f}'} at epoch {fit.best_epoch}")
        if place is not None and (best is None or place > best[0]):
            best = place, plan, fit, table[-1], state
    if best is None:
        raise Diverged(f"no rate of lr_grid gave a finite {monitor} on the validation rows. {'. '.join(notes)}")
    _, plan, fit, row, state = best
    handle.load_state(state)
    row["chosen"] = True
    say(f"chosen    {plan.lr:g}")
    return Choice(plan, fit, table, [*notes, *_remarks(plan.lr, [p.lr for p in plans])])


def _remarks(chosen: float, rates: Sequence[float]) -> list[str]:
    notes = [
        f"validation rows chose lr {chosen:g} of {', '.join(f'{rate:g}' for rate in rates)} and its epoch: validation "
        "scores are too good; test rows had no part in the choice"
    ]
    for end, limit, beyond in (("lowest", min(rates), "lower"), ("highest", max(rates), "higher")):
        if chosen == limit and len(rates) > 2:
            notes.append(f"lr {chosen:g} is the {end} that was tried: a {beyond} one may be better")
    return notes


def section(rows: Sequence[dict[str, Any]], monitor: str) -> dict[str, Any]:
    """What the report says of the rates that were tried."""
    return {
        "title": "Learning rates",
        "text": f"Each was fitted from the same start and judged by {monitor} on validation rows at its best epoch. "
        "Test rows had no part in the choice.",
        "table": [{**row, **{key: f"{row[key]:g}" for key in ("lr", "head_lr") if key in row}} for row in rows],
    }
