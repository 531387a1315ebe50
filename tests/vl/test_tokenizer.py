"""Words to numbers and back, for any text."""

import json

import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptsuite.vl import synthetic
from adaptsuite.vl.tokenizer import CLS, MASK, PAD, SEP, WordTokenizer, words

TOKENIZER = WordTokenizer(synthetic.words(), buckets=64, max_length=16)


def test_words_are_lower_case_with_signs_of_their_own():
    assert words("It's the RED one, isn’t it?") == ["it's", "the", "red", "one", ",", "isn’t", "it", "?"]
    assert words("ﬁne\tx-ray 3.5") == ["fine", "x", "-", "ray", "3", ".", "5"]


def test_every_sentence_of_the_generator_is_known():
    texts = [text for level in synthetic.LEVELS for _, text in synthetic.questions(level)]
    for text in texts:
        ids = TOKENIZER.encode(text)
        assert max(ids) < TOKENIZER.num_known and TOKENIZER.decode(ids) == text


def test_a_question_with_or_without_a_blank_before_its_mark_is_the_same():
    assert TOKENIZER.encode("What color is the top left?") == TOKENIZER.encode("what color is the top left ?")


@given(st.text(max_size=200))
def test_any_text_has_numbers_in_range_and_keeps_its_order(text):
    ids = TOKENIZER.encode(text)
    assert ids[0] == CLS and ids[-1] == SEP and len(ids) <= 16
    assert all(SEP < i < len(TOKENIZER) and i != MASK for i in ids[1:-1])
    assert len(ids) - 2 + TOKENIZER.cut(text) == len(words(text))


def test_unknown_words_have_the_same_bucket_in_every_process():
    assert [TOKENIZER.number(w) - TOKENIZER.num_known for w in ("pneumothorax", "lung", "étoile")] == [53, 14, 7]
    assert TOKENIZER.decode(TOKENIZER.encode("red lung")) == "red <14>"


def test_a_batch_is_padded_behind_and_masked():
    batch = TOKENIZER(["red", "is the top left red ?"])
    assert batch["input_ids"].shape == (2, 8) and batch["input_ids"].dtype == torch.int64
    assert batch["input_ids"][0].tolist() == TOKENIZER.encode("red") + [PAD] * 5
    assert batch["attention_mask"].sum(1).tolist() == [3, 8]
    assert TOKENIZER([])["input_ids"].shape == (0, 0)


def test_a_special_name_in_a_text_is_no_special_token():
    assert not {PAD, CLS, SEP, MASK} & set(TOKENIZER.encode("[PAD] [MASK]")[1:-1])


def test_it_survives_json():
    again = WordTokenizer.of(json.loads(json.dumps(TOKENIZER.record())))
    assert again == TOKENIZER and len(again) == 4 + len(synthetic.words()) + 64
