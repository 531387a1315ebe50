"""Adapter folders: what is saved comes back exactly, and what is damaged or does not fit is refused in one line."""

import hashlib
import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from adaptsuite.artifact import RECORD, TENSORS, Source, base_fingerprint, fingerprint, load_adapter, read_adapter
from adaptsuite.errors import AdapterError, UsageError
from adaptsuite.host import attach
from adaptsuite.identity import json_hash
from adaptsuite.method import method_class, methods
from adaptsuite.testing import HOSTS
from adaptsuite.verify import _perturb

LABELS = list("abcde")
HEADS = {"timm_vit": "head", "hf_ast": "classifier", "hf_roberta": "classifier"}


def vit(seed: int = 0, **changes) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    shape = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    return VisionTransformer(**shape | changes).eval()


IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def run(model: nn.Module, image: torch.Tensor = IMAGE) -> torch.Tensor:
    with torch.no_grad():
        return model(image)


def keys(model: nn.Module) -> tuple:
    """Everything that a failed load could have changed."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    flags = [(n, p.requires_grad) for n, p in model.named_parameters()]
    return state, (hooks, flags, [m.training for m in model.modules()], sorted(model.__dict__))


def same(a: tuple, b: tuple) -> bool:
    return a[1] == b[1] and a[0].keys() == b[0].keys() and all(torch.equal(v, b[0][k]) for k, v in a[0].items())


@pytest.fixture
def saved(tmp_path) -> Path:
    """A LoRA adapter with a head and labels, on vit(seed=0)."""
    handle = attach(vit(), "lora", rank=4, head="head", train_norms=True)
    _perturb(handle, seed=1)
    return handle.save(tmp_path / "adapter", labels=LABELS, threshold=0.5, temperature=1.5)


def forge(folder: Path, change=None, tensors=None, payload: bytes | None = None) -> Path:
    """Edits a stored adapter and puts the hashes right again, so that the check behind them is the one that acts."""
    facts = json.loads((folder / RECORD).read_text())
    if tensors is not None:
        stored = load_file(folder / TENSORS)
        tensors(stored)
        save_file(stored, folder / TENSORS)
    if payload is not None:
        (folder / TENSORS).write_bytes(payload)
    raw = (folder / TENSORS).read_bytes()
    facts["payload"] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    if change is not None:
        change(facts)
    facts["sha256"] = json_hash({k: v for k, v in facts.items() if k != "sha256"})
    (folder / RECORD).write_text(json.dumps(facts))
    return folder


def refused(folder: Path, match: str, model: nn.Module | None = None, **options) -> str:
    """The message of the AdapterError that loading gives; the model is as it was."""
    model = vit() if model is None else model
    before = keys(model)
    with pytest.raises(AdapterError, match=match) as caught:
        load_adapter(model, folder, **options)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value) and folder.name in str(caught.value)
    assert same(before, keys(model)), "a failed load changed the model"
    return str(caught.value)


# ---- what is saved comes back


ON_A_GRID = {"convpass": {}} | {f"vision.ila{plus}": {"locations": (0,)} for plus in ("", "_plus", "_plus_plus")}


def pairs():
    # what needs another modality's features, or two towers, is in tests/vl
    for method in (m for m in methods() if not method_class(m).needs_features and m != "vl.rpo"):
        yield from ((family, method) for family in HEADS if method not in ON_A_GRID or family == "timm_vit")


@pytest.mark.parametrize(("family", "method"), list(pairs()))
def test_a_loaded_adapter_gives_the_saved_output_bit_for_bit(family, method, tmp_path):
    host, twin = HOSTS[family](), HOSTS[family]()
    more = {"sample": (host.args, host.kwargs), "train_norms": True, **ON_A_GRID.get(method, {})}
    handle = attach(host.model, method, head=HEADS[family], **more)
    _perturb(handle, seed=1)
    folder = handle.save(tmp_path / "adapter")
    other = load_adapter(twin.model, folder, sample=(twin.args, twin.kwargs))
    with torch.no_grad():
        assert torch.equal(twin.forward(), host.forward())
    assert other.method == handle.method and other.sites == handle.sites
    assert other.trained().keys() == handle.trained().keys()
    assert [g["names"] for g in other.trainable()] == [g["names"] for g in handle.trainable()]
    assert other.parameters_count() == handle.parameters_count()
    assert all(torch.equal(v, other.state()[k]) for k, v in handle.state().items())


class WithHead(nn.Module):
    def __init__(self, classes: int = 5, width: int = 32, norm: bool = True):
        super().__init__()
        self.backbone = vit(num_classes=0, embed_dim=width)
        torch.manual_seed(1)
        norms = [nn.BatchNorm1d(width)] if norm else []
        self.head = nn.Sequential(*norms, nn.Linear(width, classes), *([nn.BatchNorm1d(classes)] if norm else []))

    def forward(self, x):
        return self.head(self.backbone(x))


def test_batch_statistics_of_the_head_are_saved(tmp_path):
    model = WithHead().eval()
    handle = attach(model, "bottleneck", head="head", sample=IMAGE)
    model.train()
    optimizer = torch.optim.SGD(handle.trained().values(), lr=0.1)
    for _ in range(3):
        model(IMAGE * 2 + 1).square().sum().backward()
        optimizer.step()
    model.eval()
    folder = handle.save(tmp_path / "adapter")
    twin = WithHead().eval()
    load_adapter(twin, folder, sample=IMAGE)
    assert not torch.equal(handle.state()["moved.head/0/running_mean"], torch.zeros(32))
    assert torch.equal(run(twin), run(model))


def test_a_head_for_other_classes_loads_and_the_hosts_own_head_stays(tmp_path):
    handle = attach(WithHead(classes=3).eval(), "lora", head="head", sample=IMAGE)
    _perturb(handle, seed=1)
    folder = handle.save(tmp_path / "adapter", labels=["x", "y", "z"])
    twin = WithHead(classes=5).eval()
    before = run(twin)
    other = load_adapter(twin, folder, sample=IMAGE)
    assert torch.equal(run(twin), run(handle.model))
    assert run(twin).shape == (2, 3)
    other.detach()
    assert torch.equal(run(twin), before)


def test_full_with_a_head_for_other_classes_loads_and_detaches(tmp_path):
    handle = attach(WithHead(classes=3).eval(), "full", head="head", sample=IMAGE)
    _perturb(handle, seed=1)
    twin = WithHead(classes=5).eval()
    before = run(twin)
    other = load_adapter(twin, handle.save(tmp_path / "adapter"), sample=IMAGE)
    assert torch.equal(run(twin), run(handle.model))
    other.detach()
    assert torch.equal(run(twin), before)


def test_full_fine_tuning_is_bound_to_the_base_before_it_was_trained(tmp_path):
    handle = attach(vit(), "full")
    _perturb(handle, seed=1)
    folder = handle.save(tmp_path / "adapter")
    refused(folder, "trained on .* this backbone is", vit(seed=1))
    assert torch.equal(run(load_adapter(vit(), folder).model), run(handle.model))


def test_tied_tensors_are_stored_once_and_come_back_under_both_names(tmp_path):
    host, twin = HOSTS["hf_gpt2"](), HOSTS["hf_gpt2"]()
    handle = attach(host.model, "full")
    _perturb(handle, seed=1)
    folder = handle.save(tmp_path / "adapter")
    stored = load_file(folder / TENSORS)
    assert ("base.lm_head/weight" in stored) != ("base.transformer/wte/weight" in stored)
    load_adapter(twin.model, folder)
    with torch.no_grad():
        assert torch.equal(twin.forward(), host.forward())


def test_last_blocks_and_trained_norms_come_back_as_they_were_attached(tmp_path):
    handle = attach(vit(), "bottleneck", last_k=1, train_norms=True)
    other = load_adapter(vit(), handle.save(tmp_path / "adapter"))
    assert [s.path for s in other.sites] == ["blocks.1.mlp"] == [s.path for s in handle.sites]
    assert other.trained().keys() == handle.trained().keys()
    assert other.kind("tensors.norm/weight") == "norm"


def test_a_second_adapter_loads_beside_the_first_and_a_failed_one_leaves_the_first_active(saved):
    model = vit()
    first = load_adapter(model, saved, name="first")
    out = run(model)
    with pytest.raises(UsageError, match="taken"):
        load_adapter(model, saved, name="first")
    folder = forge(saved, lambda f: f["base"].update(fingerprint="0" * 64))
    refused(folder, "trained on", model, name="second")
    assert first.bank.active == ["first"] and torch.equal(run(model), out)
    attach(model, "bitfit", "third")
    first.activate()
    assert torch.equal(run(model), out)


def test_an_error_after_the_adapter_was_built_leaves_the_model_as_it_was(saved):
    """Shapes inside branches are known only when the method has built them."""
    folder = forge(saved, lambda f: f["method"]["settings"].update(rank=3))
    refused(folder, r"branches\.blocks/0/attn/qkv:q\.down is \(4, 32\), expected \(3, 32\)")
    model = vit()
    first = attach(model, "bitfit", "first")
    out = keys(model)
    refused(folder, "expected", model, name="second")
    assert same(out, keys(model)) and first.bank.active == ["first"]


def test_the_record_comes_back(saved, tmp_path):
    handle = load_adapter(vit(), saved)
    folder = handle.save(tmp_path / "b", preprocessing={"rate_hz": 16000}, recipe_hash="f", note=[1], labels=LABELS)
    record = read_adapter(folder)
    assert record.labels == LABELS and record.preprocessing == {"rate_hz": 16000}
    assert record.recipe_hash == "f" and record.extra == {"note": [1]} and record.threshold is None
    assert record.method == handle.method and record.settings["rank"] == 4
    assert record.head == ("head",) and record.held["norm/weight"] == "norm"
    assert record.base["name"] == "timm.VisionTransformer" and record.base["blocks"] == {"": 2}
    assert record.versions["torch"] == torch.__version__
    assert read_adapter(saved).threshold == 0.5 and read_adapter(saved).temperature == 1.5
    assert (folder / TENSORS).stat().st_mode == (folder / RECORD).stat().st_mode  # safetensors alone writes 0600


def test_saving_twice_gives_the_same_bytes_and_replaces_the_folder(saved, tmp_path):
    handle = load_adapter(vit(), saved)
    facts = dict(labels=LABELS, threshold=0.5, temperature=1.5)
    again = handle.save(tmp_path / "again", **facts)
    for name in (TENSORS, RECORD):
        assert (again / name).read_bytes() == (saved / name).read_bytes()
    _perturb(handle, seed=5)
    handle.save(again, **facts)
    assert (again / TENSORS).read_bytes() != (saved / TENSORS).read_bytes()
    assert torch.equal(run(load_adapter(vit(), again).model), run(handle.model))


def test_a_save_that_fails_keeps_the_adapter_that_was_there(saved, monkeypatch):
    handle = load_adapter(vit(), saved)
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    _perturb(handle, seed=5)

    def killed(facts):
        raise KeyboardInterrupt

    monkeypatch.setattr("adaptsuite.artifact.json_hash", killed)  # the payload is written then, the record is not
    with pytest.raises(KeyboardInterrupt):
        handle.save(saved)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("name", ["notes.txt", TENSORS])
def test_a_folder_that_is_no_adapter_is_not_overwritten(tmp_path, name):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / name).write_text("mine")
    with pytest.raises(UsageError, match="holds something that is no adapter"):
        attach(vit(), "lora").save(tmp_path / "other")
    assert (tmp_path / "other" / name).read_text() == "mine"


def test_files_added_to_an_adapter_are_not_lost(saved):
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="notes.txt"):
        load_adapter(vit(), saved).save(saved)
    assert (saved / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({"threshold": float("nan")}, "'threshold' cannot be written as JSON"),
        ({"note": object()}, "'note' cannot be written as JSON"),
        ({"sites": []}, "'sites' is written by save_adapter"),
        ({"labels": ["a", "b"]}, "2 labels for a head with 5 outputs"),
        ({"labels": list("aacde")}, "'a' twice"),
    ],
)
def test_a_record_that_cannot_be_is_refused(record, match, tmp_path):
    with pytest.raises(UsageError, match=match):
        attach(vit(), "linear").save(tmp_path / "adapter", **record)
    assert not (tmp_path / "adapter").exists()


def test_nan_is_not_saved_and_merged_is_neither_saved_nor_loaded_upon(saved, tmp_path):
    handle = load_adapter(vit(), saved)
    handle.merge()
    with pytest.raises(UsageError, match="merged"):
        handle.save(tmp_path / "adapter")
    with pytest.raises(UsageError, match="merged"):
        load_adapter(handle.model, saved, name="second")
    handle.unmerge()
    next(iter(handle.trained().values())).data.fill_(float("nan"))
    with pytest.raises(AdapterError, match="holds NaN"):
        handle.save(tmp_path / "adapter")


# ---- the base


def test_a_fingerprint_sees_names_shapes_dtypes_and_every_bit():
    a = {"x": torch.arange(6.0), "y": torch.tensor(1)}
    seen = {fingerprint(a)}
    for other in (
        {"x": torch.arange(6.0).view(2, 3), "y": torch.tensor(1)},
        {"x": torch.arange(6.0).double(), "y": torch.tensor(1)},
        {"z": torch.arange(6.0), "y": torch.tensor(1)},
        {"x": torch.arange(6.0) + torch.tensor([0, 0, 0, 0, 0, 1e-6]), "y": torch.tensor(1)},
        {"x": torch.arange(6.0), "y": torch.tensor(2)},
    ):
        seen.add(fingerprint(other))
    assert len(seen) == 6
    assert fingerprint(dict(reversed(a.items()))) in seen
    turned = torch.arange(6.0).view(2, 3)
    assert fingerprint({"x": turned.T}) == fingerprint({"x": turned.T.contiguous()}) != fingerprint({"x": turned})
    assert fingerprint({"x": torch.zeros(2)}) != fingerprint({"x": torch.zeros(2, dtype=torch.int32)})  # equal bytes
    assert fingerprint({"x": torch.zeros(0)}) != fingerprint({})


def test_the_fingerprint_is_the_backbones_whatever_is_attached():
    model = vit()
    plain = base_fingerprint(model)
    attach(model, "bitfit", head="head")
    assert base_fingerprint(model) == plain != base_fingerprint(model, ("head",))
    other = vit()
    other.reset_classifier(7)
    assert (
        base_fingerprint(other, ("head",)) == base_fingerprint(model, ("head",)) != base_fingerprint(vit(1), ("head",))
    )


def bound(name: str = "file:a", digest: str = "1" * 64, **resized) -> nn.Module:
    model = WithHead(norm=False).eval()
    model.backbone.adaptsuite_source = Source(name, digest, resized)
    return model


def test_a_source_that_the_loader_left_is_the_identity_of_the_base(tmp_path):
    handle = attach(bound(), "lora", sample=IMAGE)
    folder = handle.save(tmp_path / "adapter")
    assert read_adapter(folder).base["name"] == "file:a" and base_fingerprint(bound()) == "1" * 64
    model = bound()
    nn.init.normal_(model.head[0].weight)  # not the backbone's
    load_adapter(model, folder, sample=IMAGE)
    message = refused(folder, "trained on file:a .* is file:b", bound("file:b", "2" * 64), sample=IMAGE)
    assert "weights 111111111111" in message and "weights 222222222222" in message
    load_adapter(bound("file:b", "2" * 64), folder, sample=IMAGE, strict_base=False)
    load_adapter(bound().bfloat16(), folder, sample=IMAGE.bfloat16())  # casting is no other base


def test_a_backbone_changed_after_it_was_loaded_is_refused(tmp_path):
    folder = attach(bound(), "lora", sample=IMAGE).save(tmp_path / "adapter")
    model = bound()
    with torch.no_grad():
        model.backbone.blocks[0].mlp.fc1.weight[0, 0] += 1e-3
    refused(folder, "file:a were changed after they were loaded", model, sample=IMAGE)
    load_adapter(model, folder, sample=IMAGE, strict_base=False)


def test_another_resize_is_said(tmp_path):
    folder = attach(bound(pos_embed=[1, 17, 32]), "lora", sample=IMAGE).save(tmp_path / "adapter")
    model = bound(pos_embed=[1, 17, 32])
    with torch.no_grad():
        model.backbone.pos_embed += 1e-6  # as interpolation on another machine
    load_adapter(model, folder, sample=IMAGE)
    with pytest.warns(UserWarning, match="resized"):
        load_adapter(bound(), folder, sample=IMAGE)


# ---- what does not fit


def test_another_base_of_the_same_shape_is_refused(saved):
    message = refused(
        saved, "trained on timm.VisionTransformer .* this backbone is timm.VisionTransformer", vit(seed=1)
    )
    assert "strict_base=False" in message
    load_adapter(vit(seed=1), saved, strict_base=False)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"depth": 3}, "made for 2 blocks, this backbone has 3"),
        ({"embed_dim": 64}, "made for D=32 at blocks.0.attn.qkv, this backbone has D=64"),
        ({"num_classes": 0}, "adapter holds head.weight, which this backbone does not have"),
    ],
)
def test_a_backbone_of_another_shape_is_refused(saved, changes, match, strict):
    assert "load it on timm.VisionTransformer" in refused(saved, match, vit(**changes), strict_base=strict)


def test_another_family_is_refused(saved):
    refused(saved, "made for blocks.0.attn.qkv .attn.q., which is not in this backbone", HOSTS["hf_vit"]().model)
    refused(saved, "site 'attn.q' is not in", nn.Sequential(nn.Linear(4, 4)))


def test_another_head_is_refused(tmp_path):
    folder = attach(WithHead().eval(), "linear", head="head", sample=IMAGE).save(tmp_path / "adapter")
    refused(folder, r"head.0.weight is \(32,\) in the adapter, \(5, 32\)", WithHead(norm=False).eval())
    folder = attach(WithHead(norm=False).eval(), "linear", head="head", sample=IMAGE).save(tmp_path / "plain")
    wide = WithHead(norm=False).eval()
    wide.head = nn.Sequential(nn.Linear(32, 5), nn.Linear(5, 5))
    refused(folder, "does not hold head.1.bias, head.1.weight of this backbone's head", wide, strict_base=False)
    narrow = WithHead(norm=False).eval()
    narrow.head = nn.Sequential(nn.Linear(32, 5, bias=False))
    refused(folder, "adapter holds head.0.bias", narrow)
    wide = WithHead(width=48, norm=False).eval()
    refused(folder, r"head.0.weight is \(5, 32\) in the adapter, \(5, 48\) in this", wide)


# ---- what is damaged


@pytest.mark.parametrize("name", [TENSORS, RECORD])
def test_a_flipped_bit_anywhere_is_found(saved, name):
    raw = bytearray((saved / name).read_bytes())
    for at in range(3, len(raw), len(raw) // 25):
        flipped = bytearray(raw)
        flipped[at] ^= 1
        if name == RECORD and bytes(flipped).split() == bytes(raw).split():
            continue
        (saved / name).write_bytes(flipped)
        with pytest.raises(AdapterError) as caught:
            read_adapter(saved)
        assert caught.value.exit_code == 4 and name in str(caught.value) and "\n" not in str(caught.value)
    (saved / name).write_bytes(raw)
    read_adapter(saved)


@pytest.mark.parametrize(
    ("size", "match"), [(0, "is empty: 0 bytes"), (100, "truncated: 100 bytes, adapter.json says"), (None, "not the f")]
)
def test_a_payload_of_another_size_is_refused(saved, size, match):
    raw = (saved / TENSORS).read_bytes()
    (saved / TENSORS).write_bytes(raw + b"x" if size is None else raw[:size])
    assert "copy it again" in refused(saved, match)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 8) + b"{}",
        b"\x80\x04\x95pickle",
        struct.pack("<Q", 64) + b'{"a":{"dtype":"F32","shape":[9999999],"data_offsets":[0,4]}}'.ljust(64) + b"1234",
    ],
    ids=["empty", "header of 2^62 bytes", "header cut off", "pickle", "shape beyond the data"],
)
def test_a_payload_that_is_no_safetensors_file_is_refused(saved, payload):
    refused(forge(saved, payload=payload), f"{TENSORS} is (empty|not a safetensors file)")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "is empty"),
        (b'{"schema": 1', "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[1]", "holds a list, expected an object"),
        (b'{"schema": NaN}', "NaN is not a finite number"),
        (b'{"schema": 1e999}', "1e999 is not a finite number"),
        (b"[" * 100_000, "is not JSON"),
        (b"{}", "schema is None, expected 1"),
        (b'{"schema": 1}', "'method' is missing, expected a dict"),
    ],
)
def test_a_record_that_is_none_is_refused(saved, text, match):
    (saved / RECORD).write_bytes(text)
    assert RECORD in refused(saved, match)


@pytest.mark.parametrize("name", [TENSORS, RECORD])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    refused(saved, f"{name} is missing" if name == TENSORS else f"holds no {name}")


def test_a_folder_that_is_none_is_named(tmp_path):
    refused(tmp_path / "nowhere", "nowhere does not exist, expected an adapter's folder")
    (tmp_path / "model.pth").write_bytes(b"x")
    refused(tmp_path / "model.pth", "model.pth is a file, expected an adapter's folder")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda f: f.update(schema=2), "schema 2 is newer than 1, .*update adaptsuite"),
        (lambda f: f["method"].update(name="lorra"), "method 'lorra' is unknown; did you mean lora"),
        (lambda f: f["method"].update(name="audio.nothing"), "method 'audio.nothing' is unknown"),
        (lambda f: f["method"].update(name="os.system"), "no domain 'os'"),
        (lambda f: f["method"]["settings"].update(alpha=-1e30), "alpha is -1e[+]?30"),
        (lambda f: f["method"]["settings"].update(rank="8"), "settings of method 'lora'.*edited, or saved by"),
        (lambda f: f["method"]["settings"].update(rnk=8), "no setting 'rnk'; did you mean rank"),
        (lambda f: f.update(sites={}), "'sites' is a dict, expected a list"),
        (lambda f: f["sites"][0].pop("dim"), "'sites' cannot be read"),
        (lambda f: f.pop("base"), "'base' is missing"),
        (lambda f: f["base"].pop("fingerprint"), "'fingerprint' is missing"),
        (lambda f: f.update(aliases={"branches.x": []}), "lacks branches.x, which"),
        (lambda f: f.update(labels=["a", "b"]), "2 labels for a head with 5 outputs"),
        (lambda f: f.update(labels={"a": 0}), "labels must be a list"),
        (lambda f: f.update(temperature=0), "temperature is 0, expected a number above 0"),
        (lambda f: f["held"].update({"fc_norm/weight": "head"}), "lacks tensors.fc_norm/weight"),
    ],
)
def test_a_record_that_cannot_be_is_refused_on_reading(saved, change, match):
    refused(forge(saved, change), match)


def test_an_edited_record_is_refused(saved):
    text = (saved / RECORD).read_text()
    (saved / RECORD).write_text(text.replace('"alpha": 8.0', '"alpha": 9.0'))
    refused(saved, "adapter.json was changed after it was saved")


def poke(value):
    def change(tensors):
        tensors["branches.blocks/0/attn/qkv:q.up"][0, 0] = value

    return change


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        (poke(float("nan")), "holds NaN, expected finite"),
        (poke(float("-inf")), "holds Inf, expected finite"),
        (poke(-3e30), "holds values up to 3.0e[+]30, at most 1e[+]06 is expected"),
        (lambda t: t.pop("tensors.head/bias"), "lacks tensors.head/bias of adapter.json's list"),
        (lambda t: t.update(extra=torch.ones(1)), "has extra, which is not in adapter.json's list"),
        (lambda t: t.update({"tensors.head/bias": torch.ones(6)}), r"tensors.head/bias is .*\[6\].* says .*\[5\]"),
        (lambda t: t.update({"tensors.head/bias": torch.ones(5).half()}), "float16.* says .*float32"),
    ],
)
def test_a_payload_that_cannot_be_is_refused(saved, tensors, match):
    assert TENSORS in refused(forge(saved, tensors=tensors), match)


@pytest.mark.parametrize("drop", [True, False], ids=["missing", "unexpected"])
def test_names_that_the_method_does_not_have_are_refused(saved, drop):
    """Payload and record agree with each other, and not with what the method builds."""
    name = "branches.blocks/0/attn/qkv:q.up" if drop else "branches.blocks/0/attn/qkv:q.gate"

    def tensors(stored):
        stored.pop(name) if drop else stored.update({name: torch.ones(1)})

    def change(facts):
        row = {"shape": [1], "dtype": "float32"}
        facts["tensors"].pop(name) if drop else facts["tensors"].update({name: row})

    refused(forge(saved, change, tensors), f"(missing|unexpected) ..{name}")


def test_large_statistics_are_no_damage(tmp_path):
    handle = attach(WithHead().eval(), "linear", head="head", sample=IMAGE)
    handle.adapter.moved._buffers["head/0/running_var"].fill_(1e9)
    folder = handle.save(tmp_path / "adapter")
    load_adapter(WithHead().eval(), folder, sample=IMAGE)
    handle.adapter.moved._buffers["head/0/running_var"].fill_(float("inf"))
    with pytest.raises(AdapterError, match="running_var holds Inf"):
        handle.save(tmp_path / "other")


def test_an_infinite_mask_of_a_base_that_was_trained_whole_is_no_damage(tmp_path):
    def masked():
        model = vit()
        model.register_buffer("mask", torch.full((3,), float("-inf")))
        return model

    handle = attach(masked(), "full")
    folder = handle.save(tmp_path / "adapter")
    load_adapter(masked(), folder)
    handle.trained()["base.norm/weight"].data.fill_(float("inf"))
    with pytest.raises(AdapterError, match="base.norm/weight holds Inf"):
        handle.save(tmp_path / "other")


# ---- hostile files


class Trap:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return (os.mkdir, (str(self.sentinel),))


def test_pickles_in_the_folder_are_never_opened(saved, tmp_path):
    torch.save(Trap(tmp_path / "sentinel"), tmp_path / "trap")
    for name in ("adapter.bin", "adapter.pth", "adapter.pt", "pytorch_model.bin"):
        shutil.copy(tmp_path / "trap", saved / name)
    load_adapter(vit(), saved)
    shutil.copy(tmp_path / "trap", saved / TENSORS)
    refused(saved, "is (truncated|not the file)")
    refused(forge(saved), "is not a safetensors file")
    assert not (tmp_path / "sentinel").exists()


@pytest.mark.parametrize("name", [TENSORS, RECORD])
def test_links_and_pipes_are_refused_even_with_the_right_content(saved, tmp_path, name):
    outside = tmp_path / "outside"
    (saved / name).rename(outside)
    (saved / name).symlink_to(outside)
    refused(saved, f"{name} is a symbolic link")
    (saved / name).unlink()
    os.mkfifo(saved / name)
    refused(saved, f"{name} is not a regular file")


def test_a_hard_link_is_not_written_through(saved, tmp_path):
    outside = tmp_path / "outside"
    os.link(saved / TENSORS, outside)
    before = outside.read_bytes()
    handle = load_adapter(vit(), saved)
    _perturb(handle, seed=7)
    handle.save(saved)
    assert outside.read_bytes() == before != (saved / TENSORS).read_bytes()
