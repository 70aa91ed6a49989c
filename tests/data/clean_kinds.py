"""What a clean variant of a DICOM series is, and the changes to slices that must not matter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence

from bundle.data.policy import ReaderPolicy

from . import dicom_encodings as encodings
from . import dicom_factory as factory
from .fault_kinds import COUNT, at, put, raw
from .volume_oracle import Expected

__all__ = ["EDITS", "TOLERANCE", "CleanVariant", "clean", "expected_of", "plain"]

TOLERANCE = 0.006  # half a step of the rescale slope, and float32


@dataclass(frozen=True)
class CleanVariant:
    """One good series that a reader must return whole and right.

    Args:
        name: what is special about it.
        modality: CT or MR.
        build: writes it into a folder and says what a reader must return.
        policy: under which it must load.
        tolerance: the largest difference of a voxel from the truth where the affine puts it.
        reason: why the tolerance is wider than TOLERANCE.
    """

    name: str
    modality: str
    build: Callable[[Path, str], Expected]
    policy: ReaderPolicy = field(default_factory=ReaderPolicy)
    tolerance: float = TOLERANCE
    reason: str = ""

    def write(self, folder: Path) -> Expected:
        """Write the files into a folder, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.build(folder, self.modality)


Build = Callable[[Path, str], Expected]


def clean(
    name: str,
    build: Build,
    *,
    only: str | None = None,
    tolerance: float = TOLERANCE,
    reason: str = "",
    **policy: object,
) -> Iterable[CleanVariant]:
    """A variant for CT and for MR, or for one of them."""
    for modality in ("CT", "MR") if only is None else (only,):
        yield CleanVariant(
            name=f"{modality}: {name}",
            modality=modality,
            build=build,
            policy=ReaderPolicy(**policy),  # type: ignore[arg-type]
            tolerance=tolerance,
            reason=reason,
        )


def expected_of(slices: Sequence[Dataset], **more: object) -> Expected:
    """What to expect of single-frame slices that are in order of position."""
    first = slices[0]
    orientation = np.array(first.ImageOrientationPatient, dtype=float)
    places = np.array([ds.ImagePositionPatient for ds in slices], dtype=float)
    down, across = (float(v) for v in first.PixelSpacing)
    single = np.cross(orientation[:3], orientation[3:]) * 2.5
    step = single if len(slices) == 1 else (places[-1] - places[0]) / (len(slices) - 1)
    lps = np.eye(4)
    lps[:3] = np.c_[orientation[:3] * across, orientation[3:] * down, step, places[0]]
    settings: dict[str, object] = {
        "uids": tuple(str(ds.SOPInstanceUID) for ds in slices),
        "shape": (int(first.Columns), int(first.Rows), len(slices)),
        "affine": np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps,
    }
    return Expected(**(settings | more))  # type: ignore[arg-type]


def plain(
    edit: factory.Edit | None = None,
    *,
    encoding: str | None = None,
    name: str = "{:03d}.dcm",
    seed: int = 0,
    scale: tuple[float, float] = (1.0, 0.0),
    **kwargs: object,
) -> Build:
    """A single-frame series after `edit` of each slice."""

    def build(folder: Path, modality: str) -> Expected:
        slices = factory.make_slices(modality, **kwargs)  # type: ignore[arg-type]
        for k, ds in enumerate(slices):
            if edit is not None:
                edit(ds, k)
            if encoding is not None:
                encodings.encode(ds, encoding)
        factory.write_series(folder, slices, seed=seed, name=name)
        return expected_of(slices, scale=scale)

    return build


# --- edits that must not matter ---


def per_slice(**values: Callable[[int], object]) -> factory.Edit:
    def edit(ds: Dataset, k: int) -> None:
        for keyword, value in values.items():
            setattr(ds, keyword, value(k))

    return edit


def rescaled(slope: Callable[[int], float], intercept: Callable[[int], float], **tags: object) -> factory.Edit:
    """The same values stored under another slope, intercept and bit layout."""

    def edit(ds: Dataset, k: int) -> None:
        values = factory.stored_pixels(ds) * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        ds.RescaleSlope, ds.RescaleIntercept = slope(k), intercept(k)
        put(**tags)(ds, k)
        factory.set_pixels(ds, np.rint((values - ds.RescaleIntercept) / ds.RescaleSlope))

    return edit


