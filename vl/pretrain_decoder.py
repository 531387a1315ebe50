"""Pretrains the language model of `embedded:vl-tiny-decoder` on generated sentences alone: it never sees a picture.

python -m adaptsuite.vl.pretrain_decoder --minutes 4 --seed 0 --out vl/weights

Next-token prediction (Radford et al. 2019) of captions and questions of scenes and of loose sentences. It learns how a
caption is put together, so that an adapter has to add one thing only: which of all scenes this picture shows.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from adaptsuite import pretraining
from adaptsuite.pretraining import Training
from adaptsuite.vl import synthetic
from adaptsuite.vl.backbones import causal_model
from adaptsuite.vl.captioner import next_token_losses
from adaptsuite.vl.tokenizer import SpellingTokenizer

RECORD = {
    "decoder": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128},
    "tokenizer": SpellingTokenizer(synthetic.words()).record(),
    "image": {"embedded": "vl-tiny"},  # which encoder stands beside it
}
LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))


@dataclass(frozen=True)
class Settings:
    """What a run can change."""

    minutes: float = 4.0  # of the process's own processor time
    seed: int = 0
    lr: float = 2e-3
    weight_decay: float = 0.05
    texts: int = 128  # of a step
    strange: float = 0.02  # share of words that random letters replace, so that spelling is trained too
    furthest: int = 64  # positions that may lie before a text: an adapter puts a prefix there
    ema: float = 0.998


def sentences(s: Settings, rng: np.random.Generator) -> list[str]:
    """s.texts of them: half captions, a quarter questions about scenes, a quarter loose ones."""
    scenes = rng.integers(0, synthetic.NUM_SCENES, s.texts // 2)
    asked = [
        t for level in synthetic.LEVELS for t in synthetic.ask(scenes[:: 2 * len(synthetic.LEVELS)], level, rng).texts
    ]
    texts = [*synthetic.captions(scenes, rng), *asked]
    texts += synthetic.loose_sentences(s.texts - len(texts), rng)
    return [" ".join(map(lambda word: _strange(word, s, rng), text.split())) for text in texts]


def _strange(word: str, s: Settings, rng: np.random.Generator) -> str:
    return "".join(rng.choice(LETTERS, rng.integers(2, 9))) if rng.random() < s.strange else word


def losses(model: nn.Module, tokenizer: SpellingTokenizer, s: Settings, rng: np.random.Generator) -> dict[str, Tensor]:
    """Of freshly drawn sentences; each text stands behind some positions without one."""
    text = tokenizer(sentences(s, rng))
    ids, mask = text["input_ids"], text["attention_mask"]
    first = rng.integers(0, min(s.furthest, tokenizer.max_length - ids.shape[1]) + 1, (len(ids), 1))
    places = torch.from_numpy(first) + torch.arange(ids.shape[1])
    logits = model(input_ids=ids, attention_mask=mask, position_ids=places).logits
    return {"word": (next_token_losses(logits, ids, mask).sum(1) / (mask.sum(1) - 1)).mean()}


def pretrain(s: Settings, out: Path) -> dict:
    """Trains for s.minutes and leaves vl-tiny-decoder.safetensors and its log in `out`, written anew each minute."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(s.seed)
    tokenizer = SpellingTokenizer.of(RECORD["tokenizer"])
    model = causal_model(RECORD).train()
    rng, held_out = np.random.default_rng(s.seed), np.random.default_rng(10**6)
    training = Training(model, model.parameters(), s, lambda p: p.ndim > 1, warmup=200, fall=0.5, clip=1.0)
    while (share := training.share) < 1:
        training.update(losses(model, tokenizer, s, rng), {"word": 1}, share)
        if training.due:
            training.log({"texts": training.step * s.texts}, lambda: read(training.average, tokenizer, s, held_out))
            save(training.average, training.history, s, out)
    last = {"minute": s.minutes, "step": training.step, "texts": training.step * s.texts}
    training.history.append(last | read(training.average, tokenizer, s, held_out))
    return save(training.average, training.history, s, out)


@torch.no_grad()
def read(model: nn.Module, tokenizer: SpellingTokenizer, s: Settings, rng: np.random.Generator) -> dict[str, float]:
    """log_loss a token of fresh captions, at the first positions, beside the least that their grammar allows."""
    text = tokenizer(synthetic.captions(rng.integers(0, synthetic.NUM_SCENES, 512), rng))
    ids, mask = text["input_ids"], text["attention_mask"]
    found = next_token_losses(model(input_ids=ids, attention_mask=mask).logits, ids, mask)
    least = np.log(synthetic.NUM_SCENES * 24) / (ids.shape[1] - 1)  # all scenes and orders alike
    return {"caption": round(float(found.sum() / mask[:, 1:].sum()), 4), "caption_least": round(float(least), 4)}


def save(model: nn.Module, history: list[dict], s: Settings, out: Path) -> dict:
    """Half-precision weights under the names of the stock GPT2Model, with what is needed to build and feed them."""
    return pretraining.save(
        out, "vl-tiny-decoder", model.transformer, RECORD, s, history, ["transformers"], log="vl-tiny-decoder.log.json"
    )


def main(argv: list[str] | None = None) -> None:
    pretraining.main(pretrain, Settings, __doc__, argv)


if __name__ == "__main__":
    main()
