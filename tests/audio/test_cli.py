"""`adapt audio …` as a user types it: results on stdout, one line for each mistake, the right exit code."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from adaptsuite.cli import main

RATE = 16000


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    from transformers import ASTConfig, ASTModel

    torch.manual_seed(0)
    model = ASTModel(
        ASTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            num_mel_bins=32,
            max_length=64,
            frequency_stride=16,
            time_stride=16,
        )
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    folder = tmp_path_factory.mktemp("hub")
    model.save_pretrained(folder)
    return f"hf:{folder}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three tones of six sources each, three folds: easy enough to be learnt in a few steps."""
    folder = tmp_path_factory.mktemp("tones")
    rng = np.random.default_rng(0)
    rows = []
    for label, hz in (("low", 200), ("middle", 900), ("high", 3500)):
        for i in range(6):
            t = np.arange(RATE // 2) / RATE
            wave = 0.3 * np.sin(2 * np.pi * hz * (1 + 0.05 * i) * t) + 0.02 * rng.normal(size=len(t))
            soundfile.write(folder / f"{label}{i}.wav", wave.astype(np.float32), RATE)
            rows.append({"path": f"{label}{i}.wav", "label": label, "group": f"{label}{i}", "fold": i % 3})
    write_table(folder / "manifest.csv", rows)
    return folder / "manifest.csv"


def write_table(path, rows):
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_table(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


@pytest.fixture(scope="module")
def trained(backbone, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "moa"
    options = ["--data", data, "--backbone", backbone, "--method", "audio.soft_moa", "--test", "fold=2", "--out", out]
    assert main(["audio", "train", *map(str, options), "--epochs", "6", "--batch-size", "4", "--set", "experts=2"]) == 0
    return out


def test_info_lists_what_there_is(adapt):
    found, _ = adapt("info", "--json")
    assert "audio.soft_moa" in found["methods"] and "soft-moa" in found["recipes"]
    assert "embedded:audio-tiny" in adapt("info")[0]


def test_info_of_a_backbone(adapt, backbone):
    found, _ = adapt("info", "--backbone", backbone, "--json")
    assert found["sites"]["attn.q"] == 2 and len(found["fingerprint"]) == 64


def test_check_describes_a_good_table(adapt, data):
    found, _ = adapt("check", "--data", data, "--cv", "fold", "--json")
    assert found["ok"] and found["rows"] == 18 and found["classes"] == {"high": 6, "low": 6, "middle": 6}
    assert len(found["splits"]) == 3


def test_budget_counts_before_training(adapt, backbone):
    found, _ = adapt("budget", "--backbone", backbone, "--method", "lora", "--set", "rank=4", "--json")
    assert found["params"]["trained_without_head"] == 2 * 2 * (16 + 16) * 4 + 2 * 16
    assert {"activation_bytes", "adapter_bytes"} <= found.keys()
    assert found["macs_of_batch"] == found["batch"] * found["macs"] > 0


def test_doctor_says_alive(adapt, backbone):
    found, _ = adapt("doctor", "--backbone", backbone, "--method", "bottleneck", "--json")
    assert found["ok"] and found["identity"] == 0
    assert "alive" in adapt("doctor", "--backbone", backbone, "--method", "bottleneck")[0]


def test_a_dry_run_refuses_a_loss_for_several_labels_where_there_is_one(adapt, backbone, data):
    options = ("--data", data, "--backbone", backbone, "--method", "lora", "--test", "fold=2", "--dry-run")
    _, err = adapt("train", *options, "--set", "head.loss=asymmetric", code=2)
    assert "data.task=multilabel" in err and len(err.strip().splitlines()) == 1


def test_a_dry_run_trains_nothing(adapt, backbone, data, tmp_path):
    out = tmp_path / "run"
    options = ("--data", data, "--backbone", backbone, "--method", "lora", "--test", "fold=2", "--out", out)
    found, _ = adapt("train", *options, "--dry-run", "--json")
    assert found["dry_run"] and found["splits"][0]["test"] == 6 and not out.exists()


def test_a_training_leaves_adapter_evidence_and_report(trained):
    names = {p.name for p in trained.iterdir()}
    assert {
        "adapter",
        "recipe.toml",
        "metrics.json",
        "run.json",
        "predictions.csv",
        "report.html",
        "log.jsonl",
    } <= names
    record = json.loads((trained / "adapter" / "adapter.json").read_text())
    assert record["labels"] == ["high", "low", "middle"]
    predictions = read_table(trained / "predictions.csv")
    assert {r["path"] for r in predictions if r.get("part", "test") == "test"} >= {"low2.wav", "high5.wav"}
    page = (trained / "report.html").read_text()
    assert "audio.soft_moa" in page and "http://" not in page.replace("http://www.w3.org", "")


def test_an_adapter_keeps_the_pool_that_its_backbone_chose(trained):
    """Another default of a later version must not change what is loaded."""
    stored = json.loads((trained / "adapter" / "adapter.json").read_text())
    assert '"pool": "mean"' in json.dumps(stored)


def test_train_prints_one_object(adapt, backbone, data, tmp_path):
    options = ("--data", data, "--backbone", backbone, "--method", "lora", "--cv", "fold", "--epochs", 2)
    found, err = adapt("train", *options, "--set", "seeds=0,1", "--out", tmp_path / "cv", "--json")
    assert len(found["adapter"]) == 6 and len(found["metrics"]["folds"]) == 6
    accuracy = found["metrics"]["test"]["accuracy"]
    assert accuracy["range"][0] <= accuracy["value"] <= accuracy["range"][1] and len(accuracy["ci"]) == 2
    assert (accuracy["spread"]["folds"]["n"], accuracy["spread"]["seeds"]["n"]) == (3, 2)
    of_folds = [
        np.mean([f["test"]["accuracy"] for f in found["metrics"]["folds"] if f["name"] == f"fold={k}"])
        for k in range(3)
    ]
    assert accuracy["spread"]["folds"]["std"] == pytest.approx(np.std(of_folds, ddof=1))
    assert found["params"]["trained"] > found["params"]["trained_without_head"] and found["seconds"] > 0
    assert "backbone" in err


def test_evaluate_repeats_the_training_s_own_figures(adapt, trained, data):
    trained_on = json.loads((trained / "metrics.json").read_text())
    found, _ = adapt("evaluate", trained, "--data", data, "--test", "fold=2", "--json")
    stored = trained_on["metrics"]["test"] if "metrics" in trained_on else trained_on["test"]
    for name, value in found["metrics"]["test"].items():
        assert value["value"] == pytest.approx(stored[name]["value"], abs=1e-6)


def test_predict_labels_files_and_folders(adapt, trained, data):
    found, _ = adapt("predict", trained, data.parent, "--json")
    assert len(found["predictions"]) == 18
    row = found["predictions"][0]
    assert sum(row["scores"].values()) == pytest.approx(1, abs=1e-4) and row["label"] == max(
        row["scores"], key=row["scores"].get
    )
    one, _ = adapt("predict", trained / "adapter", data.parent / "low0.wav")
    assert "low0.wav" in one


def test_predict_skips_and_names_what_it_cannot_read(adapt, trained, data, tmp_path):
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"")
    _, err = adapt("predict", trained, bad, data.parent / "low0.wav", code=3)
    assert "bad.wav" in err and "--skip-bad" in err
    found, err = adapt("predict", trained, bad, data.parent / "low0.wav", "--skip-bad", "--json")
    assert [Path(r["path"]).name for r in found["skipped"]] == ["bad.wav"] and "0 bytes" in err
    assert len(found["predictions"]) == 1
    adapt("predict", trained, bad, "--skip-bad", code=3)


def test_report_of_a_saved_adapter(adapt, trained, data, tmp_path):
    found, _ = adapt("report", trained, "--data", data, "--test", "fold=2", "--out", tmp_path / "page", "--json")
    assert Path(found["report"]).is_file()


def test_multilabel_tables_are_learnt(adapt, backbone, data, tmp_path):
    rows = read_table(data)
    for i, row in enumerate(rows):
        row["path"], row["label"] = str(row["path"]), row["label"] + (";loud" if i % 2 else "")
    table = data.parent / "multi.csv"
    write_table(table, rows)
    options = ("--data", table, "--backbone", backbone, "--method", "linear", "--test", "fold=2", "--epochs", 2)
    settings = ("data.task=multilabel", "head.loss=asymmetric", "plan.balanced=true", "augment.mixup=0.4")
    settings = [part for setting in settings for part in ("--set", setting)]
    found, _ = adapt("train", *options, *settings, "--out", tmp_path / "m", "--json")
    assert "map" in found["metrics"]["test"]
    found, _ = adapt("predict", tmp_path / "m", data.parent / "low0.wav", "--json")
    assert sum(found["predictions"][0]["scores"].values()) != pytest.approx(1, abs=1e-3)


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trian",), "did you mean train?"),
        (("train", "--dtaa", "x"), "did you mean --data"),
        (("train", "--method", "lroa"), "did you mean lora"),
        (("train", "--recipe", "sotf-moa"), "did you mean soft-moa"),
        (("train",), "--data"),
        (("budget", "--method", "lora", "--backbone", "ast-bse"), "did you mean ast-base"),
        (("budget", "--method", "lora", "--backbone", "ast-base", "--set", "rnak=2"), "did you mean rank"),
        (("budget", "--method", "lora", "--backbone", "ast-base", "--set", "rank=two"), "whole number"),
        (("budget", "--method", "lora", "--backbone", "ast-base", "--set", "plan.epohcs=2"), "did you mean epochs"),
        (("train", "--epochs", "many"), "integer"),
    ],
)
def test_usage_errors_are_one_line_with_the_nearest_name(adapt, arguments, message):
    _, err = adapt(*arguments, code=2)
    assert message in err and len(err.strip().splitlines()) == 1, err


