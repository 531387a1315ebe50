"""The bench of methods: entries, paired differences, what beats what, sentences, and one run of the command."""

import base64
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest

from adaptsuite import attach
from adaptsuite.compare import _against_full, methods_of
from adaptsuite.compare_page import caption, front, lines, markdown, pareto, sentences, table
from adaptsuite.costs import merged, ratio, turns
from adaptsuite.errors import UsageError
from adaptsuite.manifest import load_manifest
from adaptsuite.testing import HOSTS


def row(method, score, trained, step=0.7, metric="accuracy", **more):
    times = {"value": step, "quartiles": [step - 0.05, step + 0.05], "ms": 10 * step}
    return {
        "method": method,
        "metric": metric,
        "score": {"value": score, "ci": [score - 0.02, score + 0.02]},
        "params": {"trained": trained, "trained_without_head": trained - 10},
        "adapter_bytes": 4 * trained,
        "macs_per_item": 2_000_000,
        "activation_bytes": 3_000_000,
        "step": times,
        "latency": {"value": 1.1, "quartiles": [1.0, 1.2], "ms": 5.5},
        "latency_merged": None,
        "fit_seconds": 3.0,
        **more,
    }


def test_entries_carry_settings_and_lists_and_names_with_a_colon():
    found = methods_of("lora, lora:rank=4:sites=attn.q/attn.v,peft:LOKR:rank=2")
    assert found[0] == ("lora", "lora", [])
    assert found[1] == ("lora:rank=4:sites=attn.q/attn.v", "lora", ["rank=4", "sites=attn.q,attn.v"])
    assert found[2][1:] == ("peft:LOKR", ["rank=2"])


@pytest.mark.parametrize("text", ["", "lora,,full", "lora:rank=4:full", "rank=4", "lora,lora"])
def test_entries_that_cannot_be_are_refused(text):
    with pytest.raises(UsageError, match="--methods"):
        methods_of(text)


@pytest.mark.parametrize("seed", range(5))
def test_the_front_holds_exactly_the_points_that_no_other_beats_in_both(seed):
    rng = np.random.default_rng(seed)
    costs, scores = rng.integers(0, 6, 12).tolist(), rng.integers(0, 6, 12).tolist()

    def beaten(i):
        return any(
            costs[j] <= costs[i] and scores[j] >= scores[i] and (costs[j], scores[j]) != (costs[i], scores[i])
            for j in range(12)
        )

    kept = {(costs[i], scores[i]) for i in front(costs, scores)}
    assert kept == {(costs[i], scores[i]) for i in range(12) if not beaten(i)}


def test_full_fine_tuning_that_wins_is_said_to_win_and_a_difference_that_is_not_clear_is_said_too():
    rows = [row("linear", 0.80, 100), row("lora", 0.88, 1000), row("full", 0.90, 100_000, 1.0)]
    rows[1]["against_full"] = {"value": -0.02, "ci": [-0.04, 0.01]}
    (said,) = sentences(rows)
    assert said.startswith("Full fine-tuning wins: accuracy 0.900 against 0.880 of lora, the best adapter.")
    assert "[-0.040, 0.010] and holds 0" in said and "lora trains 100 times fewer parameters" in said
    rows[1]["against_full"] = {"value": -0.02, "ci": [-0.04, -0.01]}
    assert "holds 0" not in sentences(rows)[0]
    rows[2]["method"] = "full:plan.lr=1e-4"
    assert sentences(rows)[0].startswith("Full fine-tuning wins")
    rows[1]["score"]["value"] = 0.95
    assert sentences(rows)[0].startswith("lora, the best adapter, is ahead of full fine-tuning: accuracy 0.950")


def test_of_a_metric_that_is_better_when_lower_the_lower_one_wins():
    rows = [row("lora", 0.5, 1000, metric="log_loss"), row("full", 0.9, 100_000, 1.0, metric="log_loss")]
    assert sentences(rows)[0].startswith("lora, the best adapter, is ahead")


def test_a_step_that_is_no_quicker_and_a_training_that_diverged_are_named():
    rows = [row("convpass", 0.9, 100, 1.3), row("full", 0.8, 1000, 1.0), {"method": "wild", "failed": "lr 9"}]
    said = " ".join(sentences(rows))
    assert "takes longer than one of full fine-tuning with convpass (1.30)" in said and "wild diverged: lr 9" in said
    assert any(line.startswith("wild") and "diverged" in line for line in lines(rows))


def test_table_terminal_and_markdown_hold_the_same_cells():
    rows = [row("a|b", 0.8123, 1234), row("full", 0.9, 100_000, 1.0)]
    assert table(rows)[0]["trained"] == 1234 and table(rows)[0]["ms"] == pytest.approx(1.1 * 5.0)
    assert "minus full" not in table(rows)[0] and "ms merged" not in table(rows)[0]  # nothing in them
    text = markdown(rows)
    assert text.count("\n") == 4 and "a\\|b" in text
    for cell in ("0.812 [0.792, 0.832]", "1,234", "5.500"):
        assert cell in text and cell in "\n".join(lines(rows))
    assert len({len(line) for line in lines(rows)}) == 1


def test_the_picture_names_every_method_once_in_each_panel():
    names = ["linear", "lora", "bottleneck", "compacter", "full"]
    rows = [row(name, 0.8 + 0.001 * i, 1000 + i, 0.7 + 0.001 * i) for i, name in enumerate(names)]
    svg = base64.b64decode(pareto(rows).partition(",")[2]).decode()
    assert all(svg.count(f">{name}</text>") == 2 for name in names)
    assert "are 0.040 wide" in caption(rows)
    assert pareto([{"method": "wild", "failed": "lr 9"}]) is None


