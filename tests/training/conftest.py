"""What tests of training share."""

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture
def in_the_foreground() -> Iterator[None]:
    """Handle Ctrl-C as in the foreground; processes in the background may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
