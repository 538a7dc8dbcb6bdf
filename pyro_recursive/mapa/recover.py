"""From codes to a continuous prior: the choice of a kind, flows, and the held-out log-density."""

import copy
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_recursive.guides.flow.zuko_adapter import AffineFlow, build_flow, check_flow
from pyro_recursive.mapa.recovered_priors import KDEPrior, QuantilePrior, RecoveredPrior

_STEPS_PER_VALIDATION = 25
_VALIDATION = 0.1  # of the codes


class FlowPrior(RecoveredPrior):
    """A flow fitted to standardised codes by Adam, with early stopping.

    A tenth of the codes is for validation, every 25 steps: the parameters with the highest mean
    log-density are kept, and the fit ends after ``patience`` validations without a higher one, or
    after ``steps``. The flow starts as the normal with the codes' means and standard deviations.
    `steps_taken` is the best step.
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
        seed: int = 0,
        **fit: Any,
    ) -> None:
        super().__init__(codes.shape[1], len(codes))
        check_flow(flow)
        weights = log_weights.exp()[:, None]
        loc = (weights * codes).sum(0)
        scale = (weights * (codes - loc) ** 2).sum(0).sqrt()
        generator = torch.Generator("cpu").manual_seed(seed)
        with torch.random.fork_rng(devices=[]):  # the networks' initial weights
            torch.manual_seed(seed)
            built = build_flow(flow, self.size, 0, transforms, hidden)
        self.flow = AffineFlow(built, 0, torch.zeros_like(loc), 1.0)
        self.steps_taken = _fit(self.flow, (codes - loc) / scale, log_weights, generator, **fit)
        with torch.no_grad():
            shift, log_stretch = self.flow.bias.chunk(2)
            self.flow.bias.copy_(torch.cat([loc + scale * shift, log_stretch + scale.log()]))

    def forward(self) -> Any:
        """Return the flow's distribution, batch ``[]`` and event ``[D]``."""
        return self.flow(None, torch.Size())

    def from_normal(self, noise: Tensor) -> Tensor:
        """Return the flow's value at standard normals, ``[..., D]`` to ``[..., D]``."""
        return self.forward().push(noise.to(self.flow.bias.dtype))


KINDS: dict[str, Callable[..., RecoveredPrior]] = {
    "copula": QuantilePrior,
    "flow": FlowPrior,
    "kde": KDEPrior,
    "kernels": KDEPrior,
}


def recover_prior(
    codes: Tensor,
    kind: str = "auto",
    *,
    log_weights: Tensor | None = None,
    scale: float | Tensor | None = None,
    held_out: float = 0.1,
    trainable: bool = False,
    seed: int = 0,
    **options: Any,
) -> RecoveredPrior:
    """Fit a continuous prior to the codes ``[N, D]`` of a latent site.

    With it in place of N codes (`pyro_recursive.mapa.with_prior`) a model generates new data. The
    page on MAPA describes the kinds. Torch's global random state is not changed.

    Args:
        codes: unconstrained vectors, ``[N, D]``, those of `biject_to` for a constrained support.
        kind: ``"copula"`` for D = 1, ``"flow"`` (of the extra `flows`), ``"kde"``, ``"kernels"`` of
            a ``scale``; ``"auto"`` is the copula for D = 1, else a flow where zuko is installed, or
            ``"kde"``.
        log_weights: ``[N]``, which need not be normalised.
        scale: of ``"kernels"``; a number or one for each of D.
        held_out: the share of the codes for `held_out_log_prob`, at random: left out of a first fit
            and part of the second, which is returned.
        trainable: whether the prior's parameters have gradients. A copula has none.
        seed: of the codes held out, and of fits.
        options: ``knots`` of ``"copula"``; ``width`` of ``"kde"``; ``flow`` (``"spline"``,
            ``"coupling"``, ``"maf"``, ``"iaf"`` or a function), ``transforms``, ``hidden``,
            ``steps``, ``batch_size``, ``lr``, ``patience`` of ``"flow"``.

    Raises:
        ValueError: codes are not ``[N, D]``, too few, not finite or all equal in a coordinate;
            weights, kind or numbers do not fit.

    >>> codes = torch.cat([torch.randn(200, 1) - 3, torch.randn(200, 1) + 3])
    >>> prior = recover_prior(codes)
    >>> prior.kind, prior.num_codes, prior().event_shape
    ('copula', 400, torch.Size([1]))
    >>> bool((prior().sample((1000,)).abs() > 1).double().mean() > 0.9)
    True
    """
    codes, weights = _weighted(codes, log_weights)
    if kind == "auto":
        several = "flow" if importlib.util.find_spec("zuko") else "kde"
        kind = "copula" if codes.shape[1] == 1 else several
    if kind not in KINDS:
        raise ValueError(f"kind must be 'auto' or one of {list(KINDS)}, got {kind!r}.")
    if (scale is None) == (kind == "kernels"):
        raise ValueError(f"scale is for kind='kernels', which needs it; got kind={kind!r}.")
    if kind == "kernels":
        options["scale"] = scale
    if kind in ("flow", "kde"):
        options["seed"] = seed
    prior = _fitted(kind, codes, weights, options).requires_grad_(trainable)
    if held_out:
        count = max(1, round(held_out * len(codes)))
        if len(codes) - count < 2:
            raise ValueError(f"{len(codes)} codes are too few to hold {count} out: use held_out=0.")
        order = torch.randperm(len(codes), generator=torch.Generator("cpu").manual_seed(seed))
        out, rest = order.to(codes.device).tensor_split([count])
        first = _fitted(kind, codes[rest], weights[rest].log_softmax(0), options)
        with torch.no_grad():
            log_prob = first().log_prob(codes[out])
        prior.held_out_log_prob = (weights[out].softmax(0) @ log_prob).item()
    return prior


