"""Dispatch weights land on the grid they belong to, and the report's sections hold what the routers say."""

import numpy as np
import pytest
import torch

from adaptsuite.audio import pictures
from adaptsuite.audio.data import Windows
from adaptsuite.audio.pipeline import DOMAIN
from adaptsuite.audio.synthetic import make_dataset
from adaptsuite.experiment import adapt, complete
from adaptsuite.figures import embed
from adaptsuite.recipe import Recipe


class Heard:
    prefix, grid = 2, (2, 3)


def test_a_slot_s_weights_lie_on_its_patches_and_even_ones_are_one():
    dispatch = torch.full((8, 2, 1), 1 / 8)
    dispatch[:, 1, 0] = 0
    dispatch[2 + 3 + 2, 1, 0] = 0.75  # second row, last column
    dispatch[0, 1, 0] = 0.25  # CLS
    weights, others = pictures.attention(dispatch, Heard)
    np.testing.assert_allclose(weights[0], 1.0, rtol=1e-6)
    assert weights[1, 1, 2] == pytest.approx(6.0) and np.count_nonzero(weights[1]) == 1
    np.testing.assert_allclose(others, [0.25, 0.25], rtol=1e-6)


@pytest.mark.parametrize(("method", "drawn"), [("audio.soft_moa", 2), ("audio.dense_moa", 0), ("lora", None)])
def test_mixtures_get_their_sections_and_others_none(tmp_path, method, drawn):
    table = make_dataset(tmp_path, num_classes=2, clips_per_class=3)
    recipe = complete(DOMAIN, Recipe("audio", "embedded:audio-tiny", method=method, front_end={"frames": 96}))
    handle = adapt(DOMAIN, recipe, ["a", "b"])
    paths = sorted(table.parent.rglob("*.wav")) or sorted(table.parent.rglob("*.flac"))
    dataset = Windows(paths, None, 16000, handle.model.num_samples)
    sections = DOMAIN.extra(handle, dataset, None)
    if drawn is None:
        assert sections == []
        return
    assert sections[0]["title"] == "Routers" and len(sections[0]["table"]) == len(handle.sites)
    assert len(sections) == 1 + drawn
    assert all(embed(s["figure"]).startswith("data:image/svg+xml") for s in sections)
    assert all(dataset.paths[0].name in s["title"] for s in sections[1:2])
