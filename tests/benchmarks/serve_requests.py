"""A thousand HTTP requests over many adapters of one backbone, which are unloaded and loaded meanwhile.

    python tests/benchmarks/serve_requests.py [--requests 1000] [--adapters 64] [--clients 8] [--json]

The server is a process of its own (`adapt serve`). Every answer is compared with what its adapter says alone, loaded
anew in this process. A request for an adapter that is away at the moment gets 404 and is asked again. Memory is the
server's resident set, before and after: before means after a first round of as many requests with loads and unloads.
"""

import argparse
import http.client
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from adaptsuite import experiment
from adaptsuite.host import attach
from adaptsuite.recipe import Recipe, to_dict
from adaptsuite.serve import Server
from adaptsuite.vision.pipeline import DOMAIN

METHODS = ("lora", "lora", "bottleneck", "bitfit", "ssf")
PICTURES, TOLERANCE = 4, 1e-5


def make_adapters(root: Path, num: int) -> list[str]:
    """Adapters of several methods, ranks and numbers of classes, away from their start; and their names."""
    recipe = Recipe(domain="vision", backbone="embedded:vision-tiny", method="linear", seeds=(0,))
    recipe = experiment.complete(DOMAIN, recipe)
    models = {k: DOMAIN.model(recipe, [f"class {c}" for c in range(k)]) for k in range(2, 6)}
    for i in range(num):
        model, method = models[2 + i % 4], METHODS[i % len(METHODS)]
        settings = {"rank": 2 + i % 7, "alpha": 4.0} if method == "lora" else {}
        handle = attach(model, method, sample=DOMAIN.sample(model), head="head", **settings)
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for p in handle.trained().values():
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.05)
        own = replace(DOMAIN.decided(recipe, model), method=method, method_settings={})
        labels, temperature = [f"class {c}" for c in range(2 + i % 4)], 1 + i / num
        handle.save(root / f"adapter-{i}", labels=labels, temperature=temperature, recipe=to_dict(own))
        handle.detach()
    return [f"adapter-{i}" for i in range(num)]


def make_pictures(root: Path) -> list[Path]:
    from PIL import Image

    generator = np.random.default_rng(0)
    paths = [root / f"{i}.png" for i in range(PICTURES)]
    for path in paths:
        Image.fromarray(generator.integers(0, 255, (96, 96, 3), dtype=np.uint8)).save(path)
    return paths


def alone(root: Path, names: list[str], pictures: list[Path]) -> dict[tuple[str, int], dict]:
    """Scores of each adapter and picture, of a server that knows no other adapter."""
    found = {}
    for name in names:
        with Server(DOMAIN, {name: root / name}, "cpu", batch_size=1) as server:
            for i, path in enumerate(pictures):
                found[name, i] = server.predict(name, path)["scores"]
    return found


class Client(threading.Thread):
    """Asks for random adapters and pictures, and now and then takes an adapter away and brings it back."""

    def __init__(self, port: int, seed: int, count: int, names: list[str], files: list[bytes], expected: dict):
        super().__init__()
        self.port, self.random, self.count = port, random.Random(seed), count
        self.names, self.files, self.expected = names, files, expected
        self.wrong: list[str] = []
        self.away = self.swaps = self.asked = 0
        self.seconds: list[float] = []

    def run(self) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        while self.asked < self.count:
            name, i = self.random.choice(self.names), self.random.randrange(len(self.files))
            if self.random.random() < 0.03:
                self.ask("DELETE", f"/adapters/{name}")
                self.ask("PUT", f"/adapters/{name}")
                self.swaps += 1
            start = time.perf_counter()
            status, found = self.ask("POST", f"/adapters/{name}/predict", self.files[i])
            if status == 404:
                self.away += 1
                continue
            self.asked += 1
            self.seconds.append(time.perf_counter() - start)
            own = self.expected[name, i]
            scores = found.get("scores", {})
            if status != 200 or scores.keys() != own.keys() or any(abs(scores[k] - own[k]) > TOLERANCE for k in own):
                self.wrong.append(f"{name}, picture {i}: {status} {found}, alone {own}")
        self.connection.close()

    def ask(self, verb: str, path: str, body: bytes | None = None) -> tuple[int, dict]:
        self.connection.request(verb, path, body)
        answer = self.connection.getresponse()
        return answer.status, json.loads(answer.read())


def served(root: Path, port: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "adaptsuite.cli", "serve", "--adapters", str(root), "--port", str(port)]
    process = subprocess.Popen([*command, "--device", "cpu"], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return process
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"the server ended with {process.returncode}")


def resident_mib(process: subprocess.Popen) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def measure(requests: int = 1000, adapters: int = 64, clients: int = 8) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        root, other = Path(folder) / "adapters", Path(folder) / "pictures"
        root.mkdir(), other.mkdir()
        names, pictures = make_adapters(root, adapters), make_pictures(other)
        expected, files = alone(root, names, pictures), [p.read_bytes() for p in pictures]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        process = served(root, port)
        try:
            memory, found = [], []
            for turn in range(2):
                found = [
                    Client(port, 100 * turn + i, -(-requests // clients), names, files, expected)
                    for i in range(clients)
                ]
                for client in found:
                    client.start()
                for client in found:
                    client.join()
                memory.append(resident_mib(process))
        finally:
            process.terminate()
            process.wait()
    return {
        "requests": sum(c.asked for c in found),
        "wrong": [line for c in found for line in c.wrong],
        "away": sum(c.away for c in found),
        "swaps": sum(c.swaps for c in found),
        "median_ms": round(1e3 * statistics.median(s for c in found for s in c.seconds), 1),
        "memory_mib": [round(m, 1) for m in memory],
    }


def rows(requests: int = 1000, adapters: int = 64, clients: int = 8) -> list[dict]:
    found = measure(requests, adapters, clients)
    before, after = found["memory_mib"]
    name = f"serve: {found['requests']} requests over {adapters} adapters"
    facts = {k: found[k] for k in ("swaps", "away", "median_ms", "memory_mib")}
    return [
        {"row": f"{name}, wrong answers", "value": len(found["wrong"]), "bar": 0, "met": not found["wrong"]}
        | {"peer": "each adapter alone", "spread": None, "wrong": found["wrong"][:3], **facts},
        {"row": f"{name}, memory after / before", "value": round(after / before, 4), "bar": 1.05}
        | {"met": after / before <= 1.05, "peer": "the round before", "spread": None},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("requests", 1000), ("adapters", 64), ("clients", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = rows(options.requests, options.adapters, options.clients)
    print(json.dumps(found) if options.json else "\n".join(map(str, found)))


if __name__ == "__main__":
    main()
