"""`reproduce`: killed runs equal runs that never were, and tables of whatever runs there are.

The file is its own script, which forks a child for each life of a run.
"""

import importlib
import json
import math
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from benchmarks import __main__ as command
from benchmarks import experiment
from benchmarks.report import BASELINE
from benchmarks.reproduce import STUDIES
from benchmarks.studies import beta, convergence, planes, recursive
from benchmarks.tasks import image_sets, images, likelihoods
from pyro_recursive import CIWAE_ELBO, IWAE_ELBO
from pyro_recursive.datasets import Dataset, dynamic_binarize
from pyro_recursive.training.checkpoint import forked_rng
from pyro_recursive.training.learner import VALIDATION_SEED
from tests.oracles.kills import count_kills

ROOT, METHODS = Path(__file__).parents[2], ["Trace_ELBO", "CIWAE learned"]
SMALL = ["--datasets", "digits", "--networks", "10-3", "--eval-points", "250"]
SMALL += ["--eval-samples", "64", "--batch-size", "200"]
OF_TIME = {"history", "processor_seconds", "epoch_processor_seconds"}


def reproduce(folder: Path, *more: str) -> Path:
    """Run the study of bounds with tiny networks; return the folder of its results."""
    torch.set_default_dtype(torch.float32)
    command.main(["reproduce", "bounds", *SMALL, "--output", str(folder), *more])
    return next(folder.glob("digits-10-3-*"))


def scores(path: Path) -> dict[str, Any]:
    """Return all of a run that does not depend on the clock."""
    run = json.loads(path.read_text())["run"]
    found = {f"history {k}": v for k, v in run["history"].items() if k != "seconds"}
    for part in run.keys() - OF_TIME:
        own = run[part] if isinstance(run[part], dict) else {"": run[part]}
        found |= {f"{part} {k}": v for k, v in own.items()}
    return found


def live(folder: Path) -> None:
    """Run to the end, with files written as often as there is something to write."""
    experiment.WRITE_SECONDS = 0.0
    torch.set_num_threads(1)
    reproduce(folder, "--eager", "--epochs", "4", "--methods", *METHODS)


