"""Faults of place: slices missing, out of line, of another plane or pixel size, or nowhere."""

from __future__ import annotations

import numpy as np
from pydicom.dataset import Dataset

from bundle.data.policy import SeriesRules

from . import dicom_factory as factory
from .fault_kinds import COUNT, PLACES, Change, Fault, at, build, fault, in_places, lying, put, raw, series

__all__ = ["GEOMETRY_FAULTS"]

SOME = {**{word: [place] for word, place in PLACES.items()}, "all": range(COUNT)}


def without(*places: int) -> Change:
    return lambda slices: [ds for k, ds in enumerate(slices) if k not in places]


def moved(axis: int, mm: float) -> factory.Edit:
    def edit(ds: Dataset, k: int) -> None:
        ds.ImagePositionPatient[axis] = round(float(ds.ImagePositionPatient[axis]) + mm, 6)
        if abs(mm) < 1000:  # farther away the values leave the range of the pixels
            factory.fill_from_tags(ds)

    return edit


def bent(ds: Dataset, k: int) -> None:
    moved(2, 0.05 * k * (7 - k))(ds, k)


def random_walk(ds: Dataset, k: int) -> None:
    moved(2, float(np.random.default_rng(k).uniform(-0.8, 0.8)))(ds, k)


def transposed(ds: Dataset, k: int) -> None:
    """A slice whose rows run along the columns of the others."""
    ds.ImageOrientationPatient = [*ds.ImageOrientationPatient[3:], *ds.ImageOrientationPatient[:3]]
    factory.fill_from_tags(ds)


def turned_further(ds: Dataset, k: int) -> None:
    """Each within the tolerance of its neighbour, the last far from the first."""
    angle = np.radians(0.04 * k)
    ds.ImageOrientationPatient = [1, 0, 0, 0, round(float(np.cos(angle)), 9), round(float(np.sin(angle)), 9)]
    factory.fill_from_tags(ds)


