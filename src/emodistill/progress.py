"""Progress of long work as text for people: how far, how fast, how long still.

On a terminal one line is redrawn in place; in a log file one line is written every 20 seconds and one at the end.
Work that ends within two seconds writes nothing.
"""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

__all__ = ["Progress", "ProgressFactory", "format_duration"]

QUIET_S = 2.0
REDRAW_INTERVAL_S = 0.2
LINE_INTERVAL_S = 20.0
SPEED_WINDOW_S = 60.0  # the speed shown is that of the last minute: a resumed or warming-up run does not distort it


def format_duration(seconds: float) -> str:
    """Write a duration for people: ``8 s``, ``3 min 05 s``, ``2 h 07 min``.

    Parameters
    ----------
    seconds : float
        Not negative.

    Returns
    -------
    str

    Examples
    --------
    >>> format_duration(185)
    '3 min 05 s'
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """Count units of work and report them on a text stream.

    Parameters
    ----------
    description : str
        What is being done, for example ``"member minilm-a fold 0"``.
    total : int or None
        Number of units of the whole work; None when it is not known (then no time left is shown).
    unit : str
        Plural name of what is counted.
    stream : TextIO, optional
        Where lines go, by default the standard error stream.
    clock : callable, optional
        Returns seconds; a test passes its own.
    in_place : bool
        Whether a terminal's line may be redrawn; several processes that share one write lines.

    Examples
    --------
    >>> with Progress("reading", total=2, unit="rows") as progress:
    ...     progress.advance()
    ...     progress.advance(note="done")
    """

    def __init__(
        self,
        description: str,
        total: int | None,
        unit: str = "examples",
        stream: TextIO | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        in_place: bool = True,
    ) -> None:
        self.description = description
        self.total = total
        self.unit = unit
        self.done = 0
        self._skipped = 0
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._is_terminal = in_place and bool(getattr(self._stream, "isatty", lambda: False)())
        self._started_s = clock()
        self._last_written_s: float | None = None
        self._samples = [(self._started_s, 0)]  # (time, units done), no older than the speed window
        self._note = ""
        self._line_width = 0
        self._closed = False

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count `n` more units; `note` (a loss, a file name) is shown until another one comes."""
        self.done += n
        self._note = note or self._note
        now_s = self._clock()
        if now_s - self._samples[-1][0] >= 1.0:
            self._samples.append((now_s, self.done))
            while len(self._samples) > 2 and now_s - self._samples[1][0] >= SPEED_WINDOW_S:
                del self._samples[0]
        if self._is_due(now_s):
            self._write(self._running_line(now_s), end_of_line=not self._is_terminal)
            self._last_written_s = now_s

    def skip(self, n: int) -> None:
        """Count `n` units that were done before, in a run that was stopped: they enter the share, not the speed."""
        self.done += n
        self._skipped += n
        self._samples = [(at_s, done + n) for at_s, done in self._samples]

    def close(self) -> None:
        """Write the last line, unless the work was too short to be mentioned."""
        if self._closed:
            return
        self._closed = True
        now_s = self._clock()
        if now_s - self._started_s >= QUIET_S:
            self._write(self._final_line(now_s), end_of_line=True)
        elif self._last_written_s is not None:
            self._write("", end_of_line=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _is_due(self, now_s: float) -> bool:
        if now_s - self._started_s < QUIET_S:
            return False
        since_s = self._started_s if self._last_written_s is None else self._last_written_s
        if self._is_terminal:
            return self._last_written_s is None or now_s - since_s >= REDRAW_INTERVAL_S
        return now_s - since_s >= LINE_INTERVAL_S

    def _speed(self, now_s: float) -> float:
        first_s, first_done = self._samples[0]
        return (self.done - first_done) / max(now_s - first_s, 1e-9)

    def _running_line(self, now_s: float) -> str:
        speed = self._speed(now_s)
        parts = [f"{self._share()} {self.unit}", f"{_format_speed(speed)} {self.unit}/s"]
        if self.total is not None and speed > 0:
            parts.append(f"{format_duration(max(self.total - self.done, 0) / speed)} left")
        return self._join(parts)

    def _final_line(self, now_s: float) -> str:
        elapsed_s = now_s - self._started_s
        mean_speed = (self.done - self._skipped) / max(elapsed_s, 1e-9)
        count = f"{self.done:,}" if self.done == self.total else self._share()
        return self._join(
            [f"{count} {self.unit} in {format_duration(elapsed_s)}", f"{_format_speed(mean_speed)} {self.unit}/s"]
        )

    def _share(self) -> str:
        if self.total is None:
            return f"{self.done:,}"
        percent = 100 * self.done // self.total if self.total else 100
        return f"{self.done:,}/{self.total:,} ({percent} %)"

    def _join(self, parts: list[str]) -> str:
        return f"{self.description}: " + ", ".join([*parts, *([self._note] if self._note else [])])

    def _write(self, line: str, *, end_of_line: bool) -> None:
        if self._is_terminal:
            padding = " " * max(self._line_width - len(line), 0)  # wipes what is left of a longer line
            self._stream.write(f"\r{line}{padding}" + ("\n" if end_of_line else ""))
            self._line_width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()


ProgressFactory = Callable[[str, int | None, str], Progress]
"""How a stage asks for progress: called as ``factory(description, total, unit)``; `Progress` itself is one."""


def _format_speed(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"
