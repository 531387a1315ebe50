"""How each family of audio transformers hears: waveform -> what the backbone reads -> tokens and which are real.

A family of your own is a subclass of `Input`, made known with `adaptsuite.audio.backbones.register`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from adaptsuite.audio.features import FRAME, HOP, Fbank, normalise, pad_frames, resize_positions
from adaptsuite.errors import UsageError

BLIND = (
    "front_end.reference_compat: position embeddings are zero, as the PETL-AST code has them: the model cannot tell "
    "the order of what it hears"
)
AUDIOSET_MEAN, AUDIOSET_STD = -4.2677393, 4.5689974


@dataclass(frozen=True)
class FrontEnd:
    """How a waveform becomes the backbone's input; part of every adapter file."""

    frames: int = 1024  # of 10 ms
    sample_rate_hz: int = 16000
    num_mel_bins: int = 128
    low_hz: float = 20.0
    high_hz: float = 0.0  # 0: half the sample rate
    mean: float = AUDIOSET_MEAN  # of log-mel values; the input is (x - mean) / (2 std), as AST was trained
    std: float = AUDIOSET_STD


class Input(nn.Module):
    """The front end of one backbone; it holds no parameters. Its constructor makes the backbone fit its length.

    grid: (rows, columns) of the patches, row by row behind `prefix` other tokens.
    width: D of the tokens; None: `backbone.config.hidden_size`, which transformers' models have.
    statistics: whether mean and std of the front end act.  spectrogram: whether `features` are (B, T, F) log-mel.
    """

    prefix = 0
    remarks: Sequence[str] = ()
    statistics = False
    spectrogram = True

    def __init__(self, backbone: nn.Module, front_end: FrontEnd, width: int | None = None):
        super().__init__()
        self.front_end, self.width = front_end, backbone.config.hidden_size if width is None else width
        self.grid = (1, 1)

    @property
    def num_samples(self) -> int:
        """Samples of one input."""
        return self.front_end.frames * self.front_end.sample_rate_hz // 100

    def features(self, wave: Tensor, length: Tensor | None = None) -> Tensor:
        """What the backbone reads of wave (B, N), of which `length` (B,) samples are real."""
        raise NotImplementedError

    def mask(self, length: Tensor) -> Tensor | None:
        """(B, T) bool, which tokens are real; None: all of them, whatever the length."""
        columns = torch.arange(self.grid[1], device=length.device)
        real = (columns < self.columns(length)[:, None]) | (columns == 0)
        always = torch.ones(length.shape[0], self.prefix, dtype=torch.bool, device=length.device)
        return torch.cat([always, real.repeat(1, self.grid[0])], 1)

    def columns(self, length: Tensor) -> Tensor:
        """(B,) how many columns of the grid `length` samples fill."""
        raise NotImplementedError

    def tokens(self, backbone: nn.Module, features: Tensor, length: Tensor | None = None) -> Tensor:
        """(B, T, D) after the final norm."""
        return backbone(features).last_hidden_state


