"""The benchmark's statistics on hand-made numbers, its storage, and each of its parts once, very small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch

from bundle.data.collate import collate_bags
from bundle.errors import InputError
from tests.performance import benchmark, growth_part, inference_part, memory_child, training_part
from tests.performance.inference_part import agreement, inference_cell
from tests.performance.limit import decode, fastest, inference_forms, may_compile, training_forms
from tests.performance.made_scans import write_nifti, write_series
from tests.performance.measuring import Record, Store, interleaved, paired, spread, surroundings
from tests.performance.memory_child import held_bytes, measured, peak_bytes, peak_of
from tests.performance.profiling import shares
from tests.performance.report import (
    table_of_agreement,
    table_of_cell,
    verdicts,
    verdicts_of_agreement,
    verdicts_of_growth,
)
from tests.performance.settings import Run, Settings
from tests.performance.training_part import LIMIT, MILMODEL, OURS, STOCK, TYPED
from tests.training.conftest import make_batch

ROOT = Path(__file__).resolve().parents[2]
TINY = Settings(
    bag_size=6, cohort=(40, 10), study_slices=8, series_sides=(40, 48), studies=2,
    encoder={"layers": [1, 1, 1, 1], "block_inplanes": [8, 8, 16, 32]}, memory_slices=(8,), grow_bags=(4,),
    grow_cases=(2, 3), grow_workers=(0, 1), grow_side=32, memory_sides=(48,), compiled=False,
)  # fmt: skip


def silent(text: str) -> None:
    pass


def records_of(**seconds: list[float]) -> list[Record]:
    """One record a repeat from lists of seconds."""
    repeats = len(next(iter(seconds.values())))
    return [{name: {"seconds": values[k]} for name, values in seconds.items()} for k in range(repeats)]


# --- statistics ---


def test_spread_is_the_median_with_its_quartiles() -> None:
    found = spread([4.0, 1.0, 3.0, 2.0, 10.0])
    assert (found.low, found.median, found.high, found.count) == (2.0, 3.0, 4.0, 5)
    assert str(found) == "3.00 [2.00–4.00]"


def test_a_machine_that_slows_down_for_a_while_changes_no_ratio() -> None:
    steady = records_of(a=[2.0, 2.2, 1.9], b=[1.0, 1.0, 1.0])
    slowed = records_of(a=[2.0, 22.0, 1.9], b=[1.0, 10.0, 1.0])
    assert paired(steady, "a", "b") == paired(slowed, "a", "b")
    drifting = records_of(a=[1.0, 20.0, 300.0], b=[1.0, 10.0, 100.0])
    assert paired(drifting, "a", "b").median == 2.0  # of the ratios 1, 2 and 3


def test_paired_ratios_equal_a_slow_reference() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.uniform(1, 2, 9), rng.uniform(1, 2, 9)
    ratios = sorted(x / y for x, y in zip(a, b, strict=True))
    found = paired(records_of(a=list(a), b=list(b)), "a", "b")
    assert (found.low, found.median, found.high) == pytest.approx((ratios[2], ratios[4], ratios[6]))


# --- interleaving and storage ---


class Bench:
    """Contenders that write down when they are prepared and measured."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def contenders(self, *names: str, fail_at: int | None = None) -> dict[str, Callable[[], Any]]:
        def contender(name: str) -> Callable[[], Any]:
            def measure() -> dict[str, float]:
                self.log.append(name)
                if fail_at is not None and self.log.count(name) > fail_at:
                    raise KeyboardInterrupt
                return {"seconds": float(len(self.log))}

            def prepare() -> Callable[[], dict[str, float]]:
                self.log.append(f"prepare {name}")
                return measure

            return prepare

        return {name: contender(name) for name in names}


def test_contenders_take_turns(tmp_path: Path) -> None:
    bench = Bench()
    records = interleaved(bench.contenders("a", "b"), 3, Store(tmp_path, {}), "cell", silent)
    assert bench.log == ["prepare a", "prepare b", "a", "b", "a", "b", "a", "b"]
    assert [record["a"]["seconds"] for record in records] == [3, 5, 7]