def main(folder: Path) -> None:
    """Kill a run many times; compare it with one that was left alone."""
    importlib.import_module("torch._dynamo")  # optimisers import it late: once for all children
    start = time.monotonic()
    count_kills(live, (folder / "whole",), [])
    seconds = time.monotonic() - start
    dice = random.Random(3)
    times = [dice.uniform(0.05, 0.4) * seconds for _ in range(8)]
    kills = count_kills(live, (folder / "parts",), times)
    wholes = sorted((folder / "whole").glob("*/runs/*.json"))
    assert len(wholes) == len(METHODS)
    for whole in wholes:
        part = folder / "parts" / whole.relative_to(folder / "whole")
        mine, other = scores(part), scores(whole)
        wrong = {key: (mine.get(key), other[key]) for key in other if mine.get(key) != other[key]}
        assert not wrong, f"{whole.name} differs after {kills} kills: {wrong}"
    print(kills)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_runs_equal_the_uninterrupted_run(tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", "tests.benchmarks.test_reproduce", str(tmp_path)]
    done = subprocess.run(call, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) >= 2


@pytest.mark.slow
def test_tables_of_whatever_runs_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = reproduce(tmp_path, "--epochs", "30", "--methods", "IWAE", "--eager")
    stored = json.loads((folder / "runs" / "iwae-0.json").read_text())
    history, facts = stored["run"]["history"], (stored["settings"], stored["hardware"])
    assert facts[0]["epochs"] == 30
    assert facts[1]["threads"] == 1
    stages = [round(-7 * math.log10(1e3 * rate)) for rate in history["learning_rate"]]
    assert stages == [0, 4, 5, 5, *6 * [6], *20 * [7]]  # 30 / 3280 * 3**i epochs each

    begun = {name: v[:12] if isinstance(v, list) else v for name, v in history.items()}
    other = {**stored, "method": "IWAE dreg", "seed": 1, "run": {"history": begun}}
    (folder / "runs" / "iwae-dreg-1.json").write_text(json.dumps(other))
    capsys.readouterr()
    reproduce(tmp_path, "--epochs", "30", "--report")
    shown, text = capsys.readouterr().out, (folder / "report.md").read_text()
    assert "\n| IWAE " in shown
    assert "IWAE dreg, seed 1: in epoch 13, not evaluated." in shown
    assert "python -m benchmarks reproduce bounds --datasets digits" in text
    assert "2 runs, one thread each" in text
    assert (folder / "results.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="give the same options to resume"):
        reproduce(tmp_path, "--epochs", "30", "--batch-size", "100", "--report")


def test_spread_over_first_betas() -> None:
    def run(value: float) -> dict[str, Any]:
        images = {"log_p": [value], "iwae_64": [value - 1.0, value + 1.0]}
        return {"test": images, "history": {"seconds": [1.0]}}

    values = {"fixed 0.05": -3.0, "fixed 0.95": -5.0, "naive 0.5": -4.0}
    found = beta.spreads({"runs": {name: {"0": run(value)} for name, value in values.items()}})
    assert found["fixed"].tolist() == [-3.0, -5.0]
    assert found["naive"].tolist() == [-4.0]


def test_bounds_after_equal_seconds_leave_out_runs_without_an_epoch() -> None:
    def history(seconds: float) -> dict[str, Any]:
        validation = [10.0, 8.0, 6.0]
        return {"seconds": [seconds] * 3, "validation": validation, "validation_rows": 2}

    names = {BASELINE: 1.0, "slower": 1.5, "much slower": 4.0}
    runs: dict[str, Any] = {n: {"0": {"history": history(s)}} for n, s in names.items()}
    cell = recursive.TABLE["at the VAE's time"]
    assert cell("slower", {"runs": runs}) == "-1.00"  # after 3 seconds: 8 beside 6
    assert cell("much slower", {"runs": runs}) == ""


def test_bounds_at_equal_cost_are_the_best_so_far_of_both() -> None:
    def run(validation: list[float], seconds: float) -> dict[str, Any]:
        history = {"validation": validation, "validation_rows": 2}
        return {"history": history, "epoch_processor_seconds": [seconds] * 3}

    base = run([20.0, 16.0, 12.0, 10.0, 14.0], 1.0)  # its best is epoch 4: -5 a row
    other = run([18.0, 8.0, 9.0, 6.0], 1.5)  # -9, -4, -4, -3
    results = {"runs": {BASELINE: {"0": base}, "other": {"0": other}}}
    at_equal = partial(convergence.at_equal, "other", results)
    assert at_equal(unit=lambda run: 1.0, share=1.0) == "+2.00"  # after 4 epochs: -3 and -5
    assert at_equal(unit=convergence.epoch_seconds, share=1.0) == "+1.00"  # after 2.7: -4
    assert at_equal(unit=convergence.epoch_seconds, share=0.5) == "+0.67"  # 1.33: -7.33 and -8
    assert at_equal(unit=convergence.epoch_seconds, share=0.25) == ""  # other has not ended one
    assert at_equal(unit=lambda run: 1.0, share=0.1) == "+1.00"  # one epoch at least: -9 and -10
    assert convergence.best_epoch(base) == 4
    late = run([20.0, 10.0, 9.97, 9.97, 9.95], 1.0)  # in nats per row -5, then at most 0.025 more
    assert (convergence.end_epoch(late), convergence.best_epoch(late)) == (3, 5)


def test_a_run_without_stored_times_is_left_out() -> None:
    def run(times: list[float]) -> dict[str, Any]:
        history = {"validation": [4.0, 2.0], "validation_rows": 2}
        return {"history": history, "epoch_processor_seconds": times}

    runs = {BASELINE: {"0": run([60.0] * 2), "1": run([])}, "other": {"0": run([])}}
    minutes = convergence.TABLE["minutes to the best"]
    assert minutes(BASELINE, {"runs": runs}) == "2.0"
    assert minutes("other", {"runs": runs}) == ""
    assert convergence.TABLE["at equal time"]("other", {"runs": runs}) == ""


def test_the_rate_is_halved_after_five_epochs_without_any_improvement() -> None:
    scheduler: Any = convergence.STUDY.scheduler
    made = scheduler(torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.0))
    rates = []
    for value in [3.0, 2.99999, *[3.0] * 10, 2.0]:
        made.step(value)
        rates.append(made.get_last_lr()[0])
    assert rates == [1.0] * 6 + [0.5] * 5 + [0.25] * 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Training was interrupted")
def test_a_resumed_run_ends_with_the_parameters_of_its_best_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def validation(method: Any, task: Any, settings: Any) -> dict[str, Any]:
        with torch.no_grad(), forked_rng(VALIDATION_SEED):
            loss = IWAE_ELBO(8).loss(method.vae.model, method.guide, task.validation)
        return {"evaluated": loss}

    def rate(epoch: int) -> float:
        return 1.0 if epoch < 4 else 300.0  # the rate 0.3: from here on it gets worse

    epochs, seen = {"epochs": 20, "epoch_steps": 15, "patience": 4}, 0
    study = replace(convergence.STUDY, evaluate=validation, report=str, **epochs)
    study = replace(study, scheduler=partial(LambdaLR, lr_lambda=rate), plot=lambda *_: None)
    monkeypatch.setitem(STUDIES, "convergence", study)
    call = ["reproduce", "convergence", *SMALL, "--eager", "--methods", "VAE", "mixture 2"]
    torch.set_default_dtype(torch.float32)

    def interrupted(x: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += 1
        if seen == 6 * 13 + 3:  # in epoch 7, of 13 steps
            raise KeyboardInterrupt
        return dynamic_binarize(x)

    monkeypatch.setattr(likelihoods, "dynamic_binarize", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        command.main([*call, "--output", str(tmp_path)])
    command.main([*call, "--output", str(tmp_path)])
    for path in tmp_path.glob("*/runs/*.json"):
        run = json.loads(path.read_text())["run"]
        history = run["history"]
        assert history["stopped_early"]
        assert convergence.best_epoch(run) + 4 == len(history["epoch"]) < 20
        assert run["evaluated"] == pytest.approx(min(history["validation"]), rel=1e-6)
        assert run["evaluated"] < history["validation"][-1] - 10


@pytest.mark.slow
def test_two_latents_have_exact_scores_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STUDIES, "convergence", replace(convergence.STUDY, epoch_steps=30))
    monkeypatch.setattr(planes, "ROWS", 3)
    monkeypatch.setattr(planes, "PICTURED", 2)
    torch.set_default_dtype(torch.float32)
    call = ["reproduce", "convergence", "--datasets", "digits-rotated", "--networks", "10-2"]
    call += ["--epochs", "2", "--eval-points", "10", "--eval-samples", "3000", "--eager"]
    methods = ["recursive 2", "IAF"]
    command.main([*call, "--methods", *methods, "--output", str(tmp_path)])
    for path in tmp_path.glob("*/runs/*.json"):
        run = json.loads(path.read_text())["run"]
        assert run["plane"]["log_p"] == pytest.approx(run["test"]["log_p"][:3], abs=0.1)
        assert path.with_suffix(".png").stat().st_size > 10_000
    assert "KL to the posterior" in next(tmp_path.glob("*/report.md")).read_text()


def test_images_of_14x14_are_means_of_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.rand(3, 784)
    labels = torch.zeros(3, dtype=torch.int64)
    found = Dataset("mnist", rows, rows[:1], labels, labels[:1], (28, 28))
    monkeypatch.setattr(image_sets, "load", lambda *_, **__: found)
    small = image_sets.load_images("mnist-14", download=False)
    expected = sum(rows.view(3, 28, 28)[:, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
    assert small.shape == (14, 14)
    torch.testing.assert_close(small.train, expected.flatten(1))
    both = image_sets.load_images("mnist-omniglot-14", download=False)
    assert sorted(both.train.sum(1).tolist()) == sorted(small.train.sum(1).tolist() * 2)


def test_turns_of_an_image_stay_together_in_a_split() -> None:
    digits, turned = (
        image_sets.load_images(f"digits{x}", download=False) for x in ("", "-rotated")
    )
    assert torch.equal(turned.train[::4], digits.train)
    first = digits.train[0].view(8, 8)
    assert torch.equal(turned.train[1].view(8, 8), first.T.flip(0))
    assert torch.equal(turned.train[2].view(8, 8), first.flip(0, 1))
    assert len(turned.train) % 4 == images.HELD_OUT["digits-rotated"] % 4 == 0


def test_a_grid_has_the_integral_and_the_modes() -> None:
    locs, scales = torch.tensor([[-3.0, 1.0], [2.0, 0.5]]), torch.tensor([[0.05, 0.1], [0.3, 0.02]])
    parts = dist.Normal(locs, scales).to_event(1)
    log_weights = torch.tensor([0.4, 0.6]).log() - 70.0

    def log_density(points: torch.Tensor) -> torch.Tensor:
        return (parts.log_prob(points.unsqueeze(1)) + log_weights).logsumexp(-1)

    def tilted(points: torch.Tensor) -> torch.Tensor:  # one narrow ridge
        scale = torch.tensor([[0.5, 0.0], [0.499, 0.03]])
        return dist.MultivariateNormal(torch.zeros(2), scale_tril=scale).log_prob(points)

    found = planes.find_grid(log_density)
    assert found.modes == 2
    assert found.log_integral == pytest.approx(-70.0, abs=0.05)
    assert planes.find_grid(tilted).modes == 1
    assert planes.find_grid(tilted).log_integral == pytest.approx(0.0, abs=1e-3)
    one = found.points.reshape(*found.values.shape, 2)[3, 7]
    assert one.tolist() == [found.x[7], found.y[3]]


@pytest.mark.parametrize(("loc", "scale"), [(0.037, 0.01), (0.0, 1.0), (8.0, 0.3), (50.02, 0.01)])
def test_narrow_and_far_posteriors_have_their_integral(loc: float, scale: float) -> None:
    posterior = dist.Normal(torch.tensor([loc, -loc], dtype=torch.float64), scale).to_event(1)
    found = planes.find_grid(posterior.log_prob)
    assert found.log_integral == pytest.approx(0.0, abs=1e-3)
    assert abs(found.difference) <= planes.CLOSE
    assert found.modes == 1


def test_images_without_an_integral_are_left_out() -> None:
    flat = planes.find_grid(lambda points: points.new_zeros(len(points)))  # no edge is low
    parts = dist.Normal(torch.tensor([[-50.0, 1.0], [50.0, 1.0]]), 0.001).to_event(1)
    far = planes.find_grid(lambda points: parts.log_prob(points.unsqueeze(1)).logsumexp(-1))
    assert math.isnan(flat.log_integral)
    assert math.isnan(far.log_integral)
    run = {"plane": {"log_p": [math.nan, -1.0], "modes": [3, 1]}, "test": {"elbo": [-9.0, -1.5]}}
    cells = [cell("VAE", {"runs": {"VAE": {"0": run}}}) for cell in planes.PLANE_COLUMNS.values()]
    assert cells == ["0.50", "0.00"]


def test_the_naive_rule_ascends_the_bound_in_beta() -> None:
    def model(x: Any) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Any) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(len(x))), 1.0))

    x, start = torch.tensor([1.0, -2.0, 0.5]), 0.3

    def value(beta_now: float) -> float:
        pyro.set_rng_seed(1)
        return CIWAE_ELBO(64, beta=beta_now).loss(model, guide, x)

    pyro.set_rng_seed(1)
    loss = beta.loss_of("naive", start)
    loss.loss_and_grads(model, guide, x)
    gradient = pyro.get_param_store()["ciwae.beta"].unconstrained().grad
    # The bound is linear in beta, and beta the sigmoid of the parameter.
    expected = (value(1.0) - value(0.0)) * start * (1 - start)
    assert gradient is not None
    assert gradient.item() == pytest.approx(expected, rel=1e-6)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
