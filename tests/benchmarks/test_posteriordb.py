"""Posteriors of posteriordb: the models fit the reference draws, and the benchmark runs."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor

from benchmarks import __main__ as command
from benchmarks.tasks.posteriordb import MODELS, NAMES, Posterior, load
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
    shifted = {name: value + value.std(0) for name, value in found.reference.items()}
    assert found.errors(shifted) == pytest.approx((1.0, 0.0))
    with pytest.raises(FileNotFoundError, match=r"has no arK-arK\.json"):
        load("arK-arK", collection)


def test_the_benchmark_runs(collection: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PYRO_RECURSIVE_DATA", str(collection.parent))
    options = ["--smoke", "--posteriors", NONCENTRED, "--paths", "2", "--output", str(tmp_path)]
    command.main(["posteriordb", *options])
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"][NONCENTRED].values()
    assert run["paths"] == 2 and run["num_gradients"] > 2


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
