"""Clean variants by what else lies in the folder, and by how the files are called."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from bundle.data.policy import SeriesRules

from . import dicom_factory as factory
from .clean_kinds import Build, CleanVariant, clean, expected_of
from .fault_kinds import COUNT, another_contrast, put
from .faults_files import NAMES, directory_of
from .faults_mixtures import localizer_slice
from .faults_values import dose_screen
from .volume_oracle import Expected

__all__ = ["neighbour_variants"]

Beside = Callable[[Path, list[Dataset]], None]


def beside(
    *neighbours: Beside, edit: factory.Edit | None = None, name: Callable[[int], str] | None = None, **kwargs: object
) -> Build:
    """A series among other files."""

    def build(folder: Path, modality: str) -> Expected:
        slices = factory.make_slices(modality, **kwargs)  # type: ignore[arg-type]
        for k, ds in enumerate(slices):
            if edit is not None:
                edit(ds, k)
        if name is None:
            factory.write_series(folder, slices)
        else:
            for k, ds in enumerate(slices):
                target = folder / name(k)
                target.parent.mkdir(exist_ok=True)
                factory.save(ds, target)
        for neighbour in neighbours:
            neighbour(folder, slices)
        return expected_of(slices)

    return build


def localizer_series(folder: Path, slices: list[Dataset]) -> None:
    for k, ds in enumerate(factory.make_slices(str(slices[0].Modality), count=3, series=3)):
        localizer_slice(ds, k)
        ds.ImagePositionPatient[1] = 20.0 + 15 * k
        factory.save(ds, folder / f"scout{k}.dcm")


def pixelless(folder: Path, class_uid: str, modality: str, name: str) -> None:
    other = Dataset()
    other.SOPClassUID, other.SOPInstanceUID = class_uid, f"{factory.ROOT}.9.{zlib.crc32(name.encode())}"
    other.SeriesInstanceUID, other.StudyInstanceUID = f"{factory.ROOT}.9", f"{factory.ROOT}.0"
    other.PatientID = other.PatientName = factory.CANARY
    other.Modality = modality
    factory.save(other, folder / name)


def report(folder: Path, slices: list[Dataset]) -> None:
    pixelless(folder, "1.2.840.10008.5.1.4.1.1.88.22", "SR", "report.dcm")


def presentation_state(folder: Path, slices: list[Dataset]) -> None:
    pixelless(folder, "1.2.840.10008.5.1.4.1.1.11.1", "PR", "state.dcm")


def dicomdir(folder: Path, slices: list[Dataset]) -> None:
    directory_of(folder, slices, [f"{k:03d}" for k in range(len(slices))])


def dose_report(folder: Path, slices: list[Dataset]) -> None:
    ds = factory.make_slices(str(slices[0].Modality), count=1, series=4)[0]
    dose_screen(ds, 0)
    factory.save(ds, folder / "dose.dcm")


def colour_capture(folder: Path, slices: list[Dataset]) -> None:
    from .faults_values import rgb

    ds = factory.make_slices(str(slices[0].Modality), count=1, series=5)[0]
    dose_screen(ds, 0)
    rgb(ds, 0)
    factory.save(ds, folder / "capture.dcm")


def junk(folder: Path, slices: list[Dataset]) -> None:
    (folder / "README.txt").write_text("notes")
    (folder / "empty.txt").touch()
    (folder / "Thumbs.db").write_bytes(bytes(300))
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1" + bytes(200))
    (folder / "facts.json").write_text(json.dumps({"key": 1}))
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    for path in [p for p in folder.iterdir() if p.suffix == ".dcm"][:3]:
        (folder / f"._{path.name}").write_bytes(b"\x00\x05\x16\x07" + bytes(500))


def copies(folder: Path, slices: list[Dataset]) -> None:
    for path in sorted(p for p in folder.iterdir() if p.suffix == ".dcm")[:3]:
        shutil.copy(path, folder / f"copy of {path.name}")


def copies_with(edit: factory.Edit) -> Beside:
    """Copies that differ only in tags that say how the file came here."""

    def write(folder: Path, slices: list[Dataset]) -> None:
        for k in (0, 4, 7):
            edit(slices[k], k)
            factory.save(slices[k], folder / f"again{k}.dcm")

    return write


def other_meta(ds: Dataset, k: int) -> None:
    ds.file_meta.SourceApplicationEntityTitle = "CANARY"
    ds.file_meta.ImplementationVersionName = "OTHER"


def retrieved(ds: Dataset, k: int) -> None:
    ds.RetrieveAETitle, ds.InstanceAvailability = "CANARY", "ONLINE"


def private_remark(ds: Dataset, k: int) -> None:
    ds.private_block(0x0011, "CANARY PACS", create=True).add_new(0x01, "LO", "archived")


def second_series(edit: factory.Edit | None = None, **kwargs: object) -> Beside:
    def write(folder: Path, slices: list[Dataset]) -> None:
        second = factory.make_slices(str(slices[0].Modality), **{"series": 2, **kwargs})  # type: ignore[arg-type]
        for k, ds in enumerate(second):
            another_contrast(ds, k)
            if edit is not None:
                edit(ds, k)
        factory.write_series(folder, second, name="second{:03d}.dcm")

    return write


def mr_beside_ct(folder: Path, slices: list[Dataset]) -> None:
    other = "MR" if slices[0].Modality == "CT" else "CT"
    factory.write_series(folder, factory.make_slices(other, series=2), name="other{:03d}.dcm")


def chosen(words: str, neighbour: Beside, edit: factory.Edit | None = None, **rules: object) -> list[CleanVariant]:
    return list(
        clean(f"chosen by {words}", beside(neighbour, edit=edit), series=SeriesRules(**rules))  # type: ignore[arg-type]
    )


def half_in(k: int) -> str:
    return f"{'a' if k < 4 else 'b'}/IM{k:04d}"


def neighbour_variants() -> list[CleanVariant]:
    """All of them."""
    thin = np.array(range(16))
    return [
        *(v for word, name in NAMES.items() for v in clean(f"files {word}", beside(name=name))),
        *clean("files of random hex name beside junk", beside(junk, name=NAMES["of random hex name"])),
        *clean("files named by UID with suffix", beside(name=lambda k: f"{factory.ROOT}.1.{k + 1}.dcm")),
        *clean("files named .IMA", beside(name=lambda k: f"CANARY.MR.{k:04d}.IMA")),
        *clean("files named by number alone", beside(name=str)),
        *clean("capital suffix", beside(name=lambda k: f"I{k}.DCM")),
        *clean("files in subfolders one level down", beside(name=half_in)),
        *clean("all files in one subfolder", beside(name=lambda k: f"scan/{k}.dcm")),
        *clean("localizer series beside", beside(localizer_series)),
        *clean("report beside", beside(report)),
        *clean("presentation state beside", beside(presentation_state)),
        *clean("DICOMDIR beside", beside(dicomdir)),
        *clean("dose screen beside", beside(dose_report)),
        *clean("colour capture beside", beside(colour_capture)),
        *clean("junk beside", beside(junk)),
        *clean("everything beside", beside(localizer_series, report, presentation_state, dose_report, junk, copies)),
        *clean("exact copies", beside(copies)),
        *clean("copies with another file meta", beside(copies_with(other_meta))),
        *clean("copies with retrieve tags", beside(copies_with(retrieved))),
        *clean("copies with a private remark", beside(copies_with(private_remark))),
        *chosen("description", second_series(put(SeriesDescription="T2 sagittal")), put(SeriesDescription="T1 Axial"),
                description=["t1*"]),
        *chosen("excluded description", second_series(put(SeriesDescription="MPR thick")),
                put(SeriesDescription="thin"), exclude_description=["*mpr*"]),
        *chosen("plane", second_series(orientation=factory.CORONAL, origin=(-20.0, 15.0, 0.0)), plane="axial"),
        *chosen("slice count", second_series(count=len(thin)), slices=[COUNT, COUNT]),
        *chosen("spacing", second_series(count=4, gap=5.0), spacing_mm=[2.0, 3.0]),
        *chosen("being the thinnest", second_series(count=4, gap=5.0), thinnest=True),
        *chosen("contrast agent", second_series(), put(ContrastBolusAgent="CANARY"), contrast=True),
        *chosen("no contrast agent", second_series(put(ContrastBolusAgent="CANARY")), contrast=False),
        *chosen("image type", second_series(put(ImageType=["DERIVED", "SECONDARY", "MPR"])), image_type=["ORIGINAL"]),
        *chosen("excluded image type", second_series(put(ImageType=["DERIVED", "SECONDARY", "MPR"])),
                exclude_image_type=["MPR"]),
        *(v for m in ("CT", "MR") for v in clean(
            "chosen by modality", beside(mr_beside_ct), only=m, series=SeriesRules(modality=[m]))),  # type: ignore[arg-type]
    ]  # fmt: skip
