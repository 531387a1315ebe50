"""Finds the places in a host where adapters can live, by role and never by name suffix.

A model is walked once for blocks. A block is any module whose parts match one row of `LAYOUTS` (by the names AND the
widths of the parts), wherever it sits, so task models, two-tower models and backbones of other libraries work alike.
Roles: attn.q attn.k attn.v attn.qkv attn.out attn mlp.in mlp.out mlp block norm patch_embed cls head pointwise; a role
with a question mark behind it ("patch_embed?") is taken where a host has it. `pointwise` are linear layers and 1 x 1
convolutions outside blocks that have no other role: patch merging, decoders, attention pooling.
Attention to another sequence, inside decoder blocks, has the roles cross.q cross.k cross.v cross.out cross; its keys
and values read that sequence. "language_model:attn.q" is a role in one component alone.
A block of your own is found when its parts have the names of one row. Where its norms stand it says itself, by the
`norm_first` of torch's encoder layers: False for x = norm(x + attn(x)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

BANK = "adapter_bank"  # submodule of an adapted host that holds the adapters: never searched

ROLES = (
    "attn.q", "attn.k", "attn.v", "attn.qkv", "attn.out", "attn", "cross.q", "cross.k", "cross.v", "cross.out", "cross",
    "mlp.in", "mlp.out", "mlp", "block", "norm", "patch_embed", "cls", "head", "pointwise",
)  # fmt: skip


@dataclass(frozen=True)
class Site:
    """One place of a host: the output of a called module, or (part of) a weight.

    A module site's y is the output of `path` (the first element when that is a tuple) and x its first argument
    (positional, or by keyword as transformers' CLIP does), unless `carrier` names the call that holds x.
    In windowed hosts (Swin) an `attn` site sees (B * windows, T, D); a Swin `block` sees (B, H, W, D).
    """

    role: str
    path: str  # dotted path of the module whose output or weight this is
    block: int | None  # running index over the component's blocks; None outside blocks
    dim: int  # width read: in_features of a weight (kernel included for "conv"), D of a module
    dim_out: int  # width written: rows of the part of a weight, D of a module
    weight: str | None = None  # weight sites: the parameter's name at `path`
    bias: str | None = None  # its bias, cut by the same rows; None when there is none or it is elsewhere (EVA, BEiT)
    rows: tuple[int, int] | None = None  # output features of a fused weight that are this part; None: all of them
    layout: str = "linear"  # "linear" (out, in) | "conv1d" (in, out: rows are columns) | "conv" (out, in, *kernel)
    norm: str | None = None  # the norm that the site's input has passed last
    carrier: tuple[str, int] | None = None  # (module, positional argument): the call, earlier than y, that holds x
    batch_first: bool = True  # False: the module gets (T, B, D)
    component: str = ""  # prefix of the sub-model, as in Component
    prefix_tokens: int = 0  # CLS, distillation and register tokens in front of the others, where known
    depth: int = 0  # blocks of the component
    causal: bool = False  # its tokens see no later ones, as far as the attention itself tells

    @property
    def key(self) -> str:
        """A name without dots, unique over all roles of a host (a part listed under two roles is one site)."""
        shared = self.rows is not None or self.weight not in (None, "weight") or self.carrier is not None
        return self.path.replace(".", "/") + (f":{self.role.split('.')[-1]}" if shared else "")


@dataclass(frozen=True)
class Component:
    """A sub-model with its own run of blocks.

    `prefix` is its path in the host; open_clip's CLIP keeps its text tower on the root, that one is named "text".
    `final_norm` is the norm with weights after the last block; in average-pooled timm models it is `fc_norm`, which
    sees (B, D). `head` is the nearest task head at or above the component.
    """

    prefix: str
    family: str  # library.Class
    num_blocks: int
    final_norm: str | None
    head: str | None
    num_prefix_tokens: int  # CLS, distillation and register tokens in front of the patches


@dataclass(frozen=True)
class Layout:
    """How one kind of block names its parts, relative to the block."""

    attn: str  # the attention module
    norm: str  # norm of the attention half
    mlps: tuple[tuple[str, str], ...]  # (module with the MLP's weights, "" for the block itself; norm of that half)
    pre_norm: bool | Callable[[nn.Module], bool] = True  # whether norms stand before their half; `norm_first` wins
    attn_site: str | None = None  # where the attention's output before the residual is, when not at `attn`
    attn_carrier: tuple[str, int] | None = None
    mlp_carrier: tuple[str, int] | None = None


def _not_res_post(block: nn.Module) -> bool:
    """Same names, but x + norm(attn(x)): the norms stand after their half."""
    return type(block).__name__ not in {
        "SwinTransformerV2Block", "SwinTransformerV2CrBlock", "Swinv2Layer", "ResPostBlock", "ResPostRelPosBlock",
        "EvaBlockPostNorm",
    }  # fmt: skip


def _bart_pre_norm(block: nn.Module) -> bool:
    """Fairseq's descendants share the names; BART and Marian are post-norm, these are not."""
    named = type(block).__name__.startswith(("Whisper", "MBart", "Pegasus", "M2M100", "Speech2Text", "XGLM"))
    return getattr(block, "do_layer_norm_before", named)


def _wav2vec2_pre_norm(block: nn.Module) -> bool:
    return getattr(block, "layer_norm_first", "StableLayerNorm" in type(block).__name__)


LAYOUTS = (
    Layout("attn", "norm1", (("mlp", "norm2"),), _not_res_post),  # timm, MONAI
    Layout("attn", "ln_1", (("mlp", "ln_2"),)),  # GPT-2, open_clip
    Layout("attention", "layernorm_before", (("mlp", "layernorm_after"),)),  # ViT, DeiT, AST, Swin
    Layout("attention", "layernorm_before", (("", "layernorm_after"),), _not_res_post),  # VideoMAE, SwinV2
    Layout("attention", "norm1", (("mlp", "norm2"),)),  # DINOv2, DINOv3
    Layout("self_attn", "layer_norm1", (("mlp", "layer_norm2"),)),  # CLIP, SigLIP
    Layout("attention", "layer_norm", (("feed_forward", "final_layer_norm"),), _wav2vec2_pre_norm),  # torchaudio too
    Layout("attention", "attention.output.LayerNorm", (("", "output_query.LayerNorm"),), False,
           "attention.output.dense", ("attention.output", 1), ("output_query", 1)),  # BLIP-2's Q-Former
    Layout("attention", "attention.output.LayerNorm", (("", "output.LayerNorm"),), False,
           "attention.output.dense", ("attention.output", 1), ("output", 1)),  # BERT, RoBERTa, ELECTRA
    Layout("attention.attn", "attention.LayerNorm", (("", "output.LayerNorm"),), False,
           mlp_carrier=("output", 1)),  # MPNet
    Layout("attention", "attention.LayerNorm", (("", "full_layer_layer_norm"),), False,
           "attention.dense", ("attention", 0)),  # ALBERT
    Layout("attention", "sa_layer_norm", (("ffn", "output_layer_norm"),), False),  # DistilBERT
    Layout("attn", "attn_norm", (("mlp", "mlp_norm"),)),  # ModernBERT
    Layout("self_attn", "self_attn_layer_norm", (("ffn1", "ffn1_layer_norm"), ("ffn2", "ffn2_layer_norm"))),
    Layout("self_attn", "self_attn_layer_norm",
           (("ffn1.sequential", "ffn1.sequential.0"), ("ffn2.sequential", "ffn2.sequential.0"))),  # Conformer
    Layout("self_attn", "self_attn_layer_norm", (("", "final_layer_norm"),), _bart_pre_norm),  # BART, Whisper, OPT
    Layout("self_attn", "norm1", (("", "norm3"),)),  # nn.TransformerDecoderLayer
    Layout("self_attn", "norm1", (("", "norm2"),)),  # nn.TransformerEncoderLayer
    Layout("self_attn", "input_layernorm", (("mlp", "pre_feedforward_layernorm"),)),  # Gemma 2, 3
    Layout("self_attn", "input_layernorm", (("mlp", "post_attention_layernorm"),)),  # Llama, Mistral, Qwen, Phi-3
    Layout("attention", "input_layernorm", (("mlp", "post_attention_layernorm"),)),  # GPT-NeoX
    Layout("layer.0.SelfAttention", "layer.0.layer_norm", (("layer.1.DenseReluDense", "layer.1.layer_norm"),)),  # T5
    Layout("layer.0.SelfAttention", "layer.0.layer_norm", (("layer.2.DenseReluDense", "layer.2.layer_norm"),)),
)  # fmt: skip

# inside an attention module
HOLDERS = ("", "self", "attention", "attn")  # some keep the projections one module deeper
SEPARATE = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"),
    ("to_q", "to_k", "to_v"), ("linear_q", "linear_k", "linear_v"),
)  # fmt: skip
FUSED = ("qkv", "c_attn", "Wqkv", "qkv_proj", "query_key_value")
OUT = ("out_proj", "o_proj", "proj", "c_proj", "dense", "output.dense", "out_lin", "o", "Wo", "linear_out")

