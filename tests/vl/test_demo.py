"""The demo in its toy setting: rows that differ in nothing but the bottleneck, and blind baselines beside them."""

import numpy as np
import pytest
import torch

from adaptsuite.backbones import load_backbone
from adaptsuite.vl import demo, demo_page, synthetic
from adaptsuite.vl.blind import BLIND

TABLE = {"lora", "lora+add", "lora+mul", "lora+mul_expand", *BLIND}


@pytest.fixture(scope="module")
def pair():
    return load_backbone("embedded:vl-tiny")


@pytest.fixture(scope="module")
def data(pair):
    return demo.pool(pair, np.arange(0, 40000, 400), 1, np.random.default_rng(0))


def test_the_table_has_every_row_with_an_interval_and_equal_sizes(tmp_path, adapt, monkeypatch):
    run = demo.run
    monkeypatch.setattr(demo, "run", lambda out: run(out, steps=3, pictures=60, tests=80))
    found, err = adapt("demo", "--out", tmp_path, "--json")
    assert set(found["table"]) == TABLE and found["bounds"] == synthetic.bounds(1)
    for metric in found["table"].values():
        low, high = metric["ci"]
        assert 0 <= low <= metric["value"] <= high <= 1
    assert {(c["trained"], c["trained_without_head"]) for c in found["params"].values()} == {(18574, 8192)}
    assert (tmp_path / "vl" / "table.json").is_file() and "lora+mul_expand" in err
    page = (tmp_path / "vl" / "report.html").read_text()
    assert "question alone" in page and page.count("data:image/svg") == 2 and found["headline"]["ci"]


def test_blind_batches_hold_nothing_of_what_they_do_not_see(pair, data):
    handle, blank = demo.train(pair, data, 1, 0, method="lora")
    asked, model = data.asked(np.random.default_rng(1)), handle.model
    text, image = (asked.batch(model, blind=kind, blank=blank) for kind in BLIND)
    handle.detach()
    assert all(torch.equal(v, blank[0]) for v in text["features"])
    assert image["attention_mask"].sum(1).unique().tolist() == [2]  # [CLS] and [SEP] alone
    assert torch.equal(image["features"], data.features[:, :1])


def test_a_batch_is_what_was_asked(pair, data):
    handle, _ = demo.train(pair, data, 1, 0, method="lora")
    asked = data.asked(np.random.default_rng(1), np.array([3, 5]))
    batch, model = asked.batch(handle.model), handle.model
    handle.detach()
    text = [synthetic.questions(1)[i][1] for i in asked.question]
    assert [model.tokenizer.decode(row) for row in batch["input_ids"]] == text
    answers = [synthetic.ANSWERS[int(i)] for i in batch["target"].argmax(1)]
    truth = synthetic.answer_of(data.scenes[[3, 5]], 1, asked.question)
    assert answers == [synthetic.ANSWERS[i] for i in truth]


def test_the_page_counts_where_one_row_alone_is_right():
    truth = np.array([0, 1, 2, 3])
    said = {"lora": np.array([0, 0, 0, 0]), "lora+mul": np.array([1, 1, 2, 0])}
    assert "only routing: mul is right in 50%, only plain LoRA in 25%" in demo_page._counted(truth, said)


def test_equal_seeds_give_equal_rows_and_leave_the_pair_alone(pair, data):
    before = {k: v.clone() for k, v in pair.state_dict().items()}
    asked = data.asked(np.random.default_rng(1))
    first, second = (demo.score_row(pair, data, asked, 3, 4, demo.ROWS["lora+mul"])[0] for _ in range(2))
    assert np.array_equal(first, second)
    assert all(torch.equal(v, before[k]) for k, v in pair.state_dict().items())


@pytest.mark.slow
def test_routing_binds_what_plain_lora_does_not(pair):
    rng, parts = np.random.default_rng(0), synthetic.split()
    data, held = (demo.pool(pair, rng.choice(parts[part], 2000), 1, rng) for part in ("train", "test"))
    asked = held.asked(rng)
    plain, routed = (
        demo.score_row(pair, data, asked, 300, 0, demo.ROWS[name])[0].mean() for name in ("lora", "lora+mul")
    )
    assert routed > plain + 0.1
