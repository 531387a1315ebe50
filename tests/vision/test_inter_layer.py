"""Inter-layer adapters: their equations in plain loops, the published counts, and the traps of grids that change."""

import copy
import math

import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from adaptsuite import attach, budget
from adaptsuite.errors import UsageError
from adaptsuite.grid import Shrink, from_map, to_map
from adaptsuite.host import get_handle
from adaptsuite.method import resolve
from adaptsuite.sites import Site
from adaptsuite.testing import HOSTS
from adaptsuite.verify import contract, verify
from adaptsuite.vision.inter_layer import InterLayerBranch, Residuals

DOWN = {"locations": (0,)}  # tiny hosts have two blocks: no thirds


def vit(depth=3, size=(32, 48), patch=4, **more):
    torch.manual_seed(0)
    shape = dict(patch_size=patch, embed_dim=16, depth=depth, num_heads=2, num_classes=0)
    return VisionTransformer(img_size=size, **shape, **more).eval()


def eva(**more):
    torch.manual_seed(0)
    shape = dict(img_size=(32, 48), patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=0)
    return Eva(**shape, use_rot_pos_emb=True, **more).eval()


def stir(handle, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in handle.trained().values():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return handle


# ---- the equations


def gelu(v):
    return 0.5 * v * (1 + math.erf(v / math.sqrt(2)))


def normed(norm, vector):
    """Batch norm in eval mode, of one token."""
    scale = [w / math.sqrt(v + norm.eps) for w, v in zip(norm.weight, norm.running_var, strict=True)]
    return [(x - m) * s + b for x, m, s, b in zip(vector, norm.running_mean, scale, norm.bias, strict=True)]


def linear(layer, vector):
    return [
        sum(w * x for w, x in zip(row, vector, strict=True)) + b
        for row, b in zip(layer.weight, layer.bias, strict=True)
    ]


@pytest.mark.parametrize(("down", "stride", "padding"), [(True, 1, 0), (True, 2, 1), (False, 1, 1)])
def test_a_module_equals_its_equation_in_loops(down, stride, padding):
    prefix, h, w, dim = 2, 4, 5, 3
    shrink = Shrink(3, stride, padding) if down else None
    method = resolve("vision.ila", bottleneck=2, start="xavier", dropout=0.0)
    branch = InterLayerBranch(dim, prefix, method, shrink).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in branch.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
        for norm in branch.norms:
            norm.running_mean.copy_(torch.randn(2, generator=generator, dtype=torch.float64))
            norm.running_var.copy_(torch.rand(2, generator=generator, dtype=torch.float64) + 0.5)
    y = torch.randn(1, prefix + h * w, dim, generator=generator, dtype=torch.float64)
    context = type("Context", (), {"grid": (h, w), "recomputed": False})
    with torch.no_grad():
        found = branch(y, y, context)[0]
        expected = loops(branch, y[0].tolist(), prefix, h, w, stride, padding, down)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)