# Attention classes whose fused weight is all of q, then all of k, then all of v. Others may interleave them by head
# (GPT-NeoX, LeViT, MaxViT), which no range of rows can express. Add a class of your own here.
IN_ORDER = {
    "timm.layers.attention.Attention", "timm.layers.attention.AttentionRope", "timm.models.eva.EvaAttention",
    "timm.models.vision_transformer.Attention", "timm.models.beit.Attention", "timm.models.hiera.MaskUnitAttention",
    "timm.models.swin_transformer.WindowAttention", "timm.models.swin_transformer_v2.WindowAttention",
    "timm.models.vision_transformer_sam.Attention", "timm.models.vision_transformer_relpos.RelPosAttention",
    "monai.networks.blocks.selfattention.SABlock", "monai.networks.nets.swin_unetr.WindowAttention",
    "transformers.models.gpt2.modeling_gpt2.GPT2Attention", "transformers.models.phi3.modeling_phi3.Phi3Attention",
    "transformers.models.modernbert.modeling_modernbert.ModernBertAttention", "open_clip.transformer.Attention",
    "torch.nn.modules.activation.MultiheadAttention", "transformers.models.blip_2.modeling_blip_2.Blip2Attention",
    "transformers.models.blip.modeling_blip.BlipAttention",
}  # fmt: skip

