"""MAPA on images: a small run from end to end, and scores beside sums and beside each other."""

import json
import math
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from benchmarks import __main__ as command
from benchmarks.mapa_images import learner_of, report
from benchmarks.methods.mapa import train
from benchmarks.tasks.code_images import ImageData, code_evidence, grid_evidence, sampled

pytestmark = pytest.mark.slow  # they train

PIXELS = 16


@pytest.fixture(autouse=True)
def single_precision(double_precision: None) -> None:
    """Run in what the benchmark runs in."""
    torch.set_default_dtype(torch.float32)


def run(folder: Path, *more: str, methods: list[str]) -> Any:
    command.main(["mapa-images", "--smoke", "--methods", *methods, "--output", str(folder), *more])
    return json.loads((folder / "results.json").read_text())


def lasting(run: dict[str, Any]) -> dict[str, Any]:
    """Return what does not depend on the clock."""
    return {key: v for key, v in run.items() if "seconds" not in key and key != "ms_per_step"}


def small(rows: int = 60) -> ImageData:
    """Return images with some structure: noisy copies of three."""
    means = torch.rand(3, PIXELS)[torch.arange(rows) % 3] * 0.9
    return ImageData(
        torch.bernoulli(means), torch.bernoulli(means[:8]), torch.arange(rows) % 3, 8, 2
    )


def learned(name: str, epochs: int = 20) -> Any:
    learner = learner_of(name, small(), seed=0)
    train(learner, 0, epochs, batch_size=20, rate=1e-2)
    return learner


def test_smoke_run_and_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["VAE", "IWAE 5", "AE", "MAPA 5", "pooled 5"]
    whole = run(tmp_path / "whole", methods=methods)
    assert (tmp_path / "whole" / "codes.png").stat().st_size > 10_000
    assert "digits, 10 latents, 1 seeds" in capsys.readouterr().out
    first = run(tmp_path / "parts", methods=methods[:2])
    parts = run(tmp_path / "parts", "--resume", methods=methods)
    for latents in ("2", "10"):
        assert list(parts["runs"][latents]) == methods
        assert parts["runs"][latents]["IWAE 5"] == first["runs"][latents]["IWAE 5"]
        assert len(parts["runs"][latents]["AE"]["0"]["codes"]) == 20
        for name in methods:
            mine, theirs = (lasting(x["runs"][latents][name]["0"]) for x in (parts, whole))
            assert mine == theirs
    with pytest.raises(SystemExit, match="give the same options to resume"):
        run(tmp_path / "parts", "--resume", "--batch-size", "50", methods=["VAE"])


def test_methods_share_decoder_and_table() -> None:
    images = small()
    first = learner_of("MAPA 5", images, seed=3)
    first.start(20)
    assert images.table is not None
    second, vae = (learner_of(name, images, seed=3) for name in ("pooled 5", "VAE"))
    second.start(20)
    assert second.guide.table is images.table is first.guide.table
    for other in (second, vae):
        for a, b in zip(first.decoder.parameters(), other.decoder.parameters(), strict=True):
            assert torch.equal(a, b)


# Scores.


def test_codes_are_a_mixture() -> None:
    learner = learned("AE")
    with torch.no_grad():
        logits = learner.decoder(learner.encoder(learner.data.train)).double()
    one = dist.Bernoulli(logits=logits).to_event(1).log_prob(learner.data.test.double()[:, None])
    expected = one.logsumexp(1) - math.log(60)
    torch.testing.assert_close(code_evidence(learner, learner.data.test), expected)


@pytest.mark.parametrize("name", ["VAE", "AE"])
def test_priors_integrate_to_one(name: str) -> None:
    """A decoder that ignores its latent has the same likelihood under any prior."""
    learner = learned(name, epochs=2)
    with torch.no_grad():
        learner.decoder[0].weight.zero_()
        logits = learner.decoder(torch.zeros(2))
    expected = dist.Bernoulli(logits=logits).to_event(1).log_prob(learner.data.test).double()
    fine, coarse = grid_evidence(learner, learner.data.test, 200)
    torch.testing.assert_close(fine, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(coarse, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["VAE", "AE"])
def test_sampling_and_quadrature_agree(name: str) -> None:
    learner = learned(name)
    fine, coarse = grid_evidence(learner, learner.data.test, 200)
    evidence = sampled(learner, learner.data.test, 1000)
    assert fine.std() > 0.3  # images differ
    errors = (evidence.log_marginal - fine) / evidence.standard_error
    assert errors.abs().max() < 4.5
    assert evidence.ess.min() > 30
    assert (fine - coarse).abs().max() < 1e-3


# The report.


def runs_of(scores: list[Tensor], key: str) -> dict[str, dict[str, Any]]:
    return {str(seed): {key: values.tolist()} for seed, values in enumerate(scores)}


def test_differences_are_of_the_same_images_and_seeds() -> None:
    vae = [torch.tensor([-90.0, -110.0]), torch.tensor([-92.0, -112.0])]
    shift = [torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0])]
    own = [a + b for a, b in zip(vae, shift, strict=True)]
    runs = {"VAE": runs_of(vae, "continuous"), "AE": runs_of(own, "codes")}
    del runs["VAE"]["1"]["continuous"]
    runs["VAE"]["1"]["sampled"] = vae[1].tolist()
    results = {"settings": {"dataset": "digits"}, "runs": {"2": runs}}
    assert "+2.00 ± 1.00" in report(results)  # the second seed was not integrated
    runs["VAE"]["1"]["continuous"] = vae[1].tolist()
    assert "+2.50 ± 1.00 (0.71)" in report(results)


def test_failures_and_coarse_grids_are_told() -> None:
    runs = {
        "0": {"continuous": [-1.0, -2.0], "grid_error": 0.3},
        "1": {"failure": "the loss is nan"},
    }
    text = report({"settings": {"dataset": "digits"}, "runs": {"2": {"VAE": runs}}})
    assert "VAE, seed 0: half the grid is off by up to 0.30 nats" in text
    assert "VAE, seed 1: the loss is nan" in text
