"""A DICOMDIR → the images that it says are there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import Refusal
from .dicom_parse import (
    quiet_pydicom,
    read_dataset,
)
from .dicom_tags import (
    integer,
    items,
    uid,
    word,
)

__all__ = ["listed_images"]

DIRECTORY = "1.2.840.10008.1.3.10"


def listed_images(paths: Sequence[Path]) -> dict[str, set[str]]:
    """The images that DICOMDIR files list, by series.

    Records are found by their offsets, in whatever order they stand. A DICOMDIR that cannot be read says nothing: it is
    no image, and many are left over from copying.

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
        found = items(dataset, "DirectoryRecordSequence") or ()
        records = {record.seq_item_tell: record for record in found}
        for record in found:
            if word(record, "DirectoryRecordType") != "SERIES" or (series := uid(record, "SeriesInstanceUID")) is None:
                continue
            place = integer(record, "OffsetOfReferencedLowerLevelDirectoryEntity")
            for _ in range(len(records)):  # a damaged chain may lead round in a circle
                below = records.get(place)
                if below is None:
                    break
                image = uid(below, "ReferencedSOPInstanceUIDInFile")
                if word(below, "DirectoryRecordType") == "IMAGE" and image is not None:
                    listed.setdefault(series, set()).add(image)
                place = integer(below, "OffsetOfTheNextDirectoryRecord")
