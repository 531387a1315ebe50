"""Liveness where numbers are small: what trains is told from rounding noise."""

import sys

from adaptsuite.host import attach
from adaptsuite.testing import HOSTS
from adaptsuite.verify import verify


def test_a_small_gradient_that_is_there_in_float64_is_no_dead_one():
    """v stands beside three other small factors: on some hosts its gradient is a millionth of the largest."""
    host = HOSTS["timm_vit"]()
    handle = attach(host.model, "kadaptation", factor=4, scale=1e-6)
    found = {row["name"]: row for row in verify(handle, host.forward).rows}
    small = [row for name, row in found.items() if name.endswith(".v")]
    assert small and all(0 < row["gradient"] < 1e-6 and row["state"] == "alive" for row in small)


def test_rounding_noise_is_still_called_dead(monkeypatch):
    """A bias that softmax does not see, were it not exempt."""
    monkeypatch.setattr(sys.modules["adaptsuite.verify"], "_exempt", lambda handle: {})
    host = HOSTS["hf_bert"]()
    handle = attach(host.model, "bitfit", sample=(host.args, host.kwargs))
    rows = {row["name"]: row["state"] for row in verify(handle, host.forward).rows}
    keys = [state for name, state in rows.items() if "/key/" in name]
    assert keys and set(keys) == {"dead"} and set(rows.values()) == {"dead", "alive"}


def test_the_example_of_open_clip_reads_a_token_that_sees_others():
    """Of the first token's attention to itself alone, q and k have no gradient."""
    assert verify(attach(HOSTS["open_clip"]().model, "lora", rank=2, sites=("attn.q", "attn.k"))).ok