# inside an MLP module: (the layers that read the tokens, the layer that writes them)
MLPS = (
    (("fc1",), "fc2"), (("fc1_g", "fc1_x"), "fc2"), (("w12",), "w3"), (("w1", "w2"), "w3"), (("linear1",), "linear2"),
    (("c_fc",), "c_proj"), (("intermediate_dense",), "output_dense"), (("intermediate.dense",), "output.dense"),
    (("intermediate_query.dense",), "output_query.dense"),
    (("gate_proj", "up_proj"), "down_proj"), (("gate_up_proj",), "down_proj"), (("up_proj",), "down_proj"),
    (("wi_0", "wi_1"), "wo"), (("wi",), "wo"), (("lin1",), "lin2"), (("Wi",), "Wo"), (("ffn",), "ffn_output"),
    (("weights_in",), "weights_out"), (("dense_h_to_4h",), "dense_4h_to_h"),
)  # fmt: skip

# children that mark the root of a component: what turns its input into tokens
INPUTS = (
    "patch_embed", "patch_embedding", "embeddings", "embeds", "feature_extractor", "embed_tokens", "embed_positions",
    "embed_in", "token_embedding", "wte", "conv1",
)  # fmt: skip
PATCHES = (
    "patch_embed.proj", "patch_embedding.patch_embeddings", "patch_embedding.patch_embeddings.1", "embeds.proj",
    "embeddings.patch_embeddings.projection", "embeddings.patch_embeddings", "embeddings.patch_embedding", "conv1",
)  # fmt: skip
FINAL_NORMS = (
    "norm", "fc_norm", "layernorm", "pooler.layernorm", "post_layernorm", "final_layer_norm", "final_norm",
    "layer_norm", "ln_f", "ln_post", "ln_final", "encoder.norm", "encoder.layer_norm", "encoder.transformer.layer_norm",
)  # fmt: skip
# before the blocks of post-norm hosts
EARLY_NORMS = ("encoder.layer_norm", "encoder.transformer.layer_norm", "embeddings.LayerNorm")
CROSS = ("encoder_attn", "multihead_attn", "crossattention", "layer.1.EncDecAttention")  # to another sequence
HEADS = (
    "head", "heads", "classifier", "classification_head", "score", "lm_head", "cls", "qa_outputs", "out", "fc", "myfc",
)  # fmt: skip
CLS_TOKENS = ("cls_token", "class_embedding", "class_token")
PREFIXES = (*CLS_TOKENS, "dist_token", "distillation_token", "reg_token", "register_tokens")


def find_sites(model: nn.Module, roles: str | Sequence[str]) -> list[Site]:
    """The sites of one or several roles, in the order of the roles, then of the model.

    Raises LookupError when a role without "?" has no match, listing what there is, and when a fused weight's order is
    not known.
    """
    everywhere, blocked = _index(model)
    sites: dict[str, Site] = {}
    for wanted in [roles] if isinstance(roles, str) else roles:
        component, _, role = wanted.rpartition(":")
        prefixes = component_prefixes(model, component) if component else None
        found = everywhere if prefixes is None else _within(prefixes, everywhere)
        if role.endswith("?") and role[:-1] in ROLES:
            role = role[:-1]
            if not found[role] or role in blocked:
                continue
        closed = [path for c, path in blocked.get(role, {}).items() if prefixes is None or c in prefixes]
        if closed:
            raise LookupError(f"site {role!r} cannot be cut out of {closed[0]}; take 'attn.qkv'")
        if not found.get(role):
            has = ", ".join(name for name in ROLES if found.get(name))
            has = has if found["block"] else "; ".join(filter(None, ("no block of a known layout", has)))
            named = [name for name in ROLES if any(site.path.endswith(f".{role}") for site in found[name])]
            hint = f"; sites are roles, modules named {role!r} are {' and '.join(named)} here" if named else ""
            raise LookupError(f"site {role!r} is not in {component or _families(model)}; it has: {has}{hint}")
        for site in found[role]:
            sites.setdefault(site.key, site)
    return list(sites.values())


def _within(prefixes: list[str], found: dict[str, list[Site]]) -> dict[str, list[Site]]:
    return {role: [site for site in sites if site.component in prefixes] for role, sites in found.items()}


