"""The filter bank against Kaldi's and transformers', its export, padding, positions and augmentations."""

import pytest
import torch
from torch.testing import assert_close

from adaptsuite.audio.features import (
    Fbank,
    add_noise,
    coloured_noise,
    gain,
    normalise,
    pad_frames,
    resize_positions,
    roll,
    spec_augment,
)


@pytest.fixture
def wave():
    torch.manual_seed(0)
    return torch.randn(3, 16000) * 0.1


@pytest.mark.parametrize(
    ("bins", "low_hz", "high_hz", "window"), [(128, 20.0, 0.0, "hanning"), (64, 50.0, 7800.0, "povey")]
)
def test_equals_kaldis_filter_bank(wave, bins, low_hz, high_hz, window):
    from torchaudio.compliance import kaldi

    settings = {"num_mel_bins": bins, "low_freq": low_hz, "high_freq": high_hz, "window_type": window}
    expected = torch.stack([kaldi.fbank(w[None], dither=0.0, htk_compat=True, **settings) for w in wave])
    assert_close(Fbank(bins, low_hz, high_hz, window)(wave), expected, atol=1e-5, rtol=0)


def test_equals_the_feature_extractor_that_ast_was_published_with(wave):
    from transformers import ASTFeatureExtractor

    extract = ASTFeatureExtractor(max_length=98)  # (16000 - 400) // 160 + 1
    expected = extract([w.numpy() for w in wave], sampling_rate=16000, return_tensors="pt").input_values
    ours = normalise(Fbank()(wave), extract.mean, extract.std)
    assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_samples", [1, 399, 400, 559, 560, 16000])
def test_number_of_frames_is_what_it_says(num_samples):
    assert Fbank(64)(torch.zeros(2, num_samples)).shape == (2, Fbank.num_frames(num_samples), 64)


def test_a_clip_shorter_than_a_frame_is_padded_with_zeros(wave):
    short = wave[:, :250]
    assert torch.equal(Fbank()(short), Fbank()(torch.nn.functional.pad(short, (0, 150))))


def test_exports_with_a_free_batch_size(wave):
    fbank = Fbank(64)
    exported = torch.export.export(fbank, (wave,), dynamic_shapes={"wave": {0: torch.export.Dim("batch")}})
    assert_close(exported.module()(wave[:2]), fbank(wave[:2]))


def test_has_no_state_to_save():
    assert not Fbank().state_dict()


def test_an_unknown_window_is_named_with_the_choices():
    with pytest.raises(ValueError, match="'blackman'.*hanning, hamming"):
        Fbank(window="blackman")


def test_padding_looks_like_digital_silence_and_is_told_apart(wave):
    fbank = Fbank(64)
    padded, real = pad_frames(fbank(wave), 120, fbank.floor)
    silence = fbank(torch.zeros(1, 4000))
    assert torch.equal(padded[:, 98:], silence[:, :22].expand(3, -1, -1))
    assert torch.equal(real.sum(1), torch.tensor([98, 98, 98]))
    cut, real = pad_frames(fbank(wave), 50, fbank.floor)
    assert cut.shape == (3, 50, 64) and bool(real.all())


def test_zero_after_normalisation_would_look_louder_than_silence():
    floor = normalise(Fbank().floor, -4.2677, 4.5690)
    assert_close(float(floor), -1.2776, atol=1e-3, rtol=0)


def test_spec_augment_masks_one_band_each_way_per_clip_and_leaves_the_rest():
    torch.manual_seed(0)
    x = torch.rand(32, 50, 40) + 1
    y = spec_augment(x, 10, 20)
    gone = y == 0
    assert torch.equal(y[~gone], x[~gone])
    frames, bins = gone.all(2).sum(1), gone.all(1).sum(1)
    assert frames.max() <= 20 and bins.max() <= 10
    assert len(set(frames.tolist())) > 5 and len(set(bins.tolist())) > 3  # each clip its own
    starts = gone.all(2).int().diff(dim=1).eq(1).sum(1) + gone.all(2)[:, 0]
    assert starts.max() <= 1
    assert torch.equal(spec_augment(x, 0, 0), x)


def test_a_mask_wider_than_the_picture_is_allowed():
    assert spec_augment(torch.ones(8, 5, 4), 100, 100).shape == (8, 5, 4)