def test_an_interrupted_measurement_goes_on_where_it_was(tmp_path: Path) -> None:
    first, again, third = Bench(), Bench(), Bench()
    with pytest.raises(KeyboardInterrupt):
        interleaved(first.contenders("a", "b", fail_at=2), 4, Store(tmp_path, {}), "cell", silent)
    records = interleaved(again.contenders("a", "b"), 4, Store(tmp_path, {}), "cell", silent)
    assert again.log == ["prepare a", "prepare b", "a", "b", "a", "b"]
    assert records[0] == {"a": {"seconds": 3.0}, "b": {"seconds": 4.0}}
    assert interleaved(third.contenders("a", "b"), 4, Store(tmp_path, {}), "cell", silent) == records
    assert third.log == []


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"a": {"seconds": 1}}', b'{"a": 1, "b": 2}', b'{"a": {}, "b": {}}', b"\xff\xfe"]
)
def test_a_damaged_or_different_record_is_measured_again(tmp_path: Path, content: bytes) -> None:
    store, bench = Store(tmp_path, {}), Bench()
    interleaved(Bench().contenders("a", "b"), 2, store, "cell", silent)
    (store.folder / "cell-1.json").write_bytes(content)
    records = interleaved(bench.contenders("a", "b"), 2, Store(tmp_path, {}), "cell", silent)
    assert bench.log == ["prepare a", "prepare b", "a", "b"]
    assert records[1] == json.loads((store.folder / "cell-1.json").read_text())


def test_other_settings_and_fresh_runs_take_nothing_from_before(tmp_path: Path) -> None:
    Store(tmp_path, {"threads": 1}).put("cell-0", {"a": {"seconds": 1.0}})
    assert Store(tmp_path, {"threads": 1}).get("cell-0") == {"a": {"seconds": 1.0}}
    assert Store(tmp_path, {"threads": 2}).get("cell-0") is None
    fresh = Store(tmp_path, {"threads": 1}, fresh=True)
    assert fresh.get("cell-0") is None
    fresh.put("cell-0", {"a": {"seconds": 2.0}})
    assert fresh.get("cell-0") == {"a": {"seconds": 2.0}}


def test_what_makes_measurements_comparable_is_told() -> None:
    around = surroundings({"bag_size": 64})
    assert around["machine"]["threads"] == torch.get_num_threads()
    assert around["software"]["torch"] == torch.__version__
    assert around["settings"] == {"bag_size": 64}
    assert json.loads(json.dumps(around)) == around


# --- verdicts and profiles ---


def cell(part: str, size: int, ours: float, stock: float, typed: float) -> dict[str, Any]:
    seconds = {OURS: [ours] * 3, STOCK: [stock] * 3, TYPED: [typed] * 3, LIMIT: [1.0] * 3}
    records = records_of(**seconds)
    return {
        "part": part,
        "size": size,
        "norm": "group",
        "scans": None,
        "limit": {"form": "autocast"},
        "records": records,
    }


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (cell("train", 128, 1.1, 3.4, 2.0), [True, True]),
        (cell("train", 128, 1.1, 3.2, 2.0), [True, False]),
        (cell("train", 224, 1.2, 2.5, 2.0), [False, True]),
        (cell("infer", 128, 1.1, 6.0, 5.6), [True, True, True]),
        (cell("infer", 128, 1.1, 6.0, 5.4), [True, True, False]),
        (cell("infer", 224, 1.2, 2.9, 3.1), [False, False, True]),
        (cell("infer", 96, 1.0, 1.0, 1.0), [True]),
    ],
)
def test_targets_are_judged_by_the_median_ratio(measured: dict[str, Any], expected: list[bool]) -> None:
    assert [verdict.passed for verdict in verdicts(measured)] == expected


def test_a_target_beyond_the_limit_can_be_told() -> None:
    verdict = verdicts(cell("train", 128, 1.1, 2.2, 2.0))[1]
    assert str(verdict) == f"  MISS  at least 3 × as fast as {STOCK}: 2.00 [2.00–2.00] (the limit: 2.20)"


