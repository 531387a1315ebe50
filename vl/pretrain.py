"""Pretrains `embedded:vl-tiny`, an image and a text encoder, on generated scenes and sentences, each without the other.

python -m adaptsuite.vl.pretrain --minutes 8 --seed 0 --out vl/weights

The image encoder reads no word: linear heads tell from CLS which object is in which cell, from each patch what covers
it. The text encoder sees no picture: it restores masked words (Devlin et al. 2019, arXiv:1810.04805, section 3.1) and
pulls two orders of one caption together (InfoNCE, van den Oord et al. 2018, arXiv:1807.03748, eq. 4). No loss joins the
two, so whatever answers a question about an image afterwards was learned by an adapter.
"""

import argparse
import copy
import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.vl import synthetic
from adaptsuite.vl.backbones import EncoderPair, encoder_pair
from adaptsuite.vl.tokenizer import MASK, SEP, WordTokenizer

DIM = 64
RECORD = {
    "image": {"img_size": 32, "patch_size": 8, "embed_dim": DIM, "depth": 4, "num_heads": 4},
    "text": {
        "hidden_size": DIM,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 4 * DIM,
        "type_vocab_size": 1,
    },
    "tokenizer": WordTokenizer(synthetic.words()).record(),
    "front_end": {"size": [32, 32], "mean": [0.4, 0.4, 0.4], "std": [0.25, 0.25, 0.25]},
}
COLOURS, SHAPES = len(synthetic.COLOURS), len(synthetic.SHAPES)


@dataclass(frozen=True)
class Settings:
    """What a run can change."""

    minutes: float = 8.0  # of the process's own processor time
    seed: int = 0
    lr: float = 2e-3
    weight_decay: float = 0.05
    scenes: int = 128  # of an image step
    loose: int = 32  # further pictures of an image step
    texts: int = 128  # of a text step, for each of its two losses
    masked: float = 0.2  # share of words to restore
    strange: float = 0.05  # share of words that a random bucket replaces, so that buckets are trained too
    temperature: float = 0.1
    contrast: float = 0.5
    ema: float = 0.998


class Heads(nn.Module):
    """What is thrown away after pretraining."""

    def __init__(self, num_known: int):
        super().__init__()
        self.scene = nn.Linear(DIM, 4 * (COLOURS + SHAPES))
        self.cell = nn.Linear(DIM, COLOURS + SHAPES)
        self.counts, self.cover = nn.Linear(DIM, 12), nn.Linear(DIM, 7)
        self.word = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), nn.LayerNorm(DIM), nn.Linear(DIM, num_known))
        self.sentence = nn.Linear(DIM, DIM)


def scene_losses(pair: EncoderPair, heads: Heads, s: Settings, rng: np.random.Generator) -> dict[str, Tensor]:
    """Of freshly drawn scenes, by name."""
    scenes = rng.integers(0, synthetic.NUM_SCENES, s.scenes)
    tokens = pair.encode_image(torch.from_numpy(synthetic.render(scenes, rng)))
    colours, shapes = (torch.from_numpy(values).long() for values in synthetic.objects(scenes))
    at = cell_of_patch()
    return {
        "scene": _two(heads.scene(tokens[:, 0]).unflatten(1, (4, -1)), colours, shapes),
        "cell": _two(heads.cell(tokens[:, 1:]), colours[:, at], shapes[:, at]),
    }


def loose_losses(pair: EncoderPair, heads: Heads, s: Settings, rng: np.random.Generator) -> dict[str, Tensor]:
    """Of further freshly drawn pictures of one size, by name."""
    size = synthetic.SIZES[int(rng.integers(len(synthetic.SIZES)))]
    picture, cover, counts = map(torch.from_numpy, synthetic.loose_pictures(s.loose, size, rng))
    tokens = pair.encode_image(picture)
    return {
        "cover": 10 * F.smooth_l1_loss(heads.cover(tokens[:, 1:]), cover, beta=0.1),
        "counts": F.smooth_l1_loss(heads.counts(tokens[:, 0]), counts),
    }


def cell_of_patch() -> Tensor:
    """(16,) the position in which each patch of a scene lies."""
    y, x = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    return (2 * (y // 2) + x // 2).flatten()


def _two(logits: Tensor, colours: Tensor, shapes: Tensor) -> Tensor:
    """Cross-entropies of (B, T, 8 + 4) against colours and shapes (B, T), added."""
    logits = logits.flatten(0, 1)
    return F.cross_entropy(logits[:, :COLOURS], colours.flatten()) + F.cross_entropy(
        logits[:, COLOURS:], shapes.flatten()
    )


def order_losses(pair: EncoderPair, heads: Heads, s: Settings, rng: np.random.Generator) -> dict[str, Tensor]:
    """Of freshly drawn captions, two orders of each, by name."""
    quarter = s.texts // 4
    scenes = rng.integers(0, synthetic.NUM_SCENES, quarter)
    twin = synthetic.swap_colours(scenes, *rng.permuted(np.arange(4)[None].repeat(quarter, 0), axis=1).T[:2])
    orders = np.concatenate([scenes, twin])  # the hardest negative: the same words in another binding
    text = pair.tokenizer([*synthetic.captions(orders, rng), *synthetic.captions(orders, rng)])
    ids, mask = text["input_ids"], text["attention_mask"]
    z = F.normalize(heads.sentence(mean_pool(pair.encode_text(ids, mask), mask)), dim=1)
    logits = (z @ z.T / s.temperature).masked_fill(torch.eye(len(z), dtype=torch.bool), -1e4)
    return {"contrast": F.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))}


