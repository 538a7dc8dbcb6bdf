"""Ways to take training steps, all with Adam: each is made for a model to be timed on."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import (
    ELBO,
    SVI,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceMeanField_ELBO,
)
from torch import Tensor
from torch.optim import Adam

from benchmarks.tasks.timed import Timed
from pyro_recursive import IWAE_ELBO, CompiledSVI
from pyro_recursive.training.compiled.engines import EngineName

COMPILED: list[EngineName] = ["replay", "loop", "flat"]  # the first that can is timed
BETAS, EPS = (0.9, 0.999), 1e-8  # Adam's, everywhere


class Steps(NamedTuple):
    """``call()`` takes ``number`` steps and returns their losses, or the loss of the only one."""

    call: Callable[[], Any]
    number: int = 1


class Setting(NamedTuple):
    """What all ways have in common, beside the model."""

    name: str  # of this one, in Pyro's store
    lr: float = 1e-3
    engine: EngineName = "auto"
    cache: str | None = None  # a folder of compiled graphs


class NotApplicable(NotImplementedError):
    """Says why a model cannot be trained in some way."""


def stock(loss: Callable[[Timed], ELBO], timed: Timed, setting: Setting) -> Steps:
    """Return steps of Pyro's SVI and optimiser."""
    optimizer = pyro.optim.Adam({"lr": setting.lr})
    svi = SVI(*timed.programs(setting.name), optimizer, loss(timed))
    return Steps(partial(svi.step, *timed.args))


def checked(timed: Timed, setting: Setting) -> Steps:
    """Return steps of Pyro's SVI with its checks of arguments on, as they are by default."""
    steps = stock(of_pyro, timed, setting)

    def call() -> float:
        with pyro.validation_enabled(True):
            return steps.call()

    return Steps(call)


def of_pyro(timed: Timed, kind: Callable[..., ELBO] | None = None) -> ELBO:
    """Return a loss of Pyro; by default, that of the bound: Trace_ELBO or RenyiELBO.

    TraceEnum_ELBO has the mean of as many ELBOs, as Pyro has no other loss that sums latents.
    """
    options: dict[str, Any] = {"num_particles": timed.particles}
    if timed.particles > 1:
        options |= {"vectorize_particles": True}
    if timed.enumerated and kind in (Trace_ELBO, TraceMeanField_ELBO):
        raise NotApplicable("sums no latents")
    if kind is None and timed.enumerated:
        kind = TraceEnum_ELBO
    elif kind is None:
        kind = partial(RenyiELBO, alpha=0.0) if timed.particles > 1 else Trace_ELBO
    return kind(**options)


def jit(timed: Timed) -> ELBO:
    """Return Pyro's loss that torch.jit traces."""
    kind = JitTraceEnum_ELBO if timed.enumerated else JitTrace_ELBO
    return of_pyro(timed, partial(kind, ignore_jit_warnings=True))


