"""Progress lines: what they say at which second, in a log and on a terminal, by a clock of our own."""

import io

import pytest

from emodistill.progress import Progress, format_duration


class Clock:
    """Seconds that pass when told to."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def advance(progress: Progress, clock: Clock, seconds: int, n_per_second: int = 1, note: str = "") -> None:
    for _ in range(seconds):
        clock.now_s += 1
        progress.advance(n_per_second, note)


def test_a_log_gets_a_line_every_20_seconds_and_one_at_the_end() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress("fold 0", 500, stream=stream, clock=clock) as progress:
        advance(progress, clock, 50, 10, "loss 0.5")
    assert stream.getvalue().splitlines() == [
        # after 20 of 50 s: 200 of 500, 300 left at 10/s
        "fold 0: 200/500 (40 %) examples, 10 examples/s, 30 s left, loss 0.5",
        "fold 0: 400/500 (80 %) examples, 10 examples/s, 10 s left, loss 0.5",
        "fold 0: 500 examples in 50 s, 10 examples/s, loss 0.5",
    ]


def test_short_work_is_silent() -> None:
    for stream in (io.StringIO(), Terminal()):
        clock = Clock()
        with Progress("quick", 100, stream=stream, clock=clock) as progress:
            advance(progress, clock, 1, 100)
        assert stream.getvalue() == ""


def test_a_terminal_gets_one_line_that_is_wiped_when_a_shorter_one_follows() -> None:
    clock, stream = Clock(), Terminal()
    with Progress("x", 4, "rows", stream=stream, clock=clock) as progress:
        advance(progress, clock, 3, note="a long note")
        advance(progress, clock, 1, note="n")
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    before, after = text.split("\r")[2:4]
    assert before == "x: 3/4 (75 %) rows, 1 rows/s, 1 s left, a long note"
    assert len(after) == len(before)
    assert after.rstrip() == "x: 4/4 (100 %) rows, 1 rows/s, 0 s left, n"


def test_rows_of_an_earlier_attempt_count_as_done_and_not_as_speed() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress("fold 0", 1000, stream=stream, clock=clock) as progress:
        progress.skip(800)
        advance(progress, clock, 20, 5)
        clock.now_s += 20  # a pause
    assert stream.getvalue().splitlines() == [
        "fold 0: 900/1,000 (90 %) examples, 5 examples/s, 20 s left",
        "fold 0: 900/1,000 (90 %) examples in 40 s, 2.5 examples/s",  # 100 in 40 s
    ]


def test_the_speed_is_that_of_the_last_minute() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress("x", None, stream=stream, clock=clock)
    advance(progress, clock, 100, 1)
    advance(progress, clock, 60, 50)
    assert stream.getvalue().splitlines()[-1] == "x: 3,100 examples, 50 examples/s"


def test_unfinished_work_does_not_claim_to_be_done() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress("x", 10, stream=stream, clock=clock)
    advance(progress, clock, 5)
    progress.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert stream.getvalue().splitlines() == ["x: 5/10 (50 %) examples in 5 s, 1 examples/s"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7620, "2 h 07 min"),
    ],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