def component_prefixes(model: nn.Module, name: str) -> list[str]:
    """Prefixes of the components that a name stands for: the prefix, a path above it, or one part of it.

    `vision_tower` is model.vision_tower, and `decoder` is language_model.model.decoder. Raises LookupError for others.
    """
    known = [tower.info.prefix for tower in _towers(model)]
    found = [p for p in known if p == name or p.startswith(f"{name}.") or name in p.split(".")]
    if not found:
        has = ", ".join(filter(None, known)) or "one component without a name"
        raise LookupError(f"component {name!r} is not in the model; it has: {has}")
    return found


def roles(model: nn.Module) -> dict[str, int]:
    """How many sites each role has; roles without a site are left out."""
    found, blocked = _index(model)
    return {role: len(found[role]) for role in ROLES if found.get(role) and role not in blocked}


def patch_maps(model: nn.Module) -> dict[str, str]:
    """Prefix of a component -> the module whose output (B, D, *grid) becomes its patches, row by row."""
    found = {}
    for tower in _towers(model):
        root = _at(model, tower.root)
        path = next((path for path in PATCHES if isinstance(_at(root, path), nn.Module)), None)
        if path is not None:
            found[tower.info.prefix] = _join(tower.root, path)
    return found


def component_info(model: nn.Module) -> list[Component]:
    """The sub-models that have blocks, in the order of the model."""
    return [tower.info for tower in _towers(model)]


# ---- blocks ----


@dataclass(frozen=True)
class _Weight:
    path: str
    dim: int
    dim_out: int
    weight: str = "weight"
    bias: str | None = None
    rows: tuple[int, int] | None = None
    layout: str = "linear"

    def part(self, start: int, stop: int) -> _Weight:
        return replace(self, rows=(start, stop), dim_out=stop - start)


@dataclass
class _Block:
    """A matched block; all paths are relative to it."""

    layout: Layout
    pre_norm: bool  # x + attn(norm(x))
    post_norm: bool  # norm(x + attn(x)); neither where it is x + norm(attn(x))
    attention: dict[str, list[_Weight]]  # role -> weights
    mlps: list[tuple[str, str, list[_Weight], _Weight]]  # module, norm, in, out
    batch_first: bool
    blocked: str | None  # why q, k and v cannot be told apart
    path: str = ""

    @property
    def dim(self) -> int:
        return self.attention["attn.qkv"][0].dim


def _at(module: nn.Module, path: str):
    """The attribute at a dotted path, None when a step is missing."""
    for name in path.split(".") if path else ():
        module = getattr(module, name, None)
    return module


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _weight(module: nn.Module, path: str) -> _Weight | None:
    """The weight matrix of a Linear, transformers' Conv1D or a convolution at `path`."""
    layer = _at(module, path)
    weight = getattr(layer, "weight", None)
    if not isinstance(layer, nn.Module) or not isinstance(weight, torch.Tensor) or isinstance(layer, nn.Embedding):
        return None
    bias = None if getattr(layer, "bias", None) is None else "bias"
    if type(layer).__name__ == "Conv1D":
        return _Weight(path, weight.shape[0], weight.shape[1], bias=bias, layout="conv1d")
    if hasattr(layer, "in_features"):  # not the weight's shape: quantised layers pack it
        return _Weight(path, layer.in_features, layer.out_features, bias=bias)
    if weight.ndim > 3 and hasattr(layer, "kernel_size"):
        return _Weight(path, weight[0].numel(), weight.shape[0], bias=bias, layout="conv")
    return None


def _attention(block: nn.Module, path: str) -> tuple[dict[str, list[_Weight]], str | None] | None:
    """Weights by role of the attention module at `path`, and why q, k, v cannot be told apart if so."""
    if not isinstance(_at(block, path), nn.Module):
        return None
    for holder_path in (_join(path, name) for name in HOLDERS):
        holder = _at(block, holder_path)
        if not isinstance(holder, nn.Module):
            continue
        out = next(filter(None, (_weight(block, _join(p, name)) for p in (holder_path, path) for name in OUT)), None)
        outs = {"attn.out": [out]} if out else {}
        for names in SEPARATE:
            q, k, v = (_weight(block, _join(holder_path, name)) for name in names)
            if q and k and v:
                return outs | {"attn.q": [q], "attn.k": [k], "attn.v": [v], "attn.qkv": [q, k, v]}, None
        if isinstance(getattr(holder, "q_proj_weight", None), torch.Tensor):  # nn.MultiheadAttention with kdim or vdim
            q, k, v = (
                _Weight(holder_path, weight.shape[1], weight.shape[0], name)
                for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")
                for weight in [getattr(holder, name)]
            )
            return outs | {"attn.q": [q], "attn.k": [k], "attn.v": [v], "attn.qkv": [q, k, v]}, None
        fused = next(filter(None, (_weight(block, _join(holder_path, name)) for name in FUSED)), None)
        if isinstance(packed := getattr(holder, "in_proj_weight", None), torch.Tensor):
            bias = None if getattr(holder, "in_proj_bias", None) is None else "in_proj_bias"
            fused = _Weight(holder_path, packed.shape[1], packed.shape[0], "in_proj_weight", bias)
        if fused:
            return _split(holder, fused, outs)
    return None


