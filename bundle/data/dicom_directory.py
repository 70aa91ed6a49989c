"""A DICOMDIR → the images that it says are there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import Refusal
from .dicom_tags import items, quiet_pydicom, read_dataset, uid, word

__all__ = ["listed_images"]

DIRECTORY = "1.2.840.10008.1.3.10"


def listed_images(paths: Sequence[Path]) -> dict[str, set[str]]:
    """The images that DICOMDIR files list, by series.

    Records are taken in the order in which they stand, each image under the series before it, as writers of media place
    them. A DICOMDIR that cannot be read says nothing: it is no image, and many are left over from copying.

    Args:
        paths: DICOM files without images, DICOMDIR among them or not.

    Returns:
        SeriesInstanceUID → SOP Instance UIDs.
    """
    listed: dict[str, set[str]] = {}
    for path in paths:
        try:
            _add(path, listed)
        except Refusal:
            continue
    return listed


def _add(path: Path, listed: dict[str, set[str]]) -> None:
    with quiet_pydicom():
        dataset = read_dataset(path, ("DirectoryRecordSequence",), None)
        if uid(dataset.file_meta, "MediaStorageSOPClassUID") != DIRECTORY:
            return
        series = None
        for record in items(dataset, "DirectoryRecordSequence") or ():
            kind = word(record, "DirectoryRecordType")
            if kind == "SERIES":
                series = uid(record, "SeriesInstanceUID")
            elif kind == "IMAGE" and series is not None:
                image = uid(record, "ReferencedSOPInstanceUIDInFile")
                listed.setdefault(series, set()).update({image} - {None})  # type: ignore[arg-type]
