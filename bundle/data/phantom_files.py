"""The embedded cohort on disk: DICOM series, NIfTI files and the tables with their truth."""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import tempfile
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, MRImageStorage
from pydicom.valuerep import format_number_as_ds
from tqdm import tqdm

from ..errors import InputError, command_line
from ..files import replacing, write_json
from .phantom import CLASS_NAMES, COHORT, UNSEEN, PhantomCase, case_rng, make_case
from .phantom_anatomy import TISSUES

__all__ = ["make_cohort", "write_dicom", "write_nifti"]

GENERATOR_VERSION = 1  # raised whenever the same arguments give other bytes
SUMMARY = "phantom.json"
HU_OFFSET = 1024
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])
IMPLEMENTATION_UID = UID("2.25.270695996825855179949881587723571202391")


def write_nifti(case: PhantomCase, path: Path, permute: Sequence[int] | None = None) -> npt.NDArray[np.int64]:
    """Write a case as .nii.gz.

    Args:
        case: what to write.
        path: of the file.
        permute: order and direction of the stored axes, as `PhantomCase.permute`, which is the default.

    Returns:
        `slice_label` along the stored axis that is nearest to the inferior–superior axis, in stored order.

    Raises:
        InputError: `permute` is no signed order of 1, 2 and 3, or the file cannot be written.
    """
    order = tuple(case.permute if permute is None else permute)
    if sorted(abs(axis) for axis in order) != [1, 2, 3]:
        raise InputError(f"permute must hold 1, 2 and 3, each with a sign, not {order}")
    to_acquired = np.zeros((4, 4))
    to_acquired[3, 3] = 1
    for stored, axis in enumerate(order):
        acquired = abs(axis) - 1
        to_acquired[acquired, stored] = np.sign(axis)
        to_acquired[acquired, 3] = case.array.shape[acquired] - 1 if axis < 0 else 0
    flipped = tuple(stored for stored, axis in enumerate(order) if axis < 0)
    array = np.flip(case.array.transpose([abs(axis) - 1 for axis in order]), flipped)
    image = nib.Nifti1Image(array, case.affine @ to_acquired, dtype=np.int16)
    image.header.set_xyzt_units("mm")
    with replacing(path) as temporary:
        # nibabel would name the temporary file in the gzip header; without name and time the bytes depend on the case.
        temporary.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
    return case.slice_label[::-1].copy() if -3 in order else case.slice_label