def table_with(tmp_path, data, change):
    rows = read_table(data)
    for row in rows:
        target = tmp_path / row["path"]
        if not target.exists():
            target.write_bytes((data.parent / row["path"]).read_bytes())
    change(rows, tmp_path)
    write_table(tmp_path / "manifest.csv", rows)
    return tmp_path / "manifest.csv"


def set_cell(line, column, value):
    def change(rows, folder):
        rows[line][column] = value

    return change


def twice(rows, folder):
    rows.append(dict(rows[3]))


def damaged(rows, folder):
    (folder / rows[4]["path"]).write_bytes(b"not a sound")


BAD_TABLES = [
    ("missing file", set_cell(2, "path", "gone.wav"), ("line 4", "gone.wav")),
    ("empty label", set_cell(2, "label", ""), ("line 4", "label")),
    ("duplicate row", twice, ("line 20", "low3.wav")),
    ("group in two splits", set_cell(0, "group", "low2"), ("low2",)),
    ("path outside", set_cell(2, "path", "../secret.wav"), ("line 4", "secret.wav")),
    ("unreadable audio", damaged, ("line 6", "low4.wav")),
]


@pytest.mark.parametrize(("kind", "change", "words"), BAD_TABLES, ids=[b[0] for b in BAD_TABLES])
def test_bad_data_is_exit_3_with_file_and_row(adapt, data, tmp_path, kind, change, words):
    table = table_with(tmp_path, data, change)
    _, err = adapt("check", "--data", table, "--test", "fold=2", code=3)
    last = err.strip().splitlines()[-1]
    assert all(w in last for w in words), err


