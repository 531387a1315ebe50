"""Which start of the joining kernel is right? What each does to tokens, and accuracy on generated leaves.

    python tests/benchmarks/vision_residual.py [--seeds 0,1,2] [--cultivars 40] [--shots 3] [--separation 2.4] ...

Gains are those of one module and of two in a row, on constant and on white-noise patch tokens beside a CLS token, which
keeps its size: the spread between them is what later, frozen blocks have to bear. Accuracy is that of `vision.ila` on
the task of adaptsuite.vision.synthetic; options go to tests/benchmarks/methods.py.
"""

import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import conftest  # noqa: E402, F401  finds the packages in a bare clone

from adaptsuite.grid import Shrink  # noqa: E402
from adaptsuite.vision.inter_layer import Residuals  # noqa: E402

STARTS = ("mean", "ones", "near_ones", "avg_pool")


def gains() -> None:
    torch.manual_seed(0)
    constant, noise = torch.ones(1, 768, 14, 14), torch.randn(8, 768, 14, 14)
    print(f"{'start':<12} {'constant':>9} {'twice':>9} {'noise':>9} {'twice':>9}   CLS 1")
    for start in STARTS:
        joins = [Residuals(768, Shrink(), start) for _ in range(2)]
        with torch.no_grad():
            first = [join(x) for x, join in ((constant, joins[0]), (noise, joins[0]))]
            second = [joins[1](x) for x in first]
        size = [float(x.mean()) for x in (first[0], second[0])] + [
            float(x.std() / noise.std()) for x in (first[1], second[1])
        ]
        print(f"{start:<12} {size[0]:>9.3f} {size[1]:>9.3f} {size[2]:>9.3f} {size[3]:>9.3f}", flush=True)


def main() -> None:
    gains()
    options = sys.argv[1:] or ["--cultivars", "40", "--shots", "3", "--separation", "2.4"]
    methods = ["linear", *(f"vision.ila:residual={start}" for start in STARTS)]
    command = [sys.executable, str(HERE / "methods.py"), "vision", "--methods", ",".join(methods), *options]
    print(flush=True)
    raise SystemExit(subprocess.run(command).returncode)


if __name__ == "__main__":
    main()
