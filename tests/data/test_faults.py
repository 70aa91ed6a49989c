"""Every fault of the catalogue is refused for its reason, every clean variant loads, no mutant gives a wrong volume."""

from __future__ import annotations

import io
import json
import logging
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest

from bundle.data.policy import ReaderPolicy
from bundle.data.series import read_volume
from bundle.data.volume import Volume
from bundle.errors import Refusal
from tests.data import dicom_factory as factory
from tests.data.dicom_faults import CLEAN, FAULTS, UNDETECTABLE
from tests.data.dicom_mutants import every_damage, mutant
from tests.data.faults_files import NAMES
from tests.data.volume_oracle import Expected, compared, differences

CASES = [(name, modality) for name, fault in FAULTS.items() for modality in fault.modalities]


def check_words(refusal: Refusal, folder: Path) -> None:
    """One plain sentence, facts a JSON file can hold, nothing of the patient, no path."""
    text = refusal.sentence + json.dumps(refusal.facts, allow_nan=False)
    assert "CANARY" not in text
    assert str(folder) not in text
    assert "\n" not in refusal.sentence
    assert refusal.sentence.endswith(".")


def check_facts(volume: Volume, folder: Path) -> None:
    text = json.dumps(dict(volume.facts), allow_nan=False)
    assert "CANARY" not in text
    assert str(folder) not in text


def check_places(volume: Volume, policy: ReaderPolicy) -> None:
    """The positions that go with the slices are those that the affine gives them."""
    if volume.slice_positions is None:
        return
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    normal = np.cross(lps[:3, 0], lps[:3, 1])
    normal /= np.linalg.norm(normal)
    along = (lps[:3, 3] + np.arange(volume.array.shape[2])[:, None] * lps[:3, 2]) @ normal
    assert np.all(np.diff(along) > 0) or len(along) == 1
    np.testing.assert_allclose(volume.slice_positions, along, atol=policy.position_tolerance_mm + 1e-6)


def read_again(folder: Path, policy: ReaderPolicy, expected: Expected, tolerance: float) -> None:
    volume = read_volume(folder, policy)
    assert volume.slice_uids == expected.uids
    assert volume.frame_numbers == expected.frames
    assert volume.array.dtype == np.float32
    known = compared(volume.array.shape, volume.affine, expected)
    assert known.mean() > 0.5
    if not expected.regridded:
        assert volume.array.shape == expected.shape
        np.testing.assert_allclose(volume.affine, expected.affine, atol=policy.position_tolerance_mm)
    off = np.abs(differences(volume.array, volume.affine, expected.scale))
    # Jitter moves voxels at the rim out of what `compared` takes for the images; on their own grid all voxels count.
    assert off[known if expected.regridded or expected.padding is not None else ...].max() < tolerance
    check_places(volume, policy)
    check_facts(volume, folder)


@pytest.mark.parametrize(("name", "modality"), CASES, ids=[f"{m}-{n}" for n, m in CASES])
def test_fault_is_refused_for_its_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], name: str, modality: str
) -> None:
    fault = FAULTS[name]
    fault.write(tmp_path / "s", modality)
    capfd.readouterr()
    caplog.clear()  # pydicom's own words on what it was made to write
    with caplog.at_level(logging.DEBUG), pytest.raises(Refusal) as caught:
        read_volume(tmp_path / "s", fault.policy)
    check_words(caught.value, tmp_path)
    assert caught.value.code in fault.codes
    assert "CANARY" not in caplog.text + "".join(capfd.readouterr())


@pytest.mark.parametrize("name", CLEAN)
def test_clean_variant_loads_right_to_the_voxel(tmp_path: Path, name: str) -> None:
    variant = CLEAN[name]
    expected = variant.write(tmp_path / "s")
    read_again(tmp_path / "s", variant.policy, expected, variant.tolerance)


@pytest.mark.parametrize("modality", ["CT", "MR"])
@pytest.mark.parametrize("name", [n for n, u in UNDETECTABLE.items() if u.example is not None])
def test_what_is_called_undetectable_is_not_detected(tmp_path: Path, name: str, modality: str) -> None:
    """If one is refused one day, it moves to the faults."""
    example = UNDETECTABLE[name].example
    assert example is not None
    example.write(tmp_path / "s", modality)
    assert read_volume(tmp_path / "s").source == "dicom"


def test_the_catalogue_is_large_and_without_doubles() -> None:
    assert len(FAULTS) >= 80
    assert len(CLEAN) >= 120
    assert len(UNDETECTABLE) >= 10
    assert {v.modality for v in CLEAN.values()} == {"CT", "MR"}
    for fault in FAULTS.values():
        assert fault.codes
        assert all(code == code.lower() and " " not in code for code in fault.codes)
    for variant in CLEAN.values():
        assert variant.reason or variant.tolerance <= 0.006, variant.name


# --- mutants ---

COUNT, MATRIX = 20, (6, 7)
# What nothing contradicts when it changes in one slice alone.
PLAUSIBLE = {
    "RescaleSlope": "slopes may differ from slice to slice",
    "RescaleIntercept": "intercepts may differ from slice to slice",
    "PixelRepresentation": "signed and unsigned slices occur in one series; the bits are the same",
    "BitsStored": "bits above the stored ones may be an overlay",
    "HighBit": "bits above the stored ones may be an overlay",
    "PixelPaddingValue": "any value may be padding",
    "PixelPaddingRangeLimit": "any range may be padding",
    "PixelData": "any bytes may be pixels",
}
# How far the positions may be off, mm, times the steepest change of the values per mm.
MUTANT_TOLERANCE = ReaderPolicy().position_tolerance_mm * float(np.linalg.norm(factory.GRADIENT)) + 0.006
SECONDS = 20.0  # a mutant takes some 30 ms; this is no limit of speed, only of hanging


