"""wav2vec 2.0, HuBERT, WavLM, Whisper and CLAP from hub folders: same input as their extractors, padding unseen."""

import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from adaptsuite.audio import backbones
from adaptsuite.audio.export import Classifier
from adaptsuite.audio.pipeline import DOMAIN, AudioModel, HeadSettings
from adaptsuite.errors import UsageError
from adaptsuite.experiment import adapt, complete
from adaptsuite.export import write_onnx, write_torch
from adaptsuite.recipe import Recipe
from adaptsuite.verify import verify

SIZE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
CONV = dict(conv_dim=(16,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)


def build(family):
    """(model, feature extractor) of a small published-like checkpoint."""
    import transformers as t

    if family == "wav2vec2":
        return t.Wav2Vec2Model(
            t.Wav2Vec2Config(**SIZE, **CONV, do_stable_layer_norm=True, feat_extract_norm="layer")
        ), t.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    if family == "hubert":
        return t.HubertModel(t.HubertConfig(**SIZE, **CONV)), t.Wav2Vec2FeatureExtractor(do_normalize=False)
    if family == "wavlm":
        return t.WavLMModel(t.WavLMConfig(**SIZE, **CONV)), t.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    if family == "whisper":
        config = t.WhisperConfig(
            d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64, decoder_layers=1,
            decoder_attention_heads=2, decoder_ffn_dim=64, vocab_size=99, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, decoder_start_token_id=1,
        )  # fmt: skip
        return t.WhisperForConditionalGeneration(config), t.WhisperFeatureExtractor()
    audio = dict(
        patch_embeds_hidden_size=16, depths=[1, 1], num_attention_heads=[2, 2], hidden_size=32, projection_dim=16,
        enable_fusion=family == "clap-fused",
    )  # fmt: skip
    text = dict(**SIZE, vocab_size=99)
    extractor = t.ClapFeatureExtractor(truncation="fusion" if family == "clap-fused" else "rand_trunc")
    return t.ClapModel(t.ClapConfig(text_config=text, audio_config=audio, projection_dim=16)), extractor


FAMILIES = ("wav2vec2", "hubert", "wavlm", "whisper", "clap", "clap-fused")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(family):
        if family not in made:
            torch.manual_seed(0)
            model, extractor = build(family)
            with torch.no_grad():  # away from uniform attention, where queries get next to no gradient
                for p in model.parameters():
                    p.add_(torch.randn_like(p), alpha=0.1 if p.ndim > 1 else 0.02)
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family])
            extractor.save_pretrained(made[family])
        return made[family]

    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_features_equal_those_of_the_published_extractor(folders, family):
    _, extractor = build(family)
    frames = {"whisper": 3000}.get(family, 1000 if "clap" in family else 100)
    _, heard = backbones.load(f"hf:{folders(family)}", frames=frames)
    rate, rng = heard.front_end.sample_rate_hz, np.random.default_rng(0)
    assert rate == extractor.sampling_rate
    long, short = (rng.normal(size=n).astype(np.float32) * 0.1 for n in (heard.num_samples, heard.num_samples // 3))
    wave = torch.stack([torch.from_numpy(np.pad(w, (0, len(long) - len(w)))) for w in (long, short)])
    found = heard.features(wave, torch.tensor([len(long), len(short)]))
    options = {} if "clap" in family or family == "whisper" else {"padding": True}
    expected = extractor([long, short], sampling_rate=rate, return_tensors="np", **options)
    expected = expected["input_features" if "input_features" in expected else "input_values"]
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-3 if "clap" in family else 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_lie_on_the_grid_and_what_follows_the_clip_is_not_read(folders, family):
    backbone, heard = backbones.load(f"hf:{folders(family)}", frames=120)
    model = AudioModel(backbone, heard, 3).eval()
    wave = torch.randn(2, model.num_samples) * 0.1
    length = torch.tensor([model.num_samples, model.num_samples // 2])
    wave[1, length[1] :] = 0
    with torch.no_grad():
        tokens, mask = model.tokens(model.features(wave, length), length)
        assert tokens.shape == (2, heard.prefix + heard.grid[0] * heard.grid[1], heard.width)
        assert torch.isfinite(model(wave, length)).all()
    if mask is not None:
        assert mask[0].all() and 0.4 < mask[1].float().mean() < 0.6


def test_whisper_costs_what_the_clip_costs_and_keeps_its_first_positions(folders):
    whole, _ = backbones.load(f"hf:{folders('whisper')}")
    short, heard = backbones.load(f"hf:{folders('whisper')}", frames=101)
    assert heard.front_end.frames == 102 and heard.grid == (1, 51)
    assert torch.equal(short.embed_positions.weight, whole.embed_positions.weight[:51])
    assert short.adaptsuite_source.fingerprint == whole.adaptsuite_source.fingerprint
    assert short(torch.randn(1, 80, 102)).last_hidden_state.shape == (1, 51, 32)


@pytest.mark.parametrize("family", ["wav2vec2", "hubert", "wavlm", "whisper", "clap"])
@pytest.mark.parametrize("method", ["lora", "audio.soft_moa"])
def test_methods_live_on_every_audio_family(folders, family, method):
    recipe = complete(DOMAIN, Recipe("audio", f"hf:{folders(family)}", method=method, front_end={"frames": 60}))
    handle = adapt(DOMAIN, recipe, ["a", "b", "c"])
    verify(handle, DOMAIN.sample(handle.model), fresh=True).raise_if_dead()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES[:-1])
def test_every_family_exports_with_its_front_end_for_any_batch(folders, family):
    backbone, heard = backbones.load(f"hf:{folders(family)}", frames=60)
    graph = Classifier(AudioModel(backbone, heard, 3)).eval()
    inputs = dict(zip(("wave", "length"), DOMAIN.sample(graph.model, 3), strict=True))
    with torch.no_grad():
        expected = graph(**inputs)
    with tempfile.TemporaryDirectory() as folder:
        assert write_torch(Path(folder) / "m.pt2", graph, inputs, expected, {}) < 1e-5
        assert find_spec("onnxscript") is None or write_onnx(Path(folder) / "m", graph, inputs, expected, {}) < 1e-5


def test_a_fused_clap_is_not_exported(folders, tmp_path):
    """transformers asks there for values: which clips are longer than 10 s, though none ever is."""
    backbone, heard = backbones.load(f"hf:{folders('clap-fused')}", frames=60)
    graph = Classifier(AudioModel(backbone, heard, 3)).eval()
    inputs = dict(zip(("wave", "length"), DOMAIN.sample(graph.model), strict=True))
    with pytest.raises(UsageError, match="torch.export cannot trace this model: .*data-dependent"):
        write_torch(tmp_path / "m.pt2", graph, inputs, torch.zeros(2, 3), {})


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("hubert", {"mean": -4.0}, "for AST models"),
        ("whisper", {"reference_compat": True}, "for AST models"),
        ("whisper", {"frames": 3002}, "takes 2 to 3000"),
        ("clap", {"frames": 1200}, "at most 1000"),
    ],
)
def test_what_a_family_cannot_do_is_said(folders, family, settings, message):
    with pytest.raises(UsageError, match=message):
        backbones.load(f"hf:{folders(family)}", **settings)


def test_spec_augment_and_the_ast_head_are_refused_on_waveform_models(folders):
    recipe = Recipe("audio", f"hf:{folders('hubert')}", method="linear", front_end={"frames": 60})
    for change, message in (
        ({"augment": {"freq_mask": 8}}, "SpecAugment masks log-mel"),
        ({"head": {"kind": "hf"}}, "head.kind=hf is AST's"),
        ({"head": {"kind": "prototypes", "pool": "cls"}}, "reading of its own"),
    ):
        with pytest.raises(UsageError, match=message):
            DOMAIN.model(Recipe(**{**recipe.__dict__, **change}), ["a", "b"])


def test_a_network_of_ones_own_becomes_a_backbone(folders):
    made = backbones.load(f"hf:{folders('hubert')}", frames=60)
    backbones.register("my-net", lambda random_weights, seed, frames: made)
    try:
        model = DOMAIN.model(Recipe("audio", "my-net", method="linear"), ["a", "b"])
        assert isinstance(model, AudioModel) and model.backbone is made[0]
        assert model.backbone.adaptsuite_source.name == "my-net"
        assert AudioModel(*made, 2, HeadSettings(pool="mean+max")).head.in_features == 64
    finally:
        del backbones.OWN["my-net"]
