"""Generated images: what a latent fixes, what a render may change, and the leaves with their ceiling."""

import csv

import numpy as np
import pytest
from PIL import Image

from adaptsuite.vision import synthetic
from adaptsuite.vision.synthetic import AXES, TRAITS, Painter, make_dataset, mutate, oracle, sample_latent


def views(latent, seed, count=1, size=64):
    return Painter(size, np.random.default_rng(seed)).views(latent, count)


@pytest.mark.parametrize("kind", AXES)
def test_every_kind_gives_pictures_of_the_size_asked_for_with_something_on_them(kind):
    rng = np.random.default_rng(0)
    painter = Painter(80, rng)
    for _ in range(8):
        out = painter.views(sample_latent(rng, kind))
        assert out.shape == (2, 80, 80, 3) and out.dtype == np.uint8
        assert (out.std((1, 2, 3)) > 4).all()


@pytest.mark.parametrize("kind", AXES)
def test_equal_seeds_give_equal_pictures_and_others_do_not(kind):
    latent = sample_latent(np.random.default_rng(1), kind)
    assert np.array_equal(views(latent, 2), views(latent, 2))
    assert not np.array_equal(views(latent, 2), views(latent, 3))


def test_scans_are_grey_and_things_coloured():
    rng = np.random.default_rng(0)
    for kind in AXES:
        out = np.concatenate([views(sample_latent(rng, kind), i) for i in range(6)]).astype(int)
        assert (np.ptp(out, axis=3).mean() > 5) == (kind == "thing")


def test_two_renders_of_one_latent_are_nearer_in_colour_than_renders_of_two():
    rng = np.random.default_rng(0)
    latents = [sample_latent(rng, "thing") for _ in range(24)]
    painter = Painter(64, np.random.default_rng(1))
    pairs = np.stack([painter.views(latent) for latent in latents]) // 43  # (24, 2, 64, 64, 3) in six steps
    bins = (pairs @ [36, 6, 1]).reshape(48, -1)
    share = np.stack([np.bincount(b, minlength=216) for b in bins]).reshape(24, 2, 216) ** 0.5
    near = share[:, 0] @ share[:, 1].T
    assert (near.argmax(1) == np.arange(24)).mean() > 0.25  # chance is .04


def test_a_mutant_is_of_the_same_kind_and_differs_in_little():
    rng = np.random.default_rng(0)
    for kind in AXES:
        latent = sample_latent(rng, kind)
        other = mutate(latent, rng)
        changed = [n for n in AXES[kind] if latent.values[n] != other.values[n]]
        assert other.kind == kind and 1 <= len(changed) <= 8
        assert "package" not in changed


def test_targets_name_the_axes_of_one_kind_only():
    rng, at = np.random.default_rng(0), 0
    for kind, axes in AXES.items():
        known = np.isfinite(synthetic.targets(sample_latent(rng, kind)))
        assert known.sum() == len(axes) and known[at : at + len(axes)].all()
        at += len(axes)


def test_a_package_shows_its_print_upright_and_in_its_place():
    latent = sample_latent(np.random.default_rng(3), "thing")
    latent.values.update(package=1.0, printed=1.0, taper=0.5, waist=0.0, square=1.0, aspect=0.8, gloss=0.0, rim=0.0)
    latent.values.update(dict.fromkeys(("lobe2", "lobe3", "lobe4", "lobe5", "rough", "round"), 0.0))
    thing, canvas = synthetic.Thing(latent), np.zeros((96, 96, 3), np.float32)
    light = synthetic.Light(np.array([0.0, 0.0, 1.0]), 0.0, 1.0)
    synthetic.stamp(canvas, thing, (48, 48), 48 / max(thing.half), 0.0, light, np.random.default_rng(0), 0.0)
    half = (thing.half * 40 / max(thing.half)).astype(int)
    shown = Image.fromarray(synthetic.to_uint8(canvas)).crop((*(48 - half), *(48 + half))).resize((48, 48))
    skin = Image.fromarray(synthetic.to_uint8(thing.skins[0])).crop((8, 8, 88, 88)).resize((48, 48))
    shown, skin = (np.asarray(i, float).ravel() for i in (shown, skin))
    assert np.corrcoef(shown, skin)[0, 1] > 0.8


