"""Faults of multi-frame objects: counts that disagree, frames that do not belong together, parts missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pydicom.dataset import Dataset
from pydicom.uid import JPEGLSLossless

from . import dicom_encodings as encodings
from . import dicom_factory as factory
from .dicom_multiframe import concatenation, frame_group, make_multiframe
from .fault_kinds import COUNT, Fault, at, build, fault, lying, put
from .faults_mixtures import CONTRASTS, doubled, mixed

__all__ = ["MULTIFRAME_FAULTS"]

Slices = list[Dataset]


def enhanced(
    edit: factory.Edit | None = None,
    change: Callable[[Slices], Sequence[Dataset]] | None = None,
    after: Callable[[Dataset], None] | None = None,
    **settings: object,
) -> Callable[[Path, str], None]:
    """One multi-frame object of slices after `edit` of each and `change` of the list, then changed by `after`."""

    def write(folder: Path, modality: str) -> None:
        slices = factory.make_slices(modality)
        for k, ds in enumerate(slices):
            if edit is not None:
                edit(ds, k)
        chosen = list(slices if change is None else change(slices))
        ds = make_multiframe(chosen, **{"shared": False, **settings})  # type: ignore[arg-type]
        if after is not None:
            after(ds)
        factory.save(ds, folder / "enhanced.dcm")

    return write


def in_part(keep: Sequence[int], sizes: Sequence[int] = (3, 3, 2)) -> Callable[[Path, str], None]:
    """A concatenation of which only some parts are there."""

    def write(folder: Path, modality: str) -> None:
        parts = concatenation(make_multiframe(factory.make_slices(modality)), sizes)
        factory.write_series(folder, [parts[k] for k in keep])

    return write


def no_groups(ds: Dataset) -> None:
    del ds.PerFrameFunctionalGroupsSequence


def frames_said(count: int) -> Callable[[Dataset], None]:
    def after(ds: Dataset) -> None:
        ds.NumberOfFrames = count

    return after


def pixels_for(count: int) -> Callable[[Dataset], None]:
    def after(ds: Dataset) -> None:
        frame = len(ds.PixelData) // COUNT
        ds.PixelData = (ds.PixelData * 2)[: frame * count]

    return after


def both(*changes: Callable[[Dataset], None]) -> Callable[[Dataset], None]:
    def after(ds: Dataset) -> None:
        for change in changes:
            change(ds)

    return after


def fewer_groups(ds: Dataset) -> None:
    del ds.PerFrameFunctionalGroupsSequence[-1]


def drop_group(frame: int, name: str) -> Callable[[Dataset], None]:
    def after(ds: Dataset) -> None:
        delattr(ds.PerFrameFunctionalGroupsSequence[frame], name)

    return after


def drop_everywhere(name: str) -> Callable[[Dataset], None]:
    def after(ds: Dataset) -> None:
        for group in ds.PerFrameFunctionalGroupsSequence:
            delattr(group, name)

    return after


def value_mapping_in_frame(ds: Dataset) -> None:
    frame_group(ds, 3, "PixelValueTransformationSequence").RescaleSlope = 0


def compressed(frames: slice) -> Callable[[Dataset], None]:
    """Of the codestreams of all frames only some are there."""

    def after(ds: Dataset) -> None:
        size = len(ds.PixelData) // COUNT
        streams = []
        for k in range(COUNT):
            one = factory.make_slices(str(ds.Modality), count=1)[0]
            one.PixelData = ds.PixelData[k * size : (k + 1) * size]
            one["PixelData"].VR = "OW"
            encodings.encode(one, "JPEG-LS")
            streams += encodings.codestreams(one)
        encodings.set_syntax(ds, JPEGLSLossless)
        encodings.set_codestreams(ds, streams[frames])

    return after


def classic_multiframe(folder: Path, modality: str) -> None:
    """All slices in one object of the single-frame class: nothing says where a frame lies."""
    slices = factory.make_slices(modality)
    ds = slices[0]
    ds.NumberOfFrames = COUNT
    ds.PixelData = b"".join(s.PixelData for s in slices)
    ds["PixelData"].VR = "OW"
    factory.save(ds, folder / "frames.dcm")


def enhanced_class_only(folder: Path, modality: str) -> None:
    slices = factory.make_slices(modality)
    for ds in slices:
        ds.SOPClassUID += ".1"
    factory.write_series(folder, slices)


def three_stacks(slices: Slices) -> Slices:
    modality = str(slices[0].Modality)
    planes = (factory.AXIAL, factory.CORONAL, factory.SAGITTAL)
    return [
        ds
        for plane in planes
        for ds in factory.make_slices(modality, count=3, orientation=plane, gap=12.0, origin=(-4.0, -4.0, -6.0))
    ]


def contrasts() -> list[Fault]:
    found = []
    for name, (code, only, one, two) in CONTRASTS.items():
        if "EchoNumbers" in one or "Philips" in name or "IMAGE" in str(one):
            continue
        found.append(
            fault(f"multi-frame, {name}: every place twice", code, enhanced(change=doubled(put(**two), put(**one))),
                  only=only, slices=2 * COUNT)
        )  # fmt: skip
        found.append(
            fault(f"multi-frame, {name}: alternating frames", code, enhanced(mixed(range(1, COUNT, 2), one, two)),
                  only=only)
        )  # fmt: skip
    return found


def without(*places: int) -> Callable[[Slices], Slices]:
    return lambda slices: [ds for k, ds in enumerate(slices) if k not in places]


def given_twice(folder: Path, modality: str) -> None:
    """Two objects of one series that hold the same frames under two UIDs."""
    for number in range(2):
        ds = make_multiframe(factory.make_slices(modality))
        ds.SOPInstanceUID += f".{number}"
        if number:
            ds.PixelData = (int.from_bytes(ds.PixelData, "little") ^ 1).to_bytes(len(ds.PixelData), "little")
            ds["PixelData"].VR = "OW"
        factory.save(ds, folder / f"{number}.dcm")


def shift(ds: Dataset, k: int) -> None:
    ds.ImagePositionPatient[0] = float(ds.ImagePositionPatient[0]) + 3
    factory.fill_from_tags(ds)


PLACES_OF_FRAMES = [1, 2, 3, 5, 6, 7, 8]

MULTIFRAME_FAULTS = build(
    fault("many frames of a single-frame class", "multi_frame", classic_multiframe),
    fault("enhanced class without functional groups", "multi_frame", enhanced_class_only),
    fault("functional groups absent", "multi_frame", enhanced(after=no_groups)),
    # counts
    fault("NumberOfFrames larger than the groups", "frame_count", enhanced(after=frames_said(9))),
    fault("NumberOfFrames smaller than the groups", "frame_count", enhanced(after=frames_said(6))),
    fault("NumberOfFrames and pixels smaller than the groups", "frame_count",
          enhanced(after=both(frames_said(7), pixels_for(7)))),
    fault("NumberOfFrames and pixels larger than the groups", "frame_count",
          enhanced(after=both(frames_said(9), pixels_for(9)))),
    fault("NumberOfFrames absent", "frame_count|multi_frame", enhanced(after=lambda ds: delattr(ds, "NumberOfFrames"))),
    fault("a functional group missing at the end", "frame_count", enhanced(after=fewer_groups)),
    fault("pixels of the last frame missing", "pixel_data_truncated", enhanced(after=pixels_for(7))),
    fault("pixels of a frame too many", "pixel_data_excess", enhanced(after=pixels_for(9))),
    fault("codestream of the last frame missing", "pixel_data_truncated|pixel_data_corrupt",
          enhanced(after=compressed(slice(0, 7)))),
    fault("codestream of the first frame missing", "pixel_data_truncated|pixel_data_corrupt",
          enhanced(after=compressed(slice(1, 8)))),
    # place
    fault("frame missing", "missing_slices", enhanced(change=without(3))),
    fault("frame missing, InStackPositionNumber tells", "missing_slices",
          enhanced(change=without(3), places=PLACES_OF_FRAMES)),
    fault("frame without a position", "position_absent", enhanced(at(3, put(ImagePositionPatient=None)))),
    fault("frames without a position", "position_absent", enhanced(put(ImagePositionPatient=None))),
    fault("frame without an orientation", "orientation_absent", enhanced(at(7, put(ImageOrientationPatient=None)))),
    fault("orientation absent in all frames", "orientation_absent",
          enhanced(after=drop_everywhere("PlaneOrientationSequence"))),
    fault("frame without a pixel spacing", "spacing_absent", enhanced(at(0, put(PixelSpacing=None)))),
    fault("frame of another orientation", "mixed_orientation",
          enhanced(at(4, lying(ImageOrientationPatient=list(factory.CORONAL))))),
    fault("frame of another pixel spacing", "mixed_pixel_spacing", enhanced(at(4, lying(PixelSpacing=[0.9, 0.8])))),
    fault("frame shifted sideways", "misaligned_slices", enhanced(at(4, shift))),
    fault("all frames at one position", "repeated_position", enhanced(put(ImagePositionPatient=[0, 0, 0]))),
    fault("three stacks of three planes", "localizer|mixed_orientation",
          enhanced(change=three_stacks, stacks=["1"] * 3 + ["2"] * 3 + ["3"] * 3), slices=9),
    fault("localizer frame type", "localizer",
          enhanced(put(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
                   after=lambda ds: setattr(ds, "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"])),
          tells=False),
    # values
    fault("frame without rescale", "rescale_partly_absent", enhanced(at(4, put(RescaleSlope=None,
          RescaleIntercept=None)))),
    fault("frames without rescale", "rescale_absent",
          enhanced(after=drop_everywhere("PixelValueTransformationSequence")), only="CT"),
    fault("frame of rescale slope 0", "bad_rescale", enhanced(after=value_mapping_in_frame)),
    fault("burned-in annotation in a multi-frame object", "burned_in",
          enhanced(after=lambda ds: setattr(ds, "BurnedInAnnotation", "YES")), tells=False),
    fault("series UID absent in a multi-frame object", "uid_absent",
          enhanced(after=lambda ds: delattr(ds, "SeriesInstanceUID"))),
    contrasts(),
    # concatenations
    fault("concatenation without its first part", "truncated_series", in_part([1, 2])),
    fault("concatenation without its middle part", "truncated_series|missing_slices", in_part([0, 2])),
    fault("concatenation without its last part", "truncated_series", in_part([0, 1])),
    fault("concatenation of which one part is left", "truncated_series", in_part([1])),
    fault("multi-frame object twice with different pixels", "repeated_position|several_time_points",
          given_twice, slices=2 * COUNT),
)  # fmt: skip
