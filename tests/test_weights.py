"""Weights files: what is read, what is refused, and that nothing in them runs."""

import pickle

import pytest
import torch
from torch import nn

from bundle.errors import InputError
from bundle.weights import load_network, previous_of, read_checkpoint, save_atomically


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('this must not run')",)


def network(features=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, features), nn.BatchNorm1d(features))


def test_round_trip(tmp_path):
    source, path = network(seed=1), tmp_path / "deep" / "model.pt"
    save_atomically({"model": source.state_dict(), "epoch": 3, "value": float("nan"), "none": None}, path)
    content = read_checkpoint(path)
    assert content["epoch"] == 3
    assert content["none"] is None
    target = network()
    assert load_network(target, path) is target
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value)


def test_files_follow_the_umask(tmp_path):
    save_atomically({"model": {}}, tmp_path / "a.pt")
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a.pt").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_what_torch_cannot_read_back_safely_is_not_read(tmp_path):
    torch.save({"model": {}, "more": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"model": Evil()}))
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"model": {"w": torch.rand(1000)}}, tmp_path / "whole.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:900])
    for name in ("evil", "pickle", "empty", "torn"):
        with pytest.raises(InputError, match=f"{name}.pt is no weights file, is damaged, or holds more than"):
            read_checkpoint(tmp_path / f"{name}.pt")


@pytest.mark.parametrize("content", [[1], {"weights": {}}, {"model": [1]}, torch.zeros(2)])
def test_files_of_another_kind(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(InputError, match="holds no 'model'"):
        read_checkpoint(tmp_path / "w.pt")


def test_an_absent_file(tmp_path):
    for path in (tmp_path / "no.pt", tmp_path):
        with pytest.raises(InputError, match="there is no weights file"):
            read_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "count", "first"),
    [
        (lambda s: s | {"0.weight": torch.zeros(4, 2)}, 1, "0.weight"),
        (lambda s: {k: v for k, v in s.items() if k != "1.bias"}, 1, "1.bias"),
        (lambda s: s | {"2.weight": torch.zeros(1)}, 1, "2.weight"),
        (lambda s: network(4).state_dict(), 6, "0.weight"),
    ],
)
def test_another_architecture_is_one_sentence_and_changes_nothing(tmp_path, change, count, first):
    save_atomically({"model": change(network(seed=1).state_dict())}, tmp_path / "w.pt")
    target = network()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(
        InputError, match=f"w.pt holds weights of another architecture: {count} of 7 .* first '{first}'"
    ):
        load_network(target, tmp_path / "w.pt")
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


def test_previous_of(tmp_path):
    assert previous_of(tmp_path / "a.b.pt") == tmp_path / "a.b.previous.pt"
