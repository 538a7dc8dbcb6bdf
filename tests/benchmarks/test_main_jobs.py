"""The main job: interrupted and resumed it gives what an uninterrupted run gives."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import bounds, experiment, guides, refinement
from benchmarks.methods.guides import METHODS, encoder_of, schedule, width_of
from benchmarks.report import write_json
from benchmarks.run import Settings, Task, count
from benchmarks.studies import snr
from benchmarks.tasks import images, likelihoods, sequences
from pyro_recursive import IWAE_ELBO
from pyro_recursive.datasets import dynamic_binarize


def run(folder: Path, *more: str, of: str, methods: list[str]) -> Any:
    torch.set_default_dtype(torch.float32)
    command.main([of, "--smoke", "--methods", *methods, "--output", str(folder), *more])
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Training was interrupted")
@pytest.mark.parametrize(
    ("of", "methods"),
    [
        (bounds, ["Trace_ELBO", "IWAE dreg"]),
        (guides, ["VAE", "mixture 4 shared", "recursive 2"]),
        (refinement, ["VAE", "first order", "aggressive"]),
    ],
)
def test_interrupt_and_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: Any, methods: list[str]
) -> None:
    name = of.__name__.partition(".")[2]
    whole = run(tmp_path / "whole", of=name, methods=methods)
    seen = 0

    def interrupted(x: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += 1
        if seen == 20:  # in the second method
            raise KeyboardInterrupt
        return dynamic_binarize(x)

    with monkeypatch.context() as patch:
        patch.setattr(likelihoods, "dynamic_binarize", interrupted)
        with pytest.raises(SystemExit, match="--resume"):
            run(tmp_path / "parts", of=name, methods=methods)
    kept = json.loads((tmp_path / "parts" / "results.json").read_text())
    assert [method for method, runs in kept["runs"].items() if runs["0"]] == methods[:1]

    resumed = run(tmp_path / "parts", "--resume", of=name, methods=methods)
    assert (tmp_path / "parts" / "results.png").stat().st_size > 10_000
    assert list(resumed["runs"]) == methods == list(resumed["steps"]["ms"])
    for method in methods:
        mine, theirs = (found["runs"][method]["0"] for found in (resumed, whole))
        clock = {"history", "processor_seconds", "epoch_processor_seconds"}
        assert {k: mine[k] for k in mine if k not in clock} == {
            k: theirs[k] for k in theirs if k not in clock
        }
        assert method in of.report(resumed)
    with pytest.raises(SystemExit, match="give the same options to resume"):
        run(tmp_path / "parts", "--resume", "--batch-size", "50", of=name, methods=methods)


@pytest.mark.slow
def test_known_sequences_resume_at_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequences, "ROWS", 200)
    options: Any = {"of": "refinement", "methods": ["VAE", "aggressive"]}

    def fails(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(refinement, "evidence", fails)
        with pytest.raises(SystemExit, match="--resume"):
            run(tmp_path, "--dataset", "sequences-known", **options)
    kept = json.loads((tmp_path / "runs" / "vae-0.json").read_text())
    assert kept["run"]["processor_seconds"] > 0  # trained, not evaluated
    resumed = run(tmp_path, "--dataset", "sequences-known", "--resume", **options)
    # An aggressive schedule holds back the steps of the model: there are none where it is known.
    assert list(resumed["runs"]) == ["VAE"]
    assert "The true model's log p(x)" in refinement.report(resumed)


def small(rows: torch.Tensor) -> tuple[Task, Settings]:
    """Return a task of rows of pixels, with tiny networks, and its settings."""
    settings = Settings("digits", 1, 4, hidden=3, latent=2, eval_points=1, eval_samples=500)
    task = Task(rows, rows, rows, lambda name: images.VAE(rows.mean(0), 3, 2, name=name))
    return replace(task, train_sample=rows[:1]), settings


@pytest.mark.parametrize("kind", ["evidence", "snr"])
def test_scores_of_other_parameters_are_not_reused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "WRITE_SECONDS", -1.0)
    monkeypatch.setattr(snr, "ESTIMATORS", ("dreg",))
    monkeypatch.setattr(snr, "CELLS", [(1, 2)])
    task, settings = small(torch.rand(6, 5).round())
    method = bounds.METHODS["IWAE"](task.make_vae(""), task, settings)
    method = replace(method, evaluated=tmp_path / "iwae-0.scores.pt")

    def found(settings: Settings = settings) -> Any:
        if kind == "snr":
            return snr.evaluate(method, task, settings)
        return experiment.evidence(method, task.test, settings.eval_samples)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    first = found()
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "importance_weights", never)
        patch.setattr(snr, "gradient_snr", never)
        assert found() == first
        with pytest.raises(AssertionError):
            found(replace(settings, eval_samples=1000))
        method.vae.decoder[0].bias.data += 0.5
        with pytest.raises(AssertionError):
            found()
    assert found() != first


def test_costs_of_an_epoch_have_its_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that only calls of the validation loss advance: three batches of four rows."""
    seconds = 0.0

    class Slow(IWAE_ELBO):
        def loss(self, *args: Any, **kwargs: Any) -> float:
            nonlocal seconds
            seconds += 2.0
            return super().loss(*args, **kwargs)

    task, settings = small(torch.rand(12, 5).round())
    options = argparse.Namespace(output=str(tmp_path), resume=False)
    each = experiment.Experiment(settings, task, bounds.METHODS, options)
    each.validation_loss = Slow(2)
    monkeypatch.setattr(experiment.time, "process_time", lambda: seconds)
    assert each.costs("IWAE", lambda *_: {}, steps=2) == {"epoch": 6.0, "evaluation": 0.0}


