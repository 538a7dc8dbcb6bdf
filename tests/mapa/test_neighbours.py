"""Neighbours against brute force in float64, ties and memory included; tables and their files."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_recursive.mapa.kernel_base import Kernel
from pyro_recursive.mapa.kernels import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    Distance,
    Gamma,
    Gaussian,
    Poisson,
    StudentT,
)
from pyro_recursive.mapa.nearest import Neighbours, Search
from pyro_recursive.mapa.table import Table, TableError, neighbours

K = 5
ROWS = 400  # references


def brute_force(query: Tensor, reference: Tensor, kernel: Any, k: int, own: bool) -> Neighbours:
    """Sort all log k, rounded so that equal numbers are equal; Python's sort keeps their order."""
    scores = (
        kernel.scores(query, reference) if isinstance(kernel, Kernel) else kernel(query, reference)
    )
    keys = scores.round(decimals=9).tolist()
    rows = []
    for number, row in enumerate(keys):
        columns = range(len(row))
        rows.append(sorted(columns, key=lambda i: (-row[i], -(own and i == number), i))[:k])
    index = torch.tensor(rows)
    best = scores.gather(1, index)
    size = query[0].numel()
    return Neighbours(index, kernel.rescaled(best, size) if isinstance(kernel, Kernel) else best)


def check(query: Tensor, reference: Tensor, kernel: Any, own: bool = False) -> None:
    found = Search(kernel, reference)(query, K, own)
    expected = brute_force(query, reference, kernel, K, own)
    torch.testing.assert_close(found.log_k, expected.log_k.double(), rtol=1e-6, atol=1e-6)
    assert torch.equal(found.index, expected.index)


def laplace(query: Tensor, reference: Tensor) -> Tensor:
    return -torch.cdist(query, reference, p=1)


MEMBERS: dict[str, tuple[Any, Callable[[int], Tensor]]] = {
    "Gaussian": (Gaussian(0.5), lambda n: torch.randn(n, 4)),
    "Gaussian, scales": (Gaussian((0.5, 1.0, 2.0, 0.1)), lambda n: torch.randn(n, 2, 2)),
    "Gaussian, perplexity": (Gaussian(perplexity=3.0), lambda n: torch.randn(n, 4)),
    "StudentT": (StudentT(3.0, 0.5), lambda n: torch.randn(n, 4)),
    "Bernoulli": (Bernoulli(), lambda n: torch.randint(2, (n, 9)).double()),
    "Bernoulli, bools": (Bernoulli(softening=0.01), lambda n: torch.rand(n, 3, 3) < 0.3),
    "Bernoulli, grey": (Bernoulli(), lambda n: torch.rand(n, 6)),
    "ContinuousBernoulli": (ContinuousBernoulli(), lambda n: torch.rand(n, 6)),
    "Categorical": (Categorical(3), lambda n: torch.randint(3, (n, 7))),
    "Poisson": (Poisson(), lambda n: torch.poisson(torch.full((n, 3), 20.0))),
    "Gamma": (Gamma(2.0), lambda n: torch.rand(n, 3) + 0.1),
    "Distance": (Distance(torch.cdist, bandwidth=0.5), lambda n: torch.randn(n, 4)),
    "Distance, perplexity": (Distance(torch.cdist, perplexity=3.0), lambda n: torch.randn(n, 4)),
    "function": (laplace, lambda n: torch.randn(n, 4)),
}


# The k best, against all.


@pytest.mark.quick(7)
@pytest.mark.parametrize("name", MEMBERS)
def test_against_brute_force_and_in_blocks_of_any_size(name: str) -> None:
    kernel, make = MEMBERS[name]
    x = make(ROWS)
    check(x, x, kernel, own=True)
    check(make(30), x, kernel)
    whole = Search(kernel, x)(x[:40], K)
    for budget in (1_000, 20_000, 300_000):
        parts = Search(kernel, x, budget)(x[:40], K)
        assert torch.equal(parts.index, whole.index)
        torch.testing.assert_close(parts.log_k, whole.log_k)


def test_data_far_from_zero_outliers_and_tiny_units() -> None:
    x = torch.randn(ROWS, 3)
    check(1e5 + x, 1e5 + x, Gaussian(0.1), own=True)
    x[17] = 1e8
    check(x[:17], x, Gaussian(0.1))
    assert Search(Gaussian(0.1), x)(x, K, own=True).index[17, 0] == 17
    tiny, kernel = torch.randn(ROWS, 3) * 1e-30, Gaussian(perplexity=3.0)
    found = Search(kernel, tiny)(tiny, K, own=True)
    expected = Search(kernel, tiny * 1e30)(tiny * 1e30, K, own=True)
    assert torch.equal(found.index, expected.index)
    torch.testing.assert_close(found.log_k.softmax(1), expected.log_k.softmax(1), atol=1e-5, rtol=0)


