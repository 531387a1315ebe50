"""`adapt audio export`: what transformers, torch.export, onnxruntime and peft make of the files is what we say."""

import json
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import soundfile
import torch

from adaptsuite import atomic, export
from adaptsuite.applied import label_files
from adaptsuite.audio import backbones
from adaptsuite.audio.export import export as write
from adaptsuite.audio.pipeline import DOMAIN
from adaptsuite.cli import main
from adaptsuite.errors import Inexact, UsageError
from adaptsuite.experiment import adapt, complete, restore
from adaptsuite.peft_bridge import CONFIG, from_peft
from adaptsuite.recipe import DataSettings, Recipe, digest, to_dict
from adaptsuite.verify import _perturb

LABELS = ["dog", "rain & wind", "café"]
RATE = 16000
LACKING = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
NEEDS_ONNX = pytest.mark.skipif(bool(LACKING), reason=f"the extra onnx is not installed: no {', '.join(LACKING)}")
FORM = {".pt2": "torch", ".onnx": "onnx"}


@pytest.fixture(scope="module")
def ast(tmp_path_factory):
    """A small AST in the hub's layout, with the front end of transformers' extractor."""
    import transformers as t

    torch.manual_seed(0)
    config = t.ASTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_mel_bins=32,
        max_length=64, frequency_stride=16, time_stride=16,
    )  # fmt: skip
    model, folder = t.ASTModel(config), tmp_path_factory.mktemp("ast")
    away_from_uniform(model)
    model.save_pretrained(folder)
    t.ASTFeatureExtractor(num_mel_bins=32, max_length=64, mean=-3.0, std=2.5).save_pretrained(folder)
    return f"hf:{folder}"


@pytest.fixture(scope="module")
def wav2vec2(tmp_path_factory):
    import transformers as t

    torch.manual_seed(0)
    config = t.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, do_stable_layer_norm=True,
        feat_extract_norm="layer",
    )  # fmt: skip
    model, folder = t.Wav2Vec2Model(config), tmp_path_factory.mktemp("wav2vec2")
    away_from_uniform(model)
    model.save_pretrained(folder)
    t.Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)
    return f"hf:{folder}"


def away_from_uniform(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1 if p.ndim > 1 else 0.02)


@pytest.fixture
def adapter(tmp_path):
    """adapter("lora", backbone, head="hf", ...) is the folder of one that does not say what its start says."""

    def save(method, backbone, head="linear", frames=64, task="multiclass", **settings):
        recipe = Recipe(
            "audio", backbone, method=method, method_settings=settings, head={"kind": head},
            front_end={"frames": frames}, data=DataSettings(task=task),
        )  # fmt: skip
        recipe = complete(DOMAIN, recipe)
        handle = adapt(DOMAIN, recipe, LABELS)
        _perturb(handle, seed=1)
        folder = tmp_path / f"{method}-{head}-{task}"
        handle.save(folder, labels=LABELS, recipe=to_dict(recipe), recipe_hash=digest(recipe))
        return folder

    return save


def ours(folder):
    """(eager model with its adapter, unmerged; recipe)"""
    handle, recipe, _, _ = restore(DOMAIN, folder)
    return handle.model, recipe


def clips(model, batch=4):
    """Fresh noises of several lengths, zeros behind them."""
    generator = torch.Generator().manual_seed(7)
    length = torch.linspace(1200, model.num_samples, batch).long()
    wave = torch.randn(batch, model.num_samples, generator=generator) * 0.1
    return wave * (torch.arange(model.num_samples) < length[:, None]), length


def gap(run, model):
    """Largest difference over four clips at once and one alone."""
    wave, length = clips(model)
    with torch.no_grad():
        expected = model(wave, length)
        assert float(expected.std(0).max()) > 1e-3  # the clips are told apart
        found = [run(wave, length), run(wave[1:2], length[1:2])]
    return max(float((f - e).abs().max()) for f, e in zip(found, (expected, expected[1:2]), strict=True))


