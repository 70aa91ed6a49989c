from __future__ import annotations

import base64
import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.pixels import pixel_array
from pydicom.uid import JPEG2000, HTJ2KLossless, JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1

from bundle.data import decoder as module
from bundle.data.decoder import _Decoder, decode_frames
from bundle.errors import Refusal
from tests.data import dicom_encodings as encodings
from tests.data.dicom_factory import make_slices, save, set_pixels

SYNTAXES = {**encodings.CODECS, "JPEG lossless, any predictor": JPEGLossless, "lossy JPEG 2000": JPEG2000}
REAL = (
    "693_J2KI.dcm", "JPEG2000.dcm", "JPEGLSNearLossless_08.dcm",
    "JPEGLSNearLossless_16.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm",
)  # fmt: skip
# 24 rows and 20 columns of (37 row + 11 column) mod 4096, encoded by imagecodecs 2026.3.6 (OpenJPH).
HTJ2K = base64.b85decode(
    b"|4;u>04YEK0000K0000O00000000000000K0000O0000000000009pH0sl|{2mk^A000XAQUDA90ssL31q1{@0smY86Cj9?kdTm&"
    b"kdTm&kdTmwh=~7W02crOPjF>!N>E53R%LP^FfKASE;BCwkN^q*00000n*ag-lfVEb<@^N)bO68r62Jfx0B8Y+bO7@F0*7<}zyK0J"
    b"022W1D{}y8`Tznn0KfnezyK9M)hOb008pVq{lGDS{<Z+X02Ocm1!ypYFof7I*We3x0Hh=miS+acMj-"
    b"+0xB$QaEeHSwszgLYL_|dI_@}3*r>DYt07wKu5ClOG<o{3tJ%k{8_7H*Wy#W8&"
)
# What the child runs instead, to misbehave while it decodes.
PRELUDE = """
import ctypes, json, os, sys, time
sys.path[:] = json.loads(sys.argv[1])
import numpy as np
from bundle.data import decoder_process as child
decode = child._decode
"""
MISDEEDS = {
    "hangs": ("def act(*_): time.sleep(1000)", "decode_limit", "time"),
    "spins": ("def act(*_):\n    while True: pass", "decode_limit", "time"),
    "reads address 0": ("def act(*_): ctypes.string_at(0)", "pixel_data_corrupt", "crash"),
    "aborts": ("def act(*_): os.abort()", "pixel_data_corrupt", "crash"),
    "ends": ("def act(*_): os._exit(0)", "pixel_data_corrupt", "crash"),
    "is killed": ("def act(*_): os.kill(os.getpid(), 9)", "decode_limit", "memory"),
    "takes all memory": (
        "child.MAX_MEMORY_BYTES = 2**31\nheld = []\ndef act(*_):\n    while True: held.append(np.empty(2**26))",
        "decode_limit", "memory",
    ),
    "panics": (
        "class Panic(BaseException): pass\ndef act(*_): raise Panic", "pixel_data_corrupt", "codec",
    ),
    "answers another shape": (
        "def act(*a): return np.zeros((2**20, 2**20, 0), 'u2')", "pixel_data_corrupt", "crash",
    ),
    "answers too much": (
        "def act(*a): return np.lib.stride_tricks.as_strided(np.zeros(1, 'u2'), (2**15, 2**15), (0, 0))",
        "pixel_data_corrupt", "crash",
    ),
    "writes garbage": (
        "send = os.dup(1)\ndef act(*_): os.write(send, b'\\xff' * 99); time.sleep(1000)", "pixel_data_corrupt", "crash",
    ),
}  # fmt: skip
on_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks at /proc")


def stored(matrix: tuple[int, int], signed: bool = False, bits: int = 16, seed: int = 0) -> np.ndarray:
    ramp = np.add.outer(np.arange(matrix[0]) * 37, np.arange(matrix[1]) * 11)
    values = (ramp + np.random.default_rng(seed).integers(0, 50, matrix)) % (1 << bits)
    return values - (1 << bits - 1) if signed else values


def image(
    matrix: tuple[int, int] = (36, 44), signed: bool = False, bits: int = 16, frames: int = 1, seed: int = 0
) -> Dataset:
    ds = make_slices(matrix=matrix, count=1)[0]
    ds.PixelRepresentation, ds.BitsStored, ds.HighBit = int(signed), bits, bits - 1
    ds.BitsAllocated = 8 if bits <= 8 else 16
    set_pixels(ds, np.stack([stored(matrix, signed, bits, seed + k) for k in range(frames)]))
    if frames > 1:
        ds.NumberOfFrames = frames
    return ds


