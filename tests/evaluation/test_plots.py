"""Pictures: what is drawn is what was given, on the axes given, with nothing else changed."""

import sys
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from pyro_recursive.evaluation.gaps import Gaps
from pyro_recursive.evaluation.importance import ImportanceWeights
from pyro_recursive.evaluation.plots import (
    plot_ecdf_difference,
    plot_gaps,
    plot_gradient_snr,
    plot_history,
    plot_pareto_k,
    plot_ranks,
)
from pyro_recursive.evaluation.snr import SNRSweep
from pyro_recursive.training.history import History


@pytest.fixture(autouse=True)
def agg() -> Any:
    with mpl.rc_context():
        mpl.use("Agg")
        yield
        plt.close("all")


def gaps(rows: int, scale: float) -> Gaps:
    marginal, zeros = torch.full((rows,), -10.0), torch.zeros(rows)
    elbo, best = marginal - scale * (2 + torch.rand(rows)), marginal - scale
    return Gaps(marginal, elbo, best, None, zeros, zeros, zeros, zeros, zeros + 100)


def sweep() -> SNRSweep:
    ks = torch.tensor([1.0, 4.0, 16.0])
    ratio = {"model": 0.3 * ks**0.5, "guide": 2 / ks**0.5}
    ratio = {name: torch.stack([each, 2 * each]) for name, each in ratio.items()}
    detected = {name: each > 0.51 for name, each in ratio.items()}
    return SNRSweep((1, 4), (1, 4, 16), ratio, {n: 0.1 * r for n, r in ratio.items()}, detected)


HISTORY = History(
    epoch=[1, 2, 3, 4],
    loss=[100.0, 80.0, float("nan"), 70.0],
    validation=[None, 45.0, None, 44.0],
)


PICTURES: dict[str, Any] = {
    "pareto": lambda **ax: plot_pareto_k(torch.randn(50) / 3 + 0.4, 1000, **ax),
    "snr": lambda **ax: plot_gradient_snr(sweep(), **ax),
    "ranks": lambda **ax: plot_ranks(torch.randint(100, (300,)), 99, **ax),
    "ecdf": lambda **ax: plot_ecdf_difference(torch.randint(100, (300, 2)), 99, **ax),
    "gaps": lambda **ax: plot_gaps({"one": gaps(20, 1.0), "two": gaps(20, 2.0)}, **ax),
    "history": lambda **ax: plot_history(HISTORY, **ax),
}


@pytest.mark.parametrize("name", PICTURES)
def test_draws_on_the_axes_given_and_changes_nothing(name: str) -> None:
    draw, settings = PICTURES[name], dict(mpl.rcParams)
    _, (left, right) = plt.subplots(1, 2)
    plt.sca(left)
    assert draw(ax=right) is right
    assert plt.gca() is left and not left.has_data() and right.has_data()
    assert len(plt.get_fignums()) == 1
    own = draw()
    assert own is not right and len(plt.get_fignums()) == 2
    assert dict(mpl.rcParams) == settings


def test_matplotlib_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro_recursive\[plots\]'"):
        plot_pareto_k(torch.rand(5))


def labels(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_pareto_k() -> None:
    k = torch.tensor([0.1, 0.65, 0.8, 1.2, float("inf"), float("nan")])
    ax = plot_pareto_k(k, num_samples=100)
    assert labels(ax) == ["0.50: 4 of 5 above", "1: 2 above"]
    drawn = ax.lines[0].get_ydata()
    np.testing.assert_allclose(drawn[:4], k[:4])
    assert drawn[4] == pytest.approx(1.32) and np.isnan(drawn[5])
    assert labels(plot_pareto_k(k))[0] == "0.70: 3 of 5 above"
    assert labels(plot_pareto_k(k[-1:]))[0] == "0.70: 0 of 0 above"
    weights = ImportanceWeights(torch.randn(1000, 5))
    assert labels(plot_pareto_k(weights))[0].startswith("0.67: ")
    joint = plot_pareto_k(ImportanceWeights(torch.randn(1000), ()))
    assert [label.get_text() for label in joint.get_xticklabels()] == ["joint weight"]
    assert joint.get_xlim() == (-1, 1)


def test_gradient_snr() -> None:
    ax = plot_gradient_snr(sweep())
    assert labels(ax) == ["guide: slope -0.50 ± 0.10", "model: slope +0.50 ± 0.10"]
    model = ax.containers[1].lines[0].get_ydata()
    np.testing.assert_allclose(model, [np.nan, 0.6, 1.2])
    assert ax.get_xscale() == ax.get_yscale() == "log"
    over = plot_gradient_snr(sweep(), over="M", at=2)
    assert over.get_xlabel() == "M (K = 16)"
    np.testing.assert_allclose(over.containers[1].lines[0].get_ydata(), [1.2, 2.4])


def test_ranks() -> None:
    ranks = torch.randint(100, (400,))
    ax = plot_ranks(ranks, 99, bins=4)
    heights = [bar.get_height() for bar in ax.patches]
    assert ax.collections[0].get_zorder() < ax.patches[0].get_zorder()  # the bars are seen
    assert heights == torch.histc(ranks.double(), 4, 0, 100).tolist()
    assert [bar.get_x() for bar in ax.patches] == pytest.approx([0, 25, 50, 75])
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert 70 < band.min() < 85 and 115 < band.max() < 130
    assert len(plot_ranks(ranks, 99).patches) == 20
    uneven = plot_ranks(torch.arange(11), 10, bins=4).patches
    assert [bar.get_height() for bar in uneven] == [bar.get_width() for bar in uneven]


def test_ecdf_difference() -> None:
    ranks = torch.randint(50, (400, 1))  # all draws too high
    ax = plot_ecdf_difference(ranks, 99, labels=["z"])
    assert labels(ax) == ["95% band", "z"]
    assert ax.lines[0].get_ydata().max() == pytest.approx(0.5, abs=0.05)
    assert ax.collections[0].get_paths()[0].vertices[:, 1].max() < 0.1


def test_gaps() -> None:
    found = {"one": gaps(20, 1.0), "two": gaps(20, 2.0)}
    ax = plot_gaps(found)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["one", "two"]
    assert [bar.get_height() for bar in ax.containers[0]] == pytest.approx([1.0, 2.0])
    tops = [bar.get_y() + bar.get_height() for bar in ax.containers[1]]
    assert tops == pytest.approx([float(each.inference.mean()) for each in found.values()])
    assert len(plot_gaps(gaps(1, 1.0)).containers[0]) == 1


def test_history() -> None:
    ax = plot_history(HISTORY)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [100.0, 80.0, 70.0])
    np.testing.assert_allclose(ax.lines[1].get_xdata(), [2, 4])
    assert list(ax.lines[2].get_xdata()) == [4]
    bare = plot_history(History(epoch=[1], loss=[1.0], validation=[None]))
    assert labels(bare) == ["training"]
