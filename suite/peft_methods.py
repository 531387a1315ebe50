"""peft's tuners as methods of this package: `peft:LOKR`, `peft:BOFT`, `peft:VERA` ... with peft's own settings.

peft replaces modules of a model. Here the model keeps them: every site is shown to peft as one Linear of a shell, peft
wraps that, and the wrapped layer is the branch of the site. So its tuners act wherever weights are, in parts of a
fused qkv and in weights that are read without a call, and are saved, merged and verified as all methods are.
"""

import contextlib
import dataclasses
import functools
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields, make_dataclass
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from torch import nn

from adaptsuite.errors import UsageError, nearest
from adaptsuite.method import Method
from adaptsuite.peft_layers import PeftBranch, PeftWeightBranch, Shell
from adaptsuite.recipe import build
from adaptsuite.sites import Site

# tuners that have no layer of their own to host, and the reason
PROMPTS = "it prompts a language model of transformers; take prompt, prefix or vpt"
REFUSED = {
    **dict.fromkeys(("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"), PROMPTS),
    **dict.fromkeys(("CARTRIDGE", "ADAPTION_PROMPT"), PROMPTS),
    "ADALORA": "peft moves its ranks only where the training loop calls it; take adalora",
    "POLY": "its forwards need the task of every sample",
    "SHADOW": "it runs a second network beside the layers of a decoder",
    "TRAINABLE_TOKENS": "it trains rows of a token embedding, which has no site",
    "XLORA": "it is a gate over finished LoRA adapters",
}
# tuners that do not start as the backbone, with peft's defaults, and why
OTHER_START = {
    "C3A": "its kernels start at random (init_weights='xavier_uniform')",
    "FOURIERFT": "its spectrum starts at random (init_weights=False)",
    "UNILORA": "its shared vector starts at random, without a zero side",
    "VBLORA": "its vector bank starts at random, without a zero side",
    **dict.fromkeys(("DEFT", "FROD", "HRA", "OSF"), "the weight is taken apart and put together again, to rounding"),
}
UNMERGEABLE = {
    "LILY": "lily routes every token by itself: no weight can hold that",
    "LN_TUNING": "a norm is replaced, which is no change of one weight; film trains the same and merges",
}
OWN_DEFAULTS = {"SHIRA": {"random_seed": 0}}  # peft's None draws places that peft's files keep and its layers do not
FIXED = {"FROD": {"progressbar": False}}
# what the core decides (where, with which base) or what only transformers' models have
NOT_HERE = {
    "base_model_name_or_path", "bias", "ensure_weight_tying", "fan_in_fan_out", "inference_mode", "init_weights_path",
    "layers_to_transform", "megatron_core", "peft_type", "peft_version", "progressbar", "qalora_group_size", "revision",
    "runtime_offload_base_weight", "save_indices", "save_only_topk_weights", "save_precomputed_indices",
    "save_projection", "task_type", "use_effective_conv2d", "use_qalora",
}  # fmt: skip
LARGEST = 1e6  # no setting of peft's comes near


