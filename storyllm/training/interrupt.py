"""Ctrl-C, a notebook's stop button, and SIGTERM, handled at safe points of training."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Terminated(KeyboardInterrupt):
    """An interrupt by SIGTERM, as when a machine is shut down."""


class StopRequested(KeyboardInterrupt):
    """The first interrupt, raised where training can stop and save. Its argument is the signal."""


class Interrupt:
    """Within its `with` block, the first SIGINT or SIGTERM is a request: `check` raises StopRequested for it.

    A second one raises KeyboardInterrupt (Terminated for SIGTERM) immediately. Outside the main thread, where Python
    delivers no signals, it has no effect.
    """

    def __init__(self) -> None:
        self.requested = 0  # the signal's number, 0 if there was none
        self._elsewhere = False  # the signal was for another process
        self.handled = False  # True once the loop has stopped for it: `check` no longer raises
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous_handlers[signum] = signal.signal(signum, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous_handlers.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def _request(self, signum: int, frame: FrameType | None) -> None:
        if self.requested and not self._elsewhere:
            raise_interrupt(signum, frame)
        self.requested, self._elsewhere = signum, False

    def request_elsewhere(self, signum: int) -> None:
        """Records a signal that another process of the run got. The first one for this process is still a request."""
        if not self.requested:
            self.requested, self._elsewhere = signum, True

    def check(self) -> None:
        """Raises StopRequested if there was an interrupt, until it is handled."""
        if self.requested and not self.handled:
            raise StopRequested(self.requested)


def raise_interrupt(signum: int, frame: FrameType | None) -> None:
    """A signal handler that raises KeyboardInterrupt, or Terminated for SIGTERM."""
    raise Terminated if signum == signal.SIGTERM else KeyboardInterrupt
