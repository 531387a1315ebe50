"""Arithmetic on saved adapters: exact sums of changes, and one clear line for what has none."""

import json

import numpy as np
import pytest
import torch

import adaptsuite
from adaptsuite.artifact import load_adapter, read_adapter
from adaptsuite.cli import main
from adaptsuite.compose import compose
from adaptsuite.errors import AdapterError, UsageError
from adaptsuite.expression import coefficients
from adaptsuite.host import attach, get_handle
from adaptsuite.sums import truncated
from adaptsuite.testing import HOSTS
from adaptsuite.verify import perturb

SITES = ("attn.qkv", "attn.out", "mlp.in")
EXPRESSION, FACTORS = "0.7*a + 0.3*b - c", {"a": 0.7, "b": 0.3, "c": -1.0}


def save(folder, method, seed, family="timm_vit", record=None, noise=1, **settings):
    """A perturbed adapter's folder; the start is drawn from `seed`, the way from it from `noise`."""
    host = HOSTS[family]()
    torch.manual_seed(seed)
    handle = attach(host.model, method, sample=(host.args, host.kwargs), **settings)
    perturb(handle.trained().values(), seed=noise)
    return handle.save(folder, **(record or {}))


def three(tmp_path, method, start=(0, 1, 2), **settings):
    """Adapters a, b, c of different starts."""
    pairs = enumerate(zip("abc", start, strict=True))
    return {n: save(tmp_path / n, method, seed, noise=i, **settings) for i, (n, seed) in pairs}


def deltas(record) -> dict[str, np.ndarray]:
    """The change of every weight, (dim_out, dim) in float64, by plain loops over the stored factors."""
    found = {}
    for site in record.sites:
        up, down = (record.tensors[f"branches.{site.key}.{part}"].double().numpy() for part in ("up", "down"))
        scale = record.method.alpha / (record.method.rank**0.5 if record.method.rslora else record.method.rank)
        found[site.key] = scale * sum(np.outer(up[:, r], down[r]) for r in range(record.method.rank))
    return found


def output(folder, family="timm_vit"):
    """The host's output with this adapter, in float64."""
    host = HOSTS[family]()
    model = host.model
    if folder is not None:
        load_adapter(model, folder, sample=(host.args, host.kwargs))
    with torch.no_grad():
        return host.forward(model)


def off(found, expected) -> float:
    top = sum(float(np.square(found[k] - expected[k]).sum()) for k in expected)
    return (top / sum(float(np.square(v).sum()) for v in expected.values())) ** 0.5


# ---- expressions


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0.7*a + 0.3*b - c", FACTORS),
        ("(a + b) / 2 - c*3", {"a": 0.5, "b": 0.5, "c": -3.0}),
        ("-(a - b + c)", {"a": -1.0, "b": 1.0, "c": -1.0}),
        ("2*(a - .5*(b + c)) + 0", {"a": 2.0, "b": -1.0, "c": -1.0}),
        ("a + b - b + 1e-1*c", {"a": 1.0, "c": 0.1}),
    ],
)
def test_an_expression_is_a_sum_of_factors(text, found):
    assert coefficients(text, "abc") == pytest.approx(found)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0.7*a + * b - c", "column 9"),
        ("a + b - d", "column 9: 'd' is not one of the adapters"),
        ("a * b + c", "column 5: adapters cannot be multiplied"),
        ("c + a / b", "column 9: only numbers but 0 divide"),
        ("a / 0 + b + c", "column 5: only numbers but 0"),
        ("a ** 2 + b + c", "no meaning"),
        ("a + b + c + 1", "a number cannot be added"),
        ("a if b else c", "have a meaning"),
        ("a + b + f(c)", "have a meaning"),
        ("a + 2j*b + c", "have a meaning"),
        ("a + b + c[0]", r"column 10: '\['"),
        ("a + b # - c", "column 7: '#'"),
        ("a + b - c *", "column 12: invalid syntax"),
        ("", "column 1"),
        ("(" * 300 + "a" + ")" * 300, "column"),
        ("1e308*1e308*a + b + c", "too large"),
        ("a - a + 0*(b + c)", "is zero"),
        ("a + b", "'c' is not in the expression"),
        ("a + " * 500 + "a", "at most"),
    ],
)
def test_what_is_no_sum_is_refused_with_its_place(text, said):
    with pytest.raises(UsageError, match=said) as caught:
        coefficients(text, "abc")
    assert "\n" not in str(caught.value)


# ---- low rank