signed = rescaled(lambda k: 0.01, lambda k: 0.0, PixelRepresentation=1)


def overlay_bits(high_bit: int, is_signed: bool) -> factory.Edit:
    """Twelve stored bits, and bits of an overlay above and below them; steps of 0.1."""

    def edit(ds: Dataset, k: int) -> None:
        values = factory.stored_pixels(ds) * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        ds.RescaleSlope, ds.RescaleIntercept = 0.1, 0.0 if is_signed else -200.0
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 12, high_bit, int(is_signed)
        stored = np.rint((values - ds.RescaleIntercept) / 0.1).astype(int)
        low = high_bit - 11
        mask = 0xFFF << low
        noise = np.random.default_rng(k).integers(0, 1 << 16, stored.shape)
        ds.PixelData = (((stored << low) & mask) | (noise & ~mask & 0xFFFF)).astype("<u2").tobytes()

    return edit


def nested(ds: Dataset, k: int) -> None:
    item = ds
    for _ in range(4):
        inner = Dataset()
        inner.ImagePositionPatient, inner.Rows, inner.SOPInstanceUID = [1, 2, 3], 7, "1.2.3"
        item.ReferencedImageSequence = DicomSequence([inner])
        item["ReferencedImageSequence"].is_undefined_length = k % 2 == 0
        item = inner


def icon(ds: Dataset, k: int) -> None:
    """A thumbnail, whose pixel data and size have the same tags as the image's own."""
    small = Dataset()
    small.Rows = small.Columns = 2
    small.SamplesPerPixel, small.PhotometricInterpretation = 1, "MONOCHROME2"
    small.BitsAllocated, small.BitsStored, small.HighBit, small.PixelRepresentation = 8, 8, 7, 0
    small.PixelData = bytes(4)
    small["PixelData"].VR = "OB"
    ds.IconImageSequence = DicomSequence([small])


def overlay_plane(ds: Dataset, k: int) -> None:
    ds.add_new(0x60000010, "US", ds.Rows)
    ds.add_new(0x60000011, "US", ds.Columns)
    ds.add_new(0x60000040, "CS", "G")
    ds.add_new(0x60000050, "SS", [1, 1])
    ds.add_new(0x60000100, "US", 1)
    ds.add_new(0x60000102, "US", 0)
    ds.add_new(0x60003000, "OW", bytes(16))


def private(size: int) -> factory.Edit:
    def edit(ds: Dataset, k: int) -> None:
        block = ds.private_block(0x0029, "CANARY CREATOR", create=True)
        block.add_new(0x10, "OB", bytes(size))
        block.add_new(0x11, "LO", "CANARY")
        block.add_new(0x12, "SQ", [Dataset()])

    return edit


def decimal_strings(style: str) -> factory.Edit:
    """The numbers of geometry and rescale as different writers put them."""

    def edit(ds: Dataset, k: int) -> None:
        for keyword in (
            "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"
        ):  # fmt: skip
            value = ds[keyword].value
            numbers = [float(v) for v in value] if not isinstance(value, (str, float)) else [float(value)]
            raw(keyword, "\\".join(format(v, style) if style else f" {v!r} " for v in numbers))(ds, k)

    return edit


def padding_after(ds: Dataset, k: int) -> None:
    ds.add_new(0xFFFCFFFC, "OB", bytes(64))


def rounded(keyword: str, digits: int) -> factory.Edit:
    def edit(ds: Dataset, k: int) -> None:
        setattr(ds, keyword, [round(float(v), digits) for v in getattr(ds, keyword)])

    return edit


NORMAL_DIFFERENCES = per_slice(
    AcquisitionTime=lambda k: f"1200{k:02d}.{k:06d}",
    ContentTime=lambda k: f"1201{k:02d}",
    TriggerTime=lambda k: 10.5 * k,
    InstanceCreationTime=lambda k: f"1202{k:02d}",
    WindowCenter=lambda k: 40 + k,
    WindowWidth=lambda k: 400 - k,
    SliceLocation=lambda k: -k,
    SmallestImagePixelValue=lambda k: k,
    LargestImagePixelValue=lambda k: 100 + k,
    AcquisitionNumber=lambda k: k + 1,
)

