"""The record of `fit`, and schedules in epochs."""

import json
import re
from dataclasses import asdict
from functools import partial

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from pyro_recursive.training import History, burda_schedule
from tests.oracles.training import auto_normal, normal_data, run


def test_history_tells_what_happened() -> None:
    step = partial(LambdaLR, lr_lambda=lambda epoch: 0.5**epoch)
    options = {"validation": normal_data()[:4], "validate_every": 2}
    history = run(auto_normal, scheduler=step, **options)
    assert history.epoch == [1, 2, 3, 4]
    assert history.steps == [3, 6, 9, 12]
    assert history.learning_rate == pytest.approx([1e-3, 5e-4, 2.5e-4, 1.25e-4])
    assert [value is None for value in history.validation] == [True, False, True, False]
    assert all(seconds > 0 for seconds in history.seconds)
    assert json.loads(json.dumps(asdict(history))) == asdict(history)
    assert repr(History()) == "History(no epochs)"
    history.stopped_early = True
    best = min(value for value in history.validation if value is not None)
    assert re.fullmatch(
        rf"History\(4 epochs, stopped early; \d+\.\d s; loss {history.loss[-1]:.2f} "
        rf"\(batches of 4 rows\); validation {history.validation[3]:.2f} \(batches of 4 rows\); "
        rf"best {best:.2f} in epoch {history.best_epoch}\)",
        repr(history),
    )


def test_burda_schedule_changes_after_the_epochs_of_the_paper() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    scheduler = burda_schedule(optimizer)
    rates = []
    for _ in range(3280):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    expected = [1e-3 * 10 ** (-i / 7) for i in range(8) for _ in range(3**i)]
    assert rates == pytest.approx(expected, rel=1e-12)
    changes = [epoch for epoch in range(1, 3280) if rates[epoch] != rates[epoch - 1]]
    assert changes == [1, 4, 13, 40, 121, 364, 1093]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)