def loops(branch, tokens, prefix, h, w, stride, padding, down):
    """SDS and RSDS of one sample, token by token."""
    z = [[gelu(v) for v in normed(branch.norms[0], linear(branch.down, t))] for t in tokens]
    spatial = [linear(branch.mix_prefix, t) for t in z[:prefix]]
    residual = [list(t) for t in tokens[:prefix]]
    at = lambda r, c: prefix + r * w + c  # noqa: E731
    rows, columns = ((n + 2 * padding - 3) // stride + 1 for n in (h, w))
    for row in range(rows):
        for column in range(columns):
            inside = [
                (i, j, row * stride - padding + i, column * stride - padding + j)
                for i in range(3)
                for j in range(3)
                if 0 <= row * stride - padding + i < h and 0 <= column * stride - padding + j < w
            ]
            conv = branch.depthwise
            felt = [
                conv.bias[r] + sum(conv.weight[r, 0, i, j] * z[at(a, b)][r] for i, j, a, b in inside) for r in range(2)
            ]
            spatial.append(linear(branch.mix, [gelu(v) for v in normed(branch.norms[1], felt)]))
            if down:
                kernel = branch.residual.weight
                residual.append(
                    [sum(kernel[d, 0, i, j] * tokens[at(a, b)][d] for i, j, a, b in inside) for d in range(3)]
                )
            else:
                residual.append(tokens[at(row, column)])
    s = [linear(branch.up, [gelu(v) for v in normed(branch.norms[2], t)]) for t in spatial]
    return [[float(a + b) for a, b in zip(t, u, strict=True)] for t, u in zip(residual, s, strict=True)]


def test_a_modules_gradient_is_right():
    branch = InterLayerBranch(3, 1, resolve("vision.ila", bottleneck=2, norm="layer", dropout=0.0), Shrink()).double()
    nn.init.normal_(branch.up.weight)
    y = torch.randn(2, 1 + 3 * 4, 3, dtype=torch.float64, requires_grad=True)
    context = type("Context", (), {"grid": (3, 4), "recomputed": False})
    assert torch.autograd.gradcheck(lambda t: branch(t, t, context), (y,))


def test_tokens_go_to_a_map_and_back_unchanged():
    tokens = torch.randn(2, 3 + 4 * 5, 7)
    front, grid = to_map(tokens, 3, (4, 5))
    assert grid.shape == (2, 7, 4, 5) and torch.equal(grid[:, :, 2, 3], tokens[:, 3 + 2 * 5 + 3])
    assert torch.equal(from_map(front, grid, tokens), tokens)
    kept = torch.randn(2, 4, 5, 7)
    assert torch.equal(from_map(*to_map(kept, 0, None), kept), kept)


# ---- counts and costs of the paper


@pytest.fixture(scope="module")
def base():
    with torch.device("meta"):
        return {s: timm.create_model("vit_base_patch16_224", num_classes=0, img_size=s) for s in (224, 448)}


@pytest.mark.parametrize(
    ("method", "size", "trained", "gmac"),
    [
        (None, 224, 0, 17.563),
        ("vision.ila", 224, 40496, 13.093),
        ("vision.ila_plus", 224, 173856, 13.111),
        ("vision.ila_plus_plus", 224, 354032, 13.137),
        (None, 448, 0, 78.494),
        ("vision.ila", 448, 40496, 66.863),
        pytest.param("vision.ila_plus", 448, 173856, 66.946, marks=pytest.mark.slow),
        pytest.param("vision.ila_plus_plus", 448, 354032, 67.063, marks=pytest.mark.slow),
    ],
)
def test_counts_and_macs_of_the_paper_on_vit_base(base, method, size, trained, gmac):
    found = budget(base[size], method, torch.empty(1, 3, size, size, device="meta"))
    assert round(found.macs_per_item / 1e9, 3) == gmac
    assert method is None or found.params["trained"] == trained


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "less_224", "less_448"),
    [
        ({"kernel": 5}, 0.44, 0.27),
        ({"locations": (7,), "stride": 2, "padding": 1}, 0.25, 0.26),
        ({"stride": 2, "padding": 1}, 0.55, 0.57),
    ],
)
def test_other_schedules_cost_what_was_measured(base, settings, less_224, less_448):
    for size, less, plain in ((224, less_224, 17.563), (448, less_448, 78.494)):
        found = budget(base[size], "vision.ila", torch.empty(1, 3, size, size, device="meta"), **settings)
        assert round(1 - found.macs_per_item / 1e9 / plain, 2) == less


def test_module_counts_follow_the_closed_formula():
    for dim, r, k, prefix in ((768, 8, 3, 1), (32, 4, 5, 0), (48, 8, 3, 5)):
        for down in (True, False):
            method = resolve("vision.ila", bottleneck=r, kernel=k)
            branch = InterLayerBranch(dim, prefix, method, Shrink(k) if down else None)
            own = dim * r + r + 3 * 2 * r + r * k * k + r + r * r + r + (r * r + r) * (prefix > 0) + r * dim + dim
            assert sum(p.numel() for p in branch.parameters()) == own + dim * k * k * down