def _split(holder: nn.Module, fused: _Weight, outs: dict[str, list[_Weight]]):
    if not any(f"{kind.__module__}.{kind.__qualname__}" in IN_ORDER for kind in type(holder).__mro__):
        reason = f"the fused weight {fused.path} of {type(holder).__name__}: its order of q, k and v is not known"
        return outs | {"attn.qkv": [fused]}, reason
    width = outs["attn.out"][0].dim if outs else fused.dim_out // 3
    rest = (fused.dim_out - width) // 2  # grouped queries: fewer keys and values
    q, k, v = fused.part(0, width), fused.part(width, width + rest), fused.part(width + rest, width + 2 * rest)
    return outs | {"attn.q": [q], "attn.k": [k], "attn.v": [v], "attn.qkv": [fused]}, None


def _mlp(block: nn.Module, path: str, dim: int) -> tuple[list[_Weight], _Weight] | None:
    """The reading and writing layers of the MLP at `path`, checked to read and write D features."""
    module = _at(block, path)
    if not isinstance(module, nn.Module):
        return None
    forms = MLPS
    if isinstance(module, nn.Sequential):
        layers = [name for name, layer in module.named_children() if _weight(module, name)]
        forms = (((layers[0],), layers[-1]),) if len(layers) > 1 else ()
    for names, last in forms:
        ins, out = [_weight(block, _join(path, name)) for name in names], _weight(block, _join(path, last))
        if out and all(ins) and out.dim_out == dim and all(part.dim == dim for part in ins):
            return ins, out
    return None


def _match(module: nn.Module) -> _Block | None:
    """The block that `module` is, None when no layout fits."""
    for layout in LAYOUTS:
        if _at(module, layout.norm) is None or not (attention := _attention(module, layout.attn)):
            continue
        weights, blocked = attention
        mlps = [(path, norm, _mlp(module, path, weights["attn.qkv"][0].dim)) for path, norm in layout.mlps]
        if any(mlp is None or _at(module, norm) is None for _, norm, mlp in mlps):
            continue
        own, rule = getattr(module, "norm_first", None), layout.pre_norm
        pre_norm = bool(own if own is not None else rule if isinstance(rule, bool) else rule(module))
        post_norm = not pre_norm and (own is not None or rule is not _not_res_post)
        batch_first = getattr(_at(module, layout.attn), "batch_first", True)
        return _Block(layout, pre_norm, post_norm, weights, [(p, n, *mlp) for p, n, mlp in mlps], batch_first, blocked)
    return None


def _blocks(model: nn.Module) -> list[_Block]:
    """All blocks, in the order of the model. Raises LookupError rather than skip some blocks of a kind."""
    found: list[_Block] = []
    others: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():  # a shared module comes once
        if path.split(".")[0] == BANK or (found and path.startswith(f"{found[-1].path}.")):
            continue
        if block := _match(module):
            block.path = path
            found.append(block)
        else:
            others.append((path, module))
    kinds = {type(_at(model, block.path)) for block in found}
    for path, module in others:
        if type(module) in kinds:  # Hiera and MViT change the width in some blocks
            raise LookupError(
                f"{path} ({type(module).__name__}) has not the parts or widths of the other blocks of its kind: "
                "networks of such blocks are not covered"
            )
    return found


# ---- components ----


@dataclass
class _Tower:
    """A component with its blocks; `root` is its path in the host."""

    root: str
    blocks: list[_Block] = field(default_factory=list)
    info: Component | None = None