def test_the_table_holds_the_ratios() -> None:
    lines = table_of_cell(cell("train", 128, 1.1, 3.3, 2.2)).splitlines()
    stock = next(line for line in lines if line.startswith(f"{STOCK} "))
    assert stock.split() == [*STOCK.split(), "3300.0", "3.30", "[3.30–3.30]", "3.00", "[3.00–3.00]"]
    assert any(line.startswith(f"{LIMIT} (autocast)") for line in lines)


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ({32: 20, 128: 100, 512: 109}, "1.09"),
        ({32: 20, 128: 100, 512: 111}, "1.11"),
        ({32: 20, 128: 100}, "no measurement at 512 slices, the process was killed"),
        ({32: 20, 512: 20}, "no measurement at 128 slices, the process was killed"),
        ({32: 20, 128: 100, 512: -5}, "-5.0 MiB at 512 slices, which gives no ratio"),
        ({32: 20, 128: 0, 512: 20}, "0.0 MiB at 128 slices, which gives no ratio"),
    ],
)
def test_memory_is_held_to_that_of_the_middle_size(sizes: dict[int, int], found: str) -> None:
    rows = [memory_row(OURS, 128, n, b * 2**20) for n, b in sizes.items()]
    rows += [memory_row(STOCK, 128, 512, 10**9), memory_row(OURS, 224, 128, 100), memory_row(OURS, 224, 512, 10**9)]
    (verdict,) = verdicts_of_growth({"timed": [], "memory": rows}, (32, 128, 512), (128,))
    assert (verdict.found, verdict.passed) == (found, found == "1.09")
    assert "128 to 512" in verdict.text


def memory_row(who: str, side: int, slices: int, above: int) -> dict[str, Any]:
    return {"what": "classifying a series", "who": who, "side": side, "slices": slices, "bytes": above}


def test_memory_is_judged_for_every_size_of_slices() -> None:
    rows = [memory_row(OURS, side, n, b) for side, n, b in ((128, 8, 10), (128, 16, 10), (224, 8, 10), (224, 16, 20))]
    found = verdicts_of_growth({"timed": [], "memory": rows}, (8, 16), (128, 224))
    assert [(verdict.passed, verdict.found) for verdict in found] == [(True, "1.00"), (False, "2.00")]
    assert "224 pixels" in found[1].text
    assert verdicts_of_growth({"timed": [], "memory": rows}, (8,), (128, 224)) == []


def test_a_killed_process_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(TINY, 1, tmp_path, Store(tmp_path, {}), silent)
    answers: list[dict[str, float]] = [{}, {"before": 1.0, "peak": 2.0}]
    monkeypatch.setattr(growth_part, "peak_of", lambda task: answers.pop(0))
    assert growth_part._in_child(run, "memory", {}) == {}
    assert "memory: the process was killed" in caplog.text
    assert growth_part._in_child(run, "memory", {}) == {"before": 1.0, "peak": 2.0}
    assert growth_part._in_child(run, "memory", {}) == {"before": 1.0, "peak": 2.0}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell what a process holds")
@pytest.mark.parametrize("allowed", [True, False])
def test_what_was_freed_before_counts_for_nothing(monkeypatch: pytest.MonkeyPatch, allowed: bool) -> None:
    if not allowed:
        monkeypatch.setattr(memory_child, "_forget_peak", lambda: None)

    pins = []

    def inference() -> Callable[[], Any]:
        assert np.ones(2**28, dtype=np.uint8).all()
        # A hole in the heap that would serve the run, and nothing would show that it took memory: glibc maps blocks
        # of up to 32 MiB no more after one was freed, and gives back only what lies at the end of its heap.
        assert np.ones(31 * 2**20, dtype=np.uint8).all()
        blocks = [np.ones(2**24, dtype=np.uint8) for _ in range(8)]
        pins.append([np.ones(2**16, dtype=np.uint8) for _ in range(2**8)])
        assert all(block.all() for block in blocks)
        return lambda: np.ones(2**26, dtype=np.uint8).all()

    monkeypatch.setattr(memory_child, "inference", inference)
    before = held_bytes()
    found = measured({"task": "inference"})
    assert found["before"] < before + 2**25
    assert found["peak"] - found["before"] > 2**25
    # Where the mark cannot be set back, it stays at what was freed.
    if allowed and os.access("/proc/self/clear_refs", os.W_OK):
        assert found["peak"] - found["before"] < 2**27


