"""The engine step: equal to PyTorch written by hand, with accumulation, mixed precision and MONAI's own handlers."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Events
from monai.data import MetaTensor
from monai.engines.utils import IterationEvents
from monai.handlers import LrScheduleHandler, StatsHandler, ValidationHandler
from torch import nn
from torch.utils.data import DataLoader, Dataset

from bundle.data.collate import collate_bags
from bundle.data.dataset import BagSampler
from bundle.errors import InputError, Refusal
from bundle.model.bag_network import BagOutput, Evidence, random_halves
from bundle.model.encoder import FrozenBatchNorm2d
from bundle.model.occlusion import leave_one_out
from bundle.training.engine import BagEvaluator, BagEvents, autocast_dtype, prepare_bags
from bundle.training.handlers import GradientClip, named_scores
from bundle.training.losses import BagCrossEntropy, DualStreamLoss, MILFocalLoss
from bundle.training.mixing import MixBags
from bundle.training.schedules import warmup_cosine

from . import processes
from .conftest import (
    Encoder,
    make_bag,
    make_batch,
    make_evaluator,
    make_loss,
    make_network,
    make_trainer,
    weights_of,
)

CPU = torch.device("cpu")


def steps_by_hand(groups, optimizer_of=lambda network: torch.optim.SGD(network.parameters(), lr=0.1)):
    """Weights after one step on the mean over the bags of each group of batches, written in plain PyTorch."""
    network = make_network()
    optimizer, loss = optimizer_of(network), make_loss()
    network.train()
    for group in groups:
        optimizer.zero_grad()
        for cases in group:
            batch = make_batch(*cases)
            output = network.explain(batch["image"], batch["mask"])
            share = len(cases) / sum(map(len, group))
            (share * loss(output, batch["label"], batch["mask"])).backward()
        optimizer.step()
    return weights_of(network)


def trained(**arguments):
    network = make_network()
    make_trainer(network, **arguments).run()
    return weights_of(network)


def assert_same(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_a_run_equals_steps_written_by_hand():
    exact = {"rtol": 0, "atol": 0}
    assert_same(trained(cases=4, batch_size=2), steps_by_hand([[(0, 1)], [(2, 3)]]), **exact)
    assert_same(trained(cases=4, batch_size=2, max_epochs=2), steps_by_hand([[(0, 1)], [(2, 3)]] * 2), **exact)


def test_momentum_and_adam_too():
    for kind in (torch.optim.AdamW, torch.optim.RMSprop):
        network = make_network()
        make_trainer(network, optimizer=kind(network.parameters(), lr=1e-3), max_epochs=2).run()
        by_hand = steps_by_hand([[(0, 1)], [(2, 3)]] * 2, lambda n, k=kind: k(n.parameters(), lr=1e-3))
        assert_same(weights_of(network), by_hand, rtol=0, atol=0)


def test_accumulated_batches_equal_one_batch_of_all():
    one = trained(cases=4, batch_size=4)
    for batch_size in (1, 2):
        several = trained(cases=4, batch_size=batch_size, accumulation_steps=4 // batch_size)
        assert_same(several, one, rtol=1e-5, atol=1e-7)
    assert not torch.equal(one["bag_classifier.weight"], make_network().bag_classifier.weight)


def test_a_short_last_group_is_a_mean_over_itself():
    by_hand = steps_by_hand([[(0,), (1,)], [(2,)]] * 2)
    assert_same(trained(cases=3, batch_size=1, accumulation_steps=2, max_epochs=2), by_hand, rtol=1e-6, atol=1e-8)


def test_a_short_last_batch_counts_by_its_bags():
    by_hand = steps_by_hand([[(0, 1, 2), (3, 4, 5), (6,)]])
    assert_same(trained(cases=7, batch_size=3, accumulation_steps=3), by_hand, rtol=1e-5, atol=1e-7)
    by_hand = steps_by_hand([[(0, 1, 2), (3, 4, 5)], [(6,)]])
    assert_same(trained(cases=7, batch_size=3, accumulation_steps=2), by_hand, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("norm", ["none", "group", "instance", "frozen_batch"])
@pytest.mark.parametrize("bag_loss", ["cross_entropy", "focal"])
def test_accumulation_equals_one_batch_to_the_last_digits(norm, bag_loss):
    loss = {
        "cross_entropy": lambda: BagCrossEntropy(0.1, [1.0, 7.0]), "focal": lambda: MILFocalLoss(2.0, [1.0, 7.0])
    }[bag_loss]  # fmt: skip
    whole = processes.Run(cases=7, batch_size=7, norm=norm, bag_loss=loss)()
    for batch_size, steps in ((1, 7), (2, 4), (3, 3), (4, 2), (6, 2)):
        parts = processes.Run(cases=7, batch_size=batch_size, accumulation_steps=steps, norm=norm, bag_loss=loss)()
        assert len(parts["steps"]) == len(whole["steps"]) == 1
        assert_same(parts["steps"][0], whole["steps"][0], rtol=1e-12, atol=1e-14)
        assert_same(parts["weights"], whole["weights"], rtol=1e-12, atol=1e-14)
        assert parts["metrics"][0]["train_loss"] == pytest.approx(whole["losses"][0], rel=1e-12)


def test_consistency_compares_halves_of_the_same_slices():
    """One step with the term, written by hand with the halves that the seed gives."""
    network, loss = make_network(), make_loss(lambda_consistency=1e4)
    torch.manual_seed(7)
    make_trainer(network, cases=2, batch_size=2, loss=loss).run()
    by_hand, batch = make_network(), make_batch(0, 1)
    torch.manual_seed(7)
    features = by_hand.encode(batch["image"], batch["mask"])
    halves = torch.cat([by_hand.head(features, part).logits for part in random_halves(batch["mask"])])
    by_hand.train()
    output = by_hand.explain(batch["image"], batch["mask"])
    total = make_loss(lambda_consistency=1e4)(output, batch["label"], batch["mask"], halves)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    total.backward()
    optimizer.step()
    assert_same(weights_of(network), weights_of(by_hand), rtol=1e-5, atol=1e-7)
    assert float(loss.components["consistency"]) > 0
    plain = trained(cases=2, batch_size=2)
    assert max(float((value - plain[name]).abs().max()) for name, value in weights_of(network).items()) > 1e-4


def test_mixed_bags_reach_the_loss_as_shares_and_metrics_as_classes():
    targets, seen = [], []
    loss = make_loss()
    loss.register_forward_pre_hook(lambda _, given: targets.append(given[1]))
    trainer = make_trainer(
        make_network(), cases=2, batch_size=2, loss=loss, prepare_batch=MixBags(1.0, 2), max_epochs=9
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(e.state.output["label"]))
    trainer.run()
    assert any(0 < value < 1 for target in targets for value in target.flatten().tolist())
    assert all(label.tolist() == [0, 1] for label in seen)  # of the larger share, which is a bag's own


def test_gradients_are_ready_once_a_step():
    network, seen = make_network(), []
    trainer = make_trainer(network, cases=5, batch_size=1, accumulation_steps=2, max_epochs=2)
    trainer.add_event_handler(BagEvents.GRADIENTS_READY, lambda e: seen.append(e.state.iteration))
    trainer.run()
    assert seen == [2, 4, 5, 7, 9, 10]


def test_a_loss_scaler_changes_no_step():
    network = make_network()
    trainer = make_trainer(network)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    seen = []
    trainer.add_event_handler(
        IterationEvents.BACKWARD_COMPLETED, lambda: seen.append(float(network.bag_classifier.bias.grad.norm()))
    )
    trainer.add_event_handler(
        BagEvents.GRADIENTS_READY, lambda: seen.append(float(network.bag_classifier.bias.grad.norm()))
    )
    trainer.run()
    assert seen[0] == pytest.approx(2**10 * 2 * seen[1])  # of the sum over two bags
    assert_same(weights_of(network), trained(), rtol=1e-4, atol=1e-7)


def test_a_scaler_skips_a_step_that_overflowed():
    network = make_network()
    trainer = make_trainer(network, cases=2)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    network.bag_classifier.bias.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
    GradientClip(network, 1.0).attach(trainer)
    LrScheduleHandler(warmup_cosine(trainer.optimizer, 0, 1, 1), print_lr=False, epoch_level=False).attach(trainer)
    before = weights_of(network)
    trainer.run()  # and no warning that the schedule stepped before the optimiser
    assert_same(weights_of(network), before, rtol=0, atol=0)
    assert trainer.scaler.get_scale() < 2.0**10


class Recorder(nn.Module):
    """An encoder that notes the types of what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.kinds = Encoder(), set()

    def forward(self, image):
        for layer in self.inner:
            image = layer(image)
            self.kinds.add((type(layer).__name__, image.dtype))
        return image