def _above(path: str) -> Iterator[str]:
    """The paths of the ancestors, nearest first, down to "" (the model)."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def _towers(model: nn.Module) -> list[_Tower]:
    towers: dict[str, _Tower] = {}
    for block in _blocks(model):
        ancestors = list(_above(block.path))
        marked = (path for path in ancestors if any(hasattr(_at(model, path), name) for name in INPUTS))
        lists = (path for path in ancestors if not isinstance(_at(model, path), nn.ModuleList | nn.Sequential))
        root = next(marked, next(lists, ""))
        towers.setdefault(root, _Tower(root)).blocks.append(block)
    for tower in towers.values():
        tower.info = _describe(model, tower)
    return list(towers.values())


def _describe(model: nn.Module, tower: _Tower) -> Component:
    root = _at(model, tower.root)
    norms = (
        name
        for name in FINAL_NORMS
        if _is_norm(_at(root, name)) and (tower.blocks[-1].pre_norm or name not in EARLY_NORMS)
    )
    final_norm = next(norms, None)
    text = hasattr(root, "visual") and hasattr(root, "token_embedding")  # open_clip.CLIP
    return Component(
        _join(tower.root, "text") if text else tower.root,
        _family(root),
        len(tower.blocks),
        None if final_norm is None else _join(tower.root, final_norm),
        _head(model, tower.root),
        _prefix_tokens(root),
    )


def _head(model: nn.Module, root: str) -> str | None:
    towers = {"vision_model": "visual_projection", "text_model": "text_projection"}  # CLIP
    own = (towers[name] for name in root.split(".")[-1:] if name in towers)
    names = (*own, *HEADS)
    for path in (root, *_above(root)):
        for name in names:
            head = _at(model, _join(path, name))
            if isinstance(head, nn.Module) and _last_layer(head) is not None:
                return _join(path, name)
    return None


def _last_layer(head: nn.Module) -> str | None:
    """Path in a head of its last weight; None for pooling heads with attention (SigLIP), which are no task heads."""
    modules = list(head.named_modules())
    if any(isinstance(module, nn.MultiheadAttention) for _, module in modules):
        return None
    return next((path for path, _ in reversed(modules) if _weight(head, path)), None)


def _prefix_tokens(root: nn.Module) -> int:
    if isinstance(known := getattr(root, "num_prefix_tokens", None), int):  # timm
        return known
    holders = (root, getattr(root, "embeddings", None))
    tokens = [getattr(holder, name, None) for holder in holders for name in PREFIXES]
    return sum(t.shape[-2] if t.ndim > 1 else 1 for t in tokens if isinstance(t, torch.Tensor))


def _family(module: nn.Module) -> str:
    return f"{type(module).__module__.split('.')[0]}.{type(module).__name__}"


def _families(model: nn.Module) -> str:
    return " + ".join(dict.fromkeys(tower.info.family for tower in _towers(model))) or _family(model)


def _is_norm(module) -> bool:
    """A norm over the last dimension with a weight (LayerNorm, RMSNorm and their kin)."""
    name = type(module).__name__
    if not isinstance(module, nn.Module) or "Norm" not in name or name.startswith(("Batch", "Group", "Instance")):
        return False
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.ndim == 1 and not name.endswith(("2d", "3d"))


# ---- sites ----


def _index(model: nn.Module) -> tuple[dict[str, list[Site]], dict[str, dict[str, str]]]:
    """All sites by role, and the roles that cannot be had: in which component, and what they are part of."""
    found: dict[str, list[Site]] = {role: [] for role in ROLES}
    blocked: dict[str, dict[str, str]] = {}
    towers = _towers(model)
    for tower in towers:
        early = ((_join(tower.root, name), tower.blocks[0].dim) for name in EARLY_NORMS)
        before = next((path for path, dim in early if _is_norm(n := _at(model, path)) and len(n.weight) == dim), None)
        for index, block in enumerate(tower.blocks):
            causal, info = _causal(_at(model, block.path), block.layout), tower.info
            for site in _block_sites(model, block, before):
                own = {"prefix_tokens": info.num_prefix_tokens, "depth": info.num_blocks, "causal": causal}
                found[site.role].append(replace(site, block=index, component=info.prefix, **own))
            before = _join(block.path, block.mlps[-1][1])
            if block.blocked:
                for role in ("attn.q", "attn.k", "attn.v"):
                    blocked.setdefault(role, {})[info.prefix] = _join(block.path, block.blocked)
        for site in _outer_sites(model, tower):
            found[site.role].append(replace(site, component=tower.info.prefix, depth=tower.info.num_blocks))
    found["pointwise"] = list(_pointwise(model, towers, {site.path for sites in found.values() for site in sites}))
    return {role: list({site.key: site for site in sites}.values()) for role, sites in found.items()}, blocked


def _block_sites(model: nn.Module, block: _Block, before: str | None) -> Iterator[Site]:
    """before: the norm that the input of a post-norm block has passed, in the block before or ahead of the first."""
    layout, module, dim = block.layout, _at(model, block.path), block.dim
    cross = next((name for name in CROSS if _at(module, name) is not None), None)
    between = _join(block.path, layout.norm) if cross is None else None  # its norms stand between the two halves

    def at(path: str) -> str:
        return _join(block.path, path)

    def beside(path: str, passed: str | None) -> str | None:
        found = at(path) if block.pre_norm else passed if block.post_norm else None
        return found if found and _is_norm(_at(model, found)) else None

    def tokens(role: str, path: str, norm: str | None = None, carrier: tuple[str, int] | None = None) -> Site:
        carrier = carrier and (at(carrier[0]), carrier[1])
        return Site(role, at(path), None, dim, dim, norm=norm, carrier=carrier, batch_first=block.batch_first)

    def weights(role: str, weight: _Weight, norm: str | None = None) -> Site:
        return _weight_site(role, block.path, weight, norm=norm, batch_first=block.batch_first)

    norm = beside(layout.norm, before)
    for role, parts in block.attention.items():
        yield from (weights(role, part, None if role == "attn.out" else norm) for part in parts)
    yield tokens("attn", layout.attn_site or layout.attn, norm, layout.attn_carrier)
    for role, parts in _cross_attention(module, cross).items():
        yield from (weights(role, part) for part in parts)
    if cross is not None:
        inner = f"{cross}.output.dense"  # where the residual lies inside, as in BERT
        is_inner = _at(module, inner) is not None
        yield tokens("cross", inner if is_inner else cross, None, (f"{cross}.output", 1) if is_inner else None)
    for path, norm_path, ins, out in block.mlps:
        norm = beside(norm_path, between)
        yield from (weights("mlp.in", part, norm) for part in ins)
        yield weights("mlp.out", out)
        if not path:  # the layers lie on the block: what the first reads, what the last writes
            yield tokens("mlp", out.path, norm, layout.mlp_carrier or (ins[0].path, 0))
        else:
            yield tokens("mlp", path, norm, (ins[0].path, 0) if norm_path.startswith(f"{path}.") else None)
    yield tokens("block", "")
    for name, part in module.named_modules():
        unused = name == "norm_cross_attn" and not module.with_cross_attention  # MONAI makes it in every block
        if _is_norm(part) and not unused:
            width, bias = part.weight.shape[0], None if getattr(part, "bias", None) is None else "bias"
            yield replace(tokens("norm", name), dim=width, dim_out=width, bias=bias)


def _cross_attention(block: nn.Module, path: str | None) -> dict[str, list[_Weight]]:
    """Weights by role of attention to another sequence; GPT-2's, with keys and values in one, is left alone."""
    found = _attention(block, path) if path and not hasattr(_at(block, path), "q_attn") else None
    parts = ("q", "k", "v", "out")
    return {f"cross.{p}": found[0][f"attn.{p}"] for p in parts if found and f"attn.{p}" in found[0]}


