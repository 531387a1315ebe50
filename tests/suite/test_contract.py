"""The battery: every method on three families and every family with three methods; the whole matrix when slow."""

import pytest

from adaptsuite.errors import UsageError
from adaptsuite.method import method_class, methods
from adaptsuite.testing import HOSTS
from adaptsuite.verify import contract

FAMILIES = ("timm_eva", "hf_ast", "hf_bert")  # a shadow family, the audio family, a post-norm family
METHODS = ("lora", "bottleneck", "bitfit")


def cases():
    for family in HOSTS:
        for method in methods():
            if not method_class(method).needs_head:  # tested where a head is: tests/suite/test_host.py and tests/audio
                quick = family in FAMILIES or method in METHODS
                yield pytest.param(family, method, marks=() if quick else pytest.mark.slow, id=f"{family}-{method}")


# what cannot be, with the reason that attach gives
WINDOWS = {"timm_swin", "timm_swinv2", "hf_clap", "monai_swin_unetr"}
REFUSED = {
    **{("prompt", family): "within windows" for family in WINDOWS},
    ("prompt", "timm_beit"): "does not fit this Beit",
    **{("prefix", family): "by hand" for family in WINDOWS | {"monai_vit"}},
}


@pytest.mark.parametrize(("family", "method"), cases())
def test_method_keeps_its_promises(family, method):
    if (method, family) in REFUSED:
        with pytest.raises(UsageError, match=REFUSED[method, family]):
            contract(HOSTS[family], method)
        return
    facts = contract(HOSTS[family], method)
    assert all(facts.values())


# weights that these families read without calling their module
SHADOWED = {"hf_wavlm", "timm_eva", "timm_beit", "timm_swinv2", "open_clip", "nn_encoder", "conformer"}


@pytest.mark.parametrize("family", HOSTS)
def test_a_shadow_is_used_exactly_where_it_is_needed(family):
    from adaptsuite.host import attach

    host = HOSTS[family]()
    handle = attach(host.model, "lora", sample=(host.args, host.kwargs), sites=("attn.q", "attn.v"))
    assert (len(handle.shadow_sites) == len(handle.sites)) == (family in SHADOWED)


VARIANTS = [
    ("prompt", {"deep": False, "tokens": 3}),
    ("prefix", {"tokens": 1}),
    ("lora", {"sites": ("attn.qkv", "attn.out", "mlp.in", "mlp.out"), "rslora": True}),
    ("bottleneck", {"sites": ("attn", "mlp"), "bottleneck": 4}),
    ("bottleneck", {"placement": "sequential"}),
    ("bottleneck", {"placement": "sequential", "residual": False}),
    ("bottleneck", {"sites": ("block",)}),
    ("audio.soft_moa", {"sites": ("attn", "mlp"), "slots": 2, "normalise": True}),
    ("audio.soft_moa", {"placement": "sequential", "experts": 1}),
    ("audio.dense_moa", {"sites": ("mlp",), "placement": "sequential"}),
    ("audio.dense_moa", {"experts": 1}),
    ("audio.dense_moa", {"expert": "conformer"}),
    ("audio.soft_moa", {"expert": "conformer", "slots": 3, "sites": ("attn", "mlp")}),
    ("audio.conformer", {"kernel": 31, "placement": "sequential", "sites": ("attn", "mlp")}),
    ("audio.convpass", {"residual": True}),
]


@pytest.mark.parametrize(("method", "settings"), VARIANTS)
@pytest.mark.parametrize("family", ["hf_ast", pytest.param("open_clip", marks=pytest.mark.slow)])
def test_settings_keep_the_promises_too(family, method, settings):
    contract(HOSTS[family], method, **settings)