def test_the_cls_token_trains_on_request_and_is_counted():
    model = vit()
    counts = [attach(copy.deepcopy(model), "vision.ila", train_cls=t).parameters_count()["trained"] for t in (0, 1)]
    assert counts[1] - counts[0] == 16
    handle = stir(attach(model, "vision.ila", train_cls=True))
    assert "tensors.cls_token" in handle.trained() and verify(handle).ok


@pytest.mark.parametrize(("depth", "places"), [(3, (0, 1)), (6, (1, 3)), (12, (3, 7)), (24, (7, 15))])
def test_locations_are_the_ends_of_the_first_two_thirds(depth, places):
    assert resolve("vision.ila").places(depth) == places


# ---- the contract on every kind of grid

FAMILIES = ("timm_vit", "timm_vit_reg", "timm_siglip", "timm_eva", "timm_eva_split", "hf_vit")
SETTINGS = [
    ("vision.ila", DOWN),
    ("vision.ila", {**DOWN, "norm": "layer", "residual": "avg_pool", "stride": 2, "padding": 1}),
    ("vision.ila_plus", {**DOWN, "norm": "group"}),
    ("vision.ila_plus", {"locations": ()}),
    ("vision.ila_plus_plus", {**DOWN, "start": "xavier", "residual": "near_ones"}),
]


def cases():
    quick = {("timm_vit_reg", 0), ("timm_siglip", 0), ("timm_eva", 0), ("timm_siglip", 2), ("timm_eva", 4)}
    for family in FAMILIES:
        for number, (method, settings) in enumerate(SETTINGS):
            marks = () if (family, number) in quick else pytest.mark.slow
            yield pytest.param(family, method, settings, marks=marks, id=f"{family}-{method}-{number}")


@pytest.mark.parametrize(("family", "method", "settings"), list(cases()))
def test_inter_layer_adapters_keep_their_promises(family, method, settings):
    contract(HOSTS[family], method, **settings)


@pytest.mark.parametrize("family", ["timm_swin", pytest.param("timm_swinv2", marks=pytest.mark.slow)])
def test_swin_takes_modules_that_keep_the_grid_and_refuses_those_that_join_tokens(family):
    contract(HOSTS[family], "vision.ila_plus", locations=())
    with pytest.raises(UsageError, match="tied to its grid.*keep the grid"):
        attach(HOSTS[family]().model, "vision.ila", **DOWN)


def test_beit_refuses_that_tokens_are_joined_and_stays_as_it_was():
    host = HOSTS["timm_beit"]()
    before = host.forward()
    with pytest.raises(UsageError, match="tied to its grid by relative_position_bias_table"):
        attach(host.model, "vision.ila", **DOWN)
    assert torch.equal(host.forward(), before) and not hasattr(host.model, "adapter_bank")


def test_hiera_is_refused_in_one_line():
    model = timm.create_model("hiera_tiny_224", num_classes=0)
    with pytest.raises(LookupError, match="HieraBlock.*networks of such blocks are not covered"):
        attach(model, "vision.ila")


def test_volumes_and_texts_are_refused_with_what_is_missing():
    for family, reason in (("monai_vit", "grid of 2 x 2 x 2"), ("hf_bert", "with no grid")):
        host = HOSTS[family]()
        with pytest.raises(UsageError, match=reason):
            attach(host.model, "vision.ila", sample=(host.args, host.kwargs), **DOWN)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"kernel": 4}, "odd number"),
        ({"padding": 2}, "padding from 0 to half"),
        ({"stride": 0}, "stride from 1"),
        ({"norm": "instance"}, "batch, layer or group"),
        ({"residual": "sum"}, "mean, ones, near_ones or avg_pool"),
        ({"bottleneck": 0}, "at least 1"),
        ({"dropout": 1.0}, r"in \[0, 1\)"),
        ({"sites": ("attn",)}, "leave sites at block"),
        ({"locaitons": (3,)}, "did you mean locations"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, reason):
    with pytest.raises(UsageError, match=reason):
        resolve("vision.ila", **settings)


