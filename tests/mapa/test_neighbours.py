"""Neighbours against brute force in float64, ties and memory included; tables and their files."""

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_recursive.mapa import nearest as nearest_module
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
from pyro_recursive.mapa.nearest import Finder, Neighbours, best_of_all, nearest
from pyro_recursive.mapa.table import Table, TableError, neighbours

K = 5
SCREENED = 400  # references, so many that float32 products screen them for K neighbours


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


def check(query: Tensor, reference: Tensor, kernel: Any, k: int = K, **options: Any) -> None:
    own = options.get("own", False)
    found = nearest(query, reference, kernel, k, **options)
    expected = brute_force(query, reference, kernel, k, own)
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
    "Categorical, long": (Categorical(5000), lambda n: torch.randint(3, (n, 7))),
    "Poisson": (Poisson(), lambda n: torch.poisson(torch.full((n, 3), 20.0))),
    "Gamma": (Gamma(2.0), lambda n: torch.rand(n, 3) + 0.1),
    "Distance": (Distance(torch.cdist, bandwidth=0.5), lambda n: torch.randn(n, 4)),
    "Distance, perplexity": (Distance(torch.cdist, perplexity=3.0), lambda n: torch.randn(n, 4)),
    "function": (laplace, lambda n: torch.randn(n, 4)),
}


# The k best, against all.


@pytest.mark.parametrize("size", [SCREENED, 40])
@pytest.mark.parametrize("name", MEMBERS)
def test_against_brute_force(name: str, size: int) -> None:
    kernel, make = MEMBERS[name]
    x = make(size)
    check(x, x, kernel, own=True)
    check(make(30), x, kernel)


@pytest.mark.parametrize("name", MEMBERS)
def test_blocks_of_any_size(name: str) -> None:
    kernel, make = MEMBERS[name]
    x = make(SCREENED)
    whole = nearest(x[:40], x, kernel, K)
    for budget in (1_000, 20_000, 300_000):
        parts = nearest(x[:40], x, kernel, K, budget=budget)
        assert torch.equal(parts.index, whole.index)
        torch.testing.assert_close(parts.log_k, whole.log_k)


def test_float32_cannot_tell_these_apart() -> None:
    """Pairs of references at distances that differ by one part in 1e8; the fifth is of a pair."""
    centers = 4.0 * torch.cartesian_prod(torch.arange(4.0), torch.arange(5.0))
    radii = (1 + 0.01 * torch.arange(10.0)).repeat(20, 2)
    radii[:, 10:] += 1e-8 * torch.tensor([-1.0, 1.0])[torch.randint(2, (20, 10))]
    angles = 6.28 * torch.rand(20, 20)
    offsets = torch.stack([angles.cos(), angles.sin()], -1) * radii[..., None]
    references = (centers[:, None] + offsets).flatten(0, 1)
    check(centers, references, Gaussian(0.01))
    check(centers, references, Gaussian(perplexity=3.0))


def test_data_far_from_zero() -> None:
    x = 1e5 + torch.randn(SCREENED, 3)
    check(x, x, Gaussian(0.1), own=True)


