"""One DICOM image in every encoding the reader should know."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

__all__ = ["CODECS", "ENCODINGS", "codestreams", "compress", "encode", "set_codestreams", "set_syntax"]

PLAIN = {
    "implicit": ImplicitVRLittleEndian,
    "deflated": DeflatedExplicitVRLittleEndian,
    "big endian": ExplicitVRBigEndian,
}
CODECS = {
    "RLE": RLELossless,
    "JPEG 2000": JPEG2000Lossless,
    "JPEG-LS": JPEGLSLossless,
    "JPEG lossless": JPEGLosslessSV1,
}


def set_syntax(ds: Dataset, syntax: str) -> None:
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)


def set_codestreams(ds: Dataset, frames: list[bytes], *, fragments: int = 1, offsets: bool = True) -> None:
    ds.PixelData = encapsulate(frames, fragments_per_frame=fragments, has_bot=offsets)
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True


def codestreams(ds: Dataset) -> list[bytes]:
    return list(generate_frames(ds.PixelData, number_of_frames=int(ds.get("NumberOfFrames", 1))))


def _with_gdcm(ds: Dataset, syntax: str) -> list[bytes]:
    # Only GDCM writes the original lossless JPEG, and JPEG 2000 of so few rows; it works on files.
    import gdcm

    from .dicom_factory import save

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "a.dcm"), Path(folder, "b.dcm")
        plain = copy.deepcopy(ds)
        set_syntax(plain, ExplicitVRLittleEndian)
        save(plain, source)
        reader = gdcm.ImageReader()
        reader.SetFileName(str(source))
        assert reader.Read()
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(syntax)))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer = gdcm.ImageWriter()
        writer.SetFileName(str(target))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
        return codestreams(pydicom.dcmread(target))


def compress(ds: Dataset, syntax: str, **layout: int | bool) -> None:
    if syntax in (JPEGLosslessSV1, JPEG2000, JPEG2000Lossless):
        frames = _with_gdcm(ds, syntax)
    else:
        set_syntax(ds, ExplicitVRLittleEndian)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ds.compress(syntax, generate_instance_uid=False)
        frames = codestreams(ds)
    set_syntax(ds, syntax)
    set_codestreams(ds, frames, **layout)  # type: ignore[arg-type]


def encode(ds: Dataset, name: str) -> None:
    """Change an uncompressed little endian image in place to one of ENCODINGS."""
    ENCODINGS[name](ds)


def _plain(name: str) -> Callable[[Dataset], None]:
    def change(ds: Dataset) -> None:
        set_syntax(ds, PLAIN[name])
        if name == "big endian" and ds.BitsAllocated > 8:
            ds.PixelData = np.frombuffer(ds.PixelData, f"<u{ds.BitsAllocated // 8}").byteswap().tobytes()

    return change


def _codec(name: str, **layout: int | bool) -> Callable[[Dataset], None]:
    return lambda ds: compress(ds, CODECS[name], **layout)


ENCODINGS: dict[str, Callable[[Dataset], None]] = {
    "explicit": lambda ds: set_syntax(ds, ExplicitVRLittleEndian),
    **{name: _plain(name) for name in PLAIN},
    **{name: _codec(name) for name in CODECS},
    "RLE without offset table": _codec("RLE", offsets=False),
    "JPEG 2000 in three fragments": _codec("JPEG 2000", fragments=3),
    "JPEG-LS in two fragments without offset table": _codec("JPEG-LS", fragments=2, offsets=False),
    "JPEG lossless in two fragments": _codec("JPEG lossless", fragments=2),
    "JPEG lossless without offset table": _codec("JPEG lossless", offsets=False),
}