def smaller(ds: Dataset, k: int) -> None:
    ds.Rows = 5
    ds.PixelData = ds.PixelData[: len(ds.PixelData) // 2]


def same_size_transposed(ds: Dataset, k: int) -> None:
    pixels = factory.stored_pixels(ds)
    ds.Rows, ds.Columns = ds.Columns, ds.Rows
    factory.set_pixels(ds, np.ascontiguousarray(pixels.T))


def absent(code: str, keyword: str) -> list[Fault]:
    # Coronal: a reader that takes axial for granted must not be right by chance.
    found = [
        fault(
            f"{keyword} absent: {word} slice",
            code,
            series(at(places, put(**{keyword: None})), orientation=factory.CORONAL),
        )
        for word, places in SOME.items()
    ]
    emptied = series(at(COUNT - 1, raw(keyword, "")), orientation=factory.CORONAL)
    return [*found, fault(f"{keyword} empty: last slice", code, emptied)]


def with_spacing_tag(slices: list[Dataset]) -> list[Dataset]:
    for ds in slices:
        # Thickness 2.0 and distance 5.0: no reading of the tag as a gap or as a distance explains 2.5.
        ds.SpacingBetweenSlices, ds.SliceThickness = 2.5, 2.0
    return slices[::2]


def two_ranges(slices: list[Dataset]) -> list[Dataset]:
    return [*slices[:8], *slices[9::2]]


def three_planes(localizer: bool) -> Change:
    def change(slices: list[Dataset]) -> list[Dataset]:
        modality = str(slices[0].Modality)
        made = []
        for number, plane in enumerate((factory.AXIAL, factory.CORONAL, factory.SAGITTAL)):
            for ds in factory.make_slices(modality, count=3, orientation=plane, gap=12.0, origin=(-4.0, -4.0, -6.0)):
                ds.SOPInstanceUID += f".{number}"
                ds.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER" if localizer else "OTHER"]
                made.append(ds)
        return made

    return change


def counted(ds: Dataset, k: int) -> None:
    ds.ImagesInAcquisition = COUNT


GEOMETRY_FAULTS = build(
    # missing
    fault("second slice missing", "missing_slices", series(change=without(1))),
    fault("middle slice missing", "missing_slices", series(change=without(4))),
    fault("last but one missing", "missing_slices", series(change=without(6))),
    fault("two neighbours missing", "missing_slices", series(change=without(3, 4))),
    fault("two slices missing apart", "missing_slices", series(change=without(2, 5))),
    fault("one of four missing", "missing_slices", series(change=without(2), count=4), slices=4),
    fault("middle slice missing, and the count says so", "missing_slices|truncated_series",
          series(counted, without(4))),
    fault("first slice missing, ImagesInAcquisition tells", "truncated_series", series(counted, without(0))),
    fault("last slice missing, ImagesInAcquisition tells", "truncated_series", series(counted, without(7))),
    fault("last half missing, ImagesInAcquisition tells", "truncated_series", series(counted, without(4, 5, 6, 7))),
    fault("last slice missing, the protocol's count tells", "truncated_series", series(change=without(7)),
          expected_slices=COUNT),
    fault("last slices missing, the protocol's coverage tells", "coverage_short", series(change=without(5, 6, 7)),
          min_coverage_mm=18.0),
    fault("every second slice missing, SpacingBetweenSlices tells", "missing_slices", series(change=with_spacing_tag)),
    # spacing
    fault("two ranges of different spacing", "uneven_spacing|missing_slices", series(change=two_ranges, count=16),
          slices=12),
    fault("spacing bends", "uneven_spacing", series(bent)),
    fault("random spacing", "uneven_spacing", series(random_walk)),
    fault("drift that no single gap shows", "uneven_spacing",
          series(count=41, positions=np.c_[np.zeros((41, 2)), np.cumsum([0.0] + [2.44] * 20 + [2.56] * 20)]),
          slices=41),
    in_places("1 mm too far along the normal", "uneven_spacing", moved(2, 1.0)),
    in_places("3 mm sideways", "misaligned_slices", moved(0, 3.0)),
    fault("every second slice 0.5 mm sideways", "misaligned_slices", series(at(range(0, 8, 2), moved(1, 0.5)))),
    fault("last slice 0.01 mm from its neighbour", "repeated_position", series(at(7, moved(2, -2.49)))),
    fault("last half 2 mm sideways", "misaligned_slices", series(at(range(4, 8), moved(0, 2.0)))),
    fault("slice far away", "uneven_spacing|missing_slices|bad_position", series(at(7, moved(2, 99999.3)))),
    fault("jitter beyond a strict policy", "uneven_spacing", series(at(range(0, 8, 2), moved(2, 0.06))),
          position_tolerance_mm=0.02, spacing_tolerance_mm=0.02),
    # tilt
    fault("gantry tilt where the policy forbids it", "gantry_tilt", series(positions=factory.stack(lean=(0, 0.4))),
          gantry_tilt="refuse"),
    fault("stack 45° askew", "gantry_tilt", series(positions=factory.stack(lean=(0, 2.5)))),
    fault("stack 72° askew", "gantry_tilt", series(positions=factory.stack(lean=(0, -7.7)))),
    # plane
    in_places("another orientation", "mixed_orientation", lying(ImageOrientationPatient=list(factory.CORONAL))),
    in_places("rows and columns exchanged in the orientation", "mixed_orientation", transposed),
    in_places("turned by 0.3°", "mixed_orientation", lying(ImageOrientationPatient=[1, 0, 0, 0, 0.99999, 0.005])),
    fault("each slice turned a little further", "mixed_orientation", series(turned_further)),
    in_places("upside down", "mixed_orientation", lying(ImageOrientationPatient=list(factory.FLIPPED))),
    fault("half of the slices of another orientation", "mixed_orientation",
          series(at(range(4), lying(ImageOrientationPatient=list(factory.FLIPPED))))),
    fault("scout in three planes", "localizer", series(change=three_planes(True)), slices=9),
    fault("scout in three planes that is not called so", "localizer", series(change=three_planes(False)), slices=9),
    # pixel size and matrix
    in_places("another pixel spacing", "mixed_pixel_spacing", lying(PixelSpacing=[0.45, 0.35])),
    in_places("another pixel spacing across", "mixed_pixel_spacing", lying(PixelSpacing=[0.9, 0.8])),
    fault("pixel spacing drifts", "mixed_pixel_spacing",
          series(lambda ds, k: lying(PixelSpacing=[0.9, round(0.7 + 0.004 * k, 4)])(ds, k))),
    in_places("fewer rows", "mixed_matrix", smaller),
    in_places("rows and columns exchanged", "mixed_matrix", same_size_transposed),
    # absent
    absent("position_absent", "ImagePositionPatient"),
    absent("orientation_absent", "ImageOrientationPatient"),
    absent("spacing_absent", "PixelSpacing"),
    # no numbers
    in_places("position NaN", "bad_position", raw("ImagePositionPatient", "nan\\0\\0")),
    fault("position infinite", "bad_position", series(at(7, raw("ImagePositionPatient", "0\\0\\inf")))),
    fault("all positions equal", "repeated_position", series(put(ImagePositionPatient=[0, 0, 0]))),
    in_places("orientation NaN", "bad_orientation",
              raw("ImageOrientationPatient", "1\\0\\0\\nan\\0\\-1"), orientation=factory.CORONAL),
    fault("orientation all zero", "bad_orientation",
          series(put(ImageOrientationPatient=[0, 0, 0, 0, 0, 0]), orientation=factory.CORONAL)),
    fault("orientation zero: last slice", "bad_orientation",
          series(at(7, put(ImageOrientationPatient=[0, 0, 0, 0, 0, 0])), orientation=factory.CORONAL)),
    fault("orientation not of length 1", "bad_orientation", series(put(ImageOrientationPatient=[2, 0, 0, 0, 2, 0]))),
    fault("orientation slightly too long", "bad_orientation",
          series(put(ImageOrientationPatient=[1.01, 0, 0, 0, 1, 0]))),
    fault("orientation not at right angles", "bad_orientation",
          series(put(ImageOrientationPatient=[1, 0, 0, 0.6, 0.8, 0]))),
    fault("row and column directions equal", "bad_orientation",
          series(put(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]))),
    fault("row and column directions opposite", "bad_orientation",
          series(put(ImageOrientationPatient=[1, 0, 0, -1, 0, 0]))),
    fault("pixel spacing zero", "bad_spacing", series(put(PixelSpacing=[0, 0]))),
    in_places("pixel spacing zero", "bad_spacing", put(PixelSpacing=[0.9, 0])),
    fault("pixel spacing negative", "bad_spacing", series(put(PixelSpacing=[-0.9, 0.7]))),
    fault("pixel spacing NaN", "bad_spacing", series(raw("PixelSpacing", "nan\\0.7"))),
    fault("pixel spacing NaN: last slice", "bad_spacing", series(at(7, raw("PixelSpacing", "0.9\\nan")))),
    fault("pixel spacing infinite", "bad_spacing", series(raw("PixelSpacing", "inf\\0.7"))),
    fault("pixel spacing in metres", "bad_spacing", series(put(PixelSpacing=[0.0009, 0.0007]))),
    fault("pixel spacing in micrometres", "bad_spacing", series(put(PixelSpacing=[900, 700]))),
    fault("too few numbers", "bad_tag", series(at(0, put(PixelSpacing=[0.9])))),
    fault("five cosines", "bad_tag", series(at(7, put(ImageOrientationPatient=[1, 0, 0, 0, 1])))),
    fault("two coordinates", "bad_tag", series(at(7, put(ImagePositionPatient=[0, 0])))),
    fault("four coordinates", "bad_tag", series(at(3, put(ImagePositionPatient=[-20, 15, -22.5, 0])))),
    fault("text for a number", "bad_tag", series(at(0, raw("PixelSpacing", "CANARY\\0.7")))),
    fault("comma as decimal point", "bad_tag", series(at(7, raw("ImagePositionPatient", "-20,0\\15,0\\-12,5")))),
    # counts
    fault("single slice", "too_few_slices", series(change=lambda s: s[:1]), tells=False, slices=None),
    fault("two slices", "too_few_slices", series(change=lambda s: s[:2]), tells=False, slices=None),
    fault("more slices than the policy admits", "too_many_slices", series(), max_slices=7, tells=False),
    fault("more voxels than the policy admits", "too_large", series(), max_voxels=500, tells=False),
    fault("no series of the plane asked for", "no_series_fits", series(), series=SeriesRules(plane="coronal"),
          tells=False),
)  # fmt: skip