@pytest.mark.parametrize("train", [True, False])
def test_bf16_computes_the_encoder_and_keeps_the_head_in_float32(train):
    encoder = Recorder()
    network = make_network(encoder=encoder)
    if train:
        engine = make_trainer(network, cases=2, amp=True, precision="bf16")
    else:
        engine = make_evaluator(network, [make_bag(0)], amp=True, precision="bf16")
    seen = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(e.state.output))
    engine.run()
    assert ("Conv2d", torch.bfloat16) in encoder.kinds
    (output,) = seen
    assert {value.dtype for value in output["evidence"]} == {torch.float32}
    assert output["pred"].dtype == torch.float32
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    if train:
        assert output["loss"].dtype == torch.float32
        assert engine.scaler is None


def test_without_amp_everything_is_float32():
    encoder = Recorder()
    make_trainer(make_network(encoder=encoder), cases=2, precision="bf16").run()
    assert {kind for _, kind in encoder.kinds} == {torch.float32}


def test_precision(monkeypatch):
    cuda = torch.device("cuda")
    assert autocast_dtype(CPU, amp=False) is None
    assert autocast_dtype(CPU, amp=True, precision="bf16") is torch.bfloat16
    assert autocast_dtype("cpu", amp=True, precision="bf16") is torch.bfloat16  # as the command line gives it
    for supported, expected in ((True, torch.bfloat16), (False, torch.float16)):
        # A GPU that only emulates bfloat16 counts as supported unless emulation is excluded.
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True, s=supported: s or including_emulation
        )
        assert autocast_dtype(cuda, amp=True) is expected
        assert autocast_dtype(cuda, amp=True, precision="fp16") is torch.float16
        assert autocast_dtype(cuda, amp=True, precision="bf16") is torch.bfloat16
        mkldnn = SimpleNamespace(_is_mkldnn_bf16_supported=lambda s=supported: s)
        monkeypatch.setattr(torch.ops, "mkldnn", mkldnn, raising=False)
        assert autocast_dtype(CPU, amp=True) is (torch.bfloat16 if supported else None)
    with pytest.raises(InputError, match="precision fp16 needs a GPU"):
        autocast_dtype(CPU, amp=True, precision="fp16")
    for amp in (True, False):
        with pytest.raises(InputError, match="precision must be auto, bf16 or fp16, not 'half'"):
            autocast_dtype(CPU, amp, "half")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_cases(value):
    network = make_network()
    trainer = make_trainer(network, cases=4)
    before = weights_of(network)

    def spoil(engine):
        if engine.state.iteration == 2:
            with torch.no_grad():
                network.bag_classifier.bias[0] = value

    trainer.add_event_handler(Events.ITERATION_STARTED, spoil)
    trainer.logger.disabled = True  # ignite prints the exception
    with pytest.raises(InputError, match=r"the loss became \w+ in epoch 1 \(cases c2, c3\): lower lr"):
        trainer.run()
    assert all(torch.isfinite(p).all() or n == "bag_classifier.bias" for n, p in network.named_parameters())
    assert before.keys() == weights_of(network).keys()


