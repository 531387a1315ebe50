"""ASTs from hub folders, positions for other lengths, and what ties an adapter to its weights."""

import json

import pytest
import torch

from adaptsuite.audio import backbones
from adaptsuite.audio.features import Fbank, normalise, resize_positions, spec_augment
from adaptsuite.audio.pipeline import DOMAIN, AudioModel, HeadSettings
from adaptsuite.errors import ResourceError, UsageError
from adaptsuite.identity import base_fingerprint
from adaptsuite.recipe import Recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small AST classifier in the hub's layout, as AudioSet checkpoints are published."""
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    torch.manual_seed(0)
    config = ASTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_mel_bins=32,
        max_length=64,
        frequency_stride=8,
        time_stride=8,
    )
    model = ASTForAudioClassification(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    path = tmp_path_factory.mktemp("hub")
    model.save_pretrained(path)
    ASTFeatureExtractor(num_mel_bins=32, max_length=64, mean=-3.0, std=2.0).save_pretrained(path)
    return path


def test_a_classifier_s_folder_gives_its_encoder_and_front_end(folder):
    from transformers import ASTForAudioClassification

    whole = ASTForAudioClassification.from_pretrained(folder).eval()
    model, heard = backbones.load(f"hf:{folder}")
    front = heard.front_end
    x = torch.randn(1, 64, 32)
    expected = whole.audio_spectrogram_transformer(x).last_hidden_state
    assert torch.equal(model(x).last_hidden_state, expected)
    assert (front.mean, front.std, front.frames, front.num_mel_bins) == (-3.0, 2.0, 64, 32)


def test_other_lengths_keep_the_fingerprint_and_record_the_resize(folder):
    a, _ = backbones.load(f"hf:{folder}")
    b, _ = backbones.load(f"hf:{folder}", frames=120)
    assert base_fingerprint(a) == base_fingerprint(b)
    assert b.adaptsuite_source.resized == {"embeddings.position_embeddings": [1, 2 + 3 * 14, 16]}
    assert b(torch.randn(1, 120, 32)).last_hidden_state.shape == (1, 44, 16)


def test_positions_are_cut_around_the_centre_and_stretched_bilinearly():
    grid = torch.arange(2 * 6, dtype=torch.float32).reshape(2, 6)
    position = torch.cat([torch.tensor([-1.0, -2.0]), grid.flatten()]).reshape(1, -1, 1)
    cut = resize_positions(position, (2, 6), (2, 3))[0, :, 0]
    assert cut.tolist() == [-1, -2, 1, 2, 3, 7, 8, 9]
    wide = resize_positions(position, (2, 6), (2, 12))[0, 2:, 0].reshape(2, 12)
    assert wide[0, :4].tolist() == [0, 0.25, 0.75, 1.25]  # align_corners False
    assert torch.equal(resize_positions(position, (2, 6), (2, 6)), position)


def test_reference_bug_01_permuting_patches_changes_the_output_unless_compat_is_asked_for(folder):
    """The reference zeroes and freezes positions of another length: its model is blind to order."""
    x = torch.randn(1, 120, 32)
    turned = torch.cat([x[:, 56:112], x[:, :56], x[:, 112:]], 1)
    pooled = {}
    for compat in (False, True):
        model, _ = backbones.load(f"hf:{folder}", frames=120, reference_compat=compat)
        model.config.time_stride = model.config.frequency_stride = 8
        gap = model(x).last_hidden_state[:, 0] - model(turned).last_hidden_state[:, 0]
        pooled[compat] = float(gap.abs().max())
        assert bool(model.embeddings.position_embeddings.any()) != compat
    assert pooled[False] > 0


def test_random_weights_tell_cls_from_dist_and_follow_their_seed():
    a, _ = backbones.load("ast-tiny", frames=32, random_weights=True, seed=1)
    b, _ = backbones.load("ast-tiny", frames=32, random_weights=True, seed=1)
    c, _ = backbones.load("ast-tiny", frames=32, random_weights=True, seed=2)
    out = a(torch.randn(1, 32, 128)).last_hidden_state
    assert not torch.allclose(out[:, 0], out[:, 1])
    assert base_fingerprint(a) == base_fingerprint(b) != base_fingerprint(c)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("ast-tiny", UsageError, "no published weights"),
        ("ast-bse", UsageError, "did you mean ast-base"),
        ("embedded:audio-tyni", UsageError, "did you mean audio-tiny"),
        ("embeded:audio-tiny", UsageError, "no source 'embeded'"),
        ("hf:/no/such/folder", UsageError, "config.json"),
    ],
)
def test_a_wrong_name_says_what_there_is(name, error, message):
    with pytest.raises(error, match=message):
        backbones.load(name)


