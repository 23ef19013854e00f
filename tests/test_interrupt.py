"""An interrupt is a request the first time, and at once the second time."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from storyllm.interrupt import Interrupt, StopRequested, Terminated


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Whatever a test does, Ctrl-C and SIGTERM work as before afterwards."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def interrupt_ourselves() -> None:
    signal.raise_signal(signal.SIGINT)


def test_nothing_happens_without_an_interrupt() -> None:
    with Interrupt() as interrupt:
        interrupt.check()
        assert not interrupt.requested


def test_the_first_is_a_request_that_check_answers() -> None:
    steps = []
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:  # noqa: PT012
        interrupt_ourselves()
        steps.append("the step is finished")
        assert interrupt.requested
        interrupt.check()
        steps.append("never")
    assert steps == ["the step is finished"]


def test_the_request_stays_until_it_is_answered() -> None:
    with Interrupt() as interrupt:
        interrupt_ourselves()
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                interrupt.check()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_which_signal_it_was_is_known(signum: signal.Signals) -> None:
    with Interrupt() as interrupt:
        signal.raise_signal(signum)
        assert interrupt.requested == signum
        with pytest.raises(StopRequested):
            interrupt.check()
        with pytest.raises(KeyboardInterrupt) as caught:
            signal.raise_signal(signum)
        assert not isinstance(caught.value, StopRequested)  # nobody may take it for a request
        assert isinstance(caught.value, Terminated) == (signum == signal.SIGTERM)


def test_the_second_raises_at_once() -> None:
    with Interrupt() as interrupt:
        interrupt_ourselves()
        with pytest.raises(KeyboardInterrupt):
            interrupt_ourselves()
        assert interrupt.requested


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_handler_is_put_back(error: type[BaseException] | None) -> None:
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
    assert signal.getsignal(signal.SIGINT) is handler
    interrupt_ourselves()
    assert calls == ["handler"]


def test_with_the_default_handler_an_interrupt_afterwards_raises() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Interrupt():
        pass
    with pytest.raises(KeyboardInterrupt):
        interrupt_ourselves()


def test_one_within_another() -> None:
    with Interrupt() as outer:
        with Interrupt() as inner:
            interrupt_ourselves()
        assert inner.requested
        assert not outer.requested
        interrupt_ourselves()
        assert outer.requested


def test_in_another_thread_nothing_changes() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def work() -> None:
        with Interrupt() as interrupt:
            seen.append(signal.getsignal(signal.SIGINT))
            interrupt.check()
            seen.append(interrupt.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert seen == [before, False]
    assert signal.getsignal(signal.SIGINT) is before
