"""The generated scenes: the same for a seed, balanced, and with bounds of blind baselines that are exact."""

import json
from collections import Counter
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest

from adaptsuite.errors import UsageError
from adaptsuite.vl import synthetic as s
from adaptsuite.vl.data import load_table

ALL = np.arange(s.NUM_SCENES)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_every_scene_has_a_number_and_every_number_a_scene():
    colours, shapes = s.objects(ALL)
    assert np.array_equal(s.scene_numbers(colours, shapes), ALL)
    found = {(*c, *h) for c, h in zip(colours.tolist(), shapes.tolist(), strict=True)}
    wanted = {(*c, *h) for c in permutations(range(8), 4) for h in permutations(range(4))}
    assert found == wanted and len(wanted) == s.NUM_SCENES


def test_a_scene_with_a_colour_twice_has_no_number():
    with pytest.raises(ValueError, match="four different colours"):
        s.scene_numbers(np.array([[0, 0, 1, 2]]), np.array([[0, 1, 2, 3]]))


def test_equal_seeds_give_equal_pictures_questions_and_captions():
    def drawn(seed):
        r = rng(seed)
        scenes = r.integers(0, s.NUM_SCENES, 20)
        asked = s.ask(scenes, 2, r)
        loose = s.loose_pictures(3, (32, 64), r)
        return s.render(scenes, r), asked.texts, asked.answers, s.captions(scenes, r), *loose, s.loose_sentences(5, r)

    for first, again, other in zip(drawn(1), drawn(1), drawn(2), strict=True):
        assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_each_cell_shows_its_colour_and_nothing_else_does():
    scenes = rng().integers(0, s.NUM_SCENES, 200)
    pictures = s.render(scenes, rng()).astype(float)
    assert pictures.shape == (200, 3, 32, 32)
    cells = pictures.reshape(200, 3, 2, 16, 2, 16).transpose(0, 2, 4, 1, 3, 5).reshape(200, 4, 3, 256)
    ground = np.median(cells, 3, keepdims=True)
    strongest = np.argsort(np.abs(cells - ground).sum(2), 2)[..., -16:]  # the pixels farthest from the background
    seen = np.take_along_axis(cells, strongest[:, :, None].repeat(3, 2), 3).mean(3)
    near = np.abs(seen[:, :, None] - s.RGB).sum(3).argmin(2)
    assert np.mean(near == s.objects(scenes)[0]) > 0.97


def test_shapes_in_their_sizes_and_places_stay_within_their_cell_and_differ():
    masks = s._masks()
    assert masks.min() == 0 and masks.max() == 1
    for shape in s.SHAPES:  # nothing is cut off at the farthest place of the largest
        for dy, dx in ((s.REACH, s.REACH), (-s.REACH, -s.REACH)):
            own, whole = (s._mask(shape, max(s.RADII), dy, dx, side).sum() for side in (s.CELL, 2 * s.CELL))
            assert own == whole
    areas = masks.sum((2, 3)).mean(1)
    assert (areas > 20).all() and len(set(areas.round())) == 4


def loop_over(level, scene):
    """(question, answer, probability) of one scene, from the words of the specification."""
    colours, shapes = (v[0].tolist() for v in s.objects(np.array([scene])))
    beside, found = {0: 1, 1: 0, 2: 3, 3: 2}, []
    kinds = len(s.KINDS[level])
    for at in range(4):
        colour, shape, position = s.NAMES[colours[at]], s.SHAPES[shapes[at]], s.POSITIONS[at]
        subject, each = (position, shape)[level - 1], Fraction(1, kinds * 4)
        found.append((f"what color is the {subject} ?", colour, each))
        if level == 1:
            found.append((f"what shape is the {position} ?", shape, each))
        else:
            found.append((f"what shape is {colour} ?", shape, each))
            found.append((f"what color is beside the {shape} ?", s.NAMES[colours[beside[at]]], each))
            found.append((f"what shape is beside the {shape} ?", s.SHAPES[shapes[beside[at]]], each))
        found.append((f"is the {subject} {colour} ?", "yes", each / 2))
        found += [(f"is the {subject} {other} ?", "no", each / 14) for other in s.NAMES if other != colour]
    return found


