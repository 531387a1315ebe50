"""Runs that are killed with SIGKILL and resumed must end with the weights, bit for bit, of a run left alone.

Run as a script, this file is the process that is killed: one import, then a fork for every session.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

FAST = ["middle", "write", "renamed"]
SLOW = ["step", "marker", "rename", "prune", "evaluation"]
VARIANTS = {
    "ema": {"ema": 0.9},
    "sgd": {"optimizer": "sgd", "momentum": 0.8, "min_lr": 1e-4, "warmup_steps": 3},
    "one_cycle": {"schedule": "one_cycle", "tail": 0.2},
}
VARIED = [f"{variant}-{kill}" for variant in VARIANTS for kill in ("unbroken", "middle", "evaluation")]


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    """A function: names -> {name: (exit codes of its sessions, output folder)}, all from one run of this script."""
    done = {}

    def run(*names):
        if not done.keys() >= set(names):
            folder = tmp_path_factory.mktemp("killed")
            line, env = [sys.executable, __file__, str(folder), *names], os.environ | {"OMP_NUM_THREADS": "1"}
            script = subprocess.run(line, env=env, capture_output=True, text=True, timeout=300)
            assert script.returncode == 0, script.stderr
            done.update({name: (codes, folder / name) for name, codes in json.loads(script.stdout).items()})
        return done

    return run


@pytest.mark.parametrize("kill", FAST)
def test_run_killed_twice_ends_with_the_weights_of_the_unbroken_run(sessions, kill):
    assert_killed_and_mended(sessions("unbroken", "terminated", *FAST), kill)


@pytest.mark.slow
@pytest.mark.parametrize("kill", SLOW)
def test_run_killed_twice_elsewhere_ends_with_the_weights_of_the_unbroken_run(sessions, kill):
    assert_killed_and_mended(sessions("unbroken", "interrupted", "workers", *SLOW), kill)


@pytest.mark.parametrize("name", [name for name in VARIED if "unbroken" not in name])
def test_killed_run_with_an_average_or_with_momentum_ends_with_the_weights_of_the_unbroken_run(sessions, name):
    done = sessions(*VARIED, "unbroken")
    variant = name.partition("-")[0]
    assert_killed_and_mended(done, name, f"{variant}-unbroken")
    assert (done[f"{variant}-unbroken"][1] / "final.safetensors").read_bytes() != (
        done["unbroken"][1] / "final.safetensors"
    ).read_bytes()


def test_sigterm_writes_a_checkpoint_and_takes_effect(sessions):
    assert_stopped_and_mended(sessions("unbroken", "terminated", *FAST), "terminated", -signal.SIGTERM)


@pytest.mark.slow
def test_sigint_writes_a_checkpoint_and_takes_effect(sessions):
    assert_stopped_and_mended(sessions("unbroken", "interrupted", "workers", *SLOW), "interrupted", 130)


@pytest.mark.slow
def test_data_workers_do_not_change_the_weights(sessions):
    done = sessions("unbroken", "interrupted", "workers", *SLOW)
    assert_same_end(done["workers"][1], done["unbroken"][1])


def assert_killed_and_mended(done, name, unbroken="unbroken") -> None:
    codes, out = done[name]
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert_same_end(out, done[unbroken][1])


def assert_stopped_and_mended(done, name, code) -> None:
    codes, out = done[name]
    assert codes == [code, 0]
    resumed = [line["step"] for line in log(out) if line["event"] == "resume"]
    assert resumed == [6]  # the step during which the signal came was finished, in the middle of an epoch
    assert_same_end(out, done["unbroken"][1])


def assert_same_end(out: Path, unbroken: Path) -> None:
    import torch
    from safetensors.torch import load_file

    ours, theirs = load_file(out / "final.safetensors"), load_file(unbroken / "final.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert epochs(out) == epochs(unbroken)
    assert json.loads((out / "result.json").read_text()) == json.loads((unbroken / "result.json").read_text())
    left = {p.name for p in out.iterdir()}
    assert left == {"log.jsonl", "final.safetensors", "result.json", "checkpoint-15", "checkpoint-16"}


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def epochs(out: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in log(out) if line["event"] == "epoch"]


# ---- the process that is killed


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after(calls: int, act):
    """A function that acts at the given call, counted from 1."""
    count = 0

    def called(*args):
        nonlocal count
        count += 1
        if count == calls:
            act(*args)

    return called


def patch_calls(module, name: str, before=lambda *_: None, then=lambda *_: None) -> None:
    original = getattr(module, name)

    def patched(*args, **kwargs):
        before(*args)
        result = original(*args, **kwargs)
        then(*args)
        return result

    setattr(module, name, patched)


def half_a_file(_tensors, path) -> None:
    Path(path).write_bytes(b"\0" * 100)
    die()


def session(out: Path, kill: str, workers: int = 0, variant: str = "") -> None:
    """One run of fit, to its end or to its kill."""
    import safetensors.torch
    import torch
    from safetensors.torch import save_file
    from torch import nn
    from torch.nn import functional as F

    from adaptsuite.trainer import Plan, fit

    class Draws:
        """Samples with noise of their own at every epoch."""

        def __init__(self, num):
            self.label = torch.arange(num) % 3
            self.centre = F.one_hot(self.label, 6).float()

        def __len__(self):
            return len(self.label)

        def __getitem__(self, index):
            noise = torch.randn(6) + random.random()
            return {"x": self.centre[index] + noise, "label": self.label[index]}

    class Classify:
        monitor = "accuracy"

        def __init__(self):
            self.on_loss = self.on_predict = lambda: None

        def loss(self, model, batch):
            self.on_loss()
            return F.cross_entropy(model(batch["x"] + 0.1 * torch.randn_like(batch["x"])), batch["label"])

        def predict(self, model, batch):
            self.on_predict()
            return model(batch["x"]).softmax(1)

        def score(self, outputs, targets):
            return {"accuracy": (outputs.argmax(1) == targets).mean()}

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
    torch.manual_seed(random.SystemRandom().randrange(10**9))  # a resumed run may not lean on the random state
    task = Classify()
    if kill == "step":
        task.on_loss = after(5, die)
    elif kill == "middle":  # one step after the checkpoint in the middle of an epoch
        task.on_loss = after(4, die)
    elif kill == "evaluation":
        task.on_predict = after(2, die)
    elif kill == "write":
        patch_calls(safetensors.torch, "save_file", before=after(2, half_a_file))
    elif kill == "marker":
        patch_calls(os, "fsync", before=after(8, die))
    elif kill == "rename":
        patch_calls(os, "rename", before=after(2, die))
    elif kill == "renamed":
        patch_calls(os, "rename", then=after(2, die))
    elif kill == "prune":
        patch_calls(shutil, "rmtree", before=lambda folder: die() if (folder / "state.json").exists() else None)
    elif kill in ("terminated", "interrupted"):
        number = signal.SIGTERM if kill == "terminated" else signal.SIGINT
        task.on_loss = after(6, lambda: os.kill(os.getpid(), number))
    settings = VARIANTS.get(variant, {})
    plan = Plan(epochs=4, lr=0.02, batch_size=8, device="cpu", workers=workers, checkpoint_steps=3, **settings)
    result = fit(model, task, Draws(32), Draws(12), plan, out=out)
    save_file(model.state_dict(), out / "final.safetensors")
    for row in result.history:
        del row["seconds"]
    (out / "result.json").write_text(json.dumps([result.best_epoch, result.best, result.history, result.notes]))


def fork(*args) -> int:
    """Exit code of a session in a process of its own, negative for the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            session(*args)
        except KeyboardInterrupt:
            os._exit(130)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(folder: Path, *names: str) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    # imported once, before the forks; nothing is computed here
    import accelerate.utils.memory  # noqa: F401
    import conftest  # noqa: F401  (makes adaptsuite importable)
    import rich.console  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch

    import adaptsuite.trainer  # noqa: F401

    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).zero_grad()
    codes = {}
    for name in names:
        variant, _, kill = name.rpartition("-")
        kills = {"unbroken": 0, "workers": 0, "terminated": 1, "interrupted": 1}.get(kill, 2)
        codes[name] = [fork(folder / name, kill, 0, variant) for _ in range(kills)]
        codes[name].append(fork(folder / name, "", 2 if name == "workers" else 0, variant))
    print(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
