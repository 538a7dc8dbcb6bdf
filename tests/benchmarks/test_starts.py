"""The benchmark of starts: guides of this package are not behind Pyro's at equal steps."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import encoder_starts
from benchmarks.starts import METHODS, Settings, elbo_after, report
from benchmarks.tasks.classical import MODELS
from benchmarks.tasks.encoded import MODELS as ENCODED


def mean_elbo(model: str, method: str, settings: Settings) -> float:
    found = [elbo_after(MODELS[model], METHODS[method], settings, s) for s in settings.seeds]
    return sum(-torch.inf if elbo is None else elbo for elbo in found) / len(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "method", "least"),
    [
        ("baseball", "diagonal", -58.5),
        ("correlations", "full", -12.0),  # log p is 0
    ],
)
def test_no_guide_is_a_nat_below_its_counterpart(model: str, method: str, least: float) -> None:
    torch.set_default_dtype(torch.float32)
    settings = Settings((0, 1), 250, draws=500)
    mine = mean_elbo(model, method, settings)
    assert mine > least
    assert mine > mean_elbo(model, str(METHODS[method].beside), settings) - 1.0


@pytest.mark.slow
def test_interrupted_runs_go_on(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    models = ["baseball", "wide prior"]
    command.main(["starts", "--smoke", "--models", *models, "--output", str(tmp_path)])
    path = tmp_path / "results.json"
    whole = json.loads(path.read_text())
    parts = json.loads(path.read_text())
    del parts["elbo"]["wide prior"]["full"]
    path.write_text(json.dumps(parts))
    command.main(["starts", "--smoke", "--models", *models, "--output", str(tmp_path), "--resume"])
    assert json.loads(path.read_text())["elbo"] == whole["elbo"]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "gain"), [("growth", 50.0), ("far", 1e6), ("standard", 0.0)])
def test_encoders_learn_from_the_start(model: str, gain: float) -> None:
    torch.set_default_dtype(torch.float32)
    settings = encoder_starts.Settings((0,), epochs=2)
    own, moved = (
        encoder_starts.elbo_after(ENCODED[model], start, settings, 0)
        for start in encoder_starts.STARTS
    )
    assert own is not None and moved is not None
    assert moved - own > gain if gain else moved == own


def test_the_report_names_failures() -> None:
    elbo = {"baseball": {"diagonal": {"0": -58.0, "1": None}, "AutoDiagonalNormal": {"0": -57.0}}}
    lines = report({"elbo": elbo}).splitlines()
    assert "-inf (-inf)" in lines[3] and "-57.00 (-57.00)" in lines[2]
    assert lines[-1].split("|")[1:3] == [" diagonal - AutoDiagonalNormal ", "     -inf "]
    elbo = {"far": {"the network's own": {"0": None, "1": -5e6}, "moved": {"0": -1.5, "1": -1.6}}}
    line = encoder_starts.report({"elbo": elbo}).splitlines()[-1]
    assert "failed; -5,000,000 | -1.50; -1.60" in line