def test_two_writers_of_a_file_are_not_in_each_others_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, replaced = tmp_path / "results.json", Path.replace

    def late(part: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "replace", replaced)
        with monkeypatch.context() as other_process:
            other_process.setattr("os.getpid", lambda: 0)
            write_json(path, "the other's")
        return replaced(part, target)

    monkeypatch.setattr(Path, "replace", late)
    write_json(path, "mine")
    assert json.loads(path.read_text()) == "mine"
    with pytest.raises(TypeError):
        write_json(path, object())
    assert list(tmp_path.iterdir()) == [path]


def test_guides_are_of_equal_budgets() -> None:
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float32)
    rows = torch.rand(30, 64)
    settings = Settings("digits", 1, 100, hidden=100, latent=10, eval_points=1, eval_samples=1)
    task = Task(rows, rows, rows, lambda name: images.VAE(rows.mean(0), 100, 10, name=name))
    separate = 4 * count(encoder_of(task, settings))
    one = count(encoder_of(task, settings, width_of(4, task, settings)))
    assert abs(one - separate) < 0.01 * separate
    first, *rest = [
        METHODS[name](task.make_vae(""), task, settings).vae
        for name in ("VAE", "VAE wide", "recursive 4", "IAF")
    ]
    assert all(count(vae.decoder) == count(first.decoder) for vae in rest)
    for number in (2, 4):
        steps = sum(stage.steps for stage in schedule(1000, number).stages(number))
        assert abs(steps - 1000) < number


def test_names_of_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(bounds, "main", lambda arguments: seen.append(("bounds", arguments)))
    monkeypatch.setattr(guides, "main", lambda arguments: seen.append(("guides", arguments)))
    command.main(["--smoke"])
    assert seen == [("bounds", ["--smoke"]), ("guides", ["--smoke"])]
    with pytest.raises(SystemExit, match="--methods needs the name of a benchmark"):
        command.main(["--methods", "VAE"])
    with pytest.raises(SystemExit, match="unknown benchmark 'nonsense': choose one of bounds"):
        command.main(["nonsense"])
