"""The prototypical probe against its formula, and what it is for: one event among many tokens."""

import math

import pytest
import torch

from adaptsuite.audio.heads import PrototypeHead
from adaptsuite.audio.pipeline import DOMAIN
from adaptsuite.errors import UsageError
from adaptsuite.experiment import adapt, complete
from adaptsuite.recipe import Recipe
from adaptsuite.verify import verify

K, J, D = 2, 3, 4


class Grid:
    prefix, grid = 2, (2, 3)


def bilinear_x2(grid):
    """Rows x columns of numbers, twice as many each way; sample centres, edges repeated."""
    rows, columns = len(grid), len(grid[0])

    def at(position, size):
        place = max((position + 0.5) / 2 - 0.5, 0.0)
        low = min(int(place), size - 1)
        return low, min(low + 1, size - 1), place - low

    out = []
    for i in range(2 * rows):
        a, b, u = at(i, rows)
        row = []
        for j in range(2 * columns):
            c, d, v = at(j, columns)
            top, bottom = grid[a][c] * (1 - v) + grid[a][d] * v, grid[b][c] * (1 - v) + grid[b][d] * v
            row.append(top * (1 - u) + bottom * u)
        out.append(row)
    return out


def test_prototype_head_equals_its_formula():
    """z = patch - CLS, bilinear x 2, max over positions of ReLU(cos / 1.01), ReLU weights, own prototypes alone."""
    torch.manual_seed(0)
    head = PrototypeHead(D, K, J).double()
    with torch.no_grad():
        for p in head.parameters():
            p.normal_()
    tokens = torch.randn(1, 2 + 6, D, dtype=torch.float64)
    found = head(head.read(tokens, None, Grid))[0]
    z = [[[float(tokens[0, 2 + r * 3 + c, d] - tokens[0, 0, d]) for c in range(3)] for r in range(2)] for d in range(D)]
    wide = [bilinear_x2(channel) for channel in z]
    for k in range(K):
        logit = float(head.bias[k])
        for j in range(J):
            p = [float(v) for v in head.prototypes[k * J + j]]
            best = 0.0
            for r in range(4):
                for c in range(6):
                    v = [wide[d][r][c] for d in range(D)]
                    norms = math.sqrt(sum(x * x for x in p)) * math.sqrt(sum(x * x for x in v))
                    best = max(best, sum(a * b for a, b in zip(p, v, strict=True)) / norms / 1.01)
            logit += max(float(head.weight[k, j]), 0.0) * best
        assert float(found[k]) == pytest.approx(logit, abs=1e-9)


def test_padding_is_never_found():
    torch.manual_seed(0)
    head = PrototypeHead(D, K, J)
    tokens = torch.randn(2, 8, D)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[:, 4] = mask[:, 7] = False  # the last column of both rows
    other = tokens.clone()
    other[:, [4, 7]] = 100 * torch.randn(2, 2, D)
    assert torch.equal(head.read(tokens, mask, Grid), head.read(other, mask, Grid))


def test_prototypes_start_apart_and_the_regulariser_keeps_them_so():
    torch.manual_seed(0)
    head = PrototypeHead(64, 5, 20)
    unit = torch.nn.functional.normalize(head.prototypes, dim=-1)
    gram = unit @ unit.T
    assert (gram - torch.eye(100)).abs().mean() < 0.15  # the reference's U[0, 1) start: 0.75
    expected = math.sqrt(float(((gram - torch.eye(100)).double() ** 2).sum())) / 100**2
    assert float(head.regulariser()) == pytest.approx(expected, rel=1e-4)
    with torch.no_grad():
        head.prototypes.copy_(head.prototypes[:1].expand(100, -1))
    assert float(head.regulariser()) > 5 * expected


def test_one_event_among_many_tokens_is_found_where_the_mean_loses_it():
    """A class is told by one of 256 noisy tokens: prototypes find it, a linear probe on the mean hardly does."""

    class Long:
        prefix, grid = 1, (1, 256)

    torch.manual_seed(0)
    events = 6 * torch.nn.functional.normalize(torch.randn(4, 32), dim=1)

    def sounds(count):
        label = torch.randint(4, (count,))
        tokens = torch.randn(count, 257, 32)
        tokens[:, 0] = 0
        tokens[torch.arange(count), torch.randint(1, 257, (count,))] = events[label] + 0.3 * torch.randn(count, 32)
        return tokens, label

    (x, y), (test_x, test_y) = sounds(200), sounds(200)
    head, linear = PrototypeHead(32, 4, 4), torch.nn.Linear(32, 4)
    scores = {}
    for name, module, read, lr in (
        ("prototypes", head, lambda t: head.read(t, None, Long), 0.04),
        ("linear", linear, lambda t: t.mean(1), 0.01),
    ):
        optimizer = torch.optim.AdamW(module.parameters(), lr)
        for _ in range(60):
            loss = torch.nn.functional.cross_entropy(module(read(x)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scores[name] = float((module(read(test_x)).argmax(1) == test_y).float().mean())
    assert scores["prototypes"] > scores["linear"] + 0.15, scores


def test_the_probe_is_alive_and_has_its_own_rates():
    recipe = complete(
        DOMAIN, Recipe("audio", "embedded:audio-tiny", method="audio.prototypes", front_end={"frames": 64})
    )
    assert recipe.head["kind"] == "prototypes" and recipe.plan["clip"] == 2.0 and recipe.plan["epochs"] == 40
    handle = adapt(DOMAIN, recipe, ["a", "b", "c"])
    verify(handle, DOMAIN.sample(handle.model), fresh=True).raise_if_dead()
    assert handle.parameters_count()["trained"] == 3 * 20 * handle.model.input.width + 3 * 20 + 3
    assert {(g["name"], g["lr_scale"]) for g in handle.trainable()} == {("head", 40.0), ("head", 0.4)}


def test_another_head_for_the_method_is_refused():
    with pytest.raises(UsageError, match="leave head.kind at prototypes"):
        DOMAIN.model(Recipe("audio", "embedded:audio-tiny", method="audio.prototypes", head={"kind": "linear"}), ["a"])
