"""Faults of pixels and of what they mean."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import JPEG2000

from . import dicom_encodings as encodings
from . import dicom_factory as factory
from .fault_kinds import COUNT, PLACES, Fault, Write, at, build, fault, in_places, put, raw, series

__all__ = ["VALUE_FAULTS"]


def rgb(ds: Dataset, k: int) -> None:
    grey = np.linspace(0, 255, ds.Rows * ds.Columns).astype(np.uint8)
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
    ds.PixelData = np.repeat(grey, 3).tobytes()
    ds["PixelData"].VR = "OB"


def dose_screen(ds: Dataset, k: int) -> None:
    """A secondary capture as scanners add them: no geometry."""
    ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    ds.ImageType, ds.ConversionType = ["DERIVED", "SECONDARY", "SCREEN SAVE"], "WSD"
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        delattr(ds, keyword)


def cut(count: int) -> factory.Edit:
    def edit(ds: Dataset, k: int) -> None:
        ds.PixelData = ds.PixelData[:-count]

    return edit


def extended(ds: Dataset, k: int) -> None:
    ds.PixelData = ds.PixelData + bytes(24)


def palette(ds: Dataset, k: int) -> None:
    ds.PhotometricInterpretation = "PALETTE COLOR"
    for name in ("Red", "Green", "Blue"):
        setattr(ds, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 16])
        setattr(ds, f"{name}PaletteColorLookupTableData", bytes(512))


def modality_lut(ds: Dataset, k: int) -> None:
    lut = Dataset()
    lut.add_new("LUTDescriptor", "US", [256, 0, 16])
    lut.ModalityLUTType = "US"
    lut.add_new("LUTData", "OW", np.arange(256, dtype="<u2").tobytes())
    ds.ModalityLUTSequence = DicomSequence([lut])


def only_padding(ds: Dataset, k: int) -> None:
    factory.set_pixels(ds, np.full((ds.Rows, ds.Columns), 9))
    ds.add_new("PixelPaddingValue", "US", 9)


def fewer_bits(ds: Dataset, k: int) -> None:
    """Bits of the value lie outside the stored ones that the header names."""
    ds.BitsStored, ds.HighBit = 12, 11


def wrong_sign(ds: Dataset, k: int) -> None:
    values = factory.stored_pixels(ds).astype(int) + 20000
    ds.RescaleIntercept = float(ds.RescaleIntercept) - 200
    factory.set_pixels(ds, values)
    ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 14, 13, 1


def encoded(name: str, places: range | list[int], edit: Callable[[Dataset], None], intercept: float = -300.0) -> Write:
    """A series in one encoding, some of its slices damaged after encoding."""

    def change(slices: list[Dataset]) -> list[Dataset]:
        for k, ds in enumerate(slices):
            encodings.encode(ds, name)
            if k in places:
                edit(ds)
        return slices

    return series(change=change, intercept=intercept)


def halved(ds: Dataset) -> None:
    frame = encodings.codestreams(ds)[0]
    encodings.set_codestreams(ds, [frame[: len(frame) // 4 * 2]])


def no_frame(ds: Dataset) -> None:
    encodings.set_codestreams(ds, [b"\0\0"])


def garbled(ds: Dataset) -> None:
    frame = encodings.codestreams(ds)[0]
    noise = np.random.default_rng(0).bytes(len(frame))
    encodings.set_codestreams(ds, [noise])


def exchanged(ds: Dataset) -> None:
    """Rows and Columns exchanged in the header; the codestream knows better."""
    ds.Rows, ds.Columns = ds.Columns, ds.Rows


def two_frames_in_one(ds: Dataset) -> None:
    frame = encodings.codestreams(ds)[0]
    encodings.set_codestreams(ds, [frame, frame])


def wrong_syntax(ds: Dataset) -> None:
    frame = encodings.codestreams(ds)[0]
    encodings.set_syntax(ds, "1.2.840.10008.1.2.4.80")
    encodings.set_codestreams(ds, [frame])


def called_uncompressed(ds: Dataset) -> None:
    encodings.set_syntax(ds, "1.2.840.10008.1.2.1")


def called_run_length(ds: Dataset) -> None:
    encodings.set_syntax(ds, "1.2.840.10008.1.2.5")
    encodings.set_codestreams(ds, [ds.PixelData])


def twelve_bits(ds: Dataset) -> None:
    ds.BitsStored, ds.HighBit = 12, 11


def eight_bits(ds: Dataset) -> None:
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7


def called_signed(ds: Dataset) -> None:
    ds.PixelRepresentation = 1


def floating(ds: Dataset, k: int) -> None:
    ds.FloatPixelData = (factory.stored_pixels(ds) * 0.01).astype("<f4").tobytes()
    ds.BitsAllocated = 32
    del ds.PixelData, ds.BitsStored, ds.HighBit, ds.PixelRepresentation


def undecodable(uid: str) -> factory.Edit:
    def edit(ds: Dataset, k: int) -> None:
        encodings.set_syntax(ds, uid)
        encodings.set_codestreams(ds, [bytes(64)])

    return edit


def lossy(ds: Dataset, k: int) -> None:
    ds.LossyImageCompression, ds.LossyImageCompressionRatio = "01", 8


def lossy_codestream(ds: Dataset, k: int) -> None:
    encodings.compress(ds, JPEG2000)
    lossy(ds, k)


def with_codecs() -> list[Fault]:
    faults = []
    for name in encodings.CODECS:
        for word, place in (("first", [0]), ("last", [7])):
            faults.append(
                fault(f"{name} codestream cut: {word} slice", "pixel_data_corrupt|pixel_data_truncated",
                      encoded(name, place, halved))
            )  # fmt: skip
        faults.append(fault(f"{name} codestream is noise", "pixel_data_corrupt", encoded(name, [3], garbled)))
        if name != "RLE":  # which has no size of its own
            faults.append(
                fault(f"{name}: rows and columns exchanged in the header", "pixel_data_corrupt",
                      encoded(name, range(COUNT), exchanged))
            )  # fmt: skip
    return faults


def half_rescaled(ds: Dataset, k: int) -> None:
    if k >= 4:
        put(RescaleSlope=None, RescaleIntercept=None)(ds, k)


NO_RESCALE = put(RescaleSlope=None, RescaleIntercept=None)

VALUE_FAULTS = build(
    # kind of picture
    fault("RGB capture", "colour", series(rgb), tells=False),
    in_places("RGB capture", "colour|mixed_photometric|mixed_pixel_format", rgb, tells=False),
    fault("palette", "colour", series(palette), tells=False),
    fault("secondary captures only", "not_ct_or_mr_image", series(dose_screen), slices=None),
    fault("secondary capture class with geometry", "not_ct_or_mr_image",
          series(put(SOPClassUID="1.2.840.10008.5.1.4.1.1.7")), tells=False),
    fault("modality not accepted by default", "modality", series(put(Modality="PT")), tells=False),
    fault("modality not accepted by the task: MR", "modality", series(), only="MR", modalities=("CT",), tells=False),
    fault("modality not accepted by the task: CT", "modality", series(), only="CT", modalities=("MR",), tells=False),
    fault("a name as modality", "modality", series(put(Modality="CANARY")), tells=False),
    fault("no modality", "modality", series(put(Modality=None)), tells=False),
    fault("burned-in annotation", "burned_in", series(put(BurnedInAnnotation="YES")), tells=False),
    in_places("burned-in annotation", "burned_in", put(BurnedInAnnotation="YES"), tells=False),
    fault("photometric interpretation absent", "photometric", series(put(PhotometricInterpretation=None)), tells=False),
    fault("photometric interpretation unknown", "photometric", series(put(PhotometricInterpretation="MONOCHROME3")),
          tells=False),
    in_places("another photometric interpretation", "mixed_photometric", put(PhotometricInterpretation="MONOCHROME1"),
              tells=False),
    # amount of pixels
    in_places("no pixel data", "pixel_data_absent", put(PixelData=None)),
    in_places("empty pixel data", "pixel_data_absent|pixel_data_truncated", put(PixelData=b"")),
    in_places("too few pixels", "pixel_data_truncated", cut(20)),
    fault("one row too few", "pixel_data_truncated", series(at(7, cut(24)))),
    in_places("too many pixels", "pixel_data_excess", extended),
    fault("floating-point pixels", "pixel_data_absent|pixel_format|not_ct_or_mr_image", series(at(7, floating))),
    # bit layout
    fault("no rows", "pixel_format", series(put(Rows=None))),
    fault("rows zero", "pixel_format", series(put(Rows=0))),
    fault("no bits allocated", "pixel_format", series(at(7, put(BitsAllocated=None)))),
    fault("more bits stored than allocated", "pixel_format", series(put(BitsStored=17))),
    fault("high bit below the stored bits", "pixel_format", series(put(BitsStored=12, HighBit=3))),
    fault("pixel representation 7", "pixel_format", series(at(0, put(PixelRepresentation=7)))),
    fault("sign absent", "pixel_format", series(at(3, put(PixelRepresentation=None)))),
    in_places("stored bits do not hold the value", "mixed_pixel_format", fewer_bits),
    fault("sign and bits differ and bits lie outside", "mixed_pixel_format", series(at(4, wrong_sign))),
    # compressed
    with_codecs(),
    fault("encapsulated nothing", "pixel_data_corrupt|pixel_data_truncated|pixel_data_absent",
          encoded("RLE", [7], no_frame)),
    fault("two codestreams for one frame", "pixel_data_excess|pixel_data_corrupt",
          encoded("JPEG 2000", [3], two_frames_in_one)),
    fault("transfer syntax of another codec", "pixel_data_corrupt", encoded("JPEG 2000", range(COUNT), wrong_syntax)),
    fault("encapsulated under an uncompressed syntax", "pixel_data_corrupt|pixel_data_truncated|pixel_data_excess",
          encoded("JPEG-LS", [7], called_uncompressed)),
    fault("uncompressed under the syntax of a codec", "pixel_data_corrupt|pixel_data_truncated",
          encoded("explicit", [7], called_run_length)),
    *(fault(f"{name}: bits stored contradict the codestream", "pixel_data_corrupt|mixed_pixel_format",
            encoded(name, range(COUNT), twelve_bits)) for name in ("JPEG 2000", "JPEG-LS", "JPEG lossless")),
    *(fault(f"{name}: bits allocated contradict the codestream", "pixel_data_corrupt|pixel_format",
            encoded(name, range(COUNT), eight_bits)) for name in encodings.CODECS),
    fault("JPEG 2000: sign contradicts the codestream", "pixel_data_corrupt|pixel_format",
          encoded("JPEG 2000", range(COUNT), called_signed, intercept=-400.0)),
    fault("MPEG2", "transfer_syntax", series(undecodable("1.2.840.10008.1.2.4.100"))),
    fault("unknown transfer syntax", "transfer_syntax", series(at(3, undecodable("1.2.3.4.5")))),
    fault("lossy, which the policy forbids", "lossy", series(lossy), accept_lossy=False, tells=False),
    fault("lossy: last slice, which the policy forbids", "lossy", series(at(7, lossy)), accept_lossy=False,
          tells=False),
    fault("lossy codestream, which the policy forbids", "lossy", series(lossy_codestream), accept_lossy=False,
          tells=False),
    # meaning
    *(fault(f"rescale tags absent: {word} slice", "rescale_partly_absent", series(at(place, NO_RESCALE)))
      for word, place in PLACES.items()),
    fault("rescale tags absent in half", "rescale_partly_absent", series(half_rescaled)),
    fault("RescaleSlope alone absent: last slice", "rescale_partly_absent", series(at(7, put(RescaleSlope=None)))),
    fault("RescaleIntercept alone absent: first slice", "rescale_partly_absent",
          series(at(0, put(RescaleIntercept=None)))),
    fault("RescaleIntercept absent in all", "rescale_partly_absent", series(put(RescaleIntercept=None))),
    fault("rescale tags absent in all", "rescale_absent", series(NO_RESCALE), only="CT"),
    fault("another quantity than Hounsfield units", "not_hounsfield", series(put(RescaleType="CANARY")), only="CT",
          tells=False),
    fault("rescale NaN", "bad_rescale", series(at(4, raw("RescaleSlope", "nan")))),
    fault("rescale intercept infinite", "bad_rescale", series(at(7, raw("RescaleIntercept", "inf")))),
    in_places("rescale slope zero", "bad_rescale", put(RescaleSlope=0)),
    fault("rescale overflows", "bad_values", series(at(4, put(RescaleSlope=1e38)))),
    fault("text as rescale slope", "bad_tag", series(at(4, raw("RescaleSlope", "CANARY")))),
    fault("two rescale slopes", "bad_tag", series(at(4, raw("RescaleSlope", "0.01\\0.02")))),
    fault("modality LUT", "modality_lut", series(modality_lut), tells=False),
    fault("modality LUT: last slice", "modality_lut", series(at(7, modality_lut)), tells=False),
    fault("only padding", "only_padding", series(only_padding), slices=None),
)  # fmt: skip