def test_the_worst_agreement_is_judged() -> None:
    near, far = ({"size": 128, "norm": "batch", "float32": apart, "mixed precision": 0.1} for apart in (9e-6, 2e-5))
    assert verdicts_of_agreement([near])[0].passed
    assert [str(verdict) for verdict in verdicts_of_agreement([near, far])] == [
        "  MISS  probabilities at most 1e-05 from the plain path in float32: 2.0e-05",
        "  MISS  probabilities at most 0.02 from the plain path in mixed precision: 1.0e-01",
    ]


def test_shares_add_up_and_know_the_stages() -> None:
    bags = [{**{key: value[0] for key, value in make_batch(1, num_slices=200).items()}} for _ in range(2)]
    found = shares(lambda: [collate_bags(bags) for _ in range(20)])
    assert set(found) == {"collating", "the rest"}
    assert found["collating"] > 0
    assert found["the rest"] >= 0


def test_the_fastest_form_that_works_is_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[str] = []

    def form(name: str, work: int) -> tuple[str, Callable[[torch.Tensor], torch.Tensor]]:
        def run(slices: torch.Tensor) -> torch.Tensor:
            calls.append(name)
            if not work:
                raise RuntimeError("no compiler")
            for _ in range(work):
                slices = slices.sin()
            return slices

        return name, run

    forms = [form("slow", 600), form("broken", 0), form("quick", 1)]
    best, once, tried = fastest(iter(forms), torch.rand(4, 1, 64, 64, requires_grad=True), True, silent)
    assert best == "quick"
    assert tried["slow"] > tried["quick"] > 0
    assert "broken" not in tried
    assert "the form 'broken' does not work here (RuntimeError)" in caplog.text
    calls.clear()
    once(torch.rand(1, requires_grad=True))
    assert calls == ["quick"]
    assert fastest(iter(forms), torch.rand(4, requires_grad=True), True, silent, known="slow")[0] == "slow"
    assert "broken" not in calls


