"""What inference is to classify: the scans below a folder, or the cases of a datalist."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, Refusal
from .datalist import class_names as class_names_of
from .datalist import hash_of, load_datalist
from .policy import SeriesRules
from .scans import find_scans

__all__ = ["inference_cases", "labelled_cases", "split_of"]

logger = logging.getLogger(__name__)


def labelled_cases(
    datalist: str | Path, section: str, fold: int, dataset_dir: str | Path, class_names: Sequence[str]
) -> list[dict[str, Any]]:
    """Cases of a section of a datalist, for training and evaluation of a network of these classes.

    Args:
        datalist: made by scripts/make_datalist.
        section: "training", "validation" or "test".
        fold: from 0.
        dataset_dir: folder of the image paths.
        class_names: of the network.

    Raises:
        InputError: as `load_datalist`, and when the datalist has other classes, or another order of them.
    """
    cases = load_datalist(datalist, section, fold, dataset_dir)
    in_list = class_names_of(datalist)
    # Labels that are numbers in the table have no names that could be mixed up.
    if in_list == [str(number) for number in range(len(class_names))]:
        return cases
    if len(in_list) != len(class_names):
        raise InputError(
            f"the config has {len(class_names)} class names ({', '.join(class_names)}), {Path(datalist).name} has "
            f"{len(in_list)} ({', '.join(in_list)}): set class_names to those of the datalist"
        )
    if in_list != list(class_names):
        raise InputError(
            f"the config's class names ({', '.join(class_names)}) are not those of {Path(datalist).name} "
            f"({', '.join(in_list)}): set class_names to those of the datalist, in its order"
        )
    return cases


def split_of(datalist: str | Path, fold: int) -> dict[str, Any]:
    """What identifies a split: the datalist's content and the fold."""
    return {"datalist": hash_of(datalist), "fold": fold}


def inference_cases(
    dataset_dir: str | Path,
    datalist: str | Path | None = None,
    section: str = "test",
    fold: int = 0,
    channel_files: list[str] | None = None,
    case_names: str = "pseudonym",
    dicom_cases: str = "folder",
    series_rules: SeriesRules | None = None,
) -> list[dict[str, Any]]:
    """Cases for a BagDataset: `case`, `image`, `label`, `patient` and `slice_label` (None where not known).

    Args:
        dataset_dir: folder with scans, or that of the datalist's image paths.
        datalist: take these cases instead of all scans below the folder.
        section: of the datalist.
        fold: of the datalist.
        channel_files: one file pattern a modality, for networks of several, see `find_scans`.
        case_names: "pseudonym" (from a hash of the path below the folder, or of the StudyInstanceUID where cases are
            studies: the same every time) or "path" (the path itself, for data whose names identify nobody).
        dicom_cases: "folder" (each folder that directly holds DICOM images, with what lies below it) or "study" (each
            DICOM study, wherever its files lie).
        series_rules: which series of a folder or study is meant; None leaves it to the reader's policy.

    Raises:
        InputError: when the folder is missing or holds no scan, or a setting is another word.
    """
    if case_names not in ("pseudonym", "path"):
        raise InputError(f"case_names must be pseudonym or path, not {case_names!r}")
    if series_rules is not None and not isinstance(series_rules, SeriesRules):
        raise InputError(f"series_rules must be a bundle.SeriesRules or null, not {type(series_rules).__name__}")
    chosen = {} if series_rules is None else {"series_rules": series_rules}
    if datalist is not None:
        return [case | chosen for case in load_datalist(datalist, section, fold, dataset_dir)]
    folder = Path(dataset_dir).expanduser()
    found = find_scans(folder, channel_files, dicom_cases)
    shared = Counter(scan.path for scan in found.scans)
    if found.ignored:
        logger.info("%d files that are no scans were passed over", found.ignored)
    cases = []
    for scan in found.scans:
        relative = scan.path.relative_to(folder).as_posix()
        if case_names == "pseudonym":
            name = f"case-{hashlib.sha256((scan.study or relative).encode()).hexdigest()[:12]}"
        else:
            name = folder.resolve().name if relative == "." else relative
            if scan.study is not None and shared[scan.path] > 1:
                name += f" study {scan.study}"
        case: dict[str, Any] = {"case": name, "label": None, "patient": None, "slice_label": None, **chosen}
        images = scan.image if isinstance(scan.image, list) else [scan.image]
        if isinstance(scan.image, Refusal):
            case["refusal"] = scan.image
        elif not all(image.exists() for image in images if isinstance(image, Path)):
            # Here and not in the reader, whose sentence would name the path.
            case["refusal"] = Refusal(
                "missing_file", "The file is not there: it is a link to something that was moved."
            )
        else:
            case["image"] = scan.image
        cases.append(case)
    return cases