def test_a_hub_that_cannot_be_reached_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ResourceError, match="local folder"):
        backbones.load("hf:nobody/no-such-ast-model")


def test_pickled_weights_are_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match="safetensors"):
        backbones.load(f"hf:{tmp_path}")


def test_a_remote_code_config_is_not_run(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'sentinel')!r}, 'w')")
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises((UsageError, ResourceError)):
        backbones.load(f"hf:{tmp_path}")
    assert not (tmp_path / "sentinel").exists()


def audio_model(folder, frames=64, pool="mean"):
    backbone, heard = backbones.load(f"hf:{folder}", frames=frames)
    torch.manual_seed(0)
    return AudioModel(backbone, heard, 3, HeadSettings(pool=pool)).eval()


def test_padding_is_as_quiet_as_silence_and_left_out_of_pooling(folder):
    model = audio_model(folder)
    wave = torch.randn(1, model.num_samples) * 0.1
    wave[:, 3000:] = 0
    features = model.features(wave)
    assert torch.allclose(features[:, -1], torch.full((32,), (Fbank.floor + 3.0) / 4.0))
    mask = model.input.mask(torch.tensor([3000, model.num_samples]))
    assert mask[1].all() and mask[0].sum() == 2 + 3 * 2  # 17 real frames: columns whose middle is before them
    tokens, _ = model.tokens(features, torch.tensor([3000]))
    torch.testing.assert_close(model.embed(wave, torch.tensor([3000])), tokens[:, mask[0]].mean(1))


def test_the_head_reads_the_mean_over_all_tokens_with_cls_and_dist(folder):
    model = audio_model(folder)
    wave = torch.randn(2, model.num_samples) * 0.1
    tokens = model.backbone(model.features(wave)).last_hidden_state
    torch.testing.assert_close(model(wave), model.head(tokens.mean(1)))
    whole = audio_model(folder, pool="cls+mean+std+max")
    tokens = whole.backbone(whole.features(wave)).last_hidden_state
    parts = [tokens[:, 0], tokens.mean(1), (tokens.var(1, unbiased=False) + 1e-6).sqrt(), tokens.amax(1)]
    torch.testing.assert_close(whole(wave), whole.head(torch.cat(parts, 1)))
    with pytest.raises(UsageError, match="did you mean mean"):
        audio_model(folder, pool="mena")


def test_rows_are_read_one_by_one_over_the_time_that_is_real(folder):
    model = audio_model(folder, pool="rows")
    rows, columns = model.input.grid
    wave, length = torch.randn(2, model.num_samples) * 0.1, torch.tensor([model.num_samples, 5000])
    wave[1, 5000:] = 0
    tokens, mask = model.tokens(model.features(wave, length), length)
    found = model.embed(wave, length)
    for b in range(2):
        grid, real = tokens[b, 2:].view(rows, columns, -1), mask[b, 2:].view(rows, columns)
        assert real.any(1).all() and bool(real.all()) == (b == 0)
        parts = [grid[r, real[r]].mean(0) for r in range(rows)], [grid[r, real[r]] for r in range(rows)]
        stds = [(x.var(0, unbiased=False) + 1e-6).sqrt() for x in parts[1]]
        expected = torch.cat([torch.stack(parts[0]), torch.stack(stds)], -1).flatten()
        torch.testing.assert_close(found[b], expected, rtol=1e-4, atol=1e-5)


