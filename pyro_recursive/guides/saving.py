"""What may go wrong where guides are saved, loaded, copied and pickled."""

from typing import Any

from pyro.infer.autoguide import AutoGuide
from torch import nn

__all__ = ["check_components", "check_copyable", "check_prepared", "note_loaded"]


def check_prepared(guide: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Raise RuntimeError where a state has what a guide only creates when it sees its model.

    A hook of torch's, for a guide by itself and inside other modules.
    """
    if guide.groups:
        return
    known = guide.state_dict(prefix=prefix)
    new = [key for key in state if key.startswith(prefix) and key not in known]
    if new:
        raise RuntimeError(
            f"This {type(guide).__name__} has not seen its model yet, and has no '{new[0]}' "
            "before: call guide.prepare(*args), with the model's arguments, and then "
            "load_state_dict()."
        )


def check_components(guide: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Raise RuntimeError where a state is of a mixture with another number of components.

    A hook of torch's, as above. The weights' start has as many logits as there are components, but
    for a mixture that grows, which has its progress beside it: there the first one has none.
    """
    start, growth = f"{prefix}weights.initial", f"{prefix}progress"
    if start not in state:
        return
    theirs, own = len(state[start]) + (growth in state), len(guide.components)
    if theirs != own:
        raise RuntimeError(
            f"The state is of a mixture with {theirs} components, and this "
            f"{type(guide).__name__} has {own}: build it as the one that was saved was built."
        )


def note_loaded(guide: Any, keys: Any) -> None:
    """Let what is loaded win over what Pyro's store holds when the guide runs next."""
    guide.is_loaded = True


def check_copyable(guide: nn.Module) -> None:
    """Raise TypeError where a guide holds one of Pyro's, which forgets its model when copied.

    So does the one that is copied, and after a call it may have tensors that torch cannot copy.
    """
    for part in guide.modules():
        if isinstance(part, AutoGuide):
            raise TypeError(
                f"{type(guide).__name__} holds a {type(part).__name__} of Pyro's, which cannot be "
                "copied or pickled with its model: save guide.state_dict(), build a new guide, "
                "and load_state_dict() after its prepare()."
            )
