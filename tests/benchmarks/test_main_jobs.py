"""The main job: interrupted and resumed it gives what an uninterrupted run gives."""

import json
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import bounds, guides, refinement
from benchmarks import run as experiment
from benchmarks.methods.guides import Setup, build, schedule
from benchmarks.report import table
from benchmarks.run import count
from benchmarks.tasks import images, sequences
from pyro_recursive.datasets import dynamic_binarize

METHODS = ["Trace_ELBO", "IWAE dreg"]


def run(folder: Path, *more: str, of: str = "bounds", methods: list[str] = METHODS) -> Any:
    torch.set_default_dtype(torch.float32)
    command.main([of, "--smoke", "--methods", *methods, "--output", str(folder), *more])
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_interrupt_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole")
    batches = 0

    def interrupted(x: torch.Tensor) -> torch.Tensor:
        nonlocal batches
        batches += 1
        if batches == 20:  # in the second method
            raise KeyboardInterrupt
        return dynamic_binarize(x)

    with monkeypatch.context() as patch:
        patch.setattr(images, "dynamic_binarize", interrupted)
        with pytest.raises(SystemExit, match="--resume"):
            run(tmp_path / "parts")
    kept = json.loads((tmp_path / "parts" / "results.json").read_text())
    assert list(kept["runs"]) == METHODS[:1]

    resumed = run(tmp_path / "parts", "--resume")
    assert (tmp_path / "parts" / "results.png").stat().st_size > 10_000
    for name in METHODS:
        for split in ("test", "train"):
            assert resumed["runs"][name]["0"][split] == whole["runs"][name]["0"][split]

    with pytest.raises(SystemExit, match="give the same options to resume"):
        run(tmp_path / "parts", "--resume", "--batch-size", "50")


def test_unknown_benchmark() -> None:
    with pytest.raises(SystemExit, match="unknown benchmark 'nonsense': choose one of bounds"):
        command.main(["nonsense"])


def test_table() -> None:
    assert table(["a", "b"], [["x", "1"]]).splitlines() == ["| a | b |", "| - | - |", "| x | 1 |"]


GUIDES = ["VAE", "recursive 2", "mixture 4 shared"]


@pytest.mark.slow
def test_guides_resume_and_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole", of="guides", methods=GUIDES)

    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(guides.METHODS, "recursive 2", fails)
        with pytest.raises(SystemExit, match="--resume"):
            run(tmp_path / "parts", of="guides", methods=GUIDES)
    kept = json.loads((tmp_path / "parts" / "results.json").read_text())
    assert list(kept["runs"]) == GUIDES[:1]

    run(tmp_path / "other", of="guides", methods=GUIDES[2:])
    other = str(tmp_path / "other" / "results.json")
    merged = run(tmp_path / "parts", "--resume", "--merge", other, of="guides", methods=GUIDES[:2])
    assert (tmp_path / "parts" / "results.png").stat().st_size > 10_000
    assert set(merged["runs"]) == set(GUIDES)
    for name, runs in whole["runs"].items():
        for split in ("test", "train"):
            assert merged["runs"][name]["0"][split] == runs["0"][split]
    assert set(merged["steps"]["ms"]) == set(GUIDES)
    assert "recursive 2" in guides.report(merged)
    with pytest.raises(SystemExit, match="give the same options to resume"):
        run(tmp_path / "parts", "--resume", "--batch-size", "50", of="guides", methods=GUIDES)


REFINEMENT = ["VAE", "first order", "aggressive"]


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["digits", "sequences-known"])
def test_refinement_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str) -> None:
    monkeypatch.setattr(sequences, "ROWS", 200)
    options = ["--dataset", dataset]
    whole = run(tmp_path / "whole", *options, of="refinement", methods=REFINEMENT)

    def fails(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "log_marginal", fails)
        with pytest.raises(SystemExit, match="--resume"):
            run(tmp_path / "parts", *options, of="refinement", methods=REFINEMENT)
    kept = json.loads((tmp_path / "parts" / "results.json").read_text())
    assert kept["runs"]["VAE"]["0"]["processor_seconds"] > 0  # trained, not evaluated
    resumed = run(tmp_path / "parts", *options, "--resume", of="refinement", methods=REFINEMENT)
    assert (tmp_path / "parts" / "results.png").stat().st_size > 10_000
    # An aggressive schedule holds back the steps of the model: there are none where it is known.
    expected = REFINEMENT[: 3 if dataset == "digits" else 2]
    assert list(resumed["runs"]) == expected
    for name in expected:
        mine, theirs = resumed["runs"][name]["0"], whole["runs"][name]["0"]
        for key in ("log_p", "elbo", "kl", "active_units"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-6)
        for key, values in theirs["gaps"].items():
            assert mine["gaps"][key] == pytest.approx(values, rel=1e-6)
        assert name in refinement.report(resumed)


def test_guides_are_of_equal_budgets() -> None:
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float32)
    rows = torch.rand(30, 64)
    sizes = {"hidden": 100, "latent": 10}
    setup = Setup(
        lambda name: images.VAE(rows.mean(0), **sizes, name=name),
        rows,
        rows,
        **sizes,
        steps=1000,
        pseudo_inputs=5,
    )
    separate = 4 * count(setup.encoder())
    assert abs(count(setup.encoder(setup.width_of(4))) - separate) < 0.01 * separate
    first, *rest = [build(name, setup).vae for name in ("VAE", "VAE wide", "recursive 4", "IAF")]
    assert all(count(vae.decoder) == count(first.decoder) for vae in rest)
    for number in (2, 4):
        assert abs(schedule(1000, number).total(number) - 1000) < number


def test_without_a_name_both_main_jobs_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(bounds, "main", lambda arguments: seen.append(("bounds", arguments)))
    monkeypatch.setattr(guides, "main", lambda arguments: seen.append(("guides", arguments)))
    command.main(["--smoke"])
    assert seen == [("bounds", ["--smoke"]), ("guides", ["--smoke"])]
    with pytest.raises(SystemExit, match="--methods needs the name of a benchmark"):
        command.main(["--methods", "VAE"])
