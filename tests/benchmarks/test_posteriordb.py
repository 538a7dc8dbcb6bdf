"""Posteriors of posteriordb: the models fit the reference draws, and the benchmark runs."""

import json
import math
import os
import zipfile
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from benchmarks import __main__ as command
from benchmarks.methods.posteriordb import (
    COMPONENTS,
    DRAWS,
    METHODS,
    Counted,
    Run,
    Settings,
    counting,
)
from benchmarks.posteriordb import EVERY, posterior, run
from benchmarks.posteriordb_report import overview, report
from benchmarks.tasks.posteriordb import MODELS, NAMES, load, recursion
from benchmarks.tasks.reference import Posterior
from pyro_recursive.guides.log_density import LogDensity

ROOT = os.environ.get("PYRO_RECURSIVE_DATA")
SCHOOLS = {"J": 2, "y": [28, 8], "sigma": [15, 10]}
CENTRED = "eight_schools-eight_schools_centered"
NONCENTRED = "eight_schools-eight_schools_noncentered"


def zipped(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(path.stem, json.dumps(content))


@pytest.fixture(params=["folder", "clone"])
def collection(request: Any, tmp_path: Path) -> Path:
    """Two schools, in a folder of the collection and in a clone of it."""
    root = tmp_path / "posteriordb"
    draws, parts = "draws", root
    if request.param == "clone":
        draws, parts = "reference_posteriors/draws/draws", root / "posterior_database"
    about = {"data_name": "two", "reference_posterior_name": "two"}
    about["dimensions"] = {"theta": 2, "mu": 1, "tau": 1}  # type: ignore[assignment]
    (parts / "posteriors").mkdir(parents=True)
    for name in (CENTRED, NONCENTRED):
        (parts / "posteriors" / f"{name}.json").write_text(json.dumps(about))
    zipped(parts / ("data/data" if request.param == "clone" else "data") / "two.json.zip", SCHOOLS)
    chain = {"theta[1]": [1.0, 2.0], "theta[2]": [3.0, 5.0], "mu": [0.0, 1.0], "tau": [1.0, 2.0]}
    zipped(parts / draws / "two.json.zip", [chain, chain])
    return root


def test_a_folder_and_a_clone_are_read(collection: Path) -> None:
    found = load(CENTRED, collection)
    assert found.reference["theta"].tolist() == [[1.0, 3.0], [2.0, 5.0]] * 2
    assert found.reference["mu"].tolist() == [0.0, 1.0] * 2
    trace = poutine.trace(found.model).get_trace()
    assert trace.nodes["y"]["value"].tolist() == [28.0, 8.0]
    shifted = {name: value + value.std(0, correction=0) for name, value in found.reference.items()}
    assert found.errors(shifted) == pytest.approx((1.0, 0.0))
    with pytest.raises(FileNotFoundError, match=r"has no arK-arK\.json"):
        load("arK-arK", collection)


def test_the_benchmark_runs_and_goes_on(
    collection: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("PYRO_RECURSIVE_DATA", str(collection.parent))
    options = ["posteriordb", "--smoke", "--output", str(tmp_path), "--posteriors", NONCENTRED]
    command.main([*options, "square", "--methods", "Pathfinder 1", "mean field"])
    path = tmp_path / "results.json"
    whole = json.loads(path.read_text())
    assert whole["runs"][NONCENTRED]["Pathfinder 1"]["0"]["gradients"] > 2
    parts = json.loads(path.read_text())
    del parts["runs"]["square"]["mean field"]
    path.write_text(json.dumps(parts))
    command.main([*options, "square", "--methods", "Pathfinder 1", "mean field", "--resume"])
    again = json.loads(path.read_text())["runs"]
    assert again["square"]["mean field"]["0"].pop("seconds") > 0
    del whole["runs"]["square"]["mean field"]["0"]["seconds"]
    assert again == whole["runs"]
    assert "| mean field " in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} >= {"errors.png", "overview.png", "tables.md"}


@pytest.mark.parametrize("collection", ["folder"], indirect=True)
def test_the_benchmark_of_stopping_runs(
    collection: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("PYRO_RECURSIVE_DATA", str(collection.parent))
    options = ["stopping", "--smoke", "--output", str(tmp_path), "--posteriors", NONCENTRED]
    command.main([*options, "--guides", "full"])
    run = json.loads((tmp_path / "results.json").read_text())["runs"][NONCENTRED]["full"]["0"]
    assert run["steps"] == 100 and run["stopped"].startswith("cap of 100 steps")
    assert f" {run['elbo']:.2f} " in capsys.readouterr().out


# Scores against closed forms.


def posterior_of(reference: dict[str, Tensor], **options: Any) -> Posterior:
    return Posterior("toy", lambda: None, reference, lambda values: values, **options)


def test_scores_of_draws_that_are_moved_and_stretched() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4000, 2).double(), 3.0 + 5.0 * torch.randn(4000).double()
    posterior = posterior_of({"x": x, "y": y})
    same = posterior.scores({"x": x, "y": y})
    assert max(*same.mean, *same.sd, same.wasserstein, same.sliced) < 1e-12
    moved = posterior.scores({"x": x, "y": y + 2.0 * y.std(correction=0)})
    assert moved.mean == pytest.approx((2.0, 0.0)) and moved.sd == pytest.approx((0.0, 0.0))
    assert moved.wasserstein == pytest.approx(2.0)
    # A move by d has the distance |d . e| along e, whose mean over directions in 3 dimensions is
    # |d| / 2; the standard error of 50 directions is |d| / sqrt(12 * 50).
    assert moved.sliced == pytest.approx(1.0, abs=4 * 2 / 600**0.5)
    wide = posterior.scores({"x": x.mean(0) + 3 * (x - x.mean(0)), "y": y})
    assert wide.sd == pytest.approx((math.log(3), math.log(3))) and wide.mean[0] < 1e-12
    each = 2 * ((x - x.mean(0)) / x.std(0, correction=0)).abs().mean(0)
    assert wide.wasserstein == pytest.approx(each.max().item())
    assert 0.01 < posterior.floor < 0.1  # of halves of 2000 draws


def test_scores_of_weighted_draws_are_those_of_repeated_draws() -> None:
    torch.manual_seed(0)
    posterior = posterior_of({"x": torch.randn(500, 2).double()})
    draws = torch.randn(100, 2).double()
    times = torch.arange(100) % 3
    weighted = posterior.scores({"x": draws}, times.double().log())
    repeated = posterior.scores({"x": draws.repeat_interleave(times, 0)})
    assert weighted.wasserstein == pytest.approx(repeated.wasserstein)
    assert weighted.sliced == pytest.approx(repeated.sliced)
    assert weighted.mean == pytest.approx(repeated.mean)


def test_draws_by_quadrature_are_those_of_the_posterior() -> None:
    """Stein's identity, and equal shares of the modes."""
    found = posterior("square")
    (values,) = found.reference.values()
    grad = LogDensity(found.model).gradient(values.reshape(len(values), -1))[1]
    error = grad.mean(0) / (grad.std(0) / len(grad) ** 0.5)
    assert error.abs().max() < 5
    share = torch.bincount(found.mode_of(found.reference), minlength=found.modes) / len(values)
    spread = (share.mean() / len(values)) ** 0.5
    assert (share - 1 / found.modes).abs().max() < 5 * spread
    assert found.covered(found.reference) == found.modes
    assert found.covered({k: v[:1].expand_as(v) for k, v in found.reference.items()}) == 1


def test_a_recursion_by_doubling_is_one_term_by_term() -> None:
    torch.manual_seed(0)
    terms, factor = torch.randn(3, 13).double(), torch.tensor([-0.9, 0.0, 1.1]).double()
    total, expected = terms[:, 0], [terms[:, 0]]
    for term in terms[:, 1:].unbind(-1):
        total = term + factor * total
        expected.append(total)
    torch.testing.assert_close(recursion(terms, factor), torch.stack(expected, -1))


# Costs.


def toy() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    pyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=torch.tensor(1.0))