def word_losses(pair: EncoderPair, heads: Heads, s: Settings, rng: np.random.Generator) -> dict[str, Tensor]:
    """Of freshly drawn sentences, by name: half of them captions, a quarter questions about scenes."""
    quarter = s.texts // 4
    scenes = rng.integers(0, synthetic.NUM_SCENES, 2 * quarter)
    asked = [t for level in synthetic.LEVELS for t in synthetic.ask(scenes[::4], level, rng).texts]
    text = pair.tokenizer([*synthetic.captions(scenes, rng), *asked, *synthetic.loose_sentences(quarter, rng)])
    shown, wanted = hide(text["input_ids"], pair.tokenizer, s, rng)
    out = pair.encode_text(shown, text["attention_mask"])
    return {"masked": F.cross_entropy(heads.word(out[wanted >= 0]), wanted[wanted >= 0])}


STEPS = ((scene_losses, loose_losses), (word_losses, order_losses))  # the image encoder's and the text encoder's turn


def hide(ids: Tensor, tokenizer: WordTokenizer, s: Settings, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """(ids with words masked or made strange, the words to restore and -1 elsewhere), both shaped as ids (B, T)."""
    word = (ids > SEP).numpy()
    drawn = rng.random(ids.shape)
    masked = torch.from_numpy(word & (drawn < s.masked))
    strange = torch.from_numpy(word & (drawn > 1 - s.strange))
    buckets = torch.from_numpy(rng.integers(tokenizer.num_known, len(tokenizer), ids.shape))
    return torch.where(strange, buckets, ids.masked_fill(masked, MASK)), ids.masked_fill(~masked, -1)


def mean_pool(tokens: Tensor, mask: Tensor) -> Tensor:
    """(B, D) mean of (B, T, D) over the tokens whose mask (B, T) is 1."""
    return (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def new_pair(seed: int) -> EncoderPair:
    torch.manual_seed(seed)
    return encoder_pair(RECORD)


def pretrain(s: Settings, out: Path) -> dict:
    """Trains for s.minutes and leaves vl-tiny.safetensors and log.json in `out`, both written anew each minute."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    pair = new_pair(s.seed).train()
    heads, rng, held_out = Heads(pair.tokenizer.num_known), np.random.default_rng(s.seed), np.random.default_rng(10**6)
    parameters = [*pair.parameters(), *heads.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": s.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.98))
    average = copy.deepcopy(nn.ModuleList([pair, heads])).eval()
    history, sums = [], {}
    start = saved = time.process_time()
    step = 0
    while (share := (time.process_time() - start) / (60 * s.minutes)) < 1:
        losses = {n: value for draw in STEPS[step % 2] for n, value in draw(pair, heads, s, rng).items()}
        loss = sum((s.contrast if name == "contrast" else 1) * value for name, value in losses.items())
        rate = s.lr * min((step + 1) / 200, 1) * min((1 - share) / 0.5, 1)
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        step += 1
        keep_average(average, nn.ModuleList([pair, heads]), min(s.ema, (1 + step) / (10 + step)))
        for name, value in losses.items():
            sums.setdefault(name, []).append(value.item())
        if time.process_time() - saved > 60 or step == 1:
            saved = time.process_time()
            row = {"minute": round((saved - start) / 60, 2), "step": step, "scenes": (step + 1) // 2 * s.scenes}
            row |= {name: round(float(np.mean(values)), 4) for name, values in sums.items()}
            history.append(row | read_scenes(*average, held_out))
            print(json.dumps(history[-1]), flush=True)
            sums = {}
            save(average[0], history, s, out)
    history.append(
        {"minute": s.minutes, "step": step, "scenes": (step + 1) // 2 * s.scenes, **read_scenes(*average, held_out)}
    )
    return save(average[0], history, s, out)


@torch.no_grad()
def read_scenes(pair: EncoderPair, heads: Heads, rng: np.random.Generator, n: int = 512) -> dict[str, float]:
    """How often the head reads colours and shapes rightly from CLS, over n fresh pictures and their four cells."""
    scenes = rng.integers(0, synthetic.NUM_SCENES, n)
    tokens = pair.encode_image(torch.from_numpy(synthetic.render(scenes, rng)))
    logits = heads.scene(tokens[:, 0]).unflatten(1, (4, -1))
    read = {"colours": logits[..., :COLOURS].argmax(2), "shapes": logits[..., COLOURS:].argmax(2)}
    truth = dict(zip(read, synthetic.objects(scenes), strict=True))
    return {name: round(float(np.mean(read[name].numpy() == truth[name])), 4) for name in read}


@torch.no_grad()
def keep_average(average: nn.Module, model: nn.Module, keep: float) -> None:
    """Moves the averaged weights towards the model's."""
    for old, new in zip(average.parameters(), model.parameters(), strict=True):
        old.lerp_(new, 1 - keep)


def save(pair: EncoderPair, history: list[dict], s: Settings, out: Path) -> dict:
    """Half-precision weights under the stock classes' names, with what is needed to build and feed them."""
    import timm
    import transformers
    from safetensors.torch import save_file

    state = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in pair.state_dict().items()}
    metadata = {key: json.dumps(value) for key, value in RECORD.items()} | {"licence": "Apache-2.0"}
    part = out / "vl-tiny.safetensors.part"
    save_file(state, part, metadata)
    part.chmod(0o644)
    part.replace(out / "vl-tiny.safetensors")
    versions = {"torch": torch.__version__, "timm": timm.__version__, "transformers": transformers.__version__}
    log = {"settings": asdict(s), "versions": versions | {"python": platform.python_version()}, "history": history}
    (out / "log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    return log


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = vars(parser.parse_args(argv))
    out = arguments.pop("out")
    pretrain(Settings(**arguments), out)


if __name__ == "__main__":
    main()
