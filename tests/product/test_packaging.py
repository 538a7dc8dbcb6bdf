"""What is distributed, and what a type checker sees of it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from pyro_recursive.bounds.estimators import ESTIMATORS, EstimatorName
from pyro_recursive.guides.gaussian_families import FAMILIES, FamilyName

ROOT = Path(__file__).parents[2]
BUILD = """
import json, pathlib, sys, tarfile, zipfile
from setuptools import build_meta
folder = pathlib.Path(sys.argv[1])
sdist = tarfile.open(folder / build_meta.build_sdist(str(folder))).getnames()
wheel = zipfile.ZipFile(folder / build_meta.build_editable(str(folder)))
paths = {name: wheel.read(name).decode() for name in wheel.namelist() if name.endswith(".pth")}
found = {"sdist": sdist, "editable": wheel.namelist(), "paths": paths}
(folder / "found.json").write_text(json.dumps(found))
"""


def test_names_are_literal_types() -> None:
    assert set(get_args(EstimatorName)) == set(ESTIMATORS)
    assert set(get_args(FamilyName)) == set(FAMILIES)


@pytest.mark.slow
def test_distributions(tmp_path: Path) -> None:
    """The sdist has all that is needed to work on the package; `pip install -e` adds a path."""
    pytest.importorskip("setuptools", minversion="77")
    copy, out = tmp_path / "copy", tmp_path / "out"
    ignored = shutil.ignore_patterns(".*", "_build", "__pycache__", "*.egg-info", "results")
    shutil.copytree(ROOT, copy, ignore=ignored)
    out.mkdir()
    command = [sys.executable, "-c", BUILD, str(out)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((out / "found.json").read_text())
    names = {name.partition("/")[2] for name in found["sdist"]}
    wanted = {
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "constraints.txt",
        "docs/conf.py",
        "docs/mathematics/mixtures.md",
        "tutorials/01_swap_one_loss.ipynb",
        "tests/conftest.py",
        "benchmarks/__main__.py",
        "pyro_recursive/py.typed",
    }
    assert wanted <= names
    assert not any(name.endswith(".pyc") for name in names)
    assert not any("finder" in name for name in found["editable"])  # which mypy cannot follow
    assert [Path(path.strip()) for path in found["paths"].values()] == [copy]
