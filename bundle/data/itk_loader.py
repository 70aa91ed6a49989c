"""itk, loaded where it is needed: it takes seconds, and most scans do without."""

from __future__ import annotations

import functools
import warnings
from typing import Any

__all__ = ["load_itk"]


@functools.cache
def load_itk() -> Any:
    """The module, with the types made that this package uses.

    A warning of its wrappers that is turned into an error (python -W error) ends the process: itk 5.4.7 creates its
    types without looking whether that failed, some of them only with the first object.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import itk

        for kind in (itk.MetaImageIO, itk.NrrdImageIO, itk.ImageFileReader[itk.VectorImage[itk.F, 3]]):
            kind.New()
    return itk
