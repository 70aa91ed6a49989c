"""What no reader can see from the files: each changes the volume and leaves nothing that contradicts it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from . import dicom_factory as factory
from .fault_kinds import Change, Fault, at, fault, put, series

__all__ = ["UNDETECTABLE", "Undetectable"]


@dataclass(frozen=True)
class Undetectable:
    """A fault that leaves no trace, the reason, and a writer of an example where there can be one."""

    name: str
    reason: str
    example: Fault | None = None

    @property
    def write(self) -> Callable[[Path, str], None] | None:
        """Writes the example for a modality into a folder."""
        return None if self.example is None else self.example.write


def flipped_bit(ds: Dataset, k: int) -> None:
    stored = factory.stored_pixels(ds).copy()
    stored[4, 5] ^= 1 << 9
    factory.set_pixels(ds, stored)


def mirrored(ds: Dataset, k: int) -> None:
    """The pixels of each row reversed, as after a wrong export."""
    factory.set_pixels(ds, factory.stored_pixels(ds)[:, ::-1])


def left_right(ds: Dataset, k: int) -> None:
    """Position and row direction mirrored together: another, equally regular grid."""
    ds.ImagePositionPatient[0] = -float(ds.ImagePositionPatient[0])
    ds.ImageOrientationPatient = [-1, 0, 0, 0, 1, 0]


def feet_first(ds: Dataset, k: int) -> None:
    """The whole series turned by 180° about the axis from front to back."""
    x, y, z = (float(v) for v in ds.ImagePositionPatient)
    ds.ImagePositionPatient, ds.ImageOrientationPatient = [-x, y, -z], [-1, 0, 0, 0, 1, 0]
    ds.PatientPosition = "FFS"


def swapped(ds: Dataset, k: int) -> None:
    ds.Rows, ds.Columns = ds.Columns, ds.Rows


def exchanged_pixels(slices: list[Dataset]) -> list[Dataset]:
    slices[2].PixelData, slices[5].PixelData = slices[5].PixelData, slices[2].PixelData
    return slices


def moved_all(ds: Dataset, k: int) -> None:
    ds.ImagePositionPatient[2] = float(ds.ImagePositionPatient[2]) + 100


def without(*places: int) -> Change:
    return lambda slices: [ds for k, ds in enumerate(slices) if k not in places]


def zeroed_rows(ds: Dataset, k: int) -> None:
    """A download that broke off and was filled up with zeros."""
    stored = factory.stored_pixels(ds).copy()
    stored[6:] = 0
    factory.set_pixels(ds, stored)


def item(
    name: str, reason: str, edit: factory.Edit | None = None, change: Change | None = None, **settings: object
) -> Undetectable:
    known = {k: settings.pop(k) for k in ("only", "slices") if k in settings}
    return Undetectable(name, reason, fault(name, "none", series(edit, change, **settings), **known))  # type: ignore[arg-type]


_ALL = (
    item("a bit of a pixel flipped", "every pattern of bits is a possible pixel, and DICOM has no checksum",
         at(3, flipped_bit)),
    item("pixels of one slice zero from a row on", "air and padding look the same, and the length is right",
         at(7, zeroed_rows)),
    item("a digit of the rescale intercept of one slice", "intercepts may differ from slice to slice; −300 and −290 "
         "are equally plausible", at(3, put(RescaleIntercept=-290))),
    item("a digit of the rescale slope of one slice", "slopes differ from slice to slice in PET and Philips MR",
         at(3, put(RescaleSlope=0.011))),
    item("a stored bit fewer in the header of all slices", "bits above the stored ones may be overlay bits in all "
         "slices alike", None, lambda slices: _fewer_bits(slices)),
    item("slices missing at one end", "what is left is a whole, even series of a smaller region; only a count "
         "(ImagesInAcquisition, DICOMDIR, expected_slices) or min_coverage_mm can tell", change=without(0, 1)),
    item("every second slice missing", "what is left is an even series of twice the distance; thickness does not tell, "
         "series with gaps between slices are common", change=without(1, 3, 5, 7)),
    item("all pixel spacings wrong by one factor", "a head of 90% is still a head",
         put(PixelSpacing=[0.81, 0.63])),
    item("all slice distances wrong by one factor", "the positions form an even grid",
         lambda ds, k: setattr(ds, "ImagePositionPatient", [-20, 15, -30 + 3 * k])),
    item("rows and columns exchanged in the header of uncompressed images", "the number of pixels is the same",
         swapped),
    item("pixel spacings exchanged", "pixels may be higher than wide", put(PixelSpacing=[0.7, 0.9])),
    item("left and right exchanged in position and orientation", "the mirrored grid is as regular as the true one",
         left_right),
    item("pixels mirrored by an export", "the header does not see the pixels", mirrored),
    item("head first instead of feet first", "positions and directions of the whole series are turned alike; "
         "PatientPosition says only what the operator entered", feet_first),
    item("all positions moved", "the origin is where the scanner puts it", moved_all),
    item("pixels of two slices exchanged", "the header does not see the pixels", change=exchanged_pixels),
    Undetectable("another person under the same name and ID", "nothing else in the files identifies a person"),
    Undetectable("text burned in and not declared", "BurnedInAnnotation is all that says so; text in pixels is a "
                 "picture like any other"),
    Undetectable("another modality or body part than the tags say", "tags are all that says so"),
    Undetectable("lossy compression undone and not declared", "decompressed pixels look like any others"),
    Undetectable("a whole series in place of another under its UIDs", "the files are consistent among themselves"),
)  # fmt: skip


def _fewer_bits(slices: list[Dataset]) -> list[Dataset]:
    for ds in slices:
        stored = factory.stored_pixels(ds)
        assert int(np.max(stored)) < 1 << 15
        ds.BitsStored, ds.HighBit = 14, 13
    return slices


UNDETECTABLE: dict[str, Undetectable] = {one.name: one for one in _ALL}
