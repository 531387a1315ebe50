"""The paired model: what its text encoder is given, what reaches its adapters, and the formulas of its losses."""

import math

import pytest
import torch
from torch.testing import assert_close

from adaptsuite.errors import UsageError
from adaptsuite.host import attach
from adaptsuite.verify import perturb, verify
from adaptsuite.vl.backbones import encoder_pair
from adaptsuite.vl.blind import blank_of
from adaptsuite.vl.paired import AnswerSettings, AnswerTask, PairedModel, VisualMapper
from adaptsuite.vl.pretrain import RECORD

SITES = ("text_encoder:attn.q", "text_encoder:attn.v")
QUESTIONS = ["is it red ?", "what color is the top left ?"]


def paired(tokens="cls", **settings):
    torch.manual_seed(0)
    return PairedModel(encoder_pair(RECORD), 5, AnswerSettings(**settings), tokens).eval()


def batch(model, questions=QUESTIONS):
    torch.manual_seed(1)
    image = torch.randint(0, 256, (len(questions), 3, 32, 32), dtype=torch.uint8)
    return {**model.tokenizer(questions), "image": image}


def adapted(method="vl.routed_lora", tokens="cls", prefix="plain", **settings):
    model = paired(tokens, prefix=prefix)
    rank = {"rank": 4, "sites": SITES} if "lora" in method else {}
    handle = attach(model, method, sample=batch(model), head="head", **{**rank, **settings})
    perturb([p for name, p in handle.trained().items() if name.startswith("branches")], 3)
    return model, handle


def test_without_a_prefix_the_head_reads_the_mean_of_what_the_text_encoder_says():
    """Words are embedded once: the reference applied the embedding stage twice."""
    model = paired(prefix="none")
    given = batch(model)
    said = model.pair.encode_text(given["input_ids"], given["attention_mask"])
    expected = torch.stack([said[b, : int(given["attention_mask"][b].sum())].mean(0) for b in range(2)])
    assert_close(model(**given, embedding=True), expected)
    assert_close(model(**given), model.head.answer(expected))


def test_a_plain_prefix_is_v_before_the_words_and_is_not_pooled():
    model = paired("patches")
    given = batch(model, QUESTIONS[:1])
    v = model.pair.encode_image(given["image"])[:, 1:]
    words = model.pair.text_encoder.get_input_embeddings()(given["input_ids"])
    said = model.pair.text_encoder(inputs_embeds=torch.cat([v, words], 1)).last_hidden_state
    assert v.shape[1] == model.num_prefix() == 16
    assert_close(model(**given, embedding=True), said[:, 16:].mean(1))


@pytest.mark.parametrize("prefix", ["plain", "linear", "mapper", "none"])
def test_padding_and_other_rows_change_nothing(prefix):
    model = paired(prefix=prefix, mapper_tokens=4, mapper_width=16, mapper_layers=1)
    both = batch(model)
    length = int(both["attention_mask"][0].sum())
    alone = {k: v[:1] if k == "image" else v[:1, :length] for k, v in both.items()}
    assert_close(model(**both)[:1], model(**alone), atol=1e-5, rtol=1e-5)


def test_v_stands_for_its_picture():
    model, _ = adapted()
    given = batch(model)
    image = given.pop("image")
    assert torch.equal(model(**given, features=model.see(image)), model(**given, image=image))


@pytest.mark.parametrize("reading, tokens", [("pooled", "cls"), ("attended", "patches")])
def test_the_image_reaches_routed_adapters_and_not_plain_ones(reading, tokens):
    routed, plain = adapted(prefix="none", tokens=tokens, reading=reading)[0], adapted("lora", tokens, "none")[0]
    for model, moves in ((routed, True), (plain, False)):
        given = batch(model)
        other = {**given, "image": given["image"].flip(0)}
        assert torch.equal(model(**given), model(**other)) is not moves


@pytest.mark.parametrize("prefix", ["plain", "linear", "mapper"])
def test_a_row_without_an_image_has_no_prefix(prefix):
    model = paired(prefix=prefix, mapper_tokens=4, mapper_width=16, mapper_layers=1)
    given = {**batch(model), "has_image": torch.tensor([True, False])}
    changed = {**given, "image": given["image"].clone()}
    changed["image"][1] = 255 - changed["image"][1]
    assert torch.equal(model(**given), model(**changed))  # the picture of the second row does not count
    shown = {**given, "has_image": torch.tensor([True, True])}
    assert not torch.allclose(model(**given)[1], model(**shown)[1])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_gradients_are_the_plain_ones(reentrant):
    found = []
    for checkpointed in (False, True):
        model, handle = adapted()
        if checkpointed:
            model.pair.text_encoder.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        given, task = batch(model), AnswerTask()
        target = torch.eye(5)[:2]
        first = task.loss(model, {**given, "target": target})
        second = task.loss(model, {**given, "image": given["image"].flip(0), "target": target})
        (first + 2 * second).backward()  # each backward needs the V of its own forward
        found.append({name: p.grad.clone() for name, p in handle.trained().items()})
    for name, gradient in found[0].items():
        assert gradient.abs().sum() > 0
        assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_training_and_evaluation_say_the_same():
    model, _ = adapted()
    given = batch(model)
    expected = model(**given)
    assert torch.equal(model.train()(**given), expected)


