"""Ctrl-C, the notebook's stop button and SIGTERM, taken where stopping does no harm."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Terminated(KeyboardInterrupt):
    """An interrupt that came as SIGTERM, as when a machine is taken away."""


class StopRequested(KeyboardInterrupt):
    """A first interrupt, at a place where the work may be stopped and saved."""


class Interrupt:
    """Within its `with` block an interrupt (SIGINT, SIGTERM) is a request: `check` raises StopRequested for it.

    A second one is not a request any more: it raises KeyboardInterrupt (Terminated for SIGTERM) wherever the program
    is. Outside the main thread, where Python delivers no signals, nothing changes.
    """

    def __init__(self) -> None:
        self.requested = 0  # the number of the signal that came; 0: none
        self._handlers_before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._handlers_before[signum] = signal.signal(signum, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._handlers_before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def _request(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            raise_interrupt(signum, frame)
        self.requested = signum

    def check(self) -> None:
        """Raises StopRequested if an interrupt was requested."""
        if self.requested:
            raise StopRequested


def raise_interrupt(signum: int, frame: FrameType | None) -> None:
    """A handler of signals: raises KeyboardInterrupt, or Terminated for SIGTERM."""
    raise Terminated if signum == signal.SIGTERM else KeyboardInterrupt
