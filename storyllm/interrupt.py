"""Ctrl-C and the notebook's stop button, taken where stopping does no harm."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupt:
    """Within its `with` block an interrupt (SIGINT) is a request: `check` raises KeyboardInterrupt for it.

    A second interrupt is not a request any more: it raises KeyboardInterrupt wherever the program is. Outside the main
    thread, where Python delivers no signals, nothing changes.
    """

    def __init__(self) -> None:
        self.requested = False
        self._handler_before: Any = None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._handler_before = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handler_before is not None:
            signal.signal(signal.SIGINT, self._handler_before)

    def _request(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def check(self) -> None:
        """Raises KeyboardInterrupt if an interrupt was requested."""
        if self.requested:
            raise KeyboardInterrupt