# Ties.


@pytest.mark.parametrize("kernel", [Gaussian(0.7), Bernoulli(softening=0.07), Categorical(2, 0.3)])
def test_ties_of_bits_go_to_the_own_row_then_in_order(kernel: Kernel) -> None:
    """Distances are whole numbers: nearly all are ties, far more than are asked for."""
    x = torch.randint(2, (ROWS, 12))
    distance = (x[:, None] != x).sum(-1)
    columns = torch.arange(ROWS)
    order = distance * 2 * ROWS + columns - (columns[:, None] == columns) * ROWS
    search = Search(kernel, x)
    assert torch.equal(search(x, K, own=True).index, order.argsort(1)[:, :K])
    assert torch.equal(search(x, K).index, (distance * ROWS + columns).argsort(1)[:, :K])


@pytest.mark.parametrize("kernel", [Gaussian(0.7), StudentT(1.0, 1.0), laplace])
def test_equal_data(kernel: Any) -> None:
    x = torch.randn(1, 3).expand(ROWS, 3)
    found = Search(kernel, x)(x, 3, own=True)
    rows = torch.arange(ROWS)
    expected = torch.stack([rows, (rows == 0).long(), 1 + (rows < 2).long()], 1)
    assert torch.equal(found.index, expected)
    assert torch.equal(found.log_k, found.log_k[0, 0].expand(ROWS, 3))
    torch.testing.assert_close(found.log_k[0, 0], torch.as_tensor(kernel(x[:1], x[:1])).squeeze())
    some = torch.cat([torch.randn(100, 3), x[:100], torch.randn(100, 3)])
    check(some, some, kernel, own=True)


@dataclass(frozen=True)
class Halfspace(Kernel):
    """Only references to the right of a query are possible."""

    def scores(self, query: Tensor, reference: Tensor) -> Tensor:
        steps = reference[:, 0] - query
        return (-steps).masked_fill(steps < 0, -torch.inf)


def test_impossible_references() -> None:
    x = torch.arange(4.0)[:, None]
    table = neighbours(x, Halfspace(), 3)
    assert table.index.tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 0], [3, 0, 1]]
    assert table.log_q[3].tolist() == [0.0, -torch.inf, -torch.inf]
    with pytest.raises(ValueError, match="-inf or nan between row 1 and all"):
        Search(Halfspace(), x)(torch.tensor([[0.0], [9.0]]), 3)


# Tables.


def small_table() -> Table:
    return neighbours(torch.randn(40, 3), Gaussian(0.5), K)


@pytest.mark.parametrize("name", MEMBERS)
def test_rows_for_data_are_those_of_the_table(name: str) -> None:
    kernel, make = MEMBERS[name]
    x = torch.unique(make(60), dim=0)  # a tie's own row is known to the table alone
    table = neighbours(x, kernel, K)
    torch.testing.assert_close(table.log_q.exp().sum(1), torch.ones(len(x)))
    found = table.for_data(x[3:20])
    rows = table.rows(torch.arange(3, 20))
    torch.testing.assert_close(found.log_q, rows.log_q)
    if name not in ("Bernoulli", "Bernoulli, bools", "Categorical"):
        assert torch.equal(found.index, rows.index)


def test_sizes_of_tables() -> None:
    table = neighbours(torch.randn(10, 2), Gaussian(1.0))
    assert (len(table), table.width, table.num_components) == (10, 10, 10)
    alone = neighbours(torch.randn(1, 2), Gaussian(1.0))
    assert alone.index.tolist() == [[0]] and alone.log_q.tolist() == [[0.0]]
    x, prototypes = torch.randn(30, 2), torch.randn(8, 2)
    table = neighbours(x, Gaussian(0.5), 3, reference=prototypes)
    expected = Gaussian(0.5)(x, prototypes).topk(3)
    assert (len(table), table.num_components) == (30, 8)
    assert torch.equal(table.index, expected.indices)
    torch.testing.assert_close(table.log_q, expected.values.log_softmax(1))


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.float32, torch.float32), (torch.uint8, torch.float64)]
)
def test_dtype(dtype: torch.dtype, expected: torch.dtype) -> None:
    table = neighbours(torch.randint(2, (40, 6)).to(dtype), Bernoulli(), K)
    assert table.log_q.dtype == expected and table.index.dtype == torch.int64
    assert table.for_data(torch.zeros(2, 6, dtype=dtype)).log_q.dtype == expected
    half = table.to(dtype=torch.float16)
    assert half.log_q.dtype == torch.float16 and half.reference is not None


