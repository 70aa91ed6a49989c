"""Two processes train as one does: the same losses, gradients, weights and figures for the same global batches."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bundle.data.dataset import BagSampler
from bundle.errors import InputError
from bundle.model.encoder import FrozenBatchNorm2d
from bundle.model.sync_norm import SyncedBatchNorm, with_synced_norms
from bundle.training import distributed
from bundle.training.distributed import BagBatches, data_parallel, local_device, own_share, seed_noise, start_group

from . import processes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("pair")
    commands = [[sys.executable, "-m", "tests.training.processes", str(rank), "2", str(folder)] for rank in (0, 1)]
    started = [subprocess.Popen(c, cwd=ROOT, stderr=subprocess.PIPE, text=True) for c in commands]
    errors = [process.communicate(timeout=240)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def assert_close(first, second, tolerance):
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype
        torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_close(first[key], second[key], tolerance)
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_close(a, b, tolerance)
    else:
        assert first == second or first == pytest.approx(second, rel=tolerance, abs=tolerance, nan_ok=True)


@pytest.mark.parametrize("name", processes.SCENARIOS)
def test_two_processes_equal_one(pair, name):
    alone = processes.run(name)
    tolerance = 1e-6 if "float32" in name else 1e-12
    own = alone.pop("own")
    first, second = ({key: value for key, value in process[name].items() if key != "own"} for process in pair)
    assert [a + b for a, b in zip(pair[0][name]["own"], pair[1][name]["own"], strict=True)] == own
    assert_close(first, second, 0)  # what decides on epochs has to be the same to the last bit
    assert_close(alone.pop("metrics"), first.pop("metrics"), 1e-6)  # made from float32 probabilities
    assert_close(alone, first, tolerance)


def test_the_scenarios_hold_what_they_are_for(pair):
    alone = processes.run("hard, separate, bag loss alone")
    assert alone["steps"][-1]["scorer.weight"] is None  # a parameter that the loss does not reach
    assert pair[1]["soft, tied, all terms"]["own"] == [1, 1, 0]  # the last batch is one bag, for two processes
    start = processes.Run().network.state_dict()
    moved = processes.run("soft, tied, all terms")["weights"]
    assert all(not torch.equal(start[name], moved[name]) for name in start if name != "temperature")
    norm = processes.run("norm batch")["weights"]
    assert int(norm["encoder.1.num_batches_tracked"]) == 3
    assert processes.run("clipped")["metrics"][0]["clipped_share"] == 1.0


def test_a_gradient_that_overflows_in_one_process_is_skipped_by_all(pair):
    assert [process["overflow"] for process in pair] == [{"scale": 2.0**9, "same": True}] * 2


def test_a_loss_that_is_not_finite_in_one_process_ends_all_with_one_sentence(pair):
    assert pair[0]["not finite"] == pair[1]["not finite"]
    assert "the loss became nan in epoch 1 (cases " in pair[0]["not finite"]
    assert {"c0", "c1"} <= set(pair[0]["not finite"].replace(",", " ").replace(")", " ").split())


def test_processes_do_not_repeat_each_others_noise(pair):
    first, second = (process["noise"] for process in pair)
    assert len(set(first + second)) == 4
    assert first == processes.noise_of_epochs()  # the first process goes on like one alone
    torch.manual_seed(5)
    state = torch.get_rng_state()
    seed_noise(0, 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_too_little_to_share_is_one_sentence(pair):
    assert pair[0]["refusals"] == pair[1]["refusals"] == [
        "batch_size is 1 for 2 processes, and each needs a bag: start fewer",
        "the number of training cases is 1 for 2 processes, and each needs a bag: start fewer",
        "1 watched cases are too few for 2 processes: start fewer",
    ]  # fmt: skip


def test_helpers(pair):
    assert [process["first"] for process in pair] == [True, False]
    assert [process["sum"] for process in pair] == [[2.0, 1.0]] * 2
    assert [process["gathered"] for process in pair] == [[{"a": 1}, {"a": 1}]] * 2
    assert [process["share"] for process in pair] == [[0, 2, 4], [1, 3]]
    assert (distributed.is_first(), distributed.add_up([0.5]), distributed.gathered(3)) == (True, [0.5], [3])
    assert own_share(range(3), "cases") == [0, 1, 2]


def test_processes_that_form_no_group_do_not_train_side_by_side(monkeypatch):
    module = torch.nn.Linear(1, 1)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert data_parallel(module) is module
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="3 processes were started, which train together with configs/multi_gpu_train"):
        data_parallel(module)


@pytest.mark.parametrize("num_processes", [1, 2, 3, 4])
@pytest.mark.parametrize(("cases", "batch_size"), [(4, 4), (5, 4), (9, 4), (11, 5), (13, 6)])
def test_every_bag_of_a_batch_has_one_process(monkeypatch, cases, batch_size, num_processes):
    whole = BagSampler(cases, seed=2)
    whole.set_epoch(3)
    order, shares = list(whole), []
    monkeypatch.setattr(distributed, "group_size", lambda: num_processes)
    for rank in range(num_processes):
        monkeypatch.setattr(distributed, "group_rank", lambda r=rank: r)
        batches = BagBatches(BagSampler(cases, seed=2), batch_size)
        batches.sampler.set_epoch(3)
        own = list(batches)
        assert len(own) == len(batches) == math.ceil(cases / batch_size)
        assert all(own)  # every process takes part in every batch
        shares.append([keys[: batches.num_own(i)] for i, keys in enumerate(own)])
    for i, parts in enumerate(zip(*shares, strict=True)):
        keys = [key for part in parts for key in part]
        assert sorted(keys) == sorted(order[i * batch_size : (i + 1) * batch_size])
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_batch_needs_a_bag():
    with pytest.raises(InputError, match="batch_size must be 1 or more, not 0"):
        BagBatches(BagSampler(3), 0)


def test_without_torchrun_it_is_one_sentence(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for call in (local_device, lambda: start_group("cpu")):
        with pytest.raises(InputError, match="start them with torchrun --nproc_per_node=N -m monai.bundle run"):
            call()


def test_the_device_of_a_process(monkeypatch):
    told = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "6", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in told:
        with monkeypatch.context() as without:
            without.delenv(name)
            with pytest.raises(InputError, match="start them with torchrun"):
                local_device()
    assert local_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert local_device() == torch.device("cuda", 1)
    with pytest.raises(InputError, match="every process has a GPU of its own, cuda:1 here: leave device out"):
        start_group("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for call in (local_device, lambda: start_group("cuda:1")):
        with pytest.raises(InputError, match="than there are GPUs: give torchrun --nproc_per_node=1, or set device"):
            call()


def test_synced_norms_take_the_place_of_batch_norms_alone():
    network = torch.nn.Sequential(
        torch.nn.BatchNorm2d(3),
        FrozenBatchNorm2d(3),
        torch.nn.GroupNorm(1, 3),
        torch.nn.Sequential(torch.nn.BatchNorm1d(3)),
    )
    parameters, names = list(network.parameters()), list(network.state_dict())
    assert with_synced_norms(network) is network
    assert [type(network[0]), type(network[3][0])] == [SyncedBatchNorm] * 2
    assert [type(network[1]), type(network[2])] == [FrozenBatchNorm2d, torch.nn.GroupNorm]
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
    assert list(network.state_dict()) == names
    x = torch.randn(4, 3, 5, 5)
    frozen = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3))
    with_synced_norms(frozen, [frozen[:1]])
    assert [type(norm) for norm in frozen] == [torch.nn.BatchNorm2d, SyncedBatchNorm]
    network[0].eval()
    torch.testing.assert_close(network[0](x), torch.nn.BatchNorm2d(3).eval()(x))  # evaluation asks no other process
