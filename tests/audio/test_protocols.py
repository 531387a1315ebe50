"""Few-shot draws, folds by a column and groups left out, from the options that a user types to the rows that train."""

import csv
from collections import Counter

import numpy as np
import pytest
import soundfile

from adaptsuite.audio.pipeline import DOMAIN
from adaptsuite.commands import read_recipe
from adaptsuite.errors import UsageError
from adaptsuite.experiment import read_table
from adaptsuite.manifest import few_shot, split


@pytest.fixture
def table(tmp_path):
    """Sixty short sounds: three classes, five folds, ten groups that lie within folds."""
    with open(tmp_path / "manifest.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "fold", "group"])
        for i in range(60):
            soundfile.write(tmp_path / f"{i}.wav", np.full(400, 0.1), 16000)
            writer.writerow([f"{i}.wav", "abc"[i % 3], i // 12, f"g{i // 6}"])
    return tmp_path / "manifest.csv"


def folds_of(table, *settings, seed=0, **options):
    options = {"data": str(table), "seed": seed, "setting": settings, "size": ("front_end.frames", None), **options}
    recipe = read_recipe(DOMAIN, options)
    manifest, data = read_table(DOMAIN, recipe), recipe.data
    return manifest, split(manifest, data.test, data.val, data.cv, recipe.seeds[0], data.shots)


@pytest.mark.parametrize("shots", [1, 2, 4])
def test_reference_bug_11_shots_given_as_text_are_a_number_and_each_class_has_exactly_so_many(table, shots):
    """The reference compares the option's text with a number, and so trains on every row."""
    manifest, (fold,) = folds_of(table, f"data.shots={shots}", test="fold=4")
    assert Counter(manifest.rows[i].label for i in fold.train) == dict.fromkeys("abc", shots)
    with pytest.raises(UsageError, match="data.shots=few: expected"):
        folds_of(table, "data.shots=few", test="fold=4")
    with pytest.raises(UsageError, match="'2' is not a whole number"):
        few_shot(manifest, range(48), "2", 0)


def test_reference_bug_12_every_seed_draws_other_shots_and_the_same_ones_again(table):
    """The reference takes the first files of each class, whatever the seed."""
    draws = [folds_of(table, "data.shots=2", seed=seed, test="fold=4")[1][0].train.tolist() for seed in range(8)]
    again = folds_of(table, "data.shots=2", seed=3, test="fold=4")[1][0].train.tolist()
    assert len({tuple(draw) for draw in draws}) == 8 and draws[3] == again
    assert len({i for draw in draws for i in draw}) > 20  # no favourites among the 48


def test_each_value_of_a_column_is_held_back_once(table):
    manifest, folds = folds_of(table, cv="fold")
    assert [fold.name for fold in folds] == [f"fold={k}" for k in range(5)]
    assert sorted(i for fold in folds for i in fold.test.tolist()) == list(range(60))
    for fold in folds:
        groups = [{manifest.rows[i].group for i in part} for part in (fold.train, fold.val, fold.test)]
        assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])


def test_leaving_one_group_out_tests_each_group_alone(table):
    manifest, folds = folds_of(table, cv="group")
    assert len(folds) == 10
    for fold in folds:
        held = {manifest.rows[i].group for i in fold.test}
        rest = {manifest.rows[i].group for i in (*fold.train, *fold.val)}
        assert len(held) == 1 and len(rest) == 9 and not held & rest