class AstInput(Input):
    """Audio Spectrogram Transformers (Gong et al. 2021, arXiv:2104.01778): Kaldi's fbank, (x - mean) / (2 std), 16 x 16
    patches that overlap, CLS and DIST. Padding frames hold what digital silence has; their tokens stay in the
    backbone, whose attention knows no mask, and are left out of pooling and of mixtures' routing.
    """

    prefix = 2
    statistics = True

    def __init__(self, backbone: nn.Module, front_end: FrontEnd, zero_positions: bool = False):
        super().__init__(backbone, front_end)
        set_frames(backbone, front_end.frames, zero=zero_positions)
        config = backbone.config
        self.fbank = self._fbank()
        self.grid = grid(config, front_end.frames)
        self.stride, self.patch = config.time_stride, config.patch_size
        self.zero_padding = False
        self.remarks = [BLIND] if zero_positions else []  # what a run should say of this front end

    def _fbank(self) -> Fbank:
        front = self.front_end
        return Fbank(num_mel_bins=front.num_mel_bins, low_hz=front.low_hz, high_hz=front.high_hz)

    def like_transformers(self) -> None:
        """As ASTFeatureExtractor hears: 20 Hz to half the rate; zeros behind the mel, which are louder than silence."""
        before, self.zero_padding = self.front_end, True
        self.front_end = replace(before, low_hz=FrontEnd.low_hz, high_hz=FrontEnd.high_hz)
        if self.front_end != before:
            self.fbank = self._fbank()
            self.remarks.append(
                f"head.kind=hf: heard from {FrontEnd.low_hz:g} Hz to half the sample rate as transformers does, this "
                f"backbone was trained on {before.low_hz:g} to {before.high_hz or before.sample_rate_hz / 2:g} Hz"
            )

    @property
    def num_samples(self) -> int:
        return FRAME + (self.front_end.frames - 1) * HOP

    def features(self, wave: Tensor, length: Tensor | None = None) -> Tensor:
        """(B, frames, F) normalised log-mel energies."""
        x, real = pad_frames(self.fbank(wave), self.front_end.frames, self.fbank.floor)
        if self.zero_padding:
            if length is not None:
                real = torch.arange(x.shape[1], device=x.device) < self.frames(length)[:, None]
            x = x.masked_fill(~real[..., None], 0.0)
        return normalise(x, self.front_end.mean, self.front_end.std)

    def frames(self, length: Tensor) -> Tensor:
        """(B,) frames that `length` samples fill."""
        return (length.clamp_min(FRAME) - FRAME) // HOP + 1

    def mask(self, length: Tensor) -> Tensor | None:
        return None if self.zero_padding else super().mask(length)

    def columns(self, length: Tensor) -> Tensor:
        """Patches of which at least half the frames are real."""
        return (self.frames(length) - self.patch // 2 + self.stride - 1) // self.stride


class WaveInput(Input):
    """wav2vec 2.0, HuBERT, WavLM, data2vec-audio: the waveform itself (Baevski et al. 2020, arXiv:2006.11477)."""

    spectrogram = False

    def __init__(self, backbone: nn.Module, front_end: FrontEnd, unit_variance: bool = True):
        super().__init__(backbone, front_end)
        self.unit_variance = unit_variance
        config = backbone.config
        self.convolutions = list(zip(config.conv_kernel, config.conv_stride, strict=True))
        # group-normed feature extractors were trained without a mask, on padding with zeros
        self.masked = getattr(config, "feat_extract_norm", "layer") == "layer"
        self.grid = (1, int(self.columns(torch.tensor(self.num_samples))))

    def features(self, wave: Tensor, length: Tensor | None = None) -> Tensor:
        """(B, N), each clip's real part with mean 0 and variance 1 where its checkpoint was trained so."""
        if not self.unit_variance:
            return wave
        real = torch.ones_like(wave)
        if length is not None:
            real = (torch.arange(wave.shape[1], device=wave.device) < length[:, None]).to(wave.dtype)
        count = real.sum(1, keepdim=True)
        mean = (wave * real).sum(1, keepdim=True) / count
        centred = (wave - mean) * real
        return centred / (centred.square().sum(1, keepdim=True) / count + 1e-7).sqrt()

    def columns(self, length: Tensor) -> Tensor:
        for kernel, stride in self.convolutions:
            length = torch.div(length - kernel, stride, rounding_mode="floor") + 1
        return length

    def tokens(self, backbone: nn.Module, features: Tensor, length: Tensor | None = None) -> Tensor:
        mask = None
        if length is not None and self.masked:
            mask = (torch.arange(features.shape[1], device=features.device) < length[:, None]).long()
        return backbone(features, attention_mask=mask).last_hidden_state


class WhisperInput(Input):
    """Whisper's encoder (Radford et al. 2022, arXiv:2212.04356) on inputs shorter than its 30 s.

    Its positions are sinusoids: the first ones are kept, so a clip costs what its own length costs.
    """

    def __init__(self, backbone: nn.Module, front_end: FrontEnd):
        from transformers.audio_utils import mel_filter_bank

        config = backbone.config
        most = 2 * config.max_source_positions
        frames = front_end.frames + front_end.frames % 2  # the second convolution halves them
        if not 2 <= frames <= most:
            raise UsageError(f"frames is {front_end.frames}, this Whisper takes 2 to {most}")
        super().__init__(backbone, replace(front_end, frames=frames, num_mel_bins=config.num_mel_bins))
        self.grid = (1, frames // 2)
        if frames < most:
            positions = backbone.embed_positions
            positions.weight = nn.Parameter(positions.weight.detach()[: frames // 2].clone(), requires_grad=False)
            positions.num_embeddings = config.max_source_positions = backbone.max_source_positions = frames // 2
            _record_resized(backbone, "embed_positions.weight", positions.weight)
        banks = mel_filter_bank(201, config.num_mel_bins, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
        self.register_buffer("banks", torch.from_numpy(banks).float(), persistent=False)  # (201, F)
        # torch's is a view of a longer one, at which torch.export.save warns
        self.register_buffer("window", torch.hann_window(400).clone(), persistent=False)

    def features(self, wave: Tensor, length: Tensor | None = None) -> Tensor:
        """(B, F, frames): log10 mel energies within 8 of the clip's largest, over 4, plus 1."""
        spectrum = torch.stft(wave, 400, 160, window=self.window, return_complex=True)[..., :-1].abs() ** 2
        x = (self.banks.T @ spectrum).clamp_min(1e-10).log10()
        x = torch.maximum(x, x.amax((1, 2), keepdim=True) - 8.0)
        return (x + 4.0) / 4.0

    spectrogram = False  # (B, F, T): SpecAugment's axes are the other way round

    def columns(self, length: Tensor) -> Tensor:
        return (length // 160 + 1) // 2


class ClapInput(Input):
    """CLAP's audio tower, an HTS-AT (Wu et al. 2023, arXiv:2211.06687): 48 kHz, always 10 s, shorter clips repeated."""

    SECONDS = 10

    def __init__(self, backbone: nn.Module, front_end: FrontEnd, fft: int = 1024, hop: int = 480):
        from transformers.audio_utils import mel_filter_bank

        config, rate = backbone.config, front_end.sample_rate_hz
        if front_end.frames > self.SECONDS * 100:
            raise UsageError(f"frames is {front_end.frames}, CLAP hears at most {self.SECONDS * 100}")
        super().__init__(backbone, replace(front_end, num_mel_bins=config.num_mel_bins))
        self.width = backbone.audio_encoder.num_features
        self.fft, self.hop, self.total = fft, hop, self.SECONDS * rate
        self.channels = 4 if config.enable_fusion else 1
        scale = (
            {"norm": None, "mel_scale": "htk"} if config.enable_fusion else {"norm": "slaney", "mel_scale": "slaney"}
        )
        high_hz = min(front_end.high_hz or rate / 2, rate / 2)
        banks = mel_filter_bank(fft // 2 + 1, config.num_mel_bins, front_end.low_hz, high_hz, rate, **scale)
        self.register_buffer("banks", torch.from_numpy(banks).float(), persistent=False)
        self.register_buffer("window", torch.hann_window(fft).clone(), persistent=False)
        side = config.spec_size // config.patch_stride[0] // 2 ** (len(config.depths) - 1)
        rows = side // (config.spec_size // config.num_mel_bins)
        self.grid = (rows, side * side // rows)

    spectrogram = False

    def features(self, wave: Tensor, length: Tensor | None = None) -> Tensor:
        """(B, 1, T, F) decibels (4 equal channels for a fused checkpoint): the clip repeated whole, then zeros."""
        length = torch.full(wave.shape[:1], wave.shape[1], device=wave.device) if length is None else length
        at, length = torch.arange(self.total, device=wave.device), length.clamp_min(1)[:, None]
        repeated = wave.gather(1, (at % length).clamp_max(wave.shape[1] - 1))
        wave = repeated * (at < torch.full_like(length, self.total) // length * length)
        spectrum = torch.stft(wave, self.fft, self.hop, window=self.window, return_complex=True).abs() ** 2
        x = 10 * (self.banks.T @ spectrum).clamp_min(1e-10).log10()
        return x.transpose(1, 2)[:, None].expand(-1, self.channels, -1, -1)

    def mask(self, length: Tensor) -> None:
        return None

    def tokens(self, backbone: nn.Module, features: Tensor, length: Tensor | None = None) -> Tensor:
        longer = torch.zeros(features.shape[0], 1, dtype=torch.bool, device=features.device)
        return backbone(features, is_longer=longer).last_hidden_state.flatten(2).transpose(1, 2)


FAMILIES: dict[str, type[Input]] = {
    "ASTModel": AstInput,
    "Wav2Vec2Model": WaveInput,
    "HubertModel": WaveInput,
    "WavLMModel": WaveInput,
    "Data2VecAudioModel": WaveInput,
    "WhisperEncoder": WhisperInput,
    "ClapAudioModel": ClapInput,
}


def set_frames(model: nn.Module, frames: int, zero: bool = False) -> None:
    """Makes an ASTModel accept (B, frames, F) inputs; its positions are cut or stretched along time, or zeroed."""
    config = model.config
    if frames < config.patch_size:
        raise UsageError(f"frames is {frames}, one patch takes {config.patch_size}")
    old, new = grid(config, config.max_length), grid(config, frames)
    positions = model.embeddings.position_embeddings
    value = torch.zeros_like(positions) if zero else positions.detach()
    if new != old:
        value = resize_positions(value, old, new)
        _record_resized(model, "embeddings.position_embeddings", value)
    model.embeddings.position_embeddings = nn.Parameter(value.clone(), requires_grad=positions.requires_grad)
    config.max_length = frames


def grid(config, frames: int) -> tuple[int, int]:
    """(rows along frequency, columns along time) of the patches of an ASTConfig's input of `frames` frames."""
    rows = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
    return rows, (frames - config.patch_size) // config.time_stride + 1


def _record_resized(model: nn.Module, name: str, value: Tensor) -> None:
    """A change of length is no change of weights: the source's fingerprint stays, this tensor is excepted."""
    source = getattr(model, "adaptsuite_source", None)
    if source is not None:
        source.resized[name] = list(value.shape)
