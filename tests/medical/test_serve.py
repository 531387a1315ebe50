"""Studies in, findings out: what arrives is done once, killed or not, and nobody is named on the way."""

import contextlib
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from pydicom.data import get_testdata_file

from adaptsuite import experiment
from adaptsuite import recipe as recipes
from adaptsuite.atomic import is_complete
from adaptsuite.commands import read_recipe
from adaptsuite.errors import DataError, ResourceError, UsageError
from adaptsuite.images import fitted
from adaptsuite.medical import audit, dicom, dicom_out, reader
from adaptsuite.medical.ledger import MOST_ATTEMPTS, Ledger
from adaptsuite.medical.pipeline import MedicalDomain
from adaptsuite.medical.serve import predict_studies, watch
from adaptsuite.medical.studies import open_folder
from adaptsuite.metrics import to_probabilities

CLIP = get_testdata_file("examples_ybr_color.dcm")
CT = get_testdata_file("CT_small.dcm")
SALT = "a secret of many characters"


@pytest.fixture
def incoming(tmp_path):
    """Two studies that have arrived."""
    folder = tmp_path / "incoming"
    for name, source in (("a", CLIP), ("b", CT)):
        (folder / name).mkdir(parents=True)
        shutil.copy(source, folder / name / "1")
    return folder


class Log:
    def __init__(self):
        self.said, self.warned = [], []
        self.options = {"say": self.said.append, "warn": self.warned.append}


def once(reader, incoming, out, form="json", **options):
    log = Log()
    return watch(reader, incoming, out, form, settle_s=0, once=True, **{**log.options, **options}), log


def folders(out):
    return sorted(p.name for p in out.iterdir() if p.is_dir() and p.name != "ledger" and not p.name.startswith("."))


