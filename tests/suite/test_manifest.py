"""Tables: what is read, what is refused with the row named, and which rows train."""

import csv
import os
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptsuite.errors import DataError, UsageError
from adaptsuite.manifest import (
    Manifest,
    Row,
    few_shot,
    leaks,
    load_manifest,
    require_trainable,
    split,
    write_csv,
)

LABELS = ("cat", "dog", "owl")


def table(folder, text, files=("a.wav", "b.wav", "c.wav", "d.wav"), encoding="utf-8"):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    path = folder / "manifest.csv"
    path.write_bytes(text.encode(encoding))
    return path


def made(count, label=lambda i: LABELS[i % 3], task="multiclass", **columns):
    """A manifest in memory; each column is a function of the row's number."""
    rows = [
        Row(f"/{i}", f"{i}.wav", tuple(label(i).split(";")), i + 2, {name: f(i) for name, f in columns.items()})
        for i in range(count)
    ]
    classes = tuple(sorted({name for row in rows for name in row.labels}))
    return Manifest(tuple(rows), classes, "/", type("P", (), {"name": "m.csv"}), task, ("path", "label", *columns))


# reading


def test_rows_classes_targets_and_groups_are_those_of_the_table(tmp_path):
    path = table(tmp_path, "label,path,group,note\ndog,a.wav,g1,x\ncat,./b.wav,g2,\ndog,c.wav,g1,=1+1\n")
    m = load_manifest(path)
    assert m.classes == ("cat", "dog")
    assert [row.rel for row in m.rows] == ["a.wav", "b.wav", "c.wav"]
    assert m.rows[0].path == (tmp_path / "a.wav").resolve() and m.rows[2].line == 4
    assert m.targets().tolist() == [1, 0, 1] and m.targets().dtype == np.int64
    assert m.groups().tolist() == [0, 1, 0]
    assert m.column("note") == ["x", "", "=1+1"] and m.column("label") == ["dog", "cat", "dog"]
    part = m.subset([2, 1])
    assert part.targets().tolist() == [1, 0] and part.classes == m.classes


def test_a_file_without_group_is_its_own_group(tmp_path):
    m = load_manifest(table(tmp_path, "path,label,group\na.wav,x,\nb.wav,y,g\nc.wav,x,g\nd.wav,y,\n"))
    assert len(set(m.groups().tolist())) == 3 and m.groups()[1] == m.groups()[2]


def test_byte_order_mark_line_ends_quotes_and_blank_lines_change_nothing(tmp_path):
    plain = load_manifest(table(tmp_path, "path,label\na.wav,x\nb.wav,y\n"))
    other = load_manifest(table(tmp_path, '\ufeff"path","label"\r\n\r\n"a.wav","x"\r\nb.wav,y\r\n'))
    assert other.digest == plain.digest and [row.line for row in other.rows] == [3, 4]


def test_digest_is_of_the_cells_and_not_of_the_place(tmp_path):
    texts = ["path,label,g\na.wav,x,1\nb.wav,y,2\n"] * 2 + [
        "path,label,g\na.wav,x,1\nb.wav,y,3\n",
        "path,label,g\na.wav,y,1\nb.wav,x,2\n",
        "path,label,g\nb.wav,y,2\na.wav,x,1\n",
    ]
    found = [load_manifest(table(tmp_path / str(i), text)).digest for i, text in enumerate(texts)]
    assert found[0] == found[1] and len(set(found)) == 4


def test_line_numbers_count_lines_inside_quotes(tmp_path):
    path = table(tmp_path, 'path,label,note\na.wav,x,"two\nlines"\nb.wav,,\n')
    with pytest.raises(DataError, match=r"^manifest.csv line 4: 'label' is empty$"):
        load_manifest(path)
    with pytest.raises(DataError, match="^manifest.csv line 2: 'label' is empty$"):  # where the row starts
        load_manifest(table(tmp_path, 'path,label,note\na.wav,,"two\nlines"\n'))