@pytest.mark.parametrize("method", ["mean field, prior median", "mixture"])
def test_gradients_of_training_are_counted(method: str) -> None:
    found = []
    for steps in (5, 15):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model = Counted(toy)
        METHODS[method](Run(posterior_of({}), model, Settings(steps)))
        found.append(model.gradients)
    assert found[1] - found[0] == 10 * DRAWS * (COMPONENTS if method == "mixture" else 1)


def test_gradients_and_second_derivatives_of_a_density_are_counted() -> None:
    model = Counted(toy)
    density = LogDensity(model)
    model.gradients = model.values = 0
    with counting(model):
        density.gradient(torch.zeros(7, 3))
        assert (model.gradients, model.values) == (7, 0)
        with torch.no_grad():
            density(torch.zeros(5, 3))
        assert (model.gradients, model.values) == (7, 5)
        density.hessian(torch.zeros(2, 3))  # and two gradients before them
    assert (model.gradients, model.values) == (7 + 2 + 2 * 3, 5)


# The report.


def test_a_failure_is_a_row_that_says_why(monkeypatch: Any) -> None:
    def fails(run: Run) -> None:
        raise ValueError("no start\nat all")

    monkeypatch.setitem(EVERY, "mean field", fails)
    found = run(posterior_of({}), "mean field", Settings(1), 0)
    assert found["fails"] == "ValueError: no start"
    table = report({"runs": {"toy": {"mean field": {"0": found}}}, "floors": {"toy": 0.1}})
    assert "fails: ValueError: no start" in table


