from __future__ import annotations

import csv
import hashlib
import io
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from bundle.data import medmnist
from bundle.data.case_table import CaseColumns
from bundle.data.datalist import load_datalist
from bundle.data.make_datalist import make_datalist, write_datalist
from bundle.data.medmnist import MD5, download, import_medmnist, main
from bundle.errors import InputError


def arrays(test: bool = True) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    content = {}
    for short, count in (("train", 6), ("val", 4), *([("test", 3)] if test else [])):
        content[f"{short}_images"] = generator.integers(0, 256, (count, 5, 6, 7), dtype=np.uint8)
        content[f"{short}_labels"] = (np.arange(count) % 2).astype(np.uint8)[:, None]
    return content


def saved(path: Path, content: dict[str, Any]) -> Path:
    np.savez(path, **content)
    return path


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


class EndsEarly(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"half of it")

    def log_message(self, *_: Any) -> None:
        pass


def serve(handler: Any) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def published(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A local server's address, and the folder that it serves."""
    folder = tmp_path / "published"
    folder.mkdir()
    for url in serve(partial(Quiet, directory=str(folder))):
        yield url, folder


@pytest.mark.parametrize("test", [True, False])
def test_volumes_labels_and_splits_are_kept(tmp_path: Path, test: bool) -> None:
    content = arrays(test)
    table = import_medmnist(saved(tmp_path / "a.npz", content), tmp_path / "out", progress=False)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 13 - 3 * (not test) == len(list((tmp_path / "out" / "images").iterdir()))
    for row in rows:
        split, number = row["case"].split("_")
        assert row["split"] == split
        short = {"training": "train", "validation": "val", "test": "test"}[split]
        image = nib.load(tmp_path / "out" / row["image"])
        assert image.get_data_dtype() == np.uint8
        assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
        assert image.header.get_zooms() == (1, 1, 1)
        np.testing.assert_array_equal(np.asarray(image.dataobj), content[f"{short}_images"][int(number)])
        assert int(row["label"]) == content[f"{short}_labels"][int(number), 0]


def test_table_makes_a_datalist_of_the_official_splits(tmp_path: Path) -> None:
    table = import_medmnist(saved(tmp_path / "a.npz", arrays()), tmp_path / "out", progress=False)
    write_datalist(make_datalist(table, CaseColumns(split="split")), tmp_path / "d.json")
    counts = [
        len(load_datalist(tmp_path / "d.json", s, 0, tmp_path / "out")) for s in ("training", "validation", "test")
    ]
    assert counts == [6, 4, 3]


def test_second_run_writes_no_volume_again_and_mends_a_broken_one(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.npz", arrays())
    import_medmnist(source, tmp_path / "out", progress=False)
    files = sorted((tmp_path / "out" / "images").iterdir())
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}
    files[0].write_bytes(before[files[0]][1][:50])
    nib.save(nib.Nifti1Image(np.zeros((5, 6, 7), np.uint8), np.eye(4)), files[1])
    import_medmnist(source, tmp_path / "out", progress=False)
    for file in files[2:]:
        assert file.stat().st_mtime_ns == before[file][0]
    content = arrays()["test_images"]
    for number in (0, 1):
        np.testing.assert_array_equal(np.asarray(nib.load(files[number]).dataobj), content[number])
    assert sorted((tmp_path / "out" / "images").iterdir()) == files


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("pwned", "w"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c.pop("val_images"), "val_images is missing"),
        (lambda c: (c.pop("train_images"), c.pop("train_labels")), "train_images, train_labels is missing"),
        (lambda c: c.pop("test_labels"), "one of test_images and test_labels is missing"),
        (lambda c: c.update(train_images=c["train_images"][:, 0]), "holds 2D images"),
        (lambda c: c.update(train_images=c["train_images"][..., :3]), "holds 2D images"),
        (lambda c: c.update(train_images=np.zeros((6, 4, 4, 4, 3), np.uint8)), "colour volumes"),
        (lambda c: c.update(train_images=c["train_images"].astype(np.float32)), "is float32"),
        (lambda c: c.update(val_labels=c["val_labels"][:2]), "one integer for each of the 4 volumes"),
        (lambda c: c.update(val_labels=np.zeros((4, 14), np.uint8)), "one integer for each of the 4 volumes"),
        (lambda c: c.update(val_images=np.zeros((4, 0, 5, 5), np.uint8)), "volumes are empty"),
        (lambda c: c.update(val_labels=np.array([Malicious()] * 4, dtype=object)), "not a readable .npz"),
    ],
)
def test_other_files_are_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    content: dict[str, Any] = arrays()
    change(content)
    with pytest.raises(InputError, match=sentence):
        import_medmnist(saved(tmp_path / "a.npz", content), tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_corrupt_files_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", arrays())
    whole = path.read_bytes()
    single = io.BytesIO()
    np.save(single, np.zeros(3))
    scrambled = whole[:2000] + bytes(100) + whole[2100:]
    for content in (b"", b"text", whole[: len(whole) // 2], scrambled, single.getvalue()):
        path.write_bytes(content)
        with pytest.raises(InputError, match="not a readable"):
            import_medmnist(path, tmp_path / "out", progress=False)
    with pytest.raises(InputError, match="there is no file"):
        import_medmnist(tmp_path / "none.npz", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_command_line_downloads_checks_and_imports(
    tmp_path: Path, published: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url, folder = published
    file = saved(folder / "vesselmnist3d_64.npz", arrays())
    monkeypatch.setattr(medmnist, "RECORD", url)
    monkeypatch.setitem(MD5, file.name, hashlib.md5(file.read_bytes()).hexdigest())
    out = tmp_path / "out"
    with pytest.raises(InputError, match="add --download"):
        main(["vesselmnist3d", str(out)])
    assert not out.exists()
    assert main(["VesselMNIST3D", str(out), "--download"]) == 0
    assert (out / "volumes.csv").is_file()
    assert "--split split" in capsys.readouterr().out
    file.unlink()  # not needed again: what was fetched is kept
    assert main(["vesselmnist3d", str(out), "--download"]) == 0
    with pytest.raises(InputError, match="vesselmnist3d.npz could not be fetched"):
        main(["vesselmnist3d", str(out), "--download", "--size", "28"])
    with pytest.raises(InputError, match="neither a file nor a known data set.*adrenalmnist3d"):
        main(["chestmnist", str(out)])


def test_wrong_checksum_leaves_nothing(tmp_path: Path, published: tuple[str, Path]) -> None:
    url, folder = published
    (folder / "a.npz").write_bytes(b"other content")
    with pytest.raises(InputError, match="another checksum"):
        download(url + "a.npz", tmp_path / "cache" / "a.npz", hashlib.md5(b"content").hexdigest())
    assert list((tmp_path / "cache").iterdir()) == []


def test_interrupted_download_leaves_nothing_and_a_stale_file_is_replaced(
    tmp_path: Path, published: tuple[str, Path]
) -> None:
    for url in serve(EndsEarly):
        with pytest.raises(InputError, match="ended early|could not be fetched"):
            download(url + "a.npz", tmp_path / "cache" / "a.npz", hashlib.md5(b"half of it").hexdigest())
    assert list((tmp_path / "cache").iterdir()) == []
    url, folder = published
    (folder / "a.npz").write_bytes(b"content")
    (tmp_path / "cache" / "a.npz").write_bytes(b"cont")
    right = hashlib.md5(b"content").hexdigest()
    assert download(url + "a.npz", tmp_path / "cache" / "a.npz", right)
    assert (tmp_path / "cache" / "a.npz").read_bytes() == b"content"
    assert not download(url + "gone.npz", tmp_path / "cache" / "a.npz", right)


def test_unreachable_server(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="could not be fetched"):
        download("http://127.0.0.1:9/a.npz", tmp_path / "a.npz", "0" * 32)
    assert list(tmp_path.iterdir()) == []


def test_known_files_have_checksums_of_both_sizes() -> None:
    small = {name for name in MD5 if "_64" not in name}
    assert len(small) == 6
    assert {name.replace(".npz", "_64.npz") for name in small} | small == set(MD5)
    assert all(len(md5) == 32 and int(md5, 16) for md5 in MD5.values())
    assert len(set(MD5.values())) == 12


@pytest.mark.slow
def test_real_file(data_dir: Path, tmp_path: Path) -> None:
    (source,) = (data_dir / "adrenal_mnist3d").glob("*.npz")
    table = import_medmnist(source, tmp_path / "out", progress=False)
    datalist = make_datalist(table, CaseColumns(split="split"), classes=["normal", "mass"])
    assert [len(datalist["folds"][0][s]) for s in ("training", "validation", "test")] == [1188, 98, 0]
    assert sum(case["label"] for case in datalist["cases"]) == 259 + 22