def read_rows(manifest):
    with open(manifest, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def test_a_data_set_has_the_leaves_asked_for_with_their_latents(tmp_path):
    rows = read_rows(make_dataset(tmp_path, cultivars=4, shots=2, tests=3, species=2, size=48))
    assert list(rows[0]) == ["path", "label", "split", "group", "species", *TRAITS]
    assert len(rows) == 20 and len({r["group"] for r in rows}) == 20
    assert [sum(r["split"] == s for r in rows) for s in ("train", "test")] == [8, 12]
    assert len({r["label"] for r in rows}) == 4 and {r["species"] for r in rows} == {"species0", "species1"}
    assert all(r["label"].startswith(r["species"]) for r in rows)
    for row in rows:
        with Image.open(tmp_path / row["path"]) as image:
            assert image.size == (48, 48) and image.mode == "RGB"


def test_a_data_set_is_the_same_for_the_same_seed_and_other_for_another(tmp_path):
    small = {"cultivars": 2, "shots": 1, "tests": 1, "size": 48}
    first, again, other = (make_dataset(tmp_path / n, seed=s, **small) for n, s in (("a", 0), ("b", 0), ("c", 1)))
    for row in read_rows(first):
        leaf = (first.parent / row["path"]).read_bytes()
        assert leaf == (again.parent / row["path"]).read_bytes()
        assert leaf != (other.parent / row["path"]).read_bytes()


def test_a_larger_data_set_shows_the_same_leaves_larger(tmp_path):
    small, large = (
        make_dataset(tmp_path / n, cultivars=2, shots=1, tests=t, size=s) for n, t, s in (("a", 1, 48), ("b", 2, 96))
    )
    more = {row["path"]: row for row in read_rows(large)}
    for row in read_rows(small):
        assert [row[t] for t in TRAITS] == [more[row["path"]][t] for t in TRAITS]
        leaf = [np.asarray(Image.open(m.parent / row["path"]).resize((24, 24)), float) for m in (small, large)]
        assert np.corrcoef(*(x.ravel() for x in leaf))[0, 1] > 0.7


def difference(trait, size, seed):
    """Mean change of the grey levels between a leaf 1.5 sigma below and above the middle of a trait."""
    shown = []
    for z in (-1.5, 1.5):
        latents = np.where(np.array(TRAITS) == trait, z, 0.0)
        leaf = synthetic.draw_leaf(synthetic.sample_species(seed), latents, size, np.random.default_rng(seed))
        shown.append(np.asarray(leaf.convert("L"), float))
    return np.abs(shown[0] - shown[1]).mean()


@pytest.mark.parametrize("trait", TRAITS)
def test_at_96_px_every_trait_but_the_teeth_is_seen(trait):
    seen = np.mean([difference(trait, 96, seed) for seed in range(3)])
    assert seen < 0.3 if trait.startswith("tooth") else seen > 2


def test_teeth_are_seen_when_drawn_larger():
    for trait in ("tooth_count", "tooth_depth"):
        small, large = (np.mean([difference(trait, size, seed) for seed in range(2)]) for size in (96, 384))
        assert large > 1.3 * small


@pytest.mark.parametrize(("separation", "expected"), [(0.8, 30.7), (1.2, 52.8), (1.6, 72.0), (2.4, 92.2)])
def test_the_oracle_tells_forty_cultivars_apart_as_often_as_was_measured(separation, expected):
    draws = [100 * oracle(separation=separation, seed=seed, leaves=60) for seed in range(12)]
    error = np.std(draws, ddof=1) / 12**0.5
    assert abs(np.mean(draws) - expected) < 3 * error + 0.5


def test_the_oracle_is_a_ceiling_that_few_shots_lower_and_species_raise():
    exact = oracle(leaves=100)
    assert oracle(leaves=100, shots=3) < oracle(leaves=100, shots=30) < exact + 0.01
    assert oracle(leaves=100, species=4) > exact
    assert oracle(cultivars=4, species=4, leaves=20) == 1.0
    assert abs(oracle(separation=1e-6, leaves=100) - 1 / 40) < 0.01


def test_no_rule_on_the_latents_of_a_data_set_beats_its_oracle(tmp_path):
    means = synthetic.cultivar_means(40, 1.6, seed=0)
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(40), 50)
    latents = means[label] + rng.normal(0, 1, (len(label), 6))
    nearest = ((latents[:, None] - means) ** 2).sum(2).argmin(1)
    assert abs((nearest == label).mean() - oracle(leaves=100)) < 0.03
    five = ((latents[:, None, :5] - means[:, :5]) ** 2).sum(2).argmin(1)
    assert (five == label).mean() < oracle(leaves=100) - 0.05
