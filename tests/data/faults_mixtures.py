"""Faults of mixture: images under one series UID that do not belong into one volume, and several series."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from bundle.data.policy import SeriesRules

from . import dicom_factory as factory
from .fault_kinds import COUNT, Change, Fault, another_contrast, at, build, fault, in_places, put, series

__all__ = ["MIXTURE_FAULTS", "doubled"]

HALF = range(4, COUNT)
ODD = range(1, COUNT, 2)


def doubled(edit: factory.Edit, first: factory.Edit | None = None) -> Change:
    """Every place twice: as it is (after `first`) and with other values (after `edit`)."""

    def change(slices: list[Dataset]) -> list[Dataset]:
        again = factory.make_slices(str(slices[0].Modality), count=len(slices))
        for k, ds in enumerate(again):
            ds.SOPInstanceUID += ".2"
            ds.InstanceNumber = len(slices) + k + 1
            another_contrast(ds, k)
            edit(ds, k)
            if first is not None:
                first(slices[k], k)
        return [*slices, *again]

    return change


def private_b(value: int) -> factory.Edit:
    """Siemens' b-value, the only one in older files."""

    def edit(ds: Dataset, k: int) -> None:
        block = ds.private_block(0x0019, "SIEMENS MR HEADER", create=True)
        block.add_new(0x0C, "IS", str(value))

    return edit


def minutes_later(ds: Dataset, k: int) -> None:
    ds.AcquisitionTime = ds.ContentTime = f"1210{k:02d}"


def another_kind(*image_type: str) -> factory.Edit:
    return put(ImageType=list(image_type))


