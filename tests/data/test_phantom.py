from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from highdicom.spatial import get_volume_positions
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bundle.data import phantom, phantom_files
from bundle.data.phantom import UNSEEN, PhantomCase, case_label, make_case
from bundle.data.phantom_anatomy import patch
from bundle.data.phantom_files import make_cohort, write_dicom, write_nifti
from bundle.errors import InputError

MODALITIES = ("mr", "ct")
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


@pytest.fixture(scope="module", params=MODALITIES)
def case(request) -> PhantomCase:
    return make_case(3, 1, request.param)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("phantom") / "cohort"
    assert make_cohort(out, cases=4, seed=5, unseen=2, progress=False)
    return out


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def digest(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def sorted_series(folder: Path) -> list[pydicom.Dataset]:
    images = [pydicom.dcmread(path) for path in folder.iterdir()]
    directions = np.array(images[0].ImageOrientationPatient, dtype=float)
    normal = np.cross(directions[:3], directions[3:])
    return sorted(images, key=lambda image: float(normal @ np.array(image.ImagePositionPatient, dtype=float)))


def series_volume(images: list[pydicom.Dataset]) -> tuple[np.ndarray, np.ndarray]:
    """Array (X, Y, Z) and RAS affine, from the definitions in DICOM PS3.3 C.7.6.2."""
    array = np.stack([image.pixel_array.T for image in images], axis=-1).astype(np.int64)
    array = array * int(images[0].get("RescaleSlope", 1)) + int(images[0].get("RescaleIntercept", 0))
    directions = np.array(images[0].ImageOrientationPatient, dtype=float).reshape(2, 3)
    between_rows, between_columns = (float(step) for step in images[0].PixelSpacing)
    first, last = (np.array(image.ImagePositionPatient, dtype=float) for image in (images[0], images[-1]))
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = directions[0] * between_columns, directions[1] * between_rows
    affine[:3, 2], affine[:3, 3] = (last - first) / (len(images) - 1), first
    affine[:3] = LPS_TO_RAS @ affine[:3]
    return array, affine


def test_a_case_depends_on_its_arguments_alone():
    alone = make_case(3, 2)
    make_case(3, 1)
    np.random.default_rng(0)
    again = make_case(3, 2)
    np.testing.assert_array_equal(alone.array, again.array)
    np.testing.assert_array_equal(alone.affine, again.affine)
    for other in (make_case(4, 2), make_case(3, 4), make_case(3, 2, stream=UNSEEN), make_case(3, 2, "ct")):
        assert other.array.shape != alone.array.shape or (other.array != alone.array).mean() > 0.5


def test_contrast_weakens_the_stripes_and_moves_nothing_else():
    usual, weak = make_case(3, 2), make_case(3, 2, contrast=0.25)
    np.testing.assert_array_equal(usual.affine, weak.affine)
    np.testing.assert_array_equal(usual.slice_label, weak.slice_label)
    assert usual.blobs == weak.blobs
    blob = usual.blobs[0]
    k = (blob.first + blob.last) // 2
    window = tuple(slice(round(middle) - 4, round(middle) + 5) for middle in blob.centre)
    spread = [float(case.array[(*window, k)].std()) for case in (usual, weak)]
    assert spread[1] < 0.5 * spread[0]  # noise and bias field stay
    elsewhere = np.setdiff1d(
        np.arange(usual.array.shape[2]), [k for b in usual.blobs for k in range(b.first, b.last + 1)]
    )
    np.testing.assert_allclose(usual.array[:, :, elsewhere], weak.array[:, :, elsewhere], atol=2)
    for contrast in (0.0, 1.5, float("nan")):
        with pytest.raises(InputError, match="contrast must be above 0"):
            make_case(3, 2, contrast=contrast)


def test_labels_are_balanced_in_total_and_in_each_format():
    for seed in range(20):
        labels = [case_label(seed, number) for number in range(1, 41)]
        assert all(sum(labels[:count]) * 2 == count for count in range(2, 41, 2))
        assert sum(labels[::2]) == sum(labels[1::2]) == 10
    first = [case_label(seed, 1) for seed in range(100)]
    assert 25 < sum(first) < 75


def test_sizes_spacing_and_directions_vary_within_their_ranges():
    grids = [phantom._draw_grid(phantom.case_rng(1, 0, number)) for number in range(1, 401)]
    counts = np.array([grid.shape[2] for grid in grids])
    assert counts.min() >= 24
    assert counts.max() <= 96
    assert np.median(counts) < 45
    assert counts.max() > 70
    spacing = np.array([grid.spacing for grid in grids])
    assert spacing[:, 2].min() > 2.0 - 1e-6
    assert spacing[:, 2].max() < 6.0 + 1e-6
    assert 0.1 < (np.abs(spacing[:, 0] - spacing[:, 1]) > 1e-3).mean() < 0.3
    codes = {nib.aff2axcodes(grid.affine) for grid in grids}
    assert len(codes) == 8
    tilts = np.degrees([np.arccos(abs(grid.affine[2, 2]) / grid.spacing[2]) for grid in grids])
    assert 5 < tilts.max() < 10.1
    assert (tilts < 1e-6).sum() > 100
    # Right-handed throughout, as slices sorted along row × column are.
    assert all(np.linalg.det(grid.affine[:3, :3]) > 0 for grid in grids)


def test_blobs_lie_in_the_brain_and_in_few_slices():
    for number in range(1, 200):
        rng = phantom.case_rng(2, 0, number)
        grid = phantom._draw_grid(rng)
        blobs = phantom._draw_blobs(rng, grid)
        assert 1 <= len(blobs) <= 2
        for blob in blobs:
            assert 0 < blob.first <= blob.last < grid.shape[2]
            assert 3 <= blob.last - blob.first + 1 <= max(7, grid.shape[2] // 7)
            middle = np.array([[*blob.centre, (blob.first + blob.last) / 2]])
            assert grid.depth(middle).item() < 0.7


def stripe_strength(case: PhantomCase, centre: tuple[float, float], k: int) -> tuple[float, float]:
    """Intensity change per mm from left to right and from back to front around a place."""
    window = tuple(slice(round(middle) - 6, round(middle) + 7) for middle in centre)
    steps = np.gradient(case.array[:, :, k][window].astype(float), *np.linalg.norm(case.affine[:3, :2], axis=0))
    directions = case.affine[:2, :2] / np.linalg.norm(case.affine[:3, :2], axis=0)
    right, front = (abs(row[0] * steps[0] + row[1] * steps[1]).mean() for row in directions)
    return float(right), float(front)


@pytest.mark.parametrize("modality", MODALITIES)
def test_slice_truth_is_where_the_stripes_run_from_left_to_right(modality):
    for number in range(1, 13):
        case = make_case(7, number, modality)
        assert case.label == case.slice_label.max() == sum(blob.lesion for blob in case.blobs)
        seen = np.zeros_like(case.slice_label)
        for blob in case.blobs:
            for k in range(blob.first, blob.last + 1):
                right, front = stripe_strength(case, blob.centre, k)
                seen[k] |= front > 1.5 * right
                assert (front > 1.5 * right) == blob.lesion
                assert (right > 1.5 * front) != blob.lesion
        np.testing.assert_array_equal(seen, case.slice_label)


def test_the_label_turns_the_stripes_of_one_blob_and_nothing_else(monkeypatch):
    twins = []
    for label in (0, 1):
        monkeypatch.setattr(phantom, "case_label", lambda *_, label=label: label)
        twins.append(make_case(11, 3))
    without, with_lesion = twins
    lesion = next(blob for blob in with_lesion.blobs if blob.lesion)
    grid = phantom._draw_grid(phantom.case_rng(11, 0, 3))
    window, _, _ = patch(lesion.centre, 1.2 * lesion.radius, grid)
    changed = without.array != with_lesion.array
    assert changed[:, :, lesion.first : lesion.last + 1][window].mean() > 0.3
    changed[:, :, lesion.first : lesion.last + 1][window] = False
    assert not changed.any()
    for k in np.flatnonzero(with_lesion.slice_label):
        one, other = (np.sort(twin.array[:, :, k], axis=None).astype(float) for twin in twins)
        # The sets are equal before noise and bias field.
        assert np.abs(one - other).mean() < 0.02 * one.std()


@pytest.mark.parametrize("permute", [None, (1, 2, 3), (-3, 2, -1), (2, 3, 1), (-2, -1, -3)])
def test_both_formats_carry_the_same_voxels_at_the_same_places(case, tmp_path, permute):
    truth = write_nifti(case, tmp_path / "case.nii.gz", permute)
    series_truth = write_dicom(case, tmp_path / "series")
    image = nib.load(tmp_path / "case.nii.gz")
    assert image.get_data_dtype() == np.int16
    array, affine = series_volume(sorted_series(tmp_path / "series"))
    np.testing.assert_array_equal(array, case.array)
    np.testing.assert_allclose(affine, case.affine, atol=1e-6)

    stored = np.asarray(image.dataobj)
    change = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(image.affine), nib.orientations.io_orientation(affine)
    )
    np.testing.assert_array_equal(nib.orientations.apply_orientation(stored, change), array)
    back = image.affine @ nib.orientations.inv_ornt_aff(change, stored.shape)
    np.testing.assert_allclose(back, affine, atol=1e-3)

    axis = int(np.flatnonzero(change[:, 0] == 2)[0])
    assert len(truth) == stored.shape[axis]
    np.testing.assert_array_equal(truth[:: int(change[axis, 1])], series_truth)


def test_a_wrong_order_of_axes_is_refused(case, tmp_path):
    with pytest.raises(InputError, match="must hold 1, 2 and 3"):
        write_nifti(case, tmp_path / "case.nii.gz", (1, 1, 3))
    assert not list(tmp_path.iterdir())


# Types 1 and 2 of the mandatory modules, by hand from DICOM PS3.3 A.3.3 and A.4.3.
FILLED = [
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "Modality",
    "ImageType",
    "PixelSpacing",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelData",
    "PatientPosition",
]
PRESENT = [
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "StudyID",
    "AccessionNumber",
    "SeriesNumber",
    "PositionReferenceIndicator",
    "Manufacturer",
    "InstanceNumber",
    "SliceThickness",
]
FILLED_OF = {"mr": ["ScanningSequence", "SequenceVariant"], "ct": ["RescaleIntercept", "RescaleSlope", "RescaleType"]}
PRESENT_OF = {
    "mr": ["ScanOptions", "MRAcquisitionType", "RepetitionTime", "EchoTime", "EchoTrainLength"],
    "ct": ["KVP", "AcquisitionNumber"],
}


def test_series_are_valid_dicom(case, tmp_path):
    write_dicom(case, tmp_path / "series")
    images = sorted_series(tmp_path / "series")
    assert len(images) == case.array.shape[2]
    for image in images:
        for keyword in FILLED + FILLED_OF[case.modality]:
            assert image[keyword].value not in (None, ""), keyword
        for keyword in PRESENT + PRESENT_OF[case.modality]:
            assert keyword in image, keyword
        for element in image:
            pydicom.dataelem.DataElement(element.tag, element.VR, element.value, validation_mode=pydicom.config.RAISE)
        assert image.file_meta.TransferSyntaxUID == pydicom.uid.ExplicitVRLittleEndian
        assert image.file_meta.MediaStorageSOPInstanceUID == image.SOPInstanceUID
        assert image.PixelRepresentation == 1
    expected = pydicom.uid.MRImageStorage if case.modality == "mr" else pydicom.uid.CTImageStorage
    assert {image.SOPClassUID for image in images} == {expected}
    uids = {image.SOPInstanceUID for image in images}
    assert len(uids) == len(images)
    assert all(uid.is_valid and uid.startswith("2.25.") for uid in uids | {images[0].StudyInstanceUID})
    for keyword in ("SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID", "PatientID"):
        assert len({image[keyword].value for image in images}) == 1
    spacing, positions = get_volume_positions(
        [image.ImagePositionPatient for image in images], images[0].ImageOrientationPatient, rtol=1e-6
    )
    assert spacing == pytest.approx(np.linalg.norm(case.affine[:3, 2]))
    # highdicom counts against row × column.
    assert positions == list(reversed(range(len(images))))


def test_file_names_do_not_give_the_order_away(cohort):
    folders = [*sorted((cohort / "images").glob("case_*[13579]")), *sorted((cohort / "unseen").iterdir())]
    assert len(folders) == 4
    directions = set()
    for folder in folders:
        images = sorted_series(folder)
        assert [Path(image.filename).name for image in images] != sorted(path.name for path in folder.iterdir())
        directions.add(int(np.sign(np.diff([image.InstanceNumber for image in images]).mean())))
    assert directions == {-1, 1}


def test_a_cohort_is_laid_out_as_its_tables_say(cohort):
    volumes, slices = rows(cohort / "volumes.csv"), rows(cohort / "slices.csv")
    assert [row["format"] for row in volumes] == ["dicom", "nifti"] * 2
    assert sorted(row["label"] for row in volumes) == ["0", "0", "1", "1"]
    assert len({row["patient"] for row in volumes}) == 4
    for number, row in enumerate(volumes, start=1):
        truth = [int(entry["lesion"]) for entry in slices if entry["case"] == row["case"]]
        assert [int(entry["k"]) for entry in slices if entry["case"] == row["case"]] == list(range(len(truth)))
        assert len(truth) == int(row["n_slices"])
        case = make_case(5, number)
        path = cohort / row["image"]
        if row["format"] == "dicom":
            array, affine = series_volume(sorted_series(path))
        else:
            image = nib.load(path)
            array, affine = np.asarray(image.dataobj), image.affine
        axis = int(np.argmax(np.abs(affine[2, :3]) / np.linalg.norm(affine[:3, :3], axis=0)))
        assert array.shape[axis] == len(truth)
        # Whether k counts upwards as in the acquisition, the geometry says.
        step = 1 if affine[2, axis] * case.affine[2, 2] > 0 else -1
        assert truth[::step] == case.slice_label.tolist()
    for number, row in enumerate(rows(cohort / "unseen_truth.csv"), start=1):
        case = make_case(5, number, stream=UNSEEN)
        array, _ = series_volume(sorted_series(cohort / "unseen" / row["study"]))
        np.testing.assert_array_equal(array, case.array)
        assert int(row["label"]) == case.label
        assert [int(k) for k in row["lesion_slices"].split()] == np.flatnonzero(case.slice_label).tolist()


def test_the_same_arguments_give_the_same_bytes(cohort, tmp_path):
    make_cohort(tmp_path / "again", cases=4, seed=5, unseen=2, progress=False)
    assert digest(tmp_path / "again") == digest(cohort)


def test_a_finished_cohort_is_left_alone(cohort, monkeypatch):
    monkeypatch.setattr(phantom_files, "make_case", None)
    assert not make_cohort(cohort, cases=4, seed=5, unseen=2, progress=False)
    for other in ({"cases": 6}, {"seed": 6}, {"unseen": 3}, {"modality": "ct"}, {"contrast": 0.5}):
        with pytest.raises(InputError, match="other arguments"):
            make_cohort(cohort, **{"cases": 4, "seed": 5, "unseen": 2, **other}, progress=False)
    monkeypatch.setattr(phantom_files, "GENERATOR_VERSION", 99)
    with pytest.raises(InputError, match="another version"):
        make_cohort(cohort, cases=4, seed=5, unseen=2, progress=False)


def test_what_is_no_cohort_is_not_touched(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "phantom.json").write_text("{")
    for name, sentence in {"full": "no finished", "file": "no finished", "broken": "cannot be read"}.items():
        before = digest(tmp_path)
        with pytest.raises(InputError, match=sentence):
            make_cohort(tmp_path / name, cases=2, unseen=0, progress=False)
        assert digest(tmp_path) == before


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(case, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(phantom_files, "write_nifti", fail)
    with pytest.raises(InputError, match="No space left"):
        make_cohort(tmp_path / "cohort", cases=2, unseen=0, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [{"cases": 3}, {"cases": 0}, {"unseen": -1}, {"seed": -1}, {"modality": "pet"}, {"contrast": 0.0}],
    ids=str,
)
def test_wrong_arguments_are_refused(tmp_path, arguments):
    with pytest.raises(InputError):
        make_cohort(tmp_path / "cohort", **arguments, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("seed", "number", "modality"), [(-1, 1, "mr"), (0, 0, "mr"), (0, 1, "pet")])
def test_a_case_out_of_range_is_refused(seed, number, modality):
    with pytest.raises(InputError, match="phantom"):
        make_case(seed, number, modality)


def test_the_command_line_makes_a_cohort_and_says_what_it_did(tmp_path):
    command = [sys.executable, "-m", "bundle.data.phantom_files", str(tmp_path / "out"), "--cases", "2", "--unseen=0"]
    root = str(Path(phantom.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    first, second, other = (
        subprocess.run([*command, *more], capture_output=True, text=True, env=environment, check=False)
        for more in ([], [], ["--seed", "1"])
    )
    assert (first.returncode, second.returncode, other.returncode) == (0, 0, 2)
    assert first.stdout.startswith("made:")
    assert second.stdout.startswith("done before:")
    assert other.stderr.startswith("error: out holds a phantom cohort made with other arguments")
    assert other.stderr.count("\n") == 1
    assert json.loads((tmp_path / "out" / "phantom.json").read_text())["arguments"]["cases"] == 2


def halved(slices: np.ndarray) -> np.ndarray:
    """Mean of every two by two pixels: what resizing does to a histogram."""
    height, width = slices.shape[1] // 2 * 2, slices.shape[2] // 2 * 2
    return slices[:, :height, :width].reshape(len(slices), height // 2, 2, width // 2, 2).mean((2, 4))


def statistics(slices: np.ndarray) -> np.ndarray:
    """Mean, sd, skewness, percentiles and histogram of each slice (N, H, W), pooled by mean, maximum and spread."""
    pixels = slices.reshape(len(slices), -1)
    mean, sd = pixels.mean(1, keepdims=True), pixels.std(1, keepdims=True) + 1e-6
    histogram = [((pixels >= low) & (pixels < low + 0.1)).mean(1) for low in np.arange(0, 1, 0.1)]
    percentiles = np.percentile(pixels, [1, 5, 25, 50, 75, 90, 95, 99], axis=1)
    columns = [mean[:, 0], sd[:, 0], (((pixels - mean) / sd) ** 3).mean(1), *percentiles, *histogram]
    features = np.stack(columns, axis=1)
    return np.concatenate([features.mean(0), features.max(0), features.min(0), features.std(0)])


def cross_validated_auc(features: np.ndarray, labels: np.ndarray, strength: float) -> float:
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=3000))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    scores = cross_val_predict(model, features, labels, cv=folds, method="predict_proba")[:, 1]
    return float(roc_auc_score(labels, scores))


def cohort_statistics(seeds: range, modality: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of pixels as they are, features of pixels averaged by resizing, and labels; 120 cases a seed."""
    whole, resized, labels = [], [], []
    for seed in seeds:
        for number in range(1, 121):
            case = make_case(seed, number, modality)
            slices = np.moveaxis(case.array, -1, 0).astype(np.float32)
            # To [0, 1], as preparation does: percentiles for MR, a brain window for CT.
            top = 80.0 if modality == "ct" else np.percentile(slices[:, ::4, ::4], 99.5)
            slices = np.clip(slices / np.float32(top), 0, 1)
            labels.append(case.label)
            whole.append(statistics(slices[:, ::2, ::2]))
            resized.append(statistics(halved(slices)))
    return np.array(whole), np.array(resized), np.array(labels)


def test_intensity_statistics_do_not_tell_the_label():
    # With 120 cases shuffled labels alone scatter this AUC by 0.075 (standard deviation), so one cohort says little.
    whole, resized, labels = cohort_statistics(range(2), "mr")
    for features in (whole, resized):
        for strength in (0.001, 0.03, 1.0):
            assert cross_validated_auc(features, labels, strength) <= 0.65
    # The same statistics do see a cue that is there: a tenth more contrast in the positive cases.
    assert cross_validated_auc(whole * np.where(labels, 1.1, 1.0)[:, None], labels, 1.0) > 0.75


@pytest.mark.slow
@pytest.mark.parametrize("modality", MODALITIES)
def test_intensity_statistics_of_many_cases_do_not_tell_the_label(modality):
    whole, resized, labels = cohort_statistics(range(8), modality)
    for features in (whole, resized):
        for strength in (0.001, 0.03, 1.0):
            assert cross_validated_auc(features, labels, strength) <= 0.6