@pytest.fixture
def manifest(tmp_path):
    text = "path,label,group\n"
    for i in range(24):
        (tmp_path / f"{i}.wav").write_bytes(b"x")
        text += f"{i}.wav,{'ab'[i % 2]},g{i // 3}\n"
    (tmp_path / "manifest.csv").write_text(text)
    return load_manifest(tmp_path / "manifest.csv")


def test_the_difference_to_full_is_paired_over_resampled_groups(manifest):
    rng = np.random.default_rng(0)
    where = rng.permutation(24)
    ours, theirs = rng.normal(size=(2, 24, 2))
    rows = [
        {"method": "lora", "metric": "accuracy", "said": [(where[:10], ours[:10]), (where[10:], ours[10:])]},
        {"method": "full", "metric": "accuracy", "said": [(where[:10], theirs[:10]), (where[10:], theirs[10:])]},
        {"method": "other", "metric": "accuracy", "said": [(where[:10], ours[:10])]},
        {"method": "wild", "failed": "lr 9"},
    ]
    _against_full(SimpleNamespace(targets=lambda table, classes: table.targets(classes)), manifest, rows)
    truth, groups = where % 2, where // 3
    gain = (ours.argmax(1) == truth).astype(float) - (theirs.argmax(1) == truth)
    found = rows[0]["against_full"]
    assert found["value"] == pytest.approx(gain.mean())
    draws = []
    for _ in range(4000):  # plain loops over whole groups
        taken = np.concatenate([gain[groups == g] for g in rng.integers(0, 8, 8)])
        draws.append(taken.mean())
    np.testing.assert_allclose(found["ci"], np.quantile(draws, [0.025, 0.975]), atol=0.05)
    assert all("against_full" not in own and "said" not in own for own in rows[1:])  # other rows, or none


def test_turns_alternate_and_the_ratio_is_the_median_of_the_turns():
    order = []

    def busy(name, seconds):
        def work():
            order.append(name)
            end = time.process_time() + seconds
            while time.process_time() < end:
                pass

        return work

    found = turns({"a": busy("a", 0.03), "b": busy("b", 0.01)}, 5)
    assert "".join(order) == "ba" + "abba" * 2 + "ab" and len(found["a"]) == 5
    assert 2 < ratio(found, "a", "b")["value"] < 4
    exact = ratio({"a": [2.0, 3.0, 8.0], "b": [1.0, 1.0, 2.0]}, "a", "b")
    assert exact["value"] == 3.0 and exact["quartiles"] == [2.0, 4.0]


def test_what_cannot_be_merged_has_its_reason_and_the_host_stays_as_it_is():
    host = HOSTS["timm_vit"]()
    handle = attach(host.model, "bottleneck", sites="mlp")
    assert merged(handle)[0] is None and "nonlinearity" in merged(handle)[1]
    host = HOSTS["timm_vit"]()
    handle = attach(host.model, "lora")
    copy, reason = merged(handle)
    assert reason == "" and copy.adapter_bank.merged == "default" and handle.bank.merged is None


# ---- the command


def pictures(folder):
    from PIL import Image

    for i in range(24):
        place = folder / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (20 + 200 * (i % 2), 10 * i, 90)).save(place / f"{i}.png")
    return str(folder)


LINE = "vision compare --backbone embedded:vision-tiny --image-size 48 --epochs 1 --turns 1 --set=plan.batch_size=4"


def test_a_comparison_writes_table_report_and_json(tmp_path, capsys):
    from adaptsuite.cli import main

    data, out = pictures(tmp_path / "data"), tmp_path / "run"
    line = [*LINE.split(), "--data", data, "--out", str(out), "--json", "--methods", "linear,lora:rank=2,full"]
    assert main(line) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    linear, lora, full = found["rows"]
    assert (linear["method"], lora["method"], full["method"]) == ("linear", "lora:rank=2", "full")
    assert linear["params"]["trained"] < lora["params"]["trained"] < full["params"]["trained"]
    assert linear["activation_bytes"] < lora["activation_bytes"] < full["activation_bytes"]
    for own in found["rows"]:
        size = (out / own["adapters"][0] / "adapter.safetensors").stat().st_size
        assert own["adapter_bytes"] == size and own["step"]["value"] > 0 and own["latency_merged"]["value"] > 0
        assert own["macs_per_item"] >= full["macs_per_item"]
    assert "full fine-tuning" in found["sentences"][0].lower()
    page, text = (out / "report.html").read_text(), (out / "compare.md").read_text()
    assert "lora:rank=2" in page and "data:image/svg+xml" in page and found["sentences"][0] in text
    assert json.loads((out / "metrics.json").read_text())["compare"] == found["rows"]


@pytest.mark.parametrize(
    "more, message",
    [
        (["--methods", "lora,lora"], "comes twice"),
        (["--methods", "lora,nothing"], "nothing"),
        (["--methods", "lora:rank=zero"], "rank"),
        (["--methods", "lora", "--turns", "0"], "--turns 0"),
        (["--methods", "lora:sites=nowhere"], "nowhere"),
    ],
)
def test_a_comparison_that_cannot_be_is_one_line_before_any_training(tmp_path, more, message, capsys):
    from adaptsuite.cli import main

    data, out = pictures(tmp_path / "data"), tmp_path / "run"
    assert main([*LINE.split(), "--data", data, "--out", str(out), *more]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and not out.exists()