def changed_keywords(original: bytes, damaged: bytes) -> set[str] | None:
    """The tags by which two files differ to plain pydicom; None where it cannot read the second."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            first, second = (pydicom.dcmread(io.BytesIO(c)) for c in (original, damaged))
            tags = set(first.keys()) | set(second.keys())
            return {
                pydicom.datadict.keyword_for_tag(tag) or str(tag)
                for tag in tags
                if tag not in first or tag not in second or first[tag] != second[tag]
            }
        except Exception:
            return None


def wrong_with(volume: Volume, target: int, original: bytes, damaged: bytes) -> str | None:
    """What is wrong with a volume that was read with a mutant among its slices; None where nothing is."""
    if volume.array.shape != (MATRIX[1], MATRIX[0], COUNT):
        return f"shape {volume.array.shape}"
    off = np.abs(differences(volume.array, volume.affine)).max(axis=(0, 1)) > MUTANT_TOLERANCE
    if not off.any():
        return None
    if off[np.arange(COUNT) != target].any():
        return f"slices {np.flatnonzero(off).tolist()} are wrong; only {target} was damaged"
    changed = changed_keywords(original, damaged)
    if changed is None or not changed & PLAUSIBLE.keys():
        return f"slice {target} is wrong without a plausible reason: {sorted(changed or ['unreadable'])}"
    return None


def run_mutants(folder: Path, seeds: range) -> Counter[str]:
    """Read a series once for each seed with one of its slices damaged; all that goes wrong is told with its seed."""
    failures: list[str] = []
    outcomes: Counter[str] = Counter()
    for modality in ("CT", "MR"):
        for style in ("named .dcm", "of random hex name"):
            name, place = NAMES[style], folder / f"{modality} {style}"
            place.mkdir(parents=True)
            slices = factory.make_slices(modality, matrix=MATRIX, count=COUNT)
            paths = [factory.save(ds, place / name(k)) for k, ds in enumerate(slices)]
            for seed in seeds:
                if (seed % 4) != (modality == "MR") + 2 * (style != "named .dcm"):
                    continue
                target = (0, 9, COUNT - 1)[seed // 4 % 3]
                original = paths[target].read_bytes()
                kind, damaged = mutant(original, seed)
                paths[target].write_bytes(damaged)
                start = time.monotonic()
                try:
                    volume = read_volume(place)
                    trouble = wrong_with(volume, target, original, damaged)
                    outcomes["loaded"] += 1
                except Refusal as refusal:
                    check_words(refusal, folder)
                    outcomes[refusal.code] += 1
                    trouble = None
                except Exception as error:
                    trouble = f"{type(error).__name__}: {error}"
                if time.monotonic() - start > SECONDS:
                    trouble = f"took {time.monotonic() - start:.0f} s"
                if trouble is not None:
                    failures.append(f"seed {seed}, {kind}, {modality} {style}, slice {target}: {trouble}")
                paths[target].write_bytes(original)
            volume = read_volume(place)
            assert np.abs(differences(volume.array, volume.affine)).max() < 0.006
    assert not failures, "\n".join(failures)
    return outcomes


@pytest.mark.parametrize("start", range(0, 500, 100))
def test_mutants_of_one_slice_never_give_a_wrong_volume(tmp_path: Path, start: int) -> None:
    outcomes = run_mutants(tmp_path, range(start, start + 100))
    # Damage that no check saw, or that every check saw, would make this test empty.
    assert outcomes["loaded"] > 5
    assert len(outcomes) > 5


# Damage to the file meta group and the transfer syntax that once made pydicom's own errors and warnings escape.
FOUND_BEFORE = (1520, 2558, 3560, 5311, 6055, 6163, 6209, 6396, 8224, 9355)


@pytest.mark.parametrize("seed", FOUND_BEFORE)
def test_mutants_that_once_went_wrong(tmp_path: Path, seed: int) -> None:
    run_mutants(tmp_path, range(seed, seed + 1))


@pytest.mark.slow
@pytest.mark.parametrize("target", [0, COUNT - 1])
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_no_damage_of_a_single_element_gives_a_wrong_volume(tmp_path: Path, modality: str, target: int) -> None:
    """At the ends of a series, where a slice that drops out leaves a volume that looks whole."""
    slices = factory.make_slices(modality, matrix=MATRIX, count=COUNT)
    paths = [factory.save(ds, tmp_path / f"{k:03d}.dcm") for k, ds in enumerate(slices)]
    original = paths[target].read_bytes()
    failures = []
    for name, damaged in every_damage(original):
        paths[target].write_bytes(damaged)
        try:
            trouble = wrong_with(read_volume(tmp_path), target, original, damaged)
        except Refusal as refusal:
            check_words(refusal, tmp_path)
            continue
        except Exception as error:
            trouble = f"{type(error).__name__}: {error}"
        if trouble is not None:
            failures.append(f"{name}: {trouble}")
    assert not failures, "\n".join(failures)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(500, 10_500, 500))
def test_many_mutants_never_give_a_wrong_volume(tmp_path: Path, start: int) -> None:
    run_mutants(tmp_path, range(start, start + 500))
