"""Records of runs: JSON lines that carry their whole configuration.

A row is a dict. Its ``config`` holds all that decides its numbers, so that a run can
skip exactly what was run before, and nothing else:

    for config in configs:
      row = records.once(path, config, lambda: {"accuracy": train(config)})

Files are replaced as a whole: whoever reads one, or interrupts its writer, sees what
was there before or what is there now, never a part of it. Two processes that append
to one file would lose each other's rows; give each its own file.
"""

from collections.abc import Callable, Iterable, Mapping
import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
from typing import Any

import jax

import asam_jax

Row = dict[str, Any]


def key(config: Mapping[str, Any]) -> str:
  """Equal for equal configurations: the order of keys and tuples don't matter."""
  return json.dumps(config, sort_keys=True)


def find(rows: Iterable[Row], config: Mapping[str, Any]) -> Row | None:
  """The latest row with exactly this configuration."""
  wanted, found = key(config), None
  for row in rows:
    if "config" in row and key(row["config"]) == wanted:
      found = row
  return found


def read(path: pathlib.Path) -> list[Row]:
  """The rows of a file; none where there is no file.

  Raises:
    ValueError: if a line isn't JSON. It names the file and the line.
  """
  if not path.exists():
    return []
  rows = []
  for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError as error:
      raise ValueError(
          f"{path}, line {number}: not JSON ({error}). Remove the line, or the file."
      ) from error
  return rows


def write(path: pathlib.Path, rows: Iterable[Row]) -> None:
  """Replaces the file by these rows."""
  replace(path, "".join(json.dumps(row) + "\n" for row in rows))


def append(path: pathlib.Path, *rows: Row) -> None:
  """Replaces the file by one with these rows more."""
  write(path, [*read(path), *rows])


def once(
    path: pathlib.Path, config: Mapping[str, Any], outcome: Callable[[], Row]
) -> Row:
  """The file's row of this configuration; where it has none, it is made and added.

  Args:
    path: the file.
    config: all that decides the outcome.
    outcome: makes the fields that stand beside the configuration and the environment.

  Returns:
    The row.
  """
  row = find(read(path), config)
  if row is None:
    row = {"config": dict(config), **outcome(), **environment()}
    append(path, row)
  return row


def replace(path: pathlib.Path, content: str | bytes) -> None:
  """Writes a file in one step, folders included; str as UTF-8.

  What is written goes to a temporary file in the same folder first, for a rename is
  atomic within a file system only.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  data = content.encode() if isinstance(content, str) else content
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with temporary.open("wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())  # else a crash may leave the new name without its data
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(FileNotFoundError):
      temporary.unlink()
    raise


def today() -> str:
  """The date, in UTC."""
  return datetime.datetime.now(datetime.UTC).date().isoformat()


def versions(packages: Iterable[str]) -> dict[str, str]:
  """Of these installed distributions, of Python and of the library."""
  return {
      "asam_jax": asam_jax.__version__,  # may be run from a clone, not installed
      "python": platform.python_version(),
      **{name: importlib.metadata.version(name) for name in packages},
  }


def processor() -> str:
  """The processor's name, as far as the system tells."""
  info = pathlib.Path("/proc/cpuinfo")
  if info.exists():
    for line in info.read_text(encoding="utf-8").splitlines():
      if line.startswith("model name"):
        return line.split(":", 1)[1].strip()
  return platform.processor() or platform.machine()


def cores() -> int:
  """The cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def environment(packages: Iterable[str] = ("jax", "optax")) -> Row:
  """Where, when and with what numbers were made.

  Args:
    packages: the installed distributions whose versions are of interest.

  Returns:
    The fields ``date``, ``device``, ``cores``, ``machine`` and ``versions``.
  """
  return {
      "date": today(),
      "device": jax.devices()[0].device_kind,
      "cores": cores(),
      "machine": processor(),
      "versions": versions(packages),
  }
