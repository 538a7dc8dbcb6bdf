"""How a guide refers to its model, which is no part of the guide's own state."""

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any


class ModelReference:
    """A model that is neither copied nor pickled with the guide.

    Where the guide is copied together with the model, or with what the model belongs to, the copy
    refers to the copied model.
    """

    def __init__(self, model: Callable | None) -> None:
        self._model = model
        self._copies: dict[int, Any] = {}  # by id, until the copy is complete and used

    @property
    def model(self) -> Callable | None:
        """The model; None where unpickling left it out."""
        if self._copies:
            self._model, self._copies = _with_copies(self._model, self._copies), {}
        return self._model

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelReference":
        """Refer to the same model, or to its copy, which may be made after this one."""
        copied = ModelReference(self.model)
        copied._copies = memo
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        """Refer to none."""
        return ModelReference, (None,)


def _with_copies(part: Any, copies: dict[int, Any]) -> Any:
    """Return a module, method, partial function or handled model with the copies of its parts."""
    if id(part) in copies:
        return copies[id(part)]
    if isinstance(part, MethodType):
        owner = _with_copies(part.__self__, copies)
        return part if owner is part.__self__ else MethodType(part.__func__, owner)
    if isinstance(part, partial):  # Pyro's handlers return such functions of handler and model
        state: Any = part.__reduce__()[2]
        func, args, keywords, _ = state
        own = [func, *args, *keywords.values()]
        found = [_with_copies(each, copies) for each in own]
        if any(one is not other for one, other in zip(own, found, strict=True)):
            func, *values = found
            named = zip(keywords, values[len(args) :], strict=True)
            return partial(func, *values[: len(args)], **dict(named))
    return part
