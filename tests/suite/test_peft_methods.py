"""peft's tuners as methods: what peft computes, the core's promises, and nothing that peft would pass over."""

import copy
import pickle

import pytest
import torch

from adaptsuite.artifact import load_adapter, read_adapter
from adaptsuite.errors import UsageError
from adaptsuite.host import attach, get_handle
from adaptsuite.method import method_class, methods, resolve
from adaptsuite.peft_bridge import to_peft
from adaptsuite.testing import HOSTS
from adaptsuite.verify import contract, perturb, verify

peft = pytest.importorskip("peft")

from adaptsuite.peft_methods import OTHER_START, REFUSED, tuner, tuners  # noqa: E402

SMALL = {"MISS": {"r": 4}, "FOURIERFT": {"n_frequency": 20, "scaling": 1.0}, "ROAD": {"group_size": 8}}


def attached(kind, family="timm_vit", **settings):
    host = HOSTS[family]()
    torch.manual_seed(0)
    method = f"peft:{kind}"
    return host, attach(host.model, method, sample=(host.args, host.kwargs), **(SMALL.get(kind, {}) | settings))


def output(host, model=None):
    with torch.no_grad():
        return host.forward(model).clone()


# ---- what peft computes


@pytest.mark.filterwarnings("error:.*(missing|unexpected|unused).*adapter")
@pytest.mark.parametrize("kind", ["LORA", "LOKR", "LOHA", "VERA", "IA3", "OFT", "HRA", "DELORA", "LILY", "LN_TUNING"])
def test_peft_gives_the_same_output_with_a_folder_of_its_own_kind(kind, tmp_path):
    """IA3 scales what the closing layer of an MLP reads, and what others write; VERA has factors of the whole model."""
    settings = {"oft_block_size": 4} if kind == "OFT" else {}
    sites = ("norm",) if kind == "LN_TUNING" else ("attn.qkv", "mlp.out")
    host, handle = attached(kind, sites=sites, head="head", **settings)
    perturb(handle.trained().values(), 1)
    twin = peft.PeftModel.from_pretrained(HOSTS["timm_vit"]().model, to_peft(handle, tmp_path / "peft")).eval()
    ours = output(host)
    torch.testing.assert_close(output(host, twin.base_model.model), ours, atol=1e-6, rtol=1e-6)
    assert (ours - output(HOSTS["timm_vit"]())).abs().max() > 1e-3
    config = peft.PeftConfig.from_pretrained(tmp_path / "peft")
    assert config.peft_type == kind and config.modules_to_save == ["head"]


def test_a_tuner_on_conv1d_layers_is_written_as_peft_reads_it(tmp_path):
    host, handle = attached("LOHA", "hf_gpt2", sites=("mlp.in",))
    with pytest.raises(UsageError, match="no form for its Conv1D"):
        to_peft(handle, tmp_path / "peft")
    host, handle = attached("VERA", "hf_gpt2", sites=("attn.qkv",))
    perturb(handle.trained().values(), 1)
    twin = peft.PeftModel.from_pretrained(HOSTS["hf_gpt2"]().model, to_peft(handle, tmp_path / "peft")).eval()
    torch.testing.assert_close(output(host, twin.base_model.model), output(host), atol=1e-6, rtol=1e-6)


def test_parts_of_a_fused_weight_cannot_be_written_and_say_so(tmp_path):
    _, handle = attached("LOKR")
    with pytest.raises(UsageError, match="part of a fused weight"):
        to_peft(handle, tmp_path / "peft")


def test_lokr_on_a_fused_weight_is_its_kronecker_product_on_those_rows_alone():
    host, handle = attached("LOKR", sites=("attn.v",))
    perturb(handle.trained().values(), 1)
    key, branch = next(iter(handle.adapter.branches.items()))
    layer = handle.adapter.shared.layer(key)
    w1, w2 = layer.lokr_w1["default"].double(), layer.lokr_w2["default"].double()
    expected = torch.zeros(32, 32, dtype=torch.float64)
    for i in range(w1.shape[0]):
        for j in range(w1.shape[1]):
            rows, columns = slice(i * w2.shape[0], (i + 1) * w2.shape[0]), slice(j * w2.shape[1], (j + 1) * w2.shape[1])
            expected[rows, columns] = w1[i, j] * w2
    scale = layer.scaling["default"]
    torch.testing.assert_close(branch.delta().double(), scale * expected, atol=1e-6, rtol=1e-5)
    before = {k: v.clone() for k, v in host.model.state_dict().items()}
    handle.merge()
    weight = host.model.blocks[0].attn.qkv.weight
    assert torch.equal(weight[:64], before["blocks.0.attn.qkv.weight"][:64])
    change = weight[64:] - before["blocks.0.attn.qkv.weight"][64:]
    torch.testing.assert_close(change.double(), scale * expected, atol=1e-6, rtol=1e-5)


# ---- the core's promises


@pytest.mark.parametrize(
    ("kind", "family"),
    [("LOKR", "timm_vit"), ("IA3", "hf_ast"), ("VERA", "open_clip"), ("ROAD", "hf_gpt2"), ("FOURIERFT", "timm_eva")],
)
def test_a_tuner_keeps_the_contract(kind, family):
    """Weights without a call (open_clip, EVA) and Conv1D (GPT-2), where peft itself cannot act, among the hosts."""
    settings = {"sites": ("attn.qkv",)} if family in ("hf_gpt2", "timm_eva") else {}
    found = contract(HOSTS[family], f"peft:{kind}", **SMALL.get(kind, {}), **settings)
    assert (found["starts_equal"] == "not promised") == (kind in OTHER_START)
    assert ("shadow_sites" in found) == (family in ("open_clip", "timm_eva"))