def test_places_that_are_not_there_and_grids_that_are_too_small_are_refused():
    with pytest.raises(UsageError, match="location 2: behind which of the blocks 0 to 1"):
        attach(vit(), "vision.ila", locations=(2,))
    with pytest.raises(UsageError, match="2 blocks have no ends of thirds"):
        attach(vit(depth=2), "vision.ila")
    with pytest.raises(UsageError, match="a grid of 2 x 6 tokens is too small for a kernel of 3"):
        attach(vit(size=(16, 32)), "vision.ila")  # 4 x 8, then 2 x 6
    with pytest.raises(LookupError, match="'cls' is not in"):
        attach(HOSTS["timm_siglip"]().model, "vision.ila", train_cls=True, **DOWN)


# ---- grids


def shapes(model, image):
    """The token shape behind every block."""
    found, hooks = [], []
    for block in model.blocks:
        hooks.append(block.register_forward_hook(lambda m, a, y: found.append(tuple(y.shape[1:]))))
    with torch.no_grad():
        model(image)
    for hook in hooks:
        hook.remove()
    return found


def test_a_grid_that_is_not_square_keeps_its_sides():
    model = vit()  # 8 x 12
    stir(attach(model, "vision.ila"))
    assert [n for n, _ in shapes(model, torch.randn(1, 3, 32, 48))] == [1 + 6 * 10, 1 + 4 * 8, 1 + 4 * 8]


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_any_number_of_prefix_tokens_passes_by_the_grid(prefix):
    more = {"class_token": False, "global_pool": "avg"} if not prefix else {"reg_tokens": prefix - 1}
    model = vit(**more)
    handle = stir(attach(model, "vision.ila"))
    assert [n for n, _ in shapes(model, torch.randn(1, 3, 32, 48))] == [prefix + 60, prefix + 32, prefix + 32]
    branch = handle.adapter.branches["blocks/0"]
    assert (branch.mix_prefix is None) == (prefix == 0) and branch.prefix == prefix
    assert verify(handle).ok


def test_constant_tokens_stay_constant_behind_a_kernel_of_means_and_cls_is_never_joined():
    branch = InterLayerBranch(4, 1, resolve("vision.ila"), Shrink()).eval()
    tokens = torch.full((1, 1 + 5 * 6, 4), 3.0)
    tokens[:, 0] = 7.0
    context = type("Context", (), {"grid": (5, 6), "recomputed": False})
    out = branch(tokens, tokens, context)
    torch.testing.assert_close(out[:, 1:], torch.full((1, 3 * 4, 4), 3.0))
    assert torch.equal(out[:, 0], tokens[:, 0])


def test_images_of_two_sizes_in_one_backward_keep_their_own_grids():
    model = vit(dynamic_img_size=True, depth=4)
    handle = stir(attach(model, "vision.ila", norm="layer"))
    images = [torch.randn(2, 3, 32, 48), torch.randn(2, 3, 48, 32)]  # as many tokens, other sides

    def gradient(checkpoints):
        model.set_grad_checkpointing(checkpoints)
        for p in handle.trained().values():
            p.grad = None
        sum((model(image) * (i + 1)).sum() for i, image in enumerate(images)).backward()
        return {k: p.grad.clone() for k, p in handle.trained().items() if p.grad is not None}

    model.train()
    for branch in handle.adapter.branches.values():
        branch.dropout = 0.0
    plain, again = gradient(False), gradient(True)
    assert plain.keys() == again.keys()
    for k in plain:
        torch.testing.assert_close(again[k], plain[k], rtol=1e-4, atol=1e-6)


def test_another_image_size_is_seen_without_attaching_anew():
    model = vit(dynamic_img_size=True, depth=4)
    stir(attach(model, "vision.ila"))
    for size, tokens in (((32, 48), 1 + 4 * 8), ((64, 64), 1 + 12 * 12), ((40, 28), 1 + 6 * 3)):
        assert shapes(model, torch.randn(1, 3, *size))[-1][0] == tokens


# ---- rotary positions