def test_outliers_and_tiny_units() -> None:
    x = torch.randn(SCREENED, 3)
    x[17] = 1e8
    check(x[:17], x, Gaussian(0.1))
    assert nearest(x, x, Gaussian(0.1), K, own=True).index[17, 0] == 17
    tiny = torch.randn(SCREENED, 3) * 1e-30
    found = nearest(tiny, tiny, Gaussian(perplexity=3.0), K, own=True)
    expected = nearest(tiny * 1e30, tiny * 1e30, Gaussian(perplexity=3.0), K, own=True)
    assert torch.equal(found.index, expected.index)
    torch.testing.assert_close(found.log_k.softmax(1), expected.log_k.softmax(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_coarse_products_are_no_harm(precision: str) -> None:
    x = torch.randn(SCREENED, 4)
    torch.set_float32_matmul_precision(precision)
    try:
        check(x, x, Gaussian(0.1), own=True)
    finally:
        torch.set_float32_matmul_precision("highest")


# Ties.


@pytest.mark.parametrize("kernel", [Gaussian(0.7), Bernoulli(softening=0.07), Categorical(2, 0.3)])
@pytest.mark.parametrize("size", [SCREENED, 1000])
def test_ties_of_bits_go_to_the_own_row_then_in_order(kernel: Kernel, size: int) -> None:
    """Distances are whole numbers: nearly all are ties, far more than are asked for."""
    x = torch.randint(2, (size, 12))
    distance = (x[:, None] != x).sum(-1)
    columns = torch.arange(size)
    order = distance * 2 * size + columns - (columns[:, None] == columns) * size
    found = nearest(x, x, kernel, K, own=True)
    assert torch.equal(found.index, order.argsort(1)[:, :K])
    assert torch.equal(
        nearest(x, x, kernel, K).index, (distance * size + columns).argsort(1)[:, :K]
    )


@pytest.mark.parametrize("kernel", [Gaussian(0.7), StudentT(1.0, 1.0), laplace])
def test_equal_data(kernel: Any) -> None:
    x = torch.randn(1, 3).expand(SCREENED, 3)
    found = nearest(x, x, kernel, 3, own=True)
    rows = torch.arange(SCREENED)
    expected = torch.stack([rows, (rows == 0).long(), 1 + (rows < 2).long()], 1)
    assert torch.equal(found.index, expected)
    assert torch.equal(found.log_k, found.log_k[0, 0].expand(SCREENED, 3))
    torch.testing.assert_close(found.log_k[0, 0], torch.as_tensor(kernel(x[:1], x[:1])).squeeze())


def test_some_rows_have_many_ties() -> None:
    """A heap of duplicates beside data that differ: the rows are searched in different ways."""
    x = torch.randn(SCREENED, 3)
    x[100:200] = x[100]
    check(x, x, Gaussian(0.7), own=True)
    x[100:] = x[100]
    check(x, x, Gaussian(0.7), own=True)


@pytest.mark.parametrize("values", [1, 3, 1000])
@pytest.mark.parametrize("known", [False, True])
def test_best_of_all_is_a_stable_sort(values: int, known: bool) -> None:
    scores = torch.randint(values, (40, 50)).double()
    scores[scores == 1] = -torch.inf
    own = torch.arange(40) if known else None
    index, best = best_of_all(scores, own, K)
    for row, found in enumerate(index.tolist()):
        order = sorted(range(50), key=lambda i: (-scores[row, i], -(known and i == row), i))
        assert found == order[:K]
    assert torch.equal(best, scores.gather(1, index))


def test_memory_follows_the_budget() -> None:
    """A function's blocks: 2000 x 2000 numbers would be 32 megabytes."""
    sizes = []

    def recorded(query: Tensor, reference: Tensor) -> Tensor:
        sizes.append(len(query) * len(reference))
        return laplace(query, reference)

    x = torch.randn(2000, 3)
    nearest(x[:200], x, recorded, K, budget=2**20)
    assert max(sizes) * 24 <= 2**20
    assert sum(sizes) == 200 * 2000


@dataclass(frozen=True)
class Halfspace(Kernel):
    """Only references to the right of a query are possible."""

    def __call__(self, query: Tensor, reference: Tensor) -> Tensor:
        steps = reference[:, 0] - query
        return (-steps).masked_fill(steps < 0, -torch.inf)


def test_impossible_references() -> None:
    x = torch.arange(4.0)[:, None]
    table = neighbours(x, Halfspace(), 3)
    assert table.index.tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 0], [3, 0, 1]]
    assert table.log_q[3].tolist() == [0.0, -torch.inf, -torch.inf]
    with pytest.raises(ValueError, match="-inf between row 1 and all references"):
        nearest(torch.tensor([[0.0], [9.0]]), x, Halfspace(), 3)


def test_isolated_points() -> None:
    x = torch.randn(60, 3)
    x[7] = 1e6
    for kernel in (Gaussian(1e-3), Gaussian(perplexity=3.0), StudentT(1.0, 1e-3)):
        table = neighbours(x, kernel, K)
        assert table.index[7, 0] == 7 and not table.log_q.isnan().any()
    assert neighbours(x, Gaussian(1e-3), K).log_q[7, 0] == 0


# Approximate neighbours.


def clusters(size: int) -> Tensor:
    return torch.randn(20, 8)[torch.randint(20, (size,))] + 0.3 * torch.randn(size, 8)


