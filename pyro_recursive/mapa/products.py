"""Nearest neighbours by matrix products: screened in float32, scored in float64."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyro_recursive.mapa.kernel import Features, InnerProductKernel, origin_of
from pyro_recursive.mapa.selection import LARGEST_GROUP, candidates, ordered

__all__ = ["FloatScreen", "ProductSearch", "Products", "Screen", "best_of_all", "rounded"]

# Columns ``[B, C]`` among which are the k best for the queries, and for which queries ``[B]`` they
# are not: these have to look at all. Numbers from R on are no columns.
Screen = Callable[[Features, int], tuple[Tensor, Tensor]]

_CHUNK_BYTES = 2**23  # of gathered rows: what a cache holds
_DENSE = 32  # where one column in so many is wanted, a product of all is as quick
_WIDEST = 8  # candidates for each neighbour: ties can be many, and their memory bounded
_SMALL, _LARGE = 1e-37, 1e30  # beyond these float32 loses more than its roundoff
_DIGITS = 38  # binary digits that survive the rounding of scores
# Unit roundoff of float32 products, by torch.get_float32_matmul_precision()
_ROUNDOFF = {"highest": 2.0**-24, "high": 2.0**-11, "medium": 2.0**-8}


class Products:
    """Scores of one reference under a kernel that is an inner product, in float64."""

    def __init__(self, kernel: InnerProductKernel, reference: Tensor, budget: int) -> None:
        self.kernel, self.budget = kernel, budget
        size, width = len(reference), kernel.width(reference)
        parts = reference.split(max(1, budget // (64 * width)))
        self.origin = origin_of(reference)
        self.rows = self.origin.new_empty(size, width)
        self.bias = self.origin.new_empty(size)
        for rows, bias, part in zip(
            self.rows.split(len(parts[0])), self.bias.split(len(parts[0])), parts, strict=True
        ):
            features = kernel.reference_features(part, self.origin)
            rows.copy_(features.rows)
            bias.copy_(features.bias)
        self.typical = self.bias.abs().median()

    def __len__(self) -> int:
        """Return R, the number of references."""
        return len(self.rows)

    def queries(self, query: Tensor) -> Features:
        """Return the features of queries."""
        return self.kernel.query_features(query, self.origin)

    def of_all(self, query: Features) -> Tensor:
        """Return scores ``[B, R]``, rounded, without the query's own term."""
        scores = torch.addmm(self.bias, query.rows, self.rows.T)
        return self._rounded(scores, scores.argmax(1), query)

    def of_some(self, query: Features, columns: Tensor) -> Tensor:
        """Return the scores of columns ``[B, C]``; -inf for those from R on."""
        safe = columns.clamp(max=len(self) - 1)
        scores = torch.empty_like(columns, dtype=self.rows.dtype)
        row_bytes = 8 * columns.shape[1] * self.rows.shape[1]
        size = min(len(columns), max(1, min(self.budget, _CHUNK_BYTES) // row_bytes))
        buffer = self.rows.new_empty(size * columns.shape[1], self.rows.shape[1])
        for out, q, chosen in zip(
            *(t.split(size) for t in (scores, query.rows, safe)), strict=True
        ):
            found = buffer[: chosen.numel()]  # new memory for each part would take longer to get
            torch.index_select(self.rows, 0, chosen.flatten(), out=found)
            out.copy_(torch.bmm(found.unflatten(0, chosen.shape), q[..., None]).squeeze(-1))
        scores += self.bias[safe]
        scores = scores.masked_fill(columns >= len(self), -torch.inf)
        best = safe.gather(1, scores.argmax(1, keepdim=True)).squeeze(1)
        return self._rounded(scores, best, query)

    def _rounded(self, scores: Tensor, best: Tensor, query: Features) -> Tensor:
        reach = query.rows.norm(dim=1) * self.rows[best].norm(dim=1) + self.bias[best].abs()
        return rounded(scores, reach.maximum(self.typical)[:, None])


class ProductSearch:
    """The k best of each query: a screen proposes columns, `Products` score them."""

    def __init__(self, products: Products, screen: Screen) -> None:
        self.products, self.screen = products, screen

    def rows(self, k: int) -> int:
        """Return how many queries to search for at once."""
        return max(1, self.products.budget // (8 * len(self.products) + 64 * k))

    def __call__(self, query: Tensor, own: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        """Return columns and scores of the best, ``[B, k]`` both, best first."""
        features = self.products.queries(query)
        columns, wide = self.screen(features, k)
        if wide.all():
            index, scores = self._among_all(features, own, k)
        elif not wide.any():
            index, scores = ordered(self.products.of_some(features, columns), columns, own, k)
        else:
            index, scores = self._mixed(features, columns, wide, own, k)
        return index, scores + features.bias[:, None]

    def _mixed(
        self, query: Features, columns: Tensor, wide: Tensor, own: Tensor | None, k: int
    ) -> tuple[Tensor, Tensor]:
        """Search as the screen says, which is not the same for all queries."""
        index = columns.new_empty(len(columns), k)
        scores = query.bias.new_empty(len(columns), k)
        for chosen in (wide, ~wide):
            part = Features(query.rows[chosen], query.bias[chosen])
            mine = None if own is None else own[chosen]
            if chosen is wide:
                found = self._among_all(part, mine, k)
            else:
                some = columns[chosen]
                found = ordered(self.products.of_some(part, some), some, mine, k)
            index[chosen], scores[chosen] = found
        return index, scores

    def _among_all(self, query: Features, own: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        size = max(1, self.products.budget // (64 * len(self.products)))
        found = []
        for start in range(0, len(query.rows), size):
            part = slice(start, start + size)
            scores = self.products.of_all(Features(query.rows[part], query.bias[part]))
            found.append(best_of_all(scores, None if own is None else own[part], k))
        columns, best = zip(*found, strict=True)
        return torch.cat(columns), torch.cat(best)


def best_of_all(scores: Tensor, own: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Return columns and scores of the best of all ``[B, R]``, ``[B, k]`` both, best first."""
    number = scores.shape[1]
    columns, _ = candidates(scores, k)
    # Where fewer than k scores are finite, whole rows are candidates, with what fills groups up.
    if columns.shape[1] > number:
        columns = torch.arange(number, device=scores.device).expand_as(scores)
    missing = columns >= number
    values = scores.gather(1, columns.clamp(max=number - 1)).masked_fill(missing, -torch.inf)
    return ordered(values, columns, own, k)


class FloatScreen:
    """Finds what may be among the k best by float32 products: exact, as their error is bounded.

    A sum of F products has an error of at most F + 2 roundoffs of ``|q| |r|``, whatever the order
    of summation (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), by the
    inequality of Cauchy and Schwarz. Scores within twice the error of the k-th best are kept.
    """

    def __init__(self, products: Products) -> None:
        self.number = len(products)
        self.longest = float(products.rows.norm(dim=1).max())
        self.largest = float(products.bias.abs().max())
        missing = -self.number % LARGEST_GROUP
        self.rows = products.rows.new_zeros(
            self.number + missing, products.rows.shape[1], dtype=torch.float32
        )
        self.rows[: self.number] = products.rows
        self.bias = pad(products.bias.to(torch.float32), (0, missing), value=-torch.inf)

    def __call__(self, query: Features, k: int) -> tuple[Tensor, Tensor]:
        """Return columns that hold the k best, and for which queries there are too many."""
        reach = query.rows.norm(dim=1) * self.longest
        widest = min(_WIDEST * k, self.number // _DENSE)
        if widest < k or not float(reach.max()) + self.longest + self.largest < _LARGE:
            everyone = torch.ones_like(reach, dtype=torch.bool)
            return everyone.new_empty(len(reach), 0, dtype=torch.int64), everyone
        unit, width = _ROUNDOFF[torch.get_float32_matmul_precision()], query.rows.shape[1]
        error = unit * ((width + 10) * reach + 10 * self.largest)
        error += _SMALL * width * (1 + self.longest + query.rows.abs().amax(1))
        scores = torch.addmm(self.bias, query.rows.to(torch.float32), self.rows.T)
        return candidates(scores, k, (2 * error).to(torch.float32), widest)


def rounded(scores: Tensor, reach: Tensor) -> Tensor:
    """Return scores ``[B, C]`` with about eleven decimal digits of their largest terms, ``reach``.

    What is equal but for rounding errors is then equal, whatever the order of summation was: ties
    are ties on every machine, and go to the lower index.
    """
    quantum = torch.ldexp(torch.ones_like(reach), reach.frexp().exponent - _DIGITS)
    return torch.where(reach > 0, (scores / quantum).round() * quantum, scores)
