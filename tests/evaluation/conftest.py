"""What tests of evaluations share."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from pyro_recursive.evaluation import passes


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Run graphs without compiling them; return the number of calls of each."""
    calls = list[int]()

    def traced(module: Any, tensors: list[Tensor]) -> Callable:
        number = len(calls)
        calls.append(0)

        def run(*given: Tensor) -> Any:
            calls[number] += 1
            return module(*given)

        return run

    monkeypatch.setattr(passes, "compile_graph", traced)
    return calls
