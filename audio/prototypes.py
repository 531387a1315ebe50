"""Prototypical probing of a frozen backbone (Rauch et al. 2025, arXiv:2504.12880, 3); its head is in heads.py."""

from dataclasses import dataclass

from adaptsuite.method import register
from adaptsuite.selective import Linear


@register("audio.prototypes")
@dataclass(frozen=True)
class Prototypes(Linear):
    """Prototypical probe: the head alone, which looks for parts of each class's sounds (head.kind = prototypes)."""

    norms = ()  # the backbone is frozen whole