def test_output_is_there_at_every_event_and_keeps_no_graph():
    network, seen = make_network(), {}
    trainer = make_trainer(network, cases=2)
    for event in (
        IterationEvents.FORWARD_COMPLETED, IterationEvents.LOSS_COMPLETED, IterationEvents.BACKWARD_COMPLETED,
        BagEvents.GRADIENTS_READY, IterationEvents.MODEL_COMPLETED, Events.ITERATION_COMPLETED,
    ):  # fmt: skip
        trainer.add_event_handler(event, lambda e, name=event: seen.setdefault(name, set(e.state.output)))
    trainer.run()
    first = {"label", "mask", "pred", "evidence"}
    assert seen.pop(IterationEvents.FORWARD_COMPLETED) == first
    assert set(map(frozenset, seen.values())) == {frozenset(first | {"loss"})}
    output = trainer.state.output
    assert isinstance(output["evidence"], BagOutput)
    assert not any(value.requires_grad for value in (*output["evidence"], output["pred"], output["loss"]))


def test_a_frozen_norm_stays_frozen_through_training():
    norm = FrozenBatchNorm2d(4)
    norm.running_mean.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    network = make_network(encoder=Encoder(norm))
    before = weights_of(network)
    make_trainer(network, max_epochs=2).run()
    after = weights_of(network)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(before[f"encoder.1.{name}"], after[f"encoder.1.{name}"])
    assert not torch.equal(before["encoder.1.weight"], after["encoder.1.weight"])
    plain = make_network(encoder=Encoder(nn.BatchNorm2d(4)))
    make_trainer(plain, max_epochs=2).run()
    assert int(plain.encoder[1].num_batches_tracked) == 4  # what would have happened


