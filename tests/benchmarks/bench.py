"""All rows of the speed table: what is measured, its bar, and the peer beside it, as JSON and Markdown.

    python tests/benchmarks/bench.py [--only lora_step,last_k_flops] [--out FOLDER]

Every script of this folder with a function `rows()` is run in a process of its own, with one thread, so that none
starts in another's memory. FLOPs and bytes are exact; times are ratios of turns taken in one process. A script that
fails is a row that is not met, and the exit code is 1. Writes results.json and results.md.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHILD = "import json, sys, runpy; sys.stdout, out = sys.stderr, sys.stdout; \
found = runpy.run_path(sys.argv[1], run_name='bench')['rows'](); print(json.dumps(found), file=out)"


def scripts() -> list[str]:
    """Names of the scripts with a function `rows`, read and not imported."""

    def has_rows(path: Path) -> bool:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        return any(isinstance(node, ast.FunctionDef) and node.name == "rows" for node in tree.body)

    return sorted(path.stem for path in HERE.glob("*.py") if path.stem != "bench" and has_rows(path))


def measured(name: str) -> list[dict]:
    """The rows of one script, each with its name."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-c", CHILD, str(HERE / f"{name}.py")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ran.returncode:
        reason = (ran.stderr.strip().splitlines() or ["no message"])[-1]
        return [{"row": name, "value": None, "bar": None, "met": False, "peer": reason, "spread": None, "by": name}]
    return [{**row, "by": name} for row in json.loads(ran.stdout)]


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def markdown(rows: list[dict]) -> str:
    lines = ["| row | value | quartiles | bar | met | beside | script |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        spread = " to ".join(map(number, r["spread"])) if r.get("spread") else ""
        cells = r["row"], number(r["value"]), spread, number(r["bar"]), "yes" if r["met"] else "no", r["peer"], r["by"]
        lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="some of the scripts, by commas: " + ", ".join(scripts()))
    parser.add_argument("--out", type=Path, default=HERE)
    given, found = parser.parse_args(), []
    for name in given.only.split(",") if given.only else scripts():
        print(f"{name} ...", file=sys.stderr, flush=True)
        found += measured(name)
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "results.json").write_text(json.dumps({"rows": found}, indent=1) + "\n", encoding="utf-8")
        (given.out / "results.md").write_text(markdown(found), encoding="utf-8")
    print(markdown(found), end="")
    return 0 if all(row["value"] is not None for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
