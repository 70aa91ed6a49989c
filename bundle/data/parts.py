"""The preparation of a volume a few slices at a time, so that no step makes another volume of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import Compose, ScaleIntensityRanged, ThresholdIntensityd
from torch import Tensor

from .memory import give_back
from .reader import LoadImageStrictd
from .transforms import slices_along
from .volume_transforms import plain

__all__ = ["SLICES", "assembled", "kind_of", "prepare_in_parts", "same_keys"]

# Transforms of MONAI that change each voxel by itself, by numbers that were given. Of these alone it is known.
POINTWISE = (ScaleIntensityRanged, ThresholdIntensityd)
# Slices prepared at once: what lies between the steps is then small beside a volume.
SLICES = 16
Step = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def kind_of(step: Any) -> str:
    """What the result of a step depends on, see `KeysTransform`; "load" for the loading of scans."""
    if type(step) in POINTWISE:
        return "pointwise"
    if type(step) is LoadImageStrictd:
        return "load"
    return str(getattr(step, "acts_on", "volume")) if _is_own(step) else "volume"


def _is_own(step: Any) -> bool:
    # A subclass elsewhere may do anything.
    return type(step).__module__.startswith(f"{__package__}.")


def same_keys(steps: Sequence[Any]) -> bool:
    """Whether steps are about the same entries of a case."""
    return len({tuple(step.keys) for step in steps if hasattr(step, "keys")}) == 1


def prepare_in_parts(case: Mapping[str, Any], transform: Compose, end: int) -> dict[str, Any]:
    """A case after the first steps of a transform, to the last bit as if they had been done one after the other.

    Steps around the cut into slices that change each voxel or each slice by itself are done with a few slices at a
    time. Beside the volume there is then little but the bag.

    Args:
        case: as the transform takes it.
        transform: whose steps are a preparation.
        end: number of these steps.
    """
    steps = transform.transforms[:end]
    first, cut, last = _span(steps)
    data = transform(dict(case), end=first)
    if first < last:
        # Steps of others may keep what they were given.
        ours = kind_of(steps[0]) == "load" and all(map(_is_own, steps[:first]))
        data = _in_parts(data, steps[first:cut], steps[cut], steps[cut + 1 : last], ours)
    return dict(transform(data, start=last, end=end))


def _span(steps: Sequence[Any]) -> tuple[int, int, int]:
    """The first step to be done in parts, the cut among them, and the first step after them; no part where 0."""
    kinds = [kind_of(step) for step in steps]
    if kinds.count("cut") != 1:
        return 0, 0, 0
    cut = first = kinds.index("cut")
    while first and kinds[first - 1] == "pointwise":
        first -= 1
    # What is fitted to a volume takes the volume as it is there, so what precedes it has been done.
    if first and kinds[first - 1] == "fitted":
        first -= 1
    last = cut + 1
    while last < len(steps) and kinds[last] in ("slices", "pointwise"):
        last += 1
    one_image = same_keys(steps[first:last]) and len(steps[cut].keys) == 1
    return (first, cut, last) if one_image else (0, 0, 0)


def _in_parts(
    data: dict[str, Any], before: Sequence[Any], cut: Any, after: Sequence[Any], ours: bool
) -> dict[str, Any]:
    """The bag of a volume, of which nothing is left where it was `ours` alone."""
    (key,) = cut.keys
    fitted: list[Step] = [step.fitted(data) if kind_of(step) == "fitted" else step for step in before]
    volume = data.pop(key)
    nothing = MetaTensor(torch.empty(volume.shape, device="meta"), meta=volume.meta)
    bag = cut({**data, key: nothing})
    axis, count, volume = 1 + cut.axis_of(volume), len(bag[key]), plain(volume)

    def parts() -> Iterator[Tensor]:
        for start in range(0, count, SLICES):
            end = min(start + SLICES, count)
            part: Mapping[str, Any] = {key: volume.narrow(axis, start, end - start)}
            for step in fitted:
                part = step(part)
            yield slices_along(axis - 1, plain(part[key])).contiguous()
            if ours and end < count:
                give_back(volume, axis, start, end)

    return assembled(bag, key, parts(), after)


def assembled(bag: Mapping[str, Any], key: str, parts: Iterable[Tensor], steps: Sequence[Any]) -> dict[str, Any]:
    """A bag of whose image a few slices at a time are made and prepared.

    Args:
        bag: without its image, or with another one.
        key: of the image.
        parts: its slices (n, C, H, W), a few at a time, of at least one.
        steps: that change each slice by itself.
    """
    image: Tensor | None = None
    prepared, done, count = dict(bag), 0, len(bag["slice_index"])
    for part in parts:
        prepared = {**bag, key: part}
        for step in steps:
            prepared = step(prepared)
        made = plain(prepared[key])
        if image is None:
            image = made.new_empty((count, *made.shape[1:]))
        image[done : done + len(made)] = made
        done += len(made)
    return {**prepared, key: image}
