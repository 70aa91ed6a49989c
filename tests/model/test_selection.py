"""Selections: weights over real slices, limits in temperature, gradients, and what may be exported."""

import numpy as np
import pytest
import torch
from torch import nn

from bundle.errors import InputError
from bundle.model.selection import (
    EntmaxSelection,
    GumbelSelection,
    HardSelection,
    MeanSelection,
    SoftSelection,
    StraightThroughSelection,
    TopKSelection,
    TwoPhaseSelection,
)

ALL = {
    "soft": SoftSelection(),
    "hard": HardSelection(),
    "straight_through": StraightThroughSelection(),
    "gumbel": GumbelSelection(),
    "top_k": TopKSelection(3),
    "entmax": EntmaxSelection(1.5),
    "sparsemax": EntmaxSelection(2.0),
    "entmax_1.3": EntmaxSelection(1.3),
    "mean": MeanSelection(),
    "two_phase": TwoPhaseSelection(),
}
SMOOTH = ["soft", "top_k", "entmax", "sparsemax", "two_phase"]


@pytest.fixture(params=ALL)
def selection(request: pytest.FixtureRequest) -> nn.Module:
    return ALL[request.param].eval()


def bags(num_scores: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(4, 9, num_scores, generator=generator, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor([9, 5, 2, 1])[:, None]
    return scores, mask


@pytest.mark.parametrize("num_scores", [1, 3])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_weights_are_a_distribution_over_real_slices(selection, num_scores, temperature):
    scores, mask = bags(num_scores)
    weights = selection(scores, mask, torch.tensor(temperature))
    assert weights.shape == scores.shape
    assert (weights >= 0).all()
    assert (weights[~mask] == 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(4, num_scores, dtype=torch.float64))


def test_what_lies_in_padding_changes_nothing(selection):
    scores, mask = bags()
    other = torch.where(mask[..., None], scores, torch.full_like(scores, 1e4))
    longer = torch.cat([other, torch.full((4, 3, 1), -7.0, dtype=scores.dtype)], 1)
    longer_mask = torch.cat([mask, torch.zeros(4, 3, dtype=torch.bool)], 1)
    t = torch.tensor(0.7)
    torch.testing.assert_close(selection(longer, longer_mask, t)[:, :9], selection(scores, mask, t), atol=1e-6, rtol=0)


def test_order_of_slices_only_orders_the_weights(selection):
    scores, _ = bags()
    mask = torch.ones(4, 9, dtype=torch.bool)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    t = torch.tensor(0.7)
    torch.testing.assert_close(selection(scores[:, order], mask, t), selection(scores, mask, t)[:, order])


def test_a_batch_equals_its_bags_one_by_one(selection):
    scores, mask = bags()
    t = torch.tensor(0.7)
    together = selection(scores, mask, t)
    for i, n in enumerate(mask.sum(1)):
        alone = selection(scores[i : i + 1, :n], mask[i : i + 1, :n], t)
        torch.testing.assert_close(together[i, :n], alone[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["soft", "top_k", "entmax", "gumbel", "two_phase"])
def test_low_temperature_is_hard_and_high_is_the_mean(name):
    scores, mask = bags()
    hard = HardSelection()(scores, mask, torch.tensor(1.0))
    torch.testing.assert_close(ALL[name].eval()(scores, mask, torch.tensor(1e-4)), hard)
    if name != "top_k":
        mean = MeanSelection()(scores, mask, torch.tensor(1.0))
        torch.testing.assert_close(ALL[name].eval()(scores, mask, torch.tensor(1e6)), mean, atol=1e-4, rtol=0)


def test_soft_equals_a_loop_in_numpy():
    scores, mask = bags(2)
    weights = SoftSelection()(scores, mask, torch.tensor(0.5)).numpy()
    for b, n in enumerate(mask.sum(1).tolist()):
        for s in range(2):
            raised = [np.exp(float(scores[b, i, s]) / 0.5) for i in range(n)]
            np.testing.assert_allclose(weights[b, :n, s], np.array(raised) / sum(raised), rtol=1e-12)


def test_hard_takes_the_first_of_equal_scores_and_passes_no_gradient():
    scores = torch.tensor([[[1.0], [2.0], [2.0]]], requires_grad=True)
    weights = HardSelection()(scores, torch.ones(1, 3, dtype=torch.bool), torch.tensor(1.0))
    assert weights[0, :, 0].tolist() == [0, 1, 0]
    assert not weights.requires_grad


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_are_right(name):
    scores, mask = bags()
    scores = scores.double().requires_grad_()
    t = torch.tensor(0.8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: ALL[name].eval()(s, mask, t), scores)


def test_straight_through_is_hard_forward_and_soft_backward():
    scores, mask = bags()
    t, probe = torch.tensor(0.8), torch.randn(4, 9, 1, dtype=torch.float64)
    gradients = []
    for module in (StraightThroughSelection(), SoftSelection()):
        s = scores.clone().requires_grad_()
        weights = module(s, mask, t)
        (weights * probe).sum().backward()
        gradients.append(s.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(StraightThroughSelection()(scores, mask, t), HardSelection()(scores, mask, t))


def test_gumbel_draws_in_training_as_often_as_softmax_says():
    torch.manual_seed(0)
    scores = torch.tensor([0.0, 1.0, 2.0]).view(1, 3, 1).expand(20000, 3, 1)
    mask = torch.ones(20000, 3, dtype=torch.bool)
    drawn = GumbelSelection().train()(scores, mask, torch.tensor(1e-3)).mean(0)[:, 0]
    torch.testing.assert_close(drawn, torch.tensor([0.0, 1.0, 2.0]).softmax(0), atol=0.015, rtol=0)


def test_top_k_keeps_k_slices_also_among_equal_scores():
    weights = TopKSelection(2)(torch.zeros(1, 5, 1), torch.ones(1, 5, dtype=torch.bool), torch.tensor(1.0))
    assert (weights > 0).sum() == 2
    with pytest.raises(ValueError, match="at least 1"):
        TopKSelection(0)


def test_two_phase_switches_by_a_saved_flag():
    scores, mask = bags()
    t = torch.tensor(0.8)
    module = TwoPhaseSelection()
    torch.testing.assert_close(module(scores, mask, t), SoftSelection()(scores, mask, t))
    module.hard_phase.fill_(True)
    again = TwoPhaseSelection()
    again.load_state_dict(module.state_dict())
    torch.testing.assert_close(again(scores, mask, t), HardSelection()(scores, mask, t))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", ["soft", "hard", "mean", "top_k", "two_phase"])
def test_scripted_equals_eager(name):
    scores, mask = bags()
    t = torch.tensor(0.8)
    torch.testing.assert_close(torch.jit.script(ALL[name])(scores, mask, t), ALL[name](scores, mask, t))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_entmax_refuses_scripting_in_one_sentence():
    with pytest.raises(InputError, match="cannot be scripted") as error:
        torch.jit.script(nn.Sequential(EntmaxSelection()))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="above 1"):
        EntmaxSelection(1.0)


def test_entmax_is_sparse_and_meets_its_definition():
    scores, mask = bags()
    weights = EntmaxSelection(2.0)(scores, mask, torch.tensor(1.0))[0, :, 0]
    # Sparsemax is the Euclidean projection onto the simplex: on its support, score minus weight is constant.
    support = weights > 0
    assert 0 < support.sum() < 9
    gap = (scores[0, :, 0] - weights)[support]
    torch.testing.assert_close(gap, gap.mean().expand_as(gap))
    assert (scores[0, :, 0][~support] <= gap.mean() + 1e-9).all()
