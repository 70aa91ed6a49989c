from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch

from bundle.data.threads import shared_out


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_every_item_is_in_one_share_in_order(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for count in (1, 2, 5, 16):
        shares = shared_out(list, range(count))
        assert [item for share in shares for item in share] == list(range(count))
        assert len(shares) == min(threads, count)
        assert all(shares)


def test_shares_are_worked_on_at_once_and_one_share_here(monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2, timeout=20)

    def meet(share: Sequence[int]) -> int:
        together.wait()
        return threading.get_ident()

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert threading.get_ident() not in shared_out(meet, [1, 2])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert shared_out(lambda share: threading.get_ident(), [1, 2]) == [threading.get_ident()]


def test_what_goes_wrong_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(ZeroDivisionError):
        shared_out(lambda share: 1 // share[0], [1, 1, 0, 1])
