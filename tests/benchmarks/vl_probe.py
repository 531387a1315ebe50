"""What frozen features of `embedded:vl-tiny` hold, beside those of the same networks with random weights.

python tests/benchmarks/vl_probe.py [--weights FILE] [--seeds 3] [--data DIR] [--json FILE]

Of generated scenes: a ridge regression reads colour and shape of each cell from CLS, and of a patch's own cell from the
patch. Of captions: how often the mean over words finds the same scene in another order among 1000 captions, half of
which are colour swaps of the others. Of NLVR and VQA-RAD (closed questions): logistic regression on the text's features
alone, the picture's alone, and both side by side; side by side binds nothing, so little is to be expected.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
import conftest  # noqa: E402, F401  finds the packages in a bare clone

from adaptsuite.backbones import bind, load_backbone, record_of  # noqa: E402
from adaptsuite.front_end import FrontEnd  # noqa: E402
from adaptsuite.vl import synthetic  # noqa: E402
from adaptsuite.vl.backbones import EncoderPair, encoder_pair  # noqa: E402
from adaptsuite.vl.data import ImageTexts, labelled, load_nlvr, load_vqa_rad  # noqa: E402
from adaptsuite.vl.pretrain import cell_of_patch, mean_pool  # noqa: E402

TRAIN, TEST = 3000, 2000  # scenes


def loaded(weights: Path) -> EncoderPair:
    from safetensors.torch import load

    data = weights.read_bytes()
    pair = encoder_pair(record_of(data))
    pair.load_state_dict(load(data))
    return bind(pair, weights.name)


@torch.no_grad()
def image_tokens(pair: EncoderPair, pictures: Tensor, size: int = 500) -> Tensor:
    return torch.cat([pair.encode_image(part) for part in pictures.split(size)])


@torch.no_grad()
def text_features(pair: EncoderPair, ids: Tensor, mask: Tensor, size: int = 500) -> Tensor:
    parts = zip(ids.split(size), mask.split(size), strict=True)
    return torch.cat([mean_pool(pair.encode_text(i, m), m) for i, m in parts])


def read(x: Tensor, y: Tensor, train: int) -> float:
    """Accuracy of a ridge regression on one-hot targets, fitted on the first `train` rows."""
    x = F.pad((x - x[:train].mean(0)) / x[:train].std(0).clamp_min(1e-6), (0, 1), value=1.0).double()
    a, b = x[:train], F.one_hot(y[:train]).double()
    head = torch.linalg.solve(a.T @ a + 1e-3 * train * torch.eye(x.shape[1]).double(), a.T @ b)
    return float(((x[train:] @ head).argmax(1) == y[train:]).double().mean())


def scene_rows(pair: EncoderPair) -> dict[str, float]:
    rng = np.random.default_rng(10)
    scenes = rng.permutation(synthetic.NUM_SCENES)[: TRAIN + TEST]
    tokens = image_tokens(pair, torch.from_numpy(synthetic.render(scenes, rng)))
    found = {}
    for name, values in zip(("colours", "shapes"), synthetic.objects(scenes), strict=True):
        truth = torch.from_numpy(values).long()
        found[f"{name} from CLS"] = float(np.mean([read(tokens[:, 0], truth[:, i], TRAIN) for i in range(4)]))
        own = [read(tokens[:, 1 + p], truth[:, at], TRAIN) for p, at in enumerate(cell_of_patch().tolist())]
        found[f"{name} from patches"] = float(np.mean(own))
    return found


def order_rows(pair: EncoderPair) -> dict[str, float]:
    rng = np.random.default_rng(11)
    scenes = rng.permutation(synthetic.NUM_SCENES)[:500]
    scenes = np.concatenate([scenes, synthetic.swap_colours(scenes, 0, 1)])
    first, second = (
        F.normalize(text_features(pair, t["input_ids"], t["attention_mask"]), dim=1)
        for t in (pair.tokenizer(synthetic.captions(scenes, rng)) for _ in range(2))
    )
    best = (first @ second.T).argmax(1).numpy()
    same_words = np.arange(1000) % 500 == best % 500
    return {"caption R@1": float(np.mean(best == np.arange(1000))), "words R@1": float(np.mean(same_words))}


def real_rows(pair: EncoderPair, name: str, folder: Path) -> dict[str, float]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    wide = name == "NLVR"
    table = load_nlvr(folder) if wide else labelled(load_vqa_rad(folder, "closed"))
    front = FrontEnd(size=(32, 128) if wide else (64, 64), fit="squash" if wide else "crop")
    data = ImageTexts(table.rows, front, pair.tokenizer)
    tokens = image_tokens(pair, torch.stack([data.image(row.files["image"]) for row in table.rows]))
    image = torch.cat([tokens[:, 0], tokens.mean(1), tokens.std(1)], 1).numpy()
    text = text_features(pair, data.text["input_ids"], data.text["attention_mask"]).numpy()
    label, test = np.array(table.column("label")), np.array(table.column("split")) == "test"
    common, counts = np.unique(label[~test], return_counts=True)
    found = {f"{name} majority": float(np.mean(label[test] == common[counts.argmax()]))}
    for kind, x in (("text", text), ("image", image), ("both", np.concatenate([text, image], 1))):
        x = StandardScaler().fit(x[~test]).transform(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = LogisticRegression(C=0.01, max_iter=300).fit(x[~test], label[~test])
        found[f"{name} {kind}"] = float(model.score(x[test], label[test]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=ROOT / "vl" / "weights" / "vl-tiny.safetensors")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=conftest.DATA)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    pairs = {arguments.weights.stem: loaded(arguments.weights)}
    for seed in range(arguments.seeds):
        pairs[f"random {seed}"] = load_backbone("embedded:vl-tiny", random_weights=True, seed=seed)
    result = {}
    for name, pair in pairs.items():
        result[name] = scene_rows(pair) | order_rows(pair)
        for title, folder in (("NLVR", "vl_nlvr"), ("VQA-RAD", "vl_vqa_rad")):
            if (arguments.data / folder).is_dir():
                result[name] |= real_rows(pair, title, arguments.data / folder)
        for what, value in result[name].items():
            print(f"{name:10}  {what:22}  {value:.3f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