def test_multilabel_cells_become_many_hot_and_rows_of_one_file_are_joined(tmp_path):
    text = "path,label,group\na.wav,x;z,1\nb.wav,y,2\na.wav,y,1\n"
    m = load_manifest(table(tmp_path, text), task="multilabel")
    assert m.classes == ("x", "y", "z")
    assert m.targets().tolist() == [[1, 1, 1], [0, 1, 0]] and m.targets().dtype == np.float32
    with pytest.raises(DataError, match="line 4: 'a.wav' has another 'group' than in line 2"):
        load_manifest(table(tmp_path, text.replace("a.wav,y,1", "a.wav,y,2")), task="multilabel")


def test_free_tables_keep_several_rows_a_file_in_one_group(tmp_path):
    m = load_manifest(table(tmp_path, "path,question\na.wav,why?\na.wav,who?\nb.wav,why?\n"), "free", ["question"])
    assert len(m) == 3 and m.groups().tolist() == [0, 0, 1] and m.classes == ()
    with pytest.raises(UsageError, match="no classes"):
        m.targets()
    with pytest.raises(DataError, match="line 3: duplicate of line 2"):
        load_manifest(table(tmp_path, "path,question\na.wav,why?\na.wav,why?\n"), "free")


def test_further_file_columns_are_resolved_and_may_be_empty(tmp_path):
    path = table(tmp_path, "path,label,mask\na.wav,x,b.wav\nc.wav,y,\n")
    m = load_manifest(path, files=["mask"])
    assert m.rows[0].files == {"mask": (tmp_path / "b.wav").resolve()} and m.rows[1].files == {}
    with pytest.raises(DataError, match=r"line 2: '\.\./b\.wav' leads outside"):
        load_manifest(table(tmp_path, "path,label,mask\na.wav,x,../b.wav\n"), files=["mask"])


