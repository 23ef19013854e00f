"""The first interrupt is a request; the second raises immediately."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from storyllm.training.interrupt import Interrupt, StopRequested, Terminated


@pytest.fixture(autouse=True)
def _restore_handlers() -> Iterator[None]:
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_check_does_nothing_without_an_interrupt():
    with Interrupt() as interrupt:
        interrupt.check()
        assert interrupt.requested == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_interrupt_waits_for_check_and_the_second_raises(signum):
    with Interrupt() as interrupt:
        signal.raise_signal(signum)  # raises nothing
        assert interrupt.requested == signum
        for _ in range(2):  # a request remains
            with pytest.raises(StopRequested):
                interrupt.check()
        with pytest.raises(KeyboardInterrupt) as caught:
            signal.raise_signal(signum)
        assert not isinstance(caught.value, StopRequested)  # must not be mistaken for a request
        assert isinstance(caught.value, Terminated) == (signum == signal.SIGTERM)


def test_a_signal_of_another_process_does_not_count_as_the_first_of_this_one():
    with Interrupt() as interrupt:
        interrupt.request_elsewhere(signal.SIGTERM)
        with pytest.raises(StopRequested):
            interrupt.check()
        signal.raise_signal(signal.SIGTERM)  # as when a machine is shut down after another one
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_previous_handler_is_restored(error):
    calls = []

    def handler(*_: object) -> None:
        calls.append("handler")

    signal.signal(signal.SIGINT, handler)
    if error is None:
        with Interrupt():
            assert signal.getsignal(signal.SIGINT) is not handler
    else:
        with pytest.raises(error), Interrupt():
            raise error
    signal.raise_signal(signal.SIGINT)
    assert calls == ["handler"]


def test_after_the_block_ctrl_c_raises_again():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Interrupt():
        pass
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_interrupts_nest():
    with Interrupt() as outer:
        with Interrupt() as inner:
            signal.raise_signal(signal.SIGINT)
        assert (inner.requested, outer.requested) == (signal.SIGINT, 0)
        signal.raise_signal(signal.SIGINT)
        assert outer.requested == signal.SIGINT


def test_another_thread_changes_no_handlers():
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def work() -> None:
        with Interrupt() as interrupt:
            interrupt.check()
            seen.extend([signal.getsignal(signal.SIGINT), interrupt.requested])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, 0]
    assert signal.getsignal(signal.SIGINT) is before
