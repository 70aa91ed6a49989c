"""MedMNIST3D (.npz) to NIfTI volumes and a table of cases, official splits kept."""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

from ..errors import InputError, command_line
from ..files import replacing

__all__ = ["MD5", "download", "import_medmnist"]

RECORD = "https://zenodo.org/records/10519652/files/"
# File name and MD5, as published by the authors. Source: medmnist/info.py of https://github.com/MedMNIST/MedMNIST
# (version 3, which points to Zenodo record 10519652; "MD5" for 28^3 and "MD5_64" for 64^3).
MD5 = {
    "adrenalmnist3d.npz": "bbd3c5a5576322bc4cdfea780653b1ce",
    "fracturemnist3d.npz": "6aa7b0143a6b42da40027a9dda61302f",
    "nodulemnist3d.npz": "8755a7e9e05a4d9ce80a24c3e7a256f3",
    "organmnist3d.npz": "a0c5a1ff56af4f155c46d46fbb45a2fe",
    "synapsemnist3d.npz": "1235b78a3cd6280881dd7850a78eadb6",
    "vesselmnist3d.npz": "b41fd4f7e7e2feedddb201585ecafa1b",
    "adrenalmnist3d_64.npz": "17721accfe9fb005146a47d33bc54b2f",
    "fracturemnist3d_64.npz": "f01d7e6316aedf4210da0da5b7437b42",
    "nodulemnist3d_64.npz": "c47c5b7d457bf6332200d2ea6d64ecd8",
    "organmnist3d_64.npz": "58a2205adf14a9d0a189cb06dc78bf10",
    "synapsemnist3d_64.npz": "43bd14ebf3af9d3dd072446fedc14d5e",
    "vesselmnist3d_64.npz": "6bb274a8846e1097066dcd64e2c4520f",
}
SPLITS = {"train": "training", "val": "validation", "test": "test"}
CHUNK_BYTES = 1 << 20
TIMEOUT_S = 60.0


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def download(url: str, path: Path, md5: str) -> bool:
    """Fetch a file whole and with the right checksum, or not at all; nothing is fetched where it is there already.

    Args:
        url: where it is.
        path: the file to make.
        md5: the expected MD5, hexadecimal.

    Returns:
        True if it was fetched, False if it was there.

    Raises:
        InputError: it cannot be reached, ends early, or has another checksum; no part of it is left.
    """
    if path.is_file() and _md5(path) == md5:
        return False
    try:
        with replacing(path) as temporary:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer, temporary.open("wb") as file:
                total = int(answer.headers.get("Content-Length") or 0)
                with tqdm(total=total or None, unit="B", unit_scale=True, desc=path.name) as bar:
                    while chunk := answer.read(CHUNK_BYTES):
                        file.write(chunk)
                        bar.update(len(chunk))
            if total and temporary.stat().st_size != total:
                raise InputError(f"the download of {path.name} ended early: run the same command again")
            if _md5(temporary) != md5:
                raise InputError(
                    f"{path.name} came with another checksum than its authors published: run the same command again, "
                    "or fetch it by hand and compare"
                )
    except (OSError, urllib.error.URLError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "reason", None) or error
        raise InputError(
            f"{path.name} could not be fetched from {url} ({reason}): check the connection, or fetch it by hand and "
            "give the file instead of the name"
        ) from None
    return True


def _arrays(path: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """The splits of a MedMNIST3D file, checked: name, images (n, D, H, W) uint8, labels (n,)."""
    try:
        # Pickles run code when they are read: a published file holds plain arrays only.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("one array, no archive")
            content = {key: archive[key] for key in archive.files}
    except FileNotFoundError:
        raise InputError(f"there is no file {path}: check the path") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError, TypeError):
        raise InputError(f"{path} is not a readable .npz file of plain arrays: fetch it again") from None
    missing = [f"{s}_{part}" for s in ("train", "val") for part in ("images", "labels") if f"{s}_{part}" not in content]
    if missing or ("test_images" in content) != ("test_labels" in content):
        raise InputError(
            f"{path} is no MedMNIST file, {', '.join(missing) or 'one of test_images and test_labels'} is missing: it "
            "needs images and labels of train and val (test may be left out)"
        )
    for short, split in SPLITS.items():
        if f"{short}_images" not in content:
            continue
        images, labels = content[f"{short}_images"], content[f"{short}_labels"]
        if images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3):
            raise InputError(f"{path} holds 2D images, not volumes: choose a data set whose name ends in mnist3d")
        if images.ndim != 4:
            raise InputError(
                f"{path}: {short}_images has the shape {images.shape}, but must be (n, D, H, W), one grey value a "
                "voxel; colour volumes cannot be used"
            )
        if images.dtype != np.uint8:
            raise InputError(f"{path}: {short}_images is {images.dtype}, but MedMNIST is uint8: this is another file")
        if 0 in images.shape[1:]:
            raise InputError(f"{path}: {short}_images has the shape {images.shape}: the volumes are empty")
        labels = labels.reshape(len(labels), -1) if labels.ndim else labels.reshape(0, 1)
        if len(labels) != len(images) or labels.shape[1] != 1 or labels.dtype.kind not in "iu":
            raise InputError(f"{path}: {short}_labels must hold one integer for each of the {len(images)} volumes")
        yield split, images, labels[:, 0]