@pytest.mark.parametrize("level", s.LEVELS)
def test_what_can_be_asked_about_a_scene_is_what_a_loop_over_its_objects_gives(level):
    for scene in (0, 12345, 40319):
        question, answer, weight = s.every(level, np.array([scene]))
        found = Counter()
        for q, a, w in zip(question[0], answer[0], weight, strict=True):
            found[s.questions(level)[q][1], s.ANSWERS[a]] += Fraction(int(w), int(weight.sum()))
        assert found == Counter({(q, a): p for q, a, p in loop_over(level, scene)})


@pytest.mark.parametrize(
    ("level", "text", "image"),
    [
        (1, (Fraction(1, 8) + Fraction(1, 4) + Fraction(1, 2)) / 3, Fraction(1, 6)),
        (2, (Fraction(2, 8) + Fraction(1, 4) + Fraction(1, 3) + Fraction(1, 2)) / 5, Fraction(1, 10)),
    ],
)
def test_counted_bounds_are_the_closed_form(level, text, image):
    assert s.bounds(level) == {"text_only": float(text), "image_only": float(image)}


@pytest.mark.parametrize("level", s.LEVELS)
def test_bounds_of_a_few_scenes_are_those_of_a_table_in_plain_loops(level):
    scenes = rng(3).integers(0, s.NUM_SCENES, 7)
    by_text, by_image = Counter(), Counter()
    for i, scene in enumerate(scenes):
        for q, a, p in loop_over(level, scene):
            by_text[q, a] += p / 7
            by_image[i, a] += p / 7
    wanted = {}
    for name, table in (("text_only", by_text), ("image_only", by_image)):
        wanted[name] = float(sum(max(table[k, a] for a in s.ANSWERS) for k in {k for k, _ in table}))
    assert s.bounds(level, scenes) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("level", s.LEVELS)
def test_drawn_questions_are_balanced_and_no_blind_guess_beats_the_bound(level):
    asked = s.ask(rng(1).integers(0, s.NUM_SCENES, 60000), level, rng(2))
    kinds = np.array(asked.kinds)
    for kind in s.KINDS[level]:
        assert abs((kinds == kind).mean() - 1 / len(s.KINDS[level])) < 0.01
    yes = asked.answer[np.char.startswith(kinds, "is")] == 0
    assert abs(yes.mean() - 0.5) < 0.02
    half = len(kinds) // 2  # the best answer to each question, learned on one half, scored on the other
    best = {}
    for q, a in zip(asked.question[:half], asked.answer[:half], strict=True):
        best.setdefault(q, Counter())[a] += 1
    hits = [best[q].most_common(1)[0][0] == a for q, a in zip(asked.question[half:], asked.answer[half:], strict=True)]
    bound = s.bounds(level)["text_only"]
    error = np.sqrt(bound * (1 - bound) / half)
    assert bound - 6 * error < np.mean(hits) < bound + 3 * error


def test_an_answer_looked_up_is_the_one_that_was_drawn():
    asked = s.ask(rng().integers(0, s.NUM_SCENES, 500), 1, rng())
    assert np.array_equal(s.answer_of(asked.scene, 1, asked.question), asked.answer)
    number = [text for _, text in s.questions(2)].index("what shape is red ?")
    without = ALL[(s.objects(ALL)[0] != 0).all(1)][:3]
    assert s.answer_of(without, 2, np.full(3, number)).tolist() == [-1] * 3


def test_a_colour_swap_keeps_the_words_and_changes_the_answers():
    scenes = rng().integers(0, s.NUM_SCENES, 50)
    twins = s.swap_colours(scenes, 0, 3)
    assert np.array_equal(s.swap_colours(twins, 0, 3), scenes) and not (twins == scenes).any()
    for caption, other in zip(s.captions(scenes, rng(1)), s.captions(twins, rng(1)), strict=True):
        assert caption != other and sorted(caption.split()) == sorted(other.split())
    question = np.zeros(50, dtype=int)  # what color is the top left ?
    assert s.questions(1)[0][1] == "what color is the top left ?"
    changed = s.answer_of(twins, 1, question)
    assert (changed != s.answer_of(scenes, 1, question)).all()
    assert np.array_equal(changed, s.answer_of(scenes, 1, question + 3))


