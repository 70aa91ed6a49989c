"""Every fault of a DICOM series that a reader must see, and those that none can.

Each fault says for which reasons it may be refused; `FAULTS` holds them by name.
"""

from __future__ import annotations

from .dicom_clean import CLEAN, CleanVariant
from .fault_kinds import Fault
from .faults_files import FILE_FAULTS
from .faults_geometry import GEOMETRY_FAULTS
from .faults_mixtures import MIXTURE_FAULTS
from .faults_multiframe import MULTIFRAME_FAULTS
from .faults_undetectable import UNDETECTABLE, Undetectable
from .faults_values import VALUE_FAULTS

__all__ = ["CLEAN", "FAULTS", "UNDETECTABLE", "CleanVariant", "Fault", "Undetectable"]

FAULTS: dict[str, Fault] = {}
for part in (GEOMETRY_FAULTS, MIXTURE_FAULTS, MULTIFRAME_FAULTS, VALUE_FAULTS, FILE_FAULTS):
    assert not FAULTS.keys() & part.keys()
    FAULTS |= part
