"""The tensors that others were computed from, read off the graph of their derivatives."""

from collections.abc import Iterable

from torch import Tensor
from torch.autograd.graph import get_gradient_edge


def graph_leaves(outputs: Iterable[Tensor | None], cuts: Iterable[Tensor] = ()) -> list[Tensor]:
    """Return the leaves that tensors depend on, other than through those in ``cuts``.

    So parameters count whether Pyro knows of them or not.
    """
    seen = {get_gradient_edge(cut).node for cut in cuts}
    moving = [out for out in outputs if out is not None and out.requires_grad]
    pending = [get_gradient_edge(out).node for out in moving]
    found = []
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if not node.next_functions and hasattr(node, "variable"):
            found.append(node.variable)
        pending.extend(following for following, _ in node.next_functions if following is not None)
    return found