def fused(timed: Timed, setting: Setting) -> Steps:
    """Return eager steps of this package's loss, with one fused optimiser of torch."""
    (model, guide), loss = timed.programs(setting.name), timed.loss()
    with pyro.poutine.trace(param_only=True) as captured:
        loss.loss_and_grads(model, guide, *timed.args)
    sites = captured.trace.nodes.values()
    parameters = dict.fromkeys(site["value"].unconstrained() for site in sites)
    optimizer = Adam(list(parameters), lr=setting.lr, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        value = loss.loss_and_grads(model, guide, *timed.args)
        optimizer.step()
        return value

    return Steps(step)


def dreg(timed: Timed) -> ELBO:
    """Return the bound with doubly reparameterised gradients."""
    if timed.particles == 1:
        raise NotApplicable("DReG needs more than one particle")
    return IWAE_ELBO(timed.particles, estimator="dreg")


def compiled(timed: Timed, setting: Setting, many: bool = False) -> Steps:
    """Return compiled steps, one or many in a call; raise where they would run eagerly."""
    svi = _compiled_svi(timed, setting)
    number = timed.many if setting.engine != "graph" else 4  # which is for tests
    if many:
        return Steps(partial(svi.run, number, *timed.args), number)
    return Steps(partial(svi.step, *timed.args))


def _compiled_svi(timed: Timed, setting: Setting) -> CompiledSVI:
    """Return a training whose steps have been compiled, however few will be taken."""
    engines = COMPILED if setting.engine == "auto" else [setting.engine]
    for number, engine in enumerate(engines, 1):
        optimizer = pyro.optim.Adam({"lr": setting.lr})
        programs = timed.programs(f"{setting.name} {engine}")
        svi = CompiledSVI(
            *programs, optimizer, timed.loss(), engine=engine, strict=True, cache=setting.cache
        )
        try:
            svi.step(*timed.args)  # eager
            svi.step(*timed.args)
            break
        except NotImplementedError:
            if number == len(engines):
                raise
    return svi


def by_hand(timed: Timed, setting: Setting) -> Steps:
    """Return eager steps of a loss written in plain torch, with fused Adam."""
    starts, loss = _by_hand(timed)
    parameters = [start.clone().requires_grad_() for start in starts]
    optimizer = Adam(parameters, lr=setting.lr, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss(parameters, *timed.args)
        value.backward()
        optimizer.step()
        return value.detach()

    return Steps(step)


def by_hand_compiled(timed: Timed, setting: Setting) -> Steps:
    """Return loss, gradients and Adam in plain torch as one graph of `torch.compile`."""
    starts, loss = _by_hand(timed)
    parameters = [start.clone() for start in starts]
    means, squares = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    count, args = torch.zeros(1), timed.args

    def step() -> Tensor:
        gradients, value = torch.func.grad_and_value(loss)(parameters, *args)
        count.add_(1)
        rate = setting.lr / (1 - BETAS[0] ** count)
        spread = (1 - BETAS[1] ** count).sqrt()
        for p, g, m, v in zip(parameters, gradients, means, squares, strict=True):
            m.lerp_(g, 1 - BETAS[0])
            v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
            p.sub_(rate * m / (v.sqrt() / spread + EPS))
        return value

    # Normal numbers by ATen: the compiler's own are many times slower on a CPU.
    options: dict[str, Any] = {"fallback_random": True}
    torch.compiler.reset()  # after eight models it would give up
    graph = torch.compile(step, fullgraph=True, dynamic=False, options=options)
    return Steps(torch.no_grad()(graph))


def _by_hand(timed: Timed) -> tuple[list[Tensor], Callable[..., Tensor]]:
    if timed.by_hand is None:
        raise NotApplicable("not written by hand")
    return timed.by_hand


def of_numpyro(timed: Timed, setting: Setting, many: bool = False) -> Steps:
    """Return steps of NumPyro: jitted updates, or many in a scan that returns all losses."""
    import jax
    import numpyro

    if timed.in_numpyro is None:
        raise NotApplicable("not written in NumPyro")
    losses = numpyro.infer
    loss: Any = losses.Trace_ELBO()
    if timed.particles > 1:
        loss = losses.RenyiELBO(alpha=0.0, num_particles=timed.particles)
    args = [jax.numpy.asarray(each.cpu().numpy()) for each in timed.args]
    optimizer = numpyro.optim.Adam(setting.lr)
    svi = losses.SVI(*timed.in_numpyro(numpyro), optimizer, loss)
    state = svi.init(jax.random.PRNGKey(0), *args)
    count = timed.many if many else 1

    def update(state: Any, _: Any = None) -> Any:
        return svi.update(state, *args)

    def scan(state: Any) -> Any:
        return jax.lax.scan(update, state, length=count)

    run = jax.jit(scan if many else update)

    def call() -> Any:
        nonlocal state
        state, value = run(state)
        return jax.block_until_ready(value)

    return Steps(call, count)


OURS: dict[str, Callable[[Timed, Setting], Steps]] = {
    "eager, SVI": partial(stock, lambda timed: timed.loss()),
    "CompiledSVI.step": compiled,
    "CompiledSVI.run": partial(compiled, many=True),
}
PYRO = "Pyro SVI"
METHODS: dict[str, Callable[[Timed, Setting], Steps]] = {
    PYRO: partial(stock, of_pyro),
    f"{PYRO}, checks on": checked,
    "Pyro Trace_ELBO": partial(stock, partial(of_pyro, kind=Trace_ELBO)),
    "Pyro TraceMeanField_ELBO": partial(stock, partial(of_pyro, kind=TraceMeanField_ELBO)),
    "Pyro JitTrace_ELBO": partial(stock, jit),
    "hand-written": by_hand,
    "hand-written, compiled": by_hand_compiled,
    "eager, SVI": OURS["eager, SVI"],
    "eager dreg, SVI": partial(stock, dreg),
    "eager, one fused Adam": fused,
    "CompiledSVI.step": compiled,
    "CompiledSVI.run": OURS["CompiledSVI.run"],
    "NumPyro update": of_numpyro,
    "NumPyro scan": partial(of_numpyro, many=True),
}


def make(method: str, timed: Timed, setting: Setting) -> Steps:
    """Return the steps of a method."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return METHODS[method](timed, setting)
