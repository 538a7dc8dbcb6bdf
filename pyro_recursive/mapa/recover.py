"""From codes to a continuous prior: the choice of a kind, flows, and the held-out log-density."""

import copy
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_recursive.guides.flow.zuko_adapter import AffineFlow, build_flow, check_flow
from pyro_recursive.mapa.recovered_priors import (
    CodeMixturePrior,
    KDEPrior,
    QuantilePrior,
    RecoveredPrior,
    check_varied,
)
from pyro_recursive.tracing.arguments import check_at_least

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
        try:
            check_flow(flow)
        except ImportError as error:
            raise ImportError(
                "kind='flow' needs zuko: pip install 'pyro_recursive[flows]', or use kind='kde'."
            ) from error
        check_varied(codes, self.kind)
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
        return self.flow(None, torch.Size()).push(noise.to(self.flow.bias.dtype))


KINDS: dict[str, Callable[..., RecoveredPrior]] = {
    "copula": QuantilePrior,
    "flow": FlowPrior,
    "kde": KDEPrior,
    "kernels": CodeMixturePrior,
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
    page on MAPA describes the kinds: ``"copula"`` for D = 1, ``"flow"`` (of the extra `flows`),
    ``"kde"``, ``"kernels"`` of a ``scale``; ``"auto"`` is the copula for D = 1, else a flow where
    zuko is installed, or ``"kde"``. Torch's global random state is not changed.

    Args:
        codes: unconstrained vectors, ``[N, D]``, those of `biject_to` for a constrained support.
        kind: see above.
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
        ImportError: a flow is asked for, and zuko is not installed.
        TypeError: the codes are no floating-point numbers; a kind has no such option.
        ValueError: the codes are not ``[N, D]``, too few, not finite or all equal in a coordinate;
            weights, kind or numbers do not fit.

    >>> codes = torch.cat([torch.randn(200, 1) - 3, torch.randn(200, 1) + 3])
    >>> prior = recover_prior(codes)
    >>> prior.kind, prior.num_codes, prior().event_shape
    ('copula', 400, torch.Size([1]))
    >>> bool((prior().sample((1000,)).abs() > 1).double().mean() > 0.9)
    True
    >>> normal = torch.distributions.Normal(codes.mean(), codes.std())
    >>> recover_prior(codes, "kde").held_out_log_prob > normal.log_prob(codes).mean()
    tensor(True)
    """
    codes, weights = weighted_codes(codes, log_weights)
    if kind == "auto":
        several = "flow" if importlib.util.find_spec("zuko") else "kde"
        kind = "copula" if codes.shape[1] == 1 else several
    if kind not in KINDS:
        raise ValueError(f"kind must be 'auto' or one of {list(KINDS)}, got {kind!r}")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be a share in [0, 1), got {held_out}")
    if (scale is None) == (kind == "kernels"):
        raise ValueError(
            f"scale is of kind='kernels', which needs it; got kind={kind!r}, scale={scale}"
        )
    if kind == "copula" and trainable:
        raise ValueError("kind='copula' has nothing to train: use 'flow', 'kde' or 'kernels'.")
    if kind == "kernels":
        options["scale"] = scale
    if kind in ("flow", "kde"):
        options["seed"] = seed
    prior = KINDS[kind](codes, weights, **options).requires_grad_(trainable)
    if held_out:
        prior.held_out_log_prob = _held_out(KINDS[kind], codes, weights, held_out, seed, options)
    return prior


def weighted_codes(codes: Tensor, log_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the codes of positive weight, ``[N, D]``, and normalised log-weights.

    Raises:
        TypeError: the codes are no floating-point numbers.
        ValueError: the codes are not ``[N, D]`` or not finite; the weights do not fit them.
    """
    if not codes.is_floating_point():
        raise TypeError(f"codes must be floating-point numbers, got {codes.dtype}")
    if codes.dim() != 2 or not codes.numel():
        raise ValueError(
            f"codes must be [N, D], got {list(codes.shape)}. Codes of a scalar site are "
            "codes[:, None]."
        )
    codes = codes.detach()
    wrong = (~codes.isfinite().all(1)).nonzero()[:, 0]
    if len(wrong):
        raise ValueError(
            f"{len(wrong)} of {len(codes)} codes are not finite, the first at row {int(wrong[0])}"
        )
    if log_weights is None:
        return codes, codes.new_full((len(codes),), -math.log(len(codes)))
    log_weights = log_weights.detach().to(codes)
    if log_weights.shape != codes.shape[:1]:
        raise ValueError(
            f"log_weights must be {list(codes.shape[:1])}, got {list(log_weights.shape)}"
        )
    if log_weights.isnan().any() or not log_weights.logsumexp(0).isfinite():
        raise ValueError("log_weights must have no NaN, no +inf, and one above -inf")
    used = log_weights > -math.inf
    return codes[used], log_weights[used].log_softmax(0)


@torch.no_grad()
def _held_out(
    build: Callable[..., RecoveredPrior],
    codes: Tensor,
    log_weights: Tensor,
    share: float,
    seed: int,
    options: dict[str, Any],
) -> float:
    """Return the mean log-density of some codes under a prior fitted to the others."""
    count = max(1, round(share * len(codes)))
    if len(codes) - count < 2:
        raise ValueError(
            f"{len(codes)} codes are too few to hold {count} out: use more, or held_out=0."
        )
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(len(codes), generator=generator).to(codes.device)
    out, rest = order[:count], order[count:]
    prior = build(codes[rest], log_weights[rest].log_softmax(0), **options)
    return (log_weights[out].softmax(0) @ prior().log_prob(codes[out])).item()


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
    check_at_least(1, steps=steps, batch_size=batch_size, patience=patience)
    order = torch.randperm(len(codes), generator=generator)
    count = math.ceil(_VALIDATION * len(codes))
    chosen, rest = order[:count].to(codes.device), order[count:]
    weights = log_weights.exp().cpu().double()[rest]

    @torch.no_grad()
    def validate() -> float:
        return (log_weights[chosen].softmax(0) @ _log_prob(flow, codes[chosen])).item()

    optimizer = torch.optim.Adam(flow.parameters(), lr)
    best, best_step, state = validate(), 0, copy.deepcopy(flow.state_dict())
    for step in range(1, steps + 1):
        batch = rest[torch.multinomial(weights, batch_size, True, generator=generator)]
        optimizer.zero_grad()
        (-_log_prob(flow, codes[batch.to(codes.device)]).mean()).backward()
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


def _log_prob(flow: AffineFlow, codes: Tensor) -> Tensor:
    """Return the log-densities ``[N]``; raise where the fit has diverged."""
    message = "The flow diverged while it was fitted to codes: use a smaller lr."
    try:
        log_prob = flow(None, torch.Size()).log_prob(codes)
    except ValueError as error:  # of the base distribution, where validation is on
        raise ValueError(message) from error
    if not log_prob.isfinite().all():
        raise ValueError(message)
    return log_prob