def test_the_overview_counts_errors_that_k_hat_does_not_show() -> None:
    def numbers(error: float, k: float, gradients: int) -> dict[str, Any]:
        scores = {"mean": [error, 0.0], "sd": [0.01, 0.0]}
        return {
            "scores": scores,
            "weighted": scores,
            "pareto_k": k,
            "elbo": 0.0,
            "gradients": gradients,
            "seconds": 1.0,
        }

    base = {"0": {"scores": {"mean": [0.05, 0], "sd": [0, 0]}, "gradients": 100, "seconds": 1.0}}
    mine = {"0": numbers(0.5, 0.3, 20), "1": numbers(0.5, 0.9, 30), "2": numbers(0.08, 0.3, 40)}
    (line,) = (
        line
        for line in overview({"runs": {"toy": {"NUTS dense": base, "mine": mine}}}).splitlines()
        if line.startswith("| mine")
    )
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["mine", "3", "0", "1", "1", "0.50", "2", "1", "1", "30", "0.20", "1.0"]


def latents_of(posterior: Posterior, count: int) -> tuple[LogDensity, Tensor]:
    """Return unconstrained values of reference draws, by a run of the model on them."""
    density = LogDensity(posterior.model)
    values = dict(posterior.reference)
    if "noncentered" in posterior.name:
        theta, mu, tau = (values[name] for name in ("theta", "mu", "tau"))
        values["theta_trans"] = (theta - mu[:, None]) / tau[:, None]
    step, ones = len(next(iter(values.values()))) // count, density.block.nesting
    given = {}
    for slot in density.block.slots:
        value = values[slot.name][::step][:count]
        given[slot.name] = value.reshape(count, *[1] * (ones - slot.nesting), *value.shape[1:])
    model = poutine.condition(posterior.model, given)
    with pyro.plate("draws", count, dim=-ones - 1):
        trace = poutine.trace(model).get_trace()
    return density, density.block.pack_trace(trace.nodes).reshape(count, -1)


# The latents of the process are not in its reference draws.
CHECKED = [name for name in NAMES if name != "gp_pois_regr-gp_pois_regr"]


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT and (Path(ROOT) / "posteriordb").exists()), reason="no data")
def test_models_have_the_reference_draws_as_draws_of_their_posteriors() -> None:
    """Stein's identities: E df/du = 0 and E u_i df/du_j = -(i == j) under exp f."""
    for name in CHECKED:
        torch.manual_seed(0)
        density, u = latents_of(load(name), 1000)
        grad = density.gradient(u)[1]
        scale = u.std(0)
        u, grad = (u - u.mean(0)) / scale, grad * scale
        for each, expected in (
            (grad, torch.zeros(density.size)),
            ((u[:, :, None] * grad[:, None]).flatten(1), -torch.eye(density.size).flatten()),
        ):
            error = (each.mean(0) - expected) / (each.std(0) / len(u) ** 0.5)
            assert error.abs().max() < 6, (name, error)
    assert set(MODELS) == set(NAMES)
