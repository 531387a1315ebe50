"""What a model looks at: the attention of its blocks, attention rollout and Grad-CAM; the model stays as it was."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adaptsuite.bank import BANK
from adaptsuite.errors import UsageError
from adaptsuite.vision.grid import (
    Place,
    Tokens,
    bank_of,
    block_paths,
    channels_last,
    component_of,
    patches,
    watched,
)

FLAGS = {  # what is set on modules that have it, for as long as the model is looked at
    "fused_attn": True,  # timm's blocks then make the one call that `Attention` answers
    "grad_checkpointing": False,
    "gradient_checkpointing": False,
}


MOST_BYTES = 1 << 30  # of the attention of one block


@contextlib.contextmanager
def still(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode, without checkpointing; afterwards its modes, flags and grids are as they were."""
    modules, bank = list(model.modules()), bank_of(model)
    modes = [(m, m.training) for m in modules]
    flags = [(m, name, m.__dict__[name]) for m in modules for name in FLAGS if isinstance(m.__dict__.get(name), bool)]
    learning = [(p, p.requires_grad) for p in model.parameters()]
    context = bank.context if bank is not None else None
    model.eval()
    for module, name, _ in flags:
        setattr(module, name, FLAGS[name])
    try:
        yield model
    finally:
        for module, name, value in flags:
            setattr(module, name, value)
        for module, mode in modes:
            module.training = mode
        for parameter, learns in learning:
            parameter.requires_grad_(learns)
        if bank is not None:
            bank.context = context


# ---- attention


class Attention(TorchFunctionMode):
    """Computes torch's fused attention step by step, and shows the softmax of each block to `see`."""

    def __init__(self, see: Callable[[int, Tensor], None]):
        super().__init__()
        self.see, self.block, self.calls = see, None, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention and self.block is not None:
            return self.attention(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def attention(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ) -> Tensor:
        """query, key, value (B, heads, T, D / heads)."""
        values = query.shape[:-1].numel() * key.shape[-2]
        if 4 * values > MOST_BYTES:
            raise UsageError(f"the attention of {key.shape[-2]} tokens takes {4e-9 * values:.1f} GB a block")
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        logits = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if is_causal:
            attn_mask = logits.new_ones(logits.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            takes_part = attn_mask.dtype == torch.bool
            logits = logits.masked_fill(~attn_mask, float("-inf")) if takes_part else logits + attn_mask
        weights = logits.softmax(-1)  # (B, heads, T, T)
        self.calls += 1
        self.see(self.block, weights.detach())
        return weights.to(value.dtype) @ value

    def enter(self, block: int):
        def hook(module, args, kwargs):
            x = (*args, *kwargs.values())[0]
            if x.ndim != 3:
                raise UsageError(f"{type(module).__name__} attends within windows: its attention is not over one grid")
            self.block, self.calls = block, 0

        return hook

    def leave(self, module, args, output) -> None:
        self.block = None

    def check(self, module, args, output) -> None:
        if self.calls != 1:
            how = "by hand" if self.calls == 0 else f"{self.calls} times"
            raise UsageError(f"{type(module).__name__} computes attention {how}: it cannot be shown")


@contextlib.contextmanager
def attention_maps(model: nn.Module, see: Callable[[int, Tensor], None] | None = None) -> Iterator[list[Tensor]]:
    """The softmax attention (B, heads, T, T) of every block, of the forward inside the `with`, in a list.

    Fused attention is computed step by step meanwhile, which changes the model's output by rounding only. see(block,
    attention): is given each in turn instead of the list, where all together would not fit into memory. Keys of
    prefixes and prompts are in it. Raises UsageError for windows and for attention that is not torch's own.
    """
    component, found = component_of(model), []
    if component is None:
        raise UsageError(f"{_name(model)} has no transformer blocks over a grid of patches")
    mode, hooks = Attention(see or (lambda block, weights: found.append(weights))), []
    for block, path in enumerate(block_paths(model, component)):
        module = model.get_submodule(path)
        hooks.append(module.register_forward_pre_hook(mode.enter(block), with_kwargs=True))
        hooks.append(module.register_forward_hook(mode.leave, always_call=True))
        hooks.append(module.register_forward_hook(mode.check))
    try:
        with still(model), mode:
            yield found
    finally:
        for hook in hooks:
            hook.remove()


# ---- rollout


def mixed(attention: Tensor) -> Tensor:
    """(A + I) / 2 with A (B, T, T) the mean of the heads (arXiv:2005.00928, section 3): what a block passes on."""
    mean = attention.mean(1)
    return (mean + torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)) / 2


def traced(read: Tensor, steps: Sequence[Tensor]) -> Tensor:
    """Rows `read` (..., R, T) behind the last step, as shares (..., R, T0) of the tokens before the first.

    steps: matrices (..., T', T) in the order of the forward, rows summing to 1. From the end a row costs T^2 a step.
    """
    for step in reversed(steps):
        read = read @ step
    return read


def own_tokens(attention: Tensor, tokens: int, prefix: int) -> Tensor:
    """Attention among the host's own `tokens`, rows summing to 1 again: prompts and prefixes are of no picture.

    Keys of a prefix stand in front of all others, prompts behind the first token.
    """
    queries, keys = attention.shape[-2:]
    if (queries, keys) == (tokens, tokens):
        return attention
    if not tokens <= queries <= keys:
        raise UsageError(f"attention of {queries} x {keys} tokens, at least {tokens} were expected")
    attention, at, end = attention[..., keys - queries :], min(prefix, 1), min(prefix, 1) + queries - tokens
    attention = torch.cat([attention[..., :at], attention[..., end:]], -1)
    attention = torch.cat([attention[..., :at, :], attention[..., end:, :]], -2)
    return attention / attention.sum(-1, keepdim=True)


@dataclass
class Rollout:
    """How much of each embedded token is in what a head reads."""

    maps: Tensor  # (B, h, w) on the embedded grid; with the prefix tokens' share it sums to 1
    entropy: Tensor  # (B, blocks): of such maps behind each block, 1 where all patches count alike
    tokens: Tokens


@torch.no_grad()
def rollout(model: nn.Module, image: Tensor) -> Rollout:
    """Attention rollout (Abnar and Zuidema, arXiv:2005.00928, section 3) of images (B, 3, H, W) as a model takes them.

    Between blocks that join tokens their shares are multiplied in (`Tokens.joining`), so it ends on the grid as it was
    embedded.
    """
    steps: list[list[Tensor]] = []  # of each block

    def see(block: int, attention: Tensor) -> None:
        h, w = tokens.place(block).grid
        own = mixed(own_tokens(attention, tokens.prefix + h * w, tokens.prefix))
        steps.append([own, *(share.to(own) for share in tokens.joining(block))])

    with watched(model, image.shape[2:]) as tokens, attention_maps(model, see):
        model(image)
    maps = []
    for end in range(1, len(steps) + 1):
        last = steps[end - 1][-1]
        read = reader(model, tokens.prefix, last.shape[-2]).to(last).expand(len(image), 1, -1)
        maps.append(traced(read, sum(steps[:end], []))[:, 0, tokens.prefix :])
    entropy = torch.stack([spread(shares) for shares in maps], 1)
    return Rollout(maps[-1].unflatten(1, tokens.embedded.grid), entropy, tokens)


def spread(shares: Tensor) -> Tensor:
    """(B,) entropy of (B, N) shares over log N, made to sum to 1: 0 all on one, 1 all alike."""
    p = shares / shares.sum(1, keepdim=True)
    return -torch.xlogy(p, p).sum(1) / torch.tensor(float(max(p.shape[1], 2))).log()


def reader(model: nn.Module, prefix: int, tokens: int) -> Tensor:
    """(T,) weights by which the head reads tokens: CLS, the mean of the patches, or several such parts alike."""
    backbone, cls = getattr(model, "backbone", model), F.one_hot(torch.tensor(0), tokens).float()
    mean = torch.cat([torch.zeros(prefix), torch.full((tokens - prefix,), 1 / (tokens - prefix))])
    own = cls if prefix and getattr(backbone, "global_pool", "token") == "token" else mean
    parts = ("own",) if backbone is model else getattr(model.head, "pool", ("cls",))
    return torch.stack([{"cls": cls, "own": own}.get(part, mean) for part in parts]).mean(0)


# ---- Grad-CAM


def grad_cam(model: nn.Module, image: Tensor, classes: Tensor) -> tuple[Tensor, Place]:
    """relu(sum_k a_k A_k) with a_k the mean over places of dy_c/dA_k (Selvaraju et al., arXiv:1610.02391, eq. 1 and 2).

    image (B, 3, H, W) as the task model takes it; classes (B,) -> (B, h, w) in units of the logit y_c, and their place.
    A: the tokens that enter the last block, since behind it a CLS head has no gradient on patches; of networks without
    blocks over patches the last map.
    """
    path, is_block = _target(model, image)
    with still(model), torch.no_grad(), _leaf(model.get_submodule(path), is_block) as caught:
        if is_block:
            with watched(model, image.shape[2:]) as tokens:
                logits = model(image)
            place = tokens.place(tokens.num_blocks - 1)
        else:
            logits = model(image)
            place = Place.over(image.shape[2:], _as_map(model, caught[0]).shape[2:])
        (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), caught[0])
        maps = [patches(t, place) if is_block else _as_map(model, t) for t in (caught[0].detach(), gradient)]
        return F.relu((maps[1].mean((2, 3), keepdim=True) * maps[0]).sum(1)), place


