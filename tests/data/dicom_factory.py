"""Synthetic DICOM series whose intensity is an affine function of patient position.

Whatever voxel a reader returns, its affine says where it lies, and so what its value must be: one comparison checks
order, orientation, spacing, offset and rescaling at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from bundle.data.volume import Volume

CLASS_UID = {"CT": "1.2.840.10008.5.1.4.1.1.2", "MR": "1.2.840.10008.5.1.4.1.1.4"}
CANARY = "CANARY^PATIENT"
ROOT = "1.2.826.0.1.3680043.10.999"
# Value at the origin, and per mm along L, P and S: three different slopes, so that no two axes can be exchanged.
OFFSET, GRADIENT = 7.0, np.array([0.6, 1.1, 1.7])

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
FLIPPED = (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
OBLIQUE = (0.9698463, 0.1710101, 0.1736482, -0.2030456, 0.9611996, 0.1875)

Edit = Callable[[Dataset, int], None]


def oblique() -> tuple[float, ...]:
    row = np.array(OBLIQUE[:3]) / np.linalg.norm(OBLIQUE[:3])
    column = np.array(OBLIQUE[3:])
    column -= row * (row @ column)
    return (*row, *(column / np.linalg.norm(column)))


def normal_of(orientation: Sequence[float]) -> np.ndarray:
    return np.cross(orientation[:3], orientation[3:])


def true_value(position_lps: np.ndarray) -> np.ndarray:
    return OFFSET + position_lps @ GRADIENT


def make_slices(
    modality: str = "CT",
    matrix: tuple[int, int] = (10, 12),
    count: int = 8,
    orientation: Sequence[float] = AXIAL,
    pixel_spacing: tuple[float, float] = (0.9, 0.7),
    gap: float = 2.5,
    slope: float = 0.01,
    intercept: float = -300.0,
    origin: Sequence[float] = (-20.0, 15.0, -30.0),
    series: int = 1,
    positions: np.ndarray | None = None,
) -> list[Dataset]:
    """Slices in order of position. `matrix` is rows, columns; `pixel_spacing` as in DICOM: between rows, columns."""
    rows, columns = matrix
    row_direction, column_direction = np.array(orientation[:3]), np.array(orientation[3:])
    slices = []
    for k in range(count):
        place = np.array(origin) + normal_of(orientation) * gap * k if positions is None else positions[k]
        r, c = np.mgrid[:rows, :columns]
        where = (
            place + c[..., None] * pixel_spacing[1] * row_direction + r[..., None] * pixel_spacing[0] * column_direction
        )
        ds = Dataset()
        ds.SOPClassUID = CLASS_UID[modality]
        ds.SOPInstanceUID = f"{ROOT}.{series}.{k + 1}"
        ds.SeriesInstanceUID = f"{ROOT}.{series}"
        ds.StudyInstanceUID = f"{ROOT}.0"
        ds.FrameOfReferenceUID = f"{ROOT}.0.1"
        describe(ds, modality, series, k)
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.InstanceNumber = k + 1
        ds.SamplesPerPixel = 1
        ds.PhotometricInterpretation = "MONOCHROME2"
        ds.Rows, ds.Columns = rows, columns
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
        ds.PixelSpacing = [float(f"{v:.10g}") for v in pixel_spacing]
        ds.SliceThickness = gap
        ds.ImagePositionPatient = [float(f"{v:.10g}") for v in place]
        ds.ImageOrientationPatient = [float(f"{v:.10g}") for v in orientation]
        ds.RescaleSlope, ds.RescaleIntercept = slope, intercept
        set_pixels(ds, np.rint((true_value(where) - intercept) / slope))
        slices.append(ds)
    return slices


def describe(ds: Dataset, modality: str, series: int, k: int) -> None:
    """What a real object of the kind carries besides geometry and pixels; free text holds the canary."""
    ds.PatientName = ds.PatientID = ds.PatientComments = ds.OtherPatientIDs = CANARY
    ds.PatientBirthDate, ds.PatientSex = "19700101", "O"
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = "20200101"
    ds.StudyTime = ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = "120000"
    ds.AccessionNumber = ds.ReferringPhysicianName = ds.OperatorsName = ds.InstitutionName = CANARY
    ds.StudyID, ds.SeriesNumber, ds.AcquisitionNumber = "1", series, 1
    ds.StudyDescription = ds.SeriesDescription = ds.ProtocolName = ds.ImageComments = ds.StationName = CANARY
    ds.Manufacturer, ds.ManufacturerModelName, ds.BodyPartExamined = "Factory", "Affine", "HEAD"
    ds.PatientPosition, ds.PositionReferenceIndicator = "HFS", None
    ds.Modality = modality
    if modality == "CT":
        ds.KVP, ds.XRayTubeCurrent, ds.ConvolutionKernel = 120, 200, "STANDARD"
    else:
        ds.ScanningSequence, ds.SequenceVariant, ds.ScanOptions, ds.MRAcquisitionType = "SE", "NONE", None, "2D"
        ds.RepetitionTime, ds.EchoTime, ds.EchoTrainLength, ds.MagneticFieldStrength = 500, 10, 1, 3
        ds.EchoNumbers, ds.FlipAngle = 1, 90


def fill_from_tags(ds: Dataset) -> None:
    """Give a slice the values that belong where its own tags say that it lies."""
    row, column = np.array(ds.ImageOrientationPatient[:3], float), np.array(ds.ImageOrientationPatient[3:], float)
    r, c = np.mgrid[: ds.Rows, : ds.Columns]
    down, across = (float(v) for v in ds.PixelSpacing)
    where = np.array(ds.ImagePositionPatient, float) + c[..., None] * across * row + r[..., None] * down * column
    set_pixels(ds, np.rint((true_value(where) - float(ds.RescaleIntercept)) / float(ds.RescaleSlope)))


def stack(
    count: int = 8,
    orientation: Sequence[float] = AXIAL,
    gap: float = 2.5,
    origin: Sequence[float] = (-20.0, 15.0, -30.0),
    lean: tuple[float, float] = (0.0, 0.0),
) -> np.ndarray:
    """Positions of slices that are `gap` mm apart and lean by so many mm a slice along rows and columns."""
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    step = normal_of(orientation) * gap + row * lean[0] + column * lean[1]
    return np.array(origin) + np.arange(count)[:, None] * step


def set_pixels(ds: Dataset, stored: np.ndarray) -> None:
    kind = "i" if ds.PixelRepresentation else "u"
    dtype = np.dtype(f"<{kind}{ds.BitsAllocated // 8}")
    limits = np.iinfo(dtype)
    assert stored.min() >= limits.min
    assert stored.max() <= limits.max
    ds.PixelData = stored.astype(dtype).tobytes()
    ds["PixelData"].VR = "OW"


def stored_pixels(ds: Dataset) -> np.ndarray:
    kind = "i" if ds.PixelRepresentation else "u"
    return np.frombuffer(ds.PixelData, dtype=f"<{kind}{ds.BitsAllocated // 8}").reshape(ds.Rows, ds.Columns)


def save(ds: Dataset, path: Path, syntax: str = ExplicitVRLittleEndian) -> Path:
    meta = getattr(ds, "file_meta", None) or FileMetaDataset()
    meta.MediaStorageSOPClassUID = ds.get("SOPClassUID") or CLASS_UID["CT"]
    meta.MediaStorageSOPInstanceUID = ds.get("SOPInstanceUID") or f"{ROOT}.6"
    if "TransferSyntaxUID" not in meta:
        meta.TransferSyntaxUID = syntax
    ds.file_meta = meta
    layout = {"implicit_vr": False, "little_endian": True} if meta.TransferSyntaxUID.is_private else {}
    ds.save_as(path, enforce_file_format=True, **layout)
    return path


def write_series(folder: Path, slices: Sequence[Dataset], seed: int = 0, name: str = "{:03d}.dcm") -> Path:
    """Write slices under shuffled names."""
    folder.mkdir(parents=True, exist_ok=True)
    places = np.random.default_rng(seed).permutation(len(slices))
    for ds, place in zip(slices, places, strict=True):
        save(ds, folder / name.format(place))
    return folder


def make_series(folder: Path, edit: Edit | None = None, **kwargs: object) -> Path:
    slices = make_slices(**kwargs)  # type: ignore[arg-type]
    for k, ds in enumerate(slices):
        if edit is not None:
            edit(ds, k)
    return write_series(folder, slices)


def largest_error(volume: Volume) -> float:
    """The largest difference between a volume's voxels and the truth at the place where its affine puts them."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in volume.array.shape), indexing="ij"), axis=-1)
    ras = index @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    return float(np.abs(volume.array - true_value(ras * [-1, -1, 1])).max())