class Own(torch.nn.Module):
    """An encoder called as the project's."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def encode(self, image: torch.Tensor, mask: None) -> torch.Tensor:
        return self.encoder(image[0])[None]


def small_encoder() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Flatten())


def test_frozen_forms_are_tried_with_and_without_a_type_of_16_bits() -> None:
    slices = torch.rand(20, 1, 8, 8)
    for low, frozen in ((None, "frozen, float32"), (torch.bfloat16, "frozen, pure 16 bit")):
        encoder = small_encoder().eval()
        forms = dict(inference_forms(encoder, Own(encoder), low, torch.device("cpu"), slices, compiled=False))
        assert {frozen, f"{frozen}, chunks of 16"} < forms.keys()
        with torch.inference_mode():
            for form in forms.values():
                torch.testing.assert_close(form(slices).float(), encoder(slices), atol=0.05 if low else 1e-5, rtol=0)


def test_a_training_step_of_the_limit_adds_to_no_gradients() -> None:
    encoder, slices = small_encoder(), torch.rand(20, 1, 8, 8)
    own = Own(encoder)
    forms = list(training_forms(encoder, own, None, torch.device("cpu"), by_slice=True, compiled=False))
    assert [name for name, _ in forms] == ["float32", "float32, chunks of 16", "the project's encoder"]
    _, once, _ = fastest(iter(forms[-1:]), slices, True, silent)
    once(slices)
    first = [parameter.grad.clone() for parameter in own.parameters() if parameter.grad is not None]
    once(slices)
    again = [parameter.grad for parameter in own.parameters() if parameter.grad is not None]
    torch.testing.assert_close(again, first)
    for _, form in forms[:2]:  # of a copy, which only the graph knows
        for _ in range(2):
            form(slices).sum().backward()
        assert gradients_behind(form(slices)) == [None] * len(first)


def gradients_behind(output: torch.Tensor) -> list[Any]:
    """The gradients of all parameters that an output was computed from."""
    nodes, found = [output.grad_fn], {}
    while nodes:
        node: Any = nodes.pop()
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable.grad
        nodes += [below for below, _ in node.next_functions if below is not None]
    return list(found.values())


def test_one_compiled_form_serves_many_numbers_of_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def compiled(module: torch.nn.Module, **words: Any) -> torch.nn.Module:
        given.append((words, torch._dynamo.config.recompile_limit))
        return module

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    assert may_compile(True)
    given.clear()
    encoder, device = small_encoder(), torch.device("cpu")
    both = {"compiled", "the project's encoder, compiled"}
    assert both < dict(training_forms(encoder, Own(encoder), None, device, by_slice=False, compiled=True)).keys()
    slices = torch.rand(2, 1, 8, 8)
    assert both < dict(inference_forms(encoder, Own(encoder), None, device, slices, compiled=True)).keys()
    assert given == [({"dynamic": None}, 64)] * 2


def test_the_limit_reads_every_pixel(tmp_path: Path) -> None:
    series = write_series(tmp_path / "series", 16, 3, 0)
    (series / "notes.txt").write_text("no image")
    (series / "below").mkdir()
    report = pydicom.dcmread(series / "0000.dcm")
    del report.PixelData
    report.save_as(series / "below" / "report.dcm")
    decode(series)
    (series / "notes.txt").unlink()
    last = series / "0002.dcm"
    last.write_bytes(last.read_bytes()[:-64])
    with pytest.raises(ValueError, match="expected"):
        decode(series)
    write_nifti(tmp_path / "scan.nii.gz", 16, 3, 0)
    decode(tmp_path / "scan.nii.gz")
    (tmp_path / "scan.nii.gz").write_bytes((tmp_path / "scan.nii.gz").read_bytes()[:400])
    with pytest.raises(EOFError):
        decode(tmp_path / "scan.nii.gz")


# --- each part, very small ---


def run_tiny(output: Path, *arguments: str) -> dict[str, Any]:
    words = ["--sizes", "32", "--repeats", "2", "--output", str(output), *arguments]
    assert benchmark.main(words, TINY) == 0
    assert (output / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((output / "benchmark.json").read_text())


def test_training_is_measured_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run_tiny(tmp_path, "--parts", "train", "--norms", "group")
    (measured,) = found["cells"]
    assert len(measured["records"]) == 2
    assert {OURS, STOCK, TYPED, LIMIT, "torchmil DSMIL", MILMODEL} < measured["records"][0].keys()
    assert all(r["seconds"] > 0 for record in measured["records"] for r in record.values())
    assert 0 < measured["records"][0][OURS]["loading"] < 1
    shown = capsys.readouterr().out
    assert measured["limit"]["form"] in shown
    assert measured["limit"]["form"] in measured["limit"]["seconds"]
    assert ("where the time of this project goes" in shown) == ("MISS" in shown)

    def unexpected(*_: Any, **__: Any) -> None:
        raise AssertionError("this was measured already")

    for name in ("Training", "StockTraining", "fastest"):
        monkeypatch.setattr(training_part, name, unexpected)
    monkeypatch.setattr(benchmark, "profile_training", lambda *_: "profile")
    assert run_tiny(tmp_path, "--parts", "train", "--norms", "group")["cells"] == found["cells"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Callable[[], Any]]]]:
    """Names and contenders of the cells of inference that are asked for; none is measured."""
    found: list[tuple[str, dict[str, Callable[[], Any]]]] = []

    def interleaved(contenders: Any, repeats: int, store: Store, name: str, tell: Any) -> list[Record]:
        found.append((name, contenders))
        return []

    monkeypatch.setattr(inference_part, "interleaved", interleaved)
    return found


def test_other_real_scans_are_measured_anew(tmp_path: Path, asked: list[tuple[str, Any]]) -> None:
    run = Run(TINY, 1, tmp_path, Store(tmp_path, {}), silent)
    one, other = (write_series(tmp_path / name / "scan", 16, 3, 0) for name in "ab")

    def name_for(*scans: Path) -> str:
        inference_cell(run, 32, "batch", "real scans", scans)
        return asked[-1][0]

    first = name_for(one)
    assert name_for(one) == first
    assert len({first, name_for(other), name_for(one, other)}) == 3  # others were written at another time
    moved = tmp_path / "moved"
    one.parent.rename(moved)
    assert name_for(moved / "scan") == first
    with (moved / "scan" / "0002.dcm").open("ab") as file:
        file.write(b" ")
    assert name_for(moved / "scan") != first


def test_the_limit_of_inference_is_that_of_the_network_that_runs_on_all_scans(
    tmp_path: Path, asked: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(TINY, 1, tmp_path, Store(tmp_path, {}), silent)
    scans = [write_series(tmp_path / f"{n}", 40, n, 0) for n in (8, 11)]
    networks: list[Any] = []
    seen: dict[str, list[Any]] = {"limit": [], "stock": []}

    def forms(encoder: Any, network: Any, *_: Any) -> list[Any]:
        networks.append(network)
        return []

    class Stock:
        def __init__(self, *_: Any) -> None:
            pass

        def __call__(self, path: str) -> None:
            seen["stock"].append(path)

    monkeypatch.setattr(inference_part, "inference_forms", forms)
    monkeypatch.setattr(
        inference_part, "fastest", lambda *_: ("autocast", lambda bag: seen["limit"].append(len(bag)), {})
    )
    monkeypatch.setattr(inference_part, "StockInference", Stock)
    inference_cell(run, 32, "batch", "real scans", scans)
    (_, contenders) = asked[0]
    for prepare in contenders.values():
        prepare()
    assert seen["limit"] == [8, 11]
    assert seen["stock"] == [str(path) for path in scans] * 2  # in float32 and in our type
    # Folded, laid out and in chunks: as the evaluator has it, not as the weights are kept.
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in networks[0].encoder.modules())
    assert {p.dtype for p in networks[0].encoder.parameters()} == {run.low or torch.float32}
    assert networks[0].encoding.chunk_slices is None


def test_inference_is_measured_and_agrees(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    scans = tmp_path / "scans"
    write_series(scans / "good", 40, 8, 5)
    (scans / "junk.nii.gz").write_bytes(b"junk")
    found = run_tiny(tmp_path / "out", "--parts", "infer", "--norms", "batch", "--scans", str(scans))
    assert [c["scans"] for c in found["cells"]] == ["DICOM 40", "DICOM 48", "NIfTI", "2 × DICOM 40", "real scans"]
    assert all(len(c["records"][0]) == 4 for c in found["cells"])
    assert found["agreement"][0]["float32"] <= 1e-5
    assert found["agreement"][0]["mixed precision"] < 0.1
    assert found["agreement"][0]["bags"] == 5
    assert found["agreement"][0]["critical slices"]["float32"] == 0
    assert "0 of 5" in capsys.readouterr().out
    assert "scan 2 of 2 is left out" in caplog.text
    assert str(scans) not in caplog.text


def test_agreement_sees_a_path_that_computes_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans = [write_series(tmp_path / "scans" / "000", 40, 8, 0)]

    def largest() -> float:
        run = Run(TINY, 1, tmp_path, Store(tmp_path, {}, fresh=True), silent)
        return agreement(run, 32, "batch", scans)["float32"]

    plain_network = inference_part.plain_network

    def without_statistics(*arguments: Any) -> torch.nn.Module:
        network = plain_network(*arguments)
        network.slices.encoder.bn1.running_mean.zero_()
        return network

    assert largest() <= 1e-5
    monkeypatch.setattr(inference_part, "plain_network", without_statistics)
    assert largest() > 1e-4


def test_critical_slices_that_change_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans = [write_series(tmp_path / "scans" / f"{k}", 40, 8, k) for k in range(3)]
    plain_network = inference_part.plain_network

    def with_the_opposite_choice(*arguments: Any) -> Any:
        network = plain_network(*arguments)
        network.network.selection.forward = lambda scores, *_: (-scores).softmax(dim=1)
        return network

    monkeypatch.setattr(inference_part, "plain_network", with_the_opposite_choice)
    found = agreement(Run(TINY, 1, tmp_path, Store(tmp_path, {}), silent), 32, "batch", scans)
    assert found["critical slices"] == {"float32": 3, "mixed precision": 3}
    assert found["bags"] == 3
    lines = table_of_agreement([found]).splitlines()
    assert lines[-2].strip() == "bags whose critical slice changes"
    assert lines[-1].split("norm")[1].split() == ["3", "of", "3"] * 2


def test_a_case_of_a_cohort_is_preparation_and_reading_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared_cohort = growth_part.prepared_cohort
    opened: list[float] = []

    def slow_to_build(*arguments: Any, **changes: Any) -> tuple[Callable[[], None], float]:
        once, preparing = prepared_cohort(*arguments, **changes)
        opened.append(preparing)
        return lambda: (once(), time.sleep(0.3))[0], preparing

    def unexpected(*_: Any, **__: Any) -> None:
        raise AssertionError("a network is no part of a cohort")

    monkeypatch.setattr(growth_part, "prepared_cohort", slow_to_build)
    monkeypatch.setattr(growth_part, "Training", unexpected)
    run = Run(replace(TINY, batch_size=3), 1, tmp_path, Store(tmp_path, {}), silent)
    found = growth_part._preparing(run, "group", 3)()()
    assert len(opened) == 4  # with an empty and a full cache, once before it counts and once for time
    # A pass of 0.3 s for three cases in one batch: 0.1 s each.
    for what, preparing in (("seconds", opened[2]), ("second start", opened[3]), ("reading a bag", 0.0)):
        assert 0.1 <= found[what] - preparing / 3 < 0.2


def check_growth(growth: dict[str, Any]) -> None:
    assert [list(entry["records"][0]) for entry in growth["timed"]] == [
        ["4 slices"], ["8 slices"], ["2 cases", "3 cases"], ["0 workers", "1 workers"],
    ]  # fmt: skip
    assert {(row["what"], row["who"], row["side"]) for row in growth["memory"]} == {
        ("classifying a series", OURS, 32), ("classifying a series", STOCK, 32), ("classifying a series", OURS, 48),
        ("training a bag", OURS, 32),
    }  # fmt: skip
    assert [(row["cases"], row["workers"]) for row in growth["memory of a cohort"]] == [(2, 0), (3, 0), (3, 1)]
    assert all(row["worker"] > 2**26 for row in growth["memory of a cohort"] if row["workers"])
    cohort = growth["timed"][2]["records"][0]["3 cases"]
    assert 0 < cohort["reading a bag"] < cohort["seconds"]


def test_growth_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth_part, "peak_of", measured)  # starting three processes takes three times as long
    check_growth(run_tiny(tmp_path, "--parts", "growth", "--norms", "group")["growth"])


@pytest.mark.slow
def test_memory_is_measured_in_processes_of_their_own(tmp_path: Path) -> None:
    ballast = np.ones(2**28, dtype=np.uint8)  # of this process, which no child may count
    growth = run_tiny(tmp_path, "--parts", "growth", "--norms", "group")["growth"]
    check_growth(growth)
    assert ballast.all()
    for row in growth["memory"]:
        assert 2**27 < row["before"] <= row["peak"] < peak_bytes()


@pytest.mark.slow
def test_a_child_that_fails_says_why_and_one_that_is_killed_gives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'nothing'"):
        peak_of({"task": "nothing"})
    monkeypatch.setattr(sys, "executable", "/bin/sh")
    monkeypatch.setattr(memory_child, "COMMAND", ["-c", "kill -9 $$"])
    assert peak_of({"task": "inference"}) == {}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--parts", "train,fly"],
        ["--norms", "layer"],
        ["--sizes", "12"],
        ["--sizes", "128,big"],
        ["--repeats", "0"],
        ["--batch-size", "-1"],
        ["--scans", "no/such/folder"],
        ["--sections", "tests"],
        ["--parts", "agreement"],
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(InputError, match=arguments[0]) as caught:
        benchmark.main([*arguments, "--output", str(tmp_path / "out")], TINY)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_readable_scans_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    with pytest.raises(InputError, match="--scans: no scan"):
        benchmark.main(
            ["--parts", "infer", "--scans", str(tmp_path / "scans"), "--output", str(tmp_path / "out")], TINY
        )


def test_the_command_line_tells_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command = [str(ROOT / "scripts" / "benchmark"), "--output", str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == f"error: --output: {tmp_path / 'file'} is a file; give a folder"