class Asked(Dataset):
    """Notes the (epoch, index) that it is asked for."""

    def __init__(self) -> None:
        self.keys: list[tuple[int, int]] = []

    def __getitem__(self, key):
        self.keys.append(key)
        return make_bag(key[1])


def test_every_epoch_draws_with_its_own_number():
    data = Asked()
    loader = DataLoader(data, 2, sampler=BagSampler(4, seed=1), collate_fn=collate_bags)
    make_trainer(make_network(), loader=loader, max_epochs=3).run()
    assert [epoch for epoch, _ in data.keys] == [1] * 4 + [2] * 4 + [3] * 4
    orders = [[index for _, index in data.keys[i : i + 4]] for i in (0, 4, 8)]
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert orders[0] != orders[1] or orders[1] != orders[2]


def test_a_run_that_has_ended_is_left_alone():
    network = make_network()
    trainer = make_trainer(network, max_epochs=2)
    trainer.run()
    before = weights_of(network)
    trainer.run()
    assert trainer.state.epoch == 2
    assert_same(weights_of(network), before, rtol=0, atol=0)
    trainer.state.max_epochs = 3
    trainer.run()
    assert trainer.state.epoch == 3
    assert not torch.equal(network.bag_classifier.weight, before["bag_classifier.weight"])


def test_evaluation_equals_the_network_and_changes_nothing():
    network = make_network(encoder=Encoder(nn.BatchNorm2d(4)))
    bags, seen = [make_bag(i, num_slices=3 + i) for i in range(3)], []
    evaluator = make_evaluator(network, bags)
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(e.state.output))
    network.train()
    before = weights_of(network)
    evaluator.run()
    assert_same(weights_of(network), before, rtol=0, atol=0)
    assert network.training
    network.eval()
    for bag, output in zip(bags, seen, strict=True):
        torch.testing.assert_close(output["pred"], network(bag["image"][None]))
        assert output["evidence"].scores.shape == (1, len(bag["image"]), 1)
        assert not output["pred"].requires_grad


