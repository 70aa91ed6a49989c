from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from bundle.data.case_table import CaseColumns
from bundle.data.datalist import LOCKED, SECTIONS, class_names, content_hash, fold_sizes, load_datalist
from bundle.data.make_datalist import locked_patients, main, make_datalist, make_folds, write_datalist
from bundle.data.slice_table import SliceColumns
from bundle.errors import InputError


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    columns = list(rows[0])
    lines = [",".join(columns)] + [",".join(str(row[column]) for column in columns) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def cohort(folder: Path, patients: int = 24, scans: int = 2) -> list[dict[str, Any]]:
    """Rows of a good table, its (empty) image files made: a third of the patients is positive."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for patient in range(patients):
        for scan in range(1 + patient % scans):
            name = f"images/p{patient:02d}_{scan}.nii.gz"
            (folder / name).touch()
            rows.append({"image": name, "label": int(patient % 3 == 0), "patient": f"p{patient}", "site": "A"})
    return rows


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    return cohort(tmp_path)


def problems_of(path: Path, columns: CaseColumns | None = None, **options: Any) -> list[str]:
    with pytest.raises(InputError) as error:
        make_datalist(path, columns, **options)
    first, *sentences = str(error.value).split("\n  ")
    if sentences:
        assert f"{len(sentences)} problem" in first
    return sentences or [first]


def saved(folder: Path, change: Any = None, *, rehash: bool = True) -> Path:
    """A datalist of the cohort on disk, changed by `change(datalist)`."""
    datalist = make_datalist(write_table(folder / "volumes.csv", cohort(folder)))
    if change is not None:
        change(datalist)
    if rehash:
        datalist["hash"] = content_hash(datalist)
    write_datalist(datalist, folder / "datalist.json")
    return folder / "datalist.json"


# Folds


@pytest.mark.parametrize("num_folds", [2, 3, 5])
@pytest.mark.parametrize("seed", [0, 7])
def test_folds_partition_cases_keep_patients_together_and_hold_every_class(num_folds: int, seed: int) -> None:
    random.seed(seed)
    cases = [
        {"case": f"c{patient}_{scan}", "patient": f"p{patient}", "label": int(patient % 3 == 0)}
        for patient in range(60)
        for scan in range(random.randint(1, 3))
    ]
    by_id = {case["case"]: case for case in cases}
    share = sum(case["label"] for case in cases) / len(cases)
    folds = make_folds(cases, num_folds, seed)
    assert len(folds) == num_folds
    assert sorted(name for fold in folds for name in fold["test"]) == sorted(by_id)
    for fold in folds:
        assert sorted(name for section in SECTIONS for name in fold[section]) == sorted(by_id)
        owners = [{by_id[name]["patient"] for name in fold[section]} for section in SECTIONS]
        assert not owners[0] & owners[1]
        assert not owners[0] & owners[2]
        assert not owners[1] & owners[2]
        wanted = 1 / num_folds if num_folds > 2 else 1 / 4
        assert abs(len(fold["validation"]) / len(cases) - wanted) < 0.05
        for section in SECTIONS:
            assert abs(sum(by_id[n]["label"] for n in fold[section]) / len(fold[section]) - share) < 0.12


def test_folds_depend_on_the_seed_but_not_on_the_order_of_rows() -> None:
    cases = [{"case": f"c{i}", "patient": f"p{i // 2}", "label": i // 2 % 2} for i in range(60)]
    shuffled = random.Random(1).sample(cases, len(cases))
    assert make_folds(cases, 5, 0) == make_folds(shuffled, 5, 0)
    assert make_folds(cases, 5, 0) != make_folds(cases, 5, 1)


def test_too_few_patients_of_a_class_even_with_many_cases() -> None:
    cases = [
        {"case": f"c{i}", "patient": f"p{i if i < 20 else i % 4}b{i < 20}", "label": int(i >= 20)} for i in range(60)
    ]
    with pytest.raises(InputError, match="class 1 has 4 patients, too few for 5 folds"):
        make_folds(cases, 5, 0)
    assert len(make_folds(cases, 3, 0)) == 3
    with pytest.raises(InputError, match="at least 2"):
        make_folds(cases, 1, 0)


# Good tables


def test_round_trip(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    table = write_table(tmp_path / "volumes.csv", rows)
    assert main([str(table), "--out", str(tmp_path / "datalist.json"), "--folds", "4", "--seed", "3"]) == 0
    seen = []
    for fold in range(4):
        records = [r for s in SECTIONS for r in load_datalist(str(tmp_path / "datalist.json"), s, fold, tmp_path)]
        assert sorted(r["image"] for r in records) == sorted(str(tmp_path / row["image"]) for row in rows)
        assert {(r["image"], r["label"], r["patient"]) for r in records} == {
            (str(tmp_path / row["image"]), row["label"], row["patient"]) for row in rows
        }
        assert all(set(r) == {"case", "image", "label", "patient", "slice_label"} for r in records)
        seen += [r["case"] for r in load_datalist(tmp_path / "datalist.json", "test", fold)]
    assert len(seen) == len(set(seen)) == len(rows)
    assert class_names(tmp_path / "datalist.json") == ["0", "1"]
    datalist = json.loads((tmp_path / "datalist.json").read_text())
    assert datalist["seed"] == 3
    assert datalist["num_folds"] == 4
    assert datalist["cases"][0]["extra"] == {"site": "A"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_same_table_gives_the_same_file(tmp_path: Path) -> None:
    first = saved(tmp_path).read_bytes()
    assert saved(tmp_path).read_bytes() == first


def test_modalities_in_the_order_given(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for name in ("t1ce", "flair"):
            row[name] = row["image"].replace(".nii", f"_{name}.nii")
            (tmp_path / row[name]).touch()
    table = write_table(tmp_path / "t.csv", rows)
    datalist = make_datalist(table, CaseColumns(image=("t1ce", "image", "flair")))
    assert datalist["cases"][0]["image"] == [rows[0]["t1ce"], rows[0]["image"], rows[0]["flair"]]
    write_datalist(datalist, tmp_path / "d.json")
    record = load_datalist(tmp_path / "d.json", "test", 0, tmp_path)[0]
    stem = record["image"][1].removesuffix(".nii.gz")
    assert record["image"] == [f"{stem}_t1ce.nii.gz", f"{stem}.nii.gz", f"{stem}_flair.nii.gz"]


@pytest.mark.parametrize(
    ("texts", "classes", "names", "labels"),
    [
        (["0", "1"], None, ["0", "1"], [0, 1]),
        (["0.0", "1.0"], None, ["0", "1"], [0, 1]),
        (["0", "1"], ["II", "III"], ["II", "III"], [0, 1]),
        (["1", "0"], ["1", "0"], ["1", "0"], [0, 1]),
        (["sick", "healthy"], None, ["healthy", "sick"], [1, 0]),
        (["sick", "healthy"], ["sick", "healthy"], ["sick", "healthy"], [0, 1]),
    ],
)
def test_labels(
    tmp_path: Path, texts: list[str], classes: list[str] | None, names: list[str], labels: list[int]
) -> None:
    rows = cohort(tmp_path, scans=1)
    for number, row in enumerate(rows):
        row["label"] = texts[number % 2]
    datalist = make_datalist(write_table(tmp_path / "t.csv", rows), classes=classes)
    assert datalist["class_names"] == names
    assert [case["label"] for case in datalist["cases"][:2]] == labels


def test_ten_integer_classes_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    rows = cohort(tmp_path, patients=55, scans=1)
    for number, row in enumerate(rows):
        row["label"] = number % 11
    datalist = make_datalist(write_table(tmp_path / "t.csv", rows))
    assert datalist["class_names"] == [str(k) for k in range(11)]
    assert [case["label"] for case in datalist["cases"][:11]] == list(range(11))


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_spreadsheet_dialects(tmp_path: Path, rows: list[dict[str, Any]], separator: str) -> None:
    text = write_table(tmp_path / "t.csv", rows).read_text().replace(",", separator).replace("\n", "\r\n")
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert len(make_datalist(tmp_path / "t.csv")["cases"]) == len(rows)


def test_case_ids_from_file_names_are_unique(tmp_path: Path) -> None:
    rows = []
    for patient in range(12):
        (tmp_path / f"p{patient}").mkdir()
        (tmp_path / f"p{patient}" / "scan.nii.gz").touch()
        rows.append({"image": f"p{patient}/scan.nii.gz", "label": patient % 2, "patient": patient})
    cases = [case["case"] for case in make_datalist(write_table(tmp_path / "t.csv", rows))["cases"]]
    assert cases == [f"scan_{number}" for number in range(1, 13)]


def test_paths_within_the_data_folder_are_saved_relative_to_it(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    (tmp_path / "other").mkdir()
    relative = [row["image"] for row in rows]
    for row in rows:
        row["image"] = tmp_path / row["image"]
    table = write_table(tmp_path / "other" / "t.csv", rows)
    assert [case["image"] for case in make_datalist(table, dataset_dir=tmp_path)["cases"]] == relative
    assert all(Path(case["image"]).is_absolute() for case in make_datalist(table)["cases"])


def test_unlabelled_rows_are_left_out_on_request(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    rows[4]["label"] = ""
    slices = write_table(tmp_path / "s.csv", [{"image": row["image"], "k": 0, "label": 0} for row in rows])
    datalist = make_datalist(write_table(tmp_path / "t.csv", rows), skip_unlabelled=True, slices=slices)
    assert len(datalist["cases"]) == len(rows) - 1
    assert rows[4]["image"] not in [case["image"] for case in datalist["cases"]]


def test_official_splits_are_kept(tmp_path: Path) -> None:
    rows = cohort(tmp_path, scans=1)
    for number, row in enumerate(rows):
        row["part"] = ["train", "VAL", "training", "Test", "validation", "train"][number % 6]
    datalist = make_datalist(write_table(tmp_path / "t.csv", rows), CaseColumns(split="part"))
    (fold,) = datalist["folds"]
    assert [len(fold[section]) for section in SECTIONS] == [12, 8, 4]
    assert fold["test"] == [f"p{number:02d}_0" for number in (3, 9, 15, 21)]


def test_published_set_without_a_test_part(tmp_path: Path) -> None:
    rows = cohort(tmp_path, scans=1)
    for number, row in enumerate(rows):
        row["split"] = "train" if number < 15 else "val"
    datalist = make_datalist(write_table(tmp_path / "t.csv", rows), CaseColumns(split="split"))
    write_datalist(datalist, tmp_path / "d.json")
    assert len(load_datalist(tmp_path / "d.json", "training")) == 15
    with pytest.raises(InputError, match="no cases in section test of fold 0"):
        load_datalist(tmp_path / "d.json", "test")


def test_a_kept_back_test_part_is_replaced_by_the_validation_part(tmp_path: Path) -> None:
    rows = cohort(tmp_path, patients=40)
    for row in rows:
        row["split"] = "train" if int(row["patient"][1:]) < 30 else "val"
    table, columns = write_table(tmp_path / "t.csv", rows), CaseColumns(split="split")
    (official,) = make_datalist(table, columns)["folds"]
    datalist = make_datalist(table, columns, validation_as_test=True)
    (fold,) = datalist["folds"]
    assert fold["test"] == official["validation"]
    assert sorted(fold["training"] + fold["validation"]) == sorted(official["training"])
    patient = {case["case"]: case["patient"] for case in datalist["cases"]}
    label = {case["case"]: case["label"] for case in datalist["cases"]}
    assert not {patient[case] for case in fold["training"]} & {patient[case] for case in fold["validation"]}
    assert len({patient[case] for case in fold["validation"]}) == 30 // 5
    assert {label[case] for case in fold["validation"]} == {0, 1}
    (more,) = make_datalist(table, columns, validation_as_test=True, num_folds=3)["folds"]
    assert len({patient[case] for case in more["validation"]}) == 30 // 3
    assert make_datalist(table, columns, validation_as_test=True, seed=1)["folds"] != [fold]
    arguments = [str(table), "--split", "split", "--validation_as_test", "--out", str(tmp_path / "d.json")]
    assert main(arguments) == 0
    assert json.loads((tmp_path / "d.json").read_text())["folds"] == [fold]
    assert fold_sizes(tmp_path / "d.json") == [{section: len(fold[section]) for section in SECTIONS} | {LOCKED: 0}]


def test_only_a_kept_back_test_part_is_replaced(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    for number, row in enumerate(rows):
        row["split"] = ["train", "val", "test"][number % 3]
        row["patient"] = f"p{number}"
    table = write_table(tmp_path / "t.csv", rows)
    (sentence,) = problems_of(table, CaseColumns(split="split"), validation_as_test=True)
    assert "--validation_as_test is for a split without test cases, and this one has some" in sentence
    (sentence,) = problems_of(table, validation_as_test=True)
    assert "--validation_as_test needs the column of official splits: give --split too" in sentence


# Slice truth


def test_slice_truth_by_image_with_gaps_and_unknowns(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    table = write_table(tmp_path / "t.csv", rows)
    truth = [(3, "1"), (0, "0"), (1, ""), (5, "1.0")]
    slices = write_table(
        tmp_path / "s.csv", [{"image": rows[2]["image"], "slice": k, "lesion": value} for k, value in truth]
    )
    datalist = make_datalist(table, slices=slices, slice_columns=SliceColumns(label="lesion", index="slice"))
    assert datalist["cases"][2]["slice_label"] == [0, -1, -1, 1, -1, 1]
    assert "slice_label" not in datalist["cases"][0]


@pytest.mark.parametrize("kind", ["case", "patient"])
def test_slice_truth_by_case_or_patient(tmp_path: Path, kind: str) -> None:
    rows = cohort(tmp_path, scans=1)
    table = write_table(tmp_path / "t.csv", rows)
    key = {"case": "p07_0", "patient": "p7"}[kind]
    slices = write_table(tmp_path / "s.csv", [{kind: key, "k": k, "label": k % 2} for k in range(4)])
    datalist = make_datalist(table, slices=slices)
    assert datalist["cases"][7]["slice_label"] == [0, 1, 0, 1]


def test_every_bad_slice_row_is_named(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    table = write_table(tmp_path / "t.csv", rows)
    image = rows[0]["image"]
    bad = [(image, 0, 1), ("other.nii", 0, 1), (image, -1, 1), (image, "1.5", 1), (image, 99999999, 0)]
    bad += [(image, 1, 7), (image, 2, "yes"), (image, 0, 1)]
    slices = write_table(tmp_path / "s.csv", [{"image": i, "k": k, "label": value} for i, k, value in bad])
    sentences = problems_of(table, slices=slices)
    wanted = [
        r"row 3, column image: no case",
        r"row 4, column k: a slice index is",
        r"row 5, column k: a slice index is",
        r"row 6, column k: a slice index is",
        r"row 7, column label: slice truth is 1, 0",
        r"row 8, column label: slice truth is 1, 0",
        r"row 9, column k: this slice of this case is in row 2",
    ]
    assert len(sentences) == len(wanted)
    for sentence, pattern in zip(sentences, wanted, strict=True):
        assert "s.csv: " in sentence
        assert re.search(pattern, sentence)


def test_slice_truth_by_patient_with_two_cases_is_ambiguous(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    slices = write_table(tmp_path / "s.csv", [{"patient": "p1", "k": 0, "label": 1}])
    (sentence,) = problems_of(write_table(tmp_path / "t.csv", rows), slices=slices)
    assert "2 cases have this patient" in sentence


# Bad tables


def test_every_bad_row_is_named_and_nothing_is_written(
    tmp_path: Path, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    for number, row in enumerate(rows):
        row["id"] = f"c{number}"
        row["part"] = "train" if number % 2 else "val"
    rows[0]["image"] = "images/none.nii.gz"
    rows[1]["image"] = ""
    rows[3]["image"] = rows[2]["image"]
    rows[4]["label"] = ""
    rows[5]["label"] = "positive"
    rows[6]["patient"] = ""
    rows[8]["id"] = rows[7]["id"].upper()
    rows[9]["id"] = "../up"
    rows[10]["id"] = ""
    rows[12]["part"] = "holdout"
    twins = [number for number, row in enumerate(rows) if row["patient"] == "p11"]  # a patient with two scans
    rows[twins[1]]["label"] = 1 - rows[twins[0]]["label"]
    table = write_table(tmp_path / "t.csv", rows)
    text = table.read_text().splitlines()
    table.write_text("\n".join([*text, "", ",,,,,", "images/p00_0.nii.gz,0,q,A,q,train,too,many"]))
    wanted = [
        (0, "image", "no such file"),
        (1, "image", "is empty"),
        (3, "image", "same image is in row 4, column image"),
        (4, "label", "is empty.*--skip_unlabelled"),
        (5, "label", "unknown label positive: the labels here are 0, 1"),
        (6, "patient", "is empty"),
        (8, "id", "same case id is in row 9"),
        (9, "id", "becomes a file name"),
        (10, "id", "is empty"),
        (12, "part", "holdout is no split"),
        (twins[1], "label", f"another label in row {twins[0] + 2}"),
        (twins[1], "part", f"patient is in .* in row {twins[0] + 2}"),
    ]
    sentences = problems_of(table, CaseColumns(case="id", split="part"))
    for index, column, pattern in wanted:
        where = f"row {index + 2}, column {column}: "
        assert any(s.startswith(where) and re.search(pattern, s) for s in sentences), (where, sentences)
    long_row = f"row {len(rows) + 4}: it has 8 cells, but the header 6"  # after a blank and an empty row
    assert any(s.startswith(long_row) for s in sentences)
    with pytest.raises(InputError):
        main([str(table), "--out", str(tmp_path / "out.json"), "--case", "id", "--split", "part"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "t.csv"]
    assert not any(re.search(r"\bp\d+\b", sentence) for sentence in sentences), "patients are never named"


def test_mixed_labels_of_a_patient_are_allowed_on_request(tmp_path: Path) -> None:
    rows = cohort(tmp_path, patients=16)
    for number, row in enumerate(rows):
        row["patient"], row["label"] = f"q{number // 2}", number % 2
    table = write_table(tmp_path / "t.csv", rows)
    assert len(problems_of(table)) == len(rows) // 2
    assert len(make_datalist(table, mixed_labels=True)["folds"]) == 5


def test_locked_patients_are_in_no_fold_and_read_as_a_section_of_each(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", cohort(tmp_path, patients=40))
    datalist = make_datalist(table, lock=0.25)
    of_patient = {case["case"]: case["patient"] for case in datalist["cases"]}
    locked = {of_patient[name] for name in datalist["locked"]}
    assert 2 <= len(locked) <= 20
    for fold in datalist["folds"]:
        members = [name for section in SECTIONS for name in fold[section]]
        assert sorted(members + datalist["locked"]) == sorted(of_patient)
        assert not locked & {of_patient[name] for name in members}
    write_datalist(datalist, tmp_path / "datalist.json")
    for fold in (0, 4):
        records = load_datalist(tmp_path / "datalist.json", "locked", fold)
        assert [record["case"] for record in records] == datalist["locked"]
    main([str(table), "--out", str(tmp_path / "same.json"), "--lock", "0.25"])
    assert (tmp_path / "same.json").read_text() == (tmp_path / "datalist.json").read_text()


def test_who_is_locked_depends_on_the_patient_alone() -> None:
    many = [f"p{number}" for number in range(2000)]
    locked = locked_patients(many, 0.2)
    assert 0.17 < len(locked) / len(many) < 0.23
    assert locked_patients(reversed(many[:500]), 0.2) == locked & set(many[:500])
    assert locked_patients(many, 0.1) < locked  # a larger share adds some and releases none
    assert locked_patients(many, 0.0) == set()


def test_a_wrong_share_and_an_official_split_cannot_be_locked(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    table = write_table(tmp_path / "t.csv", [{**row, "part": "training"} for row in rows])
    for share in (1.0, -0.1, float("nan")):
        with pytest.raises(InputError, match="from 0 to below 1"):
            make_datalist(table, lock=share)
    with pytest.raises(InputError, match="--lock and --split exclude each other"):
        make_datalist(table, CaseColumns(split="part"), lock=0.2)
    with pytest.raises(InputError, match="no locked cases: make it with scripts/make_datalist --lock"):
        load_datalist(saved(tmp_path), "locked")


def test_a_locked_case_in_a_fold_is_refused(tmp_path: Path) -> None:
    def change(datalist: dict[str, Any]) -> None:
        datalist["locked"] = [datalist["folds"][0]["training"][0]]

    with pytest.raises(InputError, match="is in training and in locked"):
        load_datalist(saved(tmp_path, change), "training")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "no header"),
        (b"\n\n", "no header"),
        (b"image,label,patient\n", "no rows below its header"),
        (b"image,label,image\na,0,b\n", "two columns named image"),
        (b"image,class,patient\na,0,p\n", r"no column label \(--label\): it has image, class, patient"),
        (b"picture,label,patient\na,0,p\n", r"no column image \(--image\): it has picture, label, patient"),
        (b"PK\x03\x04\x00\x00", "not a text table"),
        ("image,label,patient\nM\xfcller,0,p\n".encode("latin-1"), "not a text table in UTF-8"),
        (b'image,label,patient\n"a"b,0,p\n', "not a well-formed CSV"),
        (b"image,label,patient\na,0,p\nb,0,q\n", "fewer than two classes"),
        (b"image,label,patient\na,1,p\nb,2,q\n", "the labels are 1, 2, but integers must count from 0"),
        (b"image,label,patient\na,Sick,p\nb,sick,q\n", "labels Sick and sick differ in capitals only"),
    ],
)
def test_unusable_tables(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        make_datalist(tmp_path / "t.csv")


def test_missing_table_folder_and_classes(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    with pytest.raises(InputError, match="there is no table"):
        make_datalist(tmp_path / "none.csv")
    table = write_table(tmp_path / "t.csv", rows)
    with pytest.raises(InputError, match="there is no folder"):
        make_datalist(table, dataset_dir=tmp_path / "none")
    with pytest.raises(InputError, match="no case has class 2"):
        make_datalist(table, classes=["a", "b", "c"])
    with pytest.raises(InputError, match="doubled name"):
        make_datalist(table, classes=["a", "a"])
    (sentence,) = problems_of(table, num_folds=10)
    assert "class 1 has 8 patients, too few for 10 folds" in sentence


# Reading


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d["cases"].append(dict(d["cases"][0])), "the case p00_0 twice"),
        (lambda d: d["folds"][1]["training"].append(d["folds"][1]["test"][0]), "is in training and in test"),
        (lambda d: d["folds"][0]["test"].append(d["folds"][0]["test"][0]), "is in test and in test"),
        (lambda d: d["folds"][2]["test"].append("ghost"), "names a case ghost that is not in the list"),
        (lambda d: d["cases"][0].update(label=2), "label 2, but there are 2 classes"),
        (lambda d: d["cases"][0].update(label=-1), "label -1"),
        (lambda d: d["cases"][0].update(label="1"), r"at \$.cases\[0\].label"),
        (lambda d: d["cases"][0].update(slice_label=[0, 3]), "slice_label of case p00_0"),
        (lambda d: d["cases"][1].pop("patient"), r"at \$.cases\[1\]"),
        (lambda d: d["folds"][0].pop("test"), r"at \$.folds\[0\]"),
        (lambda d: d.update(format=2), "no datalist of format 1"),
        (lambda d: d.update(class_names=["a"]), r"at \$.class_names"),
        (lambda d: d.pop("folds"), "'folds'"),
    ],
)
def test_inconsistent_datalists_are_refused(tmp_path: Path, change: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        load_datalist(saved(tmp_path, change), "training")


def test_patient_in_two_sections_is_refused(tmp_path: Path) -> None:
    def change(datalist: dict[str, Any]) -> None:
        twins = [case["case"] for case in datalist["cases"] if case["patient"] == "p1"]
        for section in SECTIONS:
            fold = datalist["folds"][3]
            fold[section] = [name for name in fold[section] if name not in twins]
        datalist["folds"][3]["training"].append(twins[0])
        datalist["folds"][3]["test"].append(twins[1])

    with pytest.raises(InputError, match=r"one patient of fold 3 is in training \(case p01_0\) and in test"):
        load_datalist(saved(tmp_path, change), "training")


def test_an_edit_is_noticed_and_can_be_accepted(tmp_path: Path) -> None:
    path = saved(tmp_path)
    path.write_text(path.read_text().replace("\n", "\n\n"))  # white space is no edit
    assert load_datalist(path, "training")
    datalist = json.loads(path.read_text())
    datalist["folds"][0]["test"].pop()
    path.write_text(json.dumps(datalist))
    with pytest.raises(InputError, match="was edited after it was made: make it again, or remove its 'hash'"):
        load_datalist(path, "training")
    del datalist["hash"]
    path.write_text(json.dumps(datalist))
    assert load_datalist(path, "training")


def test_missing_and_corrupt_files_sections_and_folds(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no datalist"):
        load_datalist(tmp_path / "none.json", "training")
    with pytest.raises(InputError, match="there is no datalist"):
        load_datalist(tmp_path, "training")
    path = saved(tmp_path)
    with pytest.raises(InputError, match="no section 'train'"):
        load_datalist(path, "train")
    for fold in (5, -1, "0", True, None):
        with pytest.raises(InputError, match="has folds 0 to 4"):
            load_datalist(path, "training", fold)  # type: ignore[arg-type]
    path.write_text(path.read_text()[:200])
    with pytest.raises(InputError, match="no readable JSON"):
        load_datalist(path, "training")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="no readable JSON"):
        class_names(path)
    path.write_text("[]")
    with pytest.raises(InputError, match="no datalist of format 1"):
        class_names(path)


def test_missing_images_are_counted_and_the_first_named(tmp_path: Path) -> None:
    path = saved(tmp_path)
    gone = [record["image"] for record in load_datalist(path, "training", 0)][:5]
    for image in gone:
        Path(image).unlink()
    assert load_datalist(path, "training", 0)
    with pytest.raises(InputError, match=r"^5 images of .*: images/\S+, images/\S+, images/\S+ and 2 more; check"):
        load_datalist(path, "training", 0, tmp_path)
    assert load_datalist(path, "test", 0, tmp_path)


def test_real_tables(data_dir: Path, tmp_path: Path) -> None:
    table = data_dir / "ct_ich" / "volumes.csv"
    columns = SliceColumns(label="hemorrhage", case="patient")
    datalist = make_datalist(table, slices=data_dir / "ct_ich" / "slices.csv", slice_columns=columns)
    for case in datalist["cases"]:
        assert len(case["slice_label"]) == int(case["extra"]["n_slices"])
        assert any(value == 1 for value in case["slice_label"]) == bool(case["label"])
    (sentence,) = problems_of(data_dir / "tcga_lgg" / "volumes.csv")
    assert sentence.startswith("row 111, column label: it is empty")
    assert len(make_datalist(data_dir / "tcga_lgg" / "volumes.csv", skip_unlabelled=True)["cases"]) == 109
