"""Budget against reality: what is predicted, what autograd saves, what the process grows by, in one real CPU step.

python tests/benchmarks/budget_accuracy.py [FAMILY ...]      one line per family and method, one process per family
python tests/benchmarks/budget_accuracy.py --rows            row 8: the largest deviations over eight pairs
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from adaptsuite import attach, budget
from adaptsuite.bank import tensors_in

METHODS = ("linear", "lora", "bottleneck", "bitfit", "full")
PAIRS = (
    ("timm_vit", "lora"), ("timm_vit", "full"), ("timm_eva", "lora"), ("timm_swin", "bottleneck"), ("hf_ast", "lora"),
    ("hf_bert", "bitfit"), ("open_clip", "bottleneck"), ("monai_vit", "linear"),
)  # fmt: skip
SMALL = dict(hidden_size=192, num_hidden_layers=6, num_attention_heads=3, intermediate_size=768)


def timm_vit():
    import timm

    return timm.create_model("vit_tiny_patch16_224"), torch.randn(4, 3, 224, 224), "head"


def timm_eva():
    import timm

    return timm.create_model("eva02_tiny_patch14_224", num_classes=10), torch.randn(4, 3, 224, 224), "head"


def timm_swin():
    import timm

    return timm.create_model("swin_tiny_patch4_window7_224"), torch.randn(2, 3, 224, 224), "head.fc"


def hf_ast():
    from transformers import ASTConfig, ASTForAudioClassification

    return ASTForAudioClassification(ASTConfig(**SMALL, max_length=500)), torch.randn(2, 500, 128), "classifier"


def hf_clip():
    from transformers import CLIPConfig, CLIPModel

    text = dict(**SMALL, vocab_size=1000, max_position_embeddings=77, bos_token_id=0, eos_token_id=2)
    config = CLIPConfig(text_config=text, vision_config=dict(**SMALL, image_size=224, patch_size=16))
    return CLIPModel(config), {"input_ids": _ids(4, 77), "pixel_values": torch.randn(4, 3, 224, 224)}, "text_projection"


def hf_bert():
    from transformers import BertConfig, BertForSequenceClassification

    inputs = {"input_ids": _ids(8, 128), "attention_mask": torch.ones(8, 128, dtype=torch.long)}
    return BertForSequenceClassification(BertConfig(**SMALL, vocab_size=1000)), inputs, "classifier"


def hf_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = dict(n_embd=192, n_layer=6, n_head=3, vocab_size=1000, bos_token_id=0, eos_token_id=0, use_cache=False)
    return GPT2LMHeadModel(GPT2Config(**shape)), {"input_ids": _ids(4, 256)}, "lm_head"


def open_clip():
    from open_clip.model import CLIP

    vision = dict(image_size=224, patch_size=16, width=192, layers=6, head_width=64)
    text = dict(context_length=77, vocab_size=1000, width=192, heads=3, layers=6)
    return CLIP(128, vision, text), (torch.randn(4, 3, 224, 224), _ids(4, 77)), "visual.ln_post"


def monai_vit():
    from monai.networks.nets import ViT

    size = dict(img_size=(64, 64, 64), patch_size=(8, 8, 8), hidden_size=192, mlp_dim=768, num_layers=6, num_heads=3)
    model = ViT(in_channels=1, **size, classification=True, num_classes=5)
    return model, torch.randn(2, 1, 64, 64, 64), "classification_head"


def monai_swin_unetr():
    from monai.networks.nets import SwinUNETR

    return SwinUNETR(1, 2, feature_size=12, spatial_dims=3), torch.randn(1, 1, 64, 64, 64), "out"


def hf_wav2vec2():
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    config = Wav2Vec2Config(**SMALL, conv_dim=(128,) * 7, layerdrop=0.0)
    return Wav2Vec2ForSequenceClassification(config), torch.randn(2, 32000), "classifier"


def torchaudio_wav2vec2():
    from torchaudio.models import wav2vec2_model

    rates = ("projection_dropout", "attention_dropout", "ff_interm_dropout", "dropout", "layer_drop")
    shape = dict(encoder_embed_dim=192, encoder_num_layers=6, encoder_num_heads=3, encoder_ff_interm_features=768)
    model = wav2vec2_model(
        extractor_mode="group_norm", extractor_conv_layer_config=None, extractor_conv_bias=False,
        encoder_pos_conv_kernel=128, encoder_pos_conv_groups=16, encoder_layer_norm_first=False, aux_num_out=8,
        **shape, **{f"encoder_{rate}": 0.0 for rate in rates},
    )  # fmt: skip
    return model, torch.randn(2, 32000), "aux"


FAMILIES = {
    f.__name__: f
    for f in (
        timm_vit, timm_eva, timm_swin, hf_ast, hf_clip, hf_bert, hf_gpt2, open_clip, monai_vit, monai_swin_unetr,
        hf_wav2vec2, torchaudio_wav2vec2,
    )
}  # fmt: skip


def _ids(*shape):
    return torch.randint(3, 99, shape)


def step(model, args, kwargs):
    """One forward and backward; returns the bytes that autograd saved, each storage once, parameters left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in found:
            found[storage.data_ptr()] = storage.nbytes()  # saved storages live until backward: no address comes twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ends = [t for t in tensors_in(model(*args, **kwargs)) if t.requires_grad]
    torch.autograd.backward(ends, [torch.ones_like(t) for t in ends])
    return sum(found.values())