@pytest.mark.parametrize("kind", ["cat", "dinov3", "mixed"])
@pytest.mark.parametrize("settings", [{}, {"stride": 2, "padding": 1}])
def test_rotary_tables_follow_the_middles_of_the_new_tokens(kind, settings):
    model = eva(rope_type=kind, num_reg_tokens=2)
    handle = stir(attach(model, "vision.ila", **settings))
    tables = []
    for block in model.blocks:
        hook = lambda m, a, kw: tables.append(kw["rope"])  # noqa: E731
        block.attn.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 48))
    full = tables[0]
    assert full.shape[-2] == 8 * 12
    shrink, rows, columns = handle.method.shrink, list(range(8)), list(range(12))
    for number in (1, 2):
        rows = [rows[i] for i in shrink.middles(len(rows))]
        columns = [columns[i] for i in shrink.middles(len(columns))]
        place = [r * 12 + c for r in rows for c in columns]
        expected = full if kind != "mixed" else model.rope.get_embed()[number]
        assert torch.equal(tables[number], expected[..., place, :])
    assert verify(handle).ok


def test_the_middle_of_a_padded_stride_lies_on_the_old_token():
    assert list(Shrink(3, 1, 0).middles(6)) == [1, 2, 3, 4]
    assert list(Shrink(3, 2, 1).middles(7)) == [0, 2, 4, 6]
    assert list(Shrink(5, 1, 0).middles(5)) == [2]


def test_rotary_tables_of_transformers_are_cut_too():
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    shape = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
    config = DINOv3ViTConfig(**shape, image_size=48, patch_size=4, num_register_tokens=2)
    torch.manual_seed(0)
    model = DINOv3ViTModel(config).eval()
    handle = stir(attach(model, "vision.ila"))
    with torch.no_grad():
        out = model(pixel_values=torch.randn(1, 3, 48, 48)).last_hidden_state
    assert out.shape[1] == 3 + 8 * 8 and verify(handle).ok


# ---- checkpointing, compiling, copies


