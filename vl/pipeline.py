"""What the commands need of images and text: data.task says what is asked of a picture, and each task is one file."""

from collections.abc import Callable
from typing import Any

from torch import nn

from adaptsuite.errors import UsageError, nearest
from adaptsuite.host import Handle
from adaptsuite.recipe import Recipe
from adaptsuite.vl.captions import Captions
from adaptsuite.vl.domain import PairedDomain
from adaptsuite.vl.few_shot import BaseToNew, FewShot
from adaptsuite.vl.retrieval import Retrieval
from adaptsuite.vl.vqa import Questions
from adaptsuite.vl.whole import is_whole
from adaptsuite.vl.whole_vqa import WholeQuestions

TASKS: dict[str, PairedDomain] = {
    task.data_task: task for task in (Questions(), Captions(), Retrieval(), FewShot(), BaseToNew())
}
WHOLE = WholeQuestions()  # vqa of models that were made to write about pictures
UNSAID = ("multiclass", "free")  # what data.task is where nobody chose it: questions


def task_of(thing: Any) -> PairedDomain:
    """The task of data settings, of a recipe, of a table, of a task model or of an adapter on one."""
    thing = thing.model if isinstance(thing, Handle) else thing
    data = thing.data if isinstance(thing, Recipe) else thing
    name = data.data_task if isinstance(data, nn.Module) else data.task
    name = "vqa" if name in UNSAID else name
    if name == "vqa" and (is_whole(thing.backbone) if isinstance(thing, Recipe) else getattr(thing, "whole", False)):
        return WHOLE
    if name not in TASKS:
        raise UsageError(f"data.task={name} is no task of images and text; {nearest(name, TASKS)}")
    return TASKS[name]


def _of_task(hook: str) -> Callable[..., Any]:
    """A hook that is the task's own, whose first argument says which."""
    return lambda self, first, *more, **named: getattr(task_of(first), hook)(first, *more, **named)


class VlDomain(PairedDomain):
    """Hands every hook to the task that is meant; what has no task to tell is the same for all."""

    backbones = tuple(dict.fromkeys(name for task in TASKS.values() for name in task.backbones))

    # told by data settings or a recipe
    table = _of_task("table")
    doubts = _of_task("doubts")
    settle = _of_task("settle")
    defaults_of = _of_task("defaults_of")
    model = _of_task("model")
    decided = _of_task("decided")
    placed = _of_task("placed")
    task = _of_task("task")
    beside = _of_task("beside")
    keep = _of_task("keep")
    answers = _of_task("answers")
    evidence = _of_task("evidence")
    # told by a table
    targets = _of_task("targets")
    further = _of_task("further")
    evaluate = _of_task("evaluate")
    score = _of_task("score")
    predictions = _of_task("predictions")
    # told by a task model or an adapter on one
    dataset = _of_task("dataset")
    rows = _of_task("rows")
    prepare = _of_task("prepare")
    notes = _of_task("notes")
    sample = _of_task("sample")
    describe = _of_task("describe")
    outputs = _of_task("outputs")
    restored = _of_task("restored")
    extra = _of_task("extra")


DOMAIN = VlDomain()