def resident(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def growth(model, args, kwargs):
    """By how much the resident memory of this process grows at most in one step (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before = resident("VmRSS")
    step(model, args, kwargs)
    return resident("VmHWM") - before


def forward_macs(model, args, kwargs):
    """Half of the FLOPs that torch counts in a real forward, with attention as products that it knows."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)
    return counter.get_total_flops() // 2


def case(family, method):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, sample, head = FAMILIES[family]()
    start = time.process_time()
    found = budget(model, method, sample, head=head)
    seconds = time.process_time() - start
    attach(model, method, head=head)
    args = (sample,) if isinstance(sample, torch.Tensor) else () if isinstance(sample, dict) else sample
    kwargs = sample if isinstance(sample, dict) else {}
    saved = step(model.train(), args, kwargs)
    for p in model.parameters():
        p.grad = None
    real = {"saved": saved, "growth": growth(model, args, kwargs), "real_macs": forward_macs(model, args, kwargs)}
    return found.as_dict() | real | {"seconds": seconds}


def children(family, methods):
    """Yields (method, what `case` found), from a process of its own; raises RuntimeError with its last words."""
    # one allocation, one mapping: what is freed leaves the resident set at once
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--child", family, *methods]
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    for line in result.stdout.splitlines():
        method, _, facts = line.partition(" ")
        yield method, json.loads(facts)
    if result.returncode:
        raise RuntimeError(result.stderr.strip().splitlines()[-1])


def rows():
    """Row 8: the largest deviations over eight pairs of backbone and method."""
    found = [facts for family, method in PAIRS for _, facts in children(family, [method])]
    peer, table = f"a real step, {len(found)} pairs", []
    compared = (("activation_bytes", "saved", 0.1), ("peak_bytes", "growth", 0.1), ("macs", "real_macs", 0.01))
    for name, real, bar in compared:
        off = max(abs(f[name] / f[real] - 1) for f in found)
        title = f"8 budget {name.replace('_', ' ')}"
        table.append({"row": title, "value": off, "bar": bar, "met": off <= bar, "peer": peer, "spread": None})
    return table


def formulas():
    """MACs of the two bases against closed formulas, and training FLOPs of LoRA over full fine-tuning."""
    import timm
    from transformers import ASTConfig, ASTModel

    def blocks(tokens, dim, depth=12):
        return depth * (tokens * 12 * dim**2 + 2 * tokens**2 * dim)

    with torch.device("meta"):
        hosts = {
            "ViT-Ti/16": (timm.create_model("vit_tiny_patch16_224"), blocks(197, 192) + 196 * 768 * 192 + 192_000),
            "ViT-S/16": (timm.create_model("vit_small_patch16_224"), blocks(197, 384) + 196 * 768 * 384 + 384_000),
            "ViT-B/16": (timm.create_model("vit_base_patch16_224"), blocks(197, 768) + 196 * 768 * 768 + 768_000),
            "AST-base, 1024 frames": (ASTModel(ASTConfig()), blocks(1214, 768) + 1212 * 256 * 768),
        }
    for name, (model, formula) in hosts.items():
        full, lora = budget(model, "full"), budget(model, "lora", sites="attn.qkv")
        ratio = lora.training_flops / full.training_flops
        print(f"{name:24} {full.macs / 1e9:9.3f} GMAC, formula {formula / 1e9:9.3f}   LoRA/full FLOPs {ratio:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help=f"of {', '.join(FAMILIES)}; all where none is named")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--rows", action="store_true", help="row 8 alone: eight pairs")
    chosen = parser.parse_args()
    if chosen.child:
        for method in chosen.families:
            print(method, json.dumps(case(chosen.child, method)), flush=True)
        return
    if chosen.rows:
        for row in rows():
            print(f"{row['row']:<28} {row['value']:<8.3g} bar {row['bar']:<6g} {'met' if row['met'] else 'missed'}")
        return
    if not chosen.families:
        formulas()
    print("| family | method | saved MB: predicted | measured | ratio | peak MB | grown by | ratio | CPU s | notes |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for family in chosen.families or FAMILIES:
        try:
            for method, r in children(family, METHODS):
                saved, peak = (
                    (r[a] / 1e6, r[b] / 1e6) for a, b in (("activation_bytes", "saved"), ("peak_bytes", "growth"))
                )
                first = f"{saved[0]:.2f} | {saved[1]:.2f} | {saved[0] / saved[1]:.3f}"
                second = f"{peak[0]:.1f} | {peak[1]:.1f} | {peak[0] / peak[1]:.3f}"
                notes = "; ".join(r["notes"])
                print(f"| {family} | {method} | {first} | {second} | {r['seconds']:.1f} | {notes} |", flush=True)
        except RuntimeError as error:
            print(f"| {family} | {error} |")


if __name__ == "__main__":
    main()
