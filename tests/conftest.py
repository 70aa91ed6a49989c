from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Before any test module imports NumPy, torch or matplotlib, and for the processes that tests start.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # pytest-xdist already runs one process a core
os.environ["MPLBACKEND"] = "Agg"
os.environ["MONAI_FAIL_ON_DUPLICATE_CONFIG"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; torch is imported only if a test asks."""
    asking = [item for item in items if item.get_closest_marker("gpu")]
    if not asking:
        return
    import torch

    if not torch.cuda.is_available():
        for item in asking:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets that the environment names in BUNDLE_TEST_DATA."""
    folder = os.environ.get("BUNDLE_TEST_DATA")
    if not folder:
        pytest.skip("BUNDLE_TEST_DATA names no folder with real data")
    if not Path(folder).is_dir():
        pytest.skip("the folder that BUNDLE_TEST_DATA names does not exist")
    return Path(folder)