def _causal(block: nn.Module, layout: Layout) -> bool:
    """Whether a block's own attention says that it is causal. Many are told so by a mask alone."""
    attention = _at(block, layout.attn)
    holders = [holder for name in HOLDERS if isinstance(holder := _at(attention, name), nn.Module)]
    return any(getattr(h, name, False) is True for h in holders for name in ("is_causal", "is_decoder"))


def _outer_sites(model: nn.Module, tower: _Tower) -> Iterator[Site]:
    root, info = _at(model, tower.root), tower.info
    if info.final_norm:
        final = _at(model, info.final_norm)
        width, bias = final.weight.shape[0], None if getattr(final, "bias", None) is None else "bias"
        yield Site("norm", info.final_norm, None, width, width, bias=bias)
    if patch := next(filter(None, (_weight(root, path) for path in PATCHES)), None):
        yield _weight_site("patch_embed", tower.root, patch)
    for holder in ("", "embeddings"):
        for name in CLS_TOKENS:
            if isinstance(token := getattr(_at(root, holder), name, None), nn.Parameter):  # on this module
                yield Site("cls", _join(tower.root, holder), None, token.shape[-1], token.shape[-1])
    if info.head:
        yield _weight_site("head", info.head, _weight(_at(model, info.head), _last_layer(_at(model, info.head))))


def _pointwise(model: nn.Module, towers: list[_Tower], taken: set[str]) -> Iterator[Site]:
    apart = [f"{block.path}." for tower in towers for block in tower.blocks]
    apart += [f"{tower.info.head}." for tower in towers if tower.info.head]
    for path, module in model.named_modules():
        one = isinstance(module, nn.Conv2d | nn.Conv3d) and set(module.kernel_size) == {1} and module.groups == 1
        if not (one or isinstance(module, nn.Linear)) or path in taken or path.startswith((*apart, f"{BANK}.")):
            continue
        inside = (tower for tower in reversed(towers) if path.startswith(f"{tower.root}."))
        tower = next(inside, towers[0] if towers else None)
        own = {} if tower is None else {"component": tower.info.prefix, "depth": tower.info.num_blocks}
        yield _weight_site("pointwise", "", _weight(model, path), **own)


def _weight_site(role: str, prefix: str, part: _Weight, **more) -> Site:
    path = _join(prefix, part.path)
    return Site(role, path, None, part.dim, part.dim_out, part.weight, part.bias, part.rows, part.layout, **more)


# ---- the probe's input ----


