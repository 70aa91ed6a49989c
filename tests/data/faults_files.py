"""Faults of files: emptied, cut, overwritten, lying about their size, or no images at all."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian

from . import dicom_encodings as encodings
from . import dicom_factory as factory
from .fault_kinds import COUNT, PLACES, Fault, at, build, fault, put, series

__all__ = ["FILE_FAULTS", "NAMES", "directory_of", "named"]


def _hex_name(k: int) -> str:
    return np.random.default_rng(100 + k).bytes(16).hex()


# How people's exports call files; the last two have nothing by which siblings know each other.
NAMES: dict[str, Callable[[int], str]] = {
    "named .dcm": lambda k: f"slice{k:03d}.dcm",
    "named like siblings without extension": lambda k: f"IM{k:04d}",
    "named by UID": lambda k: f"{factory.ROOT}.1.{k + 1}",
    "of random hex name": _hex_name,
}


def named(modality: str, folder: Path, name: Callable[[int], str]) -> list[Path]:
    return [factory.save(ds, folder / name(k)) for k, ds in enumerate(factory.make_slices(modality))]


def damaged(place: int, name: Callable[[int], str], damage: Callable[[bytes], bytes]) -> Callable[[Path, str], None]:
    """A series in which one file's bytes are changed."""

    def write(folder: Path, modality: str) -> None:
        path = named(modality, folder, name)[place]
        path.write_bytes(damage(path.read_bytes()))

    return write


def cut_at(share: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(len(content) * share)]


def no_prefix(content: bytes) -> bytes:
    return content[:128] + b"XXXX" + content[132:]


def pixels_start(content: bytes) -> int:
    return content.rindex(b"\xe0\x7f\x10\x00")


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "zero-byte file": ("empty_file", lambda content: b""),
    "file of zeros": ("unreadable_file", lambda content: bytes(len(content))),
    "DICM prefix destroyed": ("unreadable_file", no_prefix),
    "preamble lost": ("unreadable_file", lambda content: content[128:]),
    "cut after the prefix": ("unreadable_file|uid_absent", lambda content: content[:132]),
    "cut in the file meta": ("unreadable_file|uid_absent", lambda content: content[:250]),
    "cut in the header": (
        "unreadable_file|pixel_data_absent|uid_absent",
        lambda content: content[: pixels_start(content) // 2],
    ),
    "cut before the pixels": (
        "unreadable_file|pixel_data_absent",
        lambda content: content[: pixels_start(content)],
    ),
    "cut in the pixels": (
        "pixel_data_truncated|unreadable_file",
        lambda content: content[: pixels_start(content) + 99],
    ),
    "last byte lost": ("pixel_data_truncated|unreadable_file", lambda content: content[:-1]),
    "web page instead of a file": ("unreadable_file", lambda content: b"<html><body>404 CANARY</body></html>\n" * 20),
}


def damages() -> list[Fault]:
    found = []
    for damage, (codes, change) in DAMAGES.items():
        for style, name in NAMES.items():
            # A last slice is the one whose loss leaves a volume that looks whole.
            for word in ("middle", "last") if style == "named .dcm" else ("last",):
                # Nothing ties a page of HTML under a random name to the series.
                if damage.startswith("web page") and style == "of random hex name":
                    continue
                found.append(fault(f"{damage}, {style}: {word} slice", codes, damaged(PLACES[word], name, change)))
    return found


def compressed_file_cut(folder: Path, modality: str) -> None:
    slices = factory.make_slices(modality)
    for ds in slices:
        encodings.encode(ds, "JPEG-LS")
    factory.write_series(folder, slices)
    path = folder / "000.dcm"
    path.write_bytes(path.read_bytes()[:-60])


def deflated_file_cut(folder: Path, modality: str) -> None:
    slices = factory.make_slices(modality)
    for ds in slices:
        encodings.encode(ds, "deflated")
    factory.write_series(folder, slices)
    path = folder / "000.dcm"
    path.write_bytes(path.read_bytes()[:-40])


