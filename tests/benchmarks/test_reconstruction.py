"""`reproduce reconstruction`: SSIM by its formula, and runs from the checkpoints of `bounds`."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import conv2d

from benchmarks import __main__ as command
from benchmarks.reproduce import _options, experiment
from benchmarks.studies import reconstruction
from benchmarks.tasks import images
from pyro_recursive.datasets import Dataset

SMALL = ["--datasets", "digits", "--networks", "10-3", "--eval-points", "30", "--epochs", "3"]
SMALL += ["--eval-samples", "64", "--batch-size", "200", "--methods", "IWAE", "--eager"]


def test_ssim_is_its_formula_in_windows_within_the_image() -> None:
    # 'Image quality assessment: from error visibility to structural similarity', equation 13.
    x, y = torch.rand(2, 3, 14, 14, dtype=torch.float64).unbind()
    line = torch.exp(-((torch.arange(11.0, dtype=x.dtype) - 5) ** 2) / (2 * 1.5**2))
    window = torch.outer(line, line) / line.sum() ** 2

    def mean(values: torch.Tensor) -> torch.Tensor:
        return conv2d(values[:, None], window[None, None])[:, 0]

    a, b = mean(x), mean(y)
    spread = mean(x * x) - a * a, mean(y * y) - b * b
    joint, c = mean(x * y) - a * b, (0.01**2, 0.03**2)
    top = (2 * a * b + c[0]) * (2 * joint + c[1])
    values = top / ((a * a + b * b + c[0]) * (spread[0] + spread[1] + c[1]))
    found = reconstruction.ssim(x.flatten(1), y.flatten(1))
    assert found == pytest.approx(values.mean((1, 2)).tolist(), abs=6e-5)  # four decimals
    assert reconstruction.ssim(x.flatten(1), x.flatten(1)) == [1.0, 1.0, 1.0]
    assert len(reconstruction.ssim(x[:, :8, :8].flatten(1), y[:, :8, :8].flatten(1))) == 3


def test_an_image_survives_packing() -> None:
    rows = torch.tensor([[0.0, 1.0, 0.2, 0.6], [1.0, 0.0, 0.0, 0.0]])
    shown = reconstruction._row([reconstruction._packed(row) for row in rows])
    assert shown.tolist() == [[0, 255, 255, 0], [51, 153, 0, 0]]


def test_the_extra_is_named_where_scikit_image_is_missing(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(ImportError, match=r"pyro_recursive\[benchmarks\]"):
        reconstruction.ssim(torch.rand(1, 784), torch.rand(1, 784))


def test_models_are_tried_on_their_own_images_first() -> None:
    assert reconstruction.tried_on("omniglot") == ["omniglot", "mnist"]
    assert reconstruction.tried_on("digits") == ["digits"]


def test_the_other_data_set_is_fetched_before_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, bool] = {}

    def load_images(name: str, download: bool) -> Dataset:
        asked[name] = download
        rows, labels = torch.rand(450, 784), torch.zeros(450, dtype=torch.int64)
        return Dataset(name, rows, rows[:30], labels, labels[:30], (28, 28))

    for module in (reconstruction, images):
        monkeypatch.setattr(module, "load_images", load_images)
    options = _options(["reconstruction", "--datasets", "mnist", "--download", "--eager"])
    found = experiment(options, "mnist", "10-3").task
    assert asked == {"mnist": True, "omniglot": True}
    assert isinstance(found, reconstruction.ReconstructionTask)
    assert found.others["omniglot"].unique().tolist() == [0.0, 1.0]


def test_differences_by_seed_are_between_runs_of_one_seed() -> None:
    def run(ssim: float) -> dict[str, Any]:
        return {"ssim": {"digits": [ssim, ssim]}, "history": {"seconds": [1.0]}}

    runs = {
        "Trace_ELBO": {"0": run(0.5), "1": run(0.7)},
        "IWAE": {"0": run(0.6), "1": run(0.6), "2": run(0.9)},
    }
    results = {"runs": runs, "settings": {"dataset": "digits"}}
    assert reconstruction._by_seed("IWAE", results, "digits") == "+0.0000 ± 0.1414"
    assert "of these trained models only" in reconstruction.report(results)


@pytest.mark.slow
def test_checkpoints_of_the_study_of_bounds_need_no_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_default_dtype(torch.float32)

    def reproduce(study: str) -> Path:
        command.main(["reproduce", study, *SMALL, "--output", str(tmp_path / study)])
        return next((tmp_path / study).glob("*/runs"), Path())

    trained = reproduce("bounds")
    runs = tmp_path / "reconstruction" / trained.parent.name / "runs"
    runs.mkdir(parents=True)
    shutil.copy(trained / "iwae-0.pt", runs)
    reproduce("reconstruction")
    first, second = (json.loads((each / "iwae-0.json").read_text()) for each in (trained, runs))
    assert second["run"]["history"] == first["run"]["history"]  # the seconds, too
    assert len(second["run"]["ssim"]["digits"]) == 30
    assert "SSIM on digits" in capsys.readouterr().out
    assert (runs.parent / "results.png").stat().st_size > 10_000
