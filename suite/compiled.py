"""torch.compile of a whole host with its adapters, as one graph."""

from functools import partial

import torch
from torch import nn

from adaptsuite.errors import UsageError

BACKEND = "inductor"
# The share of activations that the partitioner may keep under `lean`: below what norms and activations leave, so that
# it makes all of them again, and above where it would start on products with weights.
LEAN_SHARE = 0.7


def compile_host(model: nn.Module, lean: bool = False) -> None:
    """Calls of `model` run one compiled graph from now on; another context or index of rows compiles nothing anew.

    lean: backward makes norms and activations again, as adaptsuite.lean does in eager mode. The graph is made in the
    first call, which raises torch._dynamo.exc.Unsupported where a model has no single graph (see `reason`).
    """
    model.compile(fullgraph=True, backend=partial(_lean, BACKEND) if lean else BACKEND)


def uncompile(model: nn.Module) -> None:
    model._compiled_call_impl = None


def _lean(backend: str, graph, inputs):
    with torch._functorch.config.patch(activation_memory_budget=LEAN_SHARE):
        return torch._dynamo.lookup_backend(backend)(graph, inputs)


def reason(error: Exception) -> UsageError | None:
    """What to tell a user of an error while compiling, in one line; None where it is another error."""
    from torch._dynamo.exc import TorchDynamoException

    if not isinstance(error, TorchDynamoException):
        return None
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return UsageError(f"this model does not compile as one graph ({text}): take compile=false")
