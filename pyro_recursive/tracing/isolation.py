"""Extra runs of a program that change nothing outside: no trace, random state or module."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_recursive.tracing.handlers import FlatPriors, RunCache
from pyro_recursive.tracing.sites import with_plate_sizes

RandomState = list[Tensor]

# While a graph of a program is made: the context manager that leaves a block out of it.
OUTSIDE_OF_GRAPHS: ContextVar[Callable[..., AbstractContextManager] | None] = ContextVar(
    "outside_of_graphs", default=None
)

# Whether a run restores the random state, so that its draws are not among those of a step.
IS_ISOLATED: ContextVar[bool] = ContextVar("is_isolated", default=False)


def outside_of_graphs(*tensors: Tensor) -> AbstractContextManager:
    """Leave a block out of a graph that is being made; it decides something by these tensors."""
    outside = OUTSIDE_OF_GRAPHS.get()
    return nullcontext() if outside is None else outside(*tensors)


def random_state() -> RandomState:
    """Return the state of the CPU's generator and, where CUDA is in use, those of all devices."""
    state = [torch.get_rng_state()]
    return [*state, *torch.cuda.get_rng_state_all()] if torch.cuda.is_initialized() else state


def set_random_state(state: RandomState) -> None:
    """Go back to what `random_state` returned."""
    torch.set_rng_state(state[0])
    torch.cuda.set_rng_state_all(state[1:])


@contextmanager
def restored_random_state() -> Iterator[None]:
    """Restore the random state after the block."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)


class SharedNoise:
    """The random state that several runs start from: read at the first, set at the others."""

    def __init__(self) -> None:
        self._state: RandomState | None = None

    def start(self) -> None:
        """Read the random state, or set the one that was read."""
        if self._state is None:
            self._state = random_state()
        else:
            set_random_state(self._state)


class ReplayedNoise(RunCache):
    """Gives two runs of a guide the same noise outside its sites, as of dropout.

    The first run records the random state at its start and after each site; the second, whose sites
    have the values of the first, sets it there.
    """

    def __init__(self) -> None:
        self.content = {}
        self.states: dict[str, RandomState] = {}
        self.is_second = False

    def __enter__(self) -> "ReplayedNoise":
        self.is_second = bool(self.states)
        if self.is_second:
            set_random_state(self.states[""])
        else:
            self.states[""] = random_state()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None and not self.is_second:
            self.states.clear()  # the first run starts again
        super().__exit__(*error)

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["fn"].subsample_size == msg["fn"].size:
            return  # nothing is drawn
        if not self.is_second:
            self.states[msg["name"]] = random_state()
        elif msg["name"] in self.states:
            set_random_state(self.states[msg["name"]])


@contextmanager
def isolated(
    *programs: Callable, noise: SharedNoise | None = None, double_backward: bool = False
) -> Iterator[None]:
    """Run programs so that handlers, random state and modules are as if they had not run.

    Modules that run in training mode have copies of their buffers inside the block, so that running
    statistics do not move. Parameters and buffers of ``programs`` are restored where the block has
    written to them. With ``noise`` the random state starts from there and is not restored: all
    blocks with one `SharedNoise` draw the numbers of a single run. ``double_backward`` avoids
    cuDNN's recurrent networks and fused attention, which cannot be differentiated twice.

    >>> norm = nn.BatchNorm1d(2)
    >>> with isolated():
    ...     _ = norm(torch.rand(4, 2))
    >>> norm.running_mean
    tensor([0., 0.])
    """
    with ExitStack() as stack:
        if noise is None:
            stack.enter_context(restored_random_state())
            stack.callback(IS_ISOLATED.reset, IS_ISOLATED.set(True))
        else:
            noise.start()
        if programs:
            stack.enter_context(_restored_in_place(*programs))
        if double_backward:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(poutine.block())
        stack.enter_context(_without_cudnn_rnns(double_backward))
        stack.enter_context(same_buffers(in_training=True))
        yield


def outline(
    model: Callable, args: tuple, kwargs: dict[str, Any], *, grad: bool = False
) -> poutine.Trace:
    """Return a trace of one isolated run of a model."""
    with isolated(), torch.set_grad_enabled(grad):
        return with_plate_sizes(poutine.trace(FlatPriors()(model)).get_trace(*args, **kwargs))


@contextmanager
def _restored_in_place(*programs: Callable) -> Iterator[None]:
    modules = [m for m in map(poutine.unwrap, programs) if isinstance(m, nn.Module)]
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    before = [(t, t.detach().clone(), t._version) for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value, version in before:
                if tensor._version != version:
                    tensor.copy_(value)


@contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Hold modules in eval mode, and restore the mode of each of their parts at the end.

    A part that is added inside the block gets the mode of the whole.
    """
    modes = {part: part.training for module in modules for part in module.modules()}
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for module in modules:
            for part in module.modules():
                modes.setdefault(part, modes[module])
        for part, is_training in modes.items():  # wholes before their parts
            if part.training != is_training:
                part.train(is_training)  # a module's own may do more than set the mode
        for part, is_training in modes.items():
            part.training = is_training


@contextmanager
def same_buffers(*, in_training: bool = False) -> Iterator[None]:
    """Give modules that run copies of their buffers, and restore the buffers at the end.

    The tensors are exchanged, not overwritten: graphs of other runs may need their values.
    ``in_training`` leaves out modules in eval mode.
    """
    originals: dict[nn.Module, dict[str, Tensor]] = {}

    def copy(module: nn.Module, inputs: Any) -> None:
        if (module.training or not in_training) and module not in originals:
            own = dict(module.named_buffers(recurse=False))
            if own:
                originals[module] = own
                for name, buffer in own.items():
                    setattr(module, name, buffer.clone())

    hook = register_module_forward_pre_hook(copy)
    try:
        yield
    finally:
        hook.remove()
        for module, own in originals.items():
            for name, buffer in own.items():
                setattr(module, name, buffer)


@contextmanager
def _without_cudnn_rnns(double_backward: bool) -> Iterator[None]:
    """Leave out cuDNN's recurrent networks, which have no backward pass at all in eval mode."""
    cudnn = torch.backends.cudnn.enabled

    def disable(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, nn.RNNBase) and (double_backward or not module.training):
            torch.backends.cudnn.enabled = False

    hook = register_module_forward_pre_hook(disable)
    try:
        yield
    finally:
        hook.remove()
        torch.backends.cudnn.enabled = cudnn