def _fitted(kind: str, codes: Tensor, weights: Tensor, options: dict[str, Any]) -> RecoveredPrior:
    size = codes.abs().amax(0)
    constant = codes.std(0, correction=0) <= 10 * torch.finfo(codes.dtype).eps * size
    if kind != "kernels" and constant.any():
        raise ValueError("All codes are equal in a coordinate: use kind='kernels'.")
    return KINDS[kind](codes, weights, **options)


def _weighted(codes: Tensor, log_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the codes of positive weight, ``[N, D]``, and normalised log-weights."""
    if codes.dim() != 2 or not codes.is_floating_point():
        raise ValueError("codes must be floats [N, D]; those of a scalar site are codes[:, None].")
    codes = codes.detach()
    if not codes.isfinite().all():
        raise ValueError(f"{int((~codes.isfinite()).any(1).sum())} codes are not finite.")
    if log_weights is None:
        return codes, codes.new_full((len(codes),), -math.log(len(codes)))
    log_weights = log_weights.detach().to(codes)
    if log_weights.shape != codes.shape[:1] or not log_weights.logsumexp(0).isfinite():
        raise ValueError(f"log_weights must be {list(codes.shape[:1])}, one of them above -inf.")
    used = log_weights > -math.inf
    return codes[used], log_weights[used].log_softmax(0)


@torch.enable_grad()
def _fit(
    flow: AffineFlow,
    codes: Tensor,
    log_weights: Tensor,
    generator: torch.Generator,
    *,
    steps: int = 2000,
    batch_size: int = 256,
    lr: float = 2e-3,
    patience: int = 8,
) -> int:
    """Fit the flow to standardised codes, and return the step of the parameters that are kept."""
    order = torch.randperm(len(codes), generator=generator)
    count = math.ceil(_VALIDATION * len(codes))
    chosen, rest = order[:count].to(codes.device), order[count:]
    weights = log_weights.exp().cpu().double()[rest]

    def log_prob(rows: Tensor) -> Tensor:
        return flow(None, torch.Size()).log_prob(codes[rows])

    @torch.no_grad()
    def validate() -> float:
        return (log_weights[chosen].softmax(0) @ log_prob(chosen)).item()

    optimizer = torch.optim.Adam(flow.parameters(), lr)
    best, best_step, state = validate(), 0, copy.deepcopy(flow.state_dict())
    for step in range(1, steps + 1):
        batch = rest[torch.multinomial(weights, batch_size, True, generator=generator)]
        optimizer.zero_grad()
        (-log_prob(batch.to(codes.device)).mean()).backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimizer.step()
        if step % _STEPS_PER_VALIDATION and step != steps:
            continue
        score = validate()
        if score > best:
            best, best_step, state = score, step, copy.deepcopy(flow.state_dict())
        elif step - best_step >= patience * _STEPS_PER_VALIDATION:
            break
    flow.load_state_dict(state)
    return best_step
