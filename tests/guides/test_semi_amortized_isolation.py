"""Refinement leaves no trace: rows, handlers, statistics, random numbers, cuDNN."""

import copy
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_recursive import (
    IWAE_ELBO,
    MIWAE_ELBO,
    AmortizedGuide,
    MixtureGuide,
    SemiAmortizedGuide,
)
from pyro_recursive.guides.call import first_argument
from pyro_recursive.guides.semi_amortized.guide import MODES
from pyro_recursive.guides.semi_amortized.row_elbo import LocalBound
from pyro_recursive.guides.semi_amortized.updates import GradientUpdate
from tests.oracles.refinement import (
    BASES,
    ROWS,
    SIZE,
    Watched,
    assert_all_close,
    gradients,
    model_of,
    network,
    params_in,
    reached,
    semi,
)

CLOSE: dict[str, float] = {"atol": 1e-12, "rtol": 1e-12}

# --- Rows


@pytest.mark.parametrize("seed", [5, None])
@pytest.mark.parametrize("base", ["diagonal", "mixture", "coupling"])
def test_a_row_does_not_depend_on_its_minibatch(
    base: str, seed: int | None, monkeypatch: Any
) -> None:
    net, x = network(), torch.randn(6, 3)
    x[1] *= 100  # its gradient is clipped more often than theirs
    model = model_of(net)
    update = GradientUpdate(0.03, clip=20.0)
    guide = SemiAmortizedGuide(model, BASES[base](model), update=update, draws=2, seed=seed)
    guide.prepare(x)
    if seed is None:
        family = guide.row_family(guide.groups[-1])
        noise = torch.randn(10, family.parts, 6, family.noise_dim)
        rows = iter([slice(0, 6), slice(0, 2), slice(2, 6)])
        monkeypatch.setattr(LocalBound, "noise", lambda *args: noise[:, :, next(rows)])
    else:
        clipped = guide.refine(x).clipped
        assert clipped[1] > clipped.min()
    together, *parts = (reached(guide, each) for each in (x, x[:2], x[2:]))
    assert_all_close([torch.cat(parts)], [together], **CLOSE)
    assert (together[0] - together[2]).abs().max() > 1e-3


def test_rows_do_not_know_how_many_they_are() -> None:
    """No subsample scale in what they climb, wherever the minibatch is taken."""
    net, encoder, x = network(), nn.Linear(3, 2 * SIZE), torch.randn(6, 3)
    expected = reached(semi(model_of(net), encoder, seed=5), x)
    outside = reached(semi(model_of(net, full=600), encoder, seed=5), x[:3])
    assert_all_close([outside], [expected[:3]], **CLOSE)
    guide = semi(model_of(net, subsample_size=2), encoder, seed=5)
    guide.prepare(x)
    for _ in range(4):
        call = guide.new_call((x,), {})
        found = guide.variational_params(guide.groups[-1], call)
        assert_all_close([found], [expected[call.plates["data"].indices]], **CLOSE)


@pytest.mark.parametrize("base", ["diagonal", "mixture"])
def test_an_explicit_minibatch_is_kept(base: str) -> None:
    """``subsample=x`` of the model is what the rows' ELBO is of, not the guide's indices."""

    def model(x: Tensor, reads_plate: bool) -> None:
        with pyro.plate("data", 60, subsample=x) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(SIZE), 1.0).to_event(1))
            observed = rows if reads_plate else x
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).to_event(1), obs=observed)

    x, encoder, found = torch.randn(6, 3), nn.Linear(3, 2 * SIZE), []
    for reads_plate in (False, True):
        guide = AmortizedGuide(model, encoder, name=f"encoder_{reads_plate}")
        if base == "mixture":
            options = {"inputs": first_argument, "name": f"mixture_{reads_plate}"}
            guide = MixtureGuide(model, [guide], **options)
        refined = SemiAmortizedGuide(model, guide, name=f"refined_{reads_plate}")
        refined.prepare(x, reads_plate)
        torch.manual_seed(0)
        found.append(refined.refine(x, reads_plate).elbo)
    assert_all_close(found[:1], found[1:], **CLOSE)


def test_the_minibatch_is_drawn_once() -> None:
    """And latents have the shapes of the model in all of its runs: one, or a dim of the draws."""
    seen: list[tuple[Tensor, torch.Size]] = []
    x = torch.randn(9, 3)

    def model(x: Tensor) -> None:
        with pyro.plate("data", 9, subsample_size=3, dim=-1) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            seen.append((index, z.shape))
            with pyro.plate("copy", 3, dim=-2):  # that z is not in
                pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[index].mT)

    for draws, shape in {1: (3, 2), 4: (4, 1, 1, 3, 2)}.items():
        guide = semi(model, steps=3, draws=draws, name=f"of_{draws}")
        svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.1}), MIWAE_ELBO(2, 2, estimator="dreg"))
        svi.step(x)
        for _ in range(2):
            seen.clear()
            svi.step(x)
            assert len(seen) == 4 and all(torch.equal(index, seen[0][0]) for index, _ in seen)
            assert [tuple(own) for _, own in seen[:3]] == [shape] * 3