def in_a_child(work):
    """Runs in a forked process and returns the signal that ended it, 0 if none did."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            work()
        os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


# ---- given folders


def test_a_study_folder_gives_findings_and_a_line_in_the_audit_log(brightness, incoming, tmp_path):
    log, said = tmp_path / "audit.jsonl", Log()
    found = predict_studies(brightness, [incoming], tmp_path / "out", "sr", audit=log, **said.options)
    assert [s["format"] for s in found["studies"]] == ["sr", "sr"] and not found["failed"]
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert audit.verify(log).whole and len(entries) == 2
    for facts, entry, study in zip(found["studies"], entries, open_folder(incoming).studies, strict=True):
        folder = Path(facts["out"])
        assert is_complete(folder) and folder.name == study.key and len(facts["files"]) == 1
        assert json.loads((folder / "findings.json").read_text()) == {k: v for k, v in facts.items() if k != "out"}
        assert (entry["adapter"], entry["base"]) == ("ab" * 32, "cd" * 32) == (facts["adapter"], facts["base"])
        assert entry["input"] == audit.open_log(log).input_hash(study.uid) and entry["threshold"] == 0.4
        probabilities = facts["series"][0]["whole"]["probabilities"]
        assert entry["output"] == pytest.approx(list(probabilities.values()), abs=1e-6)
    assert sum("lesion" in line and "from 0.4 on" in line for line in said.said) == 2


def test_one_study_that_does_not_fit_fails_with_its_reason_and_of_several_the_others_go_on(bright, incoming, tmp_path):
    with pytest.raises(UsageError, match="no slices with a place .* take sr or overlay or json"):
        predict_studies(bright, [incoming / "a"], tmp_path / "out", "seg")
    found = predict_studies(bright, [incoming / "a", incoming / "b"], tmp_path / "out", "seg")
    assert (
        len(found["studies"]) == len(found["failed"]) == 1
        and "--format seg does not fit" in found["failed"][0]["reason"]
    )


def test_one_study_in_two_folders_is_refused(brightness, incoming, tmp_path):
    with pytest.raises(DataError, match="two of the folders hold it"):
        predict_studies(brightness, [incoming, incoming / "a"], tmp_path / "out")


def test_a_series_that_cannot_be_read_is_left_out_and_a_library_is_not_quoted(incoming, tmp_path, brightness):
    shutil.copy(incoming / "b" / "1", incoming / "a" / "2")
    read = brightness.read
    ds = pydicom.dcmread(CLIP)
    ds.SeriesInstanceUID, ds.SOPInstanceUID = "1.2.3", "1.2.3.4"
    ds.save_as(incoming / "a" / "3")

    def failing(series):
        if series.files[0].series_uid == "1.2.3":
            raise RuntimeError(f"cannot read {series.files[0].path} of Mrs Smith")
        return read(series)

    brightness.read, said = failing, Log()
    found = predict_studies(brightness, [incoming / "a"], tmp_path / "out", **said.options)
    us = next(s for s in found["studies"] if s["series"][0]["modality"] == "US")
    assert len(us["series"]) == 1 and us["skipped"][0]["reason"] == "cannot be read (RuntimeError)"
    assert len(found["studies"]) == 2 and not [w for w in said.warned if "Smith" in w or str(incoming) in w]


def test_deidentified_files_have_other_uids(bright, incoming, tmp_path):
    found = predict_studies(bright, [incoming / "b"], tmp_path / "out", "seg", salt=SALT)
    ds = pydicom.dcmread(next((tmp_path / "out").rglob("seg-*.dcm")))
    assert ds.StudyInstanceUID == dicom_out.remapped_uid(pydicom.dcmread(CT).StudyInstanceUID, SALT)
    assert ds.PatientIdentityRemoved == "YES" and found["studies"][0]["files"]
    with pytest.raises(UsageError, match="can be guessed"):
        predict_studies(bright, [incoming / "b"], tmp_path / "out", "seg", salt="short")


# ---- folders that arrive


def test_each_study_is_done_once_also_across_restarts(brightness, incoming, tmp_path):
    out, log = tmp_path / "out", tmp_path / "audit.jsonl"
    found, _ = once(brightness, incoming, out, audit=log)
    assert found == {"done": 2, "failed": 0, "waiting": 0} and len(folders(out)) == 2
    before = {p: p.stat().st_mtime_ns for p in out.rglob("findings.json")}
    assert once(brightness, incoming, out, audit=log)[0] == {"done": 0, "failed": 0, "waiting": 0}
    assert {p: p.stat().st_mtime_ns for p in out.rglob("findings.json")} == before
    assert audit.verify(log).entries == 2


def test_files_that_are_added_later_give_a_new_version_and_the_old_one_stays(brightness, incoming, tmp_path):
    out = tmp_path / "out"
    once(brightness, incoming, out)
    ds = pydicom.dcmread(CLIP)
    ds.SOPInstanceUID = "1.2.3.4"
    ds.save_as(incoming / "a" / "2")
    found, log = once(brightness, incoming, out)
    assert found["done"] == 1 and any("version 2, files were added or changed" in line for line in log.said)
    (name,) = [n for n in folders(out) if n.endswith("-v2")]
    new, old = (json.loads((out / n / "findings.json").read_text()) for n in (name, name.removesuffix("-v2")))
    assert (old["version"], new["version"]) == (1, 2)
    assert [len(facts["series"][0]["frames"]) for facts in (old, new)] == [30, 60]


def test_a_folder_that_changes_waits_until_it_has_settled(brightness, incoming, tmp_path):
    changes = iter(range(100))

    class Growing(type(brightness)):
        def read(self, series):
            if next(changes) == 0:  # another file comes while the first study is read
                shutil.copy(CT, incoming / "a" / "late")
            return super().read(series)

    found, log = once(Growing(), incoming, tmp_path / "out")
    assert found["done"] == 1 and any("changed while it was read: it waits again" in line for line in log.said)
    assert once(brightness, incoming, tmp_path / "out")[0]["done"] == 1
    assert len(folders(tmp_path / "out")) == 3  # of a, of b, and of b's study with what came late
    found = watch(brightness, incoming, tmp_path / "other", settle_s=0.3, once=True)
    assert found == {"done": 2, "failed": 0, "waiting": 0}


def test_what_is_still_arriving_is_left_for_the_next_time(brightness, incoming, tmp_path):
    from adaptsuite.medical import serve

    own = serve.service(brightness, tmp_path / "out")
    with Ledger.opened(tmp_path / "out", {}) as ledger:
        log = Log()
        watcher = serve._Watcher(own, ledger, incoming, 60.0, False, log.said.append, log.warned.append)
        watcher.look()
        watcher.take(lambda: False)
        assert len(watcher.pending) == 2 and not watcher.done
        for path, (state, _) in watcher.pending.items():
            watcher.pending[path] = (state, -1e9)
        (incoming / "a" / "2").write_bytes(b"x")
        watcher.look()
        watcher.take(lambda: False)
        assert [p.name for p in watcher.pending] == ["a"] and watcher.done == 1


@pytest.mark.parametrize("where", ["reading", "writing", "appeared"])
def test_killed_anywhere_the_next_start_goes_on_and_nothing_is_done_twice(brightness, incoming, tmp_path, where):
    out, log = tmp_path / "out", tmp_path / "audit.jsonl"
    shutil.rmtree(incoming / "b")

    class Doomed(type(brightness)):
        def read(self, series):
            return killed() if where == "reading" else super().read(series)

        @property
        def window(self):  # asked for once the study's folder is being written
            return killed() if where == "writing" else None

    say = {"say": killed} if where == "appeared" else {}
    assert in_a_child(lambda: once(Doomed(), incoming, out, audit=log, **say)) == signal.SIGKILL
    assert len(folders(out)) == (where == "appeared")
    found, _ = once(brightness, incoming, out, audit=log)
    assert found == {"done": 1, "failed": 0, "waiting": 0} and len(folders(out)) == 1
    assert is_complete(out / folders(out)[0]) and audit.verify(log).entries == 1
    assert not [p for p in out.iterdir() if ".temp-" in p.name]
    assert once(brightness, incoming, out, audit=log)[0]["done"] == 0


def test_a_study_that_kills_the_process_each_time_is_given_up(brightness, incoming, tmp_path):
    class Doomed(type(brightness)):
        def read(self, series):
            return killed() if series.modality == "US" else super().read(series)

    for _ in range(MOST_ATTEMPTS):
        assert in_a_child(lambda: once(Doomed(), incoming, tmp_path / "out")) == signal.SIGKILL
    found, log = once(Doomed(), incoming, tmp_path / "out")
    assert found == {"done": 1, "failed": 1, "waiting": 0} and "was killed 3 times" in log.warned[0]


def test_a_study_that_failed_is_recorded_and_tried_again_only_when_asked(brightness, incoming, tmp_path):
    class Broken(type(brightness)):
        def read(self, series):
            if series.modality == "US":
                raise DataError(f"{series.files[0].path}: no picture in it")
            return super().read(series)

    out = tmp_path / "out"
    found, log = once(Broken(), incoming, out)
    assert found == {"done": 1, "failed": 1, "waiting": 0}
    assert len(log.warned) == 1 and "1: no picture in it" in log.warned[0] and str(incoming) not in log.warned[0]
    with Ledger.opened(out, {"adapter": "ab" * 32, "format": "json", "de-identification": False}) as ledger:
        reasons = [v["reason"] for entry in ledger.entries.values() for v in entry["versions"]]
    assert sum("no picture in it" in (r or "") for r in reasons) == 1
    assert once(brightness, incoming, out)[0] == {"done": 0, "failed": 0, "waiting": 0}
    assert once(brightness, incoming, out, retry=True)[0] == {"done": 1, "failed": 0, "waiting": 0}
    assert len(folders(out)) == 2


def test_a_folder_without_images_and_a_damaged_one_fail_with_the_file(brightness, incoming, tmp_path):
    shutil.rmtree(incoming)
    (incoming / "c").mkdir(parents=True)
    (incoming / "c" / "cut").write_bytes(Path(CT).read_bytes()[:9000])
    (incoming / "empty").mkdir()
    (incoming / "loose").write_text("x")
    found, log = once(brightness, incoming, tmp_path / "out")
    assert found == {"done": 0, "failed": 1, "waiting": 0}
    assert "files directly in the watched folder" in log.warned[0] and "no image in it; cut: " in log.warned[1]


def test_two_watchers_with_one_output_folder_are_one_too_many(brightness, incoming, tmp_path):
    with Ledger.opened(tmp_path / "out", {}), pytest.raises(ResourceError, match="another process watches"):
        once(brightness, incoming, tmp_path / "out")


def test_a_ledger_of_another_adapter_or_format_is_refused(brightness, bright, incoming, tmp_path):
    once(brightness, incoming, tmp_path / "out")
    with pytest.raises(UsageError, match="its ledger is about another adapter: give another --out"):
        once(bright, incoming, tmp_path / "out")
    with pytest.raises(UsageError, match="about another format"):
        once(brightness, incoming, tmp_path / "out", "sr")


def test_an_output_folder_within_the_watched_one_is_refused(brightness, incoming):
    with pytest.raises(UsageError, match="would arrive as a study"):
        once(brightness, incoming, incoming / "out")


def test_a_signal_ends_the_watch_after_the_study_at_hand(brightness, incoming, tmp_path):
    class Signalled(type(brightness)):
        def read(self, series):
            os.kill(os.getpid(), signal.SIGINT)
            return super().read(series)

    log = Log()
    with pytest.raises(KeyboardInterrupt):
        watch(Signalled(), incoming, tmp_path / "out", settle_s=0, poll_s=60, **log.options)
    assert len(folders(tmp_path / "out")) == 1 and "1 done, 0 failed" in log.said[-1]
    assert once(brightness, incoming, tmp_path / "out")[0]["done"] == 1


def test_a_full_disk_stops_the_watch_and_is_no_fault_of_the_study(brightness, incoming, tmp_path):
    out = tmp_path / "out"

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))  # findings.json is larger, the ledger is not
        try:
            once(brightness, incoming, out)
        except ResourceError as error:
            assert "cannot write" in str(error)
            killed()

    for _ in range(MOST_ATTEMPTS + 1):
        assert in_a_child(work) == signal.SIGKILL
    assert not folders(out)
    assert once(brightness, incoming, out)[0] == {"done": 2, "failed": 0, "waiting": 0}


def test_an_audit_log_that_cannot_go_on_stops_the_watch(brightness, incoming, tmp_path):
    out, log = tmp_path / "out", tmp_path / "audit.jsonl"
    once(brightness, incoming, out, audit=log)
    lines = log.read_text().splitlines(keepends=True)
    log.write_text(lines[0])  # its end was cut off
    ds = pydicom.dcmread(CLIP)
    ds.StudyInstanceUID = "1.2.3"
    (incoming / "c").mkdir()
    ds.save_as(incoming / "c" / "1")
    with pytest.raises(ResourceError, match="is not what was last written"):
        once(brightness, incoming, out, audit=log)
    assert len(folders(out)) == 2
    log.write_text("".join(lines))
    assert once(brightness, incoming, out, audit=log)[0] == {"done": 1, "failed": 0, "waiting": 0}
    assert audit.verify(log).entries == 3


# ---- nobody is named


def patient_texts(path):
    """Every text value of the patient module, and the words of the name."""
    with dicom.quiet():
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        found = {str(e.value).strip() for e in ds if e.tag.group == 0x0010 and e.VR in dicom.TEXT and e.value}
        return {text for text in found if len(text) > 2} | set(str(ds.PatientName).replace("^", " ").split())


@pytest.mark.parametrize("salt", [None, SALT])
def test_no_output_names_the_patient(talkative, bright, tmp_path, capfd, caplog, salt):
    folder = talkative(tmp_path / "incoming" / "Müller Jürgen PID-0815")
    (folder / "Jürgen Müller.txt").write_text("x")
    (folder / "Mueller 19501231.dcm").write_bytes((folder / "0.dcm").read_bytes()[:9000])
    other = tmp_path / "incoming" / "Müller Jürgen 2"
    other.mkdir()
    shutil.copy(folder / "0.dcm", other / "Müller.dcm")

    class Broken(type(bright)):
        def read(self, series):
            if len(series.files) == 1:
                raise DataError(f"{series.files[0].path}: Müller^Jürgen cannot be read")
            return super().read(series)

    out, log, said = tmp_path / "out", tmp_path / "audit.jsonl", Log()
    options = {"audit": log, "salt": salt, **said.options}
    found = predict_studies(bright, [folder], out / "once", "seg", **options)
    assert once(Broken(), tmp_path / "incoming", out / "watch", "seg", **options)[0] == {
        "done": 1,
        "failed": 1,
        "waiting": 0,
    }
    for path in (folder, tmp_path / "incoming" / "nowhere"):
        with contextlib.suppress(DataError):
            predict_studies(Broken(), [path], out / "again", "overlay", **options)
    texts = patient_texts(folder / "0.dcm")
    assert {"Müller", "Jürgen", "PID-0815", "19501231", "OTHER99", "Gasse 7", "glass blower"} <= texts
    captured = capfd.readouterr()
    spoken = "\n".join([*said.said, *said.warned, json.dumps(found), captured.out, captured.err, caplog.text])
    written = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and "incoming" not in p.parts}
    plain = {p: raw for p, raw in written.items() if salt or p.suffix != ".dcm"}
    assert len([p for p in written if p.suffix == ".dcm"]) >= 2 and len(plain) >= 6 and len(said.warned) > 3
    for text in texts:
        assert text not in spoken, text
        for encoding in ("utf-8", "latin-1"):
            assert not [p for p, raw in plain.items() if text.encode(encoding) in raw], text
        assert not [p for p in written if text in str(p.relative_to(tmp_path))], text
    if salt is None:  # a SEG must name its patient to be filed
        assert str(pydicom.dcmread(next(out.rglob("seg-*.dcm"))).PatientID) == "PID-0815"


# ---- with a real network


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Saved adapters on the small embedded backbone, not trained: of labels and of masks."""
    out, domain = tmp_path_factory.mktemp("adapters"), MedicalDomain()

    def save(name, classes, settings, **kept):
        options = {"backbone": "embedded:vision-tiny", "method": "lora", "size": ("front_end.size", 48)}
        recipe = experiment.complete(domain, read_recipe(domain, {**options, "setting": settings}))
        handle = experiment.adapt(domain, recipe, classes)
        recipe = recipes.to_dict(domain.decided(recipe, handle.model))
        return handle.save(out / name, labels=list(classes), recipe=recipe, recipe_hash="", **kept)

    point = {"value": 0.4, "target": "sensitivity>=0.95", "reached": True}
    rule = {"value": 0.02, "target": "f1", "reached": True, "pixel": 0.4}
    cpu = "plan.device=cpu"
    return {
        "labels": save("labels", ("normal", "lesion"), [cpu], temperature=1.7, threshold={"lesion": point}),
        "masks": save("masks", ("foreground",), [cpu, "data.task=segmentation"], threshold={"foreground": rule}),
    }