def tuners() -> list[str]:
    """The methods there are: peft's tuners that can live at a site."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    return sorted(f"peft:{kind.value}" for kind in PEFT_TYPE_TO_TUNER_MAPPING if kind.value not in REFUSED)


@functools.cache
def tuner(name: str) -> type["PeftMethod"]:
    """The method of `peft:NAME`, whose settings are the plain ones of peft's config, with peft's defaults.

    Raises UsageError where peft is missing or has no such tuner, and for tuners that cannot live at a site.
    """
    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS
    except ImportError as e:
        raise UsageError(f"method {name!r} needs peft: pip install 'adaptsuite[peft]'") from e
    kind = name.removeprefix("peft:")
    if kind in REFUSED:
        raise UsageError(f"method {name!r} cannot be hosted: {REFUSED[kind]}")
    if kind not in CONFIGS:
        raise UsageError(f"method {name!r}: peft has no tuner {kind!r}; {nearest(name, tuners())}")
    hints, given = get_type_hints(CONFIGS[kind]), OWN_DEFAULTS.get(kind, {})
    sites = ("norm",) if kind == "LN_TUNING" else ("attn.q", "attn.v")
    own = [(f.name, hints[f.name], f) for f in fields(CONFIGS[kind]) if _is_setting(f, hints[f.name])]
    own = [(n, hint, dataclasses.field(default=given.get(n, f.default))) for n, hint, f in own]
    facts = {
        "name": name,
        "kind": kind,
        "mergeable": UNMERGEABLE.get(kind, True),
        "__module__": __name__,
        "__doc__": f"peft's {kind}, as peft itself computes it.",
    }
    rows = [*own, ("sites", tuple[str, ...], dataclasses.field(default=sites))]
    return make_dataclass(kind, rows, bases=(PeftMethod,), namespace=facts, frozen=True)


def __getattr__(name: str):
    """The classes that `tuner` makes, where pickle looks for them."""
    if name.isupper() and not name.startswith("_"):
        with contextlib.suppress(UsageError):
            return tuner(f"peft:{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _is_setting(field: dataclasses.Field, hint: Any) -> bool:
    """Whether a field of a peft config is a plain value that is the method's own business."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    plain = all(part in (bool, int, float, str, types.NoneType) or get_origin(part) is Literal for part in parts)
    return plain and field.default is not dataclasses.MISSING and field.name not in NOT_HERE


@dataclass(frozen=True)
class PeftMethod(Method):
    """What all of peft's tuners have in common here."""

    kind: ClassVar[str]  # in peft
    norms = ()

    @property
    def identity_at_start(self) -> bool:
        """Promised for peft's own defaults alone, and not for the tuners in OTHER_START."""
        changed = any(f.name.startswith("init") and getattr(self, f.name) != f.default for f in fields(self))
        return self.kind not in OTHER_START and not changed

    @property
    def random(self) -> float | bool:
        """The largest dropout of any kind; True where a training forward draws at random anyway."""
        rates = [getattr(self, f.name) or 0.0 for f in fields(self) if f.name.endswith("dropout")]
        return self.kind == "PVERA" or max(rates, default=0.0)

    def check(self) -> None:
        build(type(self), {f.name: getattr(self, f.name) for f in fields(self)}, self.name)  # types
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float | int) and not abs(value) <= LARGEST:
                raise UsageError(f"{self.name}: {f.name} is {value!r}, a number within {LARGEST:.0e} is expected")
        if self.kind == "SHIRA":
            self.expect("random_seed", self.random_seed is not None, "a number: peft does not store what it draws")
        self.config("x", "x")

    def config(self, targets: str, feedforward: str):
        """peft's config for modules whose names match the pattern `targets` as a whole.

        feedforward: the pattern of those that close an MLP, whose input IA3 scales.  Raises UsageError.
        """
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "sites"} | FIXED.get(self.kind, {})
        if self.kind == "IA3":
            settings["feedforward_modules"] = feedforward
        with self.refusals():
            return PEFT_TYPE_TO_CONFIG_MAPPING[self.kind](target_modules=targets, **settings)

    @contextlib.contextmanager
    def refusals(self) -> Iterator[None]:
        """What peft refuses is one line of ours; its warnings, which speak of its own hosts, are not repeated."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except Exception as e:  # peft's checks raise all kinds
            raise UsageError(f"{self.name}: peft refuses: {' '.join(str(e).split())[:300] or type(e).__name__}") from e

    def shared(self, sites: list[Site]) -> nn.Module:
        return Shell()

    def build(self, site: Site, shared: Shell) -> nn.Module:
        if (site.weight is None) != (self.kind == "LN_TUNING"):
            wanted = "norms: name norm" if self.kind == "LN_TUNING" else "weights: name attn.q, mlp.in ..."
            raise UsageError(f"{self.name} needs {wanted} as sites, not {site.role!r}")
        return (PeftBranch if self.kind in UNMERGEABLE else PeftWeightBranch)(site, shared, self.random)

    def bind(self, model: nn.Module, adapter: nn.Module) -> None:
        adapter.shared.fill(model, [adapter.sites[key] for key in adapter.branches], self)
