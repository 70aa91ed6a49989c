"""The strict reader as MONAI parts: an ImageReader, and a loading transform without fall-back to other readers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, PathLike
from monai.data import ImageReader, MetaTensor
from monai.transforms import MapTransform
from monai.utils import MetaKeys, SpaceKeys, ensure_tuple
from numpy.typing import NDArray

from ..errors import InputError, Refusal
from .dicom_files import DicomFiles
from .grid import corner_distance
from .policy import ReaderPolicy, SeriesRules
from .series import read_volume
from .volume import Volume

__all__ = ["LoadImageStrictd", "VolumeReader"]


class VolumeReader(ImageReader):
    """MONAI reader on top of `read_volume`.

    Beware that `LoadImage(reader=VolumeReader())` treats it as a preference only, and silently reads by other means
    what this reader refused. Give it at call time, or use `LoadImageStrictd`.

    Args:
        channels: number of channels expected: those of one file, or the number of files given.
        policy: limits of what is accepted; the defaults of `ReaderPolicy` if None.
    """

    def __init__(self, channels: int = 1, policy: ReaderPolicy | None = None) -> None:
        super().__init__()
        if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
            raise InputError(f"channels must be a whole number of at least 1, got {channels!r}")
        if policy is not None and not isinstance(policy, ReaderPolicy):
            raise InputError(f"policy must be a ReaderPolicy, got {type(policy).__name__}")
        self.channels = channels
        self.policy = policy or ReaderPolicy()

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Accept every name: content decides, and what cannot be read is refused with its reason."""
        return True

    def read(self, data: Sequence[PathLike] | PathLike | DicomFiles, **kwargs: Any) -> list[Volume]:
        """Read one scan, or one scan a modality.

        Args:
            data: one path (or the files of one study), or a list of paths whose volumes become channels in that order.
            kwargs: not used; MONAI's signature.

        Returns:
            The volumes.

        Raises:
            Refusal: of `read_volume`; `channel_count`; `modalities_disagree` where the volumes lie on different grids.
        """
        paths = ensure_tuple(data)
        if len(paths) == 1:
            return [read_volume(paths[0], self.policy, self.channels)]
        if len(paths) != self.channels:
            raise Refusal(
                "channel_count",
                f"The case has {len(paths)} images; {self.channels} channels are expected.",
                found=len(paths),
                expected=self.channels,
            )
        volumes = [read_volume(path, self.policy) for path in paths]
        first = volumes[0]
        for number, volume in enumerate(volumes[1:], start=2):
            if volume.array.shape != first.array.shape:
                raise Refusal(
                    "modalities_disagree",
                    f"Image {number} of the case has another size than the first; bring all to one grid.",
                    image=number,
                    shapes=[list(first.array.shape), list(volume.array.shape)],
                )
            distance = corner_distance(first.affine, volume.affine, first.array.shape)
            if distance > self.policy.affine_tolerance_mm:
                raise Refusal(
                    "modalities_disagree",
                    f"Image {number} of the case lies up to {distance:.2f} mm from the first; bring all to one grid.",
                    image=number,
                    distance_mm=distance,
                )
        return volumes

    def get_data(self, img: Sequence[Volume] | Volume) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Give the array and what is known about it.

        Args:
            img: what `read` returned.

        Returns:
            The array, (X, Y, Z) or channel-last (X, Y, Z, C) float32, and a dictionary of meta data: the affine and the
            stored shape, and of the first image `modality`, `source`, `series_uid`, and along the third axis
            `slice_uids` and `frame_numbers`; `reading`: for each image, what was seen and done while it was read. No
            path is among it.
        """
        volumes = ensure_tuple(img)
        first: Volume = volumes[0]
        array = first.array if len(volumes) == 1 else np.stack([v.array for v in volumes], axis=-1)
        channel_dim: int | float = -1 if array.ndim == 4 else float("nan")  # MONAI: NaN stands for none
        return array, {
            MetaKeys.AFFINE: first.affine.copy(),
            MetaKeys.ORIGINAL_AFFINE: first.affine.copy(),
            MetaKeys.SPATIAL_SHAPE: np.array(array.shape[:3]),
            MetaKeys.ORIGINAL_CHANNEL_DIM: channel_dim,
            MetaKeys.SPACE: SpaceKeys.RAS,
            "slice_uids": first.slice_uids,
            "frame_numbers": first.frame_numbers,
            "series_uid": first.series_uid,
            "modality": first.modality,
            "source": first.source,
            "reading": [_reading(volume) for volume in volumes],
        }


def _reading(volume: Volume) -> dict[str, Any]:
    """What a record says of how one image was read."""
    known = {"source": volume.source, "modality": volume.modality, "series_uid": volume.series_uid}
    return known | dict(volume.facts) | {"slice_positions_mm": volume.slice_positions}


class LoadImageStrictd(MapTransform):
    """Load scans with `VolumeReader` and nothing else, as (C, X, Y, Z) float32 MetaTensors.

    `affine` is voxel → RAS+ mm in float64; `meta` holds what `VolumeReader.get_data` lists, and no path. MONAI Deploy
    recognises loading transforms by the letters LoadImage in the name. It is no subclass of LoadImaged, which builds
    all of MONAI's readers, one of which changes pydicom's decoders for the whole process.

    A case may bring `series_rules` of its own, which go before those of the policy: which series of a study is meant is
    a matter of how a hospital names them.

    Args:
        keys: of paths, of lists of paths (one a modality), or of DicomFiles.
        channels: number of channels expected; another is refused.
        policy: limits of what is accepted; the defaults of `ReaderPolicy` if None.
        allow_missing_keys: pass over keys that a case lacks.
    """

    def __init__(
        self,
        keys: KeysCollection,
        channels: int = 1,
        policy: ReaderPolicy | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.reader = VolumeReader(channels, policy)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Load each key.

        Args:
            data: a case.

        Returns:
            The case with its images loaded.

        Raises:
            Refusal: see `VolumeReader.read`.
            InputError: a path does not exist.
        """
        out = dict(data)
        reader = self.reader_of(out.pop("series_rules", None))
        for key in self.key_iterator(out):
            array, meta = reader.get_data(reader.read(out[key]))
            array = np.moveaxis(array, -1, 0) if array.ndim == 4 else array[None]
            meta[MetaKeys.ORIGINAL_CHANNEL_DIM] = 0
            # One memory layout whatever the format, slice by slice, as later transforms walk the array.
            laid_out = torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 2, 1))).permute(0, 3, 2, 1)
            out[key] = MetaTensor.ensure_torch_and_prune_meta(laid_out, meta)
        return out

    def reader_of(self, rules: SeriesRules | None) -> VolumeReader:
        """The reader of a case that brings series rules of its own, or None."""
        if rules is None:
            return self.reader
        return VolumeReader(self.reader.channels, replace(self.reader.policy, series=rules))
