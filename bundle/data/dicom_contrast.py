"""Images of several echoes, time points, b-values or kinds in one series, each told by its name."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence

from ..errors import Refusal
from .dicom_frames import FrameFacts
from .dicom_header import SliceHeader

__all__ = ["check_one_contrast", "repeated_position"]

# What makes one position hold several images: code, the tag's value in an image, words.
Cause = tuple[str, Callable[[FrameFacts], Hashable], str]
# These never differ within one volume.
CAUSES: tuple[Cause, ...] = (
    ("several_echoes", lambda f: f.echo, "echoes"),
    ("several_b_values", lambda f: f.b_value, "b-values"),
    ("several_time_points", lambda f: f.time_point, "time points"),
    ("several_image_types", lambda f: f.components, "kinds of image (such as magnitude and phase, or water and fat)"),
)
# 1%, relative: vendors write the same echo time with different digits; two echoes lie far apart.
ECHO_TIME_TOLERANCE = 1.01


def check_one_contrast(headers: Sequence[SliceHeader]) -> None:
    """Refuse a series that differs in what no single volume differs in.

    Raises:
        Refusal: `several_echoes`, `several_b_values`, `several_time_points`, `several_image_types`.
    """
    facts = [h.facts for h in headers]
    for code, value, words in CAUSES:
        kinds = len({value(f) for f in facts})
        if kinds > 1:
            raise _several(code, kinds, words, len(facts))
    kernels = len({h.kernel for h in headers})
    if kernels > 1:
        raise _several(
            "several_image_types", kernels, "kinds of reconstruction (kernel, original or derived)", len(facts)
        )
    known = [f.echo_time for f in facts if f.echo_time is not None]
    if known and (len(known) < len(facts) or not max(known) <= min(known) * ECHO_TIME_TOLERANCE):
        raise _several("several_echoes", len({*known}), "echo times", len(facts))


def _several(code: str, kinds: int, words: str, images: int) -> Refusal:
    return Refusal(
        code,
        f"The {images} images of the series hold {kinds} {words}, so they are no single volume; give one of them.",
        kinds=kinds,
        images=images,
    )


def repeated_position(headers: Sequence[SliceHeader], places: Sequence[int]) -> Refusal:
    """Why several images lie at one position.

    When they were acquired differs from slice to slice in most series, so it counts only where every position holds the
    same number of images, at different moments.

    Args:
        headers: the images.
        places: number of the position of each.
    """
    images, positions = len(headers), len({*places})
    moments = defaultdict(set)
    for header, place in zip(headers, places, strict=True):
        moments[place].add(header.facts.moment)
    counts = Counter(places)
    repeats = counts[places[0]]
    if {*counts.values()} == {repeats} and all(len(seen) == repeats for seen in moments.values()):
        return _several("several_time_points", repeats, "time points", images)
    each = f", {repeats} at each" if {*counts.values()} == {repeats} and positions > 1 else ""
    return Refusal(
        "repeated_position",
        f"{images} images lie at only {positions} position{'' if positions == 1 else 's'}{each}: several time points "
        "or directions, or copies that differ; give one of them.",
        images=images,
        positions=positions,
    )
