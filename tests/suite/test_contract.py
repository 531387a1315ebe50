"""The battery: every method on three families and every family with three methods; the whole matrix when slow."""

import pytest

from adaptsuite.errors import UsageError
from adaptsuite.method import method_class, methods
from adaptsuite.testing import HOSTS
from adaptsuite.verify import contract

FAMILIES = ("timm_eva", "hf_ast", "hf_bert")  # a shadow family, the audio family, a post-norm family
METHODS = ("lora", "bottleneck", "bitfit")
IMAGE_FAMILIES = ("timm_vit_reg", "timm_siglip", "timm_eva", "timm_swin")  # registers, no prefix, rotary, windows
IMAGE_METHODS = (
    "parallel_adapter", "adaptformer", "adapter_plus", "convpass", "vpt", "ssf", "kadaptation", "subspace", "fact",
    "vision.ila",
)  # fmt: skip
# where the defaults do not fit hosts of two blocks and 12 to 32 features
SETTINGS = {
    "kadaptation": {"factor": 4},
    "subspace": {"dims": 64},
    **{f"vision.ila{more}": {"locations": (0,)} for more in ("", "_plus", "_plus_plus")},
}


def cases():
    for family in HOSTS:
        for method in methods():
            kind = method_class(method)
            # tested where a head is: test_host.py and tests/audio; where an image or two towers are: tests/vl
            if not (kind.needs_head or kind.needs_features or method == "vl.rpo"):
                quick = family in FAMILIES or method in METHODS
                quick |= family in IMAGE_FAMILIES and method in IMAGE_METHODS
                yield pytest.param(family, method, marks=() if quick else pytest.mark.slow, id=f"{family}-{method}")


# what cannot be, with the reason that attach gives
WINDOWS = {"timm_swin", "timm_swinv2", "hf_clap", "monai_swin_unetr"}
NO_GRID = {
    "hf_clip", "hf_bert", "hf_roberta", "hf_gpt2", "hf_wav2vec2", "hf_wavlm", "hf_whisper", "open_clip",
    "torchaudio_wav2vec2", "nn_encoder", "conformer",
}  # fmt: skip
REFUSED = {
    **{(method, family): "within windows" for method in ("prompt", "vpt", "convpass") for family in WINDOWS},
    **{(method, "timm_beit"): "does not fit this Beit" for method in ("prompt", "vpt")},
    **{("prefix", family): "by hand" for family in WINDOWS | {"monai_vit"}},
    **{("convpass", family): "with no grid" for family in NO_GRID},
    ("convpass", "monai_vit"): "a grid of 2 x 2 x 2",
}
for ila in ("vision.ila", "vision.ila_plus", "vision.ila_plus_plus"):
    REFUSED |= {(ila, family): "tied to its grid" for family in WINDOWS | {"timm_beit"}}
    REFUSED |= {(ila, family): "with no grid" for family in NO_GRID}
    REFUSED |= {(ila, "monai_vit"): "a grid of 2 x 2 x 2", (ila, "hf_ast"): "2 x 5 tokens is too small"}


@pytest.mark.parametrize(("family", "method"), list(cases()))
def test_method_keeps_its_promises(family, method):
    settings = SETTINGS.get(method, {})
    if (method, family) in REFUSED:
        with pytest.raises(UsageError, match=REFUSED[method, family]):
            contract(HOSTS[family], method, **settings)
        return
    facts = contract(HOSTS[family], method, **settings)
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


IMAGE_VARIANTS = [
    ("timm_swin", "convpass", {"sites": ("mlp",)}),
    ("timm_swinv2", "convpass", {"sites": ("mlp",)}),
    ("monai_swin_unetr", "convpass", {"sites": ("mlp",)}),
    ("timm_vit_reg", "convpass", {"kernel": 5, "start": "xavier", "activation": "quick_gelu", "dropout": 0.1}),
    ("timm_siglip", "convpass", {"sites": ("block",), "placement": "sequential", "scale": "learned"}),
    ("timm_vit_reg", "bottleneck", {"activation": "relu", "scale": "channel", "start": "xavier", "dropout": 0.2}),
    ("timm_vit_reg", "vpt", {"deep": False, "dropout": 0.0, "tokens": 3}),
    ("timm_eva_split", "ssf", {"start": "normal"}),
    ("timm_vit", "ssf", {"sites": ("attn.q", "attn.k")}),
    ("timm_vit_reg", "kadaptation", {"factor": 8, "dropout": 0.5, "blocks": (1,), "scale": 16.0}),
    ("timm_eva_split", "kadaptation", {"sites": ("attn.q", "attn.k", "attn.v", "mlp.out"), "factor": 1}),
    ("timm_vit_reg", "subspace", {"sites": ("attn.q", "patch_embed?"), "blocks": (0,), "seed": 3}),
    ("hf_gpt2", "subspace", {"dims": 64}),
    ("timm_vit_reg", "fact", {"rank": 4, "dropout": 0.1, "sites": ("attn.q", "attn.k", "attn.v", "mlp.in")}),
    ("timm_eva", "fact", {"rank": 2, "scale": 10.0}),
]


@pytest.mark.parametrize(("family", "method", "settings"), IMAGE_VARIANTS)
def test_settings_keep_the_promises_on_image_hosts(family, method, settings):
    contract(HOSTS[family], method, **settings)
