"""The training log: rows, empty cells, going back to an earlier epoch, TensorBoard."""

import csv
import math

import pytest
import torch
from ignite.engine import Engine, Events
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bundle.training.log import EpochLog

from .conftest import counting_engine


def make_log(folder, metrics=None, val_metrics=None, val_epochs=(), tensorboard=False, stability=None):
    """A trainer and its log; the evaluator runs in some epochs."""
    optimizer = torch.optim.SGD(
        [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (0.1, 0.2)], lr=1.0
    )
    trainer = counting_engine(metrics or (lambda epoch: {"train_loss": 1 / epoch}))
    evaluator = counting_engine(val_metrics or (lambda epoch: {"val_auc": epoch / 7}))

    def validate(engine):
        if engine.state.epoch in val_epochs:
            evaluator.state.epoch = engine.state.epoch - 1
            evaluator.run([0], max_epochs=engine.state.epoch)

    trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)
    log = EpochLog(folder, optimizer, [evaluator], stability, tensorboard)
    log.attach(trainer)
    return trainer, log


def rows(folder):
    with (folder / "epochs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_one_row_an_epoch_with_what_was_measured(tmp_path):
    trainer, _ = make_log(
        tmp_path, lambda e: {"train_loss": 1 / e, "flip_rate": math.nan if e == 1 else 0.5}, val_epochs=(2,)
    )
    trainer.run([0], max_epochs=3)
    table = rows(tmp_path)
    assert [row["epoch"] for row in table] == ["1", "2", "3"]
    assert [float(row["train_loss"]) for row in table] == [1, 1 / 2, 1 / 3]  # exactly
    assert [row["flip_rate"] for row in table] == ["", "0.5", "0.5"]
    assert [row["val_auc"] for row in table] == ["", str(2 / 7), ""]
    assert [(row["lr"], row["classifier_lr"]) for row in table] == [("0.1", "0.2")] * 3


def test_the_file_is_whole_after_every_epoch(tmp_path):
    trainer, _ = make_log(tmp_path)
    seen = []
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: seen.append(len(rows(tmp_path))))
    trainer.run([0], max_epochs=3)
    assert seen == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["epochs.csv"]


def metrics(epoch):
    return {"flip_rate": math.nan if epoch == 1 else epoch / 10, "train_loss": 1 / epoch}


def run_and_resume(folder, stop, total=5):
    trainer, _ = make_log(folder, metrics, val_epochs=(2, 4))
    trainer.run([0], max_epochs=stop)
    trainer, log = make_log(folder, metrics, val_epochs=(2, 4))
    log.cut(stop - 1)  # the last epoch of the first process had no checkpoint yet
    trainer.state.epoch, trainer.state.iteration = stop - 1, stop - 1
    trainer.state.max_epochs, trainer.state.epoch_length = total, 1
    trainer.run([0], max_epochs=total)


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_resumed_log_is_that_of_one_run(tmp_path, stop):
    run_and_resume(tmp_path / "two", stop)
    trainer, _ = make_log(tmp_path / "one", metrics, val_epochs=(2, 4))
    trainer.run([0], max_epochs=5)
    assert (tmp_path / "two" / "epochs.csv").read_text() == (tmp_path / "one" / "epochs.csv").read_text()


def test_later_rows_and_a_torn_last_row_are_dropped(tmp_path):
    (tmp_path / "epochs.csv").write_text("epoch,train_loss,val_auc\n1,0.5,\n2,0.25,0.75\n3,0.125,0.8\n4")
    _, log = make_log(tmp_path)
    log.cut(2)
    assert rows(tmp_path) == [
        {"epoch": "1", "train_loss": "0.5", "val_auc": ""},
        {"epoch": "2", "train_loss": "0.25", "val_auc": "0.75"},
    ]
    (tmp_path / "epochs.csv").write_text("epoch,train_loss\n1,0.5\nx,1\n,\n2")
    log.cut(9)
    assert rows(tmp_path) == [{"epoch": "1", "train_loss": "0.5"}, {"epoch": "2", "train_loss": ""}]


def test_cutting_where_there_is_no_log_starts_one(tmp_path):
    _, log = make_log(tmp_path)
    log.cut(3)
    assert list(tmp_path.iterdir()) == []


class Batches:
    """Stands for a stability recorder: two batches in each epoch."""

    def attach(self, engine):
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine):
        self.batch_nll = [engine.state.epoch / 3, 0.125]


def test_every_batch_is_noted_and_a_resumed_log_is_that_of_one_run(tmp_path):
    def started(folder):
        stability = Batches()
        trainer = counting_engine(lambda epoch: {"train_loss": 1 / epoch})
        stability.attach(trainer)
        log = EpochLog(folder, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), [], stability, tensorboard=False)
        log.attach(trainer)
        return trainer, log

    trainer, _ = started(tmp_path / "one")
    trainer.run([0], max_epochs=3)
    lines = (tmp_path / "one" / "batches.csv").read_text().splitlines()
    assert lines[:3] == ["epoch,batch,nll", f"1,1,{1 / 3}", "1,2,0.125"]
    assert len(lines) == 7
    trainer, _ = started(tmp_path / "two")
    trainer.run([0], max_epochs=2)
    trainer, log = started(tmp_path / "two")
    log.cut(1)
    trainer.state.epoch = trainer.state.iteration = trainer.state.epoch_length = 1
    trainer.state.max_epochs = 3
    trainer.run([0], max_epochs=3)
    assert (tmp_path / "two" / "batches.csv").read_text() == (tmp_path / "one" / "batches.csv").read_text()


def scalars(folder, name):
    events = EventAccumulator(str(folder / "events"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def test_tensorboard_has_the_same_numbers(tmp_path):
    trainer, _ = make_log(tmp_path, val_epochs=(2,), tensorboard=True)
    trainer.run([0], max_epochs=3)
    assert scalars(tmp_path, "train_loss") == pytest.approx({1: 1, 2: 1 / 2, 3: 1 / 3}, rel=1e-6)
    assert scalars(tmp_path, "val_auc") == pytest.approx({2: 2 / 7}, rel=1e-6)


def test_an_exception_closes_the_log_and_is_still_raised(tmp_path):
    def step(engine, _):
        if engine.state.epoch == 2:
            raise ZeroDivisionError

    trainer = Engine(step)
    trainer.logger.disabled = True
    _, log = make_log(tmp_path, tensorboard=True)
    log.attach(trainer)
    with pytest.raises(ZeroDivisionError):
        trainer.run([0], max_epochs=3)
    assert [row["epoch"] for row in rows(tmp_path)] == ["1"]
    assert log._writer is not None
    assert log._writer.file_writer is None  # closed