@pytest.mark.parametrize("family", ["timm_vit", "hf_gpt2", "timm_eva"])  # fused rows, Conv1D, weights without a call
def test_the_sum_of_loras_is_the_sum_of_their_weight_changes(family, tmp_path):
    dropout = 0.0 if family == "timm_eva" else 0.1
    folders = {
        "a": save(tmp_path / "a", "lora", 0, family, rank=2, alpha=6.0, sites=SITES),
        "b": save(tmp_path / "b", "lora", 1, family, noise=2, rank=3, rslora=True, sites=SITES),
        "c": save(tmp_path / "c", "lora", 2, family, noise=3, rank=4, dropout=dropout, sites=SITES),
    }
    found = compose(EXPRESSION, folders, tmp_path / "d")
    parts = {n: deltas(read_adapter(f)) for n, f in folders.items()}
    expected = {k: sum(FACTORS[n] * parts[n][k] for n in FACTORS) for k in parts["a"]}
    assert off(deltas(found), expected) < 1e-6 and found.method.rank == 9 and found.method.scale == 1
    host = HOSTS[family]()
    handle = load_adapter(host.model, tmp_path / "d", sample=(host.args, host.kwargs))
    for key, branch in handle.adapter.branches.items():
        np.testing.assert_allclose(branch.delta().detach().numpy(), expected[key], atol=1e-6)
    handle.merge()
    with torch.no_grad():
        torch.testing.assert_close(host.forward(), output(tmp_path / "d", family), atol=1e-4, rtol=1e-4)


def test_negation_negates_the_change_and_not_both_factors(tmp_path):
    """PEM_composition's trap: with A and B negated the change would be the old one."""
    folder = save(tmp_path / "a", "lora", 0, sites=SITES)
    for elementwise in (False, True):
        found = compose("-a", {"a": folder}, elementwise=elementwise)
        old, new = deltas(read_adapter(folder)), deltas(found)
        assert all(np.allclose(new[k], -old[k], atol=1e-7) and np.abs(old[k]).max() > 1e-3 for k in old)


def test_an_adapter_minus_itself_is_refused_and_plus_itself_is_twice_it(tmp_path):
    folder = save(tmp_path / "a", "lora", 0, sites=SITES)
    old, new = deltas(read_adapter(folder)), deltas(compose("a + a", {"a": folder}))
    assert off(new, {k: 2 * v for k, v in old.items()}) < 1e-6
    with pytest.raises(UsageError, match="is zero"):
        compose("a - a", {"a": folder})


@pytest.mark.parametrize("rank", [1, 5, 24])
def test_a_cut_sum_is_the_nearest_of_its_rank_and_states_its_error(rank, tmp_path):
    folders = three(tmp_path, "lora", sites=SITES)
    exact = deltas(compose(EXPRESSION, folders))
    found = compose(EXPRESSION, folders, rank=rank)
    values = {k: np.linalg.svd(v, compute_uv=False) for k, v in exact.items()}
    best = sum(float(np.square(s[rank:]).sum()) for s in values.values()) ** 0.5
    whole = sum(float(np.square(s).sum()) for s in values.values()) ** 0.5
    facts = found.extra["composed"]
    assert facts["relative_error"] == pytest.approx(best / whole, abs=1e-6)
    assert off(deltas(found), exact) == pytest.approx(facts["relative_error"], abs=1e-6)
    worst = max((np.square(s[rank:]).sum() ** 0.5 / np.linalg.norm(s), k) for k, s in values.items())
    assert facts["worst"]["relative_error"] == pytest.approx(worst[0], abs=1e-6)
    assert found.method.rank == rank
    assert rank == 24 or facts["worst"]["site"] == worst[1].replace("/", ".")


def test_a_layer_narrower_than_the_rank_gets_zeros_in_the_rest():
    up, down = torch.randn(3, 8, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)
    a, b = truncated(up, down, 6)
    assert a.shape == (3, 6) and b.shape == (6, 5)
    torch.testing.assert_close(a @ b, up @ down)


