"""What a newcomer gets wrong first: each mistake is one line that names the thing, the reason and the next step."""

import shutil
import sys

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from adaptsuite import peft_methods
from adaptsuite.cli import main

TRAIN = "vision train --backbone embedded:vision-tiny --method lora --data"
ERRORS = [  # command, exit code, what the line says
    (f"{TRAIN} leafs --out r", 3, "leafs does not exist: a CSV with path,label or a folder of classes is expected"),
    (f"{TRAIN} wrong.csv --out r", 3, "wrong.csv has no column 'path', its header is 'file', 'class': rename the"),
    (f"{TRAIN} near.csv --out r", 3, "near.csv has no column 'label', its header is 'path', 'labels': rename 'lab"),
    (f"{TRAIN} semicolons.csv --out r", 3, "semicolons.csv has no column 'path', its cells are parted by ';': save it"),
    (f"{TRAIN} gone.csv --out r", 3, "gone.csv line 3: 'leaves/b/77.png' does not exist"),
    (f"{TRAIN} sheet.xlsx --out r", 3, "sheet.xlsx line 1: not UTF-8 (byte 0xff); a CSV saved as UTF-8 is expected"),
    (f"{TRAIN} one --out r", 3, "one: every row is 'a', two classes are needed: two labels, or two folders"),
    (f"{TRAIN} leaves/a --out r", 3, "folders of classes with files in them: its 3 files need a folder for each class"),
    (f"{TRAIN} empty --out r", 3, "empty holds neither manifest.csv nor folders of classes with files in them"),
    (f"{TRAIN} sounds --out r", 3, ".gif .ppm .pgm, but .wav: take it out of the folder of classes, or list the files"),
    (f"{TRAIN} leaves", 2, "--out is missing: the folder that gets the adapter and the report"),
    ("vision check", 2, "no data: name a CSV or a folder of classes with --data"),
    (f"{TRAIN} leaves --out r --device cuda", 5, "device 'cuda' was asked for and torch finds none here: take 'cpu'"),
    (f"{TRAIN} leaves --out r --method lroa", 2, "method 'lroa' is unknown; did you mean lora"),
    (f"{TRAIN} leaves --out r --set rnak=4", 2, "--set rnak: not a setting of method_settings; did you mean rank?"),
    (f"{TRAIN} leaves --out r --set evidence.positive=a", 2, "evidence.positive says nothing in vision"),
    (f"{TRAIN} leaves --out r --set epochs=4", 2, "--set epochs: not a setting of method_settings; did you mean plan"),
    (f"{TRAIN} leaves --out r --set lora.rank=4", 2, "--set lora.rank: there is no section 'lora'; did you mean --set"),
    (f"{TRAIN} leaves --out r --set rank=four", 2, "--set rank=four: expected a whole number"),
    (f"{TRAIN} leaves --out r --recipe ufgir", 2, "no recipe 'ufgir' in vision; did you mean ufgir-ila?"),
    (f"{TRAIN} leaves --out r --epoch 3", 2, "no option --epoch in adapt vision train; did you mean --epochs"),
    (f"{TRAIN} leaves --out r --test fold=3", 2, "leaves has no column 'fold'; there is: label, path"),
    (f"{TRAIN} leaves --out r --backbone vit_base", 2, "expected SOURCE:NAME, such as timm:vit_base_patch16_224"),
    (f"{TRAIN} leaves --out r --backbone timm:vit_bsae", 2, "timm has no model 'vit_bsae'; did you mean"),
    (f"{TRAIN} leaves --out r --backbone embedded:audio-tiny", 2, "backbone embedded:audio-tiny takes no pictures"),
    ("vison train --data leaves", 2, "no command 'vison' in adapt; did you mean vision?"),
    ("predict run leaves", 2, "no command 'predict' in adapt; it is a verb of a domain: adapt DOMAIN predict"),
    ("vision predict run", 2, "Missing argument 'FILE...'. (adapt vision predict --help lists what there is)"),
    ("vision predict run sounds/a/0.wav", 3, "sounds/a/0.wav: not readable as a picture; BMP, GIF, JPEG, PNG"),
    ("vision predict run leaves/a/99.png", 3, "leaves/a/99.png: no such file or folder"),
    ("vision predict nowhere leaves", 4, "nowhere does not exist, expected an adapter's folder with adapter.json"),
    ("vision predict leaves leaves", 4, "leaves holds no adapter.json: give an adapter's folder, or its run's"),
    ("vision predict . leaves", 4, ". holds no adapter.json: give an adapter's folder, or its run's, such as other/ad"),
    ("vision report leaves", 4, "leaves holds no adapter.json: give an adapter's folder, or its run's"),
    ("vision evaluate run", 2, "--data is missing: a CSV with path,label or a folder of classes"),
    ("vision export run --format onxn --out m", 2, "--format 'onxn' is not known; did you mean onnx?"),
    ("audio predict run sounds/a/0.wav", 4, "run/adapter: an adapter of domain 'vision'; use adapt vision"),
    ("audio train --backbone embedded:audio-tiny --method lora --data leaves --out r", 3, "leaves/a holds no file"),
    ("audio embed leaves/a/0.png --backbone embedded:audio-tiny --out x.npz", 3, "0.png: not readable as audio"),
    ("medical check --data sounds", 3, "sounds/a holds no file ending in .jpg"),
    ("vl predict run leaves/a/0.png", 2, "--question is missing: what is asked about each picture"),
    ("compose a+b --adapter a=run --adapter b=other --out c", 4, "composed: they belong to different backbones"),
]  # fmt: skip
EXTRAS = [  # command, modules that are not there, the extra
    ("vision export run --format onnx --out m.onnx", ("onnx", "onnxscript"), "onnx"),
    ("serve --adapters .", ("fastapi",), "serve"),
    (f"{TRAIN} leaves --out r --set plan.tensorboard=true", ("tensorboard", "torch.utils.tensorboard"), "logs"),
    (f"{TRAIN} leaves --out r --method peft:VERA", ("peft", "peft.mapping"), "peft"),
]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder as a newcomer has it: pictures, sounds, tables with faults, and two runs of different backbones."""
    folder = tmp_path_factory.mktemp("desk")
    rng = np.random.default_rng(0)
    for k in "ab":
        for kind in ("leaves", "sounds"):
            (folder / kind / k).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / "leaves" / k / f"{i}.png")
            soundfile.write(folder / "sounds" / k / f"{i}.wav", 0.1 * rng.normal(size=4000), 16000)
    shutil.copytree(folder / "leaves" / "a", folder / "one" / "a")
    (folder / "empty").mkdir()
    (folder / "sheet.xlsx").write_bytes(b"PK\3\4\xff\xfe")
    rows = [("path", "label"), ("leaves/a/0.png", "a"), ("leaves/b/0.png", "b")]
    tables = {"wrong": [("file", "class"), *rows[1:]], "near": [("path", "labels"), *rows[1:]], "semicolons": rows}
    tables["gone"] = [*rows[:2], ("leaves/b/77.png", "b")]
    for name, cells in tables.items():
        text = "\n".join((";" if name == "semicolons" else ",").join(row) for row in cells)
        (folder / f"{name}.csv").write_text(text + "\n")
    train = f"{TRAIN} {folder / 'leaves'} --epochs 1 --device cpu --image-size 48 --val none"
    for name, more in (("run", ""), ("other", "--backbone timm:test_vit --random-weights")):
        assert main(f"{train} --out {folder / name} {more}".split()) == 0
    return folder


@pytest.fixture
def said(desk, monkeypatch, capsys):
    """`said(command)`: (exit code, the one line of the error)."""
    monkeypatch.chdir(desk)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(command):
        code = main(command.split())
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("adapt: ")]
        assert len(lines) == 1, lines
        return code, lines[0].removeprefix("adapt: ")

    return run


@pytest.mark.parametrize(("command", "code", "line"), ERRORS, ids=[command for command, *_ in ERRORS])
def test_a_first_mistake_is_told_in_one_line(said, command, code, line):
    found, text = said(command)
    assert line in text and found == code, (found, text)
    assert len(text) < 300 and "Traceback" not in text and "failed:" not in text


@pytest.mark.parametrize(("command", "modules", "extra"), EXTRAS, ids=[extra for *_, extra in EXTRAS])
def test_a_missing_extra_says_its_pip_command(said, monkeypatch, command, modules, extra):
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)
    peft_methods.tuner.cache_clear()  # another test of this process may have had it
    code, text = said(command)
    assert code == 2 and f"pip install 'adaptsuite[{extra}]'" in text, (code, text)
