"""What is said at the beginning of a run."""

import logging
from types import SimpleNamespace

import pytest

from bundle.model.conv_encoder import ConvEncoder
from bundle.model.encoder import with_norm
from bundle.model.stages import freeze_stages
from bundle.training.run import tell_batch_norm, tell_draws

OTHERS = "; the others have no more and are used whole"


@pytest.mark.parametrize(
    ("lengths", "size", "strategy", "told"),
    [
        ([5, 8, 11], 4, "random", "bag_size 4: slices are drawn (random) of 3 of 3 training cases"),
        ([5, 8, 11], 8, "uniform", f"bag_size 8: slices are drawn (uniform) of 1 of 3 training cases{OTHERS}"),
        ([5, 8], 64, "random", f"bag_size 64: slices are drawn (random) of 0 of 2 training cases{OTHERS}"),
        ([5, 8], 4, "all", None),
        ([], 4, "random", None),  # nothing is known
    ],
)
def test_it_is_said_of_how_many_cases_slices_are_drawn(lengths, size, strategy, told, caplog):
    caplog.set_level(logging.INFO)
    tell_draws(SimpleNamespace(lengths=lambda: lengths), size, strategy)
    assert caplog.messages == ([] if told is None else [told])


@pytest.mark.parametrize(("norm", "frozen_stages", "batch_size", "told"), [
    ("batch", 0, 1, 1), ("batch", 1, 1, 1), ("batch", 2, 1, 0), ("batch", 0, 2, 0),
    ("group", 0, 1, 0), ("frozen_batch", 0, 1, 0),
])  # fmt: skip
def test_batch_norm_over_one_bag_is_warned_of(norm, frozen_stages, batch_size, told, caplog):
    encoder = with_norm(ConvEncoder(1, (8, 16)), norm)
    network = SimpleNamespace(encoder=encoder, frozen=tuple(freeze_stages(encoder, frozen_stages)))
    tell_batch_norm(network, batch_size)
    assert len(caplog.messages) == told
    assert all("raise batch_size, or set norm to group" in message for message in caplog.messages)
