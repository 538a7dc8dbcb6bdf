"""Runs that change nothing outside: handlers, random state, modules; and what guides are told."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_recursive.tracing.handlers import DryRun, RunCache, is_dry_run, run_cache
from pyro_recursive.tracing.isolation import (
    SharedNoise,
    eval_mode,
    isolated,
    outline,
    random_state,
)


def noise() -> torch.Tensor:
    return pyro.sample("z", dist.Normal(0.0, 1.0))


def test_handlers_and_random_state_are_as_if_nothing_had_run() -> None:
    state = torch.get_rng_state()
    with poutine.trace() as outer:
        with isolated():
            first = noise()
        trace = outline(noise, (), {})
        second = noise()
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(trace.nodes["z"]["value"], first, rtol=0, atol=0)
    assert list(outer.trace.nodes) == ["z"]
    torch.set_rng_state(state)
    torch.testing.assert_close(noise(), first, rtol=0, atol=0)


def test_the_random_state_is_restored_after_an_error() -> None:
    (state,) = random_state()[:1]
    with pytest.raises(RuntimeError, match="inside"), isolated():
        noise()
        raise RuntimeError("inside")
    assert torch.equal(torch.get_rng_state(), state)


def test_the_random_states_of_all_gpus_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [torch.tensor([number], dtype=torch.uint8) for number in range(3)]
    current = list(states)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(states))
    monkeypatch.setattr(torch.cuda.random, "get_rng_state", lambda device=0: current[device])
    monkeypatch.setattr(torch.cuda.random, "device_count", lambda: len(states), raising=False)
    monkeypatch.setattr(
        torch.cuda.random, "set_rng_state", lambda s, device=0: current.__setitem__(device, s)
    )
    with isolated():
        current[:] = [each + 10 for each in states]
    assert current == states


def test_runs_with_shared_noise_draw_the_numbers_of_one_run() -> None:
    pyro.set_rng_seed(3)
    expected = [noise().item(), noise().item()]
    pyro.set_rng_seed(3)
    shared, found = SharedNoise(), []
    for _ in range(3):
        with isolated(noise=shared):
            found.append(noise().item())
    assert found == expected[:1] * 3
    assert noise().item() == expected[1]  # the numbers inside have been used


class Counter(nn.Module):
    """A module whose forward pass counts itself, and whose parameter is stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.norm(x) * self.weight


def test_buffers_do_not_move_in_training_and_stay_the_same_tensors() -> None:
    module, x = Counter(), torch.randn(8, 2)
    before = {name: (buffer, buffer.clone()) for name, buffer in module.named_buffers()}
    y = module(x).sum()  # a graph that needs the buffers
    for name, buffer in module.named_buffers():
        before[name] = (buffer, buffer.clone())
    with isolated():
        inside = module(x)
        assert module.count == 2
    assert inside.requires_grad and module.count == 1
    for name, buffer in module.named_buffers():
        assert buffer is before[name][0] and torch.equal(buffer, before[name][1])
    y.backward()


def test_modules_that_are_named_are_restored_in_place() -> None:
    module = Counter()
    weight, count = module.weight, module.count
    with isolated(module), torch.no_grad():
        weight.add_(1.0)
        count.add_(5.0)
    assert module.weight is weight and weight.tolist() == [1.0, 1.0] and count == 0


def test_guides_are_told_of_dry_runs_and_second_runs() -> None:
    assert not is_dry_run() and run_cache() is None
    with DryRun(), RunCache() as cache:
        found = run_cache()
        assert is_dry_run() and found == {}
        found["draw"] = 1
    with RunCache(cache.content):
        assert run_cache() == {"draw": 1}


class Merged(nn.Linear):
    """Has its update in its weight in eval mode only, as adapters of low rank have."""

    is_merged = False

    def train(self, mode: bool = True) -> "Merged":
        self.is_merged = not mode
        return super().train(mode)


def test_modules_whose_train_does_more_than_set_the_mode_are_trained_again() -> None:
    moving, held = Merged(1, 1), Merged(1, 1)
    held.eval()
    whole = nn.Sequential(moving, held)
    with eval_mode(whole):
        assert moving.is_merged and held.is_merged
    assert whole.training and moving.training and not held.training
    assert held.is_merged and not moving.is_merged