@pytest.mark.parametrize("kind", ["header", "samples"])
def test_training_names_the_row_of_a_file_it_cannot_read(adapt, backbone, data, tmp_path, kind):
    """A broken header is seen at once, NaN samples only when they are read: both name file and row."""

    def change(rows, folder):
        path = folder / rows[4]["path"]
        if kind == "header":
            path.write_bytes(b"not a sound")
        else:
            soundfile.write(path, np.full(8000, np.nan, np.float32), RATE, subtype="FLOAT")

    table = table_with(tmp_path, data, change)
    options = ("--data", table, "--backbone", backbone, "--method", "lora", "--test", "fold=2", "--epochs", 1)
    _, err = adapt("train", *options, "--val", "none", "--out", tmp_path / "x", code=3)
    assert "manifest.csv line 6" in err.splitlines()[-1] and "low4.wav" in err.splitlines()[-1]


def test_without_a_split_test_rows_are_drawn_and_it_is_said(adapt, backbone, data):
    out, _ = adapt("train", "--data", data, "--backbone", backbone, "--method", "lora", "--dry-run")
    assert "were drawn by seed 0 and are held back as test" in out


def test_training_on_every_row_says_that_there_is_no_evidence(adapt, backbone, tmp_path):
    from adaptsuite.audio.synthetic import make_dataset

    table = make_dataset(tmp_path / "data", num_classes=2, clips_per_class=2)
    options = ("--data", table.parent, "--backbone", backbone, "--method", "linear", "--epochs", "1")
    options += ("--frames", "64", "--set", "front_end.reference_compat=yes", "--val", "none")
    rows = [{**row, "split": "train"} for row in read_table(table)]
    write_table(table, rows)
    out, _ = adapt("train", *options, "--out", tmp_path / "run")
    assert "cannot tell the order of what it hears" in out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "cannot tell the order of what it hears" in page and "Result on" not in page
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test"] == {}


