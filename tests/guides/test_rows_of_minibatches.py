"""A guide with a table of parameters gives each row of a minibatch its own, not the first ones."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList
from torch import Tensor

from pyro_recursive import AmortizedGuide, MixtureGuide, RecursiveMixtureGuide, Schedule
from pyro_recursive.guides.base import LatentGuide

X = torch.zeros(7, 2)


def model(x: Tensor, rows: Tensor | None = None) -> None:
    """Two plates; the rows of the outer one are a minibatch, given or drawn."""
    size = None if rows is not None else 3
    data = pyro.plate("data", len(x), subsample_size=size, subsample=rows, dim=-2)
    with data as index, pyro.plate("columns", 2, dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def plates(x: Tensor, rows: Tensor | None = None) -> list[pyro.plate]:
    size = None if rows is not None else 3
    data = pyro.plate("data", len(x), subsample_size=size, subsample=rows, dim=-2)
    return [data, pyro.plate("columns", 2, dim=-1)]


GUIDES = {
    "one": lambda: AmortizedGuide(model, plate="data", create_plates=plates),
    "mixture": lambda: MixtureGuide(model, 2, plate="data", create_plates=plates),
    "recursive": lambda: RecursiveMixtureGuide(
        model, 2, plate="data", create_plates=plates, schedule=Schedule(first=1)
    ),
}


def put_at_their_params(guide: LatentGuide) -> None:
    """Let every component draw a row's number, nearly, and weigh component 1 in odd rows only."""
    for part in getattr(guide, "components", [guide]):
        params = torch.arange(7.0)[:, None, None].expand(7, 2, 1)
        part.free_local.data[:] = torch.cat([params, torch.full_like(params, -20.0)], -1)
    if isinstance(guide, MixtureGuide):
        for parameter in guide.weights.parameters():
            odd = (torch.arange(7) % 2).reshape(7, *[1] * (parameter.dim() - 1))
            parameter.data[:] = 0.0
            parameter.data[..., -1:] = 16.0 * odd - 8.0


@pytest.mark.parametrize("kind", GUIDES)
def test_rows_of_a_minibatch_have_their_own_parameters(kind: str) -> None:
    guide = GUIDES[kind]()
    guide.prepare(X)
    put_at_their_params(guide)
    if kind == "recursive":
        guide.progress[3:] = 1
    for rows in ([5, 1], [6, 0, 3], [2], [4, 5, 6, 0, 1, 2]):
        index = torch.tensor(rows)
        found = guide(X, index)["z"]
        expected = index.to(found)[:, None].expand(len(rows), 2)
        torch.testing.assert_close(found.detach(), expected, atol=1e-6, rtol=0)
        if isinstance(guide, MixtureGuide):
            second = guide.component_weights(X, index)[..., 1]
            assert ((second > 0.5) == (index % 2 == 1)[:, None]).all()
    for _ in range(3):  # drawn by the guide itself
        trace = pyro.poutine.trace(guide).get_trace(X)
        found, index = trace.nodes["z"]["value"], trace.nodes["data"]["value"]
        torch.testing.assert_close(found[:, 0].detach(), index.to(found), atol=1e-6, rtol=0)


class Encoder(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x, torch.full_like(x, -30.0)], -1)  # a latent for each row and column


def test_encoders_of_all_rows_in_another_order_are_unclear() -> None:
    x = torch.arange(14.0).reshape(7, 2)
    guide = AmortizedGuide(model, Encoder(), plate="data", create_plates=plates)
    guide.prepare(x)
    order = torch.tensor([3, 1, 2, 0, 4, 6, 5])
    with pytest.raises(ValueError, match="Plate 'data' has all 7 rows in another order"):
        guide(x, order)
    torch.testing.assert_close(guide(x, torch.arange(7))["z"], x, atol=1e-5, rtol=0)
    torch.testing.assert_close(guide(x, order[:5])["z"], x[order[:5]], atol=1e-5, rtol=0)