@pytest.mark.quick(1)
@pytest.mark.parametrize("base", ["diagonal", "table", "coupling"])
def test_a_guide_that_was_trained_before(base: str) -> None:
    model, x = model_of(network()), torch.randn(ROWS, 3)
    trained_guide = BASES[base](model)
    optimizer, loss = pyro.optim.SGD({"lr": 0.01}), Trace_ELBO(max_plate_nesting=1)
    SVI(model, trained_guide, optimizer, loss).step(x)
    start = params_in(trained_guide, x).detach().clone()
    guide = SemiAmortizedGuide(model, trained_guide)
    found = guide.refine(x, steps=0)
    assert torch.equal(found.start, start)
    SVI(model, guide, optimizer, loss).step(x)
    assert (params_in(guide.guide, x) != start).any(-1).all()
    assert torch.equal(found.start, start)  # it is no view of a table


# --- Modules, handlers, random numbers


def steps_of(net: nn.Module, x: Tensor, mode: str, **options: Any) -> tuple[Any, Any]:
    """Return traces of guide and model, after a call of a guide with three steps."""
    model = model_of(net)
    guide = semi(model, steps=3, mode=mode, name="refined", **options)
    net.eval()
    guide.prepare(x)
    net.train()
    trace = poutine.trace(guide).get_trace(x)
    return trace, poutine.trace(poutine.replay(model, trace=trace)).get_trace(x)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, PyroModule[nn.BatchNorm1d]])
