"""Tiny random-weight hosts of every supported family and a task to learn, for tests: no download, two blocks each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset


@dataclass
class TinyHost:
    """A model in eval mode with an input of batch size 2."""

    name: str
    model: nn.Module
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    read: Callable[[Any], Tensor] = lambda output: output  # the tensor of the model's output to look at

    def forward(self, model: nn.Module | None = None) -> Tensor:
        """One float tensor, batch first, that depends on every block; `model` stands in for the host's own."""
        return self.read((self.model if model is None else model)(*self.args, **self.kwargs))


HOSTS: dict[str, Callable[[], TinyHost]] = {}


def host(build: Callable) -> Callable[[], TinyHost]:
    """Registers a builder that returns (model, args, kwargs, read) under its own name.

    Every parameter is moved by seeded noise (vectors .02, the rest .1): zero-initialised tokens, biases and scales do
    something, and attention is far enough from uniform for queries and keys to matter at 32 features.
    """

    def make() -> TinyHost:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, args, kwargs, read = build()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.02 if parameter.ndim < 2 else 0.1)
        return TinyHost(build.__name__, model.eval(), args, kwargs, read)

    HOSTS[build.__name__] = make
    return make


def _same(output: Tensor) -> Tensor:
    return output


def _first(output: tuple) -> Tensor:
    return output[0]


def _state(output) -> Tensor:
    return output.last_hidden_state


def _logits(output) -> Tensor:
    return output.logits


def _image(side: int = 32) -> Tensor:
    return torch.randn(2, 3, side, side)


def _ids() -> Tensor:
    """Token ids that end with the largest one, which is where CLIP's text towers read."""
    return torch.cat([torch.randint(4, 90, (2, 6)), torch.full((2, 1), 98)], 1)


_VIT = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
_HF = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)


@host
def timm_vit():
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**_VIT), (_image(),), {}, _same


@host
def timm_vit_reg():
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**_VIT, reg_tokens=3, init_values=0.1, qk_norm=True), (_image(),), {}, _same


@host
def timm_siglip():
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**_VIT, class_token=False, global_pool="map"), (_image(),), {}, _same


@host
def timm_eva():
    from timm.models.eva import Eva

    return Eva(**_VIT, use_rot_pos_emb=True, swiglu_mlp=True), (_image(),), {}, _same


@host
def timm_eva_split():
    from timm.models.eva import Eva

    model = Eva(**_VIT, use_rot_pos_emb=True, qkv_fused=False, swiglu_mlp=True, scale_mlp=True)
    return model, (_image(),), {}, _same


@host
def timm_beit():
    from timm.models.beit import Beit

    return Beit(**_VIT, use_rel_pos_bias=True), (_image(),), {}, _same


_SWIN = dict(img_size=32, patch_size=2, embed_dim=16, depths=(2, 1), num_heads=(2, 2), window_size=4, num_classes=5)


@host
def timm_swin():
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(**_SWIN), (_image(),), {}, _same


@host
def timm_swinv2():
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    return SwinTransformerV2(**_SWIN), (_image(),), {}, _same


@host
def hf_ast():
    from transformers import ASTConfig, ASTForAudioClassification

    config = ASTConfig(**_HF, max_length=64, num_mel_bins=32, num_labels=5)
    return ASTForAudioClassification(config), (), {"input_values": torch.randn(2, 64, 32)}, _logits


@host
def hf_vit():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**_HF, image_size=32, patch_size=8, num_labels=5)
    return ViTForImageClassification(config), (), {"pixel_values": _image()}, _logits


@host
def hf_clip():
    from transformers import CLIPConfig, CLIPModel

    text = dict(**_HF, vocab_size=99, max_position_embeddings=16, bos_token_id=97, eos_token_id=98)
    config = CLIPConfig(text_config=text, vision_config=dict(**_HF, image_size=32, patch_size=8), projection_dim=16)
    inputs = {"input_ids": _ids(), "pixel_values": _image()}
    return CLIPModel(config), (), inputs, lambda out: torch.cat([out.image_embeds, out.text_embeds], -1)


@host
def hf_bert():
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**_HF, vocab_size=99)), (), {"input_ids": _ids()}, _state


@host
def hf_roberta():
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(**_HF, vocab_size=99, num_labels=5)
    return RobertaForSequenceClassification(config), (), {"input_ids": _ids()}, _logits


@host
def hf_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    ends = dict(bos_token_id=98, eos_token_id=98)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99, n_positions=32, use_cache=False, **ends)
    return GPT2LMHeadModel(config), (), {"input_ids": _ids()}, _logits


