"""Pretrains `embedded:vl-tiny`, an image and a text encoder, on generated scenes and sentences, each without the other.

python -m adaptsuite.vl.pretrain --minutes 8 --seed 0 --out vl/weights

The image encoder reads no word: linear heads tell from CLS which object is in which cell, from each patch what covers
it. The text encoder sees no picture: it restores masked words (Devlin et al. 2019, arXiv:1810.04805, section 3.1) and
pulls two orders of one caption together (InfoNCE, van den Oord et al. 2018, arXiv:1807.03748, eq. 4). No loss joins the
two, so whatever answers a question about an image afterwards was learned by an adapter.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite import pretraining
from adaptsuite.pretraining import Training
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
    both = nn.ModuleList([pair, heads])
    training = Training(both, both.parameters(), s, lambda p: p.ndim > 1, warmup=200, fall=0.5, clip=1.0)

    def scenes() -> int:
        return (training.step + 1) // 2 * s.scenes

    while (share := training.share) < 1:
        losses = {n: value for draw in STEPS[training.step % 2] for n, value in draw(pair, heads, s, rng).items()}
        training.update(losses, {**dict.fromkeys(losses, 1), "contrast": s.contrast}, share)
        if training.due:
            training.log({"scenes": scenes()}, lambda: read_scenes(*training.average, held_out))
            save(training.average[0], training.history, s, out)
    last = {"minute": s.minutes, "step": training.step, "scenes": scenes()}
    training.history.append(last | read_scenes(*training.average, held_out))
    return save(training.average[0], training.history, s, out)


@torch.no_grad()
def read_scenes(pair: EncoderPair, heads: Heads, rng: np.random.Generator, n: int = 512) -> dict[str, float]:
    """How often the head reads colours and shapes rightly from CLS, over n fresh pictures and their four cells."""
    scenes = rng.integers(0, synthetic.NUM_SCENES, n)
    tokens = pair.encode_image(torch.from_numpy(synthetic.render(scenes, rng)))
    logits = heads.scene(tokens[:, 0]).unflatten(1, (4, -1))
    read = {"colours": logits[..., :COLOURS].argmax(2), "shapes": logits[..., COLOURS:].argmax(2)}
    truth = dict(zip(read, synthetic.objects(scenes), strict=True))
    return {name: round(float(np.mean(read[name].numpy() == truth[name])), 4) for name in read}


def save(pair: EncoderPair, history: list[dict], s: Settings, out: Path) -> dict:
    """Half-precision weights under the stock classes' names, with what is needed to build and feed them."""
    return pretraining.save(out, "vl-tiny", pair, RECORD, s, history, ["timm", "transformers"])


def main(argv: list[str] | None = None) -> None:
    pretraining.main(pretrain, Settings, __doc__, argv)


if __name__ == "__main__":
    main()
