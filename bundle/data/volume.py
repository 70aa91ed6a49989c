"""What a read scan is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Volume"]


@dataclass(frozen=True)
class Volume:
    """One scan whose every voxel lies where its affine says, within the policy it was read under.

    Args:
        array: (X, Y, Z), or (X, Y, Z, C) with several channels, float32. From DICOM: X columns, Y rows, Z slices in
            order of position along row × column direction.
        affine: (4, 4) float64, voxel index → RAS+ mm. Its third column leans where slices are stacked askew to their
            plane (gantry tilt) and the policy keeps them so.
        modality: DICOM modality, or None where the format has none.
        source: "dicom", "nifti", "metaimage" or "nrrd".
        slice_uids: SOP Instance UIDs along Z, or None. All frames of a multi-frame object share one.
        series_uid: Series Instance UID, or None.
        slice_positions: (Z,) mm, as the files say it, before any fit: ImagePositionPatient · unit normal of row ×
            column; or None.
        frame_numbers: (Z,) frame in its multi-frame object, from 1; None for single-frame images and other formats.
        facts: what else was seen and done, JSON-serialisable, without anything that could identify a patient: tilt,
            corrections, deviation from the grid, files passed over, compression.
    """

    array: NDArray[np.float32]
    affine: NDArray[np.float64]
    modality: str | None
    source: str
    slice_uids: tuple[str, ...] | None = None
    series_uid: str | None = None
    slice_positions: tuple[float, ...] | None = None
    frame_numbers: tuple[int, ...] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
