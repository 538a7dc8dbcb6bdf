"""The benchmark of speed: equal work is timed, results are merged, what differs is not timed."""

import json
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from torch.distributions import biject_to

from benchmarks import speed
from benchmarks.methods.steps import METHODS, PYRO, Setting, make
from benchmarks.tasks import timed
from benchmarks.tasks.timed import GROUPS
from pyro_recursive import IWAE_ELBO


def log_density(task: timed.Timed, z: torch.Tensor) -> torch.Tensor:
    """Return log p of Pyro's model at unconstrained latents, in the order of its sites."""
    model, _ = task.programs("density")
    values, place, volume = {}, 0, torch.zeros(())
    for name, site in poutine.trace(model).get_trace(*task.args).iter_stochastic_nodes():
        if poutine.util.site_is_subsample(site):
            continue
        size = site["value"].numel()
        u = z[place : place + size].view(site["value"].shape)
        transform = biject_to(site["fn"].support)
        values[name], place = transform(u), place + size
        volume = volume + transform.log_abs_det_jacobian(u, values[name]).sum()
    assert place == len(z)
    return (
        poutine.trace(poutine.condition(model, values)).get_trace(*task.args).log_prob_sum()
        + volume
    )


@pytest.mark.parametrize("name", ["eight schools", "logistic", "30 sites"])
def test_densities_by_hand_are_those_of_the_models(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    task = GROUPS["classical"][name]()
    assert task.by_hand is not None
    (loc, raw), loss = task.by_hand
    z, noise = torch.randn(len(loc)), torch.randn(len(loc))
    scale = torch.nn.functional.softplus(raw)
    log_q = torch.distributions.Normal(loc, scale).log_prob(loc + scale * noise).sum()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda _: noise)
        found = log_q - loss([z * 0 + loc, raw], *task.args)
    torch.testing.assert_close(found, log_density(task, loc + scale * noise))


def test_a_vae_by_hand_has_the_loss_of_the_package() -> None:
    torch.set_default_dtype(torch.float64)
    task = timed.autoencoder(batch=3, particles=2)
    assert task.by_hand is not None
    starts, loss = task.by_hand
    torch.manual_seed(1)
    found = loss(starts, *task.args)
    programs, own = task.programs("vae"), IWAE_ELBO(2)
    own.loss(*programs, *task.args)  # finds the structure of the programs
    torch.manual_seed(1)
    expected = own.loss(*programs, *task.args)
    assert found.item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["GMM", "HMM", "LDA"])
def test_sums_of_one_sample_have_the_loss_of_pyro(kind: str) -> None:
    torch.set_default_dtype(torch.float64)
    task, found = GROUPS["enumerated"][f"{kind} x 1"](), []
    for method in (PYRO, "eager, SVI"):
        steps = make(method, task, Setting(method, lr=0.0))
        steps.call()  # finds the structure of the programs
        pyro.set_rng_seed(1)
        found.append(steps.call())
    assert found[1] == pytest.approx(found[0], rel=1e-10)


@pytest.mark.quick("eager, one fused Adam")
@pytest.mark.parametrize("method", ["CompiledSVI.step", "eager, one fused Adam"])
def test_methods_take_the_steps_of_svi(method: str) -> None:
    torch.set_default_dtype(torch.float64)
    task, found = timed.autoencoder(batch=3, particles=2), []
    for each in ("eager, SVI", method):
        pyro.set_rng_seed(0)
        steps = make(each, task, Setting(each, lr=0.01, engine="graph"))
        if method == "CompiledSVI.step" != each:
            steps.call(), steps.call()  # as many as compiling takes
        found.append([])
        for seed in range(5):
            pyro.set_rng_seed(seed)
            found[-1].append(steps.call())
    assert found[1] == pytest.approx(found[0], rel=1e-10)


def run(folder: Path, *arguments: str) -> Any:
    torch.set_default_dtype(torch.float32)
    speed.main(["--engine", "graph", "--repeats", "2", "--output", str(folder), *arguments])
    return json.loads((folder / "results.json").read_text())["1"]


@pytest.mark.slow
def test_parts_are_merged_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "SECONDS", 1e-3)
    monkeypatch.setattr(speed, "DRAWS", 8)
    methods = ["--methods", PYRO, "hand-written", "CompiledSVI.step", "CompiledSVI.run"]
    first = run(tmp_path, "--groups", "classical", "--models", "eight schools", *methods)
    both = run(tmp_path, "--groups", "M", "--models", "1", *methods)
    assert both["classical"] == first["classical"]
    found = both["classical"]["eight schools"]
    assert set(found["ms"]) == set(methods[1:]) and not found["failed"]
    assert set(both["M"]["1"]["ms"]) == set(methods[3:])
    assert found["checks"]["step"] < 1e-10 and found["checks"]["hand-written, start"] < 5
    tables = (tmp_path / "tables.md").read_text()
    assert "eight schools |" in tables and "steps from the same seed differ" in tables
    assert (tmp_path / "steps.png").stat().st_size > 10_000
    run(tmp_path, "--groups")
    assert (tmp_path / "tables.md").read_text() == tables


@pytest.mark.slow
def test_results_of_another_machine_are_not_added_to(tmp_path: Path) -> None:
    part = ("--groups", "M", "--models", "1", "--methods", "eager, SVI")
    run(tmp_path, *part)
    path = tmp_path / "results.json"
    path.write_text(path.read_text().replace('"cores"', '"cores": 0, "before"'))
    with pytest.raises(SystemExit, match="was measured with cores 0"):
        run(tmp_path, *part)


@pytest.mark.slow
def test_a_method_with_another_loss_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "DRAWS", 8)
    monkeypatch.setitem(METHODS, "hand-written", _shifted)
    found = run(
        tmp_path,
        *("--groups", "classical", "--models", "eight schools"),
        *("--methods", PYRO, "hand-written"),
    )["classical"]["eight schools"]
    assert set(found["ms"]) == {PYRO}
    assert "errors apart" in found["failed"]["hand-written"]
    assert "hand-written: ValueError: loss" in (tmp_path / "tables.md").read_text()


def _shifted(task: timed.Timed, setting: Setting) -> Any:
    steps = METHODS[PYRO](task, setting)
    return steps._replace(call=lambda: steps.call() + 100.0)


def test_factors_are_paired_and_exponents_are_those_of_a_power() -> None:
    cells = {"a": {"wall": [1.0, 10.0, 2.0]}, "b": {"wall": [2.0, 40.0, 8.0]}}
    assert speed.factor(cells, "a", "b") == 4.0
    sizes = [1, 4, 16, 64]
    assert speed.exponent(sizes, [5.0, 5.0, 4.0**3, 8.0**3]) == pytest.approx(1.5)
