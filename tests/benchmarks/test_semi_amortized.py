"""The study of semi-amortised inference on text-like sequences, from end to end."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import mapa
from benchmarks.refinement import RefinementSettings
from benchmarks.reproduce import STUDIES
from benchmarks.tasks import sequences

SEQUENCES: Any = {"dataset": "long-sequences", "epochs": 1, "batch_size": 50}
SEQUENCES |= {"eval_points": 20, "eval_samples": 20}


@pytest.mark.slow
def test_semi_amortised_study_of_long_sequences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(sequences, "ROWS", 200)
    study = STUDIES["semi-amortized"]
    small = partial(RefinementSettings, refinements=2, gap_points=5)
    monkeypatch.setattr(RefinementSettings, "of", lambda *_, **sizes: small(**SEQUENCES | sizes))
    names = ["VAE", "first order"]
    options = ["--datasets", "long-sequences", "--epochs", "1", "--eager", "--methods", *names]
    command.main(["reproduce", "semi-amortized", *options, "--output", str(tmp_path)])
    folder = tmp_path / "long-sequences-50-2-1-epochs"
    runs = json.loads((folder / "results.json").read_text())["runs"]
    for name in names:
        run = runs[name]["0"]
        assert set(run["history"]["learning_rate"]) == {1e-3}
        assert len(run["saliency"]) == 20
        assert min(run["saliency"]) > 0
    text = (folder / "report.md").read_text()
    assert all(title in text for title in ("mutual information", "saliency", "closed"))
    assert (folder / "results.png").stat().st_size > 10_000
    images = {name: {"0": {**runs[name]["0"], "saliency": [0.1] * 64}} for name in names}
    settings = {"dataset": "digits", "epochs": 1, "refinements": 2, "eval_samples": 20}
    study.plot({"runs": images, "settings": settings}, tmp_path / "pixels.png")
    assert (tmp_path / "pixels.png").stat().st_size > 10_000


def test_a_bigram_decoder_reads_the_previous_symbol_and_the_latents() -> None:
    vae = sequences.LongSequenceVAE(vocabulary=9, hidden=4, latent=2)
    x, z = torch.randint(9, (3, sequences.LENGTH)), torch.randn(3, 2)
    other = x.clone()
    other[:, 5] = (x[:, 5] + 1) % 9
    changed = (vae.decoder(z, x) != vae.decoder(z, other)).any(-1).all(0)
    assert changed.nonzero().flatten().tolist() == [6]
    assert (vae.decoder(z, x) != vae.decoder(z + 1, x)).any(-1).all()
    assert vae.encoder(x).shape == (3, 4)


def test_studies_with_options_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(mapa, "main", seen.append)
    command.main(["reproduce", "mapa", "--draws", "2"])
    assert seen == [["--draws", "2", "--resume"]]