@pytest.mark.parametrize(
    ("kernel", "make"),
    [
        (Gaussian(0.5), clusters),
        (Bernoulli(), lambda n: (clusters(n) > 0).double()),
        (ContinuousBernoulli(), lambda n: clusters(n).sigmoid()),
    ],
    ids=["Gaussian", "Bernoulli", "ContinuousBernoulli"],
)
def test_faiss(kernel: Kernel, make: Callable[[int], Tensor]) -> None:
    pytest.importorskip("faiss")
    x = make(3000)
    exact = nearest(x, x, kernel, K, own=True)
    found = nearest(x, x, kernel, K, own=True, backend="faiss")
    same = (found.log_k[:, 0] - exact.log_k[:, 0]).abs() < 1e-6  # of ties it may be any
    assert same.double().mean() > 0.99
    assert (found.log_k >= exact.log_k - 1e-6).double().mean() > 0.9
    assert (found.index.sort(1).values.diff(dim=1) > 0).all()
    # Log k are those of the kernel, whatever float32 made of them.
    direct = kernel(x[:50], x).gather(1, found.index[:50])
    torch.testing.assert_close(found.log_k[:50], direct, rtol=1e-6, atol=1e-6)


def test_faiss_looks_further_where_cells_are_too_small() -> None:
    pytest.importorskip("faiss")
    x = torch.randn(400, 2)
    exact = nearest(x, x, Gaussian(0.5), 380, own=True)
    found = nearest(x, x, Gaussian(0.5), 380, own=True, backend="faiss")
    assert torch.equal(found.index, exact.index)


def test_choice_of_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(50, 2)
    assert Finder(Gaussian(1.0), x).backend == "exact"
    monkeypatch.setattr(nearest_module, "EXACT_ROWS", 49)
    monkeypatch.setattr(nearest_module, "find_spec", lambda name: name)
    assert nearest_module.backend_for(Gaussian(1.0), x, "auto") == "faiss"
    assert nearest_module.backend_for(laplace, x, "auto") == "exact"
    monkeypatch.setattr(nearest_module, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"pyro_recursive\[neighbours\]"):
        assert Finder(Gaussian(1.0), x).backend == "exact"
    with pytest.raises(ValueError, match=r"is none: give backend='exact'"):
        Finder(laplace, x, "faiss")
    with pytest.raises(ValueError, match="one of auto, exact, faiss; got 'fast'"):
        Finder(laplace, x, "fast")


def test_without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro_recursive\[neighbours\]'"):
        nearest(torch.randn(9, 2), torch.randn(9, 2), Gaussian(1.0), 2, backend="faiss")


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
    if name not in ("Bernoulli", "Bernoulli, bools", "Categorical", "Categorical, long"):
        assert torch.equal(found.index, rows.index)


def test_width_is_at_most_the_number_of_components() -> None:
    table = neighbours(torch.randn(10, 2), Gaussian(1.0))
    assert (len(table), table.width, table.num_components) == (10, 10, 10)
    alone = neighbours(torch.randn(1, 2), Gaussian(1.0))
    assert alone.index.tolist() == [[0]] and alone.log_q.tolist() == [[0.0]]


def test_reference_of_its_own() -> None:
    x, prototypes = torch.randn(30, 2), torch.randn(8, 2)
    table = neighbours(x, Gaussian(0.5), 3, reference=prototypes)
    expected = Gaussian(0.5)(x, prototypes).topk(3)
    assert torch.equal(table.index, expected.indices) and table.num_components == 8
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


def test_uniform() -> None:
    table = Table.uniform(4, 4)
    assert table.index.tolist() == [[0, 1, 2, 3], [1, 0, 2, 3], [2, 0, 1, 3], [3, 0, 1, 2]]
    torch.testing.assert_close(table.log_q.exp(), torch.full((4, 4), 0.25))
    rows = table.rows(torch.tensor([2, 2, 0]))
    assert torch.equal(rows.index, table.index[[2, 2, 0]]) and rows.log_q.shape == (3, 4)
    assert table.for_data(torch.randn(2, 7)).index.tolist() == [[0, 1, 2, 3]] * 2
    assert Table.uniform(2, 3).index.tolist() == [[0, 1, 2]] * 2
    assert repr(table) == "Table(rows=4, width=4, components=4)"
    assert table.to(dtype=torch.float32).log_q.dtype == torch.float32
    assert copy.deepcopy(table).index.shape == pickle.loads(pickle.dumps(table)).log_q.shape
    huge = Table.uniform(10**6, 10**6)
    assert huge.rows(torch.tensor([5, 10**6 - 1])).index[:, 0].tolist() == [5, 10**6 - 1]


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


def test_from_neighbours_sorts_and_normalises() -> None:
    index = torch.tensor([[5, 2, 7], [1, 0, 3]])
    log_kernel = torch.tensor([[-1.0, 0.0, -1.0], [-2.0, -2.0, -torch.inf]])
    table = Table.from_neighbours(index, log_kernel, 9)
    assert table.index.tolist() == [[2, 5, 7], [0, 1, 3]]
    torch.testing.assert_close(table.log_q[0], torch.tensor([0.0, -1.0, -1.0]).log_softmax(0))