def example_input(model: nn.Module) -> tuple[tuple, dict]:
    """Arguments of one small forward (a batch of 1, noise or constant ids), on the model's device.

    Raises LookupError when the input cannot be told from the model: task models of one's own, multimodal chat models.
    """
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))

    def noise(*shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(*shape, generator=generator).to(parameter.device, parameter.dtype)

    def ids(*shape: int) -> torch.Tensor:
        return torch.full(shape, 5, device=parameter.device)  # below every vocabulary, above the usual special tokens

    for library, build in _EXAMPLES.items():
        known = any(kind.__module__.startswith(library) for kind in type(model).__mro__)
        if known and (found := build(model, noise, ids)):
            return found
    raise LookupError(f"no example input is known for {_family(model)}: pass sample= (a tensor, tuple or dict)")


def _pair(size) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _timm_example(model, noise, ids):
    embed = getattr(model, "patch_embed", None)
    channels, *size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))
    size = getattr(embed, "img_size", None) or size
    channels = getattr(getattr(embed, "proj", None), "in_channels", channels)
    return (noise(1, channels, *_pair(size)),), {}


def _transformers_example(model, noise, ids):
    config, name = model.config, model.main_input_name
    if hasattr(config, "text_config") and hasattr(config, "vision_config"):
        if not hasattr(model, "logit_scale"):  # needs image tokens in its text: the processor's business
            return None
        vision = config.vision_config
        pixels = noise(1, vision.num_channels, *_pair(vision.image_size))
        return (), {"input_ids": ids(1, 8), "pixel_values": pixels}
    inputs = None
    if name == "pixel_values" and hasattr(config, "image_size"):
        frames = (config.num_frames,) if hasattr(config, "num_frames") else ()
        inputs = {name: noise(1, *frames, config.num_channels, *_pair(config.image_size))}
    elif name == "input_values":
        mel = hasattr(config, "num_mel_bins") and hasattr(config, "max_length") and hasattr(config, "patch_size")
        inputs = {name: noise(1, config.max_length, config.num_mel_bins) if mel else noise(1, 4000)}
    elif name == "input_features" and hasattr(config, "spec_size"):  # CLAP: as many frames as make its square
        frames = config.spec_size * (config.spec_size // config.num_mel_bins)
        channels = 4 if config.enable_fusion else 1
        inputs = {name: noise(1, channels, frames, config.num_mel_bins), "is_longer": ids(1, 1) == 0}
    elif name == "input_features" and hasattr(config, "max_source_positions") and hasattr(config, "num_mel_bins"):
        inputs = {name: noise(1, config.num_mel_bins, 2 * config.max_source_positions)}
    elif name == "input_features" and hasattr(config, "feature_projection_input_dim"):
        inputs = {name: noise(1, 16, config.feature_projection_input_dim)}
    elif name == "input_ids":
        inputs = {name: ids(1, 8), "attention_mask": torch.ones_like(ids(1, 8))}
    if inputs and config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids(1, 8)
    return ((), inputs) if inputs else None


def _open_clip_example(model, noise, ids):
    length = getattr(model, "context_length", None) or getattr(getattr(model, "text", None), "context_length", None)
    size = getattr(getattr(model, "visual", None), "image_size", None)
    if not length or not size:
        return None
    text = ids(1, length)
    # the token of the largest id is read: the first one sees no other, its q and k would be dead
    text[:, -1] += 1
    return (noise(1, 3, *_pair(size)), text), {}


def _monai_example(model, noise, ids):
    if hasattr(model, "calc_head"):  # MILModel: bags of instances
        return (noise(1, 3, 3, 64, 64),), {}
    if hasattr(model, "swinViT"):
        patches = model.swinViT.patch_embed.proj
        size = [stride**5 for stride in patches.stride]  # the smallest the five halvings allow ...
        return (noise(1, patches.in_channels, 2 * size[0], *size[1:]),), {}  # ... with two voxels left to normalise
    embed = getattr(model, "patch_embedding", None) or getattr(getattr(model, "vit", None), "patch_embedding", None)
    patches = getattr(embed, "patch_embeddings", None)
    if not isinstance(patches, nn.Conv2d | nn.Conv3d):
        return None
    kernel, count = patches.kernel_size, embed.n_patches
    side = round(count ** (1 / len(kernel)))
    grid = [side] * len(kernel) if side ** len(kernel) == count else [count] + [1] * (len(kernel) - 1)
    return (noise(1, patches.in_channels, *(n * k for n, k in zip(grid, kernel, strict=True))),), {}


def _torchaudio_example(model, noise, ids):
    if hasattr(model, "conformer_layers"):
        width = model.conformer_layers[0].self_attn.embed_dim
        return (noise(1, 8, width), torch.full((1,), 8, device=noise(1).device)), {}
    return ((noise(1, 4000),), {}) if hasattr(model, "feature_extractor") else None


def _torch_example(model, noise, ids):
    if not isinstance(model, nn.TransformerEncoder):
        return None
    return (noise(1, 8, model.layers[0].self_attn.embed_dim),), {}


_EXAMPLES = {
    "timm.": _timm_example,
    "transformers.": _transformers_example,
    "open_clip.": _open_clip_example,
    "monai.": _monai_example,
    "torchaudio.": _torchaudio_example,
    "torch.nn.modules.transformer": _torch_example,
}
