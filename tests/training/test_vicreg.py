"""VICReg against the formula written out in loops, its invariances, limits and gradients."""

import math

import numpy as np
import pytest
import torch

from bundle.errors import InputError
from bundle.model.projection import Projections
from bundle.training.vicreg import VICRegLoss, vicreg_terms


def views(num_slices=7, size=4, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return Projections(*(scale * torch.randn(2, num_slices, size, generator=generator, dtype=torch.float64)))


def terms_by_loops(first, second):
    """Equations 1 to 6 of arXiv:2105.04906, a number at a time."""
    num_slices, size = first.shape
    invariance = sum((first[i, j] - second[i, j]) ** 2 for i in range(num_slices) for j in range(size))
    variance = covariance = 0.0
    for view in (first, second):
        means = [sum(view[i, j] for i in range(num_slices)) / num_slices for j in range(size)]
        for j in range(size):
            for k in range(size):
                products = [(view[i, j] - means[j]) * (view[i, k] - means[k]) for i in range(num_slices)]
                entry = sum(products) / (num_slices - 1)
                if j == k:
                    variance += max(0.0, 1 - math.sqrt(entry + 1e-4)) / size / 2
                else:
                    covariance += entry**2 / size
    return invariance / (num_slices * size), variance, covariance


@pytest.mark.parametrize("num_slices", [2, 7])
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_terms_equal_the_loop(num_slices, scale):
    first, second = views(num_slices, scale=scale)
    expected = terms_by_loops(first.numpy(), second.numpy())
    np.testing.assert_allclose([float(term) for term in vicreg_terms(first, second)], expected, rtol=1e-10)


def test_the_loss_is_the_weighted_sum_and_keeps_its_terms():
    loss = VICRegLoss(2.0, 3.0, 5.0)
    terms = vicreg_terms(*views())
    # Label and mask, as an engine hands them over, change nothing.
    found = loss(views(), torch.tensor([1]), torch.ones(1, 7, dtype=torch.bool))
    assert float(found) == pytest.approx(2 * float(terms[0]) + 3 * float(terms[1]) + 5 * float(terms[2]))
    assert list(loss.components) == ["invariance", "variance", "covariance"]
    assert [float(value) for value in loss.components.values()] == pytest.approx([float(term) for term in terms])


def test_neither_order_nor_place_nor_which_view_is_first_matters():
    first, second = views()
    expected = [float(term) for term in vicreg_terms(first, second)]
    order, columns = torch.randperm(7), torch.randperm(4)
    for others in (
        (second, first), (first[order], second[order]), (first[:, columns], second[:, columns]), (first + 3, second + 3)
    ):  # fmt: skip
        assert [float(term) for term in vicreg_terms(*others)] == pytest.approx(expected)


def test_what_it_rewards():
    alike = torch.tensor([[3.0, 3.0], [3.0, -3.0], [-3.0, 3.0], [-3.0, -3.0]])
    assert [float(term) for term in vicreg_terms(alike, alike)] == pytest.approx([0, 0, 0])
    collapsed = torch.full((4, 2), 5.0)
    assert [float(term) for term in vicreg_terms(collapsed, collapsed)] == pytest.approx([0, 0.99, 0])
    repeated = alike[:, :1].expand(4, 2)
    assert [float(term) for term in vicreg_terms(repeated, repeated)] == pytest.approx([0, 0, 2 * 12.0**2])


@pytest.mark.parametrize("num_slices", [1, 2, 5])
def test_gradients(num_slices):
    first, second = (view.requires_grad_() for view in views(num_slices, 3, scale=0.4))
    assert torch.autograd.gradcheck(lambda *given: VICRegLoss()(Projections(*given)), (first, second))


def test_one_slice_has_invariance_alone():
    first, second = views(1)
    terms = vicreg_terms(first, second)
    assert [float(term) for term in terms] == [float((first - second).square().mean()), 0, 0]


def test_the_gradient_at_collapse_is_finite():
    projections = torch.zeros(4, 3, requires_grad=True)
    VICRegLoss()(Projections(projections, projections)).backward()
    assert torch.isfinite(projections.grad).all()


@pytest.mark.parametrize("name", ["invariance", "variance", "covariance"])
@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_impossible_weights_are_refused(name, weight):
    with pytest.raises(InputError, match=f"vicreg_{name} must be 0 or more, not {weight}"):
        VICRegLoss(**{name: weight})
