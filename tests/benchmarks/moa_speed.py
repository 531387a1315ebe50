"""Fused mixtures against plain loops over their experts, and against one bottleneck adapter: time, memory, equality.

    python tests/benchmarks/moa_speed.py [--repeats 40] [--batch 4] [--threads 1]

One measurement is forward and backward of one site, inputs' gradients included. The three variants take turns in one
process, and a ratio is the median over turns with its quartiles: the machine's own speed and load cancel. With one
thread the time is the process's own, so that what else runs does not count.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

from adaptsuite.audio.soft_moa import DenseMoaBranch, Experts, SoftMoaBranch
from adaptsuite.bank import Context
from adaptsuite.bottleneck import BottleneckBranch

TOKENS, WIDTH, BOTTLENECK = 590, 768, 6  # AST-base on 5 s; the papers' reduction rate of 128


class Adapter(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(WIDTH, BOTTLENECK), nn.GELU(), nn.Linear(BOTTLENECK, WIDTH))


class DenseLoop(nn.Module):
    """out = sum_n gate_n A_n(x), one expert after the other."""

    def __init__(self, branch: DenseMoaBranch):
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, branch.gate.out_features), copied(branch)
        self.gate.load_state_dict(branch.gate.state_dict())

    def forward(self, x: Tensor, y: Tensor, context: Context) -> Tensor:
        gate = self.gate(x).softmax(-1)
        for n, expert in enumerate(self.experts):
            y = y + gate[..., n, None] * expert(x)
        return y

    def gradients(self) -> dict[str, Tensor]:
        return {"gate.weight": self.gate.weight.grad, "gate.bias": self.gate.bias.grad, **stacked(self.experts)}


class SoftLoop(nn.Module):
    """The equations of Soft MoE with einsum, as its authors write them; each expert takes its own slots."""

    def __init__(self, branch: SoftMoaBranch):
        super().__init__()
        self.phi, self.experts = nn.Parameter(branch.phi.detach().clone()), copied(branch)  # (D, N, S)

    def forward(self, x: Tensor, y: Tensor, context: Context) -> Tensor:
        logits = torch.einsum("btd,dns->btns", x, self.phi)
        dispatch = logits.softmax(1)
        combine = logits.flatten(2).softmax(-1).view_as(logits)
        slots = torch.einsum("btns,btd->bnsd", dispatch, x)
        out = torch.stack([expert(slots[:, n]) for n, expert in enumerate(self.experts)], 1)
        return y + torch.einsum("btns,bnsd->btd", combine, out)

    def gradients(self) -> dict[str, Tensor]:
        return {"phi": self.phi.grad, **stacked(self.experts)}


def copied(branch: nn.Module) -> nn.ModuleList:
    """The experts of a fused mixture as modules of their own."""
    e, found = branch.experts, nn.ModuleList(Adapter() for _ in branch.experts.down)
    with torch.no_grad():
        for n, expert in enumerate(found):
            for own, value in zip(expert.parameters(), (e.down, e.down_bias, e.up, e.up_bias), strict=True):
                own.copy_(value[n])
    return found


def stacked(experts: nn.ModuleList) -> dict[str, Tensor]:
    names = ("down", "down_bias", "up", "up_bias")
    grads = zip(*([p.grad for p in expert.parameters()] for expert in experts), strict=True)
    return {f"experts.{name}": torch.stack(values) for name, values in zip(names, grads, strict=True)}


def build(kind: str, experts: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """(fused, loop, one adapter), away from the zeros that adapters start with."""
    torch.manual_seed(0)
    made, loop = {"dense": (DenseMoaBranch, DenseLoop), "soft": (SoftMoaBranch, SoftLoop)}[kind]
    fused = made(Experts(WIDTH, experts, BOTTLENECK))
    single = BottleneckBranch(WIDTH, BOTTLENECK, WIDTH)
    with torch.no_grad():
        for p in (*fused.parameters(), *single.parameters()):
            p.add_(torch.randn_like(p), alpha=0.05)
    return fused, loop(fused), single


def step(branch: nn.Module, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    out = branch(x, y, Context())
    out.backward(weight)
    return out


def saved_bytes(branch: nn.Module, x: Tensor, y: Tensor) -> int:
    """What the forward keeps for the backward, each storage once; parameters and inputs are there anyway."""
    there = {t.untyped_storage().data_ptr() for t in (*branch.parameters(), x, y)}
    kept = []  # alive together, so that no address comes twice
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = branch(x, y, Context())
    sizes = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in kept)}
    del out
    return sum(size for pointer, size in sizes.items() if pointer not in there)


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def equality(kind: str, experts: int, batch: int, dtype: torch.dtype) -> tuple[float, float]:
    """Largest difference of the mixture's output and of all gradients, relative to the largest value of each tensor."""
    fused, loop, _ = build(kind, experts)
    x, weight = (torch.randn(batch, TOKENS, WIDTH, dtype=dtype) for _ in range(2))
    outs, grads = [], []
    for branch in (fused.to(dtype), loop.to(dtype)):
        own = x.clone().requires_grad_()
        outs.append(step(branch, own, torch.zeros_like(x), weight).detach())
        grads.append({"x": own.grad})
    grads[0] |= {name: p.grad for name, p in fused.named_parameters()}
    grads[1] |= loop.gradients()
    assert grads[0].keys() == grads[1].keys()
    return gap(*outs), max(gap(grads[0][name], grads[1][name]) for name in grads[0])