def test_another_label_map_gives_its_positions_and_names_a_label_it_lacks(tmp_path):
    m = load_manifest(table(tmp_path, "path,label\na.wav,dog\nb.wav,cat\n"))
    assert m.targets(["owl", "dog", "cat"]).tolist() == [1, 2]
    with pytest.raises(DataError, match="manifest.csv line 2: label 'dog' is unknown; did you mean dogs"):
        m.targets(["cat", "dogs"])


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "manifest.csv is empty"),
        ("path,label\n", "manifest.csv has a header and no rows"),
        ("file,lable\na.wav,x\n", r"no column 'path', its header is 'file', 'lable': rename the column"),
        ("path,lable\na.wav,x\n", r"no column 'label', its header is 'path', 'lable': rename 'lable' to 'label'"),
        ("path;label\na.wav;x\n", r"no column 'path', its cells are parted by ';': save it with commas"),
        ("path,label,label\na.wav,x,y\n", "line 1: column 'label' is there twice"),
        ("path,label\na.wav\n", "line 2: 1 cells, the header has 2"),
        ("path,label\na.wav,x,y\n", "line 2: 3 cells, the header has 2"),
        ("path,label\na.wav,\n", "line 2: 'label' is empty"),
        ("path,label\na.wav,x\nb.wav,  \n", "line 3: 'label' is empty"),
        ("path,label\na.wav,x \n", "line 2: label 'x ' has spaces around it"),
        ("path,label\n,x\n", "line 2: 'path' is empty"),
        ("path,label\n  ,x\n", "line 2: 'path' is empty"),
        ("path,label\na.wav,x\nb.wav,y\na.wav,x\n", "line 4: duplicate of line 2, 'a.wav' 'x'"),
        ("path,label\na.wav,x\n./a.wav,y\n", "line 3: 'a.wav' is 'y' here and 'x' in line 2"),
        ("path,label\na.wav,x;y\n", "line 2: label 'x;y' holds several labels; that needs task=multilabel"),
        ("path,label\nnone.wav,x\n", "line 2: 'none.wav' does not exist"),
        ("path,label\n.,x\n", r"line 2: '\.' is a folder, not a file"),
        ("path,label\n../a.wav,x\n", r"line 2: '\.\./a\.wav' leads outside the manifest's folder"),
        ("path,label\n/etc/passwd,x\n", "line 2: '/etc/passwd' is absolute"),
        ("path,label\nC:\\a.wav,x\n", "line 2: .* is absolute"),
        ("path,label\na.wav\0,x\n", "line 2: 'path' holds a zero byte"),
        ('path,label\n"a.wav,x\n', "line 2: unexpected end of data"),
        (f"path,label\n{'a' * 5000},x\n", "line 2: .* does not exist"),
        ("path,label\nhttp://host/a.wav,x\n", "line 2: .* does not exist"),
        (f"path,label,caption\na.wav,x,{'word ' * 200_000}\n", "line 2: field larger than field limit"),
    ],
)
def test_a_bad_table_names_the_row_and_the_reason(tmp_path, text, message):
    with pytest.raises(DataError, match=message) as caught:
        load_manifest(table(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cell", ["x;;y", ";x", "x;", "x; y"])
def test_a_multilabel_cell_with_an_empty_or_padded_label_is_refused(tmp_path, cell):
    with pytest.raises(DataError, match="line 2"):
        load_manifest(table(tmp_path, f"path,label\na.wav,{cell}\n"), task="multilabel")
    with pytest.raises(DataError, match="names a label twice"):
        load_manifest(table(tmp_path, "path,label\na.wav,x;x\n"), task="multilabel")


def test_a_multilabel_row_without_a_label_is_background(tmp_path):
    m = load_manifest(table(tmp_path, "path,label\na.wav,x;y\nb.wav,\nc.wav,y\n"), task="multilabel")
    assert m.classes == ("x", "y") and m.targets().tolist() == [[1, 1], [0, 0], [0, 1]]
    with pytest.raises(DataError, match="duplicate of line 2"):
        load_manifest(table(tmp_path, "path,label\na.wav,x\na.wav,\n"), task="multilabel")


def test_text_that_is_not_utf8_names_its_line(tmp_path):
    with pytest.raises(DataError, match=r"line 3: not UTF-8 \(byte 0xe9\)"):
        load_manifest(table(tmp_path, "path,label\na.wav,x\nb.wav,caf\u00e9\n", encoding="latin-1"))
    with pytest.raises(DataError, match="line 1: not UTF-8"):
        load_manifest(table(tmp_path, "path,label\na.wav,x\n", encoding="utf-16"))


def test_links_may_point_inside_the_folder_and_not_outside(tmp_path):
    outside = tmp_path / "secret.wav"
    outside.write_bytes(b"x")
    root = tmp_path / "data"
    path = table(root, "path,label\nlink.wav,x\nb.wav,y\n")
    (root / "link.wav").symlink_to(root / "a.wav")
    assert load_manifest(path).rows[0].path == (root / "a.wav").resolve()
    table(root, "path,label\nlink.wav,x\na.wav,y\n")
    with pytest.raises(DataError, match="'a.wav' is 'y' here and 'x' in line 2"):
        load_manifest(path)
    (root / "link.wav").unlink()
    (root / "link.wav").symlink_to(outside)
    with pytest.raises(DataError, match="line 2: 'link.wav' leads outside"):
        load_manifest(path)
    (root / "up").symlink_to(tmp_path)
    with pytest.raises(DataError, match="line 2: 'up/secret.wav' leads outside"):
        load_manifest(table(root, "path,label\nup/secret.wav,x\n"))
    sibling = table(tmp_path / "data2", "path,label\na.wav,x\n")
    with pytest.raises(DataError, match="leads outside"):  # a common prefix of text is not a common folder
        load_manifest(table(root, "path,label\n../data2/a.wav,x\n"))
    assert sibling.is_file()


def test_a_table_through_a_linked_folder_is_read(tmp_path):
    table(tmp_path / "data", "path,label\na.wav,x\n")
    (tmp_path / "linked").symlink_to(tmp_path / "data")
    assert len(load_manifest(tmp_path / "linked")) == 1


def test_a_path_that_does_not_exist_and_an_unknown_task_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere.csv does not exist"):
        load_manifest(tmp_path / "nowhere.csv")
    with pytest.raises(UsageError, match="did you mean multilabel"):
        load_manifest(tmp_path, task="multi-label")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_table_without_read_permission_is_a_data_error(tmp_path):
    path = table(tmp_path, "path,label\na.wav,x\n")
    path.chmod(0)
    with pytest.raises(DataError, match="Permission denied"):
        load_manifest(path)


# folders of classes


def test_a_folder_of_classes_takes_nested_files_of_any_case(tmp_path):
    for name in ("dog/a.WAV", "dog/deep/er/b.wav", "cat/c.Flac", "cat/notes.txt", "readme.md", ".git/x.wav"):
        table(tmp_path, "", [name])
    (tmp_path / "manifest.csv").unlink()
    m = load_manifest(tmp_path, suffixes=(".wav", ".FLAC"))
    assert [(row.rel, row.label) for row in m.rows] == [
        ("cat/c.Flac", "cat"),
        ("dog/a.WAV", "dog"),
        ("dog/deep/er/b.wav", "dog"),
    ]
    assert m.classes == ("cat", "dog") and m.where(m.rows[0]).endswith("/cat/c.Flac")
    assert m.notes == (f"2 files of {tmp_path.name} were left out: no class, or another suffix",)


def test_folders_train_and_test_are_the_split(tmp_path):
    for part in ("train", "val", "test"):
        for i in range(2):
            table(tmp_path, "", [f"{part}/dog/{i}.wav", f"{part}/cat/{i}.wav"])
    (tmp_path / "manifest.csv").unlink()
    m = load_manifest(tmp_path)
    assert m.classes == ("cat", "dog") and Counter(m.column("split")) == {"train": 4, "val": 4, "test": 4}
    (fold,) = split(m)
    for part in ("train", "val", "test"):
        assert [m.rows[i].rel.split("/")[0] for i in getattr(fold, part)] == [part] * 4


def test_a_folder_of_classes_refuses_links_and_empty_classes(tmp_path):
    root = tmp_path / "data"
    table(root, "", ["dog/a.wav", "cat/b.txt"])
    (root / "manifest.csv").unlink()
    with pytest.raises(DataError, match="cat holds no file ending in .wav"):
        load_manifest(root, suffixes=[".wav"])
    (tmp_path / "secret.wav").write_bytes(b"x")
    (root / "dog" / "link.wav").symlink_to(tmp_path / "secret.wav")
    with pytest.raises(DataError, match="data: 'dog/link.wav' leads outside"):
        load_manifest(root)
    (root / "dog" / "link.wav").unlink()
    (root / "dog" / "loop").symlink_to(root)
    with pytest.raises(DataError, match="is a link to a folder"):
        load_manifest(root)
    with pytest.raises(DataError, match="a folder of classes has no column 'mask'"):
        load_manifest(root, files=["mask"])


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="neither manifest.csv nor folders"):
        load_manifest(tmp_path)


# writing


def test_written_cells_do_not_run_in_a_spreadsheet_and_numbers_stay(tmp_path):
    rows = [{"path": "=cmd|' /C calc'!A0", "score": -0.5}, {"path": "@x", "score": "-0.5", "more": 'a,"b"\nc'}]
    write_csv(tmp_path / "out.csv", [*rows, {"path": "+a", "more": "-b"}, {"path": "\t=a", "score": None}])
    with open(tmp_path / "out.csv", newline="") as file:
        assert list(csv.reader(file)) == [
            ["path", "score", "more"],
            ["'=cmd|' /C calc'!A0", "-0.5", ""],
            ["'@x", "-0.5", 'a,"b"\nc'],
            ["'+a", "", "'-b"],
            ["'\t=a", "", ""],
        ]


# splits


def parts_of(manifest, fold):
    return [set(np.asarray(manifest.groups())[part].tolist()) for part in (fold.train, fold.val, fold.test)]


def test_test_rows_are_the_named_ones_and_validation_is_drawn_from_the_rest_by_group():
    m = made(90, group=lambda i: f"g{i // 2}", fold=lambda i: str(i // 30))
    (fold,) = split(m, test="fold=0,2", seed=3)
    assert fold.test.tolist() == [*range(30), *range(60, 90)]
    assert sorted([*fold.train, *fold.val]) == list(range(30, 60))
    train, val, test = parts_of(m, fold)
    assert not train & val and not val & test and not train & test
    assert 0.1 <= len(fold.val) / 30 <= 0.2
    assert set(m.targets()[fold.val].tolist()) == {0, 1, 2}


@settings(max_examples=40, deadline=None)
@given(st.integers(12, 80), st.integers(1, 5), st.integers(0, 5), st.sampled_from(["multiclass", "multilabel", "free"]))
def test_every_fold_covers_every_row_once_and_keeps_groups_whole(count, size, seed, task):
    m = made(count, task=task, group=lambda i: str(i // size), fold=lambda i: str(i // size % 3))
    folds = split(m, cv="fold", seed=seed)
    assert sorted(i for fold in folds for i in fold.test) == list(range(count))
    for fold in folds:
        assert sorted([*fold.train, *fold.val, *fold.test]) == list(range(count))
        assert len(fold.train) and len(fold.val)
        train, val, test = parts_of(m, fold)
        assert not train & val and not (train | val) & test


@pytest.mark.parametrize("group", [lambda i: f"g{i // 2}", lambda i: ""], ids=["groups", "rows"])
def test_the_draw_follows_the_seed_and_nothing_else(group):
    m = made(120, group=group, fold=lambda i: str(i // 60))
    draws = [split(m, test="fold=1", seed=seed)[0].val.tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_a_drawn_validation_part_keeps_the_proportions_of_classes():
    m = made(400, label=lambda i: "rare" if i % 10 == 0 else "common", fold=lambda i: str(i // 200))
    (fold,) = split(m, test="fold=1")
    assert Counter(m.rows[i].label for i in fold.val)["rare"] in (2, 3)
    assert 0.13 <= len(fold.val) / 200 <= 0.16


def test_a_class_of_one_group_stays_in_training():
    m = made(
        60,
        label=lambda i: "rare" if i in (7, 8) else LABELS[i % 2],
        group=lambda i: "r" if i in (7, 8) else str(i),
        t=lambda i: str(i > 50),
    )
    for seed in range(20):
        (fold,) = split(m, test="t=True", seed=seed)
        assert {7, 8} <= set(fold.train.tolist()) and len(fold.val)


def test_a_group_too_large_for_validation_stays_in_training():
    m = made(90, group=lambda i: "big" if i < 30 else f"g{i // 3}", t=lambda i: str(i >= 81))
    for seed in range(10):
        (fold,) = split(m, test="t=True", seed=seed)
        assert set(range(30)) <= set(fold.train.tolist()) and 0.07 < len(fold.val) / 81 < 0.2


def test_validation_is_the_option_else_split_val_else_drawn():
    m = made(60, split=lambda i: "val" if i % 6 == 5 else "train", fold=lambda i: str(i // 20), c=lambda i: str(i % 2))
    assert split(m, test="fold=0")[0].val.tolist() == [i for i in range(20, 60) if i % 6 == 5]
    assert split(m, test="fold=0", val="fold=1")[0].val.tolist() == list(range(20, 40))
    assert split(m, test="fold=0", val="c=1")[0].val.tolist() == list(range(21, 60, 2))  # never rows of the test part
    (fold,) = split(m, test="fold=0", val="none")
    assert len(fold.val) == 0 and fold.train.tolist() == list(range(20, 60))
    for fold in split(m, cv="fold"):
        assert fold.val.tolist() == [i for i in range(60) if i % 6 == 5 and i not in fold.test]
    with pytest.raises(DataError, match="fold=1: all rows of --val fold=1 are test rows"):
        split(m, cv="fold", val="fold=1")


def test_without_options_the_split_column_decides():
    m = made(60, split=lambda i: ("train", "train", "train", "val", "test")[i // 12])
    (fold,) = split(m)
    assert (len(fold.train), len(fold.val), len(fold.test)) == (36, 12, 12)
    (fold,) = split(m, val="none")
    assert (len(fold.train), len(fold.val), len(fold.test)) == (48, 0, 12)
    m = made(60, split=lambda i: "test" if i < 12 else "train")
    (fold,) = split(m)
    assert fold.test.tolist() == list(range(12)) and 5 <= len(fold.val) <= 9
    with pytest.raises(DataError, match="m.csv line 2: split 'fold1' is none of train, val, test"):
        split(made(60, split=lambda i: "fold1"))
    with pytest.raises(DataError, match="m.csv line 7: split '' is none of"):
        split(made(60, split=lambda i: "" if i == 5 else "train"))


def test_a_table_that_says_nothing_of_a_split_has_its_test_groups_drawn_by_the_seed_and_told():
    m = made(60, group=lambda i: str(i // 3))
    (fold,), (again,), (other,) = split(m), split(m), split(m, seed=1)
    assert fold.test.tolist() == again.test.tolist() != other.test.tolist()
    parts = {name: {m.rows[i].group for i in getattr(fold, name)} for name in ("train", "val", "test")}
    assert not parts["train"] & parts["test"] and not parts["val"] & parts["test"] and 5 <= len(fold.test) <= 15
    assert f"{len(fold.test)} rows (whole groups) were drawn by seed 0" in fold.notes[-1]


def test_folds_over_labels_are_refused():
    with pytest.raises(UsageError, match="what is tested must have been trained"):
        split(made(60), cv="label")


def test_official_test_rows_that_train_under_another_test_choice_are_told():
    m = made(60, split=lambda i: "test" if i % 5 == 0 else "train", who=lambda i: str(i // 20))
    (fold,) = split(m, test="who=0")
    official = sum(i % 5 == 0 for i in fold.train)
    assert official and fold.notes == (f"{official} rows with split=test train, since --test names others",)


def test_folds_are_named_and_ordered_by_value():
    names = [fold.name for fold in split(made(66, fold=lambda i: str(i // 6)), cv="fold")]
    assert names == [f"fold={i}" for i in range(11)]


def test_a_group_in_two_parts_is_refused_with_up_to_five_names():
    m = made(60, group=lambda i: f"g{i % 30}", split=lambda i: "train" if i < 30 else "test")
    expected = "'g0' in train and test, 'g1' in train and test, .*'g4' in train and test and 25 more"
    with pytest.raises(DataError, match=expected) as caught:
        split(m)
    assert "'g5'" not in str(caught.value)
    assert len(leaks(m, m.column("split"))) == 30
    assert leaks(m, ["train"] * 60) == {} and leaks(m, ["train"] * 30 + [""] * 30) == {}
    m = made(60, group=lambda i: "g" if i in (0, 25) else str(i), fold=lambda i: str(i // 20))
    with pytest.raises(DataError, match="'g' in train and val"):
        split(m, test="fold=2", val="fold=0")
    with pytest.raises(DataError, match="fold=0.*'g' in train and test"):
        split(m, cv="fold")


@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({"test": "fold"}, UsageError, "--test 'fold' is not of the form COLUMN=VALUE"),
        ({"test": "=1"}, UsageError, "not of the form"),
        ({"test": "fold="}, UsageError, "not of the form"),
        ({"test": "flod=1"}, UsageError, "m.csv has no column 'flod'; did you mean fold"),
        ({"test": "fold=1,9"}, UsageError, "no row has fold=9; there is: 0, 1, 2"),
        ({"test": "fold=1", "val": "who=gorge"}, UsageError, "no row has who=gorge; did you mean george"),
        ({"cv": "folds"}, UsageError, "did you mean fold"),
        ({"cv": "fold", "test": "fold=1"}, UsageError, "exclude each other"),
        ({"cv": "same"}, DataError, "--cv same: the column holds 'x' only"),
        ({"cv": "gaps"}, DataError, "m.csv line 2: 'gaps' is empty"),
        ({"test": "same=x"}, DataError, "every row is a test row"),
        ({"test": "fold=1", "val": "all=1"}, DataError, "no row is left to train on"),
        (
            {"test": "fold=1,2", "val": "label=cat,dog"},
            DataError,
            "all 7 training rows are 'owl', two classes are needed",
        ),
    ],
)
def test_a_choice_of_rows_that_cannot_be_names_the_next_step(options, kind, message):
    m = made(
        60,
        fold=lambda i: str(i % 3 if i > 2 else 0) if i % 3 else str(i // 3 % 3),
        who=lambda i: "george",
        same=lambda i: "x",
        gaps=lambda i: str(i % 2) if i else "",
        all=lambda i: "1",
    )
    if "label" in str(options):
        m = made(63, fold=lambda i: str(i // 21))
    with pytest.raises(kind, match=message):
        split(m, **options)


def test_a_value_with_a_comma_or_an_equals_sign_can_be_named():
    m = made(60, who=lambda i: ("a,b", "a", "b=c")[i // 20])
    assert split(m, test="who=a,b")[0].test.tolist() == list(range(20))
    assert split(m, test="who=b=c")[0].test.tolist() == list(range(40, 60))


def test_a_class_with_one_example_looks_like_a_typo_and_is_refused():
    m = made(30, label=lambda i: "dgo" if i == 4 else LABELS[i % 3], fold=lambda i: str(i % 2))
    expected = r"m.csv line 6: label 'dgo' has this one example, two or more are needed; did you mean dog\?"
    with pytest.raises(DataError, match=expected):
        split(m, cv="fold")
    with pytest.raises(DataError, match="every row is 'cat', two classes are needed"):
        require_trainable(made(9, label=lambda i: "cat"))
    with pytest.raises(DataError, match="every row is 'a;b'"):
        require_trainable(made(9, label=lambda i: "a;b", task="multilabel"))


def test_one_group_cannot_be_parted_and_says_what_to_do():
    m = made(30, group=lambda i: "a" if i < 15 else "b", t=lambda i: str(i < 15))
    with pytest.raises(DataError, match="too few groups for a validation part; .*--val none"):
        split(m, test="t=True")
    assert len(split(m, test="t=True", val="none")[0].train) == 15


def test_a_class_without_training_rows_is_told():
    m = made(60, label=lambda i: "owl" if i < 3 else LABELS[i % 2], fold=lambda i: str(i // 20))
    fold = split(m, test="fold=0")[0]
    assert fold.notes == ("class 'owl' has no training row: its 3 held-back rows cannot be right",)


def test_long_tables_are_split_in_seconds():
    m = made(40_000, fold=lambda i: str(i % 2))
    start = time.process_time()
    split(m, test="fold=0")
    assert time.process_time() - start < 5


# few-shot


def test_few_shot_draws_follow_the_seed_and_grow_by_adding():
    m = made(90)
    two, again, other = few_shot(m, range(60), 2, 0), few_shot(m, range(60), 2, 0), few_shot(m, range(60), 2, 1)
    assert two.tolist() == again.tolist() != other.tolist()
    assert Counter(m.rows[i].label for i in two) == {"cat": 2, "dog": 2, "owl": 2}
    assert set(two) < set(few_shot(m, range(60), 4, 0)) and max(two) < 60


def test_multilabel_shots_count_for_every_label_of_a_row():
    m = made(80, label=lambda i: ("a", "a;b", "b;c", "c")[i % 4], task="multilabel")
    for seed in range(5):
        counts = m.subset(few_shot(m, range(80), 3, seed)).targets().sum(0)
        assert (counts >= 3).all()
    m = made(12, label=lambda i: "a;b", task="multilabel")
    assert len(few_shot(m, range(12), 3, 0)) == 3  # one draw serves both classes


@pytest.mark.parametrize("shots", ["4", 0, -1, 2.0, True])
def test_shots_must_be_a_whole_number_above_zero(shots):
    with pytest.raises(UsageError, match="not a whole number above 0"):
        few_shot(made(30), range(30), shots, 0)


def test_more_shots_than_rows_name_the_class():
    with pytest.raises(DataError, match="class 'owl' has 3 training rows, 4 shots"):
        few_shot(made(11), range(11), 4, 0)


def test_split_draws_shots_from_training_rows_only():
    m = made(90, fold=lambda i: str(i // 30))
    (fold,) = split(m, test="fold=2", shots=2)
    assert len(fold.train) == 6 and len(fold.val) >= 8 and not set(fold.train) & (set(fold.val) | set(fold.test))
    draws = [split(m, test="fold=2", val="fold=1", shots=2, seed=seed)[0].train.tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


# real tables


def test_esc10_folds_keep_every_recording_whole(data_dir):
    m = load_manifest(data_dir("audio_esc10"))
    folds = split(m, cv="fold")
    assert [len(fold.test) for fold in folds] == [80] * 4 and len(m.classes) == 10
    for fold in folds:
        counts = Counter(m.targets()[fold.val].tolist())
        assert 30 <= len(fold.val) <= 42 and len(counts) == 10 and min(counts.values()) >= 2


def test_speakers_leak_through_the_official_takes_and_not_by_speaker(data_dir):
    m = load_manifest(data_dir("audio_fsdd"))
    with pytest.raises(DataError, match="'spk_george' in train and test, .*--cv group"):
        split(m)
    assert [len(fold.test) for fold in split(m, cv="speaker")] == [500] * 4
