"""What the package offers by name: everything is there, nothing twice, and importing it costs nothing."""

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import bundle

MODULES = sorted(info.name for info in pkgutil.walk_packages(bundle.__path__, "bundle."))


@pytest.mark.parametrize("name", bundle.__all__)
def test_every_exported_name_imports_from_a_module_that_offers_it(name):
    found = getattr(bundle, name)
    assert found.__name__ == name
    home = importlib.import_module(f"bundle.{bundle._HOME[name]}")
    assert found is getattr(home, name)
    assert name in home.__all__


def test_all_is_sorted_and_has_nothing_twice():
    names = [name for names in bundle._EXPORTS.values() for name in names.split()]
    assert len(names) == len(set(names))
    assert list(bundle.__all__) == sorted(names)
    assert set(bundle.__all__) <= set(dir(bundle))


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'bundle' has no attribute 'Nothing'"):
        _ = bundle.Nothing


@pytest.mark.parametrize("name", MODULES)
def test_all_of_every_module_exists(name):
    module = importlib.import_module(name)
    offered = getattr(module, "__all__", [])
    assert len(set(offered)) == len(offered)
    for item in offered:
        assert hasattr(module, item), item
    source = Path(str(module.__file__)).read_text()
    # A module says what it offers, or is a command.
    assert not source.strip() or hasattr(module, "__all__") or hasattr(module, "main")


def test_importing_the_package_imports_no_torch():
    code = "import sys, bundle; print(sorted({'torch', 'monai', 'numpy'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(bundle.__file__).parents[1]
    )
    assert done.stdout.strip() == "[]"


def test_data_knows_no_model_and_model_no_file():
    """The rooms of the house, in the order in which data flows."""
    allowed = {
        "data": {"data", "errors", "files", "results"},
        "model": {"model", "errors"},
        "evaluation": {"evaluation", "errors", "files"},
    }
    for room, rooms in allowed.items():
        for path in (Path(bundle.__file__).parent / room).glob("*.py"):
            for line in path.read_text().splitlines():
                if line.strip().startswith("from .."):
                    part = line.split()[1].lstrip(".").split(".")[0]
                    assert part in rooms, f"{path.name}: {line}"
