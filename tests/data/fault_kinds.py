"""What a fault of a DICOM series is, and the changes to slices that faults are made of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset

from bundle.data.policy import ReaderPolicy

from . import dicom_factory as factory

__all__ = [
    "COUNT", "OTHER", "PLACES", "Fault", "Faults", "Write", "another_contrast", "at", "build", "fault", "in_places",
    "lying", "put", "raw", "read_as_is", "series",
]  # fmt: skip

COUNT = 8
PLACES = {"first": 0, "middle": 3, "last": COUNT - 1}
# A second echo, time point or phase image shows the same place with other values: so much more everywhere.
OTHER = 40.0

Change = Callable[[list[Dataset]], Sequence[Dataset]]
Write = Callable[[Path, str], object]


@dataclass(frozen=True)
class Fault:
    """One way in which files are no single whole volume.

    Args:
        name: what is wrong, in words.
        codes: the reason codes that name it; more than one only where each is the reason.
        build: writes the files for a modality into a folder.
        policy: under which it must be refused.
        modalities: those in which it can occur.
        slices: how many slices the whole volume has; None where there is no such volume.
        tells: whether the voxels can show that a reader went wrong. False where they are right and what is wrong is
            something else, such as two patients; a reader that returns them all is then said to have accepted it.
    """

    name: str
    codes: frozenset[str]
    build: Write
    policy: ReaderPolicy = field(default_factory=ReaderPolicy)
    modalities: tuple[str, ...] = ("CT", "MR")
    slices: int | None = COUNT
    tells: bool = True

    def write(self, folder: Path, modality: str) -> None:
        """Write the faulty files into a folder, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom objects to writing some of the faults
            self.build(folder, modality)


Faults = dict[str, Fault]


def fault(
    name: str,
    codes: str,
    write: Write,
    *,
    only: str | None = None,
    slices: int | None = COUNT,
    tells: bool = True,
    **policy: object,
) -> Fault:
    """A fault from codes such as "bad_tag|uid_absent" and the settings of its policy."""
    return Fault(
        name=name,
        codes=frozenset(codes.split("|")),
        build=write,
        policy=ReaderPolicy(**policy),  # type: ignore[arg-type]
        modalities=("CT", "MR") if only is None else (only,),
        slices=slices,
        tells=tells,
    )


def series(edit: factory.Edit | None = None, change: Change | None = None, **kwargs: object) -> Write:
    """Writes a series of COUNT slices after `edit` of each and `change` of the list."""

    def write(folder: Path, modality: str) -> None:
        slices = factory.make_slices(modality, **{"count": COUNT, **kwargs})  # type: ignore[arg-type]
        for k, ds in enumerate(slices):
            if edit is not None:
                edit(ds, k)
        factory.write_series(folder, list(slices if change is None else change(slices)))

    return write


def in_places(
    name: str, codes: str, edit: factory.Edit, orientation: Sequence[float] = factory.AXIAL, **settings: object
) -> Iterable[Fault]:
    """The same fault in the first, a middle and the last slice."""
    for word, place in PLACES.items():
        write = series(at(place, edit), orientation=orientation)
        yield fault(f"{name}: {word} slice", codes, write, **settings)  # type: ignore[arg-type]


def build(*faults: Fault | Iterable[Fault]) -> Faults:
    """Faults by name, which must not repeat."""
    flat = [one for item in faults for one in ([item] if isinstance(item, Fault) else item)]
    named = {one.name: one for one in flat}
    assert len(named) == len(flat), "two faults of one name"
    return named


def at(places: int | Iterable[int], edit: factory.Edit) -> factory.Edit:
    """An edit of some slices only."""
    wanted = {places} if isinstance(places, int) else set(places)

    def change(ds: Dataset, k: int) -> None:
        if k in wanted:
            edit(ds, k)

    return change


def put(**tags: object) -> factory.Edit:
    """Set tags; None takes a tag away."""

    def edit(ds: Dataset, k: int) -> None:
        for keyword, value in tags.items():
            if value is not None:
                setattr(ds, keyword, value)
            elif keyword in ds:
                delattr(ds, keyword)

    return edit


def lying(**tags: object) -> factory.Edit:
    """As `put`, and the slice's values are those of the place that its tags now name."""
    set_tags = put(**tags)

    def edit(ds: Dataset, k: int) -> None:
        set_tags(ds, k)
        factory.fill_from_tags(ds)

    return edit


def raw(keyword: str, text: str, vr: str = "DS") -> factory.Edit:
    """Write the bytes as they are, past pydicom's checks."""

    def edit(ds: Dataset, k: int) -> None:
        value = text.encode() + b" " * (len(text) % 2)
        tag = pydicom.tag.Tag(keyword)
        ds[keyword] = pydicom.dataelem.RawDataElement(tag, vr, len(value), value, 0, False, True)

    return edit


def read_as_is(ds: Dataset) -> np.ndarray:
    """The rescaled values of an uncompressed slice."""
    return factory.stored_pixels(ds) * float(ds.RescaleSlope) + float(ds.RescaleIntercept)


def another_contrast(ds: Dataset, k: int) -> None:
    """The same place with values that are OTHER higher, as another echo or time point shows it."""
    values = read_as_is(ds) + OTHER
    factory.set_pixels(ds, np.rint((values - float(ds.RescaleIntercept)) / float(ds.RescaleSlope)))
