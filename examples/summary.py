"""Mean and standard error of some runs, as numbers and as text."""

from collections.abc import Sequence
import math
from typing import Any

import numpy as np


def mean_and_error(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
  """Mean and its standard error over the runs; the error of a single run is NaN."""
  values = np.asarray(values, np.float64)
  if len(values) < 2:
    return float(values.mean()), math.nan
  return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


def show(mean: float, error: float, digits: int) -> str:
  """``94.1 ± 0.4``; of a single run ``94.1``."""
  text = f"{mean:.{digits}f}"
  return text if math.isnan(error) else f"{text} ± {error:.{digits}f}"


def optional(value: float, form: str, suffix: str = "") -> str:
  """A number, or a dash where there is none: it is NaN."""
  return "-" if math.isnan(value) else f"{value:{form}}{suffix}"


def markdown(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
  """A Markdown table."""
  line = lambda cells: "| " + " | ".join(map(str, cells)) + " |"  # noqa: E731
  rule = "|---" * len(header) + "|"
  return "\n".join([line(header), rule, *map(line, rows)])