def import_medmnist(path: str | os.PathLike[str], out: str | os.PathLike[str], *, progress: bool = True) -> Path:
    """Write the volumes of a MedMNIST3D file as NIfTI, and a table of them.

    An array (D, H, W) is stored as it is, as (X, Y, Z) = (D, H, W): the sets come from different sources and the
    published arrays say no orientation. The affine is nominal: 1 mm voxels and the identity, so that X, Y, Z read as
    right, anterior, superior without being known to be.

    MedMNIST names no patients, so each volume is its own patient in the table; the official splits, made by patient,
    are the ones to use (`make_datalist --split split`).

    Files that are there already, with the same content, are left alone.

    Args:
        path: the .npz file, with train_images, train_labels, val_images, val_labels, and perhaps test_*.
        out: the folder to fill: images/<case>.nii.gz (uint8) and volumes.csv with case, patient, image, label, split.
        progress: show a progress bar.

    Returns:
        The path of the table, which is written last.

    Raises:
        InputError: the file is missing, corrupt, or not MedMNIST3D.
    """
    out = Path(out)
    splits = list(_arrays(Path(path)))
    affine = np.eye(4)
    rows = []
    with tqdm(total=sum(len(labels) for _, _, labels in splits), unit="volume", disable=not progress) as bar:
        for split, images, labels in splits:
            for number, (volume, label) in enumerate(zip(images, labels, strict=True)):
                case = f"{split}_{number:04d}"
                target = out / "images" / f"{case}.nii.gz"
                if not _holds(target, volume):
                    image = nib.Nifti1Image(volume, affine)
                    image.header.set_xyzt_units("mm")
                    with replacing(target) as temporary:
                        nib.save(image, temporary)
                rows.append([case, case, f"images/{case}.nii.gz", int(label), split])
                bar.update()
    with replacing(out / "volumes.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([["case", "patient", "image", "label", "split"], *rows])
    return out / "volumes.csv"


def _holds(path: Path, volume: np.ndarray) -> bool:
    """Whether a NIfTI file is there and holds exactly this volume."""
    if not path.is_file():
        return False
    try:
        image = nib.Nifti1Image.from_filename(path)
        return bool(np.array_equal(np.asarray(image.dataobj), volume) and np.array_equal(image.affine, np.eye(4)))
    except (OSError, EOFError, ValueError, zlib.error, nib.filebasedimages.ImageFileError):
        return False


def _source(given: str, size: int, may_download: bool, folder: Path) -> Path:
    """The .npz file that the first argument of the command line means, fetched where asked."""
    if given.endswith(".npz") or os.path.exists(given):
        return Path(given)
    name = f"{given.lower()}{'_64' if size == 64 else ''}.npz"
    if name not in MD5:
        known = sorted({file.removesuffix(".npz").removesuffix("_64") for file in MD5})
        raise InputError(
            f"{given} is neither a file nor a known data set: give a .npz file or one of {', '.join(known)}"
        )
    path = folder / name
    if not path.is_file() and not may_download:
        raise InputError(f"{path} is not there: add --download to fetch it ({RECORD}{name}), or give a .npz file")
    download(RECORD + name, path, MD5[name])
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: a MedMNIST3D file or name to NIfTI volumes and a table.

    Args:
        arguments: the command line; by default that of the process.

    Returns:
        0.

    Raises:
        InputError: with one sentence on what is wrong with the file or the download.
    """
    parser = argparse.ArgumentParser(
        prog="import_medmnist",
        description="Make NIfTI volumes and a table of cases (volumes.csv, with the official splits) from a MedMNIST3D "
        "file. The published arrays carry neither orientation nor voxel size: both are nominal in the NIfTI files "
        "(axes as stored, read as RAS; 1 mm).",
    )
    parser.add_argument("source", metavar="FILE.npz | NAME", help="a MedMNIST3D file, or a name such as adrenalmnist3d")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to fill")
    parser.add_argument("--size", type=int, choices=[28, 64], default=64, help="edge of the volumes (default: 64)")
    parser.add_argument(
        "--download", action="store_true", help="fetch NAME into OUT where it is not there, with checksum"
    )
    given = parser.parse_args(arguments)
    table = import_medmnist(_source(given.source, given.size, given.download, given.out), given.out)
    print(f"wrote {table}; go on with: scripts/make_datalist {table} --split split --out {given.out / 'datalist.json'}")
    return 0


if __name__ == "__main__":
    command_line(main)