def encode(ds: Dataset, syntax: str, **layout: bool) -> None:
    # Process 14 allows the predictor that "selection value 1" demands.
    encodings.compress(ds, JPEGLosslessSV1 if syntax == JPEGLossless else syntax, **layout)
    encodings.set_syntax(ds, syntax)


def compressed(path: Path, syntax: str, **more: int | bool | tuple[int, int]) -> tuple[Path, list[np.ndarray]]:
    """A file and what pydicom decodes of it in this process."""
    ds = image(**more)  # type: ignore[arg-type]
    encode(ds, syntax)
    save(ds, path)
    return path, reference(path)


def reference(path: Path) -> list[np.ndarray]:
    ds = pydicom.dcmread(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [pixel_array(ds, index=k, raw=True) for k in range(int(ds.get("NumberOfFrames", 1)))]


def assert_equal(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.flags.writeable


def refused(decode: Callable[[], object]) -> Refusal:
    with pytest.raises(Refusal) as caught:
        decode()
    text = caught.value.sentence + json.dumps(caught.value.facts)
    assert "CANARY" not in text
    assert "/" not in text
    assert caught.value.sentence.endswith(".")
    return caught.value


def refusal_of(path: Path, frames: range = range(1)) -> tuple[str, str]:
    refusal = refused(lambda: list(decode_frames(path, frames)))
    return refusal.code, refusal.facts.get("reason", "")


@pytest.fixture
def misbehaving() -> Iterator[Callable[..., _Decoder]]:
    made = []

    def make(program: str, **times: float) -> _Decoder:
        made.append(_Decoder(program, **times))
        return made[-1]

    yield make
    for one in made:
        one.close()


# --- what comes back ---


@pytest.mark.parametrize("name", SYNTAXES)
@pytest.mark.parametrize(("signed", "bits"), [(False, 16), (True, 16), (False, 12), (True, 12), (False, 8)])
def test_equals_pydicom_in_this_process(tmp_path: Path, name: str, signed: bool, bits: int) -> None:
    path, expected = compressed(tmp_path / "a.dcm", SYNTAXES[name], signed=signed, bits=bits)
    assert_equal(list(decode_frames(path, [0])), expected)
    if "lossy" not in name:
        np.testing.assert_array_equal(expected[0], stored((36, 44), signed, bits))


@pytest.mark.parametrize("name", SYNTAXES)
@pytest.mark.parametrize("layout", [{}, {"offsets": False}])
def test_frames_of_one_file_in_any_order(tmp_path: Path, name: str, layout: dict[str, bool]) -> None:
    ds = image(frames=5)
    encode(ds, SYNTAXES[name], **layout)
    path = save(ds, tmp_path / "a.dcm")
    expected = reference(path)
    assert_equal(list(decode_frames(path, range(5))), expected)
    assert_equal(list(decode_frames(path, [3, 0, 3])), [expected[k] for k in (3, 0, 3)])
    assert list(decode_frames(path, [])) == []
    for wrong in (5, -1):
        assert refused(lambda wrong=wrong: list(decode_frames(path, [wrong]))).facts["reason"] == "frames"


def test_htj2k(tmp_path: Path) -> None:
    ds = image((24, 20))
    encodings.set_syntax(ds, HTJ2KLossless)
    encodings.set_codestreams(ds, [HTJ2K])
    (found,) = decode_frames(save(ds, tmp_path / "a.dcm"), [0])
    np.testing.assert_array_equal(found, np.add.outer(np.arange(24) * 37, np.arange(20) * 11))


@pytest.mark.parametrize("name", REAL)
def test_equals_pydicom_on_files_of_several_vendors(name: str) -> None:
    path = Path(str(get_testdata_file(name, download=False)))
    assert_equal(list(decode_frames(path, [0])), reference(path))


def test_a_real_file_whose_codestream_contradicts_its_sign() -> None:
    """Signed by its header, unsigned by its codestream, and some pixels are other values for each."""
    path = Path(str(get_testdata_file("J2K_pixelrep_mismatch.dcm", download=False)))
    assert refusal_of(path) == ("pixel_data_corrupt", "values")


def test_equals_pydicom_on_real_scans(data_dir: Path) -> None:
    files = sorted((data_dir / "dicom" / "single_files").glob("*.dcm"))
    seen = 0
    for path in files:
        ds = pydicom.dcmread(path, specific_tags=["NumberOfFrames"])
        if ds.file_meta.TransferSyntaxUID.is_encapsulated:
            frames = range(min(3, int(ds.get("NumberOfFrames", 1))))
            assert_equal(list(decode_frames(path, frames)), reference(path)[: len(frames)])
            seen += 1
    assert seen >= 4


def test_many_frames_come_in_several_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, expected = compressed(tmp_path / "a.dcm", encodings.CODECS["RLE"], frames=150, matrix=(16, 20))
    assert module.REQUEST_FRAMES < 150
    assert_equal(list(decode_frames(path, range(150))), expected)
    monkeypatch.setattr(module, "PROGRAM", PRELUDE + "child.ANSWER_BYTES = 2000\nchild.serve()")
    small = _Decoder(module.PROGRAM)
    assert_equal(list(small.decode(path, range(149, -1, -1))), expected[::-1])
    small.close()


def test_an_unfinished_reading_disturbs_no_other(tmp_path: Path) -> None:
    path, expected = compressed(tmp_path / "a.dcm", encodings.CODECS["RLE"], frames=100, matrix=(16, 20))
    other, values = compressed(tmp_path / "b.dcm", encodings.CODECS["JPEG-LS"], seed=9)
    slow = decode_frames(path, range(100))
    first = [next(slow) for _ in range(3)]
    assert_equal(list(decode_frames(other, [0])), values)
    abandoned = decode_frames(path, range(100))
    next(abandoned)
    del abandoned
    assert_equal(first + list(slow), expected)


# --- what is refused ---


@pytest.mark.parametrize("name", [n for n in SYNTAXES if n != "RLE"])
@pytest.mark.parametrize("stated", [(44, 36), (18, 88), (36, 88), (35, 44), (37, 44), (1, 1)])
def test_a_size_that_the_codestream_contradicts(tmp_path: Path, name: str, stated: tuple[int, int]) -> None:
    ds = image()
    encode(ds, SYNTAXES[name])
    ds.Rows, ds.Columns = stated
    refusal = refused(lambda: list(decode_frames(save(ds, tmp_path / "a.dcm"), [0])))
    assert (refusal.code, refusal.facts["reason"]) == ("pixel_data_corrupt", "size")
    assert refusal.facts["tag"] == ("Columns" if stated[0] == 36 else "Rows")


@pytest.mark.parametrize("stated", [(36, 43), (36, 45), (18, 44)])
def test_a_number_of_pixels_that_rle_contradicts(tmp_path: Path, stated: tuple[int, int]) -> None:
    ds = image()
    encode(ds, encodings.CODECS["RLE"])
    ds.Rows, ds.Columns = stated
    assert refusal_of(save(ds, tmp_path / "a.dcm")) == ("pixel_data_corrupt", "codec")


@pytest.mark.parametrize("name", ["JPEG 2000", "JPEG-LS"])
def test_values_that_do_not_fit_the_header(tmp_path: Path, name: str) -> None:
    """A signed image of 16 bits in the codestream of which 12 are said to be stored, zeros above them."""
    ds = image(signed=False)
    set_pixels(ds, 2 * stored((36, 44)) % 4096)
    encode(ds, SYNTAXES[name])
    ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 12, 11, 1
    assert refusal_of(save(ds, tmp_path / "a.dcm")) == ("pixel_data_corrupt", "values")
    ds.PixelRepresentation = 0
    (found,) = decode_frames(save(ds, tmp_path / "b.dcm"), [0])
    np.testing.assert_array_equal(found, 2 * stored((36, 44)) % 4096)


def test_signs_that_the_header_does_not_know(tmp_path: Path) -> None:
    for offset, fits in ((100, True), (-1000, False)):
        ds = image(signed=True)
        set_pixels(ds, stored((36, 44)) % 1500 + offset)
        encode(ds, SYNTAXES["JPEG 2000"])
        ds.PixelRepresentation = 0
        path = save(ds, tmp_path / "a.dcm")
        if fits:
            assert_equal(list(decode_frames(path, [0])), reference(path))
        else:
            assert refusal_of(path) == ("pixel_data_corrupt", "values")


def bomb(path: Path, matrix: tuple[int, int], stated: tuple[int, int]) -> Path:
    """A tiny JPEG 2000 codestream that says it is `stated`, under a header that says `matrix`."""
    ds = image((36, 44))
    encode(ds, SYNTAXES["JPEG 2000"])
    frame = bytearray(encodings.codestreams(ds)[0])
    for place, value in ((8, stated[1]), (12, stated[0]), (24, stated[1]), (28, stated[0])):  # image, then tile
        frame[place : place + 4] = value.to_bytes(4, "big")
    encodings.set_codestreams(ds, [bytes(frame)])
    ds.Rows, ds.Columns = matrix
    return save(ds, path)


@pytest.mark.parametrize(
    ("matrix", "stated", "code"),
    [
        ((10, 12), (30000, 30000), ("pixel_data_corrupt", "size")),
        ((30000, 30000), (30000, 30000), ("decode_limit", "size")),
        ((8000, 8000), (8000, 8000), None),  # within limits: the codec itself must fail
    ],
)
def test_bombs_are_refused_quickly_in_little_memory(
    tmp_path: Path, matrix: tuple[int, int], stated: tuple[int, int], code: tuple[str, str] | None
) -> None:
    resource = pytest.importorskip("resource")
    path = bomb(tmp_path / "a.dcm", matrix, stated)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    found = refusal_of(path)
    assert found == code or (code is None and found[0] in ("pixel_data_corrupt", "decode_limit"))
    assert time.monotonic() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


def test_frames_other_than_stated(tmp_path: Path) -> None:
    ds = image(frames=3)
    encode(ds, SYNTAXES["JPEG-LS"])
    for frames in (1, 2, 4):
        ds.NumberOfFrames = frames
        assert refusal_of(save(ds, tmp_path / "a.dcm")) == ("pixel_data_corrupt", "frames")


@pytest.mark.parametrize("edit", [{"SamplesPerPixel": 3}, {"BitsAllocated": 12}, {"BitsStored": 17}, {"Rows": 0}])
def test_headers_that_describe_no_grey_image(tmp_path: Path, edit: dict[str, int]) -> None:
    ds = image()
    encode(ds, SYNTAXES["RLE"])
    for keyword, value in edit.items():
        setattr(ds, keyword, value)
    assert refusal_of(save(ds, tmp_path / "a.dcm")) == ("pixel_data_corrupt", "size")


def test_files_that_are_no_compressed_image(tmp_path: Path) -> None:
    assert refusal_of(tmp_path / "absent.dcm")[0] == "unreadable_file"
    (tmp_path / "text.dcm").write_text("text")
    assert refusal_of(tmp_path / "text.dcm")[0] == "unreadable_file"
    assert refusal_of(save(image(), tmp_path / "plain.dcm"))[0] == "pixel_data_corrupt"
    ds = image(bits=12)
    encode(ds, SYNTAXES["JPEG lossless"])
    encodings.set_syntax(ds, JPEGExtended12Bit)
    assert refusal_of(save(ds, tmp_path / "extended.dcm"))[0] == "transfer_syntax"


def test_a_file_that_changes_between_two_answers(tmp_path: Path) -> None:
    path, _ = compressed(tmp_path / "a.dcm", SYNTAXES["RLE"], frames=100, matrix=(16, 20))
    reading = decode_frames(path, range(100))
    next(reading)
    compressed(path, SYNTAXES["RLE"], frames=100, matrix=(16, 20), seed=5)
    assert refused(lambda: list(reading)).code == "file_changed"


def test_cut_frames(tmp_path: Path) -> None:
    for name, syntax in SYNTAXES.items():
        ds = image()
        encode(ds, syntax)
        frame = encodings.codestreams(ds)[0]
        for length in (2, 40, len(frame) // 4, len(frame) // 2, len(frame) - 20):
            encodings.set_codestreams(ds, [frame[:length]])
            assert refusal_of(save(ds, tmp_path / "a.dcm"))[0] == "pixel_data_corrupt", (name, length)
        encodings.set_codestreams(ds, [frame])
        whole = save(ds, tmp_path / "a.dcm").read_bytes()
        (tmp_path / "a.dcm").write_bytes(whole[: len(whole) - len(frame) // 2])
        assert refusal_of(tmp_path / "a.dcm")[0] in ("pixel_data_corrupt", "unreadable_file"), name


def mutate(folder: Path, seeds: range) -> tuple[int, int]:
    """Decode frames with a few bytes changed; how many gave an array, and how many a refusal."""
    arrays = refusals = 0
    decoder = _Decoder()
    folder.mkdir()
    images, codes = [], set()
    for syntax in SYNTAXES.values():
        ds = image()
        encode(ds, syntax)
        images.append((ds, encodings.codestreams(ds)[0]))
    for seed in seeds:
        rng = np.random.default_rng(seed)
        ds, frame = images[seed % len(images)]
        damaged = bytearray(frame)
        for place in rng.integers(0, len(frame) if seed % 2 else min(200, len(frame)), rng.integers(1, 5)):
            damaged[place] = rng.integers(0, 256)
        encodings.set_codestreams(ds, [bytes(damaged)])
        try:
            (found,) = decoder.decode(save(ds, folder / "a.dcm"), [0])
            assert (found.shape, found.dtype) == ((36, 44), np.dtype("u2"))
            arrays += 1
        except Refusal as refusal:
            codes.add(refusal.code)
            refusals += 1
    decoder.close()
    assert codes <= {"pixel_data_corrupt", "decode_limit"}
    return arrays, refusals


@pytest.mark.parametrize("count", [150, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_frames_end_no_process_but_their_own(tmp_path: Path, count: int) -> None:
    halves = [range(count // 2), range(count // 2, count)]  # in two threads, each with its child
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = list(pool.map(mutate, [tmp_path / "a", tmp_path / "b"], halves))
    arrays, refusals = (sum(r[k] for r in results) for k in (0, 1))
    assert arrays + refusals == count
    assert min(arrays, refusals) > count // 20


# --- the process ---


@pytest.mark.parametrize("misdeed", MISDEEDS)
def test_misdeeds_of_a_codec_end_the_child_only(
    tmp_path: Path, misbehaving: Callable[..., _Decoder], misdeed: str
) -> None:
    if os.name != "posix":
        pytest.skip("signals")
    act, code, reason = MISDEEDS[misdeed]
    path, expected = compressed(tmp_path / "a.dcm", SYNTAXES["RLE"])
    # Bad once only, so that the next decoding shows a new child.
    program = f"{PRELUDE}{act}\nchild._decode = act if not os.path.exists({str(tmp_path / 'done')!r}) else decode\n"
    program += f"open({str(tmp_path / 'done')!r}, 'w').close()\nchild.serve()"
    decoder = misbehaving(program, seconds=-1.5 if reason == "time" else 60.0)  # two seconds are added for the frame
    refusal = refused(lambda: list(decoder.decode(path, [0])))
    assert (refusal.code, refusal.facts["reason"]) == (code, reason)
    assert decoder.child is None
    assert_equal(list(decoder.decode(path, [0])), expected)
    assert decoder.child is not None


def test_what_codecs_print_does_no_harm(tmp_path: Path, misbehaving: Callable[..., _Decoder]) -> None:
    path, expected = compressed(tmp_path / "a.dcm", SYNTAXES["RLE"])
    act = "def act(*a):\n    os.write(1, b'noise' * 999); os.write(2, b'noise' * 99999); return decode(*a)\n"
    decoder = misbehaving(PRELUDE + act + "child._decode = act\nchild.serve()")
    assert_equal(list(decoder.decode(path, [0])), expected)


@pytest.mark.parametrize(
    "program",
    [
        "raise SystemExit(3)",
        "import no_such_module",
        "import sys; sys.stdout.write('x' * 9); sys.stdout.flush(); import time; time.sleep(99)",
        "import time; time.sleep(99)",
    ],
)
def test_a_child_that_does_not_start(tmp_path: Path, misbehaving: Callable[..., _Decoder], program: str) -> None:
    path, _ = compressed(tmp_path / "a.dcm", SYNTAXES["RLE"])
    decoder = misbehaving(program, start_seconds=1.0)
    assert refused(lambda: list(decoder.decode(path, [0]))).code == "decoder_unavailable"


@pytest.mark.parametrize("executable", [None, "", "no-such-python"])
def test_no_python_to_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executable: str | None) -> None:
    path, expected = compressed(tmp_path / "a.dcm", SYNTAXES["RLE"])
    decoder = _Decoder()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", executable)
        assert refused(lambda: list(decoder.decode(path, [0]))).code == "decoder_unavailable"
    assert_equal(list(decoder.decode(path, [0])), expected)
    decoder.close()


def test_one_child_serves_all_and_is_replaced_where_it_died(tmp_path: Path) -> None:
    path, expected = compressed(tmp_path / "a.dcm", SYNTAXES["RLE"])
    decoder = _Decoder()
    processes = []
    for _ in range(3):
        assert_equal(list(decoder.decode(path, [0])), expected)
        assert decoder.child is not None
        processes.append(decoder.child.process)
    assert len({p.pid for p in processes}) == 1
    processes[0].kill()
    processes[0].wait()
    assert_equal(list(decoder.decode(path, [0])), expected)
    assert decoder.child.process.pid != processes[0].pid
    last = decoder.child.process
    decoder.close()
    decoder.close()
    assert last.returncode is not None  # waited for: no zombie


def test_an_interrupt_leaves_no_half_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, expected = compressed(tmp_path / "a.dcm", SYNTAXES["RLE"])
    decoder = _Decoder()
    list(decoder.decode(path, [0]))
    with monkeypatch.context() as patch:

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(module._Child, "_message", interrupt)
        with pytest.raises(KeyboardInterrupt):
            list(decoder.decode(path, [0]))
    assert decoder.child is None
    assert_equal(list(decoder.decode(path, [0])), expected)
    decoder.close()


def test_threads(tmp_path: Path) -> None:
    files = [
        compressed(tmp_path / f"{k}.dcm", syntax, seed=k, frames=3)
        for k, syntax in enumerate([*SYNTAXES.values(), *SYNTAXES.values()])
    ]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            for found, (_, expected) in zip(
                pool.map(lambda f: list(decode_frames(f[0], range(3))), files), files, strict=True
            ):
                assert_equal(found, expected)


class Files:
    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int, int]:
        (found,) = decode_frames(self.paths[index], [0])
        assert module._decoder.child is not None
        return found.astype(np.int64), module._decoder.child.process.pid, os.getpid()


def test_in_forked_data_loading_workers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    files = [compressed(tmp_path / f"{k}.dcm", SYNTAXES["JPEG-LS"], seed=k) for k in range(8)]
    list(decode_frames(files[0][0], [0]))
    mine = module._decoder.child
    assert mine is not None
    loader = torch.utils.data.DataLoader(
        Files([path for path, _ in files]), batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    pairs = set()
    for (found, child, worker), (_, expected) in zip(loader, files, strict=True):
        np.testing.assert_array_equal(found, expected[0])
        pairs.add((int(worker), int(child)))
    # Each worker had one child of its own, and ours still answers.
    assert len({worker for worker, _ in pairs}) == len({child for _, child in pairs}) == len(pairs) == 2
    assert mine.process.pid not in {child for _, child in pairs}
    assert_equal(list(decode_frames(files[1][0], [0])), files[1][1])
    assert module._decoder.child is mine


def gone(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


# A forked process that lives on holds copies of the pipes, unless it closed them.
FORKED = "os.fork() and os.kill(os.getpid(), 9) or (os.close(1), os.close(2), __import__('time').sleep(8))"


@on_linux
@pytest.mark.parametrize("ending", ["pass", "os._exit(0)", "os.kill(os.getpid(), 9)", FORKED])
def test_the_child_ends_with_its_parent(tmp_path: Path, ending: str) -> None:
    path, _ = compressed(tmp_path / "a.dcm", SYNTAXES["RLE"])
    program = f"""
import os
from pathlib import Path
from bundle.data import decoder
list(decoder.decode_frames(Path({str(path)!r}), [0]))
print(decoder._decoder.child.process.pid, flush=True)
{ending}
"""
    ran = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60)
    assert ran.stderr == ""
    assert ran.returncode == (-signal.SIGKILL if "kill" in ending else 0)
    pid = int(ran.stdout)
    deadline = time.monotonic() + 5
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert gone(pid)


def test_the_child_is_light_and_finds_its_modules_anywhere(tmp_path: Path) -> None:
    _, expected = compressed(tmp_path / "a.dcm", SYNTAXES["RLE"])
    (tmp_path / "numpy.py").write_text("raise RuntimeError('the wrong NumPy')")
    root = str(Path(__file__).resolve().parents[2])
    program = f"""
import sys
sys.path.insert(0, {root!r})
sys.path.remove("")
from pathlib import Path
from bundle.data.decoder import decode_frames
(found,) = decode_frames(Path("a.dcm"), [0])
assert not {{"torch", "monai", "itk", "nibabel", "highdicom"}} & set(sys.modules)
print(int(found.sum()))
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert ran.stderr == ""
    assert int(ran.stdout) == int(expected[0].sum())
