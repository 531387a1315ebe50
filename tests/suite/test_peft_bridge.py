"""LoRA to and from peft's folders: the same tensors, the same output, and everything else refused with its reason."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from adaptsuite.artifact import load_adapter
from adaptsuite.errors import AdapterError, UsageError
from adaptsuite.host import attach, place
from adaptsuite.method import resolve
from adaptsuite.peft_bridge import CONFIG, WEIGHTS, from_peft, to_peft
from adaptsuite.sites import find_sites
from adaptsuite.testing import HOSTS
from adaptsuite.verify import _perturb

peft = pytest.importorskip("peft")

ALL = ("attn.qkv", "attn.out", "mlp.in", "mlp.out")


def output(host, model=None):
    with torch.no_grad():
        return host.forward(model).clone()


def assert_same_output(found, expected):
    """Up to rounding: ours adds the branch to y in one fused kernel."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def adapted(family: str, **settings):
    host = HOSTS[family]()
    handle = attach(host.model, "lora", sample=(host.args, host.kwargs), **settings)
    _perturb(handle, seed=1)
    return host, handle


def in_peft(family: str, folder: Path):
    """The output that peft gives with this folder."""
    host = HOSTS[family]()
    model = peft.PeftModel.from_pretrained(host.model, folder).eval()
    return output(host, model.base_model.model)


def peft_trained(family: str, folder: Path, **config):
    """A folder that peft wrote, with its output: LoRA moved off its zero start, and modules_to_save too."""
    host = HOSTS[family]()
    torch.manual_seed(0)
    model = peft.get_peft_model(host.model, peft.LoraConfig(**config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)
    model.save_pretrained(folder)
    return output(host, model.base_model.model)


def edit(folder: Path, tensors=None, **config) -> Path:
    facts = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(facts | config))
    if tensors is not None:
        stored = load_file(folder / WEIGHTS)
        tensors(stored)
        save_file(stored, folder / WEIGHTS)
    return folder