def test_only_branches_and_head_train():
    """The reference trained LayerNorms and biases by accident."""
    model, handle = adapted()
    base = {name: p.clone() for name, p in model.pair.named_parameters()}
    assert {handle.kind(name) for name in handle.trained()} == {"adapter", "head"}
    optimizer = torch.optim.SGD([p for group in handle.trainable() for p in group["params"]], lr=0.1)
    AnswerTask().loss(model, {**batch(model), "target": torch.eye(5)[:2]}).backward()
    optimizer.step()
    assert all(torch.equal(p, base[name]) for name, p in model.pair.named_parameters())


@pytest.mark.parametrize("prefix", ["plain", "linear", "mapper"])
def test_a_fresh_adapter_is_alive_and_changes_nothing(prefix):
    model = paired("all", prefix=prefix, mapper_tokens=4, mapper_width=16, mapper_layers=1)
    sample = batch(model)
    handle = attach(model, "vl.routed_lora", sample=sample, head="head", rank=4, sites=SITES)
    found = verify(handle, sample, fresh=True)
    assert found.ok and found.identity == 0, found.problems


def test_all_rows_of_the_papers_table_train_as_much():
    counts = {
        name: adapted(name, **settings)[1].parameters_count()["trained"]
        for name, settings in {"lora": {}, "vl.routed_lora": {"routing": "mul_expand"}}.items()
    }
    assert len(set(counts.values())) == 1


def test_the_mapper_has_as_many_values_as_its_shapes_say_and_ignores_the_order_of_v():
    torch.manual_seed(0)
    mapper = VisualMapper(12, 20, tokens=5, width=16, layers=2, heads=4, hidden=24).eval()
    block = 4 * 16 + (3 * 16 * 16 + 3 * 16) + (16 * 16 + 16) + (16 * 24 + 24) + (24 * 16 + 16)
    assert sum(p.numel() for p in mapper.parameters()) == (12 * 16 + 16) + 5 * 16 + 2 * block + 2 * 16 + (16 * 20 + 20)
    v = torch.randn(2, 7, 12)
    assert mapper(v).shape == (2, 5, 20)
    assert_close(mapper(v), mapper(v[:, torch.randperm(7)]), atol=1e-5, rtol=1e-5)


class Fixed:
    """Logits that are given: what a task needs of a model."""

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, **given):
        return self.logits


def test_the_losses_are_those_of_loops():
    torch.manual_seed(0)
    logits, target = torch.randn(3, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    target[0, 1], target[1, 0], target[1, 3] = 1.0, 2 / 3, 1 / 3  # the third row has no answer that is known
    bce = ce = 0.0
    for b in range(3):
        log_sum = math.log(sum(math.exp(z) for z in logits[b].tolist()))
        for z, t in zip(logits[b].tolist(), target[b].tolist(), strict=True):
            p = 1 / (1 + math.exp(-z))
            bce -= (t * math.log(p) + (1 - t) * math.log(1 - p)) / 3
            ce -= t / max(float(target[b].sum()), 1e-6) * (z - log_sum) / 3
    assert float(AnswerTask("bce").loss(Fixed(logits), {"target": target})) == pytest.approx(bce, rel=1e-9)
    assert float(AnswerTask("ce").loss(Fixed(logits), {"target": target})) == pytest.approx(ce, rel=1e-9)


def test_every_answer_starts_as_likely_as_one_of_all():
    chance = paired().head.answer[-1].bias.sigmoid()
    assert_close(chance, torch.full((5,), 1 / 5))


def test_the_score_is_the_soft_accuracy_of_the_best_answer():
    outputs, targets = torch.tensor([[0.0, 2], [3, 1]]).numpy(), torch.tensor([[1.0, 2 / 3], [1 / 3, 0]]).numpy()
    assert AnswerTask().score(outputs, targets)["accuracy"] == pytest.approx((2 / 3 + 1 / 3) / 2)


def test_the_blank_is_the_mean_over_pictures():
    v = torch.randn(3, 2, 4)
    assert_close(blank_of(v), ((v[0] + v[1] + v[2]) / 3)[None])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prefix": "plian"}, "head.prefix='plian' is unknown; .*plain"),
        ({"loss": "mse"}, "head.loss='mse' is unknown"),
        ({"mapper_tokens": 0}, "head.mapper_tokens=0"),
        ({"prefix": "mapper", "mapper_width": 20}, "multiple of its 8 heads"),
        ({"prefix": "mapper", "mapper_tokens": 63}, "leaves no room for words"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        paired(**settings)