@pytest.mark.parametrize("num_classes", [2, 3])
def test_occlusion_is_of_the_second_of_two_classes_and_else_of_the_predicted(num_classes):
    network = make_network(num_classes=num_classes)
    bags = [make_bag(i, num_slices=3 + i) for i in range(4)]
    evaluator, seen = make_evaluator(network, bags, occlusion=True), []
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(e.state.output))
    evaluator.run()
    network.eval()
    for bag, output in zip(bags, seen, strict=True):
        classes = torch.tensor([1]) if num_classes == 2 else output["pred"].argmax(-1)
        torch.testing.assert_close(output["occlusion"], leave_one_out(network, bag["image"][None], None, classes))
        assert output["occlusion"].abs().max() > 0


def test_a_network_without_slices_of_its_own_has_no_occlusion():
    network = make_network()
    network.slicewise = False
    evaluator, seen = make_evaluator(network, [make_bag(0)], occlusion=True), []
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(e.state.output))
    evaluator.run()
    assert "occlusion" not in seen[0]


def test_a_refused_case_passes_through_the_evaluator():
    refusal = Refusal("missing_slices", "two slices are missing")
    bags = [make_bag(0), {"case": "r", "label": None, "patient": None, "refusal": refusal}, make_bag(1)]
    evaluator, seen = make_evaluator(make_network(), bags), []
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(e.state.output))
    evaluator.run()
    assert [set(output) == {"refusal"} for output in seen] == [False, True, False]
    assert seen[1]["refusal"] == [refusal]


def test_bags_lose_their_meta_data_on_the_way_in():
    batch = make_batch(0, 1)
    batch["image"] = MetaTensor(batch["image"])
    image, label, (mask,), rest = prepare_bags(batch, CPU)
    assert type(image) is torch.Tensor
    assert image.shape == (2, 4, 1, 8, 8)
    assert label.tolist() == [0, 1]
    assert mask.all()
    assert rest == {}


def test_monais_own_handlers_work(capsys):
    network = make_network()
    evaluator = make_evaluator(
        network, [make_bag(i) for i in range(4)], key_val_metric=named_scores(["accuracy"], "val_")
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    schedule = warmup_cosine(optimizer, 1, 2, 4)
    seen = []
    trainer = make_trainer(
        network, cases=4, batch_size=1, max_epochs=2, optimizer=optimizer, accumulation_steps=4,
        key_train_metric=named_scores(["accuracy"], "train_"),
        train_handlers=[
            LrScheduleHandler(schedule, print_lr=False, epoch_level=False),
            ValidationHandler(1, evaluator),
            StatsHandler(name="stats", tag_name="loss", output_transform=lambda output: output["loss"]),
        ],
    )  # fmt: skip
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e: seen.append(evaluator.state.epoch))
    logging.getLogger("stats").setLevel(logging.INFO)
    trainer.run()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    assert seen == [1, 2]
    assert 0 <= evaluator.state.metrics["val_accuracy"] <= 1
    assert 0 <= trainer.state.metrics["train_accuracy"] <= 1
    assert "Epoch: 2/2, Iter: 4/4 -- loss: " in capsys.readouterr().out


def test_monais_evaluator_arguments_still_work():
    loader = DataLoader([make_bag(0)], 1, collate_fn=collate_bags)
    doubled = BagEvaluator(CPU, loader, Evidence(make_network()), postprocessing=lambda o: {**o, "pred": 2 * o["pred"]})
    plain = BagEvaluator(CPU, loader, Evidence(make_network()))
    for evaluator in (doubled, plain):
        evaluator.run()
    torch.testing.assert_close(doubled.state.output["pred"], 2 * plain.state.output["pred"])


@pytest.mark.gpu
def test_a_step_on_the_gpu_with_class_weights_and_fp16():
    cuda = torch.device("cuda")
    network = make_network().to(cuda)
    trainer = make_trainer(network, loss=DualStreamLoss(BagCrossEntropy(0.1, [1.0, 2.0])))
    moved = type(trainer)(
        cuda,
        1,
        trainer.data_loader,
        Evidence(network),
        trainer.optimizer,
        trainer.loss_function,
        amp=True,
        precision="fp16",
    )
    before = weights_of(network)
    moved.run()
    assert moved.scaler is not None
    assert not torch.equal(network.bag_classifier.weight, before["bag_classifier.weight"])