def deflate_bomb(folder: Path, modality: str) -> None:
    """300 MiB in the header of the last slice, packed to 300 KiB."""
    slices = factory.make_slices(modality)
    ds = slices[-1]
    ds.add_new(0x00091001, "OB", bytes(8))
    encodings.set_syntax(ds, DeflatedExplicitVRLittleEndian)
    factory.write_series(folder, slices[:-1])
    path = factory.save(ds, folder / "last.dcm")
    content = path.read_bytes()
    # The file meta's group length says where the deflated part starts.
    start = 144 + int.from_bytes(content[140:144], "little")
    plain = zlib.decompress(content[start:], -zlib.MAX_WBITS)
    marker = b"\x09\x00\x01\x10OB\0\0"
    assert plain.count(marker) == 1
    size = 300 << 20
    before, after = plain.split(marker)
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    packed = packer.compress(before + marker + size.to_bytes(4, "little"))
    for _ in range(300):
        packed += packer.compress(bytes(1 << 20))
    packed += packer.compress(after[4 + 8 :]) + packer.flush()
    path.write_bytes(content[:start] + packed)


def codestream_bomb(name: str, honest: bool) -> Callable[[Path, str], None]:
    """A codestream that declares 60000 × 60000 pixels in 200 bytes; `honest`: the header says so too."""

    def write(folder: Path, modality: str) -> None:
        slices = factory.make_slices(modality)
        for k, ds in enumerate(slices):
            encodings.encode(ds, name)
            if k == COUNT - 1:
                frame = bytearray(encodings.codestreams(ds)[0])
                size = 60000
                if name == "JPEG 2000":
                    for start in (8, 12, 24, 28):  # Xsiz, Ysiz, XTsiz, YTsiz of the SIZ marker
                        frame[start : start + 4] = size.to_bytes(4, "big")
                else:
                    start = next(frame.index(marker) for marker in (b"\xff\xf7", b"\xff\xc3") if marker in frame)
                    frame[start + 5 : start + 9] = size.to_bytes(2, "big") * 2
                encodings.set_codestreams(ds, [bytes(frame)])
            if honest:
                ds.Rows = ds.Columns = 60000
        factory.write_series(folder, slices)

    return write


def run_length_bomb(folder: Path, modality: str) -> None:
    """Two million pixels for a picture of 120."""
    slices = factory.make_slices(modality)
    for ds in slices:
        encodings.encode(ds, "RLE")
    segment = b"\x81\x07" * 16000
    header = np.array([2, 64, 64 + len(segment), *[0] * 13], dtype="<u4").tobytes()
    encodings.set_codestreams(slices[-1], [header + segment * 2])
    factory.write_series(folder, slices)


def directory_of(folder: Path, slices: list[Dataset], names: list[str]) -> None:
    """A DICOMDIR that lists the given files, written by hand: it may list what is not there."""
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.1.3.10", f"{factory.ROOT}.8"
    ds.FileSetID = "CANARY"
    ds.OffsetOfTheFirstDirectoryRecordOfTheRootDirectoryEntity = 0
    ds.OffsetOfTheLastDirectoryRecordOfTheRootDirectoryEntity = 0
    ds.FileSetConsistencyFlag = 0
    records = []

    def record(kind: str) -> Dataset:
        item = Dataset()
        item.OffsetOfTheNextDirectoryRecord = item.OffsetOfReferencedLowerLevelDirectoryEntity = 0
        item.RecordInUseFlag, item.DirectoryRecordType = 0xFFFF, kind
        records.append(item)
        return item

    first = slices[0]
    patient, study, group = record("PATIENT"), record("STUDY"), record("SERIES")
    patient.PatientID, patient.PatientName = first.PatientID, first.PatientName
    study.StudyInstanceUID = first.StudyInstanceUID
    group.SeriesInstanceUID, group.Modality = first.SeriesInstanceUID, first.Modality
    for one, name in zip(slices, names, strict=True):
        image = record("IMAGE")
        image.ReferencedFileID = [name]
        image.ReferencedSOPClassUIDInFile, image.ReferencedSOPInstanceUIDInFile = one.SOPClassUID, one.SOPInstanceUID
        image.ReferencedTransferSyntaxUIDInFile = "1.2.840.10008.1.2.1"
        image.InstanceNumber = one.InstanceNumber
    ds.DirectoryRecordSequence = records
    factory.save(ds, folder / "DICOMDIR")
    # Offsets are of fixed width, so records stay where they are when these are filled in.
    levels = ["PATIENT", "STUDY", "SERIES", "IMAGE"]
    places = [r.seq_item_tell for r in pydicom.dcmread(folder / "DICOMDIR").DirectoryRecordSequence]
    depths = [levels.index(record.DirectoryRecordType) for record in records]
    for k, record in enumerate(records):
        later = [j for j in range(k + 1, len(records)) if depths[j] <= depths[k]]
        if later and depths[later[0]] == depths[k]:
            record.OffsetOfTheNextDirectoryRecord = places[later[0]]
        if k + 1 < len(records) and depths[k + 1] > depths[k]:
            record.OffsetOfReferencedLowerLevelDirectoryEntity = places[k + 1]
    factory.save(ds, folder / "DICOMDIR")


