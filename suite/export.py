"""Adapted models in the formats of other tools: torch.export, ONNX, peft, and what a domain adds.

Every writer reads back what it wrote and compares it with `expected`, what the adapter itself said, before anything
appears under its name; it returns the largest difference and raises Inexact where that is above LARGEST.
"""

import io
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptsuite import __version__
from adaptsuite.atomic import check_target, write_file
from adaptsuite.domain import Domain
from adaptsuite.errors import Inexact, UsageError, nearest
from adaptsuite.experiment import restore
from adaptsuite.host import Handle, attach
from adaptsuite.peft_bridge import from_peft, to_peft
from adaptsuite.recipe import Recipe

LARGEST = 1e-4
METADATA = "adaptsuite.json"  # among the extra files of a torch.export archive
SUFFIX = {"torch": ".pt2", "onnx": ".onnx"}  # the other formats are folders


@dataclass(frozen=True)
class Job:
    """A restored adapter on its way into another format."""

    domain: Domain
    handle: Handle
    recipe: Recipe
    labels: list[str]
    record: Any
    out: Path

    @property
    def model(self) -> Any:
        return self.handle.model


Writer = Callable[[Job], tuple[float, list[str]]]  # largest difference, notes


def export(
    domain: Domain, formats: Mapping[str, Writer], folder: str | Path, format: str, out: str | Path
) -> dict[str, Any]:
    """{"export": path, "format", "max_difference", "bytes", "labels", "notes"}; `out` is a file for torch and onnx.

    Raises UsageError with the reason for what a format cannot hold, Inexact where the written model says something
    else than the adapter; nothing is then written.
    """
    if format not in formats:
        raise UsageError(f"--format {format!r} is not known; {nearest(format, formats)}")
    out, suffix = Path(out), SUFFIX.get(format)
    if suffix and (out.suffix != suffix or out.is_dir()):
        raise UsageError(f"--out {out}: --format {format} writes a file, name it NAME{suffix}")
    if not suffix:
        check_target(out)
    if format == "onnx":
        needs_onnx()
    handle, recipe, labels, record = restore(domain, folder)
    gap, notes = formats[format](Job(domain, handle, recipe, labels, record, out))
    files = [out] if suffix else [p for p in out.rglob("*") if p.is_file()]
    return {
        "export": str(out),
        "format": format,
        "max_difference": gap,
        "bytes": sum(p.stat().st_size for p in files),
        "labels": labels,
        "notes": notes,
    }


def describe(found: dict[str, Any]) -> list[str]:
    """The result of `export`, one fact per line."""
    return [
        f"export   {found['export']}  ({found['format']}, {found['bytes'] / 1e6:.2f} MB)",
        f"labels   {len(found['labels'])}: {', '.join(found['labels'])}",
        f"differs  by at most {found['max_difference']:.1e} from the adapter",
        *(f"note     {note}" for note in found["notes"]),
    ]


def metadata(job: Job, **of_input: Any) -> dict[str, Any]:
    """What a user of the file must know beside its tensors; a threshold is of probabilities, None: the best wins."""
    multilabel = job.recipe.data.task == "multilabel"
    threshold = job.record.threshold
    return {
        "adaptsuite": __version__,
        "method": job.recipe.method,
        "base": job.record.base["fingerprint"],
        "recipe_hash": job.record.recipe_hash,
        "task": job.recipe.data.task,
        "labels": job.labels,
        **of_input,
        "output": "logits",
        "activation": "sigmoid" if multilabel else "softmax",
        "threshold": 0.5 if threshold is None and multilabel else threshold,
        "temperature": job.record.temperature,
    }


def write_graph(
    job: Job, write: Callable[..., float], graph: nn.Module, inputs: dict[str, Tensor], facts: dict[str, Any]
) -> float:
    """By write_torch or write_onnx: merged where the method can be, else with the adapter's branches in the graph."""
    graph.eval()
    with torch.no_grad():
        expected = graph(**inputs)
    if job.handle.method.mergeable is True:
        (job.handle.merge if job.handle.bank.rests(job.handle.name) else job.handle.bake)()
    return write(job.out, graph, inputs, expected, facts)


def agree(what: str, found: Tensor, expected: Tensor) -> float:
    """The largest difference of two outputs. Raises Inexact above LARGEST, and for anything that is not finite."""
    gap = float((found - expected).abs().max())
    if not gap <= LARGEST:
        raise Inexact(f"{what} differs by {gap:.1e} from the adapter, at most {LARGEST:.0e} is allowed: not written")
    return gap