def test_copies_after_a_search() -> None:
    table = small_table()
    x = torch.randn(3, 3)
    expected = table.for_data(x)
    for copied in (copy.deepcopy(table), pickle.loads(pickle.dumps(table)), table.to("cpu")):
        assert "_finder" not in copied.__dict__
        torch.testing.assert_close(copied.for_data(x), expected)
    assert repr(table) == "Table(rows=40, width=5, components=40, kernel=Gaussian(scale=0.5))"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", MEMBERS)
def test_cuda(name: str) -> None:
    kernel, make = MEMBERS[name]
    x = make(SCREENED)
    expected = neighbours(x, kernel, K)
    table = neighbours(x.cuda(), kernel, K)
    assert torch.equal(table.index.cpu(), expected.index)
    torch.testing.assert_close(table.log_q.cpu(), expected.log_q)
    moved = expected.to("cuda")
    assert moved.for_data(x[:3].cuda()).index.device.type == "cuda"


# Files.


def test_save_and_load(tmp_path: Path) -> None:
    table = small_table()
    table.save(tmp_path / "new" / "table.pt")
    loaded = Table.load(tmp_path / "new" / "table.pt")
    assert torch.equal(loaded.index, table.index) and torch.equal(loaded.log_q, table.log_q)
    assert loaded.num_components == 40 and loaded.kernel is None
    with pytest.raises(ValueError, match="no kernel and reference"):
        loaded.for_data(torch.randn(2, 3))
    again = replace(loaded, kernel=table.kernel, reference=table.reference)
    x = torch.randn(2, 3)
    torch.testing.assert_close(again.for_data(x), table.for_data(x))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["table.pt"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "other", "no table"])
