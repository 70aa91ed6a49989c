"""The tags of a parsed DICOM dataset as checked Python values."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import pydicom.config
from pydicom.dataelem import RawDataElement, convert_raw_data_element
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag, Tag
from pydicom.uid import UID

from ..errors import Refusal
from .dicom_parse import endless

__all__ = [
    "hint",
    "integer",
    "items",
    "known",
    "number",
    "numbers",
    "private_number",
    "required_uid",
    "uid",
    "word",
    "words",
]

# Items of one sequence: frames, directory records, and what else comes in many.
MAX_ITEMS = 100_000
ITEM = b"\xfe\xff\x00\xe0"
# Of these the bytes alone tell the value, whatever the character set.
PLAIN = frozenset(("CS", "DS", "IS", "UI", "US", "SS", "UL", "SL", "FD", "FL", "DA", "TM", "DT", "AS"))
SHORT = 256  # bytes; what is kept of values stays small
UID_PATTERN = re.compile(r"[0-9.]{1,64}")


@functools.cache
def _tag(keyword: str) -> BaseTag:
    return Tag(keyword)


def _value(dataset: Dataset, keyword: str) -> Any:
    tag = _tag(keyword)
    try:
        if tag not in dataset:
            return None
        # Most values of a series are the same in all of its files, and converting one costs more than reading it.
        element: Any = dataset.get_item(tag, keep_deferred=True)
        if (
            type(element) is RawDataElement
            and element.VR in PLAIN
            and type(element.value) is bytes
            and len(element.value) <= SHORT
        ):
            return _converted(tag, element.VR, element.value, element.is_little_endian)
        return dataset[tag].value
    except Exception as error:  # pydicom converts on access, and raises what the conversion raises
        raise _bad_tag(keyword) from error


@functools.lru_cache(maxsize=4096)
def _converted(tag: BaseTag, vr: str, value: bytes, is_little_endian: bool) -> Any:
    return convert_raw_data_element(RawDataElement(tag, vr, len(value), value, 0, False, is_little_endian)).value


def _bad_tag(keyword: str) -> Refusal:
    return Refusal("bad_tag", f"The DICOM tag {keyword} holds no valid value in at least one image.", tag=keyword)


def numbers(dataset: Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    """The numbers a tag holds, which may be NaN; None where the tag is absent or empty.

    Raises:
        Refusal: `bad_tag` where it holds something else, or not `count` numbers.
    """
    value = _value(dataset, keyword)
    if value is None or (isinstance(value, (str, bytes)) and not value):
        return None
    try:
        values = list(value) if isinstance(value, MultiValue) else [value]
        if any(type(v) is not int and "_" in str(getattr(v, "original_string", v)) for v in values):
            raise _bad_tag(keyword)  # 1_5 is a number to Python alone
        found = tuple(float(v) for v in values)
    except (TypeError, ValueError) as error:
        raise _bad_tag(keyword) from error
    if found and len(found) != count:
        raise _bad_tag(keyword)
    return found or None


def number(dataset: Dataset, keyword: str) -> float | None:
    """The one number a tag holds; None where absent. Raises as `numbers` does."""
    found = numbers(dataset, keyword, 1)
    return None if found is None else found[0]


def hint(dataset: Dataset, keyword: str) -> float | None:
    """As `number`, but None for a bad value or NaN too: for tags whose faults must not refuse a good series."""
    try:
        found = number(dataset, keyword)
    except Refusal:
        return None
    return found if found is not None and math.isfinite(found) else None


def items(dataset: Dataset, keyword: str) -> list[Dataset] | None:
    """The items of a sequence; None where it is absent.

    Raises:
        Refusal: `bad_tag` where it cannot be parsed.
    """
    element: Any = dataset.get_item(_tag(keyword)) if _tag(keyword) in dataset else None
    packed = getattr(element, "value", None)
    if isinstance(packed, bytes) and packed.count(ITEM) > MAX_ITEMS:
        raise endless()
    value = _value(dataset, keyword)
    if value is None:
        return None
    try:
        found = list(value)
    except Exception as error:  # pydicom parses sequences on access, and raises what the parsing raises
        raise _bad_tag(keyword) from error
    if not all(isinstance(item, Dataset) for item in found):
        raise _bad_tag(keyword)
    return found


def private_number(dataset: Dataset, tag: int, creator: str) -> float | None:
    """The first number of a private tag of a known owner; None where absent, of another owner, or no number.

    Args:
        dataset: a dataset whose block of that owner is (gggg,0010), as these scanners write it.
        tag: the private tag, as a number.
        creator: what (gggg,0010) must hold. An anonymiser may have removed it: then the tag counts as that owner's.
    """
    try:
        owner = dataset[(tag >> 16, 0x10)].value if (tag >> 16, 0x10) in dataset else creator
        if tag not in dataset or str(owner).strip("\0 ") != creator:
            return None
        value: Any = dataset[tag].value
        if isinstance(value, bytes):
            value = value.decode("ascii").strip("\0 ").split("\\")
        first = float(value[0] if isinstance(value, (MultiValue, list)) else value)
        return first if math.isfinite(first) else None
    except Exception:  # whatever it is, it is no number; it only helps to name a reason
        return None


def integer(dataset: Dataset, keyword: str) -> int | None:
    """The one whole number a tag holds; None where absent. Raises as `numbers` does."""
    found = number(dataset, keyword)
    if found is None:
        return None
    if not found.is_integer():
        raise _bad_tag(keyword)
    return int(found)


def words(dataset: Dataset, keyword: str) -> tuple[str, ...]:
    """The code words of a tag in capitals, without spaces around them; none where absent."""
    value = _value(dataset, keyword)
    values = [] if value is None else list(value) if isinstance(value, MultiValue) else [value]
    return tuple(str(v).strip("\0 ").upper() for v in values)


def word(dataset: Dataset, keyword: str) -> str:
    """The words of a tag in one string; empty where absent."""
    return "\\".join(words(dataset, keyword))


def uid(dataset: Dataset, keyword: str) -> str | None:
    """The UID a tag holds; None where absent.

    Raises:
        Refusal: `bad_tag` where it is no UID; the UIDs go into results, so nothing else may pass for one.
    """
    value = str(_value(dataset, keyword) or "").strip("\0 ")
    if value and not UID_PATTERN.fullmatch(value):
        raise _bad_tag(keyword)
    return value or None


@functools.lru_cache(maxsize=1024)
def known(text: str) -> UID:
    """The UID with pydicom's knowledge of it, without its warnings, which quote it."""
    return UID(text, pydicom.config.IGNORE)


def required_uid(dataset: Dataset, keyword: str) -> str:
    """As `uid`; raises the Refusal `uid_absent` where there is none."""
    value = uid(dataset, keyword)
    if value is None:
        raise Refusal(
            "uid_absent",
            f"At least one image carries no {keyword}, so it belongs to no series for certain.",
            tag=keyword,
        )
    return value
