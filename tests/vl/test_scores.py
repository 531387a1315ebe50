"""Scores of answers, captions and retrieval against the formulas again in plain loops, and against a committed toy."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptsuite.errors import DataError
from adaptsuite.vl import scores

# answers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Yes!", "yes"),
        ("  The\tDog\n", "dog"),
        ("two", "2"),
        ("None", "0"),
        ("a man on the left", "man on left"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("don’t", "don't"),
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("1,000", "1000"),
        ("1,000-2,000", "10002000"),
        ("3.5", "3.5"),
        ("u.s.", "us"),
        ("one-way", "1 way"),
        ("red/white", "red white"),
        ("red / white", "red white"),
        ("(left)", "left"),
        ("its", "its"),
        ("an", ""),
    ],
)
def test_answers_are_normalised_as_the_official_rules_say(text, wanted):
    assert scores.normalise_answer(text) == wanted


@given(st.text("abno the'-.,?!12", max_size=20))
def test_what_is_normalised_has_no_sign_but_apostrophes_colons_and_decimal_points(text):
    once = scores.normalise_answer(text)
    assert not set(once) & set(scores.PUNCTUATION) and once == once.strip() and "  " not in once
    assert not set(once.split()) & scores.ARTICLES


@given(st.lists(st.sampled_from(["red", "blue", "Red.", "the red", "green"]), min_size=10, max_size=12))
def test_soft_accuracy_is_the_mean_over_annotators_left_out(references):
    for answer in ("red", "blue", "A green!", "black"):
        plain = []
        for i in range(len(references)):
            others = [scores.normalise_answer(r) for j, r in enumerate(references) if j != i]
            plain.append(min(others.count(scores.normalise_answer(answer)) / 3, 1))
        assert scores.soft_accuracy(answer, references) == pytest.approx(sum(plain) / len(plain), abs=1e-12)


def test_an_annotator_is_left_out_by_position_and_not_with_all_who_say_the_same():
    references = ["cat"] * 4 + ["dog"] * 6
    dropped_equal = (4 * min(0 / 3, 1) + 6 * min(4 / 3, 1)) / 10  # what the official code gives where records are equal
    assert scores.soft_accuracy("cat", references) == 1 != dropped_equal
    assert scores.soft_accuracy("cat", ["cat"] * 2 + ["dog"] * 8) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)


@pytest.mark.parametrize(
    ("agreeing", "total", "wanted"),
    [(1, 1, 1), (1, 2, 0.5), (2, 2, 1), (1, 3, 1 / 3), (2, 5, 2 / 3), (3, 9, 1), (0, 4, 0)],
)
def test_with_fewer_than_ten_annotators_three_that_agree_are_enough(agreeing, total, wanted):
    assert scores.soft_accuracy("cat", ["cat"] * agreeing + ["dog"] * (total - agreeing)) == pytest.approx(wanted)


def test_a_question_without_reference_answers_cannot_be_scored():
    with pytest.raises(DataError, match="no reference answer"):
        scores.soft_accuracy("cat", [])


def test_vqa_accuracy_is_reported_by_kind_over_resampled_images():
    answers, kinds = ["yes", "no", "left lung", "x"], ["closed", "closed", "open", "open"]
    found = scores.vqa_scores(answers, [["Yes"], ["yes"], ["The left lung."], ["y"]], groups=[0, 0, 1, 1], kinds=kinds)
    assert found["accuracy"]["value"] == 0.5 and found["accuracy:closed"]["value"] == 0.5
    assert found["accuracy"]["ci"] == [0.5, 0.5]  # each image has one of two right
    assert found["accuracy:open"]["ci"] is None  # one image


def test_yes_and_no_are_read_from_true_and_false_and_anything_else_is_wrong():
    found = scores.yes_no_scores(["True", "no", "maybe", "Yes."], ["yes", "false", "no", "false"])
    assert found["accuracy"]["value"] == 0.5 and found["said_yes"]["value"] == 0.5
    with pytest.raises(DataError, match="answer 0 is 'perhaps'"):
        scores.yes_no_scores(["yes"], ["perhaps"])


def test_a_constant_score_gets_chance_in_multiple_choice_wherever_truth_stands():
    hits = scores.choice_hits(np.zeros((4, 4)), np.arange(4))
    assert hits.tolist() == [0.25] * 4
    missing = scores.choice_hits([[1.0, 2.0, -np.inf], [3.0, 3.0, -np.inf]], [1, 0])
    assert missing.tolist() == [1, 0.5]
    with pytest.raises(ValueError, match="row 0"):
        scores.choice_hits([[1.0, -np.inf]], [1])
    with pytest.raises(ValueError, match="NaN"):
        scores.choice_hits([[1.0, np.nan]], [0])


# captions -----------------------------------------------------------------------------------------------------------

TOY = [
    (
        "a red circle above a blue square",
        ["a red circle stands above a blue square", "a blue square below a red circle", "red circle over blue square"],
    ),
    ("two dogs run along the beach", ["two dogs run on the beach", "a pair of dogs running along a sandy beach"]),
    ("a man a man a man with a hat", ["a man with a hat reads a paper", "an old man in a hat"]),
    (
        "a green tractor pulls a cart through the field on a sunny afternoon in late summer",
        ["a tractor in a field", "a green tractor pulls a cart", "a farm machine on a sunny day"],
    ),
    ("nothing alike here", ["three cups on a wooden table", "cups on a table"]),
]
CAPTIONS, REFERENCES = [c for c, _ in TOY], [r for _, r in TOY]
# computed once by pycocoevalcap 1.2 on the same words
CIDER = [4.526221828082492, 2.7029101604796244, 2.262190114441463, 0.643486855716129, 0.0]
BLEU = [0.7073170731534801, 0.6109879156275155, 0.5247610566086206, 0.4273322544310115]


def test_cider_d_of_the_toy_is_what_the_coco_evaluation_gave():
    np.testing.assert_allclose(scores.cider_d(CAPTIONS, REFERENCES), CIDER, rtol=1e-12, atol=1e-12)


def test_bleu_of_the_toy_is_what_the_coco_evaluation_gave():
    np.testing.assert_allclose(scores.bleu(CAPTIONS, REFERENCES), BLEU, rtol=1e-9)  # it adds 1e-9 to its denominators


def grams(text, n):
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def test_bleu_is_its_formula_in_plain_loops():
    for most in (1, 2, 3, 4):
        logs = []
        for n in range(1, most + 1):
            matched = total = 0
            for caption, references in TOY:
                own = grams(caption, n)
                total += len(own)
                for gram in set(own):
                    matched += min(own.count(gram), max(grams(r, n).count(gram) for r in references))
            logs.append(math.log(matched / total))
        c = sum(len(caption.split()) for caption, _ in TOY)
        r = 0
        for caption, references in TOY:
            lengths = sorted(len(reference.split()) for reference in references)
            r += min(lengths, key=lambda n: abs(n - len(caption.split())))  # noqa: B023
        wanted = min(1, math.exp(1 - r / c)) * math.exp(sum(logs) / most)
        assert scores.bleu(CAPTIONS, REFERENCES)[most - 1] == pytest.approx(wanted, abs=1e-12)


def test_of_two_reference_lengths_as_close_the_shorter_counts():
    assert scores.bleu_counts("a b c", ["a b", "a b c d"])[3] == 2


def test_cider_d_is_its_formula_in_plain_loops():
    images = len(TOY)
    for (caption, references), found in zip(TOY, scores.cider_d(CAPTIONS, REFERENCES), strict=True):
        value = 0.0
        for reference in references:
            for n in range(1, 5):

                def weight(text, gram, n=n):
                    df = sum(any(gram in grams(r, n) for r in rs) for _, rs in TOY)
                    return grams(text, n).count(gram) * math.log(images / max(1, df))

                own, other = set(grams(caption, n)), set(grams(reference, n))
                norm = math.sqrt(sum(weight(caption, g) ** 2 for g in own))
                norm *= math.sqrt(sum(weight(reference, g) ** 2 for g in other))
                dot = sum(min(weight(caption, g), weight(reference, g)) * weight(reference, g) for g in own & other)
                off = len(grams(caption, 2)) - len(grams(reference, 2))
                near = math.exp(-(off**2) / (2 * 36))
                value += near * dot / norm / 4 / len(references) if norm else 0
        assert found == pytest.approx(10 * value, abs=1e-10)


def test_a_perfect_caption_scores_one_in_bleu_and_ten_in_cider_d():
    texts = ["a red cat sleeps on a mat", "two birds fly over the lake", "rain falls on empty city streets"]
    assert scores.bleu(texts, [[t] for t in texts]).tolist() == pytest.approx([1, 1, 1, 1])
    assert scores.cider_d(texts, [[t] for t in texts]).tolist() == pytest.approx([10, 10, 10])


def test_no_match_and_no_word_at_all_score_zero():
    assert scores.bleu(["x y z"], [["a b c"]]).tolist() == [0, 0, 0, 0]
    assert scores.bleu([""], [["a b c"]]).tolist() == [0, 0, 0, 0]
    assert scores.bleu(["a b c"], [["a b c"]]).tolist() == pytest.approx([1, 1, 1, 0])  # it has no 4-gram
    assert scores.cider_d(["", "a"], [["b c"], ["a"]])[0] == 0


def test_captions_are_compared_without_case_and_punctuation():
    assert scores.caption_words("A man's T-shirt, 3.5 m away.") == ["a", "man's", "t-shirt", "3.5", "m", "away"]
    plain = scores.cider_d(CAPTIONS, REFERENCES)
    np.testing.assert_array_equal(plain, scores.cider_d([c.title() + " ." for c in CAPTIONS], REFERENCES))


def test_caption_scores_have_intervals_over_images():
    found = scores.caption_scores(CAPTIONS, REFERENCES)
    assert list(found) == ["bleu1", "bleu2", "bleu3", "bleu4", "cider_d"]
    assert found["cider_d"]["value"] == pytest.approx(np.mean(CIDER))
    for name, score in found.items():
        assert score["ci"][0] <= score["value"] <= score["ci"][1], name
    assert scores.caption_scores(CAPTIONS, REFERENCES, groups=[0] * 5)["bleu1"]["ci"] is None
    with pytest.raises(DataError, match="image 1"):
        scores.caption_scores(["a", "b"], [["a"], ["..."]])


def test_resampled_bleu_is_the_bleu_of_the_resampled_corpus():
    table = scores._bleu_table(CAPTIONS, REFERENCES, 4)
    weights = np.array([[2, 0, 1, 1, 1]])
    rows = np.repeat(np.arange(5), weights[0])
    wanted = scores.bleu([CAPTIONS[i] for i in rows], [REFERENCES[i] for i in rows])
    np.testing.assert_allclose(scores._bleu_of(table, weights)[0], wanted)


# retrieval ----------------------------------------------------------------------------------------------------------


def test_recalls_with_many_captions_an_image_are_those_of_loops_over_sorted_lists():
    rng = np.random.default_rng(0)
    image_of = np.array([0, 0, 1, 1, 1, 2, 3, 3] + [4 + i // 2 for i in range(24)])
    similarity = rng.normal(size=(16, 32)) + 1.5 * (image_of[None] == np.arange(16)[:, None])
    found = scores.retrieval_scores(similarity, image_of)
    for k in (1, 5, 10):
        to_text = [
            any(image_of[c] == i for c in np.argsort(-similarity[i])[:k]) for i in range(16)
        ]  # any of its captions
        to_image = [image_of[c] in np.argsort(-similarity[:, c])[:k] for c in range(32)]
        assert found[f"image_to_text_r{k}"]["value"] == pytest.approx(np.mean(to_text))
        assert found[f"text_to_image_r{k}"]["value"] == pytest.approx(np.mean(to_image))
        assert found[f"text_to_image_r{k}"]["ci"][0] < found[f"text_to_image_r{k}"]["ci"][1] or k == 10


def test_similarities_that_are_all_alike_retrieve_nothing():
    found = scores.retrieval_scores(np.zeros((20, 40)), np.arange(40) // 2)
    assert all(score["value"] == 0 for score in found.values())


def test_captions_of_the_same_image_do_not_stand_in_each_others_way():
    similarity = np.array([[0.9, 0.8, 0.1], [0.2, 0.3, 0.5]])
    to_text, to_image = scores.retrieval_ranks(similarity, np.array([0, 0, 1]))
    assert to_text.tolist() == [0, 0] and to_image.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("similarity", "image_of", "reason"),
    [
        (np.zeros((2, 2)), [0, 0], "image 1 has no caption"),
        (np.full((1, 1), np.nan), [0], "not finite"),
        (np.zeros((2, 2)), [0, 2], "captions of images 0 to 1"),
    ],
)
def test_what_cannot_be_ranked_is_refused(similarity, image_of, reason):
    with pytest.raises(ValueError, match=reason):
        scores.retrieval_ranks(similarity, np.array(image_of))


def test_the_harmonic_mean_is_low_where_one_side_is():
    assert scores.harmonic_mean(0.8, 0.6) == pytest.approx(2 / (1 / 0.8 + 1 / 0.6))
    assert scores.harmonic_mean(0.0, 0.0) == 0 == scores.harmonic_mean(1.0, 0.0)


def test_an_interval_over_images_is_wider_than_one_over_their_questions():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 10)
    rows = (rng.random(40) < 0.5).astype(float)[groups]  # an image is right or wrong as a whole
    low, high = scores.mean_interval(rows, groups)["ci"]
    below, above = scores.mean_interval(rows)["ci"]
    assert high - low > 2 * (above - below)
    assert scores.mean_interval(rows, groups) == scores.mean_interval(rows, [f"img{g}" for g in groups])
    with pytest.raises(DataError, match="nothing to score"):
        scores.mean_interval(np.array([]))


def test_every_contraction_lacks_one_apostrophe():
    for bare, word in scores.CONTRACTIONS.items():
        assert any(bare == word[:i] + word[i + 1 :] for i, c in enumerate(word) if c == "'")
    assert len(set(itertools.chain(scores.CONTRACTIONS))) > 100
