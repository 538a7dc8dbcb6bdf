"""A normalising flow fitted to codes by maximum likelihood."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_recursive.guides.flow.kinds import build_flow, check_flow
from pyro_recursive.guides.flow.zuko_adapter import AffineFlow
from pyro_recursive.mapa.recovered import RecoveredPrior, check_spread
from pyro_recursive.tracing.arguments import check_at_least

__all__ = ["FlowPrior"]

_LOOK_EVERY = 25  # steps between two looks at the validation codes
_VALIDATION = 0.1  # of the codes


class FlowPrior(RecoveredPrior):
    """A flow fitted to codes, which are standardised for that, by Adam with early stopping.

    A tenth of the codes is for validation: the flow is the one of the looks, every 25 steps, at
    which their mean log-density was highest; the fit ends when ``patience`` looks in a row, or
    ``steps``, brought nothing higher. It starts as the normal with the codes' means and standard
    deviations. `steps_taken` says which step was best.
    """

    kind = "flow"

    def __init__(
        self,
        codes: Tensor,
        log_weights: Tensor,
        *,
        flow: str | Callable[[int, int], Any] = "spline",
        transforms: int = 3,
        hidden: Sequence[int] = (64, 64),
        steps: int = 2000,
        batch_size: int = 256,
        lr: float = 2e-3,
        patience: int = 8,
        seed: int = 0,
        trainable: bool = False,
    ) -> None:
        super().__init__(codes.shape[1], len(codes))
        options = {"steps": steps, "batch_size": batch_size, "patience": patience}
        check_at_least(1, **options)
        if not 0 < lr < math.inf:
            raise ValueError(f"lr must be finite and positive, got {lr}")
        _check_zuko(flow)
        check_spread(codes, self.kind)
        weights = log_weights.exp()[:, None]
        loc = (weights * codes).sum(0)
        scale = (weights * (codes - loc) ** 2).sum(0).sqrt()
        generator = torch.Generator("cpu").manual_seed(seed)
        with torch.random.fork_rng(devices=[]):  # the networks' initial weights
            torch.manual_seed(seed)
            built = build_flow(flow, self.size, 0, transforms, hidden)
        self.flow = AffineFlow(built, 0, torch.zeros_like(loc), 1.0)
        standard = (codes - loc) / scale
        self.steps_taken = _fit(self.flow, standard, log_weights, generator, lr=lr, **options)
        with torch.no_grad():
            shift, log_stretch = self.flow.bias.chunk(2)
            moved = torch.cat([loc + scale * shift, log_stretch + scale.log()])
            self.flow.bias.copy_(moved)
        self.requires_grad_(trainable)

    def forward(self) -> Any:
        """Return the flow's distribution, batch ``[]`` and event ``[D]``."""
        return self.flow(None, torch.Size())

    def from_normal(self, noise: Tensor) -> Tensor:
        """Return what the flow makes of standard normals, ``[..., D]`` to ``[..., D]``."""
        return self.flow(None, torch.Size()).push(noise.to(self.flow.bias.dtype))


def _check_zuko(flow: Any) -> None:
    try:
        check_flow(flow)
    except ImportError as error:
        raise ImportError(
            "kind='flow' needs zuko: pip install 'pyro_recursive[flows]', or ask for kind='kde'."
        ) from error


@torch.enable_grad()
def _fit(
    flow: AffineFlow,
    codes: Tensor,
    log_weights: Tensor,
    generator: torch.Generator,
    *,
    steps: int,
    batch_size: int,
    patience: int,
    lr: float,
) -> int:
    """Fit the flow to standardised codes, and return the step of the parameters it is left with."""
    order = torch.randperm(len(codes), generator=generator)
    count = math.ceil(_VALIDATION * len(codes))
    chosen, rest = order[:count].to(codes.device), order[count:]
    weights = log_weights.exp().cpu().double()[rest]
    optimizer = torch.optim.Adam(flow.parameters(), lr)
    best, best_step, state = _score(flow, codes[chosen], log_weights[chosen]), 0, _state(flow)
    for step in range(1, steps + 1):
        batch = rest[torch.multinomial(weights, batch_size, True, generator=generator)]
        optimizer.zero_grad()
        (-_log_prob(flow, codes[batch.to(codes.device)]).mean()).backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimizer.step()
        if step % _LOOK_EVERY and step != steps:
            continue
        score = _score(flow, codes[chosen], log_weights[chosen])
        if score > best:
            best, best_step, state = score, step, _state(flow)
        elif step - best_step >= patience * _LOOK_EVERY:
            break
    flow.load_state_dict(state)
    return best_step


@torch.no_grad()
def _score(flow: AffineFlow, codes: Tensor, log_weights: Tensor) -> float:
    """Return the weighted mean log-density of codes."""
    return (log_weights.softmax(0) @ _log_prob(flow, codes)).item()


def _log_prob(flow: AffineFlow, codes: Tensor) -> Tensor:
    """Return the log-densities ``[N]``; raise where training has gone astray."""
    message = "The flow has left the finite numbers while it was fitted to codes: use a smaller lr."
    try:
        found = flow(None, torch.Size()).log_prob(codes)
    except ValueError as error:  # of the base distribution, where validation is on
        raise ValueError(message) from error
    if not found.isfinite().all():
        raise ValueError(message)
    return found


def _state(flow: AffineFlow) -> dict[str, Tensor]:
    return copy.deepcopy(flow.state_dict())