def write_torch(
    path: Path, graph: nn.Module, inputs: dict[str, Tensor], expected: Tensor, metadata: dict[str, Any]
) -> float:
    """A .pt2 of torch.export, batch free, the metadata as JSON among its extra files. inputs: by name, batch first.

    `torch.export.load(path, extra_files={"adaptsuite.json": ""}).module()` takes the inputs in their order.
    """
    archive = io.BytesIO()
    torch.export.save(trace(graph, inputs), archive, extra_files={METADATA: json.dumps(metadata)})
    archive.seek(0)
    gap = _check(path, torch.export.load(archive).module(), inputs, expected)
    write_file(path, archive.getvalue())
    return gap


def write_onnx(
    path: Path, graph: nn.Module, inputs: dict[str, Tensor], expected: Tensor, metadata: dict[str, Any]
) -> float:
    """One .onnx file, batch free, output `logits`, checked in onnxruntime; metadata_props hold strings or JSON."""
    needs_onnx()
    import onnxruntime

    traced, names = trace(graph, inputs), {"input_names": list(inputs), "output_names": ["logits"]}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "# The axis name")  # it is one name for one size, of all inputs
        program = torch.onnx.export(traced, dynamic_shapes=_free_batch(inputs), **names, dynamo=True, verbose=False)
    program.model.metadata_props.update({k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()})
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(*tensors: Tensor) -> Tensor:
        feed = {name: t.numpy() for name, t in zip(inputs, tensors, strict=True)}
        return torch.from_numpy(session.run(["logits"], feed)[0])

    gap = _check(path, run, inputs, expected)
    write_file(path, content)
    return gap


def needs_onnx() -> None:
    """Raises UsageError where the extra is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as e:
        raise UsageError(f"--format onnx needs an extra ({e.name}): pip install 'adaptsuite[onnx]'") from None


def trace(graph: nn.Module, inputs: dict[str, Tensor]) -> torch.export.ExportedProgram:
    """With the batch free, without the folders of this computer. Raises UsageError for what cannot be traced."""
    try:
        traced = torch.export.export(graph, tuple(inputs.values()), dynamic_shapes=_free_batch(inputs), strict=False)
    except Exception as e:  # torch raises a dozen kinds, each with a page of text
        reason = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise UsageError(f"torch.export cannot trace this model: {reason}") from e
    for module in traced.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # holds the folders of this computer
    return traced


def _free_batch(inputs: dict[str, Tensor]) -> tuple[dict[int, Any], ...]:
    batch = torch.export.Dim("batch", min=1)
    return tuple({0: batch} for _ in inputs)


def _check(path: Path, run: Callable[..., Tensor], inputs: dict[str, Tensor], expected: Tensor) -> float:
    """The whole batch, then its last row alone: a graph that learnt the size of the batch fails."""
    with torch.no_grad():
        whole, last = run(*inputs.values()), run(*(v[-1:] for v in inputs.values()))
    return agree(str(path), torch.cat([whole, last]), torch.cat([expected, expected[-1:]]))


def write_peft(handle: Handle, part: str, folder: Path, run: Callable[[nn.Module], Tensor]) -> float:
    """A peft folder of the LoRA on one part of a task model, its backbone; trained heads outside it are left out.

    The names in it are those of the part alone, so that `PeftModel.from_pretrained(AutoModel.from_pretrained(BASE),
    folder)` finds its modules. run: what to compare, given the part.  The adapter leaves the task model for the part.
    """
    model, state, method = handle.model, handle.state(), handle.method
    if method.name.startswith("peft:"):
        raise UsageError(f"{method.name} cannot be compared: only lora is read from peft; adaptsuite.to_peft writes it")
    module, key = model.get_submodule(part), f".{part.replace('.', '/')}/"
    own = {k.replace(key, ".", 1): v.clone() for k, v in state.items() if key in k}
    with torch.no_grad():
        expected = run(module)
    norms = any(kind == "norm" for kind in handle.adapter.kinds.values())
    handle.detach()
    alone = attach(module, method, train_norms=norms)
    alone.load_state(own)
    with tempfile.TemporaryDirectory() as temp:
        to_peft(alone, Path(temp) / "peft")
        alone.detach()
        back = from_peft(module, Path(temp) / "peft")
        with torch.no_grad():
            gap = agree(str(folder), run(module), expected)
    to_peft(back, folder)
    return gap
