"""Good series in all their variety, none of which a reader may refuse or get wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from . import dicom_encodings as encodings
from . import dicom_factory as factory
from .clean_kinds import (
    EDITS,
    TOLERANCE,
    Build,
    CleanVariant,
    clean,
    expected_of,
    overlay_bits,
    per_slice,
    plain,
    rounded,
    signed,
)
from .clean_neighbours import neighbour_variants
from .dicom_multiframe import concatenation, make_multiframe
from .fault_kinds import put
from .volume_oracle import Expected

__all__ = ["CLEAN", "CleanVariant"]

ORIENTATIONS = {
    "axial": factory.AXIAL,
    "coronal": factory.CORONAL,
    "sagittal": factory.SAGITTAL,
    "axial, rows to the right": factory.FLIPPED,
    "axial, upside down": (1.0, 0.0, 0.0, 0.0, -1.0, 0.0),
    "axial, rows along the spine of the picture": (0.0, 1.0, 0.0, 1.0, 0.0, 0.0),
    "oblique": factory.oblique(),
}
STEP_TOLERANCE = 0.0075
SHUFFLED = [3, 1, 0, 2, 7, 6, 5, 4]


def multiframe(
    edit: factory.Edit | None = None,
    *,
    encoding: str | None = None,
    sizes: Sequence[int] | None = None,
    positions: np.ndarray | None = None,
    orientation: Sequence[float] = factory.AXIAL,
    after: Callable[[Dataset], None] | None = None,
    **settings: object,
) -> Build:
    """The slices as one multi-frame object, or as a concatenation of several."""

    def build(folder: Path, modality: str) -> Expected:
        slices = factory.make_slices(modality, orientation=orientation, positions=positions)
        for k, ds in enumerate(slices):
            if edit is not None:
                edit(ds, k)
        ds = make_multiframe(slices, **settings)  # type: ignore[arg-type]
        if after is not None:
            after(ds)
        frames = [settings.get("order", range(len(slices))).index(k) for k in range(len(slices))]  # type: ignore[attr-defined]
        if sizes is None:
            if encoding is not None:
                compress_frames(ds, slices, encoding, settings.get("order"))
            factory.save(ds, folder / "object.dcm")
            uids = (str(ds.SOPInstanceUID),) * len(slices)
            return expected_of(slices, uids=uids, frames=tuple(f + 1 for f in frames))
        parts = concatenation(ds, sizes)
        factory.write_series(folder, parts, seed=2)
        starts = np.cumsum([0, *sizes])
        part = [int(np.searchsorted(starts, f, side="right")) - 1 for f in frames]
        return expected_of(
            slices,
            uids=tuple(str(parts[p].SOPInstanceUID) for p in part),
            frames=tuple(int(f - starts[p]) + 1 for f, p in zip(frames, part, strict=True)),
        )

    return build


def compress_frames(ds: Dataset, slices: list[Dataset], encoding: str, order: object) -> None:
    if encoding not in encodings.CODECS:
        encodings.encode(ds, encoding)
        return
    streams = []
    for one in slices:
        encodings.encode(one, encoding)
        streams += encodings.codestreams(one)
    encodings.set_syntax(ds, encodings.CODECS[encoding])
    encodings.set_codestreams(ds, [streams[k] for k in (order or range(len(slices)))])  # type: ignore[attr-defined]


def padded(limit: bool) -> Build:
    """Pixels outside the scanner's field, by value or by range."""

    def build(folder: Path, modality: str) -> Expected:
        slices = factory.make_slices(modality)
        mask = np.zeros((12, 10, len(slices)), dtype=bool)
        mask[:3, 0] = mask[0, 1] = True
        for k, ds in enumerate(slices):
            signed(ds, k)
            stored = factory.stored_pixels(ds).copy()
            stored[mask[:, :, k].T] = -32000
            if limit:
                stored[1, 0] = -31990
                ds.add_new("PixelPaddingRangeLimit", "SS", -31980)
            ds.add_new("PixelPaddingValue", "SS", -32000)
            factory.set_pixels(ds, stored)
        factory.write_series(folder, slices)
        return expected_of(slices, padding=mask)

    return build


def tilted(degrees: float, orientation: Sequence[float] = factory.AXIAL, resampled: bool = False) -> Build:
    lean = 2.5 * np.tan(np.radians(degrees))
    positions = factory.stack(orientation=orientation, lean=(0.0, float(lean)))

    def build(folder: Path, modality: str) -> Expected:
        slices = factory.make_slices(modality, orientation=orientation, positions=positions)
        factory.write_series(folder, slices)
        return expected_of(slices, regridded=resampled)

    return build


def jittered(along: float, sideways: float) -> Build:
    rng = np.random.default_rng(5)
    shift = np.c_[rng.uniform(-sideways, sideways, (8, 2)), along * (-1.0) ** np.arange(8)]
    return plain(positions=factory.stack() + shift)