# reentrant checkpoints take no keywords, by which Eva gives its rotary table
@pytest.mark.parametrize(("build", "reentrant"), [(vit, True), (vit, False), (eva, False)])
@pytest.mark.parametrize("norm", ["batch", "layer", "group"])
def test_checkpointing_equals_no_checkpointing_down_to_running_statistics(build, norm, reentrant, monkeypatch):
    import timm.models._manipulate as manipulate

    monkeypatch.setattr(manipulate, "use_reentrant_ckpt", lambda: reentrant, raising=False)
    image, results = torch.randn(4, 3, 32, 48), []
    for checkpoints in (False, True):
        model = build()
        handle = stir(attach(model, "vision.ila_plus", norm=norm, dropout=0.0))
        model.set_grad_checkpointing(checkpoints)
        model.train()
        calls = []
        model.blocks[1].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        out = model(image)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        assert len(calls) == 1 + checkpoints, "nothing was recomputed"
        gradients = {k: p.grad for k, p in handle.trained().items()}
        buffers = {k: b.clone() for k, b in handle.adapter.named_buffers()}
        results.append((gradients, buffers))
    for plain, again in zip(*results, strict=True):
        assert plain.keys() == again.keys()
        for k, v in plain.items():
            torch.testing.assert_close(again[k], v, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("build", [vit, pytest.param(eva, marks=pytest.mark.slow)])
def test_an_adapted_model_compiles_as_one_graph(build):
    model, image = build(), torch.randn(2, 3, 32, 48)
    stir(attach(model, "vision.ila_plus"))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(image), model(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("build", [vit, pytest.param(eva, marks=pytest.mark.slow)])
def test_an_adapted_model_exports_with_a_free_batch(build):
    model, image = build(), torch.randn(2, 3, 32, 48)
    stir(attach(model, "vision.ila"))
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(model, (image,), dynamic_shapes=({0: batch},), strict=False)
        other = torch.randn(3, 3, 32, 48)
        torch.testing.assert_close(program.module()(other), model(other), rtol=1e-5, atol=1e-5)


def test_a_copy_has_a_grid_of_its_own():
    model = vit(dynamic_img_size=True)
    stir(attach(model, "vision.ila"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 48))
        twin(torch.randn(1, 3, 48, 48))
    assert get_handle(model).bank.final_grid("") == (4, 8) and get_handle(twin).bank.final_grid("") == (8, 8)


def test_two_adapters_on_one_host_see_each_others_grids():
    """A module that keeps the grid, of a second adapter, stands behind the one that joins tokens."""
    model = vit(depth=4)
    first = attach(model, "vision.ila", "first", locations=(0,))
    second = stir(attach(model, "vision.ila_plus", "second", locations=()))
    first.activate("first", "second")
    assert [n for n, _ in shapes(model, torch.randn(1, 3, 32, 48))] == [1 + 6 * 10] * 4
    assert [second.bank.grid_at(site, "second") for site in second.sites] == [(6, 10)] * 4
    first.activate("second", "first")  # now it stands in front of it, behind the same block
    shapes(model, torch.randn(1, 3, 32, 48))
    assert [second.bank.grid_at(site, "second") for site in second.sites] == [(8, 12)] + [(6, 10)] * 3


# ---- bugs of the reference, each held by a test


def test_reference_bug_near_ones_multiplies_constant_tokens_by_nine_and_means_do_not():
    constant, noise = torch.ones(1, 8, 14, 14), torch.randn(1, 512, 14, 14, generator=torch.Generator().manual_seed(0))
    gain = {}
    for start in ("near_ones", "ones", "mean", "avg_pool"):
        torch.manual_seed(0)
        join = Residuals(8, Shrink(), start)
        wide = Residuals(512, Shrink(), start)
        with torch.no_grad():
            gain[start] = (float(join(constant).mean()), float(wide(noise).std() / noise.std()))
    assert gain["near_ones"][0] == pytest.approx(9, abs=0.05) and gain["near_ones"][1] == pytest.approx(3, abs=0.05)
    assert gain["ones"] == pytest.approx((9, 3), abs=0.05)
    assert gain["mean"] == pytest.approx((1, 1 / 3), abs=0.05)
    assert gain["avg_pool"] == pytest.approx(gain["mean"], abs=1e-6)


def test_reference_bug_without_down_sampling_the_residual_stays():
    """There, padding off and down-sampling off returns the branch alone."""
    model = vit()
    before = model(torch.ones(1, 3, 32, 48))
    attach(model, "vision.ila_plus", locations=())
    assert torch.equal(model(torch.ones(1, 3, 32, 48)), before)


def test_reference_bug_cls_is_not_guessed_from_a_square_number_of_tokens():
    """There, 4 registers and 5 x 9 patches (49 = 7 x 7 tokens) would be taken for a grid without CLS."""
    model = vit(size=(20, 36), reg_tokens=3)
    assert model.pos_embed.shape[1] == 49
    handle = stir(attach(model, "vision.ila", locations=(0,)))
    assert shapes(model, torch.randn(1, 3, 20, 36))[0][0] == 4 + 3 * 7
    assert verify(handle).ok


def test_reference_bug_dropout_of_frozen_blocks_is_off_in_training():
    model = vit(proj_drop_rate=0.5, pos_drop_rate=0.5)
    handle = attach(model, "vision.ila", dropout=0.0, norm="layer")
    image = torch.randn(2, 3, 32, 48)
    assert torch.equal(model.eval()(image), model.train()(image))
    handle.detach()
    assert not torch.equal(model.train()(image), model.train()(image))


def test_reference_bug_a_stay_module_behind_the_last_block_says_what_a_cls_head_does_not_use():
    """13,336 values are counted for it in the paper; 168 of them only move patches that a CLS head never reads."""
    handle = attach(vit(), "vision.ila_plus")
    found = {
        r["name"].rpartition("blocks/2.")[2]: r for r in verify(handle, fresh=True).rows if "blocks/2." in r["name"]
    }
    unused = {name for name, row in found.items() if row["state"].startswith("exempt")}
    assert unused == {f"{n}.{k}" for n in ("depthwise", "norms.1", "mix") for k in ("weight", "bias")}
    assert all(row["state"] == "alive" for name, row in found.items() if name not in unused)


def test_a_module_of_another_role_gets_no_branch():
    site = Site("block", "blocks.1", 1, 8, 8, depth=3, prefix_tokens=1)
    assert resolve("vision.ila", locations=(0,)).build(site) is None
    assert resolve("vision.ila_plus", locations=(0,)).build(site).shrink is None