@contextlib.contextmanager
def _leaf(module: nn.Module, entering: bool) -> Iterator[list[Tensor]]:
    """Cuts the graph at what enters or leaves a module: nothing before it is differentiated, all behind it is."""
    caught: list[Tensor] = []

    def cut(x: Tensor) -> Tensor:
        torch.set_grad_enabled(True)  # until the `no_grad` around it ends
        caught.append(x.detach().requires_grad_())
        return caught[-1]

    def before(module, args, kwargs):
        if args:
            return (cut(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: cut(kwargs[name])}

    if entering:
        hook = module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)  # before prompts enter
    else:
        hook = module.register_forward_hook(lambda m, args, output: cut(output))
    try:
        yield caught
    finally:
        hook.remove()


def _target(model: nn.Module, image: Tensor) -> tuple[str, bool]:
    """(path, whether its input is looked at): the last block, or the module that gave the last map of more than one
    place."""
    component = component_of(model)
    if component is not None and not channels_last(model):
        return block_paths(model, component)[-1], True
    found: list[str] = []
    hooks = [
        module.register_forward_hook(lambda m, args, y, name=name: found.append(name) if _is_map(model, y) else None)
        for name, module in model.named_modules()
        if BANK not in name.split(".")
    ]
    try:
        with still(model), torch.no_grad():
            model(image[:1])
    finally:
        for hook in hooks:
            hook.remove()
    if not found or any(part in found[-1] for part in ("patch_embed", "embeddings")):
        raise UsageError(f"{_name(model)} ends in tokens on no grid that is known: no Grad-CAM of it")
    return found[-1], False


def _is_map(model: nn.Module, output) -> bool:
    return isinstance(output, Tensor) and output.ndim == 4 and _as_map(model, output).shape[2:].numel() > 1


def _as_map(model: nn.Module, x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2) if channels_last(model) else x


def _name(model: nn.Module) -> str:
    return type(getattr(model, "backbone", model)).__name__
