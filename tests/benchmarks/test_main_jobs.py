"""The main job: interrupted and resumed it gives what an uninterrupted run gives."""

import json
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import bounds, guides, refinement
from benchmarks.methods.guides import METHODS, encoder_of, schedule, width_of
from benchmarks.run import Settings, Task, count
from benchmarks.tasks import images, likelihoods, sequences
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