def test_gain_stays_within_its_range_and_keeps_the_shape():
    torch.manual_seed(0)
    db = 20 * gain(torch.ones(200, 3), 6.0).log10()
    assert_close(db[:, :1].expand(-1, 3), db)
    assert db.abs().max() <= 6 and db.std() > 2


def test_roll_keeps_the_order_around_the_circle():
    torch.manual_seed(0)
    rolled = roll(torch.arange(10.0).repeat(20, 1))
    assert torch.equal(rolled.diff(dim=1) % 10, torch.ones(20, 9))
    assert len(set(rolled[:, 0].tolist())) > 3


def test_padding_is_not_rolled_into_the_clip():
    torch.manual_seed(0)
    wave = torch.zeros(20, 10)
    wave[:, :6] = torch.arange(1.0, 7)
    rolled = roll(wave, torch.full((20,), 6))
    assert not rolled[:, 6:].any() and torch.equal(rolled[:, :6].sort(1).values, wave[:, :6])
    assert len(set(rolled[:, 0].tolist())) > 3


def test_masks_stay_on_the_real_frames():
    torch.manual_seed(0)
    x = torch.rand(64, 50, 40) + 1
    frames = torch.arange(64) % 30 + 1
    y = spec_augment(x, 10, 20, frames)
    padding = torch.arange(50) >= frames[:, None]
    assert torch.equal(y[padding], x[padding]) and (y == 0).any()
    width = (y == 0).all(2).sum(1)
    assert (width <= frames).all() and width[frames == 30].max() <= 20


def test_noise_is_so_many_decibels_below_the_real_part_and_absent_from_padding(wave):
    torch.manual_seed(1)
    length, snr_db = torch.tensor([16000, 9000, 4000]), torch.tensor([0.0, 10.0, 30.0])
    wave = wave * (torch.arange(16000) < length[:, None])
    added = add_noise(wave, 7 * torch.randn_like(wave), snr_db, length) - wave
    assert not added[1, 9000:].any() and not added[2, 4000:].any()
    measured = 10 * (wave.pow(2).sum(1) / added.pow(2).sum(1)).log10()
    assert_close(measured, snr_db, atol=1e-2, rtol=0)


def test_silence_gets_no_noise_and_silent_noise_changes_nothing(wave):
    assert not add_noise(torch.zeros(3, 100), torch.randn(3, 100), torch.zeros(3)).any()
    assert torch.equal(add_noise(wave, torch.zeros_like(wave), torch.zeros(3)), wave)


def test_pink_noise_falls_three_decibels_an_octave_and_white_noise_does_not():
    torch.manual_seed(0)
    for exponent, per_octave in ((0.0, 1.0), (1.0, 2.0)):
        power = torch.fft.rfft(coloured_noise(torch.zeros(64, 8192), exponent)).abs().pow(2).mean(0)
        assert_close(power[512:1024].mean() / power[1024:2048].mean(), torch.tensor(per_octave), rtol=0.05, atol=0)


def grid(f, t):
    """Positions whose value tells where they are: 100 row + column; CLS is -1, DIST is -2."""
    cells = 100.0 * torch.arange(f)[:, None] + torch.arange(t)
    return torch.cat([torch.tensor([-1.0, -2.0]), cells.flatten()])[None, :, None]


def test_positions_are_cut_around_the_centre_when_shorter():
    new = resize_positions(grid(4, 8), (4, 8), (2, 3))[0, :, 0]
    assert new.tolist() == [-1, -2, 102, 103, 104, 202, 203, 204]


def test_positions_are_stretched_bilinearly_when_longer():
    new = resize_positions(grid(4, 8), (4, 8), (4, 16))[0, 2:, 0].view(4, 16)
    assert_close(new[0, 1:15], torch.arange(1, 15) / 2 - 0.25)  # half-pixel centres
    assert_close(new[3] - new[0], torch.full((16,), 300.0))
    taller = resize_positions(grid(2, 8), (2, 8), (4, 8))[0, 2:, 0].view(4, 8)
    assert_close(taller[:, 0], torch.tensor([0.0, 25.0, 75.0, 100.0]))


def test_equal_grids_change_nothing():
    assert torch.equal(resize_positions(grid(3, 5), (3, 5), (3, 5)), grid(3, 5))


def test_positions_of_another_grid_are_refused():
    with pytest.raises(ValueError, match="17 positions are not 2 \\+ 4 x 4"):
        resize_positions(grid(3, 5), (4, 4), (4, 8))
