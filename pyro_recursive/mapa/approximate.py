"""Approximate nearest neighbours by faiss, for data too many to compare all."""

import math
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from pyro_recursive.mapa.kernel import Features
from pyro_recursive.mapa.products import Products

__all__ = ["FaissScreen", "has_faiss"]

_LISTS = 4  # times the square root of the number of references
_ROWS_PER_LIST = 39  # what faiss asks for, to train its k-means
_ROWS_AT_ONCE = 4096
_SPARE = 8  # more candidates than asked for, as float32 may swap some


def has_faiss() -> bool:
    """Return whether faiss is installed."""
    return find_spec("faiss") is not None


class FaissScreen:
    """Finds candidates in an inverted file of Euclidean distances (faiss' ``IndexIVFFlat``).

    Inner products with biases become distances by one more dimension: for
    ``r' = (r, sqrt(c - |r| ** 2 - 2 b))`` and ``q' = (q, 0)``, the score ``q r + b`` is a constant
    of q minus ``|q' - r'| ** 2 / 2``. For Gaussian kernels the added dimension is zero: these
    distances are those of the data. Other features are first scaled to be as long on both sides.

    About the square root of the cells is searched for each query, so that neighbours can be missed:
    1% of the 64 nearest among MNIST's 60,000 images. Where these cells hold too few, all are.
    """

    def __init__(self, products: Products, sample: Tensor) -> None:
        """Build the index; ``sample`` are the first references, taken as queries for the scale."""
        faiss = _faiss()
        self.number = len(products)
        both = (products.queries(sample).rows, products.rows[: len(sample)])
        means = [float(rows.norm(dim=1).mean()) for rows in both]
        self.scale = math.sqrt(means[0] / means[1]) if min(means) > 0 else 1.0
        rows = self._augmented(products)
        lists = min(int(_LISTS * math.sqrt(self.number)), self.number // _ROWS_PER_LIST)
        self.lists, width = max(1, lists), rows.shape[1]
        self.index: Any = faiss.IndexIVFFlat(faiss.IndexFlatL2(width), width, self.lists)
        self.index.train(rows)
        self.index.add(rows)
        self.cells = math.isqrt(self.lists) + 1

    def _augmented(self, products: Products) -> Any:
        """Return the references with one more dimension, float32."""
        squares = products.rows.norm(dim=1).square()
        missing = -(squares * self.scale**2) - 2 * products.bias
        rows = torch.empty(self.number, products.rows.shape[1] + 1, dtype=torch.float32)
        for part in torch.arange(self.number).split(_ROWS_AT_ONCE):
            rows[part, :-1] = (products.rows[part] * self.scale).to("cpu", torch.float32)
        rows[:, -1] = (missing - missing.min()).sqrt()
        return rows.numpy()

    def __call__(self, query: Features, k: int) -> tuple[Tensor, Tensor]:
        """Return columns ``[B, C]``; they are enough for all queries."""
        rows = query.rows / self.scale
        rows = torch.cat([rows, rows.new_zeros(len(rows), 1)], 1)
        asked = rows.to("cpu", torch.float32).numpy()
        wanted = min(self.number, k + max(_SPARE, k // 8))
        found = self._search(asked, wanted, self.cells)
        short = (found[:, :k] < 0).any(1)
        if short.any():
            found[short] = self._search(asked[short.numpy()], wanted, self.lists)
        columns = torch.where(found < 0, self.number, found)
        columns = columns.to(query.rows.device)
        return columns, columns.new_zeros(len(columns), dtype=torch.bool)

    def _search(self, asked: Any, wanted: int, cells: int) -> Tensor:
        self.index.nprobe = cells
        return torch.from_numpy(self.index.search(asked, wanted)[1])


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "backend='faiss' needs faiss: pip install 'pyro_recursive[neighbours]', or give "
            "backend='exact'"
        ) from error
    return faiss