def test_damaged_files(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "table.pt"
    small_table().save(path)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        place = content.find(small_table().index.numpy().tobytes()[:2], 500)
        content[len(content) // 2] ^= 255
        assert place
        path.write_bytes(content)
    elif damage == "other":
        torch.save({"index": torch.ones(1)}, path)
    else:
        path.write_text("a text")
    with pytest.raises(TableError, match=r"table\.pt.*Delete it, and compute it again"):
        Table.load(path)
    with pytest.raises(FileNotFoundError):
        Table.load(tmp_path / "missing.pt")


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(50, 3)
    made = []
    original = Finder.__call__

    def counted(self: Finder, *args: Any, **options: Any) -> Neighbours:
        made.append(self.kernel)
        return original(self, *args, **options)

    monkeypatch.setattr(Finder, "__call__", counted)

    def build(data: Tensor = x, kernel: Any = None, k: int = K, **options: Any) -> Table:
        return neighbours(data, kernel or Gaussian(0.5), k, cache=tmp_path, **options)

    first, second = build(), build()
    assert len(made) == 1 and torch.equal(first.index, second.index)
    assert second.kernel == Gaussian(0.5)
    torch.testing.assert_close(first.for_data(x[:4]), second.for_data(x[:4]))
    made.clear()
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
    assert len(made) == 8 and len(list(tmp_path.iterdir())) == 9
    build(kernel=laplace, cache_key="L1")
    assert len(made) == 8
    for nameless in (laplace, Distance(torch.cdist, 1.0)):
        with pytest.raises(ValueError, match="give cache_key="):
            build(kernel=nameless)


def test_damaged_cache_is_made_anew(tmp_path: Path) -> None:
    x = torch.randn(50, 3)
    expected = neighbours(x, Gaussian(0.5), K, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match="computed again"):
        found = neighbours(x, Gaussian(0.5), K, cache=tmp_path)
    assert torch.equal(found.index, expected.index)
    Table.uniform(3, 4).save(path)
    with pytest.warns(UserWarning, match="another shape"):
        neighbours(x, Gaussian(0.5), K, cache=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        neighbours(x, Gaussian(0.5), K, cache=tmp_path)


# Errors.

INDEX, LOG_Q = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]).log()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Table(INDEX.int(), LOG_Q, 2), r"int64 \[N, k\], got torch.int32"),
        (lambda: Table(INDEX[0], LOG_Q, 2), r"got torch.int64 \[2\]"),
        (lambda: Table(INDEX, LOG_Q, 1), "from 0 to 1, and there are 1 components"),
        (lambda: Table(INDEX - 1, LOG_Q, 2), "goes from -1"),
        (lambda: Table(INDEX * 0, LOG_Q, 2), "row 0 of index holds a component twice"),
        (lambda: Table(INDEX, LOG_Q[0], 2), r"of shape \[1, 2\]"),
        (lambda: Table(INDEX, LOG_Q + 0.1, 2), "normalised"),
        (lambda: Table(INDEX, LOG_Q * torch.nan, 2), "must descend"),
        (lambda: Table(INDEX, torch.tensor([[0.25, 0.75]]).log(), 2), "must descend"),
        (lambda: Table(INDEX, LOG_Q, 2, reference=torch.ones(3, 1)), "reference has 3 rows"),
        (lambda: Table.uniform(0, 2), "got 0 and 2"),
        (lambda: Table.from_log_weights(LOG_Q[0]), r"must be \[N, M\]"),
        (lambda: Table.from_log_weights(LOG_Q, 3), "from 1 to the 2"),
        (lambda: Table.from_log_weights(LOG_Q * torch.nan), "row 0 .* nan as its largest"),
        (lambda: Table.from_log_weights(LOG_Q * torch.inf), "-inf as its largest"),
        (lambda: Table.from_neighbours(INDEX, LOG_Q[:, :1], 2), "must be of one shape"),
        (lambda: Table.from_neighbours(INDEX, -LOG_Q * torch.inf, 2), "row 0 .* inf as its"),
        (lambda: small_table().for_data(torch.ones(2, 4)), r"shape \[4\] a row, and the"),
        (lambda: small_table().rows(torch.ones(2)), "must be integers"),
        (lambda: neighbours(torch.ones(3, 1), Gaussian(1.0), 0), "k must be from 1 to the 3"),
        (lambda: neighbours(torch.ones(3, 1), Gaussian(perplexity=5.0)), "lower the perplexity"),
        (lambda: neighbours(torch.ones(3, 1) * 2, Bernoulli()), r"data in \[0, 1\]"),
        (lambda: neighbours(torch.ones(3, 1), lambda q, r: q * torch.nan @ r.T), "nan or"),
        (lambda: neighbours(torch.ones(3, 1), lambda q, r: q), r"must be \[3, 3\]"),
        (lambda: neighbours(torch.ones(3, 1) * torch.nan, laplace), "finite data"),
        (lambda: Finder(laplace, torch.ones(3, 1), budget=0), "positive number of bytes"),
        (
            lambda: nearest(torch.ones(2, 1), torch.ones(3, 1), laplace, 1, own=True),
            "there are 2 and 3",
        ),
    ],
)
def test_wrong_arguments(make: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("table", [Table.uniform(3, 3), None])
def test_rows_out_of_range(table: Table | None) -> None:
    table = small_table() if table is None else table
    for numbers in ([-1], [len(table)]):
        with pytest.raises(IndexError, match="the table has"):
            table.rows(torch.tensor(numbers))
    assert table.rows(torch.tensor([], dtype=torch.long)).index.shape[0] == 0


# What it is for.


RATIOS = [0.5, 0.7, 1.0, 1.2, 2**0.5, 1.7, 2.0, 3.0, 5.0, 8.0, 12.0]


def divergences(latents: int, dimensions: int, sigma: float = 0.3) -> list[float]:
    """KL(p(i | x_n) || q(i | n)) in nats by bandwidth, for a linear decoder with normal noise."""
    weight = torch.linalg.qr(torch.randn(dimensions, latents)).Q.T
    means = torch.randn(400, latents) @ weight
    x = means + sigma * torch.randn(400, dimensions)
    log_posterior = (-0.5 * torch.cdist(x, means) ** 2 / sigma**2).log_softmax(1)
    found = []
    for ratio in RATIOS:
        table = neighbours(x, Gaussian(bandwidth=ratio * sigma), 400)
        log_q = torch.empty(400, 400).scatter_(1, table.index, table.log_q)
        found.append(float((log_posterior.exp() * (log_posterior - log_q)).sum(1).mean()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("latents", [1, 2])
def test_the_default_bandwidth_fits_the_posterior_of_codes(latents: int) -> None:
    found = divergences(latents, latents)
    assert RATIOS[found.index(min(found))] == 2**0.5
    assert found[0] > 5 * min(found) and found[-1] > 2 * min(found)


@pytest.mark.slow
def test_noise_off_the_surface_wants_a_wider_bandwidth() -> None:
    best = []
    for dimensions in (2, 10, 50, 200):
        found = divergences(2, dimensions)
        best.append(RATIOS[found.index(min(found))])
    assert best == [2**0.5, 2.0, 5.0, 8.0]
