"""The main job: interrupted and resumed it gives what an uninterrupted run gives."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import bounds
from benchmarks.report import table
from pyro_recursive.datasets import dynamic_binarize

METHODS = ["Trace_ELBO", "IWAE dreg"]


def run(folder: Path, *more: str) -> dict[str, Any]:
    torch.set_default_dtype(torch.float32)
    command.main(["--smoke", "--methods", *METHODS, "--output", str(folder), *more])
    return json.loads((folder / "results.json").read_text())


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
        patch.setattr(bounds, "dynamic_binarize", interrupted)
        with pytest.raises(SystemExit, match="--resume"):
            run(tmp_path / "parts")
    kept = json.loads((tmp_path / "parts" / "results.json").read_text())
    assert list(kept["methods"]) == METHODS[:1]

    resumed = run(tmp_path / "parts", "--resume")
    assert (tmp_path / "parts" / "results.png").stat().st_size > 10_000
    for name in METHODS:
        for split in ("test", "train"):
            assert resumed["methods"][name][split] == whole["methods"][name][split]

    with pytest.raises(SystemExit, match="give the same options to resume"):
        run(tmp_path / "parts", "--resume", "--seed", "1")


def test_unknown_benchmark() -> None:
    with pytest.raises(SystemExit, match="unknown benchmark 'nonsense': choose one of bounds"):
        command.main(["nonsense"])


def test_table() -> None:
    assert table(["a", "b"], [["x", "1"]]).splitlines() == ["| a | b |", "| - | - |", "| x | 1 |"]