def read(path):
    """(what the file makes of wave and length, its metadata)"""
    if path.suffix == ".pt2":
        extra = {export.METADATA: ""}
        program = torch.export.load(path, extra_files=extra).module()
        return program, json.loads(extra[export.METADATA])
    import onnx
    import onnxruntime

    stored = onnx.load(path)
    onnx.checker.check_model(stored)
    props = {p.key: p.value for p in stored.metadata_props}
    texts = ("adaptsuite", "method", "base", "recipe_hash", "task", "output", "activation")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return (
        lambda w, n: torch.from_numpy(session.run(["logits"], {"wave": w.numpy(), "length": n.numpy()})[0]),
        {k: v if k in texts else json.loads(v) for k, v in props.items()},
    )


# ---- transformers


@pytest.mark.parametrize(
    ("method", "task"),
    [(m, "multiclass") for m in ("lora", "bitfit", "film", "linear")] + [("full", "multilabel")],
)
def test_transformers_pipeline_gives_our_probabilities_at_every_length(method, task, ast, adapter, tmp_path):
    import transformers as t

    folder, out = adapter(method, ast, "hf", task=task), tmp_path / "out"
    found = write(folder, "hf", out)
    assert found["max_difference"] < 1e-5 and found["labels"] == LABELS
    model, info = t.AutoModelForAudioClassification.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model) is t.ASTForAudioClassification and model.config.label2id == {k: i for i, k in enumerate(LABELS)}
    pipe = t.pipeline("audio-classification", model=str(out))
    eager, _ = ours(folder)
    rng = np.random.default_rng(3)
    for samples in (eager.num_samples // 3, eager.num_samples, 2 * eager.num_samples):
        wave = (rng.normal(size=samples) * 0.1).astype(np.float32)
        kept = torch.from_numpy(wave[: eager.num_samples])
        padded = torch.nn.functional.pad(kept, (0, eager.num_samples - len(kept)))[None]
        with torch.no_grad():
            logits = eager(padded, torch.tensor([len(kept)]))[0]
        expected = logits.sigmoid() if task == "multilabel" else logits.softmax(0)
        said = {row["label"]: row["score"] for row in pipe(wave)}
        np.testing.assert_allclose([said[k] for k in LABELS], expected, atol=1e-5)


def test_transformers_and_our_predict_agree_on_a_file_of_another_rate(ast, adapter, tmp_path):
    """And the folder is a backbone again, for adapters on top of it."""
    import transformers as t

    folder, out, clip = adapter("lora", ast, "hf"), tmp_path / "out", tmp_path / "clip.wav"
    write(folder, "hf", out)
    wave = np.random.default_rng(0).normal(size=4000).astype(np.float32) * 0.1
    soundfile.write(clip, wave, 8000, subtype="FLOAT")
    pipe = t.pipeline("audio-classification", model=str(out))
    raw, rate = soundfile.read(clip, dtype="float32")
    said = {row["label"]: row["score"] for row in pipe({"raw": raw, "sampling_rate": rate})}
    (row,) = label_files(DOMAIN, folder, [str(clip)])["predictions"]
    assert said.keys() == row["scores"].keys()
    np.testing.assert_allclose([said[k] for k in LABELS], [row["scores"][k] for k in LABELS], atol=1e-5)
    _, heard = backbones.load(f"hf:{out}")
    assert (heard.front_end.frames, heard.front_end.mean, heard.front_end.std) == (64, -3.0, 2.5)


# ---- one file


@pytest.mark.parametrize(
    ("method", "family", "head", "name"),
    [
        ("audio.soft_moa", "ast", "linear", "m.pt2"),  # stays in the graph, with the mask of padding
        pytest.param("audio.soft_moa", "ast", "linear", "m.onnx", marks=NEEDS_ONNX),
        ("lora", "ast", "hf", "m.pt2"),  # merged before
        ("audio.soft_moa", "wav2vec2", "linear", "m.pt2"),
        pytest.param("lora", "wav2vec2", "linear", "m.onnx", marks=[NEEDS_ONNX, pytest.mark.slow]),
        pytest.param("bottleneck", "ast", "prototypes", "m.onnx", marks=[NEEDS_ONNX, pytest.mark.slow]),
        pytest.param("linear", "ast", "linear", "m.onnx", marks=[NEEDS_ONNX, pytest.mark.slow]),
    ],
)
def test_one_file_says_what_the_adapter_says_and_what_it_is(method, family, head, name, adapter, tmp_path, request):
    folder, path = adapter(method, request.getfixturevalue(family), head), tmp_path / name
    found, (model, recipe) = write(folder, FORM[path.suffix], path), ours(folder)
    run, facts = read(path)
    assert found["bytes"] == path.stat().st_size
    assert max(found["max_difference"], gap(run, model)) < 1e-5
    assert facts["labels"] == LABELS and facts["activation"] == "softmax" and facts["threshold"] is None
    assert (facts["sample_rate_hz"], facts["num_samples"]) == (RATE, model.num_samples)
    assert facts["method"] == method and facts["recipe_hash"] == digest(recipe)
    for place in (export.__file__, torch.__file__, f"{tmp_path}/"):  # nothing of this computer
        assert place.rpartition("/")[0].encode() not in path.read_bytes()


@pytest.mark.parametrize(
    "method", ["audio.soft_moa", *(pytest.param(m, marks=pytest.mark.slow) for m in ("linear", "lora"))]
)
def test_the_embedded_backbone_exports_and_hears_where_a_clip_ends(method, adapter, tmp_path):
    folder = adapter(method, "embedded:audio-tiny", frames=100)
    write(folder, "torch", tmp_path / "m.pt2")
    (program, _), (model, _) = read(tmp_path / "m.pt2"), ours(folder)
    assert gap(program, model) < 1e-5
    wave, length = clips(model)
    with torch.no_grad():
        assert not torch.allclose(program(wave, length), program(wave, torch.full_like(length, model.num_samples)))


def test_the_embedded_backbone_hears_as_transformers_does_under_its_head(adapter, tmp_path):
    """It was trained on 50 to 7800 Hz; transformers' extractor knows 20 to 8000 Hz alone, so head=hf does too."""
    folder = adapter("lora", "embedded:audio-tiny", "hf", frames=100)
    model, _ = ours(folder)
    assert (model.front_end.low_hz, model.front_end.high_hz) == (20.0, 0.0)
    assert any("50 to 7800 Hz" in remark for remark in model.input.remarks)
    assert write(folder, "hf", tmp_path / "out")["max_difference"] < 1e-5


def test_a_multilabel_file_carries_its_threshold(ast, adapter, tmp_path):
    write(adapter("linear", ast, task="multilabel"), "torch", tmp_path / "m.pt2")
    _, facts = read(tmp_path / "m.pt2")
    assert (facts["task"], facts["activation"], facts["threshold"]) == ("multilabel", "sigmoid", 0.5)


# ---- peft


@pytest.mark.parametrize("family", ["ast", "wav2vec2"])
def test_peft_on_the_plain_backbone_gives_our_tokens_and_the_way_back_too(family, adapter, tmp_path, request):
    peft = pytest.importorskip("peft")
    from transformers import AutoModel

    name = request.getfixturevalue(family)
    folder, out = adapter("lora", name, sites=("attn.q", "mlp.out")), tmp_path / "out"
    assert write(folder, "peft", out)["max_difference"] == 0
    model, _ = ours(folder)
    wave, length = clips(model)

    def tokens(backbone):
        with torch.no_grad():
            return model.input.tokens(backbone, model.features(wave, length), length)

    plain = AutoModel.from_pretrained(name.removeprefix("hf:")).eval()
    assert not torch.equal(tokens(plain), tokens(model.backbone))
    theirs = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(name.removeprefix("hf:")), out).eval()
    assert torch.equal(tokens(theirs.base_model.model), tokens(model.backbone))
    from_peft(plain, out)
    assert torch.equal(tokens(plain), tokens(model.backbone))