def test_factors_apart_are_summed_for_one_start_only(tmp_path):
    one = three(tmp_path / "one", "lora", start=(0, 0, 0), sites=SITES)
    found = compose("0.5*a + 0.5*b - 0.5*c", one, elementwise=True)
    records = {n: read_adapter(f) for n, f in one.items()}
    for key in deltas(found):
        up, down = (
            {n: r.tensors[f"branches.{key}.{part}"].double() for n, r in records.items()} for part in ("up", "down")
        )
        a = sum(down.values()) / 3
        b = 0.5 * up["a"] + 0.5 * up["b"] - 0.5 * up["c"]
        torch.testing.assert_close(found.tensors[f"branches.{key}.down"].double(), a, atol=1e-7, rtol=1e-6)
        torch.testing.assert_close(found.tensors[f"branches.{key}.up"].double(), b, atol=1e-7, rtol=1e-6)
    stated = found.extra["composed"]["relative_error"]
    assert off(deltas(found), deltas(compose("0.5*a + 0.5*b - 0.5*c", one))) == pytest.approx(stated, abs=1e-6)
    with pytest.raises(AdapterError, match="did not start from the same values"):
        compose(EXPRESSION, three(tmp_path / "three", "lora", sites=SITES), elementwise=True)


def test_the_exact_sum_is_what_pefts_linear_combination_is_not(tmp_path):
    """peft multiplies sums of factors: the cross terms make it wrong by as much as the change itself."""
    peft = pytest.importorskip("peft")
    from adaptsuite.peft_bridge import to_peft

    folders = {n: save(tmp_path / n, "lora", i, "hf_vit", noise=i, sites="attn.q") for i, n in enumerate("ab")}
    for name, folder in folders.items():
        to_peft(load_adapter(HOSTS["hf_vit"]().model, folder), tmp_path / f"peft-{name}")
    exact = deltas(compose("0.7*a + 0.3*b", folders))
    model = peft.PeftModel.from_pretrained(HOSTS["hf_vit"]().model, tmp_path / "peft-a", adapter_name="a")
    model.load_adapter(tmp_path / "peft-b", "b")
    wrong = {}
    for kind in ("linear", "cat"):
        model.add_weighted_adapter(["a", "b"], [0.7, 0.3], kind, combination_type=kind)
        layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}
        found = {k: layers[k.replace("/", ".")].get_delta_weight(kind).detach().double().numpy() for k in exact}
        wrong[kind] = off(found, exact)
    assert wrong["linear"] > 0.5 and wrong["cat"] < 1e-6


# ---- the other kinds


def branch_change(handle, key, x):
    branch = handle.adapter.branches[key]
    y = torch.linspace(-1, 1, x.numel()).view_as(x)
    with torch.no_grad():
        return branch(x, y, None) - y


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("bottleneck", {"bottleneck": 3, "scale": 0.5}),
        ("bottleneck", {"bottleneck": 3, "placement": "sequential", "scale": "learned"}),
        ("adapter_plus", {"bottleneck": 2}),
        ("adaptformer", {"bottleneck": 4}),
    ],
)
def test_the_sum_of_bottlenecks_is_one_of_all_their_widths(method, settings, tmp_path):
    folders = three(tmp_path, method, **settings)
    found = compose(EXPRESSION, folders, tmp_path / "d")
    assert found.method.bottleneck == 3 * settings["bottleneck"]
    assert "widths are concatenated" in found.extra["composed"]["how"]
    handles = {n: load_adapter(HOSTS["timm_vit"]().model, f) for n, f in (folders | {"d": tmp_path / "d"}).items()}
    x = torch.randn(2, 5, 32)
    for key in handles["d"].adapter.branches:
        expected = sum(factor * branch_change(handles[n], key, x) for n, factor in FACTORS.items())
        torch.testing.assert_close(branch_change(handles["d"], key, x), expected, atol=1e-5, rtol=1e-5)


def test_bottlenecks_of_one_start_keep_their_width_elementwise(tmp_path):
    folders = three(tmp_path, "bottleneck", start=(0, 0, 0), bottleneck=4)
    found = compose("a - b + c", folders, tmp_path / "d", elementwise=True)
    assert found.method.bottleneck == 4
    records = [read_adapter(folders[n]) for n in "abc"]
    key = f"branches.{found.sites[0].key}"
    up, down = ([r.tensors[f"{key}.{part}.weight"] for r in records] for part in ("up", "down"))
    torch.testing.assert_close(found.tensors[f"{key}.up.weight"], up[0] - up[1] + up[2])
    torch.testing.assert_close(found.tensors[f"{key}.down.weight"], sum(down) / 3)