def test_from_log_weights_is_exact() -> None:
    """Numbers are not rounded: a table of the true posterior makes estimates without variance."""
    weights = torch.randn(6, 9)
    table = Table.from_log_weights(weights)
    dense = torch.empty(6, 9).scatter_(1, table.index, table.log_q)
    torch.testing.assert_close(dense, weights.log_softmax(1), rtol=1e-14, atol=1e-14)
    some = Table.from_log_weights(weights, 4)
    assert torch.equal(some.index, table.index[:, :4])
    torch.testing.assert_close(some.log_q.exp().sum(1), torch.ones(6))
    ties = Table.from_log_weights(torch.zeros(3, 3), 2)
    assert ties.index.tolist() == [[0, 1], [1, 0], [2, 0]]
    padded = Table.from_log_weights(torch.tensor([[-torch.inf, 1.0]]))
    assert padded.index.tolist() == [[1, 0]] and padded.log_q.tolist() == [[0.0, -torch.inf]]
    uniform = Table.uniform(4, 4)
    assert uniform.index.tolist() == [[0, 1, 2, 3], [1, 0, 2, 3], [2, 0, 1, 3], [3, 0, 1, 2]]
    torch.testing.assert_close(uniform.log_q.exp(), torch.full((4, 4), 0.25))


def test_from_neighbours_sorts_and_normalises() -> None:
    index = torch.tensor([[5, 2, 7], [1, 0, 3]])
    log_kernel = torch.tensor([[-1.0, 0.0, -1.0], [-2.0, -2.0, -torch.inf]])
    table = Table.from_neighbours(index, log_kernel, 9)
    assert table.index.tolist() == [[2, 5, 7], [0, 1, 3]]
    torch.testing.assert_close(table.log_q[0], torch.tensor([0.0, -1.0, -1.0]).log_softmax(0))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", MEMBERS)
def test_cuda(name: str) -> None:
    kernel, make = MEMBERS[name]
    x = make(ROWS)
    expected = neighbours(x, kernel, K)
    table = neighbours(x.cuda(), kernel, K)
    assert torch.equal(table.index.cpu(), expected.index)
    torch.testing.assert_close(table.log_q.cpu(), expected.log_q)
    moved = expected.to("cuda")
    assert moved.for_data(x[:3].cuda()).index.device.type == "cuda"


# Copies and files.


def test_saved_and_copied(tmp_path: Path) -> None:
    table, x = small_table(), torch.randn(3, 3)
    expected = table.for_data(x)
    for copied in (copy.deepcopy(table), pickle.loads(pickle.dumps(table)), table.to("cpu")):
        assert "_search" not in copied.__dict__
        torch.testing.assert_close(copied.for_data(x), expected)
    assert repr(table) == "Table(rows=40, width=5, components=40, kernel=Gaussian(scale=0.5))"
    table.save(tmp_path / "new" / "table.pt")
    loaded = Table.load(tmp_path / "new" / "table.pt")
    assert torch.equal(loaded.index, table.index) and torch.equal(loaded.log_q, table.log_q)
    assert loaded.num_components == 40 and loaded.kernel is None
    with pytest.raises(ValueError, match="no kernel for new data"):
        loaded.for_data(x)
    again = replace(loaded, kernel=table.kernel, reference=table.reference)
    torch.testing.assert_close(again.for_data(x), expected)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["table.pt"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "other", "no table"])
def test_damaged_files(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "table.pt"
    small_table().save(path)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
    elif damage == "other":
        torch.save({"index": torch.ones(1)}, path)
    else:
        path.write_text("a text")
    with pytest.raises(TableError, match=r"table\.pt.*Delete it, and compute it again"):
        Table.load(path)
    with pytest.raises(FileNotFoundError):
        Table.load(tmp_path / "missing.pt")


def test_cache(tmp_path: Path) -> None:
    x = torch.randn(50, 3)

    def build(data: Tensor = x, kernel: Any = None, k: int = K, **options: Any) -> Table:
        return neighbours(data, kernel or Gaussian(0.5), k, cache=tmp_path, **options)

    def files() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    first, made = build(), files()
    second = build()
    assert files() == made and torch.equal(first.index, second.index)
    assert second.kernel == Gaussian(0.5)
    torch.testing.assert_close(first.for_data(x[:4]), second.for_data(x[:4]))
    other = x.clone()
    other[3, 1] += 1e-12
    build(other)
    build(x.float())
    build(x.view(50, 3, 1))
    build(kernel=Gaussian(0.6))
    build(k=K + 1)
    build(reference=x)
    build(kernel=laplace, cache_key="L1")
    build(kernel=laplace, cache_key="L1, again")
    made = files()
    assert len(made) == 9
    build(kernel=laplace, cache_key="L1")
    assert files() == made
    for nameless in (laplace, Distance(torch.cdist, 1.0)):
        with pytest.raises(ValueError, match="give cache_key="):
            build(kernel=nameless)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match="computed again"):
        found = build()
    assert torch.equal(found.index, first.index)
    assert torch.equal(build().index, first.index)  # without a warning, an error in these tests