def mosaic(tagged: bool, told: bool, times: int) -> Callable[[Path, str], None]:
    """Eight slices tiled into one picture of 3 × 3, as one scanner stores time points."""

    def write(folder: Path, modality: str) -> None:
        tiles = factory.make_slices(modality, count=COUNT)
        pictures = []
        for number in range(times):
            picture = factory.make_slices(modality, count=1)[0]
            picture.SOPInstanceUID += f".{number}"
            picture.AcquisitionTime = f"1200{number:02d}"
            whole = np.zeros((30, 36))
            for k, tile in enumerate(tiles):
                row, column = 10 * (k // 3), 12 * (k % 3)
                whole[row : row + 10, column : column + 12] = factory.stored_pixels(tile)
            picture.Rows, picture.Columns = whole.shape
            # The position of a mosaic is that of a picture of its size around the same centre.
            picture.ImagePositionPatient = [-20 - 12 * 0.7, 15 - 10 * 0.9, -30]
            factory.set_pixels(picture, whole)
            picture.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND", *(["MOSAIC"] if tagged else [])]
            if told:
                block = picture.private_block(0x0019, "SIEMENS MR HEADER", create=True)
                block.add_new(0x0A, "US", COUNT)
            pictures.append(picture)
        factory.write_series(folder, pictures)

    return write


def two_series(edit: factory.Edit | None = None, **kwargs: object) -> Callable[[Path, str], None]:
    """A second whole series beside, in the same folder."""

    def write(folder: Path, modality: str) -> None:
        first = factory.make_slices(modality)
        second = factory.make_slices(modality, **{"series": 2, **kwargs})  # type: ignore[arg-type]
        for k, ds in enumerate(second):
            another_contrast(ds, k)
            if edit is not None:
                edit(ds, k)
        factory.write_series(folder, first + second)

    return write


def relabelled(ds: Dataset, k: int) -> None:
    ds.SeriesInstanceUID = f"{factory.ROOT}.1"


def one_position_twice(slices: list[Dataset]) -> list[Dataset]:
    again = factory.make_slices(str(slices[0].Modality))[4]
    again.SOPInstanceUID += ".2"
    another_contrast(again, 4)
    return [*slices, again]


def slice_at_place_of_another(ds: Dataset, k: int) -> None:
    ds.ImagePositionPatient[2] = float(ds.ImagePositionPatient[2]) - 2.5
    factory.fill_from_tags(ds)
    stored = factory.stored_pixels(ds).copy()
    stored[4, 5] += 1
    factory.set_pixels(ds, stored)


def same_uid(change_pixels: bool) -> Callable[[Path, str], None]:
    def write(folder: Path, modality: str) -> None:
        slices = factory.make_slices(modality)
        factory.write_series(folder, slices)
        again = factory.make_slices(modality)[2]
        if change_pixels:
            another_contrast(again, 2)
        else:
            again.ImagePositionPatient[2] = 60.0
        factory.save(again, folder / "again.dcm")

    return write


def all_one_uid(ds: Dataset, k: int) -> None:
    ds.SOPInstanceUID = f"{factory.ROOT}.1.1"


def other_sop_class(ds: Dataset, k: int) -> None:
    other = "MR" if ds.Modality == "CT" else "CT"
    ds.SOPClassUID, ds.Modality = factory.CLASS_UID[other], other


def localizer_slice(ds: Dataset, k: int) -> None:
    ds.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    ds.ImageOrientationPatient = list(factory.CORONAL)
    ds.ImagePositionPatient = [-20.0, 20.0, -10.0]
    factory.set_pixels(ds, np.arange(120).reshape(10, 12))


# What can be told apart by one tag: the code, and the tag's values in the two kinds of image.
Tags = dict[str, object]
CONTRASTS: dict[str, tuple[str, str | None, Tags, Tags]] = {
    "time points": ("several_time_points", None, {"TemporalPositionIdentifier": 1}, {"TemporalPositionIdentifier": 2}),
    "echo numbers": ("several_echoes", "MR", {"EchoNumbers": 1}, {"EchoNumbers": 2}),
    "echo times": ("several_echoes", "MR", {"EchoTime": 10}, {"EchoTime": 80}),
    "b-values": ("several_b_values", "MR", {"DiffusionBValue": 0.0}, {"DiffusionBValue": 1000.0}),
    "magnitude and phase": ("several_image_types", "MR", {"ImageType": ["ORIGINAL", "PRIMARY", "M", "ND"]},
                            {"ImageType": ["ORIGINAL", "PRIMARY", "P", "ND"]}),
    "magnitude and phase, Philips": ("several_image_types", "MR",
                                     {"ImageType": ["ORIGINAL", "PRIMARY", "M_FFE", "M", "FFE"]},
                                     {"ImageType": ["ORIGINAL", "PRIMARY", "PHASE MAP", "P", "FFE"]}),
    "water and fat": ("several_image_types", "MR", {"ImageType": ["DERIVED", "PRIMARY", "WATER"]},
                      {"ImageType": ["DERIVED", "PRIMARY", "FAT"]}),
}  # fmt: skip


def contrasts() -> list[Fault]:
    found = []
    for name, (code, only, one, two) in CONTRASTS.items():
        found += [
            fault(
                f"{name}: every place twice",
                code,
                series(change=doubled(put(**two), put(**one))),
                slices=2 * COUNT,
                only=only,
            ),
            fault(f"{name}: alternating slices", code, series(mixed(ODD, one, two)), only=only),
            fault(f"{name}: upper half differs", code, series(mixed(HALF, one, two)), only=only),
            fault(f"{name}: one slice differs", code, series(mixed([4], one, two)), only=only),
        ]
    return found


def mixed(places: range | list[int], one: Tags, two: Tags) -> factory.Edit:
    def edit(ds: Dataset, k: int) -> None:
        put(**(two if k in places else one))(ds, k)
        if k in places:
            another_contrast(ds, k)

    return edit


AMBIGUOUS = SeriesRules(plane="axial")

MIXTURE_FAULTS = build(
    contrasts(),
    fault("time points told by time alone", "several_time_points|repeated_position",
          series(change=doubled(minutes_later)), slices=2 * COUNT),
    fault("b-values told by a private tag alone", "several_b_values|repeated_position",
          series(change=doubled(private_b(1000), private_b(0))), slices=2 * COUNT, only="MR"),
    fault("two tube voltages at every place", "repeated_position", series(change=doubled(put(KVP=80))),
          slices=2 * COUNT, only="CT"),
    fault("two kernels at every place", "several_image_types", series(change=doubled(put(ConvolutionKernel="BONE"))),
          slices=2 * COUNT,
          only="CT"),
    fault("original and reformatted at every place", "several_image_types|repeated_position",
          series(change=doubled(another_kind("DERIVED", "SECONDARY", "MPR"))), slices=2 * COUNT, only="CT"),
    fault("every place twice, unexplained", "repeated_position", series(change=doubled(put())), slices=2 * COUNT),
    fault("one place twice with different pixels", "repeated_position", series(change=one_position_twice),
          slices=COUNT + 1),
    fault("a slice at the place of its neighbour", "repeated_position", series(at(4, slice_at_place_of_another))),
    fault("last slice at the place of its neighbour", "repeated_position", series(at(7, slice_at_place_of_another))),
    fault("one SOP Instance UID with different pixels", "conflicting_copies", same_uid(True), slices=COUNT + 1),
    fault("one SOP Instance UID at different places", "conflicting_copies", same_uid(False), slices=COUNT + 1),
    fault("all images with one SOP Instance UID", "conflicting_copies", series(all_one_uid)),
    # mosaics
    fault("mosaic", "mosaic", mosaic(True, True, 1), slices=None),
    fault("mosaics of three time points", "mosaic", mosaic(True, True, 3), slices=None),
    fault("mosaic told by ImageType alone", "mosaic", mosaic(True, False, 3), slices=None),
    fault("mosaic told by a private tag alone", "mosaic", mosaic(False, True, 1), only="MR", slices=None),
    fault("mosaics told by a private tag alone", "mosaic", mosaic(False, True, 3), only="MR", slices=None),
    # localizers in the series
    in_places("localizer among the slices", "localizer", localizer_slice),
    in_places("slice called a localizer", "localizer", put(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])),
    fault("localizers only", "localizer", series(put(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])), tells=False),
    # who and where
    in_places("another patient's ID", "several_patients", put(PatientID="other"), tells=False),
    in_places("another patient's name", "several_patients", put(PatientName="other"), tells=False),
    fault("upper half of another patient", "several_patients", series(at(HALF, put(PatientID="B", PatientName="B"))),
          tells=False),
    fault("PatientID absent: last slice", "several_patients", series(at(7, put(PatientID=None))), tells=False),
    in_places("another study", "several_studies", put(StudyInstanceUID="1.2.3"), tells=False),
    fault("upper half of another study", "several_studies", series(at(HALF, put(StudyInstanceUID="1.2.3"))),
          tells=False),
    in_places("another frame of reference", "several_frames_of_reference", put(FrameOfReferenceUID="1.2.3"),
              tells=False),
    fault("upper half in another frame of reference", "several_frames_of_reference",
          series(at(HALF, put(FrameOfReferenceUID="1.2.3"))), tells=False),
    fault("frame of reference absent: last slice", "several_frames_of_reference",
          series(at(7, put(FrameOfReferenceUID=None))), tells=False),
    in_places("another modality", "mixed_modality|modality", other_sop_class, tells=False),
    in_places("slice called a secondary capture", "not_ct_or_mr_image|mixed_modality",
              put(SOPClassUID="1.2.840.10008.5.1.4.1.1.7")),
    in_places("slice called a report", "not_ct_or_mr_image|mixed_modality",
              put(SOPClassUID="1.2.840.10008.5.1.4.1.1.88.22")),
    # series
    in_places("another series UID", "several_series", put(SeriesInstanceUID="1.2.3")),
    fault("two whole series", "several_series", two_series(), slices=2 * COUNT),
    fault("two whole series at different places", "several_series", two_series(origin=(-20.0, 15.0, 60.0)),
          slices=2 * COUNT),
    fault("two series of different planes", "several_series",
          two_series(orientation=factory.CORONAL, origin=(-20.0, 15.0, 0.0)), slices=2 * COUNT),
    fault("two series, both axial as asked for", "several_series", two_series(), slices=2 * COUNT, series=AMBIGUOUS),
    fault("two series alike under the thinnest", "several_series", two_series(), slices=2 * COUNT,
          series=SeriesRules(thinnest=True)),
    fault("two series, neither as asked for", "no_series_fits", two_series(), slices=2 * COUNT,
          series=SeriesRules(plane="coronal")),
    fault("two series under one UID at different places", "repeated_position|uneven_spacing|missing_slices",
          two_series(relabelled, origin=(-20.0, 15.0, 60.0)), slices=2 * COUNT),
    fault("two series of different planes under one UID", "mixed_orientation|localizer",
          two_series(relabelled, orientation=factory.CORONAL, origin=(-20.0, 15.0, 0.0)), slices=2 * COUNT),
    fault("series UID absent", "uid_absent", series(put(SeriesInstanceUID=None))),
    fault("series UID absent: last slice", "uid_absent", series(at(7, put(SeriesInstanceUID=None)))),
    fault("SOP Instance UID empty: last slice", "uid_absent", series(at(7, put(SOPInstanceUID="")))),
    fault("letters in a series UID", "bad_tag", series(at(7, put(SeriesInstanceUID="1.2.CANARY")))),
)  # fmt: skip