def turns(kind: str, experts: int, batch: int, repeats: int) -> tuple[list[dict[int, float]], list[float]]:
    """Seconds of the fused, the looped and the single one in each turn, and MiB that each keeps."""
    variants = build(kind, experts)
    x, y, weight = (torch.randn(batch, TOKENS, WIDTH) for _ in range(3))
    x.requires_grad_(), y.requires_grad_()
    memory = [saved_bytes(branch, x, y) / 2**20 for branch in variants]
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times = []
    for turn in range(repeats + 1):
        taken = {}
        for which in ((turn + i) % 3 for i in range(3)):
            for t in (x, y, *variants[which].parameters()):
                t.grad = None
            start = clock()
            step(variants[which], x, y, weight)
            taken[which] = clock() - start
        times += [taken] if turn else []  # the first one warms up
    return times, memory


def rows(repeats: int = 20) -> list[dict]:
    """Each mixture of 8 experts against its loop, which it must not be slower than."""
    found = []
    for kind in ("dense", "soft"):
        times, _ = turns(kind, 8, 4, repeats)
        low, ratio, high = statistics.quantiles([t[0] / t[1] for t in times], n=4)
        name = f"{kind} mixture of 8, fused over loop"
        found.append(
            {"row": name, "value": ratio, "bar": 1.0, "met": ratio <= 1, "peer": "plain loop", "spread": [low, high]}
        )
    return found


def compare(kind: str, experts: int, batch: int, repeats: int) -> None:
    times, memory = turns(kind, experts, batch, repeats)
    differences = (*equality(kind, experts, batch, torch.float32), max(equality(kind, experts, batch, torch.float64)))
    row = f"{kind:<6}{experts:>3}" + "".join(f" {d:>8.1e}" for d in differences)
    row += "".join(f" {statistics.median(t[i] for t in times) * 1e3:>7.1f}" for i in range(3))
    for a, b in ((1, 0), (0, 2)):
        low, ratio, high = statistics.quantiles([t[a] / t[b] for t in times], n=4)
        row += f" {ratio:>7.2f} {f'{low:.2f}-{high:.2f}':>12}"
    print(row + "".join(f" {m:>7.1f}" for m in memory), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} thread(s), {options.repeats} turns, float32")
    print(f"B={options.batch} T={TOKENS} d={WIDTH} r={BOTTLENECK}, one slot per expert, forward + backward")
    print(
        f"{'':<9} {'difference, relative':^26} {'milliseconds':^23} {'loop / fused':^20} {'fused / one':^20}"
        f" {'saved MiB':^23}"
    )
    print(
        f"{'':<6}{'n':>3} {'output':>8} {'gradient':>8} {'float64':>8}"
        + f" {'fused':>7} {'loop':>7} {'one':>7}"
        + f" {'median':>7} {'quartiles':>12}" * 2
        + f" {'fused':>7} {'loop':>7} {'one':>7}"
    )
    for kind in ("dense", "soft"):
        for experts in (4, 8, 16):
            compare(kind, experts, options.batch, options.repeats)


if __name__ == "__main__":
    main()
