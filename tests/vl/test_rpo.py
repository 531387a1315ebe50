import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaptsuite.errors import UsageError
from adaptsuite.front_end import FrontEnd
from adaptsuite.host import attach
from adaptsuite.testing import HOSTS, TinyHost
from adaptsuite.verify import contract
from adaptsuite.vl.rpo import end_of_text, read_only
from adaptsuite.vl.two_tower import HfClip, OpenClip, cosines

FAMILIES = {"open_clip": OpenClip, "hf_clip": HfClip}
PLAIN = FrontEnd(size=(32, 32), mean=(0.0,) * 3, std=(1.0,) * 3)


class Compared(nn.Module):
    """Pictures against texts."""

    def __init__(self, towers):
        super().__init__()
        self.towers = towers

    def forward(self, image, input_ids, attention_mask=None):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return cosines(self.towers.see(image), self.towers.read(input_ids, mask))


def compared(family: str) -> TinyHost:
    host = HOSTS[family]()
    image, ids = host.args or (host.kwargs["pixel_values"], host.kwargs["input_ids"])
    return TinyHost(family, Compared(FAMILIES[family](host.model, None, PLAIN)).eval(), (image, ids))


@pytest.fixture(params=FAMILIES)
def host(request):
    return compared(request.param)


def adapted(host, tokens=3, **settings):
    torch.manual_seed(0)
    return attach(host.model, "vl.rpo", sample=host.args, tokens=tokens, **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_rpo_keeps_the_contract(family):
    """The order of the batch is that of pictures and of texts here, so both turn."""

    def build():
        host = compared(family)
        host.read = lambda scores: scores.diagonal().unsqueeze(1)
        return host

    facts = contract(build, "vl.rpo", tokens=2)
    assert facts["merges"] == "refused with its reason"


def test_each_prompt_reads_all_tokens_and_nothing_reads_prompts_by_loops():
    """Both towers of open_clip, token by token in float64: who is seen is a list, not a mask."""
    host = compared("open_clip")
    handle, (image, ids) = adapted(host), host.args
    towers = host.model.double().towers
    clip, tables = towers.model, handle.adapter.shared.tables
    eye, word = tables["towers/model/visual"], tables["towers/model/text"]

    def block(layer, x, sees):  # x (T, D)
        normed, heads = layer.ln_1(x), layer.attn.num_heads
        q, k, v = F.linear(normed, layer.attn.in_proj_weight, layer.attn.in_proj_bias).chunk(3, -1)
        width, rows = q.shape[1] // heads, []
        for i in range(len(x)):
            parts = []
            for h in range(heads):
                part = slice(h * width, (h + 1) * width)
                logits = torch.stack([q[i, part] @ k[j, part] / math.sqrt(width) for j in sees[i]])
                parts.append(sum(w * v[j, part] for w, j in zip(logits.softmax(0), sees[i], strict=True)))
            rows.append(layer.attn.out_proj(torch.cat(parts)))
        x = x + torch.stack(rows)
        return x + layer.mlp(layer.ln_2(x))

    with torch.no_grad():
        pictures, texts = towers.see(image.double()), towers.read(ids, torch.ones_like(ids))
        tokens = clip.visual._embeds(image.double())[1]
        own = len(tokens)
        x = torch.cat([tokens, clip.visual.ln_pre(eye)])
        for layer in clip.visual.transformer.resblocks:
            x = block(layer, x, [list(range(own))] * len(x))
        expected = clip.visual.ln_post(x[own:]) @ clip.visual.proj
        torch.testing.assert_close(pictures[1], expected, rtol=1e-9, atol=1e-9)

        x = clip.token_embedding(ids[1]) + clip.positional_embedding
        own = len(x)
        x = torch.cat([x, word])
        for layer in clip.transformer.resblocks:
            x = block(layer, x, [list(range(min(i + 1, own))) for i in range(len(x))])
        torch.testing.assert_close(texts[1], clip.ln_final(x[own:]) @ clip.text_projection, rtol=1e-9, atol=1e-9)

        cosine = [
            [sum(float(F.cosine_similarity(p[k], t[k], 0)) for k in range(3)) / 3 for t in texts] for p in pictures
        ]
        torch.testing.assert_close(host.model(image.double(), ids), torch.tensor(cosine, dtype=torch.float64))


def test_what_the_backbone_says_is_not_shifted(host):
    """Read-only: tokens are as without prompts, up to another attention kernel's rounding."""
    image, ids = host.args
    plain = copy.deepcopy(host.model.towers.model)
    adapted(host, noise=5.0)
    model = host.model.towers.model
    with torch.no_grad():
        if host.name == "open_clip":
            before, after = (
                (m.encode_image(image), m.ln_final(m.transformer(m.token_embedding(ids), attn_mask=m.attn_mask))[:, :7])
                for m in (plain, model)
            )
        else:
            before, after = (
                (m.vision_model(pixel_values=image).pooler_output, m.text_model(input_ids=ids).pooler_output)
                for m in (plain, model)
            )
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_no_prompt_reads_another(host):
    handle, (image, ids) = adapted(host), host.args
    towers = host.model.towers
    with torch.no_grad():
        before = towers.see(image), towers.read(ids, torch.ones_like(ids))
        for table in handle.adapter.shared.tables.values():
            table[1] += torch.randn(table.shape[1])
        after = towers.see(image), towers.read(ids, torch.ones_like(ids))
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a[:, [0, 2]], b[:, [0, 2]], rtol=1e-5, atol=1e-5)
        assert (a[:, 1] - b[:, 1]).abs().max() > 1e-2


