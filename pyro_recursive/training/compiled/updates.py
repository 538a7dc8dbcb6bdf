"""Update rules of torch's and Pyro's optimisers as functions of tensors, for parameters in a row.

Each returns the new values and states; step counts are float64 and 1 in the first step. Options
are numbers, or tensors with an entry for each value where parameters have their own.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

Slots = dict[str, Tensor]
Options = Mapping[str, Any]
Update = Callable[[Tensor, Tensor, Slots, Tensor, Tensor, Options], tuple[Tensor, Slots]]


class Rule(NamedTuple):
    """An optimiser's update, and which entries of its state are in use under given options."""

    update: Update
    slots: Callable[[Options], tuple[str, ...]]
    has_step_count: bool = True  # in its state


def _adam(
    p: Tensor, g: Tensor, s: Slots, step: Tensor, lr: Tensor, o: Options
) -> tuple[Tensor, Slots]:
    beta1, beta2 = o["betas"]
    if o["decoupled_weight_decay"]:
        g = -g if o["maximize"] else g
        p = p * (1 - lr * o["weight_decay"]).to(p)
    else:
        g = _decayed(g, p, o)
    mean, square = s["exp_avg"], s["exp_avg_sq"]
    mean, square = mean + (1 - beta1) * (g - mean), beta2 * square + (1 - beta2) * g * g
    new, largest = {"exp_avg": mean, "exp_avg_sq": square}, square
    if o["amsgrad"]:
        new["max_exp_avg_sq"] = largest = torch.maximum(s["max_exp_avg_sq"], square)
    scale = (1 - beta2**step).sqrt().to(p)
    return p - (lr / (1 - beta1**step)).to(p) * mean / (largest.sqrt() / scale + o["eps"]), new


def _clipped_adam(
    p: Tensor, g: Tensor, s: Slots, step: Tensor, lr: Tensor, o: Options
) -> tuple[Tensor, Slots]:
    beta1, beta2 = o["betas"]
    g = _decayed(g.clamp(-o["clip_norm"], o["clip_norm"]), p, o)
    mean = beta1 * s["exp_avg"] + (1 - beta1) * g
    spread = g - mean if o["centered_variance"] else g
    square = beta2 * s["exp_avg_sq"] + (1 - beta2) * spread * spread
    size = (lr * (1 - beta2**step).sqrt() / (1 - beta1**step)).to(p)
    return p - size * mean / (square.sqrt() + o["eps"]), {"exp_avg": mean, "exp_avg_sq": square}


def _sgd(
    p: Tensor, g: Tensor, s: Slots, step: Tensor, lr: Tensor, o: Options
) -> tuple[Tensor, Slots]:
    g = _decayed(g, p, o)
    if not s:
        return p - lr.to(p) * g, {}
    momentum, kept = o["momentum"], 1 - o["dampening"]
    moved = torch.where(step == 1, g, momentum * s["momentum_buffer"] + kept * g)
    along = g + momentum * moved if o["nesterov"] else moved
    return p - lr.to(p) * along, {"momentum_buffer": moved}


def _rmsprop(
    p: Tensor, g: Tensor, s: Slots, step: Tensor, lr: Tensor, o: Options
) -> tuple[Tensor, Slots]:
    g, alpha = _decayed(g, p, o), o["alpha"]
    square = alpha * s["square_avg"] + (1 - alpha) * g * g
    new, spread = {"square_avg": square}, square
    if o["centered"]:
        new["grad_avg"] = mean = s["grad_avg"] + (1 - alpha) * (g - s["grad_avg"])
        spread = square - mean * mean
    along = g / (spread.sqrt() + o["eps"])
    if "momentum_buffer" in s:
        new["momentum_buffer"] = along = o["momentum"] * s["momentum_buffer"] + along
    return p - lr.to(p) * along, new


def _adagrad(
    p: Tensor, g: Tensor, s: Slots, step: Tensor, lr: Tensor, o: Options
) -> tuple[Tensor, Slots]:
    g = _decayed(g, p, o)
    total = s["sum"] + g * g
    size = (lr / (1 + (step - 1) * o["lr_decay"])).to(p)
    return p - size * g / (total.sqrt() + o["eps"]), {"sum": total}


def _decayed(g: Tensor, p: Tensor, o: Options) -> Tensor:
    if o.get("maximize"):
        g = -g
    decay = o["weight_decay"]
    return g if isinstance(decay, int | float) and decay == 0 else g + decay * p


def _adam_slots(o: Options) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if o.get("amsgrad") else []))


def _has_momentum(o: Options) -> bool:
    return not (isinstance(o["momentum"], int | float) and o["momentum"] == 0)


RULES: dict[type[Optimizer], Rule] = {
    Adam: Rule(_adam, _adam_slots),
    AdamW: Rule(_adam, _adam_slots),
    ClippedAdam: Rule(_clipped_adam, _adam_slots),
    SGD: Rule(
        _sgd, lambda o: ("momentum_buffer",) if _has_momentum(o) else (), has_step_count=False
    ),
    RMSprop: Rule(
        _rmsprop,
        lambda o: (
            "square_avg",
            *(["grad_avg"] if o["centered"] else []),
            *(["momentum_buffer"] if _has_momentum(o) else []),
        ),
    ),
    Adagrad: Rule(_adagrad, lambda o: ("sum",)),
}
