"""What the routers of mixtures do with a few clips, as sections of the report: numbers, load, spectrograms."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptsuite.audio.data import Windows
from adaptsuite.audio.inputs import Input
from adaptsuite.audio.soft_moa import SoftMoaBranch
from adaptsuite.figures import ACCENT, canvas
from adaptsuite.host import Handle

CLIPS, PICTURED, MOST = 16, 2, 15  # looked at, drawn, experts drawn


def routers(handle: Handle, dataset: Windows) -> list[dict[str, Any]]:
    """Sections of the report: whether the routers route at all, whom they load, what their experts listen to."""
    looks = router_looks(handle, dataset)
    if not looks:
        return []

    def cell(v):
        return v if isinstance(v, str) else " ".join(f"{x:.3f}" for x in np.atleast_1d(v))

    text = f"Measured on up to {CLIPS} clips. A dispatch entropy near 1 means that slots are plain means of all tokens."
    rows = [{"site": look.site, **look.diagnostics} for look in looks]
    table = [{name: cell(v) for name, v in row.items()} for row in rows]
    caption = "How much of the output each expert gives."
    found = [{"title": "Routers", "text": text, "table": table, "figure": expert_load(rows), "caption": caption}]
    choosy = min(looks, key=lambda look: look.diagnostics.get("dispatch_entropy", 2.0))
    if choosy.dispatch is not None:
        text = f"Dispatch weights of {choosy.site}, the site that chooses most, over the spectrogram."
        items = spread(len(dataset))
        for at in np.unique(np.linspace(0, len(items) - 1, PICTURED).astype(int)):
            name = dataset.paths[dataset.rows[items[at]]].name
            picture = experts_over(choosy.features[at], choosy.dispatch[at], handle.model.input)
            found.append({"title": f"What the experts listen to in {name}", "text": text, "figure": picture})
    return found


@dataclass
class RouterLook:
    """What the router of one mixture does with some clips."""

    site: str
    diagnostics: dict[str, Any]
    dispatch: Tensor | None  # (B, T, N, S) of a soft mixture over the grid's tokens
    features: Tensor  # (B, frames, F) what the backbone read


def router_looks(handle: Handle, dataset: Windows) -> list[RouterLook]:
    """One look per mixture of the adapter, on a few clips of the data set."""
    branches = {k: b for k, b in handle.adapter.branches.items() if hasattr(b, "diagnostics")}
    if not branches:
        return []
    found: list[RouterLook] = []
    model = handle.model
    device = next(model.parameters()).device
    items = [dataset[i] for i in spread(len(dataset))]
    batch = {k: torch.stack([torch.as_tensor(i[k]) for i in items]).to(device) for k in ("wave", "length")}
    rows, columns = model.input.grid
    with torch.no_grad():
        features = model.features(batch["wave"], batch["length"])

    def look(key):
        def hook(branch, args):
            x, y, context = args
            tokens, dispatch = x if branch.placement == "parallel" else y, None
            on_grid = tokens.ndim == 3 and tokens.shape[1] == model.input.prefix + rows * columns
            if isinstance(branch, SoftMoaBranch) and on_grid and model.input.spectrogram:
                _, dispatch, _ = branch.router(tokens, context.token_mask)
                dispatch = dispatch.unflatten(-1, branch.phi.shape[1:]).float().cpu()
            diagnostics = branch.diagnostics(tokens, context.token_mask)
            found.append(RouterLook(key.replace("/", "."), diagnostics, dispatch, features.float().cpu()))

        return hook

    hooks = [b.register_forward_pre_hook(look(k)) for k, b in branches.items()]
    try:
        with torch.no_grad():
            model(batch["wave"], batch["length"])
    finally:
        for h in hooks:
            h.remove()
    return found


def spread(size: int) -> list[int]:
    """Up to CLIPS items from all over a data set, whose rows often come class by class."""
    return np.unique(np.linspace(0, size - 1, min(CLIPS, size)).astype(int)).tolist()


def attention(dispatch: Tensor, heard: Input) -> tuple[np.ndarray, np.ndarray]:
    """((N, rows, columns) weights of each expert's slots on the grid, mean 1 if even; (N,) its share on other tokens).

    dispatch: (T, N, S), summing to 1 over the tokens of each slot.
    """
    weight = dispatch.mean(-1).T  # (N, T)
    grid = weight[:, heard.prefix :].unflatten(1, heard.grid)
    return (grid * weight.shape[1]).numpy(), weight[:, : heard.prefix].sum(1).numpy()


def experts_over(features: Tensor, dispatch: Tensor, heard: Input):
    """A figure: the log-mel spectrogram (frames, F) of one clip, then once for each expert under its weights."""
    weights, others = attention(dispatch, heard)
    shown = min(len(weights), MOST)
    columns = min(4, shown + 1)
    rows = -(-(shown + 1) // columns)
    seconds, top = len(features) / 100, features.shape[1]
    with canvas(2.3 * columns, 1.75 * rows + 0.3) as figure:
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        place = {"origin": "lower", "aspect": "auto", "extent": (0, seconds, 0, top)}
        for number, axis in enumerate(panels):
            if number > shown:
                axis.axis("off")
                continue
            axis.imshow(features.T.numpy(), cmap="gray_r", interpolation="none", **place)
            if number == 0:
                axis.set_title("log-mel")
                continue
            image = axis.imshow(
                weights[number - 1], cmap="magma", alpha=0.65, vmin=0, vmax=float(weights.max()), **place
            )
            axis.set_title(f"expert {number}" + (f"  ({others[number - 1]:.0%} on CLS, DIST)" if heard.prefix else ""))
        for axis in panels[: shown + 1]:
            axis.label_outer()
        figure.supxlabel("seconds", fontsize=9)
        figure.supylabel("mel bin", fontsize=9)
        bar = figure.colorbar(image, ax=panels.tolist(), shrink=0.8, aspect=30)
        bar.set_label("weight, 1 = even")
        return figure


def expert_load(rows: Sequence[dict[str, Any]]):
    """A figure: for each site of rows {"site", "load"}, the share of the weight that each expert gets."""
    load = np.array([row["load"] for row in rows])
    experts = np.arange(load.shape[1])
    with canvas(min(9.0, 1.8 + 0.5 * len(rows) * (1 + load.shape[1] / 8)), 2.3) as figure:
        axis = figure.subplots()
        width = 0.85 / load.shape[1]
        for n in experts:
            shade = 0.35 + 0.65 * n / max(1, load.shape[1] - 1)
            axis.bar(
                np.arange(len(rows)) + (n - (len(experts) - 1) / 2) * width,
                load[:, n],
                width,
                color=ACCENT,
                alpha=shade,
            )
        axis.axhline(1 / load.shape[1], color="#8a96a1", lw=1, ls="--")
        axis.set_xticks(range(len(rows)), [str(i + 1) for i in range(len(rows))])
        axis.set(xlabel="site, in the order of the table", ylabel="share of the weight")
        axis.set_title(f"one bar for each of {load.shape[1]} experts; dashed: an even share")
        return figure
