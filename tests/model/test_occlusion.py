"""Leaving slices out, against a loop that removes them from the image."""

import pytest
import torch

from bundle.model import occlusion
from bundle.model.occlusion import leave_one_out
from tests.model.test_baselines import ALL, SIDE, batch, network


def loop(net, image, mask, classes=None):
    """Falls of the margin, (B, N), one bag and one slice at a time."""
    falls = torch.zeros(mask.shape)
    for b in range(len(image)):
        real = [n for n in range(image.shape[1]) if mask[b, n]]
        whole = net(image[b : b + 1, real])[0]
        chosen = int(whole.argmax()) if classes is None else int(classes[b])
        for n in real:
            rest = [m for m in real if m != n]
            if rest:
                falls[b, n] = margin(whole, chosen) - margin(net(image[b : b + 1, rest])[0], chosen)
    return falls


def margin(logits, chosen):
    others = [float(value) for k, value in enumerate(logits) if k != chosen]
    return float(logits[chosen]) - (max(others) if others else 0.0)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("num_classes", [1, 2, 3])
def test_it_is_what_removing_the_slice_does(kind, num_classes):
    image, mask = batch()
    net = network(kind, num_classes)
    falls = leave_one_out(net, image, mask)
    with torch.no_grad():
        expected = loop(net, image, mask)
    torch.testing.assert_close(falls, expected, rtol=1e-3, atol=2e-6)
    assert falls[0].abs().max() > 1e-4  # there is something to compare
    assert not falls[~mask].any()
    assert not falls[2].any()  # a bag of one slice
    assert not falls.requires_grad


@pytest.mark.parametrize("kind", ["dual", "gated", "volume"])
def test_the_class_can_be_given(kind):
    image, mask = batch()
    net = network(kind, 3)
    for k in range(3):
        classes = torch.full((3,), k)
        with torch.no_grad():
            expected = loop(net, image, mask, classes)
        torch.testing.assert_close(leave_one_out(net, image, mask, classes), expected, rtol=1e-4, atol=1e-5)


def test_of_two_classes_one_gains_what_the_other_loses():
    image, mask = batch()
    net = network("dual")
    one, other = (leave_one_out(net, image, mask, torch.full((3,), k)) for k in (0, 1))
    torch.testing.assert_close(one, -other)


def test_slices_are_encoded_once_and_the_head_takes_a_bounded_number(monkeypatch):
    image, mask = batch()
    net = network("dual")
    expected = leave_one_out(net, image, mask)
    monkeypatch.setattr(occlusion, "SLICES_AT_ONCE", 14)  # two bags of seven
    encoded, sizes = [], []
    net.encoder.register_forward_hook(lambda module, args, out: encoded.append(len(args[0])))
    net.query.register_forward_hook(lambda module, args, out: sizes.append(args[0].shape[:2].numel()))
    torch.testing.assert_close(leave_one_out(net, image, mask), expected)
    assert encoded == [7, 4, 1]
    assert max(sizes) == 14


def test_no_mask_means_that_all_slices_are_real():
    image, mask = batch()
    net = network("dual")
    all_real = torch.ones_like(mask)
    torch.testing.assert_close(leave_one_out(net, image), leave_one_out(net, image, all_real))


def test_autocast_leaves_the_head_in_float32():
    image, mask = batch()
    net = network("dual")
    with torch.autocast("cpu", torch.bfloat16):
        low = leave_one_out(net, image, mask)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, leave_one_out(net, image, mask), atol=0.02, rtol=0)


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="evaluation mode"):
        leave_one_out(network("dual").train(), torch.rand(1, 2, 1, SIDE, SIDE))
