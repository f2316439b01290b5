"""Progress of anything that takes more than a few seconds."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

from dgm_jax import processes


def say(line: str = "") -> None:
    """Print a line without tearing a progress bar apart; of several processes the first does."""
    if processes.is_first():
        tqdm.write(line)
        sys.stdout.flush()


class Progress:
    """A bar with time left on a terminal; otherwise a plain line every `seconds`."""

    def __init__(
        self, title: str | None, total: int, start: int = 0, seconds: float = 10.0
    ) -> None:
        """Show `title` with `total` units of work, `start` done already; no title, no display."""
        title = title if processes.is_first() else None
        self._title, self._total, self._done, self._start = title, total, start, start
        self._bar = None
        if title and sys.stderr.isatty():
            self._bar = tqdm(
                total=total,
                initial=start,
                desc=title,
                dynamic_ncols=True,
                leave=False,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n:,}/{total:,} "
                "[{elapsed}<{remaining}{postfix}]",
            )
        self._every, self._began = seconds, time.monotonic()
        self._said = self._began

    def advance(self, units: int, details: str = "") -> None:
        """Count `units` more as done, and show `details` beside them."""
        self._done += units
        if self._bar is not None:
            self._bar.set_postfix_str(details, refresh=False)
            self._bar.update(units)
        elif self._title:
            self._say_now_and_then(details)

    def _say_now_and_then(self, details: str) -> None:
        now = time.monotonic()
        if now - self._said >= self._every or self._done >= self._total:
            self._said = now
            new = self._done - self._start
            left = (self._total - self._done) * (now - self._began) / new if new else None
            clock = "unknown time" if left is None else _clock(left)
            say(f"{self._title} {self._done:,}/{self._total:,}  {clock} left  {details}".rstrip())

    def __enter__(self) -> "Progress":
        """Show nothing yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """As `close`."""
        self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes}:{seconds:02d}"