def eight_bits(folder: Path, modality: str) -> Expected:
    """Odd numbers of rows and columns: the pixels end on a padding byte."""
    slices = factory.make_slices(modality, matrix=(9, 11))
    for ds in slices:
        values = factory.stored_pixels(ds) * 0.01 - 300
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
        ds.RescaleSlope, ds.RescaleIntercept = 0.5, -60.0
        factory.set_pixels(ds, np.rint((values + 60) / 0.5))
        ds.PixelData += b"\0" * (len(ds.PixelData) % 2)
        ds["PixelData"].VR = "OB"
    factory.write_series(folder, slices)
    return expected_of(slices)


def half_compressed(folder: Path, modality: str) -> Expected:
    slices = factory.make_slices(modality)
    for k, ds in enumerate(slices):
        encodings.encode(ds, ["RLE", "explicit", "JPEG-LS", "implicit"][k % 4])
    factory.write_series(folder, slices)
    return expected_of(slices)


MR_EDITS: dict[str, factory.Edit] = {
    "EchoTime absent": put(EchoTime=None),
    "EchoTime with other digits": per_slice(EchoTime=lambda k: 10.0 + 0.004 * (k % 2)),
    "second echo alone": put(EchoNumbers=2, EchoTime=80),
    "EchoNumbers absent": put(EchoNumbers=None),
    "one b-value": put(DiffusionBValue=800.0),
    "magnitude of a pair": put(ImageType=["ORIGINAL", "PRIMARY", "M", "ND"]),
    "RepetitionTime per slice": per_slice(RepetitionTime=lambda k: 500 + k),
}
CT_EDITS: dict[str, factory.Edit] = {
    "tube current and voltage per slice": per_slice(XRayTubeCurrent=lambda k: 200 + 10 * k, KVP=lambda k: 120 + k % 2),
    "RescaleType HU": put(RescaleType="HU"),
    "RescaleType US": put(RescaleType="US"),
    "GantryDetectorTilt 0": put(GantryDetectorTilt=0),
    "table position per slice": per_slice(TableHeight=lambda k: 100 + k, ExposureTime=lambda k: 500 + k),
}


def stored_only(folder: Path, modality: str) -> Expected:
    slices = factory.make_slices(modality)
    for ds in slices:
        del ds.RescaleSlope, ds.RescaleIntercept
    factory.write_series(folder, slices)
    return expected_of(slices, scale=(100.0, 30000.0))


def some_slices(count: int) -> Build:
    return plain(count=count)


def combined(seed: int) -> Build:
    """Some of everything at once."""
    rng = np.random.default_rng(seed)
    names = [
        str(n) for n in rng.choice([n for n in EDITS if not re.search("numbers|megabyte|minus zero", n)], 4, False)
    ]
    # An edit that changes how pixels are stored stands alone; encodings take what they can.
    orientation = list(ORIENTATIONS.values())[rng.integers(len(ORIENTATIONS))]
    encoding = str(rng.choice(["explicit", "implicit", "deflated", "RLE", "JPEG-LS", "JPEG 2000", "JPEG lossless"]))
    names = [n for n in names if encoding in ("explicit", "implicit", "deflated") or n not in STORED_OTHERWISE]
    about_thickness = [n for n in names if n.startswith("S")]
    names = [n for n in names if n not in about_thickness[1:]]  # each by itself can be; together they contradict
    spacing = tuple(float(v) for v in rng.choice([0.4, 0.7, 0.9, 1.3], 2, replace=False))
    name = str(rng.choice(["{:03d}.dcm", "IM{:04d}", "1.2.3.{}", "{}"]))

    def edit(ds: Dataset, k: int) -> None:
        for one in names:
            EDITS[one](ds, k)

    return plain(
        edit, encoding=encoding, name=name, seed=seed, orientation=orientation, pixel_spacing=spacing, matrix=(10, 12)
    )


STORED_OTHERWISE = {
    "15 bits stored in half, which hold the values",
    "32 bits",
    "mixed sign",
    "signed",
    "slope and intercept per slice",
    "negative slope",
    "icon image",
}

