from __future__ import annotations

import pytest
import torch

from bundle.errors import InputError
from bundle.processes import num_processes, rank, refuse_several, use_own_gpu


def test_one_process_is_the_first_and_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (rank(), num_processes()) == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (rank(), num_processes()) == (3, 8)
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(InputError, match="RANK must be a whole number, not 'first'"):
        rank()


def test_a_workflow_for_one_process_refuses_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    refuse_several("evaluate.yaml")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"evaluate\.yaml is for one process, and 2 were started"):
        refuse_several("evaluate.yaml")


def test_each_process_has_a_gpu_as_long_as_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    use_own_gpu()
    assert chosen == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    use_own_gpu()
    for number in "0123":
        monkeypatch.setenv("LOCAL_RANK", number)
        use_own_gpu()
    assert chosen == [0, 0, 1, 0, 1]
