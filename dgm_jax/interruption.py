"""SIGTERM and Ctrl-C: noted when they come, obeyed where nothing is lost; a clock for the rest."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# Exit status of a run that was told to go and may be started again: EX_TEMPFAIL of sysexits.h.
TRY_AGAIN = 75

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """What was told to stop has stopped, and lost nothing."""

    def __init__(self, signum: int, what_is_left: str) -> None:
        """Stopped by signal number `signum`; the text says what became of the work."""
        super().__init__(f"{signal.Signals(signum).name}: {what_is_left}")
        self.status = TRY_AGAIN if signum == signal.SIGTERM else 128 + signum


def saved_at(step: int) -> str:
    """What is left of training that saved after update number `step`, for `Interrupted`."""
    return f"stopped after step {step:,}, which is saved; the same command goes on from there"


def leave(signum: int, frame: FrameType | None) -> None:
    """End the process at once: a handler for where nothing is lost by it, all but training.

    Not by an exception, which goes unheard where it meets a callback of the garbage collector.
    """
    del frame
    name = signal.Signals(signum).name
    line = f"{name}: stopped; give the same command again\n"
    os.write(2, line.encode())
    os._exit(TRY_AGAIN)


@contextmanager
def noted() -> Iterator[Callable[[], int | None]]:
    """Within it, the first SIGTERM or Ctrl-C is only noted; a second one does what it always does.

    Yields:
      What tells the number of the signal that came, or None. In a thread that is not the main one,
      to which Python delivers no signals, always None.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def note(signum: int, frame: FrameType | None) -> None:
        del frame
        came.append(signum)
        restore()

    # One that is ignored stays so: shells have it so for Ctrl-C in the background.
    handlers = {signum: signal.getsignal(signum) for signum in _SIGNALS}
    before = {s: handler for s, handler in handlers.items() if handler != signal.SIG_IGN}

    def restore() -> None:
        for signum, handler in before.items():
            signal.signal(signum, handler)

    for signum in before:
        signal.signal(signum, note)
    try:
        yield lambda: came[0] if came else None
    finally:
        restore()


def every(seconds: float) -> Callable[[], bool]:
    """What tells, once each time that so many seconds have passed, that they have."""
    last = time.monotonic()

    def passed() -> bool:
        nonlocal last
        now = time.monotonic()
        if now - last < seconds:
            return False
        last = now
        return True

    return passed