def test_values_in_the_place_of_row_numbers_are_no_order() -> None:
    """``subsample=x`` is right for minibatches that are passed as such, also of whole numbers."""

    def of_values(x: Tensor) -> pyro.plate:
        return pyro.plate("data", 3, subsample=x)

    def counts(x: Tensor) -> None:
        with of_values(x):
            rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    class Rate(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x.double(), torch.full((len(x),), -30.0)], -1)

    x, places = torch.tensor([2, 0, 1]), torch.tensor([0.0, 2.0, 4.0])
    encoded = AmortizedGuide(counts, Rate(), create_plates=of_values)
    torch.testing.assert_close(encoded(x)["rate"].log(), x.double(), atol=1e-6, rtol=0)
    guide = AmortizedGuide(counts, plate="data", create_plates=of_values, name="table")
    guide.prepare(x)
    guide.free_local.data.copy_(torch.stack([places, torch.full((3,), -30.0)], -1))
    found = guide(torch.tensor([2, 0, 2]))["rate"].log()
    torch.testing.assert_close(found, places, atol=1e-6, rtol=0)


def test_all_rows_in_another_order_have_their_own_parameters() -> None:
    def shuffled(x: Tensor, rows: Tensor) -> None:
        with plate(x, rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def plate(x: Tensor, rows: Tensor) -> pyro.plate:
        return pyro.plate("data", len(x), subsample=rows)

    guide = AmortizedGuide(shuffled, plate="data", create_plates=plate)
    x, order = torch.zeros(4), torch.tensor([2, 0, 3, 1])
    guide.prepare(x, order)
    params = torch.stack([torch.arange(4.0), torch.full((4,), -30.0)], -1)
    guide.free_local.data.copy_(params)
    torch.testing.assert_close(guide(x, order)["z"].detach(), order.to(x))


@pytest.mark.parametrize("dims", [(-2, -1), (-1, -2)])
@pytest.mark.parametrize(("outer", "inner"), [(2, 3), (None, 3), (2, None)])
def test_two_subsampled_plates_in_a_list(
    outer: int | None, inner: int | None, dims: tuple[int, int]
) -> None:
    """Rows of both plates are right by their numbers; one guide alone names the remedy."""
    sizes = {"outer": (6, outer, dims[0]), "inner": (8, inner, dims[1])}

    def both() -> list[pyro.plate]:
        return [pyro.plate(n, size, part, dim=dim) for n, (size, part, dim) in sizes.items()]

    def nested() -> None:
        groups, members = both()
        with groups:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with members:
                pyro.sample("z", dist.Normal(a, 1.0))

    guide = AutoGuideList(nested, create_plates=both)
    guide.append(AmortizedGuide(poutine.block(nested, expose=["a"]), plate="outer"))
    guide.append(AmortizedGuide(poutine.block(nested, hide=["a"]), plate="inner"))
    guide()
    tables = []
    for part in guide:
        (latents,) = part.groups
        table = torch.arange(float(part.free_local[..., 0].numel()))
        tables.append(table.reshape(part.free_local.shape[:-1]))
        part.restart(latents, tables[-1].unsqueeze(-1), 1e-6)
    left, right = sorted(sizes, key=lambda name: sizes[name][2])
    for _ in range(3):
        nodes = poutine.trace(guide).get_trace().nodes
        rows = {name: nodes[name]["value"] for name in sizes}
        expected = tables[1][rows[left]][:, rows[right]]
        torch.testing.assert_close(nodes["z"]["value"], expected, atol=1e-4, rtol=0)
        found = nodes["a"]["value"].flatten()
        torch.testing.assert_close(found, tables[0][rows["outer"]], atol=1e-4, rtol=0)
    if outer and inner:
        for plate in (None, "outer", "inner"):
            with pytest.raises(ValueError, match=r"is subsampled .*Give plate='.*AutoGuideList"):
                AmortizedGuide(nested, plate=plate)()