def fewer_than_the_directory(place: int) -> Callable[[Path, str], None]:
    def write(folder: Path, modality: str) -> None:
        slices = factory.make_slices(modality)
        names = [f"IM{k:04d}" for k in range(COUNT)]
        for ds, name in zip(slices, names, strict=True):
            factory.save(ds, folder / name)
        directory_of(folder, slices, names)
        (folder / names[place]).unlink()

    return write


def rows_times_100(ds: Dataset, k: int) -> None:
    ds.Rows = ds.Rows * 100


def immense(ds: Dataset, k: int) -> None:
    ds.Rows = ds.Columns = 65535


def nothing(folder: Path, modality: str) -> None:
    pass


def only_junk(folder: Path, modality: str) -> None:
    (folder / "README.txt").write_text("CANARY")
    (folder / "Thumbs.db").write_bytes(bytes(300))


def only_reports(folder: Path, modality: str) -> None:
    for number, class_uid in enumerate(["1.2.840.10008.5.1.4.1.1.88.22", "1.2.840.10008.5.1.4.1.1.11.1"]):
        other = Dataset()
        other.SOPClassUID, other.SOPInstanceUID = class_uid, f"{factory.ROOT}.9.{number}"
        other.SeriesInstanceUID, other.PatientID, other.Modality = f"{factory.ROOT}.9", factory.CANARY, "SR"
        factory.save(other, folder / f"other{number}.dcm")


def only_a_directory(folder: Path, modality: str) -> None:
    slices = factory.make_slices(modality)
    directory_of(folder, slices, [f"IM{k:04d}" for k in range(COUNT)])


TRUNCATED = "pixel_data_truncated|too_large"
BOMB = "pixel_data_corrupt|decode_limit|too_large"

FILE_FAULTS = build(
    damages(),
    fault("compressed file cut", "pixel_data_corrupt|pixel_data_truncated|unreadable_file", compressed_file_cut),
    fault("deflated file cut", "unreadable_file|pixel_data_truncated", deflated_file_cut),
    fault("first file gone that DICOMDIR lists", "truncated_series", fewer_than_the_directory(0)),
    fault("last file gone that DICOMDIR lists", "truncated_series", fewer_than_the_directory(7)),
    # size
    fault("rows × 100 in the header", TRUNCATED, series(rows_times_100)),
    *(fault(f"rows × 100 in the header: {word} slice", f"{TRUNCATED}|mixed_matrix", series(at(place, rows_times_100)))
      for word, place in PLACES.items()),
    fault("65535 × 65535 in the header", TRUNCATED, series(immense)),
    fault("a row fewer in the header", "pixel_data_excess", series(put(Rows=9))),
    fault("8 bits allocated for 16", "pixel_data_excess", series(put(BitsAllocated=8, BitsStored=8, HighBit=7))),
    fault("32 bits allocated for 16", "pixel_data_truncated", series(put(BitsAllocated=32, BitsStored=32, HighBit=31))),
    # bombs
    fault("deflate bomb", "too_large|decode_limit", deflate_bomb),
    *(fault(f"{name} bomb", BOMB, codestream_bomb(name, False)) for name in ("JPEG 2000", "JPEG-LS", "JPEG lossless")),
    *(fault(f"{name} bomb with a header that agrees", BOMB, codestream_bomb(name, True))
      for name in ("JPEG 2000", "JPEG-LS", "JPEG lossless")),
    fault("run-length bomb", BOMB, run_length_bomb),
    # nothing
    fault("empty folder", "no_images", nothing, slices=None),
    fault("only junk", "no_images", only_junk, slices=None),
    fault("only a report and a presentation state", "no_images", only_reports, slices=None),
    fault("only a DICOMDIR", "no_images", only_a_directory, slices=None),
)  # fmt: skip