@pytest.fixture
def stored(tmp_path) -> Path:
    peft_trained("hf_vit", tmp_path / "peft", r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    return tmp_path / "peft"


def refused(folder: Path, match: str, family: str = "hf_vit") -> None:
    host = HOSTS[family]()
    before = output(host)
    with pytest.raises(AdapterError, match=match) as caught:
        from_peft(host.model, folder, sample=(host.args, host.kwargs))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert not hasattr(host.model, "adapter_bank") and torch.equal(output(host), before)


# ---- to peft

WRITTEN = [
    ("timm_vit", {"sites": ALL, "train_norms": True, "head": "head"}),
    ("timm_swin", {"sites": ALL}),
    ("hf_ast", {"train_norms": True, "head": "classifier", "rank": 6, "alpha": 12.0, "dropout": 0.1}),
    ("hf_ast", {"last_k": 1, "rslora": True}),
    ("hf_gpt2", {"sites": ALL}),  # Conv1D
    ("hf_clip", {}),  # two towers
    ("open_clip", {"sites": ("mlp.in",)}),  # one tower's names end the other's
    ("monai_swin_unetr", {"sites": ALL}),
    ("torchaudio_wav2vec2", {"sites": ALL, "head": "feature_extractor.conv_layers.0"}),
]


@pytest.mark.filterwarnings("error:.*(missing|unexpected|unused).*adapter")
@pytest.mark.parametrize(("family", "settings"), WRITTEN)
def test_peft_gives_the_same_output_with_a_folder_of_ours(family, settings, tmp_path):
    host, handle = adapted(family, **{"rank": 4, "alpha": 6.0} | settings)
    folder = to_peft(handle, tmp_path / "peft")
    ours = output(host)
    assert_same_output(in_peft(family, folder), ours)
    config = peft.LoraConfig.from_pretrained(folder)
    method = handle.method
    said = (config.r, config.lora_alpha, config.use_rslora, config.lora_dropout)
    assert said == (method.rank, method.alpha, method.rslora, method.dropout)
    loaded = sum(t.numel() for t in load_file(folder / WEIGHTS).values())
    assert loaded == handle.parameters_count()["trained"]
    assert not torch.equal(ours, output(HOSTS[family]()))


@pytest.mark.parametrize(("family", "settings"), WRITTEN)
def test_peft_puts_its_modules_where_ours_are_and_nowhere_else(family, settings, tmp_path):
    _, handle = adapted(family, **settings)
    model = HOSTS[family]().model
    model = peft.PeftModel.from_pretrained(model, to_peft(handle, tmp_path / "peft"), is_trainable=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == handle.parameters_count()["trained"]


def test_one_tower_whose_names_end_the_others_is_written_alone(tmp_path):
    host, twin, third = (HOSTS["open_clip"]() for _ in range(3))
    text = [s for s in find_sites(host.model, "mlp.in") if s.component == "text"]
    handle = place(host.model, resolve("lora", sites="mlp.in"), text, {}, sample=host.args)
    _perturb(handle, seed=1)
    folder = to_peft(handle, tmp_path / "peft")
    model = peft.PeftModel.from_pretrained(twin.model, folder, is_trainable=True)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == handle.parameters_count()["trained"]
    assert_same_output(in_peft("open_clip", folder), output(host))
    from_peft(third.model, folder, sample=third.args)
    assert torch.equal(output(third), output(host))


@pytest.mark.parametrize(
    ("family", "method", "settings", "match"),
    [
        ("timm_vit", "bottleneck", {}, "method 'bottleneck' has no form in peft; only lora"),
        ("timm_vit", "lora", {}, "blocks.0.attn.qkv .attn.q.*part of a fused weight; train with sites=attn.qkv"),
        ("open_clip", "lora", {"sites": "attn.qkv"}, "in_proj_weight is packed into a module"),
        ("open_clip", "lora", {"sites": "attn.out"}, "reads this weight without calling its module"),
        ("timm_eva", "lora", {"sites": "attn.qkv"}, "reads this weight without calling its module"),
        ("timm_swin", "lora", {"sites": "attn.qkv", "train_norms": True}, "norm .*would take patch_embed.norm too"),
        ("timm_vit", "lora", {"sites": "patch_embed"}, "factors a convolution otherwise"),
        ("timm_vit", "lora", {"sites": ("head", "mlp.in"), "head": "head"}, "cannot both adapt a module and store"),
    ],
)
def test_what_peft_has_no_form_for_is_refused(family, method, settings, match, tmp_path):
    host = HOSTS[family]()
    handle = attach(host.model, method, sample=(host.args, host.kwargs), **settings)
    with pytest.raises(UsageError, match=match):
        to_peft(handle, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


class WithBatchNorm(nn.Module):
    def __init__(self, classes: int = 5):
        super().__init__()
        self.backbone = HOSTS["hf_vit"]().model.vit
        self.head = nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, classes))

    def forward(self, x):
        return self.head(self.backbone(x).last_hidden_state[:, 0])


def test_batch_statistics_and_new_classes_are_refused_where_peft_would_lose_them(tmp_path):
    image = torch.randn(2, 3, 32, 32)
    handle = attach(WithBatchNorm().eval(), "lora", sample=image, head="head")
    with pytest.raises(UsageError, match="BatchNorm statistics"):
        to_peft(handle, tmp_path / "peft")
    handle = attach(WithBatchNorm(3).eval(), "lora", sample=image, head="head.1")
    folder = handle.save(tmp_path / "adapter")
    other = load_adapter(WithBatchNorm(5).eval(), folder, sample=image, strict_base=False)
    with pytest.raises(UsageError, match=r"head.1 cannot be written.*\(3, 32\), the base's is \(5, 32\)"):
        to_peft(other, tmp_path / "peft")


def test_only_a_peft_folder_is_overwritten(tmp_path):
    _, handle = adapted("hf_vit")
    folder = handle.save(tmp_path / "adapter")
    with pytest.raises(UsageError, match="no peft adapter"):
        to_peft(handle, folder)
    to_peft(handle, tmp_path / "peft")
    _perturb(handle, seed=2)
    to_peft(handle, tmp_path / "peft")
    assert_same_output(in_peft("hf_vit", tmp_path / "peft"), output(HOSTS["hf_vit"](), handle.model))


# ---- from peft

READ = [
    ("hf_vit", {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}),
    ("hf_vit", {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": r".*layers?\.\d+\..*(q_proj|fc1)"}),
    ("hf_vit", {"target_modules": "all-linear"}),
    ("hf_vit", {"target_modules": ["q_proj", "fc1"], "layers_to_transform": [1]}),
    ("hf_vit", {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}),
    ("hf_vit", {"target_modules": ["q_proj", "fc1"], "exclude_modules": ["layers.0.mlp.fc1"]}),
    ("hf_vit", {"target_modules": ["q_proj"], "modules_to_save": ["classifier", "layernorm"]}),
    ("hf_ast", {"target_modules": ["k_proj"], "modules_to_save": ["classifier"], "init_lora_weights": "gaussian"}),
    ("hf_gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    ("hf_gpt2", {"target_modules": ["lm_head"]}),  # a Linear at a path of its own
    ("timm_vit", {"target_modules": ["qkv", "fc2"], "modules_to_save": ["head", "norm"]}),
    ("monai_swin_unetr", {"target_modules": ["reduction", "qkv"]}),  # Linear without a role
]


@pytest.mark.parametrize(("family", "config"), READ)
def test_a_folder_of_pefts_gives_pefts_output_and_goes_there_and_back(family, config, tmp_path):
    expected = peft_trained(family, tmp_path / "peft", **config)
    host = HOSTS[family]()
    handle = from_peft(host.model, tmp_path / "peft", sample=(host.args, host.kwargs))
    ours = output(host)
    assert_same_output(ours, expected)
    assert not torch.equal(output(HOSTS[family]()), expected)
    stored = {k: t for k, t in load_file(tmp_path / "peft" / WEIGHTS).items() if "base_layer" not in k}
    assert handle.parameters_count()["trained"] == sum(t.numel() for t in stored.values())

    twin = HOSTS[family]()  # through a folder of ours
    load_adapter(twin.model, handle.save(tmp_path / "ours"), sample=(twin.args, twin.kwargs))
    assert torch.equal(output(twin), ours)

    again = load_file(to_peft(handle, tmp_path / "again") / WEIGHTS)
    assert again.keys() == stored.keys() and all(torch.equal(t, again[k]) for k, t in stored.items())
    assert torch.equal(in_peft(family, tmp_path / "again"), expected)


def test_settings_and_roles_are_read(stored):
    handle = from_peft(HOSTS["hf_vit"]().model, stored, name="imported")
    assert (handle.method.rank, handle.method.alpha, handle.method.rslora) == (4, 6.0, False)
    assert handle.name == "imported" and handle.method.sites == ("attn.q", "attn.v")
    assert [s.role for s in handle.sites] == ["attn.q", "attn.v"] * 2


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern is"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is"),
        ({"target_parameters": ["x"]}, "target_parameters is"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"a_feature_of_tomorrow": 1}, "a_feature_of_tomorrow is 1"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', only LORA"),
        ({"r": "4"}, "not numbers"),
        ({"lora_alpha": -1e30}, "alpha is -1e[+]30"),
        ({"r": 5}, r"lora_A.weight is \(4, 32\), this model and r ask for \(5, 32\)"),
        ({"target_modules": ["q_proj"]}, "has .*v_proj.lora_A.weight, not expected"),
        ({"target_modules": ["q_proj", "v_proj", "fc1"]}, "lacks .*fc1.lora_A.weight, expected"),
        ({"target_modules": ["query_key"]}, "name nothing in this model"),
        ({"target_modules": "["}, "the pattern in target_modules is not one"),
        ({"target_modules": None}, "target_modules is None, expected a list"),
        ({"target_modules": ["layernorm"]}, "is a LayerNorm, expected a Linear or a Conv1D"),
        ({"modules_to_save": ["classifier"]}, "lacks .*classifier.bias, expected"),
        ({"modules_to_save": "classifier"}, "modules_to_save is 'classifier', expected a list"),
        ({"layers_to_transform": [0], "layers_pattern": "(a+)+"}, "is not a plain name"),
    ],
)
def test_what_has_no_form_here_is_refused(stored, config, match):
    refused(edit(stored, **config), match)


def test_a_pattern_that_never_ends_is_stopped(stored, monkeypatch):
    monkeypatch.setattr("adaptsuite.peft_bridge.PATTERN_S", 1)
    start = time.perf_counter()
    refused(edit(stored, target_modules="(([a-z_.0-9])+)+!"), "takes over 1 s")
    assert time.perf_counter() - start < 8


Q = "base_model.model.vit.layers.0.attention.q_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.update({Q: t[Q] * float("nan")}), "holds NaN"),
        (lambda t: t.update({Q: t[Q] * 1e30}), "at most 1e[+]06 is expected"),
        (lambda t: t.pop(Q), "lacks .*lora_B.weight, expected"),
        (lambda t: t.update(extra=torch.ones(1)), "has extra, not expected"),
        (lambda t: t.update({Q: t[Q][:8].clone()}), r"is \(8, 4\), this model and r ask for \(32, 4\)"),
    ],
)
def test_a_damaged_payload_is_refused(stored, change, match):
    assert Q in load_file(stored / WEIGHTS)
    refused(edit(stored, change), match)


