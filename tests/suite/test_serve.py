"""Many adapters behind one model, in the process and over HTTP: every answer is its own adapter's, whatever happens."""

import base64
import contextlib
import http.client
import json
import random
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adaptsuite import applied, experiment
from adaptsuite.cli import main
from adaptsuite.errors import AdapterError, DataError, UsageError
from adaptsuite.host import attach
from adaptsuite.recipe import Recipe, to_dict
from adaptsuite.serve import Server
from adaptsuite.verify import _perturb
from adaptsuite.vision.pipeline import DOMAIN

LABELS = ["ash", "birch", "cedar", "date"]
ADAPTERS = {  # name -> method, settings, classes
    "one": ("lora", {"rank": 2}, 2),
    "two": ("lora", {"rank": 5, "alpha": 3.0}, 4),
    "three": ("bitfit", {}, 3),
    "four": ("bottleneck", {"bottleneck": 4}, 2),
}


def save(folder: Path, method: str, settings: dict, classes: int, seed: int, **changes) -> None:
    recipe = Recipe(domain="vision", backbone="embedded:vision-tiny", method="linear", seeds=(0,))
    recipe = replace(experiment.complete(DOMAIN, recipe), **changes)
    model = DOMAIN.model(recipe, LABELS[:classes])
    handle = attach(model, method, sample=DOMAIN.sample(model), head="head", **settings)
    _perturb(handle, seed)
    recipe = replace(DOMAIN.decided(recipe, model), method=method, method_settings={})
    handle.save(folder, labels=LABELS[:classes], temperature=1.0 + seed, recipe=to_dict(recipe))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, (method, settings, classes)) in enumerate(ADAPTERS.items()):
        save(root / name, method, settings, classes, seed)
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("pictures")
    generator, paths = np.random.default_rng(0), [root / f"{i}.png" for i in range(3)]
    for path in paths:
        Image.fromarray(generator.integers(0, 255, (96, 96, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture(scope="module")
def alone(root, pictures) -> dict[tuple[str, Path], dict]:
    """What `adapt vision predict` says: each adapter on a model of its own."""
    found = {}
    for name in ADAPTERS:
        said = applied.label_files(DOMAIN, root / name, [str(p) for p in pictures], "cpu")
        found |= {(name, Path(row["path"])): row for row in said["predictions"]}
    return found


def same(found: dict, own: dict) -> bool:
    close = (abs(found["scores"][k] - v) < 1e-5 for k, v in own["scores"].items())
    return found["label"] == own["label"] and found["scores"].keys() == own["scores"].keys() and all(close)


@pytest.fixture
def server(root):
    with Server(DOMAIN, {name: root / name for name in ADAPTERS}, "cpu", wait_s=0.05) as server:
        yield server


# ---- in the process


def test_requests_share_batches_and_each_gets_its_adapters_answer(server, pictures, alone):
    asked = [(name, path) for path in pictures for name in ADAPTERS]
    waiting = [server.submit(name, path) for name, path in asked]
    for key, answer in zip(asked, waiting, strict=True):
        assert same(answer.result(60), alone[key]), key
    assert server.items == len(asked) and server.batches <= len(asked) / 3


def test_loads_and_unloads_under_load_never_give_a_wrong_answer(server, root, pictures, alone):
    stop, swaps = threading.Event(), []

    def swap():
        names = random.Random(0)
        while not stop.is_set():
            name = names.choice(list(ADAPTERS))
            server.unload(name)
            server.load(name, root / name)
            swaps.append(name)

    def ask(seed: int) -> tuple[int, int]:
        draw, answered, away = random.Random(seed), 0, 0
        while answered < 15:
            key = draw.choice(list(ADAPTERS)), draw.choice(pictures)
            try:
                assert same(server.predict(*key, 60), alone[key]), key
                answered += 1
            except LookupError as e:
                assert "is loaded" in str(e) or "unloaded meanwhile" in str(e)
                away += 1
        return answered, away

    thread = threading.Thread(target=swap)
    thread.start()
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(ask, range(3)))
    stop.set()
    thread.join()
    assert sum(answered for answered, _ in found) == 45 and len(swaps) >= 3


def test_an_adapter_in_place_of_another_answers_from_then_on(server, root, pictures, alone):
    server.load("one", root / "two")
    assert same(server.predict("one", pictures[0], 60), alone["two", pictures[0]])


def test_a_request_whose_adapter_goes_before_its_turn_fails_and_no_other(server, root, pictures, alone):
    with server._busy:  # the worker waits
        first, second = server.submit("one", pictures[0]), server.submit("two", pictures[0])
        server.load("one", root / "three")
    with pytest.raises(LookupError, match="'one' was unloaded meanwhile"):
        first.result(60)
    assert same(second.result(60), alone["two", pictures[0]])


def test_a_request_that_breaks_a_batch_fails_alone(server, pictures, alone, monkeypatch):
    read = DOMAIN.dataset

    def dataset(model, paths, targets):
        found = read(model, paths, targets)
        if paths[0] == pictures[2]:
            found.image = lambda path: torch.zeros(5, 96, 96, dtype=torch.uint8)
        return found

    monkeypatch.setattr(server.domain, "dataset", dataset)
    good, bad = server.submit("one", pictures[0]), server.submit("two", pictures[2])
    with pytest.raises(Exception, match="5"):
        bad.result(60)
    assert same(good.result(60), alone["one", pictures[0]])


def test_after_the_last_adapter_the_next_one_finds_the_backbone_as_it_was(server, root, pictures, alone):
    for name in ADAPTERS:
        server.unload(name)
    with pytest.raises(LookupError, match="no adapter 'one' is loaded; there is: nothing"):
        server.predict("one", pictures[0])
    server.load("two", root / "two")
    assert same(server.predict("two", pictures[0], 60), alone["two", pictures[0]])


def test_what_does_not_fit_is_refused_and_the_others_go_on(server, root, pictures, alone, tmp_path):
    save(tmp_path / "larger", "lora", {}, 2, 0, front_end={"size": 48})
    with pytest.raises(AdapterError, match="larger: front_end is .*the adapters that are served have"):
        server.load("larger", tmp_path / "larger")
    save(tmp_path / "prompt", "prompt", {"tokens": 2}, 2, 0)
    with pytest.raises(UsageError, match="'prompt' changes what a whole block gets"):
        server.load("prompt", tmp_path / "prompt")
    bad = tmp_path / "damaged"
    bad.mkdir()
    for file in (root / "one").iterdir():
        (bad / file.name).write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(AdapterError, match="damaged"):
        server.load("one", bad)
    with pytest.raises(DataError, match="not readable as a picture"):
        server.predict("one", root / "one" / "adapter.json")
    assert [a.name for a in server.adapters()] == list(ADAPTERS)
    assert all(same(server.predict(name, pictures[0], 60), alone[name, pictures[0]]) for name in ADAPTERS)


def test_other_weights_of_the_same_shape_are_refused(server, root):
    with torch.no_grad():
        next(p for n, p in server._model.named_parameters() if n.endswith("attn.qkv.weight")).add_(1e-3)
    with pytest.raises(AdapterError, match="were changed after they were loaded"):
        server.load("one", root / "one")


# ---- over HTTP


@pytest.fixture(scope="module")
def port(root):
    """A server with small limits, on a port of this machine."""
    uvicorn = pytest.importorskip("uvicorn")
    from adaptsuite.serve_http import Limits, create_app

    limits = Limits(body_bytes=100_000, pixels=200 * 200, upload_s=1.0, answer_s=60.0)
    with Server(DOMAIN, {name: root / name for name in ADAPTERS}, "cpu") as server, socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        app = create_app(server, root, limits)
        http_server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=http_server.run, kwargs={"sockets": [own]})
        thread.start()
        while not http_server.started:
            time.sleep(0.02)
        yield own.getsockname()[1]
        http_server.should_exit = True
        thread.join()


def ask(port: int, verb: str, path: str, body=None, headers=None) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the answer may come before all is sent
        connection.request(verb, path, body, headers or {})
    answer = connection.getresponse()
    status, text = answer.status, answer.read().decode()
    connection.close()
    return status, json.loads(text) if text.startswith("{") else {"text": text}


def test_files_are_answered_as_bodies_and_in_json(port, pictures, alone):
    file = pictures[1].read_bytes()
    for name in ADAPTERS:
        status, found = ask(port, "POST", f"/adapters/{name}/predict", file)
        assert status == 200 and found["adapter"] == name and same(found, alone[name, pictures[1]])
    body = json.dumps({"adapter": "two", "file": base64.b64encode(file).decode()})
    status, found = ask(port, "POST", "/predict", body)
    assert status == 200 and same(found, alone["two", pictures[1]])


def test_adapters_are_listed_unloaded_and_loaded(port, pictures, alone):
    _, found = ask(port, "GET", "/adapters")
    assert {a["id"]: len(a["labels"]) for a in found["loaded"]} == {n: k for n, (*_, k) in ADAPTERS.items()}
    assert ask(port, "DELETE", "/adapters/three") == (200, {"id": "three"})
    assert ask(port, "GET", "/adapters")[1]["available"] == ["three"]
    status, found = ask(port, "POST", "/adapters/three/predict", pictures[0].read_bytes())
    assert status == 404 and "no adapter 'three' is loaded; there is: four, one, two" in found["error"]
    assert ask(port, "DELETE", "/adapters/three")[0] == 404
    assert ask(port, "PUT", "/adapters/three")[0] == 200
    status, found = ask(port, "POST", "/adapters/three/predict", pictures[0].read_bytes())
    assert status == 200 and same(found, alone["three", pictures[0]])
    assert ask(port, "GET", "/health")[1]["status"] == "ok"
    assert 'adaptsuite_requests_total{status="404"}' in ask(port, "GET", "/metrics")[1]["text"]


def large_picture() -> bytes:
    import io

    file = io.BytesIO()
    Image.new("RGB", (3000, 3000)).save(file, "PNG")
    return file.getvalue()


def zipped() -> bytes:
    import io
    import zipfile

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("picture.png", bytes(5_000_000))
    return file.getvalue()


HOSTILE = {
    "a body over the limit": ("/adapters/one/predict", lambda: bytes(200_000), {}, 413, "at most 100,000"),
    "a body that tells no length": ("/adapters/one/predict", lambda: iter([bytes(60_000)] * 3), {}, 413, "more than"),
    "a length that is none": ("/predict", lambda: b"", {"Content-Length": "-5"}, (400, 413), ""),
    "a compressed body": ("/adapters/one/predict", lambda: b"x", {"Content-Encoding": "gzip"}, 415, "compressed"),
    "no JSON": ("/predict", lambda: b'{"adapter":', {}, 400, "the body must be JSON"),
    "JSON too deep": ("/predict", lambda: b"[" * 50_000, {}, 400, "the body must be JSON"),
    "JSON of another form": ("/predict", lambda: b"[1, 2]", {}, 400, "the body must be JSON"),
    "another type": ("/predict", lambda: b'{"adapter": 3, "file": ""}', {}, 400, "adapter must be an id"),
    "no base64": ("/predict", lambda: b'{"adapter": "one", "file": "?"}', {}, 400, "the body must be JSON"),
    "an unknown adapter": ("/adapters/onne/predict", lambda: b"x", {}, 404, "no adapter 'onne' is loaded"),
    "an unknown path": ("/etc/passwd", lambda: b"x", {}, 404, "Not Found"),
    "an empty file": ("/adapters/one/predict", lambda: b"", {}, 422, "the file: the file is empty"),
    "text": ("/adapters/one/predict", lambda: b"hello", {}, 422, "the file: not readable as a picture"),
    "an archive": ("/adapters/one/predict", zipped, {}, 422, "the file: not readable as a picture"),
    "a picture that unpacks": ("/adapters/one/predict", large_picture, {}, 422, "9,000,000 pixels, at most 40,000"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_request_is_refused_in_one_line(port, case):
    path, body, headers, expected, match = HOSTILE[case]
    status, found = ask(port, "POST", path, body(), headers)
    assert status in (expected if isinstance(expected, tuple) else (expected,)), found
    assert match in str(found) and "Traceback" not in str(found) and "/tmp" not in str(found)
    assert ask(port, "GET", "/health")[0] == 200


@pytest.mark.parametrize(
    "name", ["..", "../adapters/one", "..%2fone", "%2e%2e", "one%2f..%2ftwo", "one/../two", ".hidden", "a b", "a%00b"]
)
def test_no_id_leaves_the_folder_of_adapters(port, name):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest("PUT", f"/adapters/{name.replace(' ', '%20')}")
    connection.endheaders()
    assert connection.getresponse().status in (404, 405)
    connection.close()


def test_a_link_out_of_the_folder_is_not_followed(port, root, tmp_path):
    save(tmp_path / "outside", "lora", {}, 2, 0)
    (root / "inside").symlink_to(tmp_path / "outside", target_is_directory=True)
    try:
        assert ask(port, "PUT", "/adapters/inside")[0] == 404
    finally:
        (root / "inside").unlink()


def test_a_slow_body_is_cut_off(port):
    with socket.create_connection(("127.0.0.1", port), 30) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
        start = time.monotonic()
        assert b" 408 " in client.recv(200).splitlines()[0]
        assert time.monotonic() - start < 20


def test_an_answer_that_takes_too_long_is_given_up(root, pictures):
    from adaptsuite.serve_http import Front, Limits

    with Server(DOMAIN, {"one": root / "one"}, "cpu") as server:
        front = Front(server, root, Limits(answer_s=0.05))
        done = threading.Event()

        def hold():
            with server._busy:
                done.wait(30)

        thread = threading.Thread(target=hold)
        thread.start()
        time.sleep(0.05)
        try:
            front.predict("one", pictures[0].read_bytes())
            raise AssertionError("an answer came")
        except Exception as error:
            assert front.error(error) == (504, "the answer took too long")
        done.set()
        thread.join()
        assert server.predict("one", pictures[0], 60)["label"] in LABELS


# ---- on the command line


def test_the_command_says_what_is_wrong(tmp_path, capsys, monkeypatch):
    assert main(["serve", "--adapters", str(tmp_path / "nowhere")]) == 3
    assert "no such folder" in capsys.readouterr().err
    assert main(["serve", "--adapters", str(tmp_path)]) == 3
    assert "no adapter in the folders directly below" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["serve", "--adapters", str(tmp_path)]) == 2
    assert "pip install 'adaptsuite[serve]'" in capsys.readouterr().err


@pytest.mark.slow
def test_two_hundred_requests_over_sixteen_adapters_are_right_and_cost_no_memory():
    pytest.importorskip("uvicorn")
    script = Path(__file__).parents[1] / "benchmarks" / "serve_requests.py"
    options = ["--requests", "200", "--adapters", "16", "--clients", "4", "--json"]
    found = subprocess.run([sys.executable, script, *options], check=True, capture_output=True, text=True).stdout
    for row in json.loads(found):
        assert row["met"], row


@pytest.mark.slow
def test_sounds_of_several_windows_and_padding_share_batches_too(tmp_path):
    import soundfile

    from adaptsuite.audio.pipeline import DOMAIN as AUDIO

    generator = np.random.default_rng(0)
    sounds = [tmp_path / f"{i}.wav" for i in range(2)]
    for path, seconds in zip(sounds, (1, 7), strict=True):
        soundfile.write(path, generator.standard_normal(16000 * seconds).astype(np.float32) * 0.1, 16000)
    folders = {}
    for seed, method in enumerate(("lora", "audio.soft_moa", "bitfit")):
        backbone = {"backbone": "embedded:audio-tiny", "front_end": {"frames": 256}}
        recipe = experiment.complete(AUDIO, Recipe(domain="audio", method=method, seeds=(0,), **backbone))
        handle = experiment.adapt(AUDIO, recipe, LABELS[: 2 + seed])
        _perturb(handle, seed)
        facts = {"labels": LABELS[: 2 + seed], "temperature": 1.0 + seed}
        folders[method] = handle.save(tmp_path / method, recipe=to_dict(AUDIO.decided(recipe, handle.model)), **facts)
    with Server(AUDIO, folders, "cpu", wait_s=0.3) as server:
        waiting = [(name, path, server.submit(name, path)) for name in folders for path in sounds]
        found = [(name, path, answer.result(60)) for name, path, answer in waiting]
    assert server.items > server.batches * 6
    for name, path, said in found:
        (own,) = applied.label_files(AUDIO, folders[name], [str(path)], "cpu")["predictions"]
        assert same(said, own), (name, path)
