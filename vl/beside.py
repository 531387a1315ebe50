"""What few-shot adapters are judged beside: zero-shot, Tip-Adapter and a linear probe, of the same frozen features."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adaptsuite.experiment import linear_probe
from adaptsuite.host import get_handle
from adaptsuite.plan import Plan
from adaptsuite.predict import predict_all
from adaptsuite.vl.class_names import FewShotModel, Seeing
from adaptsuite.vl.pairs import Pairs
from adaptsuite.vl.tip_adapter import Cache, cached, chosen, tuned

BESIDE = ("zero_shot", "tip_adapter", "tip_adapter_f", "probe", "names_alone")
KNOWS_NEW = ("adapter", "zero_shot", "tip_adapter", "tip_adapter_f", "names_alone")  # of a class without a shot


@dataclass(frozen=True)
class Beside:
    """Baselines on frozen features, made of the shots alone."""

    names: Tensor  # (C, E) unit vectors of the class names
    tip: Cache
    tip_f: Cache
    probe: tuple[Tensor, Tensor]  # weight (B, E) and bias (B,) of the base classes
    constant: Tensor  # (C,) mean logits of the adapter over the shots: what names say without a picture
    scale: float

    def scores(self, features: Tensor) -> list[Tensor]:
        """(rows, C) of each of BESIDE."""
        zero_shot = self.scale * features @ self.names.T
        probe = zero_shot.new_full(zero_shot.shape, float("-inf"))
        probe[:, : len(self.probe[1])] = features @ self.probe[0].T + self.probe[1]
        tips = [_with_new(cache, features, zero_shot) for cache in (self.tip, self.tip_f)]
        return [zero_shot, *tips, probe, self.constant.expand_as(zero_shot)]

    def tensors(self) -> dict[str, Tensor]:
        numbers = [self.tip.alpha, self.tip.beta, self.scale]
        return {
            "names": self.names, "keys": self.tip.keys, "values": self.tip.values, "tuned_keys": self.tip_f.keys,
            "weight": self.probe[0], "bias": self.probe[1], "constant": self.constant, "numbers": torch.tensor(numbers),
        }  # fmt: skip

    @classmethod
    def of(cls, t: Mapping[str, Tensor]) -> "Beside":
        alpha, beta, scale = map(float, t["numbers"])
        tip, tip_f = (Cache(t[keys], t["values"], alpha, beta) for keys in ("keys", "tuned_keys"))
        return cls(t["names"], tip, tip_f, (t["weight"], t["bias"]), t["constant"], scale)


def _with_new(cache: Cache, features: Tensor, zero_shot: Tensor) -> Tensor:
    """A cache has shots of base classes alone: the other columns stay those of the names."""
    base = cache.values.shape[1]
    return torch.cat([cache.logits(features, zero_shot[:, :base]), zero_shot[:, base:]], 1)


def make_beside(model: FewShotModel, train: Pairs, val: Pairs | None, constant: np.ndarray, plan: Plan) -> Beside:
    """Baselines of the shots; the adapter of `model` is off meanwhile."""
    with get_handle(model).disabled(), torch.no_grad():
        names = F.normalize(model.classes().mean(1), dim=-1).cpu()
        scale = float(model.towers.scale)
        seen, labels = _seen(model, train, plan)
        val_seen = None if val is None else _seen(model, val, plan)
    base = model.num_base

    def zero_shot(features: Tensor) -> Tensor:
        return scale * features @ names[:base].T

    cache = cached(seen, labels, base)
    if val_seen is not None:
        cache = chosen(cache, val_seen[0], zero_shot(val_seen[0]), val_seen[1])
    tip_f = tuned(cache, seen, zero_shot(seen), labels, seed=plan.seed)
    weight, bias = (torch.from_numpy(v).float() for v in linear_probe(seen.numpy(), labels.numpy(), base))
    return Beside(names, cache, tip_f, (weight, bias), torch.from_numpy(constant).float(), scale)


def _seen(model: FewShotModel, data: Pairs, plan: Plan) -> tuple[Tensor, Tensor]:
    features, labels = predict_all(model, Seeing(), data, plan.batch_size, plan.device, workers=plan.workers)
    return torch.from_numpy(features), torch.from_numpy(data.item_targets if labels is None else labels)
