"""Refinement leaves no trace: rows, handlers, statistics, random numbers, copies."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_recursive import IWAE_ELBO, MIWAE_ELBO, SemiAmortizedGuide
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
    numbers_in,
    reached,
    semi,
    subsampled,
)


@pytest.mark.parametrize("seed", [5, None])
@pytest.mark.parametrize("base", ["diagonal", "mixture", "coupling"])
def test_a_row_does_not_depend_on_its_minibatch(
    base: str, seed: int | None, monkeypatch: Any
) -> None:
    net, x = network(), torch.randn(6, 3)
    x[1] *= 30  # its gradient is clipped more often than theirs
    model = model_of(net)
    update = GradientUpdate(0.03, clip=20.0)
    guide = SemiAmortizedGuide(model, BASES[base](model), update=update, draws=2, seed=seed)
    guide.prepare(x)
    if seed is None:
        family = guide.row_family(guide.groups[-1])
        noise = torch.randn(10, family.parts, 6, family.noise_dim)
        rows = iter([slice(0, 6), slice(0, 2), slice(2, 6)])
        drawn = LocalBound.noise
        monkeypatch.setattr(LocalBound, "noise", lambda *args: noise[:, :, next(rows)])
        together, *parts = (numbers_in(guide, each) for each in (x, x[:2], x[2:]))
        monkeypatch.setattr(LocalBound, "noise", drawn)
    else:
        together, *parts = (reached(guide, each) for each in (x, x[:2], x[2:]))
        clipped = guide.refine(x).clipped
        assert clipped[1] > clipped.min()
    assert_all_close([torch.cat(parts)], [together], atol=1e-12, rtol=1e-12)
    assert (together[0] - together[2]).abs().max() > 1e-3


def test_rows_do_not_know_how_many_they_are() -> None:
    """No subsample scale in what they climb, wherever the minibatch is taken."""
    net, encoder, x = network(), nn.Linear(3, 2 * SIZE), torch.randn(6, 3)
    expected = reached(semi(model_of(net), encoder, seed=5), x)
    outside = reached(semi(model_of(net, full=600), encoder, seed=5), x[:3])
    assert_all_close([outside], [expected[:3]], atol=1e-12, rtol=1e-12)
    guide = semi(subsampled(net, 2), encoder, seed=5)
    seen = set()
    for _ in range(4):
        guide.prepare(x)
        call = guide.new_call((x,), {})
        index = call.plates["data"].indices
        found = guide.variational_params(guide.groups[-1], call)
        assert_all_close([found], [expected[index]], atol=1e-12, rtol=1e-12)
        seen |= set(index.tolist())
    assert len(seen) > 2


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
    value = (
        trace.log_prob_sum() + trace.nodes["z"]["value"].sum() + torch.zeros((), requires_grad=True)
    )
    reached = torch.autograd.grad(value, list(net.parameters()), allow_unused=True)
    assert all((g is not None) == (mode == "second_order") for g in reached)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("seed", [None, 5])
def test_the_sample_has_noise_of_its_own(seed: int | None, draws: int, monkeypatch: Any) -> None:
    inner: list[Tensor] = []
    outer: list[Tensor] = []

    def noting(function: Callable, found: list[Tensor]) -> Callable:
        def noted(*args: Any, **kwargs: Any) -> Tensor:
            found.append(function(*args, **kwargs))
            return found[-1]

        return noted

    guide, x = semi(model_of(Dropout(network())), seed=seed, draws=draws), torch.randn(ROWS, 3)
    guide.prepare(x)
    normal = torch.distributions.normal
    monkeypatch.setattr(LocalBound, "noise", noting(LocalBound.noise, inner))
    monkeypatch.setattr(normal, "_standard_normal", noting(normal._standard_normal, outer))
    for _ in range(2):
        guide(x)
    assert len(inner) == len(outer) == 2
    assert not (outer[0] == outer[1]).any()
    assert torch.equal(*inner) == (seed is not None)
    assert not any((noise == eps).any() for noise in inner for eps in outer)


def test_the_minibatch_is_drawn_once() -> None:
    seen = []
    x = torch.randn(9, 3)

    def model(x: Tensor) -> None:
        with pyro.plate("data", 9, subsample_size=3) as index:
            seen.append(index)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index, 0])

    svi = SVI(
        model,
        semi(model, nn.Linear(3, 2), steps=3),
        pyro.optim.SGD({"lr": 0.1}),
        MIWAE_ELBO(2, 2, estimator="dreg"),
    )
    svi.step(x)
    for _ in range(2):
        seen.clear()
        svi.step(x)
        assert len(seen) == 4
        assert all(torch.equal(index, seen[0]) for index in seen)


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


def test_predictions_for_data_of_another_size() -> None:
    net, x = network(), torch.randn(ROWS, 3)
    model = model_of(net)
    guide = semi(model)
    SVI(model, guide, pyro.optim.SGD({"lr": 0.01}), Trace_ELBO()).step(x)
    new = torch.randn(9, 3)
    for parallel in (False, True):
        predict = Predictive(model, guide=guide, num_samples=5, parallel=parallel)
        drawn = predict(new)
        assert drawn["z"].shape == (5, 9, SIZE)
        assert drawn["z"].std(0).min() > 0
    assert math.isfinite(IWAE_ELBO(3).loss(model, guide, new))


def test_copies_share_the_model_and_pickles_leave_it_out() -> None:
    net, x = network(), torch.randn(ROWS, 3)
    model = model_of(net)  # a closure: pickle would refuse it
    guide = semi(model, seed=5)
    expected = reached(guide, x)
    twin = copy.deepcopy(guide)
    assert twin._model.model is model
    assert torch.equal(reached(twin, x), expected)
    with torch.no_grad():
        twin.guide.encoder.bias.add_(1.0)
    assert torch.equal(reached(guide, x), expected)
    assert (reached(twin, x) != expected).any()

    loaded = pickle.loads(pickle.dumps(guide))
    with pytest.raises(RuntimeError, match=r"without its model.*guide\.attach\(model\)"):
        loaded(x)
    loaded.test_steps = 0
    assert loaded.eval()(x)["z"].shape == (ROWS, SIZE)
    loaded.train().attach(model)
    assert torch.equal(reached(loaded, x), expected)


@pytest.mark.parametrize("base", ["diagonal", "table", "coupling"])
def test_a_guide_that_was_trained_before(base: str) -> None:
    model, x = model_of(network()), torch.randn(ROWS, 3)
    trained_guide = BASES[base](model)
    optimizer, loss = pyro.optim.SGD({"lr": 0.01}), Trace_ELBO(max_plate_nesting=1)
    SVI(model, trained_guide, optimizer, loss).step(x)
    start = numbers_in(trained_guide, x).detach().clone()
    guide = SemiAmortizedGuide(model, trained_guide)
    found = guide.refine(x, steps=0)
    assert torch.equal(found.start, start)
    SVI(model, guide, optimizer, loss).step(x)
    assert (numbers_in(guide.guide, x) != start).any(-1).all()
    assert torch.equal(found.start, start)  # it is no view of a table


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
        torch.set_default_device(device)
        try:
            model = model_of(net)
            guide = semi(model, encoder, mode=mode, seed=5)
            guide.prepare(x.to(device))
            net.train(training)
            parameters = [*encoder.parameters(), *net.parameters()]
            numbers = numbers_in(guide, x.to(device))
            gradient = gradients(numbers.square().sum(), parameters)
            refined = guide.refine(x.to(device)).params
            found.append([each.cpu() for each in (numbers.detach(), refined, *gradient)])
        finally:
            torch.set_default_device(None)
    assert torch.backends.cudnn.enabled
    assert_all_close(found[0], found[1], atol=1e-8, rtol=1e-8)


def test_refine_leaves_the_encoders_statistics() -> None:
    x = torch.randn(ROWS, 3)
    norm = nn.BatchNorm1d(3)
    guide = semi(model_of(network()), nn.Sequential(norm, nn.Linear(3, 2 * SIZE)))
    guide.refine(x)
    assert norm.num_batches_tracked == 0