def write_dicom(case: PhantomCase, folder: Path) -> npt.NDArray[np.int64]:
    """Write a case as one DICOM series of single-frame MR or CT images, with file names in no order.

    Args:
        case: what to write.
        folder: of the series; made, and empty before.

    Returns:
        `slice_label` in order of position along row × column.

    Raises:
        InputError: the folder holds something already or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(f"the folder {folder.name} of a phantom series is not empty: choose another")
    except OSError as error:
        raise InputError(f"cannot make the folder {folder.name}: {error.strerror}") from error
    rng = case_rng(case.seed, case.stream, case.number, purpose=2)
    num_slices = case.array.shape[2]
    names = rng.permutation(num_slices)
    backwards = bool(rng.integers(2))
    series = _series(case)
    position, step = RAS_TO_LPS @ case.affine[:3, 3], RAS_TO_LPS @ case.affine[:3, 2]
    normal = step / np.linalg.norm(step)
    offset = HU_OFFSET if case.modality == "ct" else 0
    for k in range(num_slices):
        here = position + k * step
        series.SOPInstanceUID = _uid(case, "image", k)
        series.file_meta.MediaStorageSOPInstanceUID = series.SOPInstanceUID
        series.InstanceNumber = num_slices - k if backwards else k + 1
        series.ImagePositionPatient = _decimals(here)
        series.SliceLocation = _decimals([normal @ here])[0]
        series.PixelData = (case.array[:, :, k].T + np.int16(offset)).astype("<i2").tobytes()
        series.save_as(folder / f"IM{names[k] + 1:04d}", enforce_file_format=True)
    return case.slice_label


def make_cohort(
    out: str | os.PathLike[str],
    cases: int = 160,
    seed: int = 0,
    unseen: int = 8,
    modality: str = "mr",
    contrast: float = 1.0,
    progress: bool = True,
) -> bool:
    """Make the cohort, whole or not at all.

    It holds `images/` (odd cases as DICOM series, even ones as NIfTI files), `volumes.csv`, `slices.csv`, `unseen/`
    (DICOM studies) with `unseen_truth.csv` beside it, and `phantom.json` with the arguments.

    Args:
        out: folder to make; it may exist if it is empty.
        cases: an even number, half of them positive.
        seed: 0 or more.
        unseen: number of unseen studies, or 0.
        modality: "mr" or "ct".
        contrast: of the stripes that tell lesion from distractor, as a share of the usual one; lower is harder.
        progress: show a bar.

    Returns:
        False if the same cohort is there already.

    Raises:
        InputError: an argument is out of range, or `out` holds something else.
    """
    out = Path(out)
    if cases < 2 or cases % 2:
        raise InputError(f"--cases must be an even number of at least 2, so that half are positive, not {cases}")
    if unseen < 0 or seed < 0:
        raise InputError(f"--unseen and --seed must be 0 or more, not {unseen} and {seed}")
    if modality not in TISSUES:
        raise InputError(f"--modality must be one of {', '.join(TISSUES)}, not {modality!r}")
    if not 0 < contrast <= 1:
        raise InputError(f"--contrast must be above 0 and at most 1, not {contrast}")
    arguments = {"cases": cases, "seed": seed, "unseen": unseen, "modality": modality}
    if contrast != 1:
        arguments["contrast"] = contrast
    if _is_there(out, arguments):
        return False
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
            made = Path(temporary) / "cohort"
            with tqdm(total=cases + unseen, desc="making cases", unit="case", disable=not progress) as bar:
                _write_cases(made, cases, seed, modality, contrast, bar)
                _write_unseen(made, unseen, seed, modality, contrast, bar)
            write_json(
                made / SUMMARY,
                {"generator_version": GENERATOR_VERSION, "arguments": arguments, "class_names": CLASS_NAMES},
            )
            os.replace(made, out)
    except OSError as error:
        raise InputError(f"cannot make the phantom cohort {out.name}: {error.strerror}") from error
    return True


def _is_there(out: Path, arguments: dict[str, Any]) -> bool:
    """Whether `out` holds this cohort; refuses whatever else it may hold."""
    try:
        found = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
        same = found["arguments"] == arguments and found["generator_version"] == GENERATOR_VERSION
    except (FileNotFoundError, NotADirectoryError):
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise InputError(
                f"{out.name} is there already and is no finished phantom cohort: choose another folder, or remove it"
            ) from None
        return False
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{SUMMARY} in {out.name} cannot be read: choose another folder, or remove this one"
        ) from error
    if not same:
        raise InputError(
            f"{out.name} holds a phantom cohort made with other arguments or by another version: choose another "
            "folder, or remove this one"
        )
    return True


def _write_cases(out: Path, count: int, seed: int, modality: str, contrast: float, bar: tqdm) -> None:
    volumes: list[tuple[object, ...]] = []
    slices: list[tuple[object, ...]] = []
    for number in range(1, count + 1):
        case = make_case(seed, number, modality, contrast=contrast)
        name = f"case_{number:04d}"
        if number % 2:
            image, form = f"images/{name}", "dicom"
            truth = write_dicom(case, out / image)
        else:
            image, form = f"images/{name}.nii.gz", "nifti"
            truth = write_nifti(case, out / image)
        volumes.append((name, f"patient_{number:04d}", image, case.label, len(truth), form))
        slices.extend((name, k, int(lesion)) for k, lesion in enumerate(truth))
        bar.update()
    _write_table(out / "volumes.csv", ("case", "patient", "image", "label", "n_slices", "format"), volumes)
    _write_table(out / "slices.csv", ("case", "k", "lesion"), slices)


def _write_unseen(out: Path, count: int, seed: int, modality: str, contrast: float, bar: tqdm) -> None:
    (out / "unseen").mkdir()
    rows = []
    for number in range(1, count + 1):
        case = make_case(seed, number, modality, UNSEEN, contrast)
        name = f"study_{number:03d}"
        truth = write_dicom(case, out / "unseen" / name)
        rows.append((name, case.label, len(truth), " ".join(str(k) for k in np.flatnonzero(truth))))
        bar.update()
    _write_table(out / "unseen_truth.csv", ("study", "label", "n_slices", "lesion_slices"), rows)


def _write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def _uid(case: PhantomCase, what: str, k: int = 0) -> UID:
    """A UID under the root for UUIDs, the same for the same case."""
    name = f"phantom {case.modality} {case.seed} {case.stream} {case.number} {what} {k}"
    return UID(f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, name).int}")


def _decimals(numbers: Iterable[float]) -> list[str]:
    """Decimal strings of at most 16 characters; adding 0.0 turns -0 into 0."""
    return [format_number_as_ds(round(float(number), 12) + 0.0) for number in numbers]


def _series(case: PhantomCase) -> Dataset:
    """What all images of a series share: every attribute of types 1 and 2 of the MR or CT image's modules."""
    ct = case.modality == "ct"
    columns, rows, _ = case.array.shape
    spacing = np.linalg.norm(case.affine[:3, :3], axis=0)
    directions = RAS_TO_LPS @ (case.affine[:3, :3] / spacing)
    person = "PHANTOM" if case.stream == COHORT else "UNSEEN"
    shared: dict[str, Any] = {
        "SOPClassUID": CTImageStorage if ct else MRImageStorage,
        "PatientName": f"{person}^{case.number:04d}",
        "PatientID": f"{person}{case.number:04d}",
        "PatientBirthDate": "",
        "PatientSex": "",
        "StudyInstanceUID": _uid(case, "study"),
        "StudyDate": "20240101",
        "StudyTime": "120000",
        "ReferringPhysicianName": "",
        "StudyID": "1",
        "AccessionNumber": "",
        "Modality": case.modality.upper(),
        "SeriesInstanceUID": _uid(case, "series"),
        "SeriesNumber": 1,
        "SeriesDescription": "head phantom",
        "PatientPosition": "HFS",
        "BodyPartExamined": "HEAD",
        "FrameOfReferenceUID": _uid(case, "frame of reference"),
        "PositionReferenceIndicator": "",
        "Manufacturer": "phantom generator",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"] if ct else ["ORIGINAL", "PRIMARY", "M"],
        "AcquisitionNumber": 1,
        "PixelSpacing": _decimals([spacing[1], spacing[0]]),
        "ImageOrientationPatient": _decimals([*directions[:, 0], *directions[:, 1]]),
        "SliceThickness": _decimals([spacing[2]])[0],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": rows,
        "Columns": columns,
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 1,
    }
    if ct:
        shared |= {"RescaleIntercept": -HU_OFFSET, "RescaleSlope": 1, "RescaleType": "HU", "KVP": "120"}
    else:
        shared |= {
            "ScanningSequence": "SE",
            "SequenceVariant": "NONE",
            "ScanOptions": "",
            "MRAcquisitionType": "2D",
            "RepetitionTime": "2000",
            "EchoTime": "10",
            "EchoTrainLength": 1,
            "SpacingBetweenSlices": _decimals([spacing[2]])[0],
        }
    series = Dataset()
    for keyword, value in shared.items():
        setattr(series, keyword, value)
    series.file_meta = FileMetaDataset()
    series.file_meta.MediaStorageSOPClassUID = series.SOPClassUID
    series.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    series.file_meta.ImplementationClassUID = IMPLEMENTATION_UID
    series.file_meta.ImplementationVersionName = "PHANTOM_1"
    return series


def main() -> int:
    """Make the embedded phantom cohort."""
    parser = argparse.ArgumentParser(prog="make_phantom", description=main.__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--cases", type=int, default=160, help="an even number (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="0 or more (default: %(default)s)")
    parser.add_argument("--unseen", type=int, default=8, help="further DICOM studies (default: %(default)s)")
    parser.add_argument("--modality", choices=sorted(TISSUES), default="mr", help="(default: %(default)s)")
    parser.add_argument(
        "--contrast",
        type=float,
        default=1.0,
        help="of what tells lesion from distractor, as a share of the usual; lower is harder (default: %(default)s)",
    )
    given = parser.parse_args()
    made = make_cohort(given.out, given.cases, given.seed, given.unseen, given.modality, given.contrast)
    print(f"made: {given.out}" if made else f"done before: {given.out}")
    return 0


if __name__ == "__main__":
    command_line(main)