@pytest.mark.parametrize("kind", ["flipped bit", "other base", "no adapter", "unknown method"])
def test_a_wrong_adapter_is_exit_4(adapt, trained, data, tmp_path, kind):
    import shutil

    folder = tmp_path / "adapter"
    shutil.copytree(trained / "adapter", folder)
    record = json.loads((folder / "adapter.json").read_text())
    if kind == "flipped bit":
        payload = bytearray((folder / "adapter.safetensors").read_bytes())
        payload[-1] ^= 1
        (folder / "adapter.safetensors").write_bytes(payload)
    elif kind == "other base":
        from safetensors.torch import load_file, save_file

        base = Path(record["recipe"]["backbone"].removeprefix("hf:"))
        shutil.copytree(base, tmp_path / "base")
        state = load_file(tmp_path / "base" / "model.safetensors")
        save_file({k: v + 0.01 for k, v in state.items()}, tmp_path / "base" / "model.safetensors")
        kept = (base / "model.safetensors").read_bytes()
        (base / "model.safetensors").write_bytes((tmp_path / "base" / "model.safetensors").read_bytes())
    elif kind == "no adapter":
        (folder / "adapter.json").unlink()
    else:
        (folder / "adapter.json").write_text(
            (folder / "adapter.json").read_text().replace("audio.soft_moa", "audio.sotf_moa")
        )
    try:
        _, err = adapt("evaluate", folder, "--data", data, code=4)
    finally:
        if kind == "other base":
            (base / "model.safetensors").write_bytes(kept)
    assert len(err.strip().splitlines()) == 1 and "adapt:" in err
    assert {
        "flipped bit": "sha256",
        "other base": "trained on",
        "no adapter": "adapter.json",
        "unknown method": "sotf",
    }[kind] in err


def test_an_unknown_label_in_new_data_names_the_row(adapt, trained, data, tmp_path):
    table = table_with(tmp_path, data, set_cell(1, "label", "lowish"))
    _, err = adapt("evaluate", trained, "--data", table, code=3)
    assert "lowish" in err and "line 3" in err


def test_a_gpu_that_is_not_there_is_exit_5(adapt, backbone, data, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    options = ("--data", data, "--backbone", backbone, "--method", "lora", "--test", "fold=2", "--device", "cuda")
    _, err = adapt("train", *options, "--out", tmp_path / "x", code=5)
    assert "cuda" in err.splitlines()[-1]
