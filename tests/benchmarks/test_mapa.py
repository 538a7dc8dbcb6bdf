"""The benchmark of MAPA: a small run from end to end, its scores and its tables."""

import json
import math
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import mapa, mapa_posteriors
from benchmarks.mapa import learner_of, report
from benchmarks.mapa_posteriors import index_posteriors
from benchmarks.methods.mapa import Diverged, train
from benchmarks.tasks.curves import (
    CurveData,
    density_estimate,
    mixture_evidence,
    score,
    true_table,
)
from pyro_recursive.datasets import curve

pytestmark = pytest.mark.slow  # they train

SMALL = ["VAE", "IWAE 5", "MAPA 5", "MAPA true 5", "uniform 5", "KDE"]


@pytest.fixture(autouse=True)
def single_precision(double_precision: None) -> None:
    """Run in what the benchmark runs in."""
    torch.set_default_dtype(torch.float32)


def run(folder: Path, *more: str, methods: list[str] = SMALL) -> Any:
    options = ["--smoke", "--datasets", "circle", "--draws", "1"]
    arguments = ["mapa", *options, "--methods", *methods, "--output", str(folder), *more]
    command.main(arguments)
    return json.loads((folder / "results.json").read_text())


def scores(found: Any) -> Any:
    """Return the numbers that do not depend on the clock."""
    return {
        draw: {
            name: {k: v for k, v in run.items() if "seconds" not in k} for name, run in runs.items()
        }
        for draw, runs in found["draws"]["circle"].items()
    }


def test_smoke_run_and_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = run(tmp_path / "whole")
    assert set(whole["draws"]["circle"]["0"]) == set(SMALL)
    assert (tmp_path / "whole" / "costs.png").stat().st_size > 10_000
    assert (tmp_path / "whole" / "posteriors.png").stat().st_size > 10_000
    assert "circle, 1 draws" in capsys.readouterr().out
    run(tmp_path / "parts", methods=SMALL[:3])
    assert scores(run(tmp_path / "parts", "--resume")) == scores(whole)
    with pytest.raises(SystemExit, match="give the same options to resume"):
        run(tmp_path / "parts", "--resume", "--restarts", "1")


def test_workers_find_what_one_process_finds(tmp_path: Path) -> None:
    settings = mapa.Settings(1, 2, 40, 30, 60, 20, hidden=8)
    blocks = [mapa.Block("circle", draw, ("VAE", "MAPA 1"), settings) for draw in (0, 1)]
    found = []
    for workers in (1, 2):
        draws = {str(block.draw): runs for block, runs in mapa._all(blocks, workers)}
        found.append(scores({"draws": {"circle": draws}}))
    assert found[0] == found[1]


def test_interrupted_draws_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = mapa.run

    def interrupted(block: mapa.Block) -> Any:
        if block.draw == 1:
            raise KeyboardInterrupt
        return inner(block)

    monkeypatch.setattr(mapa, "run", interrupted)
    with pytest.raises(SystemExit, match="--resume"):
        run(tmp_path, "--draws", "2", methods=["VAE", "KDE"])
    kept = json.loads((tmp_path / "results.json").read_text())
    assert list(kept["draws"]["circle"]) == ["0"]


def test_what_diverges_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def diverges(*_: Any) -> None:
        raise Diverged("the loss is nan after epoch 1")

    monkeypatch.setattr(mapa, "train", diverges)
    found = run(tmp_path, methods=["VAE", "KDE"])
    assert "kl" not in found["draws"]["circle"]["0"]["VAE"]
    assert "VAE, draw 0: restart 1: the loss is nan" in report(found)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    learner = learner_of("VAE", curve("circle", 20, test_rows=1), 4, seed=0)
    with torch.no_grad():
        learner.decoder[-1].bias.fill_(math.nan)
    refused = pytest.raises(Diverged, match="nan after epoch 1")
    with refused, pyro.validation_enabled(False):
        train(learner, 0, epochs=1, batch_size=10, rate=1e-3)


# Scores.


def test_the_true_decoder_has_no_divergence() -> None:
    data = curve("figure-8", 50, validation_rows=10, test_rows=200)
    truth = data.evidence(data.test)
    learner = learner_of("VAE", data, 4, seed=0)
    learner.decoder = data.decoder
    assert score(learner, truth, 50, 1)["kl"] == pytest.approx(0, abs=1e-6)


def test_mixtures_are_sums_of_normals() -> None:
    points, x = torch.randn(7, 2), torch.randn(5, 2)
    normal = torch.distributions.Normal(points.double(), 0.3)
    table = normal.log_prob(x.double()[:, None]).sum(-1)
    torch.testing.assert_close(mixture_evidence(points, x, 0.3), table.logsumexp(1) - math.log(7))


