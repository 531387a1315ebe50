"""k nearest neighbours and the grid of linear heads against their formulas, and on a table."""

import math

import numpy as np
import pytest
import torch

from adaptsuite import experiment
from adaptsuite.commands import read_recipe
from adaptsuite.errors import UsageError
from adaptsuite.medical import probes
from adaptsuite.medical.pipeline import MedicalDomain
from adaptsuite.medical.synthetic import make_dataset


def data(seed=0, n=30, m=7, d=5, classes=3):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), rng.integers(0, classes, n), rng.normal(size=(m, d))


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_neighbours_vote_with_their_similarity():
    known, targets, asked = data()
    found = probes.neighbours(known, targets, asked, 3)
    for row, query in zip(found, asked, strict=True):
        order = sorted(range(len(known)), key=lambda i: -cosine(query, known[i]))[:5]
        votes = [0.0] * 3
        for i in order:
            votes[targets[i]] += math.exp(cosine(query, known[i]) / 0.07)
        assert row == pytest.approx([v / sum(votes) for v in votes], rel=1e-6)


def test_several_labels_are_counted_as_ml_knn_counts():
    known, _, asked = data(1)
    targets = (np.random.default_rng(2).random((30, 2)) < 0.4).astype(float)
    found = probes.neighbours(known, targets, asked, 2, k=3)
    n, k = len(known), 3
    near = [sorted((j for j in range(n) if j != i), key=lambda j: -cosine(known[i], known[j]))[:k] for i in range(n)]
    for q, query in enumerate(asked):
        mine = sorted(range(n), key=lambda j: -cosine(query, known[j]))[:k]
        for label in range(2):
            prior = (1 + sum(targets[:, label])) / (2 + n)
            c = sum(targets[j, label] for j in mine)
            tables = {flag: [0] * (k + 1) for flag in (1, 0)}
            for i in range(n):
                tables[int(targets[i, label])][int(sum(targets[j, label] for j in near[i]))] += 1
            yes = prior * (1 + tables[1][int(c)]) / (k + 1 + sum(tables[1]))
            no = (1 - prior) * (1 + tables[0][int(c)]) / (k + 1 + sum(tables[0]))
            assert found[q, label] == pytest.approx(yes / (yes + no), rel=1e-9)


def test_heads_that_train_together_train_as_each_alone(monkeypatch):
    monkeypatch.setattr(probes, "STEPS", 20)
    known, targets, _ = data(3)
    torch.manual_seed(0)
    together = probes.grid_heads([known], targets, 3, rates=(1e-2, 5e-2))[0]
    alone = probes.grid_heads([known], targets, 3, rates=(1e-2,))[0]
    # the same start needs the same draws: the first head of both
    x, y = torch.from_numpy(known).float(), torch.from_numpy(targets)
    losses = [torch.nn.functional.cross_entropy(h(x), y).item() for h in (together[0], alone[0], together[1])]
    assert abs(losses[0] - losses[1]) < 0.02 and losses[2] < losses[0]


def test_a_probe_of_a_table_finds_the_lesion_and_says_what_it_chose(tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "STEPS", 100)
    domain = MedicalDomain()
    table = make_dataset(tmp_path, patients=20, count=2, size=64)
    options = {"data": str(table), "backbone": "embedded:vision-tiny", "size": ("front_end.size", 60)}
    found = probes.run(domain, read_recipe(domain, options))
    assert set(found) >= {"knn", "linear", "choice", "grid"} and len(found["grid"]) == 16
    assert found["choice"] in found["grid"]
    assert found["linear"]["auroc"]["value"] > 0.5


def test_blocks_are_read_as_the_backbone_gives_them(tmp_path):
    domain = MedicalDomain()
    table = make_dataset(tmp_path, patients=4, count=1, size=64)
    options = {
        "data": str(table),
        "backbone": "embedded:vision-tiny",
        "method": "linear",
        "size": ("front_end.size", 60),
    }
    settled, manifest = experiment.settle(domain, read_recipe(domain, options))
    found = probes.features(domain, settled, manifest)
    assert found.cls.shape == (4, 4, 128) and found.read(4, True).shape == (4, 640)
    model = domain.model(settled, manifest.classes)
    item = domain.dataset(model, [manifest.rows[0].path], None)[0]["image"][None]
    with torch.no_grad():
        tokens = model.backbone.forward_features(model.normalised(item.float() / 255))
    assert np.allclose(found.cls[0, -1], tokens[0, 0].numpy(), atol=1e-5)
    assert np.allclose(found.mean[0], tokens[0, 1:].mean(0).numpy(), atol=1e-5)


def test_a_split_without_validation_rows_is_refused(tmp_path):
    domain = MedicalDomain()
    table = make_dataset(tmp_path, patients=10, count=1, size=64)
    options = {"data": str(table), "backbone": "embedded:vision-tiny", "val": "none", "size": ("front_end.size", 60)}
    with pytest.raises(UsageError, match="validation rows choose"):
        probes.run(domain, read_recipe(domain, options))