def test_a_resized_backbone_is_said_to_be_one(ast, adapter, tmp_path):
    assert not [n for n in write(adapter("lora", ast), "peft", tmp_path / "a")["notes"] if "resized" in n]
    assert "frames=120)[0] does so" in write(adapter("lora", ast, frames=120), "peft", tmp_path / "b")["notes"][-1]


# ---- what cannot be


@pytest.mark.parametrize(
    ("form", "method", "backbone", "head", "message"),
    [
        ("hf", "lora", "ast", "linear", "this one is linear: train with --set head=hf"),
        ("hf", "audio.soft_moa", "ast", "hf", "'audio.soft_moa' has none: a mixture's output depends on all tokens"),
        ("hf", "lora", "wav2vec2", "linear", "this backbone is a Wav2Vec2Model; --format torch and onnx take it"),
        ("peft", "bottleneck", "ast", "linear", "'bottleneck' has no form in peft"),
    ],
)
def test_a_format_that_cannot_hold_an_adapter_says_why(
    form, method, backbone, head, message, adapter, tmp_path, request
):
    name = request.getfixturevalue(backbone)
    with pytest.raises(UsageError, match=message):
        write(adapter(method, name, head), form, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []


@pytest.mark.parametrize(
    ("form", "out", "message"),
    [
        ("onx", "m.onnx", "did you mean onnx"),
        ("onnx", "m", "name it NAME.onnx"),
        ("torch", "folder.pt2", "name it NAME.pt2"),
        ("torch", "m.pt", "name it NAME.pt2"),
        ("hf", "taken", "notes.txt"),
        ("peft", "taken", "notes.txt"),
    ],
)
def test_a_wrong_target_is_refused_before_the_adapter_is_read(form, out, message, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "folder.pt2").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("dear")
    with pytest.raises(UsageError, match=message):
        write(tmp_path / "no adapter", form, tmp_path / out)
    assert (tmp_path / "taken" / "notes.txt").read_text() == "dear"


@pytest.mark.parametrize(
    ("form", "name"),
    [("hf", "m"), ("peft", "m"), ("torch", "m.pt2"), pytest.param("onnx", "m.onnx", marks=NEEDS_ONNX)],
)
def test_a_model_that_says_something_else_never_appears(form, name, ast, adapter, tmp_path, monkeypatch):
    folder, out = adapter("lora", ast, "hf"), tmp_path / "exports" / name
    if form in ("hf", "peft"):
        atomic.write_folder(out, lambda f: (f / CONFIG).write_text("old"))
    else:
        atomic.write_file(out, "old")
    monkeypatch.setattr(export, "LARGEST", -1.0)
    with pytest.raises(Inexact, match=f"{name} differs by .* from the adapter, at most .* not written"):
        write(folder, form, out)
    assert (out / CONFIG if out.is_dir() else out).read_text() == "old"
    assert list(out.parent.iterdir()) == [out]


def test_a_model_with_a_branch_on_values_is_refused_in_one_line(tmp_path):
    class Branches(torch.nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UsageError, match="torch.export cannot trace this model: .") as caught:
        export.write_torch(tmp_path / "m.pt2", Branches(), {"x": torch.ones(2, 3)}, torch.ones(2, 3), {})
    assert "\n" not in str(caught.value) and not (tmp_path / "m.pt2").exists()


def test_a_graph_that_learnt_the_batch_size_or_is_not_finite_is_refused(tmp_path):
    with pytest.raises(UsageError, match="batch"):
        graph = torch.nn.Unflatten(0, (2, 1))
        export.write_torch(tmp_path / "m.pt2", graph, {"x": torch.ones(2, 3)}, torch.ones(2, 1, 3), {})
    with pytest.raises(Inexact, match="differs by nan"):
        export.agree("m", torch.tensor([float("nan")]), torch.zeros(1))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_says_its_pip_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UsageError, match=r"needs an extra \(onnx\): pip install 'adaptsuite\[onnx\]'"):
        write(tmp_path / "no adapter", "onnx", tmp_path / "m.onnx")


def test_the_command_prints_facts_or_json(ast, adapter, tmp_path, capsys):
    folder = adapter("lora", ast, "hf")
    assert main(["audio", "export", str(folder), "--format", "hf", "--out", str(tmp_path / "m")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["export", "labels", "differs", "note"]
    assert lines[1] == "labels   3: dog, rain & wind, café" and "cuts clips at 0.66 s" in lines[3]
    assert main(["audio", "export", str(folder), "--format", "peft", "--out", str(tmp_path / "p"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["export"], found["labels"]) == ("peft", str(tmp_path / "p"), LABELS)
    assert found["max_difference"] == 0 and found["bytes"] > 1000
    assert main(["audio", "export", str(folder), "--format", "tflite", "--out", "x"]) == 2
    assert capsys.readouterr().err == "adapt: --format 'tflite' is not known; there is: hf, onnx, peft, torch\n"
