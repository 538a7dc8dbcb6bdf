"""`SiteTable` and `PlateLayout`: what a pair of traces says about its sites."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex

from pyro_recursive.tracing.handlers import SubstituteByName
from pyro_recursive.tracing.plates import Particles, PlateLayout, layout_of
from pyro_recursive.tracing.program import Program
from pyro_recursive.tracing.runs import run_particles
from pyro_recursive.tracing.sites import PACKED, SiteRecord, SiteTable, own_scale, unmasked

ROWS, FULL = 3, 12


def model() -> None:
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    k = pyro.sample("k", dist.Bernoulli(0.3))
    with pyro.plate("data", FULL, subsample_size=ROWS, dim=-2), poutine.scale(scale=0.5):
        pyro.deterministic("sum", loc.sum() + k)
        with pyro.plate("words", 4, dim=-1), poutine.mask(mask=torch.arange(4) > 0):
            pyro.sample("x", dist.Normal(loc.sum(-1), 1.0), obs=torch.zeros(ROWS, 4))


def guide() -> None:
    u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
    pyro.sample("loc", dist.Delta(torch.stack([u, -u])).mask(torch.tensor(True)).to_event(1))
    pyro.sample("k", dist.Bernoulli(0.5))
    with pyro.plate("data", FULL, subsample_size=ROWS, dim=-2):
        pyro.sample(
            "packed",
            dist.Normal(0.0, 1.0).expand([ROWS, 1]),
            infer={"is_auxiliary": True, PACKED: ("data",)},
        )


def records() -> dict[str, SiteRecord]:
    guided = Program(model, guide).run_guide()
    table = SiteTable(Program(model, guide).run_model(guided), guided)
    assert table.nesting == 2 and table.records == [*table.model, *table.guide]
    return {f"{record.group} {record.name}": record for record in table.records}


def test_every_site_with_a_density_has_a_record() -> None:
    assert list(records()) == [
        *("model loc", "model k", "model x"),
        *("density u", "jacobian loc", "score k", "density packed"),
    ]


def test_plates_masks_and_scales_of_records() -> None:
    found = records()
    x, packed = found["model x"], found["density packed"]
    assert set(x.plates) == set(x.row_plates) == {"data", "words"}
    assert x.sizes == {-2: ROWS, -1: 4} and x.is_subsampled and x.is_masked
    assert set(packed.plates) == {"data"} and not packed.row_plates
    assert not found["model loc"].is_masked and found["jacobian loc"].is_masked
    assert x.site["scale"] == pytest.approx(0.5 * FULL / ROWS)
    assert own_scale(x.site) == own_scale(x.site, {"data"}) == pytest.approx(0.5)
    assert own_scale(x.site, {"words"}) == x.site["scale"]


def test_unmasked_distributions_keep_their_event_dims() -> None:
    plain = dist.Normal(torch.zeros(3, 2), 1.0)
    masked = plain.mask(torch.tensor([True, False])).to_event(1)
    value = torch.randn(3, 2)
    whole = unmasked(masked)
    assert unmasked(plain) is plain and whole.event_dim == 1
    torch.testing.assert_close(whole.log_prob(value), plain.log_prob(value).sum(-1))


def test_the_shared_plates_enclose_every_site() -> None:
    def inner() -> None:
        with pyro.plate("a", 2, dim=-3), pyro.plate("b", 5, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("c", 3, dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(2, 3, 5))

    def inner_guide() -> None:
        with pyro.plate("b", 5, dim=-1), pyro.plate("a", 2, dim=-3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    particles, (run,) = run_particles(Program(inner, inner_guide), 2, 4)
    layout = layout_of(particles, [run.table])
    assert [frame.name for frame in layout.plates] == ["a", "b"]
    assert layout.shape == (2, 5) and layout.dims == (-3, -1) and particles.dim == -4
    assert layout_of(particles, [run.table], only=frozenset({"x"})).shape == (2, 3, 5)
    # Each entry of the gathered tensor is the sum over the plate that is not shared.
    x = run.model.nodes["x"]
    log_prob = x["fn"].log_prob(x["value"])
    gathered = layout.gather([[(x, log_prob)]])
    torch.testing.assert_close(gathered, log_prob.sum(-2).reshape(2, 4, 2, 5))
    weights, z = torch.randn(2, 4, 2, 5), run.guide.nodes["z"]
    assert layout.at_site(weights, z).shape == z["value"].shape == (8, 2, 1, 5)
    torch.testing.assert_close(layout.at_site(weights, z).reshape(2, 4, 2, 5), weights)


def test_sequential_plates_come_first() -> None:
    def loop() -> None:
        with pyro.plate("rows", 2, dim=-1):
            for i in pyro.plate("steps", 3):
                pyro.sample(f"x{i}", dist.Normal(float(i), 1.0), obs=torch.zeros(2))

    trace = poutine.trace(loop).get_trace()
    table = SiteTable(trace, poutine.Trace())
    layout = layout_of(Particles(1, 1), [table])
    assert layout.shape == (3, 2) and layout.sequential == ("steps",) and layout.dims == (-1,)
    sites = [record.site for record in table.model]
    gathered = layout.gather([[(site, site["fn"].log_prob(site["value"])) for site in sites]])
    expected = torch.stack([site["fn"].log_prob(site["value"]) for site in sites])
    torch.testing.assert_close(gathered, expected.expand(1, 1, 3, 2))


def test_a_group_without_sites_in_a_run_is_zero_there() -> None:
    trace = poutine.trace(lambda: pyro.sample("z", dist.Normal(0.0, 1.0))).get_trace()
    layout = PlateLayout(Particles(1, 2), 0, ())
    gathered = layout.gather([[(trace.nodes["z"], torch.tensor(2.0))], []])
    torch.testing.assert_close(gathered, torch.tensor([[2.0, 0.0]]))
    assert layout.gather([[], []]) is None


def test_values_are_substituted_by_name_in_latent_sites_alone() -> None:
    def program() -> torch.Tensor:
        with pyro.plate("data", 4, subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(2))
        return Vindex(torch.arange(4.0))[index]

    given = {"z": torch.tensor([1.0, 2.0]), "x": torch.zeros(2), "data": torch.tensor([3, 1])}
    trace = poutine.trace(SubstituteByName(given)(program)).get_trace()
    assert trace.nodes["z"]["value"] is given["z"]
    assert trace.nodes["x"]["value"].tolist() == [1.0, 1.0]
    assert trace.nodes["_RETURN"]["value"].tolist() == [3.0, 1.0]
