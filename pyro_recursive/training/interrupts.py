"""Ctrl-C during training, which ends it between two steps."""

import signal
import threading
from types import FrameType
from typing import Any


class Interrupts:
    """Defers the first SIGINT inside the block to the next `check`; a second one comes at once.

    Elsewhere than in the main thread, or under another handler of SIGINT, it does nothing.
    """

    def __init__(self) -> None:
        self.is_pending = False
        self._is_installed = False

    def __enter__(self) -> "Interrupts":
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)
            self._is_installed = True
        return self

    def __exit__(self, *error: Any) -> None:
        if self._is_installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self) -> None:
        """Raise KeyboardInterrupt if there was a SIGINT."""
        if self.is_pending:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.is_pending:
            signal.default_int_handler(number, frame)
        self.is_pending = True
