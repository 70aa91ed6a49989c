"""The average of the weights against a loop, and that it changes nothing but what is judged and saved."""

import pytest
import torch
from ignite.engine import Events

from bundle.errors import InputError
from bundle.training.averaging import AverageWeights, ReturnWeights

from .conftest import Encoder, make_network, make_trainer, weights_of


def run(decay, max_epochs=2, seen=None, attach=True):
    torch.manual_seed(0)
    network = make_network(encoder=Encoder(torch.nn.BatchNorm2d(4)))
    average = AverageWeights(network, decay)
    trainer = make_trainer(network, max_epochs=max_epochs)
    trained = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: trained.append(weights_of(network)))
    if attach:
        average.attach(trainer)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: (seen or []).append(weights_of(network)))
        ReturnWeights(average).attach(trainer)
    trainer.run()
    return network, average, trained


def by_hand(trained, decay):
    average = None
    for t, weights in enumerate(trained):
        d = min(decay, (1 + t) / (10 + t))
        average = {
            name: tensor if average is None else d * average[name] + (1 - d) * tensor
            for name, tensor in weights.items()
            if tensor.is_floating_point()
        }
    return average


@pytest.mark.parametrize("decay", [0.05, 0.9])
def test_what_is_judged_is_the_average_and_what_is_trained_is_not(decay):
    judged = [None]
    network, _, trained = run(decay, seen=judged)
    plain, _, trained_plain = run(decay, attach=False)
    for one, other in zip(trained, trained_plain, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(network.state_dict()[name], plain.state_dict()[name]) for name in plain.state_dict())
    expected = by_hand(trained, decay)
    last = judged[-1]
    assert "encoder.1.running_var" in expected
    for name in expected.keys() - {"temperature"}:
        torch.testing.assert_close(last[name], expected[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(last["encoder.0.weight"], trained[-1]["encoder.0.weight"])


def test_the_temperature_is_never_averaged():
    network = make_network()
    average = AverageWeights(network, 0.9)
    for value in (5.0, 1.0):
        network.temperature.fill_(value)
        average.update()
    average.lend()
    assert float(network.temperature) == 1.0


def test_without_a_decay_nothing_happens():
    judged = [None]
    _, average, trained = run(0.0, seen=judged)
    assert average.average == {}
    assert all(torch.equal(judged[-1][name], trained[-1][name]) for name in trained[-1])


def test_a_saved_state_goes_on_as_if_nothing_had_been(tmp_path):
    network, average, _ = run(0.9)
    torch.save(average.state_dict(), tmp_path / "average.pt")
    other = AverageWeights(network, 0.9)
    other.load_state_dict(torch.load(tmp_path / "average.pt", weights_only=True))
    for one in (average, other):
        one.update()
    assert all(torch.equal(other.average[name], average.average[name]) for name in average.average)
    assert other.batches == average.batches == 5


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_wrong_decays(decay):
    with pytest.raises(InputError, match="weight_average"):
        AverageWeights(make_network(), decay)
