"""Losses against loops in NumPy, their limits and gradients, and what they refuse."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from bundle.errors import InputError
from bundle.model.network import DualStreamMIL
from bundle.training.losses import (
    BagCrossEntropy,
    DualStreamLoss,
    MILFocalLoss,
    attention_entropy,
    half_divergence,
    selection_confidence,
)

from .conftest import Encoder, make_batch, make_loss, make_network, make_output


def bags(num_scores=1, sizes=(7, 4, 1), seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(len(sizes), max(sizes), num_scores, generator=generator, dtype=torch.float64)
    return scores, torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]


def entropy_by_loops(attention, mask, normalise):
    result = []
    for bag, real in zip(attention, mask, strict=True):
        columns = []
        for column in bag[real].T:
            total = 0.0
            for weight in column:
                total -= weight * math.log(weight) if weight > 0 else 0.0
            columns.append(total / math.log(real.sum()) if normalise and real.sum() > 1 else total)
        result.append(np.mean(columns))
    return np.array(result)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("num_scores", [1, 3])
def test_entropy_equals_the_loop(num_scores, normalise):
    scores, mask = bags(num_scores)
    attention = make_output(scores, mask).attention
    attention[0, 2] = 0.0  # a real slice without weight
    found = attention_entropy(attention, mask, normalise)
    np.testing.assert_allclose(found, entropy_by_loops(attention.numpy(), mask.numpy(), normalise), rtol=1e-12)
    assert found[2] == 0  # a bag of one slice


@pytest.mark.parametrize("n", [2, 5, 64])
def test_entropy_of_a_uniform_attention_is_log_n_and_normalised_one(n):
    attention, mask = torch.full((1, n, 1), 1 / n), torch.ones(1, n, dtype=torch.bool)
    assert float(attention_entropy(attention, mask)) == pytest.approx(math.log(n), rel=1e-5)
    assert float(attention_entropy(attention, mask, normalise=True)) == pytest.approx(1, rel=1e-5)
    one_hot = torch.eye(n)[:1, :, None]
    assert float(attention_entropy(one_hot, mask)) == pytest.approx(0, abs=1e-20)


def test_what_lies_in_padding_does_not_enter_the_terms():
    scores, mask = bags(2)
    attention = make_output(scores, mask).attention
    for filler in (0.0, 0.3, 1e3):
        filled = torch.where(mask[..., None], attention, filler)
        torch.testing.assert_close(attention_entropy(filled, mask), attention_entropy(attention, mask))
        filled = torch.where(mask[..., None], scores, filler)
        torch.testing.assert_close(selection_confidence(filled, mask), selection_confidence(scores, mask))


@pytest.mark.parametrize("num_scores", [1, 3])
def test_confidence_equals_the_loop(num_scores):
    scores, mask = bags(num_scores)
    expected = [np.mean([max(c) - min(c) for c in s[m].T]) for s, m in zip(scores.numpy(), mask.numpy(), strict=True)]
    found = selection_confidence(scores, mask)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found[2] == 0  # a bag of one slice


def test_total_is_the_weighted_sum_of_its_parts():
    scores, mask = bags()
    output, label = make_output(scores, mask), torch.tensor([0, 1, 1])
    loss = DualStreamLoss(BagCrossEntropy(0.1), 0.7, 0.3, 0.2, normalise_entropy=False)
    total = loss(output, label, mask)
    bag = nn.functional.cross_entropy(output.logits, label, label_smoothing=0.1)
    instance = nn.functional.cross_entropy(output.instance_stream_logits, label, label_smoothing=0.1)
    entropy = -entropy_by_loops(output.attention.numpy(), mask.numpy(), False).mean()
    probability = 1 / (1 + np.exp(-scores.numpy()[..., 0]))
    confidence = -np.mean([np.ptp(p[m]) for p, m in zip(probability, mask.numpy(), strict=True)])
    assert float(total) == pytest.approx(float(bag + 0.7 * instance) + 0.3 * entropy + 0.2 * confidence, rel=1e-6)
    nll = nn.functional.cross_entropy(output.logits, label)
    expected = {
        "bag": bag, "instance": instance, "entropy": entropy, "confidence": confidence, "consistency": 0.0, "nll": nll
    }  # fmt: skip
    assert {k: float(v) for k, v in loss.components.items()} == pytest.approx(
        {k: float(v) for k, v in expected.items()}
    )
    assert not any(value.requires_grad for value in loss.components.values())


def test_divergence_of_halves_equals_the_loop_and_its_bounds():
    halves = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    p = halves.detach().softmax(-1).numpy()
    expected = []
    for first, second in zip(p[:4], p[4:], strict=True):
        middle = (first + second) / 2
        expected.append(
            sum(a * np.log(a / m) + b * np.log(b / m) for a, b, m in zip(first, second, middle, strict=True)) / 2
        )
    np.testing.assert_allclose(half_divergence(halves).detach(), expected, rtol=1e-10)
    assert torch.autograd.gradcheck(half_divergence, halves)
    same = torch.tensor([[3.0, -1.0], [3.0, -1.0]])
    assert float(half_divergence(same)) == pytest.approx(0, abs=1e-7)
    opposite = torch.tensor([[500.0, -500.0], [-500.0, 500.0]], requires_grad=True)
    found = half_divergence(opposite)
    assert found.item() == pytest.approx(math.log(2), rel=1e-6)
    found.sum().backward()
    assert torch.isfinite(opposite.grad).all()


def test_consistency_enters_the_total_by_its_weight():
    scores, mask = bags()
    output, label, halves = make_output(scores, mask), torch.tensor([0, 1, 1]), torch.randn(6, 2)
    without, with_it = make_loss(), make_loss(lambda_consistency=0.4)
    added = with_it(output, label, mask, halves) - without(output, label, mask)
    assert float(added) == pytest.approx(0.4 * float(half_divergence(halves).mean()), rel=1e-5)
    assert with_it.components["consistency"] == half_divergence(halves).mean()
    with pytest.raises(InputError, match="lambda_consistency needs"):
        with_it(output, label, mask)
    with pytest.raises(InputError, match="shares of 3 classes for a network of 2"):
        without(output, torch.full((3, 3), 1 / 3), mask)


@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
@pytest.mark.parametrize("kind", [lambda w: BagCrossEntropy(0.1, w), lambda w: MILFocalLoss(1.5, w)])
def test_shares_of_classes_weigh_the_losses_of_the_classes(kind, weights):
    loss, logits = kind(weights), torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    label = torch.tensor([0, 1, 1, 0])
    torch.testing.assert_close(loss(logits, nn.functional.one_hot(label, 2).double()), loss(logits, label))
    one, other = (loss(logits, torch.full((4,), k)) for k in (0, 1))
    torch.testing.assert_close(loss(logits, torch.tensor([[0.3, 0.7]] * 4).double()), 0.3 * one + 0.7 * other)


def test_published_nll_knows_neither_smoothing_nor_class_weights():
    scores, mask = bags(sizes=(3, 3))
    output, label = make_output(scores, mask), torch.tensor([0, 1])
    plain, dressed = make_loss(), DualStreamLoss(BagCrossEntropy(0.3, [1.0, 9.0]))
    plain(output, label, mask)
    dressed(output, label, mask)
    assert plain.components["nll"] == dressed.components["nll"]
    p = output.logits.softmax(-1).numpy()
    assert float(plain.components["nll"]) == pytest.approx(-np.mean(np.log(p[[0, 1], [0, 1]])), rel=1e-6)


def test_raw_confidence_is_the_range_of_the_logits_and_warns():
    scores, mask = bags()
    with pytest.warns(UserWarning, match="was seen to diverge"):
        loss = make_loss(raw_confidence=True)
    loss(make_output(scores, mask), torch.tensor([0, 1, 0]), mask)
    assert float(loss.components["confidence"]) == pytest.approx(-float(selection_confidence(scores, mask).mean()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_loss(raw_confidence=True, lambda_confidence=0.0)


def test_sigmoid_confidence_is_bounded():
    scores, mask = bags()
    loss = make_loss()
    for scale in (1, 1e3, 1e6):
        loss(make_output(scale * scores, mask), torch.tensor([0, 1, 0]), mask)
        assert -1 <= float(loss.components["confidence"]) <= 0


def test_a_weight_of_zero_takes_its_term_out_of_the_graph():
    scores, mask = bags()
    output = make_output(scores, mask)
    broken = output._replace(
        scores=torch.full_like(scores, math.nan).requires_grad_(),
        attention=torch.full_like(output.attention, math.nan).requires_grad_(),
        instance_stream_logits=torch.full_like(output.logits, math.nan).requires_grad_(),
        logits=output.logits.requires_grad_(),
    )
    loss = make_loss(instance_weight=0.0, lambda_entropy=0.0, lambda_confidence=0.0)
    total = loss(broken, torch.tensor([0, 1, 0]), mask)
    total.backward()
    assert torch.isfinite(total)
    assert broken.scores.grad is broken.attention.grad is broken.instance_stream_logits.grad is None
    assert output.logits.grad.abs().sum() > 0


def test_padding_changes_no_loss_and_no_gradient():
    network = make_network(selection=None)
    batch = make_batch(0, 1, 2)
    longer = torch.cat([batch["image"], torch.rand(3, 3, 1, 8, 8)], 1)
    longer_mask = torch.cat([batch["mask"], torch.zeros(3, 3, dtype=torch.bool)], 1)
    results = []
    for image, mask in ((batch["image"], batch["mask"]), (longer, longer_mask)):
        network.zero_grad()
        total = make_loss(lambda_entropy=0.5, lambda_confidence=0.5)(network.explain(image, mask), batch["label"], mask)
        total.backward()
        results.append([total, *(p.grad.clone() for p in network.parameters())])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e6])
def test_gradients_stay_finite_when_attention_underflows(scale):
    torch.manual_seed(0)
    network = DualStreamMIL(Encoder(), make_network().selection, 1, 6, 2)
    with torch.no_grad():
        network.instance_classifier.weight.mul_(scale)
        network.query[2].weight.mul_(scale)
        network.query[0].weight.mul_(scale)
    batch = make_batch(0, 1, 2, num_slices=9)
    batch["image"] *= scale
    output = network.explain(batch["image"], batch["mask"])
    make_loss(lambda_entropy=1.0, lambda_confidence=1.0)(output, batch["label"], batch["mask"]).backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


def test_gradient_at_an_attention_of_exactly_zero_is_finite():
    attention = torch.tensor([[[1.0], [0.0], [0.0]]], requires_grad=True)
    attention_entropy(attention, torch.tensor([[True, True, False]])).sum().backward()
    assert torch.isfinite(attention.grad).all()


def test_gradcheck():
    scores, mask = bags(2)
    logits = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    label = torch.tensor([0, 1, 1])
    attention = make_output(scores, mask).attention.requires_grad_()
    scores.requires_grad_()
    # Every column of the logits and every real slice is free, so the checks are not of the softmax's image alone.
    assert torch.autograd.gradcheck(lambda a: attention_entropy(a.clamp_min(1e-6), mask, True), attention)
    assert torch.autograd.gradcheck(lambda s: selection_confidence(s.sigmoid(), mask), scores)
    assert torch.autograd.gradcheck(lambda x: BagCrossEntropy(0.1, [1.0, 3.0])(x, label), logits)
    for gamma in (0.0, 0.5, 2.0):
        assert torch.autograd.gradcheck(lambda x, g=gamma: MILFocalLoss(g, [1.0, 3.0])(x, label), logits)


@pytest.mark.parametrize("class_weights", [None, [1.0, 4.0, 0.5]])
def test_cross_entropy_equals_the_loop(class_weights):
    torch.manual_seed(0)
    logits, label, smoothing = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0]), 0.1
    weights = class_weights or [1.0] * 3
    total = 0.0
    for row, y in zip(logits.numpy(), label.numpy(), strict=True):
        log_p = row - np.log(np.exp(row).sum())
        for k in range(3):
            total -= weights[k] * ((1 - smoothing) * (k == y) + smoothing / 3) * log_p[k]
    expected = total / 5
    assert float(BagCrossEntropy(smoothing, class_weights)(logits, label)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("loss", [BagCrossEntropy(0.1, [1.0, 4.0]), MILFocalLoss(2.0, [1.0, 4.0]), BagCrossEntropy()])
@pytest.mark.parametrize("sizes", [(1, 4), (2, 3), (1, 1, 1, 1, 1)])
def test_a_batch_is_the_mean_of_its_parts_by_bags(loss, sizes):
    torch.manual_seed(0)
    logits, label = torch.randn(5, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    parts = zip(logits.split(sizes), label.split(sizes), strict=True)
    total = sum(len(y) * float(loss(x, y)) for x, y in parts)
    assert total / 5 == pytest.approx(float(loss(logits, label)), rel=1e-12)


@pytest.mark.parametrize("kind", [BagCrossEntropy, MILFocalLoss])
def test_a_bag_alone_counts_by_the_weight_of_its_class(kind):
    logits = torch.tensor([[0.3, -0.2]])
    for label in (torch.tensor([0]), torch.tensor([1])):
        plain, weighted = kind()(logits, label), kind(class_weights=[1.0, 6.0])(logits, label)
        assert float(weighted) == pytest.approx(float(plain) * (1.0, 6.0)[int(label)], rel=1e-6)


def test_label_smoothing_has_the_known_floor():
    loss = BagCrossEntropy(0.1)
    gaps = torch.linspace(-2, 10, 2001)
    losses = [float(loss(torch.tensor([[0.0, float(gap)]]), torch.tensor([1]))) for gap in gaps]
    assert min(losses) == pytest.approx(0.1985, abs=5e-5)
    assert float(gaps[int(np.argmin(losses))]) == pytest.approx(math.log(0.95 / 0.05), abs=0.01)


def test_focal_loss_equals_the_loop_and_at_zero_the_cross_entropy():
    torch.manual_seed(0)
    logits, label, alpha = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0, 2]), [1.0, 2.0, 5.0]
    for weights in (None, alpha):
        class_weights = None if weights is None else torch.tensor(weights).double()
        expected = nn.functional.cross_entropy(logits, label, class_weights, reduction="sum") / 6
        torch.testing.assert_close(MILFocalLoss(0.0, weights)(logits, label), expected)
    p = logits.softmax(-1).numpy()[np.arange(6), label]
    w = np.array(alpha)[label]
    expected = -(w * (1 - p) ** 2 * np.log(p)).mean()
    assert float(MILFocalLoss(2.0, alpha)(logits, label)) == pytest.approx(expected, rel=1e-9)


def test_focal_loss_turns_away_from_bags_that_are_right():
    logits = torch.tensor([[6.0, 0.0], [0.0, 1.0]], requires_grad=True)  # the first is right, the second wrong
    MILFocalLoss(2.0)(logits, torch.tensor([0, 0])).backward()
    focal = logits.grad.abs().sum(1)
    logits.grad = None
    nn.functional.cross_entropy(logits, torch.tensor([0, 0])).backward()
    plain = logits.grad.abs().sum(1)
    assert focal[0] / focal[1] < 0.01 * plain[0] / plain[1]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_gradients_are_finite_at_certainty(gamma):
    logits = torch.tensor([[1e4, -1e4], [1e4, -1e4], [30.0, -30.0]], requires_grad=True)
    MILFocalLoss(gamma)(logits, torch.tensor([0, 1, 0])).backward()
    assert torch.isfinite(logits.grad).all()


def test_class_weights_follow_the_logits_and_are_not_saved():
    loss = DualStreamLoss(BagCrossEntropy(class_weights=[1.0, 2.0]))
    assert loss.state_dict() == {}
    logits, label = torch.randn(4, 2), torch.tensor([0, 1, 0, 1])
    assert loss.bag_loss(logits.double(), label).dtype == torch.float64
    # An engine moves the network to its device, and nobody moves the loss.
    assert loss.bag_loss(logits.to("meta"), label.to("meta")).device.type == "meta"


@pytest.mark.parametrize("label", [[0, 2], [-1, 0]])
def test_labels_out_of_range_are_one_sentence(label):
    scores, mask = bags(sizes=(3, 2))
    with pytest.raises(InputError, match=r"labels must be 0 to 1 for this network, a batch holds \[.*\]"):
        make_loss()(make_output(scores, mask), torch.tensor(label), mask)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: BagCrossEntropy(1.0), "label_smoothing must be in"),
        (lambda: BagCrossEntropy(-0.1), "label_smoothing must be in"),
        (lambda: BagCrossEntropy(class_weights=[1.0, 0.0]), "class_weights must be positive"),
        (lambda: BagCrossEntropy(class_weights=[1.0, "2"]), "class_weights must be positive"),
        (
            lambda: BagCrossEntropy(class_weights=[1.0, 2.0, 3.0])(torch.zeros(1, 2), torch.zeros(1).long()),
            "3 numbers for 2",
        ),
        (lambda: MILFocalLoss(-1.0), "gamma of the focal loss"),
        (lambda: MILFocalLoss(math.nan), "gamma of the focal loss"),
        (lambda: make_loss(instance_weight=-1.0), "instance_weight must be 0 or more"),
        (lambda: make_loss(lambda_entropy=math.nan), "lambda_entropy must be 0 or more"),
        (lambda: make_loss(lambda_confidence=-0.01), "lambda_confidence must be 0 or more"),
    ],
)
def test_impossible_settings_are_refused(make, sentence):
    with pytest.raises(InputError, match=sentence):
        make()