def test_pickles_and_missing_files_are_refused(stored, tmp_path):
    (stored / WEIGHTS).rename(stored / "adapter_model.bin")
    refused(stored, "adapter_model.bin is a pickle, which is never opened")
    (stored / "adapter_model.bin").unlink()
    refused(stored, f"{WEIGHTS} is missing")
    (stored / CONFIG).unlink()
    refused(stored, f"{CONFIG} is missing: expected a peft folder")


def test_weights_that_peft_never_reaches_are_refused(tmp_path):
    """peft takes out_proj inside nn.MultiheadAttention without a word, and it is dead there."""
    host = HOSTS["nn_encoder"]()
    model = peft.get_peft_model(host.model, peft.LoraConfig(target_modules=["linear1"]))
    model.save_pretrained(tmp_path / "peft")
    path = "encoder.layers.0.self_attn.out_proj"

    def change(tensors):
        tensors.clear()
        for part, shape in (("A", (8, 16)), ("B", (16, 8))):
            tensors[f"base_model.model.{path}.lora_{part}.weight"] = torch.ones(shape)

    refused(edit(tmp_path / "peft", change, target_modules=[path]), "out_proj is never called", "nn_encoder")


def test_a_stored_base_layer_must_be_this_models(tmp_path):
    peft_trained("hf_gpt2", tmp_path / "peft", target_modules=["lm_head"])
    key = "base_model.model.lm_head.base_layer.weight"
    refused(edit(tmp_path / "peft", lambda t: t[key].add_(1e-3)), "lm_head.weight is not this model's", "hf_gpt2")


def test_modules_with_buffers_are_refused(stored):
    model = WithBatchNorm()
    folder = edit(stored, target_modules=["q_proj", "v_proj"], modules_to_save=["head"])
    with pytest.raises(AdapterError, match="head has buffers|head.0 has buffers"):
        from_peft(model.eval(), folder, sample=torch.randn(2, 3, 32, 32))