def test_recovered_models_are_near_their_mixture() -> None:
    data = curve("figure-8", 500, validation_rows=10, test_rows=200)
    learner = learner_of("MAPA 5", data, 20, seed=0)
    found = score(learner, data.evidence(data.test), 100, 1)
    assert found["kl"] == pytest.approx(found["kl_of_codes"], rel=0.02)
    assert found["kl"] > 1  # it has learned nothing


def test_exact_sums_have_no_gap_and_autoencoders_have() -> None:
    data = curve("circle", 40, validation_rows=10, test_rows=20)
    truth = data.evidence(data.test)
    gap = {
        name: score(learner_of(name, data, 8, seed=0), truth, 20, 2)["gap"]
        for name in ("exact sum", "AE")
    }
    assert gap["exact sum"] == pytest.approx(0, abs=1e-4)
    learner = learner_of("AE", data, 8, seed=0)
    own = -0.5 * ((data.train - learner.points()) / data.scale).square().sum(-1).double()  # type: ignore[attr-defined]
    volume = math.log(2 * math.pi * data.scale**2)
    all_codes = mixture_evidence(learner.points(), data.train, data.scale)  # type: ignore[attr-defined]
    expected = all_codes.mean() - own.mean() + volume + math.log(40)
    assert gap["AE"] == pytest.approx(expected.item(), abs=1e-3)


def test_the_true_table_is_bayes() -> None:
    data = curve("circle", 30)
    means = data.decoder(data.train_latents).double()
    normal = torch.distributions.Normal(means, data.scale)
    expected = normal.log_prob(data.train.double()[:, None]).sum(-1).softmax(1)
    rows = true_table(CurveData(data, 4)).rows(torch.arange(30))
    found = torch.zeros(30, 30, dtype=torch.float64)
    found.scatter_(1, rows.index, rows.log_q.double().exp())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


def test_density_estimates_are_as_wide_as_validation_wants() -> None:
    data = curve("clusters", 200, validation_rows=200, test_rows=200)
    found = density_estimate(data, data.evidence(data.test))
    for width in (0.3, 2.0):
        worse = mixture_evidence(data.train, data.validation, width * data.scale).mean()
        assert found["validation"] > worse
    assert 0 < found["kl"] < 0.5


def test_index_posteriors_are_those_of_bayes() -> None:
    data = curve("circle", 30)
    settings = mapa.Settings(1, epochs=2, rows=30, batch_size=10, hidden=8)
    found = index_posteriors(data, mapa.METHODS[mapa.COMPARED], settings)
    exact, kept = CurveData(data, 8), found["indices"]
    table = torch.zeros(30, 30, dtype=torch.float64)
    rows = true_table(exact).rows(torch.arange(30))
    table.scatter_(1, rows.index, rows.log_q.double().exp())
    expected = table[found["row"]][kept]
    near = {"abs": 2e-4}
    assert found["probabilities"]["true decoder"] == pytest.approx(expected.tolist(), **near)
    distance = torch.cdist(data.train.double(), data.train.double()) / data.scale
    kernel = (-0.25 * distance.square()).softmax(1)
    expected = kernel[found["row"]][kept]
    assert found["probabilities"]["proposal"] == pytest.approx(expected.tolist(), **near)
    kl = (table * (table.log() - kernel.log()).nan_to_num(neginf=0)).sum(1).mean()
    assert found["kl"]["true decoder, proposal"] == pytest.approx(kl.item(), rel=1e-3)
    variation = 0.5 * (table - kernel).abs().sum(1).mean()
    found_variation = found["variation"]["true decoder, proposal"]
    assert found_variation == pytest.approx(variation.item(), rel=1e-3)
    latents = data.train_latents[kept, 0]
    assert torch.equal(latents, latents.sort()[0])
    assert all(0.95 < sum(p) <= 1.01 for p in found["probabilities"].values())


def test_a_diverging_index_posterior_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverge(*_: Any) -> None:
        raise Diverged("the loss is nan after epoch 1")

    monkeypatch.setattr(mapa_posteriors, "train", diverge)
    found = run(tmp_path, methods=["MAPA 5"])
    assert found["posteriors"]["circle"] == {
        "diverged": "first network: the loss is nan after epoch 1"
    }
    shown = capsys.readouterr().out
    assert "| circle | diverged, first network: the loss is nan after epoch 1 |" in shown
    assert "test KL" in shown


# The report.


def test_tables_show_paired_differences() -> None:
    kl = {"VAE": [1.0, 2.0, 4.0], "MAPA 5": [0.5, 1.0, 3.5]}
    draws: dict[str, Any] = {
        str(draw): {name: {"kl": found[draw]} for name, found in kl.items()} for draw in range(3)
    }
    del draws["2"]["VAE"]
    text = report({"draws": {"circle": draws}})
    assert "1.500 ± 0.707" in text
    assert "1.667 ± 1.607" in text
    assert "-0.750 ± 0.250" in text
