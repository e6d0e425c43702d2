"""Time spent on training, without compilation and without pauses."""

from collections.abc import Iterator
import contextlib
import pathlib
import time


class Clock:
  """Wall and processor seconds since the last lap, less what is excluded.

  Args:
    pause_file: while this file exists, :meth:`wait` waits.
  """

  def __init__(self, pause_file: pathlib.Path | None = None):
    self._pause_file = pause_file
    self._start = self._now()

  def lap(self) -> dict[str, float]:
    """The seconds since the last lap, and begins another."""
    now = self._now()
    wall, cpu = (b - a for a, b in zip(self._start, now, strict=True))
    self._start = now
    return {"seconds": round(wall, 3), "cpu_seconds": round(cpu, 3)}

  @contextlib.contextmanager
  def excluded(self) -> Iterator[None]:
    """What is done within does not count."""
    before = self._now()
    yield
    spent = [b - a for a, b in zip(before, self._now(), strict=True)]
    self._start = tuple(s + t for s, t in zip(self._start, spent, strict=True))

  def wait(self) -> None:
    """Returns when there is no pause file."""
    if self._pause_file is None or not self._pause_file.exists():
      return
    with self.excluded():
      while self._pause_file.exists():
        time.sleep(0.5)

  @staticmethod
  def _now() -> tuple[float, ...]:
    return time.perf_counter(), time.process_time()