@pytest.mark.parametrize("mode", ["first_order", "second_order"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_batch_norms_see_the_outer_run_alone(mode: str, norm: type, checkpoint: bool) -> None:
    net, x = nn.Sequential(nn.Linear(SIZE, 5), norm(5), nn.Linear(5, 3)), torch.randn(ROWS, 3)
    fresh = copy.deepcopy(net)
    _, trace = steps_of(net, x, mode, checkpoint=checkpoint)
    trace.log_prob_sum().backward()  # a checkpoint runs the model again
    fresh(trace.nodes["z"]["value"])
    assert fresh[1].num_batches_tracked == 1
    for name, buffer in fresh.named_buffers():
        assert torch.equal(buffer, net.get_buffer(name)), name


def test_refine_leaves_the_encoders_statistics() -> None:
    norm = nn.BatchNorm1d(3)
    guide = semi(model_of(network()), nn.Sequential(norm, nn.Linear(3, 2 * SIZE)))
    guide.refine(torch.randn(ROWS, 3))
    assert norm.num_batches_tracked == 0


class Dropout(nn.Module):
    """Notes its masks."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.masks: list[Tensor] = []

    def forward(self, z: Tensor) -> Tensor:
        self.masks.append(torch.rand_like(z) < 0.5)
        return self.net(2 * self.masks[-1] * z)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("draws", [1, 2])
def test_dropout_is_the_same_in_all_steps(draws: int, checkpoint: bool) -> None:
    net, x = Dropout(network()), torch.randn(50, 3)
    options = {"draws": draws, "checkpoint": checkpoint, "steps": 3}
    guide = semi(model_of(net), mode="second_order", **options)
    guide.prepare(x)
    for _ in range(2):
        net.masks.clear()
        Trace_ELBO(max_plate_nesting=1).loss_and_grads(guide._model.model, guide, x)
        same = [torch.equal(mask, net.masks[0]) for mask in net.masks]
        assert same.count(False) == 1  # the outer run
        assert same.index(False) == (3 if not checkpoint else 6)
    assert len(net.masks) == (4 if not checkpoint else 10)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("mode", MODES)
def test_only_the_guide_is_seen(mode: str, seed: int | None) -> None:
    net, x = Dropout(network()), torch.randn(ROWS, 3)
    trace, _ = steps_of(net, x, mode, seed=seed)
    samples = [name for name, site in trace.nodes.items() if site["type"] == "sample"]
    also = [] if mode == "svi" else ["refined_direct"]
    assert sorted(samples) == sorted(["data", "z", *also])
    params = {name for name, site in trace.nodes.items() if site["type"] == "param"}
    assert params == {f"refined.guide.encoder$$${name}" for name in ("weight", "bias")}
    assert all(parameter.grad is None for parameter in net.parameters())
    value = trace.log_prob_sum() + trace.nodes["z"]["value"].sum()
    value = value + torch.zeros((), requires_grad=True)
    reached = torch.autograd.grad(value, list(net.parameters()), allow_unused=True)
    assert all((g is not None) == (mode == "second_order") for g in reached)


@pytest.mark.parametrize("mode", ["first_order", "distill"])
@pytest.mark.parametrize("seed", [None, 5])
def test_the_sample_and_a_divergence_have_noise_of_their_own(
    seed: int | None, mode: str, monkeypatch: Any
) -> None:
    """Where their draws had moved the rows, they would be biased."""
    drawn: dict[str, list[Tensor]] = {"inner": [], "outer": []}

    def noting(function: Callable, key: str) -> Callable:
        def noted(*args: Any, **kwargs: Any) -> Tensor:
            noise = function(*args, **kwargs)
            drawn[key].append(noise)
            return noise

        return noted

    model = model_of(Dropout(network()))
    guide, x = semi(model, seed=seed, draws=3, mode=mode), torch.randn(ROWS, 3)
    guide.prepare(x)
    normal = torch.distributions.normal
    monkeypatch.setattr(LocalBound, "noise", noting(LocalBound.noise, "inner"))
    monkeypatch.setattr(normal, "_standard_normal", noting(normal._standard_normal, "outer"))
    for _ in range(2):
        guide(x)
    steps, *divergence = drawn["inner"][: len(drawn["inner"]) // 2]
    assert len(divergence) == (mode == "distill") and len(drawn["outer"]) == 2
    for own in (*divergence, *drawn["outer"]):
        assert not torch.isin(own, steps).any()
    assert not (drawn["outer"][0] == drawn["outer"][1]).any()
    again = drawn["inner"][len(drawn["inner"]) // 2]
    assert torch.equal(steps, again) == (seed is not None)


@pytest.mark.parametrize("estimator", ["pathwise", "stl", "dreg"])
@pytest.mark.parametrize("vectorize", [True, False])
def test_refinement_once_in_a_step(estimator: str, vectorize: bool) -> None:
    """Also where the loss runs the guide twice; looped particles are refined one by one."""
    net, x = Watched(network()), torch.randn(ROWS, 3)
    model = model_of(net)
    guide = semi(model, steps=3, draws=2)
    loss = IWAE_ELBO(2, estimator=estimator, vectorize_particles=vectorize)
    loss.loss(model, guide, x)  # has a look at the plates
    net.calls = 0
    loss.loss_and_grads(model, guide, x)
    assert net.calls == (3 + 1 if vectorize else 2 * (3 + 1))


# --- Networks without second derivatives


class Attention(nn.Module):
    """A decoder that fused attention would run in."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(SIZE, 1, batch_first=True)
        self.last = nn.Linear(SIZE, 3)

    def forward(self, z: Tensor) -> Tensor:
        words = z.reshape(-1, 1, SIZE).expand(-1, 2, -1)
        seen = self.attention(words, words, words, need_weights=False)[0]
        return self.last(seen.sum(1)).reshape(*z.shape[:-1], 3)


def test_second_order_through_attention() -> None:
    x, net = torch.randn(ROWS, 3), Attention()
    guide = semi(model_of(net), mode="second_order", steps=2, seed=1)
    Trace_ELBO().loss_and_grads(model_of(net), guide, x)
    assert all(bool(p.grad.isfinite().all()) for p in guide.parameters())


class Recurrent(nn.Module):
    """Notes whether cuDNN was on."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(SIZE, 6, batch_first=True), nn.Linear(6, 1)
        self.cudnn: list[bool] = []

    def forward(self, z: Tensor) -> Tensor:
        hidden, _ = self.lstm(z.unsqueeze(-2).expand(-1, 3, -1))
        self.cudnn.append(torch.backends.cudnn.enabled)
        return self.out(hidden).squeeze(-1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["first_order", "second_order"])
def test_where_cudnn_is_left_out(mode: str, training: bool) -> None:
    net, x = Recurrent(), torch.randn(ROWS, 3)
    guide = semi(model_of(net), mode=mode, steps=2)
    guide.prepare(x)
    net.train(training)
    net.cudnn.clear()
    Trace_ELBO(max_plate_nesting=1).loss_and_grads(guide._model.model, guide, x)
    assert net.cudnn == [training and mode == "first_order"] * 2 + [True]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["first_order", "second_order"])
def test_recurrent_networks_on_cuda(mode: str, training: bool) -> None:
    """cuDNN's cannot be differentiated twice, nor at all in eval mode: torch's own are used."""
    net, encoder, x = Recurrent(), nn.Linear(3, 2 * SIZE), torch.randn(ROWS, 3)
    found = []
    for device in ("cpu", "cuda"):
        pyro.clear_param_store()
        net.to(device)
        encoder.to(device)
        with torch.device(device):
            guide = semi(model_of(net), encoder, mode=mode, seed=5)
            guide.prepare(x.to(device))
            net.train(training)
            parameters = [*encoder.parameters(), *net.parameters()]
            params = params_in(guide, x.to(device))
            gradient = gradients(params.square().sum(), parameters)
            refined = guide.refine(x.to(device)).params
        found.append([each.cpu() for each in (params.detach(), refined, *gradient)])
    assert torch.backends.cudnn.enabled
    assert_all_close(found[0], found[1], atol=1e-8, rtol=1e-8)