def test_a_clip_is_read_as_thirty_pictures_with_calibrated_probabilities(adapters):
    own = reader.AdapterReader(adapters["labels"])
    series = open_folder(CLIP).studies[0].series[0]
    pictures = [image for _, image in reader._shown(series, own.reading, [])]
    images = torch.stack([fitted(image, own.model.front_end) for image in pictures])
    assert images.shape[:2] == (30, 3)
    found, front = own.read(series), own.model.front_end
    top, left = ((r - s) // 2 for r, s in zip(front.resized, front.size, strict=True))
    with torch.no_grad():
        window = images[:, :, top : top + front.size[0], left : left + front.size[1]]
        logits = own.model(window.float() / 255).double().numpy() / 1.7
    wanted = to_probabilities(np.concatenate([logits, logits.mean(0, keepdims=True)]), "multiclass")
    assert found.probabilities == pytest.approx(wanted, abs=1e-5)
    assert found.points[0].threshold == 0.4 and found.places == tuple((0, k) for k in range(30))
    facts = json.loads((adapters["labels"] / "adapter.json").read_text())
    assert own.algorithm.adapter_sha256 == facts["sha256"] and own.algorithm.base_sha256 == facts["base"]["fingerprint"]


def test_a_clip_fitted_to_224_pixels_is_30_3_224_224():
    from adaptsuite.front_end import FrontEnd
    from adaptsuite.medical.data import Reading

    series = open_folder(CLIP).studies[0].series[0]
    images = [fitted(image, FrontEnd()) for _, image in reader._shown(series, Reading(frames=0), [])]
    assert torch.stack(images).shape == (30, 3, 224, 224)


def test_slices_of_a_series_are_traced_back_to_their_files(adapters):
    folder = Path(get_testdata_file("DICOMDIR")).parent / "98892001" / "CT5N"
    series = open_folder(folder).studies[0].series[0]
    found = reader.AdapterReader(adapters["labels"]).read(series)
    heights = [float(pydicom.dcmread(series.files[file].path).ImagePositionPatient[2]) for file, _ in found.places]
    assert heights == sorted(heights) and len(set(found.places)) == 5
    volume = series.volume()
    assert reader._places(volume, series, "coronal") == [None] * 16


def test_a_mask_of_a_nifti_file_comes_back_to_its_grid(adapters, tmp_path):
    values = np.random.default_rng(0).normal(size=(20, 24, 9)).cumsum(0).astype(np.float32)
    affine = np.array([[0, 2, 0, 5], [0, 0, -3, 9], [-1.5, 0, 0, 7], [0, 0, 0, 1.0]])  # axes in another order
    nibabel.Nifti1Image(values, affine).to_filename(tmp_path / "a.nii.gz")
    own, series = reader.AdapterReader(adapters["masks"]), open_folder(tmp_path).studies[0].series[0]
    found, shown = own.read(series).masks[0], series.volume().plane("axial")
    grey = shown.windowed(reader.own_window(shown.values)).values
    labels, shares = own._maps(reader._picture(own) for own in grey)
    assert found.shape == (9, 24, 20) and torch.equal(found.plane("axial").values, labels.float())
    assert labels.shape == (20, 9, 24) and shares.shape == (20, 1)


def test_labels_of_real_studies_become_reports_by_the_command(adapters, adapt, incoming, tmp_path):
    log = tmp_path / "audit.jsonl"
    arguments = ["predict", adapters["labels"], incoming, "--out", tmp_path / "out", "--format", "sr", "--json"]
    found, _ = adapt(*arguments, "--audit", log)
    assert audit.verify(log).entries == 2 and len(found["studies"]) == 2
    for facts in found["studies"]:
        (name,) = facts["files"]
        said = dicom_out.read_sr(Path(facts["out"]) / name)
        whole = facts["series"][0]["whole"]["findings"]["lesion"]
        assert said[0][1:] == ("lesion", whole["probability"], "Present" if whole["present"] else "Absent")
        ds = pydicom.dcmread(Path(facts["out"]) / name)
        assert ds.DeviceSerialNumber == facts["adapter"]


def test_masks_of_a_real_study_become_a_seg_by_the_command(adapters, adapt, incoming, tmp_path):
    out = ["--out", tmp_path / "out", "--format", "seg"]
    found, _ = adapt("predict", adapters["masks"], incoming / "b", *out, "--json")
    volume = open_folder(incoming / "b").studies[0].series[0].volume()
    (path,) = (tmp_path / "out").rglob("seg-*.dcm")
    mask, labels = dicom_out.read_seg(path, volume)
    own = reader.AdapterReader(adapters["masks"]).read(open_folder(incoming / "b").studies[0].series[0])
    assert torch.equal(mask.values, own.masks[0].values) and labels == ("foreground",)
    assert found["studies"][0]["thresholds"]["foreground"] == {
        "threshold": 0.02,
        "pixel": 0.4,
        "source": "f1 on validation rows",
    }
    _, err = adapt("predict", adapters["masks"], incoming / "a", *out, code=2)
    assert err.count("\n") == 1 and "take sr or overlay or json" in err


def test_real_volumes_and_clips_are_read_by_both_kinds_of_adapters(adapters, data_dir, tmp_path):
    folder = data_dir("medical_volumes_dicom")
    files = [folder / "nibabel" / n for n in ("anatomical.nii", "someones_anatomy.nii.gz", "0.dcm")]
    files += [folder / "pydicom" / n for n in ("MR_small.dcm", "examples_palette.dcm", "examples_rgb_color.dcm")]
    for kind in ("labels", "masks"):
        found = predict_studies(adapters[kind], files, tmp_path / kind)
        assert len(found["studies"]) == 6 and not found["failed"]
        whole = [s["series"][0]["whole"] for s in found["studies"]]
        assert all(0 <= f[k] <= 1 for w in whole for f in w["findings"].values() for k in f if k != "present")
    with pytest.raises(DataError, match="4-D, 20 volumes"):
        predict_studies(adapters["labels"], [folder / "nibabel" / "functional.nii"], tmp_path / "four")


def test_the_command_watches_once_and_says_what_failed(adapters, adapt, incoming, tmp_path):
    watch = ["predict", adapters["masks"], incoming, "--watch", "--once", "--settle", "0", "--out", tmp_path / "out"]
    _, err = adapt(*watch, "--format", "seg", code=3)
    assert "1 folders failed" in err and "take sr or overlay or json" in err
    found, _ = adapt(*watch, "--format", "seg", "--json")
    assert found == {"done": 0, "failed": 0, "waiting": 0}
    found, err = adapt(*watch, "--format", "seg", "--retry", "--skip-bad", "--json")
    assert found["failed"] == 1


def test_files_without_a_format_are_labelled_as_in_other_domains(adapters, adapt, tmp_path):
    out, _ = adapt("predict", adapters["labels"], CLIP, "--out", tmp_path / "labels.csv", "--json")
    assert set(out["predictions"][0]["scores"]) == {"normal", "lesion"} and (tmp_path / "labels.csv").is_file()
    for wrong in (["--once"], ["--audit", "a"], ["--format", "sr"], ["--format", "png", "--out", tmp_path / "x"]):
        _, err = adapt("predict", adapters["labels"], CLIP, *wrong, code=2)
        assert err.count("\n") == 1