def test_bottlenecks_that_replace_what_they_see_can_only_be_averaged(tmp_path):
    folders = three(tmp_path, "bottleneck", residual=True)
    with pytest.raises(AdapterError, match="must sum to 1, not 0"):
        compose("a - b + 0*c", folders)
    found = compose("a - b + c", folders, tmp_path / "d")
    handles = {n: load_adapter(HOSTS["timm_vit"]().model, f) for n, f in (folders | {"d": tmp_path / "d"}).items()}
    x, key = torch.randn(2, 5, 32), found.sites[0].key
    expected = sum(f * branch_change(handles[n], key, x) for n, f in {"a": 1, "b": -1, "c": 1}.items())
    torch.testing.assert_close(branch_change(handles["d"], key, x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["film", "bitfit", "ssf"])
@pytest.mark.parametrize("expression", ["0.7*a + 0.3*b - c", "a - b + c", "-0.5*a + 0*(b + c)"])
def test_affine_methods_sum_the_changes_of_the_merged_weights(method, expression, tmp_path):
    folders = three(tmp_path, method)
    plain = HOSTS["timm_vit"]()
    compose(expression, folders, tmp_path / "d", model=plain.model)

    def merged(folder):
        host = HOSTS["timm_vit"]()
        load_adapter(host.model, folder).bake()
        return host.model.state_dict()

    base, factors = plain.model.state_dict(), coefficients(expression, "abc")
    states = {n: merged(f) for n, f in folders.items()}
    for key, found in merged(tmp_path / "d").items():
        expected = base[key] + sum(factor * (states[n][key] - base[key]) for n, factor in factors.items())
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_trained_copies_need_the_backbone_and_it_must_be_the_right_one(tmp_path):
    folders = three(tmp_path, "film")
    with pytest.raises(AdapterError, match="give the model with model="):
        compose(EXPRESSION, folders)
    with pytest.raises(AdapterError, match="the model that was given is another"):
        compose(EXPRESSION, folders, model=HOSTS["timm_eva"]().model)
    compose("a - b + c", folders)  # an average of values needs none


# ---- heads


def labelled(tmp_path, name, seed, labels="vwxyz", **settings):
    record = {"labels": list(labels), "temperature": 2.0, "recipe": {"domain": "none", "method_settings": {"rank": 8}}}
    return save(tmp_path / name, "lora", seed, record=record, noise=seed, head="head", **settings)


def test_heads_of_the_same_labels_are_averaged(tmp_path):
    folders = {n: labelled(tmp_path, n, i) for i, n in enumerate("ab")}
    found = compose("0.25*a + 0.75*b", folders, tmp_path / "d")
    a, b = (read_adapter(f).tensors["tensors.head/weight"] for f in folders.values())
    torch.testing.assert_close(found.tensors["tensors.head/weight"], 0.25 * a + 0.75 * b)
    assert found.labels == list("vwxyz") and found.temperature is None
    composed = read_adapter(tmp_path / "d").extra["composed"]
    assert composed["head"] == "average" and composed["terms"]["b"]["factor"] == 0.75
    assert found.extra["recipe"]["method_settings"]["rank"] == 16


def test_a_head_is_not_negated_but_named(tmp_path):
    folders = {n: labelled(tmp_path, n, i) for i, n in enumerate("ab")}
    with pytest.raises(AdapterError, match=r"weights that sum to 0\.5, not 1: name whose to keep with head="):
        compose("a - 0.5*b", folders)
    found = compose("a - 0.5*b", folders, head="b")
    assert torch.equal(found.tensors["tensors.head/weight"], read_adapter(folders["b"]).tensors["tensors.head/weight"])
    with pytest.raises(UsageError, match="head='e' is not an adapter"):
        compose("a + b", folders, head="e")


def test_heads_of_other_labels_are_refused_unless_one_is_named(tmp_path):
    folders = {"a": labelled(tmp_path, "a", 0), "b": labelled(tmp_path, "b", 1, labels="pqrst")}
    with pytest.raises(AdapterError, match="other labels"):
        compose("(a + b) / 2", folders)
    assert compose("(a + b) / 2", folders, head="b").labels == list("pqrst")


# ---- what cannot be composed


def test_adapters_of_different_kinds_are_refused(tmp_path):
    a = save(tmp_path / "a", "lora", 0, sites=SITES)
    others = {
        "their methods are": save(tmp_path / "m", "bottleneck", 0),
        "their sites differ": save(tmp_path / "s", "lora", 0, sites="attn.out"),
        "different backbones": save(tmp_path / "w", "lora", 0, "timm_vit_reg", sites=SITES),
        "one trains norm": save(tmp_path / "n", "lora", 0, sites=SITES, train_norms=True),
        "in different ways": save(tmp_path / "p", "lora", 0, sites=SITES, record={"preprocessing": {"size": 3}}),
    }
    for said, b in others.items():
        with pytest.raises(AdapterError, match=said) as caught:
            compose("a + b", {"a": a, "b": b}, tmp_path / "d")
        assert "\n" not in str(caught.value) and str(b) in str(caught.value)
    assert not (tmp_path / "d").exists()


def test_a_method_without_a_sum_says_which_have_one(tmp_path):
    folder = save(tmp_path / "a", "vpt", 0)
    with pytest.raises(AdapterError, match="'vpt' cannot be composed.*lora"):
        compose("2*a", {"a": folder})


def test_a_rank_is_refused_where_there_is_none(tmp_path):
    lora, wide = save(tmp_path / "a", "lora", 0), save(tmp_path / "b", "bottleneck", 0)
    for folder, options, said in (
        (lora, {"rank": 9}, "expected 1 to 8"),
        (lora, {"rank": 0}, "expected 1 to 8"),
        (lora, {"rank": 2, "elementwise": True}, "for exact sums"),
        (wide, {"rank": 2}, "nonlinearity between its factors"),
    ):
        with pytest.raises(UsageError, match=said):
            compose("2*a", {"a": folder}, **options)


# ---- as a tool


def test_the_composed_folder_can_be_composed_and_trained_again(tmp_path):
    folders = three(tmp_path, "lora", sites=SITES)
    compose(EXPRESSION, folders, tmp_path / "d", rank=4)
    again = compose("-d", {"d": tmp_path / "d"}, tmp_path / "e")
    assert again.extra["composed"]["terms"]["d"]["composed"]["expression"] == EXPRESSION
    host = HOSTS["timm_vit"]()
    handle = load_adapter(host.model, tmp_path / "e")
    assert adaptsuite.verify(handle, host.args[0]).ok
    assert get_handle(host.model).method.rank == 4


def test_the_command_says_what_it_did_and_fails_in_one_line(tmp_path, capsys):
    folders = three(tmp_path, "lora", sites=SITES)
    pairs = [word for name, folder in folders.items() for word in ("--adapter", f"{name}={folder}")]
    out = ["--out", str(tmp_path / "d")]
    assert main(["compose", EXPRESSION, *pairs, *out, "--rank", "4"]) == 0
    said = capsys.readouterr().out
    assert "rank 4, cut by SVD" in said and "of the norm of the exact change" in said
    assert main(["compose", EXPRESSION, *pairs, *out, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["method"] == "lora" and facts["how"] == "rank 24, exact"
    save(tmp_path / "m", "bottleneck", 0)
    for words, code in (
        (["0.7*a + * b", *pairs], 2),
        (["a + b", *pairs], 2),
        (["a", "--adapter", "a"], 2),
        (["a + m", *pairs[:2], "--adapter", f"m={tmp_path / 'm'}"], 4),
        (["a", "--adapter", f"a={tmp_path / 'nowhere'}"], 4),
    ):
        assert main(["compose", *words, "--out", str(tmp_path / "x")]) == code
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_a_composed_folder_serves_every_command_that_a_trained_one_does(tmp_path, capsys):
    from adaptsuite.vision.synthetic import make_dataset

    table = make_dataset(tmp_path / "data", cultivars=3, shots=3, tests=2, size=48)
    sites = ["--set", "sites=attn.qkv"]
    for name, seed in (("a", 0), ("b", 1)):
        options = ["--data", str(table), "--backbone", "embedded:vision-tiny", "--method", "lora", "--epochs", "1"]
        assert main(["vision", "train", *options, "--set", f"seeds={seed}", *sites, "--out", str(tmp_path / name)]) == 0
    pairs = ["--adapter", f"a={tmp_path / 'a'}", "--adapter", f"b={tmp_path / 'b'}"]  # folders of runs
    assert main(["compose", "(a + b) / 2", *pairs, "--out", str(tmp_path / "mean")]) == 0
    # weights that sum to 1.5: trained norms need the backbone, which is loaded by its name
    assert main(["compose", "a + b/2", *pairs, "--head", "a", "--rank", "6", "--out", str(tmp_path / "sum")]) == 0
    capsys.readouterr()
    for name in ("mean", "sum"):
        assert main(["vision", "evaluate", str(tmp_path / name), "--data", str(table), "--json"]) == 0
        assert "accuracy" in capsys.readouterr().out
        picture = next((tmp_path / "data").rglob("*.png"))
        assert main(["vision", "predict", str(tmp_path / name), str(picture), "--json"]) == 0
        out = ["--format", "peft", "--out", str(tmp_path / "peft" / name)]
        assert main(["vision", "export", str(tmp_path / name), *out]) == 0
        capsys.readouterr()