# Errors.

INDEX, LOG_Q = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]).log()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Table(INDEX[0], LOG_Q, 2), r"of one shape \[N, k\]"),
        (lambda: Table(INDEX, LOG_Q[0], 2), r"of one shape \[N, k\]"),
        (lambda: Table(INDEX, LOG_Q, 1), "components below 1"),
        (lambda: Table(INDEX - 1, LOG_Q, 2), "components below 2"),
        (lambda: Table(INDEX * 0, LOG_Q, 2), "different components"),
        (lambda: Table(INDEX, LOG_Q + 0.1, 2), "normalised"),
        (lambda: Table(INDEX, LOG_Q * torch.nan, 2), "normalised"),
        (lambda: Table(INDEX, torch.tensor([[0.25, 0.75]]).log(), 2), "descending"),
        (lambda: Table(INDEX, LOG_Q, 2, reference=torch.ones(3, 1)), "reference must have 2 rows"),
        (lambda: Table.from_log_weights(LOG_Q * torch.nan), "normalised"),
        (lambda: Table.from_log_weights(LOG_Q * torch.inf), "normalised"),
        (lambda: Table.from_neighbours(INDEX, LOG_Q[:, :1], 2), r"of one shape \[N, k\]"),
        (lambda: Table.from_neighbours(INDEX, -LOG_Q * torch.inf, 2), "normalised"),
        (lambda: small_table().for_data(torch.ones(2, 4)), r"shape \[4\] a row, and references"),
        (lambda: neighbours(torch.ones(3, 1), Gaussian(perplexity=5.0)), "k = 3"),
        (lambda: neighbours(torch.ones(3, 1) * 2, Bernoulli()), r"data in \[0, 1\]"),
        (lambda: neighbours(torch.ones(3, 1), lambda q, r: q * torch.nan @ r.T), "nan or"),
        (lambda: neighbours(torch.ones(3, 1), lambda q, r: q), r"shape \[3, 1\], not"),
        (lambda: neighbours(torch.ones(3, 1) * torch.nan, laplace), "nan or"),
    ],
)
def test_wrong_arguments(make: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_rows_out_of_range() -> None:
    table = small_table()
    for number in (-1, len(table)):
        with pytest.raises(IndexError):
            table.rows(torch.tensor([number]))
    assert table.rows(torch.tensor([], dtype=torch.long)).index.shape == (0, K)


# What it is for.

RATIOS = [0.5, 0.7, 1.0, 1.2, 2**0.5, 1.7, 2.0, 3.0, 5.0, 8.0, 12.0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("latents", "dimensions", "best"),
    [(1, 1, 2**0.5), (2, 2, 2**0.5), (2, 10, 2.0), (2, 50, 5.0), (2, 200, 8.0)],
)
def test_the_bandwidth_that_fits_the_posterior_of_codes(
    latents: int, dimensions: int, best: float
) -> None:
    """By KL(p(i | x_n) || q(i | n)), for a linear decoder: noise off the surface widens it."""
    sigma, weight = 0.3, torch.linalg.qr(torch.randn(dimensions, latents)).Q.T
    means = torch.randn(400, latents) @ weight
    x = means + sigma * torch.randn(400, dimensions)
    log_posterior = (-0.5 * torch.cdist(x, means) ** 2 / sigma**2).log_softmax(1)
    found = []
    for ratio in RATIOS:
        table = neighbours(x, Gaussian(bandwidth=ratio * sigma), 400)
        log_q = torch.empty(400, 400).scatter_(1, table.index, table.log_q)
        found.append(float((log_posterior.exp() * (log_posterior - log_q)).sum(1).mean()))
    assert RATIOS[found.index(min(found))] == best
    assert found[0] > 5 * min(found) and found[-1] > min(found)