BASE: list[CleanVariant] = [
    *(v for word, o in ORIENTATIONS.items() for v in clean(word, plain(orientation=o))),
    *(v for word, edit in EDITS.items() for v in clean(
        word, plain(edit), tolerance=STEP_TOLERANCE, reason="half a step of the largest slope, 0.0135")),
    *(v for word, edit in MR_EDITS.items() for v in clean(word, plain(edit), only="MR")),
    *(v for word, edit in CT_EDITS.items() for v in clean(word, plain(edit), only="CT")),
    *(v for word in encodings.ENCODINGS for v in clean(f"encoded: {word}", plain(encoding=word))),
    *(v for word in encodings.CODECS for v in clean(
        f"signed, encoded: {word}", plain(signed, encoding=word))),
    *(v for high in (11, 13, 15) for sign in (False, True) for v in clean(
        f"12 {'signed' if sign else 'unsigned'} bits up to bit {high} beside overlay bits",
        plain(overlay_bits(high, sign)), tolerance=0.051, reason="values are stored in steps of 0.1")),
    *clean("half of the slices compressed", half_compressed),
    *clean("8 bits, odd matrix", eight_bits, tolerance=0.26, reason="values are stored in steps of 0.5"),
    *clean("padding value", padded(False)),
    *clean("padding range", padded(True)),
    *clean("no rescale tags", stored_only, only="MR", tolerance=0.6, reason="stored values are whole numbers"),
    *clean("pixels 4 times as high as wide", plain(pixel_spacing=(2.0, 0.5))),
    *clean("square matrix and pixels", plain(matrix=(12, 12), pixel_spacing=(0.8, 0.8))),
    *clean("thin slices", plain(gap=0.3)),
    *clean("thick slices", plain(gap=10.0, count=5)),
    *clean("100 slices", plain(count=100, matrix=(4, 5), gap=1.0)),
    *clean("matrix of one column", plain(matrix=(10, 1))),
    *clean("three slices", some_slices(3)),
    *clean("single slice where the policy admits it", some_slices(1), min_slices=1),
    *clean("two slices where the policy admits them", some_slices(2), min_slices=2),
    *clean("as many slices as the protocol says", plain(), expected_slices=8, min_coverage_mm=20.0),
    *clean("a count that the policy does not trust", plain(put(ImagesInAcquisition=40)), trust_image_counts=False),
    *clean("jitter of 0.03 mm along", jittered(0.03, 0.0), tolerance=0.04 * 1.7 + TOLERANCE,
           reason="up to 0.04 mm against a fit, at 1.7 a mm"),
    *clean("jitter of 0.05 mm sideways", jittered(0.0, 0.05), tolerance=0.1 * 1.7 + TOLERANCE,
           reason="up to 0.1 mm against the mean, at 0.6 and 1.1 a mm"),
    *clean("positions of one decimal", plain(rounded("ImagePositionPatient", 1), gap=2.47, origin=(-20.03, 15.04,
    -30.0)),
           tolerance=0.1 * 3.4, reason="0.05 mm along each axis, against a fit through such positions"),
    *clean("cosines of four decimals", plain(rounded("ImageOrientationPatient", 4), orientation=factory.oblique()),
           tolerance=0.05, reason="0.00005 over 24 mm at 3.4 a mm, twice"),
    *(v for degrees in (-20, 2, 12, 30) for v in clean(f"gantry tilt of {degrees}°", tilted(degrees))),
    *clean("gantry tilt, coronal", tilted(15, factory.CORONAL)),
    *clean("gantry tilt, oblique", tilted(9, factory.oblique())),
    *clean("gantry tilt, resampled", tilted(12, resampled=True), gantry_tilt="resample"),
    *clean("enhanced", multiframe()),
    *clean("enhanced, all groups per frame", multiframe(shared=False)),
    *clean("enhanced, frames in any order", multiframe(order=SHUFFLED)),
    *clean("enhanced, frames reversed, groups per frame", multiframe(order=list(range(7, -1, -1)), shared=False)),
    *clean("enhanced, slope per frame", multiframe(EDITS["slope and intercept per slice"], order=SHUFFLED),
           tolerance=STEP_TOLERANCE, reason="half a step of the largest slope, 0.0135"),
    *clean("enhanced, signed", multiframe(signed)),
    *clean("enhanced, oblique", multiframe(orientation=factory.oblique(), order=SHUFFLED)),
    *clean("enhanced, sagittal", multiframe(orientation=factory.SAGITTAL)),
    *clean("enhanced, tilted", multiframe(positions=factory.stack(lean=(0.0, 0.4)))),
    *clean("enhanced, one time point", multiframe(put(TemporalPositionIdentifier=1))),
    *clean("legacy converted", multiframe(legacy=True)),
    *clean("legacy converted, frames in any order", multiframe(legacy=True, order=SHUFFLED, shared=False)),
    *(v for word in ("implicit", "deflated", "big endian", *encodings.CODECS) for v in clean(
        f"enhanced, encoded: {word}", multiframe(encoding=word, order=SHUFFLED))),
    *clean("concatenation of two", multiframe(sizes=[4, 4])),
    *clean("concatenation of three, frames in any order", multiframe(sizes=[3, 3, 2], order=SHUFFLED)),
    *clean("concatenation of eight", multiframe(sizes=[1] * 8, shared=False)),
    *(v for seed in range(15) for v in clean(
        f"combination {seed + 1}", combined(seed), tolerance=2 * STEP_TOLERANCE, reason="stored twice")),
]  # fmt: skip

CLEAN: dict[str, CleanVariant] = {variant.name: variant for variant in [*BASE, *neighbour_variants()]}
assert len(CLEAN) == len(BASE) + len(neighbour_variants()), "two variants of one name"