def test_fbank_equals_kaldi_and_the_feature_extractor():
    import torchaudio
    from transformers import ASTFeatureExtractor

    wave = torch.randn(3, 16000) * 0.1
    found = Fbank()(wave)
    for i in range(3):
        kaldi = torchaudio.compliance.kaldi.fbank(
            wave[i : i + 1],
            htk_compat=True,
            sample_frequency=16000,
            use_energy=False,
            window_type="hanning",
            num_mel_bins=128,
            dither=0.0,
            frame_shift=10,
        )
        torch.testing.assert_close(found[i], kaldi, rtol=0, atol=1e-5)
    extractor = ASTFeatureExtractor(max_length=98)
    theirs = extractor([w.numpy() for w in wave], sampling_rate=16000, return_tensors="pt").input_values
    torch.testing.assert_close(normalise(found, extractor.mean, extractor.std), theirs, rtol=0, atol=1e-5)


def test_fbank_exports_and_pads_what_is_shorter_than_a_frame():
    model = Fbank(32)
    exported = torch.export.export(model, (torch.randn(2, 1600),)).module()
    wave = torch.randn(2, 1600)
    torch.testing.assert_close(exported(wave), model(wave))
    assert model(torch.zeros(1, 10)).shape == (1, 1, 32) and Fbank.num_frames(80000) == 498


def test_spec_augment_masks_within_its_widths_and_per_clip():
    torch.manual_seed(0)
    x = torch.ones(64, 50, 20)
    masked = spec_augment(x, 5, 10) == 0
    times, bins = masked.all(2).sum(1), masked.all(1).sum(1)
    assert times.max() <= 10 and bins.max() <= 5 and len(times.unique()) > 3 and len(bins.unique()) > 2
    assert torch.equal(spec_augment(x, 0, 0), x)


def test_counts_of_the_papers_on_ast_base():
    """Trained values without the head on a meta AST-base (audio.md, section 5)."""
    from adaptsuite.host import attach
    from adaptsuite.probe import meta_copy

    recipe = Recipe("audio", "ast-base", True, "linear", front_end={"frames": 500})
    model = meta_copy(DOMAIN.model(recipe, ["a", "b"]))
    sample = tuple(t.to("meta") for t in DOMAIN.sample(model))
    expected = [
        ("linear", {}, 1536),
        ("bitfit", {}, 102144),
        ("full", {}, 85708032),
        *(("lora", {"rank": r}, n) for r, n in ((6, 222720), (8, 296448), (12, 443904))),
        *(("bottleneck", {"bottleneck": r}, n) for r, n in ((6, 139848), (8, 176736), (12, 250512))),
        *(
            ("bottleneck", {"bottleneck": r, "sites": ("attn", "mlp")}, n)
            for r, n in ((6, 278160), (8, 351936), (12, 499488))
        ),
        ("prefix", {}, 222720),
        ("prompt", {"deep": False, "tokens": 300}, 231936),
        ("prompt", {}, 231936),
        *(
            ("audio.conformer", {"bottleneck": r, "kernel": k}, n)
            for r, k, n in ((6, 31, 216096), (8, 31, 272256), (12, 31, 384576), (8, 8, 270048))
        ),
        ("audio.conformer", {"bottleneck": 8, "kernel": 31, "sites": ("attn", "mlp")}, 542976),
        ("audio.dense_moa", {}, 923724),
        ("audio.soft_moa", {"sites": ("attn", "mlp")}, 1845744),
        *(
            ("audio.soft_moa", {"experts": n}, count)
            for n, count in ((1, 149064), (2, 278160), (4, 536352), (7, 923640), (14, 1827312), (15, 1956408))
        ),
    ]
    for method, settings, count in expected:
        handle = attach(model, method, sample=sample, train_norms=True, head="head", **settings)
        assert handle.parameters_count()["trained_without_head"] == count, (method, settings)
        handle.detach()