# What real series do, and no reader may mind.
EDITS: dict[str, factory.Edit] = {
    "InstanceNumber reversed": per_slice(InstanceNumber=lambda k: 100 - k),
    "InstanceNumber shuffled": per_slice(InstanceNumber=lambda k: [5, 2, 8, 1, 7, 3, 6, 4][k % 8]),
    "InstanceNumber equal": put(InstanceNumber=1),
    "InstanceNumber absent": put(InstanceNumber=None),
    "InstanceNumber absent in one": at(3, put(InstanceNumber=None)),
    "InstanceNumber empty": raw("InstanceNumber", "", "IS"),
    "SliceThickness and SeriesDate differ in half": per_slice(
        SliceThickness=lambda k: 2.5 if k < 4 else 5, SeriesDate=lambda k: "20200101" if k < 4 else "20200102"
    ),
    "SliceThickness absent": put(SliceThickness=None),
    "SliceThickness is no number": raw("SliceThickness", "thin"),
    "SpacingBetweenSlices right": put(SpacingBetweenSlices=2.5),
    "SpacingBetweenSlices is the gap": put(SpacingBetweenSlices=0.5, SliceThickness=2.0),
    "SpacingBetweenSlices negative": put(SpacingBetweenSlices=-2.5),
    "slope and intercept per slice": rescaled(lambda k: 0.01 + 0.0005 * k, lambda k: -290.0 - k),
    "negative slope": rescaled(lambda k: -0.01, lambda k: 300.0),
    "signed": signed,
    "mixed sign": at(range(1, COUNT, 2), signed),
    "32 bits": rescaled(lambda k: 0.01, lambda k: -300.0, BitsAllocated=32, BitsStored=32, HighBit=31),
    "MONOCHROME1": put(PhotometricInterpretation="MONOCHROME1"),
    "times, windows and acquisition numbers per slice": NORMAL_DIFFERENCES,
    "FrameOfReferenceUID absent": put(FrameOfReferenceUID=None),
    "PatientID with trailing spaces in half": at(range(4), put(PatientID=factory.CANARY + "  ")),
    "no name": put(PatientName=""),
    "NumberOfFrames 1": put(NumberOfFrames=1),
    "minus zero in the orientation of half": at(range(4), raw("ImageOrientationPatient", "1\\0\\0\\-0\\1\\-0.0")),
    "15 bits stored in half, which hold the values": at(range(4), put(BitsStored=15, HighBit=14)),
    "BurnedInAnnotation NO": put(BurnedInAnnotation="NO"),
    "lossy said, which the policy admits": put(LossyImageCompression="01", LossyImageCompressionRatio=8),
    "character set": put(SpecificCharacterSet="ISO_IR 192", SeriesDescription="CANARY Schädel ü"),
    "unknown character set": put(SpecificCharacterSet="ISO_IR 999"),
    "private tags": private(40),
    "private megabyte": private(1 << 20),
    "sequences nested": nested,
    "icon image": icon,
    "overlay plane": overlay_plane,
    "trailing padding": padding_after,
    "numbers with spaces": decimal_strings(""),
    "numbers of 16 characters": decimal_strings(".8e"),
    "numbers with exponents": decimal_strings(".6E"),
    "numbers with plus signs": decimal_strings("+.6f"),
    "ImagesInAcquisition right": put(ImagesInAcquisition=COUNT),
    "ImagesInAcquisition of two acquisitions": per_slice(
        ImagesInAcquisition=lambda k: 4, AcquisitionNumber=lambda k: 1 + k // 4
    ),
    "ImagesInAcquisition counts both acquisitions": per_slice(
        ImagesInAcquisition=lambda k: COUNT, AcquisitionNumber=lambda k: 1 + k // 4
    ),
    "one time point of ten": put(TemporalPositionIdentifier=3, NumberOfTemporalPositions=10),
}