def test_text_embeddings_are_never_written_into(host):
    """The authors' code puts prompts into its cached embeddings of the class names, so each forward finds the last."""
    handle, (image, ids) = adapted(host), host.args
    tables = {n: p.clone() for n, p in host.model.named_parameters() if "adapter_bank" not in n}
    given, first = ids.clone(), host.model(image, ids)
    first.sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(host.model(image, ids), first, rtol=1e-5, atol=1e-5)
        short = host.model.towers.read(ids[:1], torch.ones_like(ids[:1]))
        torch.testing.assert_close(short, host.model.towers.read(ids, torch.ones_like(ids))[:1], rtol=1e-5, atol=1e-5)
    assert torch.equal(ids, given)
    for name, value in tables.items():
        assert torch.equal(host.model.get_parameter(name), value), name
    assert all(p.grad is not None for p in handle.trained().values())


def test_padding_behind_a_text_is_not_read(host):
    handle, (_, ids) = adapted(host), host.args
    short = torch.cat([ids[:, :3], ids[:, -1:]], 1)
    padded = torch.cat([short, torch.zeros(2, 3, dtype=torch.long)], 1)
    mask = (torch.arange(7) < 4).long().expand(2, -1)
    with torch.no_grad():
        towers = host.model.towers
        torch.testing.assert_close(
            towers.read(padded, mask), towers.read(short, torch.ones_like(short)), rtol=1e-5, atol=1e-5
        )
        with handle.disabled():
            torch.testing.assert_close(
                towers.read(padded, mask), towers.read(short, torch.ones_like(short)), rtol=1e-5, atol=1e-5
            )


def test_prompts_start_as_class_and_end_of_text_embeddings_without_positions(host):
    handle = adapted(host, noise=0.0)
    clip, tables = host.model.towers.model, handle.adapter.shared.tables
    text, eye = sorted(tables)
    if host.name == "open_clip":
        cls, word = clip.visual.class_embedding, clip.token_embedding.weight[98]
    else:
        cls, word = clip.vision_model.embeddings.class_embedding, clip.text_model.embeddings.token_embedding.weight[98]
    assert torch.equal(tables[eye], cls.expand(3, -1)) and torch.equal(tables[text], word.expand(3, -1))


def test_noise_has_the_papers_deviation():
    host = compared("open_clip")
    table = adapted(host, tokens=400).adapter.shared.tables["towers/model/visual"].detach()
    off = table - host.model.towers.model.visual.class_embedding
    assert abs(float(off.std()) - 0.1) < 0.005


def test_vit_b_16_has_the_papers_number_of_parameters():
    from open_clip import get_model_config
    from open_clip.model import CLIP

    with torch.device("meta"):
        model = Compared(OpenClip(CLIP(**get_model_config("ViT-B-16")), None, FrontEnd()))
        sample = torch.empty(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.long)
    handle = attach(model, "vl.rpo", sample=sample)
    assert handle.parameters_count()["trained"] == 30720


def test_gradients_are_those_of_checkpointed_towers():
    host = compared("open_clip")
    handle, found = adapted(host), []
    for checkpointed in (False, True):
        host.model.towers.model.set_grad_checkpointing(checkpointed)
        host.model.train()
        host.model.zero_grad()
        host.model(*host.args).square().sum().backward()
        found.append({n: p.grad.clone() for n, p in handle.trained().items()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad)


def test_read_only_masks():
    like = torch.zeros(1, 3, 4)
    seen = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    expected = torch.tensor(
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]], dtype=torch.bool
    )
    assert torch.equal(read_only(seen[None, None], 3, 2, like)[0, 0], expected)
    summand = torch.zeros(3, 3).masked_fill(~seen, float("-inf"))
    for mask in (read_only(summand, 3, 2, like), read_only(None, 3, 2, like, causal=True)):
        assert torch.equal(mask == 0, expected) and torch.equal(mask == float("-inf"), ~expected)
    assert torch.equal((read_only(None, 3, 2, like) == 0).sum(1), torch.full((5,), 3))


def test_end_of_text_is_what_the_tower_reads():
    class Tower(nn.Module):
        def __init__(self, **named):
            super().__init__()
            self.__dict__.update(named)

    assert end_of_text(Tower(), 99) == 98
    assert end_of_text(Tower(eos_token_id=2), 99) == 98
    assert end_of_text(Tower(text_eos_id=7), 99) == 7


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tokens": 0}, "tokens is 0, it must be at least 1"),
        ({"noise": -1.0}, "noise is -1.0"),
        ({"sites": ("attn",)}, "leave sites at block"),
        ({"sites": ("visual:block",)}, "one image tower and one text tower are needed"),
    ],
)
def test_what_cannot_be_is_refused(settings, said):
    host = compared("open_clip")
    with pytest.raises(UsageError, match=said):
        attach(host.model, "vl.rpo", sample=host.args, **settings)
    assert not hasattr(host.model, "adapter_bank")


def test_a_single_tower_is_refused():
    host = HOSTS["timm_vit"]()
    with pytest.raises(UsageError, match="one image tower and one text tower are needed, here are 1 towers"):
        attach(host.model, "vl.rpo", sample=(host.args, host.kwargs))


def test_towers_without_class_and_end_of_text_tokens_are_refused():
    from adaptsuite.vl.backbones import embedded

    pair = embedded("vl-tiny", random_weights=True)
    text = pair.tokenizer(["red circle"])
    with pytest.raises(UsageError, match="no CLIP-like text tower: it has no token_embedding"):
        attach(pair, "vl.rpo", sample={"image": torch.rand(1, 3, 32, 32), **text})
