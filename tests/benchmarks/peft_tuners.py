"""How many of peft's tuners go full circle as methods of this package, on which hosts, and why the others do not.

    python tests/benchmarks/peft_tuners.py [--hosts timm_vit,hf_ast,open_clip] [--tuners LOKR,BOFT] [--json FILE]

A circle, on a tiny host with random weights: attach; the host equals the backbone (=, or ~ by how much it does not,
where the tuner starts elsewhere); five steps lower a loss and leave the base as it was; the folder loads to the same
output; peft loads its own folder of it, within 1e-6; merged and unmerged agree within 1e-5; every trained tensor has a
gradient.
"""

import argparse
import json
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
import conftest  # noqa: E402, F401  finds the packages in a bare clone

from adaptsuite.artifact import load_adapter  # noqa: E402
from adaptsuite.bank import base_state  # noqa: E402
from adaptsuite.errors import UsageError  # noqa: E402
from adaptsuite.host import attach  # noqa: E402
from adaptsuite.peft_bridge import to_peft  # noqa: E402
from adaptsuite.peft_methods import OTHER_START, REFUSED  # noqa: E402
from adaptsuite.testing import HOSTS  # noqa: E402
from adaptsuite.verify import difference, verify  # noqa: E402

# whole modules, which peft can name: open_clip reads its attention's weights without a call
SITES = {"timm_vit": ("attn.qkv", "mlp.out"), "hf_ast": ("attn.q", "mlp.out"), "open_clip": ("mlp.in", "mlp.out")}
# sizes for layers of 32 features, where peft's defaults are for thousands
SMALL = {
    "ADAMSS": {"r": 8, "num_subspaces": 2},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 20, "scaling": 1.0},
    "FROD": {"sparse_rate": 0.1},
    "GRALORA": {"r": 4},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "PSOFT": {"r": 4, "psoft_alpha": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {"sparsity": 0.9},
    "VBLORA": {"num_vectors": 8, "vector_length": 8},
    "WAVEFT": {"n_frequency": 20},
}
STEPS = ("start", "trains", "ours", "peft's", "merge", "alive")


def values(host, model) -> list[torch.Tensor]:
    with torch.no_grad():
        return [host.forward(model).clone()]


def train(host, handle, steps: int = 5) -> tuple[float, float]:
    """The loss before and after; the target is noise of the output's shape."""
    torch.manual_seed(1)
    target = torch.randn_like(values(host, host.model)[0])
    optimizer = torch.optim.Adam([p for g in handle.trainable() for p in g["params"]], lr=0.01)
    losses = []
    for _ in range(steps + 1):
        loss = (host.forward() - target).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[0], losses[-1]


def circle(kind: str, name: str, folder: Path) -> dict[str, str]:
    """What each step of the circle found; "" where all is well, else what is not."""
    import peft

    host, found = HOSTS[name](), {}
    plain, base = values(host, host.model), {k: v.clone() for k, v in host.model.state_dict().items()}
    torch.manual_seed(0)
    settings = {"sites": ("norm",) if kind == "LN_TUNING" else SITES[name]} | SMALL.get(kind, {})
    handle = attach(host.model, f"peft:{kind}", sample=(host.args, host.kwargs), **settings)
    gap = difference(plain, values(host, host.model))
    found["start"] = "=" if gap == 0 else f"~{gap:.0e}"
    if gap > 1e-6 and kind not in OTHER_START:
        found["start"] = f"! {gap:.0e}"
    before, after = train(host, handle)
    moved = [k for k, v in base_state(host.model).items() if not torch.equal(v, base[k])]
    found["trains"] = f"! {moved[0]} moved" if moved else "ok" if after < before else f"! {before:.3f} to {after:.3f}"
    host.model.eval()
    trained = values(host, host.model)
    other = HOSTS[name]().model
    load_adapter(other, handle.save(folder / "ours"), sample=(host.args, host.kwargs))
    gap = difference(trained, values(host, other))
    found["ours"] = "ok" if gap == 0 else f"! {gap:.0e}"
    try:
        twin = peft.PeftModel.from_pretrained(HOSTS[name]().model, to_peft(handle, folder / "peft")).eval()
        gap = difference(trained, values(host, twin.base_model.model))
        found["peft's"] = "ok" if gap <= 1e-6 else f"! {gap:.0e}"
    except Exception as e:  # whatever peft raises is a row of the table
        found["peft's"] = f"! {type(e).__name__}: {' '.join(str(e).split())[:90]}"
    report = verify(handle, host.forward)
    found["alive"] = "ok" if report.ok else f"! {report.problems[0][:90]}"
    refused = f"no: {report.merge_reason[:60]}"
    found["merge"] = refused if report.merged is None else "ok" if report.merged <= 1e-5 else f"! {report.merged:.0e}"
    return found


def row(kind: str, name: str) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            return circle(kind, name, Path(folder))
        except UsageError as e:
            return {"attach": f"! {e}"}


def main() -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as TUNERS

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", default=",".join(SITES))
    parser.add_argument("--tuners", default=",".join(sorted(kind.value for kind in TUNERS)))
    parser.add_argument("--json")
    given = parser.parse_args()
    hosts, full, rows = given.hosts.split(","), Counter(), []
    print(f"{'tuner':<24}{'host':<11}" + "".join(f"{step:<8}" for step in STEPS))
    for kind in given.tuners.split(","):
        if kind in REFUSED:
            print(f"{kind:<24}not hosted: {REFUSED[kind]}")
            continue
        for name in hosts:
            found = row(kind, name)
            wrong = [f"{step}: {what[2:]}" for step, what in found.items() if what.startswith("!")]
            full[name] += not wrong
            cells = "".join(f"{found.get(s, '').partition(':')[0].partition(' ')[0]:<8}" for s in STEPS)
            said = "; ".join(wrong) or (found["merge"][4:] if found["merge"].startswith("no") else "")
            print(f"{kind:<24}{name:<11}{cells}{said}", flush=True)
            rows.append({"tuner": kind, "host": name, **found})
    kinds = given.tuners.split(",")
    hosted = [kind for kind in kinds if kind not in REFUSED]
    print(f"\nof {len(kinds)} tuners {len(hosted)} are hosted; full circle: ", end="")
    print(", ".join(f"{full[name]} on {name}" for name in hosts))
    if given.json:
        Path(given.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