def test_a_caption_names_its_scene_alone_whatever_the_order():
    def read(caption):
        words = [part.split(" ", 2) for part in caption.split(" , ")]
        at = {position: (s.NAMES.index(c), s.SHAPES.index(h)) for c, h, position in words}
        pairs = np.array([[at[p] for p in s.POSITIONS]])
        return int(s.scene_numbers(pairs[..., 0], pairs[..., 1])[0])

    scenes = np.repeat(rng().integers(0, s.NUM_SCENES, 20), 30)
    texts = s.captions(scenes, rng(1))
    assert [read(text) for text in texts] == scenes.tolist()
    assert len(set(texts[:30])) > 10


@pytest.mark.parametrize("kind", s.SPLITS)
def test_parts_share_no_scene_and_repeat_for_a_seed(kind):
    parts = s.split(kind, 3)
    assert len(np.unique(np.concatenate(list(parts.values())))) == sum(map(len, parts.values())) == s.NUM_SCENES
    assert all(np.array_equal(part, s.split(kind, 3)[name]) for name, part in parts.items())
    assert not np.array_equal(parts["train"], s.split(kind, 4)["train"])


def test_pairs_held_out_of_training_are_in_every_test_scene_of_the_compositional_split():
    def held(scenes):
        colours, shapes = s.objects(scenes)
        pairs = [
            {(s.NAMES[c], s.SHAPES[h]) for c, h in zip(cs, hs, strict=True)}
            for cs, hs in zip(colours, shapes, strict=True)
        ]
        out = {("red", "circle"), ("green", "square"), ("blue", "triangle"), ("yellow", "cross")}
        return [bool(p & out) for p in pairs]

    parts = s.split("compositional")
    assert not any(held(parts["train"])) and not any(held(parts["val"])) and all(held(parts["test"]))
    for values in s.objects(parts["train"]):  # every colour and every shape was seen at every position
        assert all(set(column) == set(values.ravel()) for column in values.T)


def test_unknown_levels_and_splits_are_refused():
    with pytest.raises(UsageError, match="level 3"):
        s.ask(ALL[:1], 3, rng())
    with pytest.raises(UsageError, match="did you mean random"):
        s.split("randon")


def test_loose_pictures_say_what_covers_each_patch():
    for size in s.SIZES:
        picture, cover, counts = s.loose_pictures(6, size, rng())
        assert picture.shape == (6, 3, *size) and cover.shape == (6, size[0] * size[1] // 64, 7)
        assert counts.shape == (6, 12) and cover.min() >= 0 and cover[..., :4].sum(2).max() <= 1 + 1e-6
        assert np.array_equal(counts[:, :4].sum(1), counts[:, 4:].sum(1)) and (counts[:, :4].sum(1) >= 1).all()
        bare = cover[..., :4].sum(2) == 0
        flat = picture.reshape(6, 3, size[0] // 8, 8, size[1] // 8, 8).std((3, 5)).mean(1).reshape(6, -1)
        assert flat[bare].mean() < flat[~bare].mean() / 2


def test_loose_sentences_are_made_of_the_words_that_are_listed():
    listed = set(s.words())
    for text in s.loose_sentences(300, rng()) + s.captions(ALL[:50], rng()):
        assert set(text.split()) <= listed and "{" not in text


def test_thousands_of_scenes_a_second():
    import time

    s.render(ALL[:10], rng())
    start = time.process_time()
    s.render(rng().integers(0, s.NUM_SCENES, 3000), rng())
    assert time.process_time() - start < 1.5  # about 0.3 s on a quiet core


def test_a_written_data_set_is_read_back_with_its_parts(tmp_path):
    table = s.make_dataset(tmp_path, rows=40, level=2)
    again = s.make_dataset(tmp_path / "again", rows=40, level=2)
    assert table.read_bytes() == again.read_bytes()
    found = load_table(table)
    assert len(found) == 40 and Counter(found.column("split")) == {"train": 28, "val": 4, "test": 8}
    row = json.loads(table.read_text().splitlines()[0])
    assert row["answers"][0] in s.ANSWERS and (tmp_path / row["image"]).is_file()