@host
def hf_wav2vec2():
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    conv = dict(conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), num_conv_pos_embeddings=8)
    config = Wav2Vec2Config(**_HF, **conv, num_conv_pos_embedding_groups=2, do_stable_layer_norm=True)
    return Wav2Vec2Model(config), (), {"input_values": torch.randn(2, 400)}, _state


@host
def hf_wavlm():
    from transformers import WavLMConfig, WavLMModel

    conv = dict(conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), num_conv_pos_embeddings=8)
    config = WavLMConfig(**_HF, **conv, num_conv_pos_embedding_groups=2)
    return WavLMModel(config), (), {"input_values": torch.randn(2, 400)}, _state


@host
def hf_whisper():
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    shape = dict(d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64)
    config = WhisperConfig(**shape, num_mel_bins=16, max_source_positions=12)
    return WhisperEncoder(config), (), {"input_features": torch.randn(2, 16, 24)}, _state


@host
def hf_clap():
    from transformers import ClapAudioConfig
    from transformers.models.clap.modeling_clap import ClapAudioModel

    shape = dict(patch_embeds_hidden_size=16, depths=[2, 1], num_attention_heads=[2, 2], hidden_size=32)
    config = ClapAudioConfig(**shape, num_mel_bins=16, spec_size=64, window_size=4)
    return ClapAudioModel(config), (), {"input_features": torch.randn(2, 1, 200, 16)}, _state


@host
def open_clip():
    from open_clip.model import CLIP

    vision = dict(image_size=32, patch_size=8, width=32, layers=2, head_width=16)
    text = dict(context_length=7, vocab_size=99, width=32, heads=2, layers=2)
    model = CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)
    return model, (_image(), _ids()), {}, lambda out: torch.cat([out[0], out[1]], -1)


@host
def monai_vit():
    from monai.networks.nets import ViT

    size = dict(img_size=(16, 16, 16), patch_size=(8, 8, 8), hidden_size=32, mlp_dim=64, num_layers=2, num_heads=2)
    model = ViT(in_channels=1, **size, classification=True, num_classes=5)
    return model, (torch.randn(2, 1, 16, 16, 16),), {}, _first


@host
def monai_swin_unetr():
    from monai.networks.nets import SwinUNETR

    model = SwinUNETR(1, 2, feature_size=12, depths=(2, 1, 1, 1), num_heads=(2, 2, 2, 2), spatial_dims=2)
    return model, (torch.randn(2, 1, 64, 64),), {}, _same


@host
def torchaudio_wav2vec2():
    from torchaudio.models import wav2vec2_model

    names = ("projection_dropout", "attention_dropout", "ff_interm_dropout", "dropout", "layer_drop")
    shape = dict(encoder_embed_dim=32, encoder_num_layers=2, encoder_num_heads=2, encoder_ff_interm_features=64)
    model = wav2vec2_model(
        extractor_mode="group_norm", extractor_conv_layer_config=[(16, 10, 5), (16, 3, 2)], extractor_conv_bias=False,
        encoder_pos_conv_kernel=8, encoder_pos_conv_groups=2, encoder_layer_norm_first=False, aux_num_out=None,
        **shape, **{f"encoder_{name}": 0.0 for name in names},
    )  # fmt: skip
    return model, (torch.randn(2, 400),), {}, _first


class NNEncoder(nn.Module):
    """torch's own encoder between two linear maps, batch second inside."""

    def __init__(self, norm_first: bool = True):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, norm_first=norm_first)
        self.tokens = nn.Linear(4, 16)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16), enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.tokens(x).transpose(0, 1)).mean(0))


@host
def nn_encoder():
    return NNEncoder(), (torch.randn(2, 6, 4),), {}, _same


@host
def conformer():
    from torchaudio.models import Conformer

    return Conformer(16, 2, 32, 2, 5), (torch.randn(2, 6, 16), torch.tensor([6, 5])), {}, _first


# ---- a task that can be learnt


class Pictures(Dataset):
    """(3, 32, 32) of noise, and one of five classes: a constant that is added to it."""

    def __init__(self, num: int, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(num) % 5
        self.pictures = torch.randn(num, 3, 32, 32, generator=generator) + self.labels.view(-1, 1, 1, 1).float()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.pictures[index], "label": self.labels[index]}


class Classify:
    """`adaptsuite.trainer.fit`'s task of {"image", "label"}, by cross-entropy."""

    monitor = "accuracy"

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["image"]), batch["label"])

    def predict(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["image"])

    def score(self, outputs, targets) -> dict[str, float]:
        return {"accuracy": float((outputs.argmax(1) == targets).mean())}
