from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigParser

from bundle import __version__, provenance
from bundle.data.cache_key import PACKAGES

MADE = "$bundle.made_from(@weights, @device, @amp, @precision, @trusted_modules)"


def made(weights: Path, **config: Any) -> dict[str, str]:
    """What a config with these settings says of itself."""
    plain = {"weights": str(weights), "device": "cpu", "amp": False, "precision": "auto", "trusted_modules": []}
    more = {"num_key_slices": 5, "output_dir": "out", "batch_size": 1, "progress": True}
    parser = ConfigParser({**plain, **more, "made": MADE, **config}, globals={"bundle": "bundle"})
    result: dict[str, str] = parser.get_parsed_content("made")
    return result


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.pt"
    path.write_bytes(b"weights")
    return path


def test_it_names_the_version_and_hashes_the_rest(weights: Path) -> None:
    found = made(weights)
    assert found.keys() == {"version", "weights", "settings"}
    assert found["version"] == __version__
    assert found["weights"] == hashlib.sha256(b"weights").hexdigest()
    assert made(weights) == found


@pytest.mark.parametrize(
    "config",
    [{"num_key_slices": 4}, {"amp": True, "precision": "bf16"}, {"series_rules": {"_target_": "bundle.SeriesRules"}}],
)
def test_settings_that_change_a_record_count(weights: Path, config: dict[str, Any]) -> None:
    assert made(weights, **config)["settings"] != made(weights)["settings"]


@pytest.mark.parametrize(
    "config",
    [{"output_dir": "other"}, {"batch_size": 4}, {"progress": False}, {"resume": False}, {"precision": "bf16"}],
)
def test_settings_that_change_none_do_not(weights: Path, config: dict[str, Any]) -> None:
    assert made(weights, **config) == made(weights)  # without amp, precision says nothing


def test_weights_code_and_libraries_count(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = made(weights)
    monkeypatch.setattr(provenance, "LIBRARIES", (*provenance.LIBRARIES, "tqdm"))
    assert made(weights)["settings"] != before["settings"]
    monkeypatch.undo()
    assert made(weights) == before
    monkeypatch.setattr(provenance, "_code_hash", lambda home: "another")
    assert made(weights)["settings"] != before["settings"]
    monkeypatch.undo()
    weights.write_bytes(b"other weights")
    found = made(weights)
    assert found["weights"] != before["weights"]
    assert found["settings"] == before["settings"]


def test_all_that_decodes_prepares_and_computes_is_in_the_list() -> None:
    assert {*PACKAGES, "pylibjpeg", "torchvision", "entmax"} <= set(provenance.LIBRARIES)
    assert len(provenance.LIBRARIES) == len(set(provenance.LIBRARIES))


def test_the_code_of_the_users_own_modules_counts(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_file.py").write_text("x = 1\n")
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").touch()
    (tmp_path / "own_package" / "inner.py").write_text("x = 1\n")
    for module, file in (("own_file", "own_file.py"), ("own_package.inner", "own_package/inner.py")):
        seen = {made(weights)["settings"], made(weights, trusted_modules=[module])["settings"]}
        (tmp_path / file).write_text("x = 2\n")
        seen.add(made(weights, trusted_modules=[module])["settings"])
        assert len(seen) == 3
    assert made(weights, trusted_modules=["nowhere_to_be_found"])