@pytest.mark.parametrize("kind", ["LILY", "LN_TUNING"])
def test_what_no_weight_can_hold_is_not_merged(kind):
    found = contract(HOSTS["timm_vit"], f"peft:{kind}")
    assert found["merges"] == "refused with its reason"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [name.removeprefix("peft:") for name in tuners()])
def test_every_tuner_is_alive_saved_merged_and_starts_where_it_says(kind, tmp_path):
    small = {"ADAMSS": {"r": 8, "num_subspaces": 2}, "C3A": {"block_size": 8}, "GRALORA": {"r": 4}}
    small |= {"PSOFT": {"r": 4, "psoft_alpha": 4}, "OFT": {"oft_block_size": 4}}
    small |= {"FROD": {"sparse_rate": 0.1}, "SUPERTUNING": {"sparsity": 0.9}, "RANDLORA": {"r": 4}}
    small |= {"VBLORA": {"num_vectors": 8, "vector_length": 8}, "WAVEFT": {"n_frequency": 20}, "SHIRA": {"r": 2}}
    host, handle = attached(kind, **small.get(kind, {}))
    found = verify(handle, host.forward, fresh=True)
    assert found.ok, found.problems
    assert (found.identity <= 1e-6) or kind in OTHER_START
    assert (found.merged is None) == (handle.method.mergeable is not True)
    perturb(handle.trained().values(), 1)
    again = load_adapter(HOSTS["timm_vit"]().model, handle.save(tmp_path / "a"))
    assert torch.equal(output(host, again.model), output(host))


def test_stacked_tuners_add_up():
    """What peft's layer takes for the output of its weight is what the host made of it, other adapters included."""
    host, handle = attached("LOKR", sites=("attn.out",))
    other = attach(host.model, "lora", name="other", sites=("attn.out",))
    for h in (handle, other):
        perturb(h.trained().values(), 1)
    host.model.train(False)
    changes = []
    for names in (("default",), ("other",), ("default", "other")):
        handle.activate(*names)
        seen = []
        hook = host.model.blocks[0].attn.proj.register_forward_hook(lambda m, a, y, s=seen: s.append(y.detach()))
        host.forward()
        hook.remove()
        changes.append(seen[0])
    with handle.disabled():
        plain = host.model.blocks[0].attn.proj
        seen = []
        hook = plain.register_forward_hook(lambda m, a, y: seen.append(y.detach()))
        host.forward()
        hook.remove()
    torch.testing.assert_close(changes[2] - seen[0], changes[0] + changes[1] - 2 * seen[0], atol=1e-5, rtol=1e-4)


def test_a_copy_of_the_host_reads_its_own_weights():
    host, handle = attached("OFT", oft_block_size=4)
    perturb(handle.trained().values(), 1)
    twin = copy.deepcopy(host.model)
    before = output(host)
    with torch.no_grad():
        twin.blocks[0].attn.qkv.weight.mul_(2)
    assert torch.equal(output(host), before) and not torch.equal(output(host, twin), before)
    given = get_handle(twin).adapter.branches["blocks/0/attn/qkv:q"].given
    assert torch.equal(given.weight, twin.blocks[0].attn.qkv.weight[:32])


def test_the_method_is_read_back_from_its_folder(tmp_path):
    _, handle = attached("SHIRA", r=2, random_seed=5)
    method = read_adapter(handle.save(tmp_path / "a")).method
    assert method == handle.method and method.name == "peft:SHIRA" and method.random_seed == 5
    assert pickle.loads(pickle.dumps(method)) == method
    assert not any(name.startswith("peft:") for name in methods())


# ---- what peft would accept without a word


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("LOKR", {"rank": 4}, "no setting 'rank'"),
        ("LOKR", {"alhpa": 4}, "did you mean alpha"),
        ("LORA", {"target_modules": ("q",)}, "no setting 'target_modules'"),
        ("LORA", {"lora_alpha": -(10**30)}, "within 1e"),
        ("LORA", {"lora_alpha": float("nan")}, "lora_alpha"),
        ("LORA", {"r": 0}, "peft refuses"),
        ("LORA", {"r": "many"}, "r='many'"),
        ("LORA", {"use_dora": 3}, "use_dora"),
        ("LORA", {"init_lora_weights": "pissa"}, "changes the backbone's own weights|peft refuses"),
        ("SHIRA", {"random_seed": None}, "does not store what it draws"),
        ("MISS", {"r": 5, "sites": ("mlp",)}, "needs weights"),
        ("LN_TUNING", {"sites": ("attn.q",)}, "needs norms"),
    ],
)
def test_settings_that_cannot_be_are_refused(kind, settings, said):
    host = HOSTS["timm_vit"]()
    before = {k: v.clone() for k, v in host.model.state_dict().items()}
    with pytest.raises(UsageError, match=said) as caught:
        attach(host.model, f"peft:{kind}", **(SMALL.get(kind, {}) | settings))
    assert "\n" not in str(caught.value)
    after = host.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[k], v) for k, v in before.items())


def test_tuners_that_cannot_live_at_a_site_say_why():
    for kind, reason in REFUSED.items():
        with pytest.raises(UsageError, match="cannot be hosted") as caught:
            method_class(f"peft:{kind}")
        assert reason in str(caught.value)
    with pytest.raises(UsageError, match="did you mean peft:LOKR"):
        resolve("peft:LOKRR")


def test_every_type_of_peft_is_a_method_or_has_a_reason():
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    kinds = {kind.value for kind in PEFT_TYPE_TO_TUNER_MAPPING}
    assert {name.removeprefix("peft:") for name in tuners()} == kinds - REFUSED.keys()
    assert all(tuner(name).name == name for name in tuners())
