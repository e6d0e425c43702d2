"""Clocks for things that are compared: interleaved, with quartiles."""

from collections.abc import Callable, Mapping
import time
from typing import Any

import jax
import numpy as np

from examples import records


def seconds(run: Callable[[], Any], calls: int = 1) -> float:
  """The wall time of ``calls`` calls, until the last result is there."""
  start = time.perf_counter()
  result = None
  for _ in range(calls):
    result = run()
  jax.block_until_ready(result)
  return time.perf_counter() - start


def interleaved(
    cases: Mapping[str, Callable[[], float]], repeats: int, seed: int = 0
) -> dict[str, np.ndarray]:
  """Measures every case once a round, in an order that changes by the round.

  What drifts (other processes, clock rates) then hits all cases alike, and the
  ratio of two cases within a round is free of it.

  Args:
    cases: for each name a function that runs the case and returns its seconds.
    repeats: the number of rounds, after two that are not counted.
    seed: of the order.

  Returns:
    For each name the seconds in each round, of shape ``[repeats]``.
  """
  rng = np.random.default_rng(seed)
  times = {name: [] for name in cases}
  for i in range(repeats + 2):
    for name in rng.permutation(list(cases)).tolist():
      elapsed = cases[name]()
      if i >= 2:
        times[name].append(elapsed)
  return {name: np.array(values) for name, values in times.items()}


def quartiles(values: np.ndarray) -> list[float]:
  """[first quartile, median, third quartile]."""
  return np.quantile(values, [0.25, 0.5, 0.75]).tolist()


def median_error(values: np.ndarray, resamples: int = 500, seed: int = 0) -> float:
  """The standard error of the median, by the bootstrap."""
  rng = np.random.default_rng(seed)
  medians = [np.median(rng.choice(values, len(values))) for _ in range(resamples)]
  return float(np.std(medians))


def show(three: list[float], digits: int = 2) -> str:
  """Quartiles as ``median [q1, q3]``."""
  low, median, high = three
  return f"{median:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def compiled_cost(compiled: Any, calls: int = 1) -> dict[str, float]:
  """FLOPs of ``calls`` calls and bytes of temporary memory, as XLA has them."""
  return {
      "flops": compiled.cost_analysis()["flops"] * calls,
      "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
  }


def environment() -> dict[str, Any]:
  """What the numbers depend on: date, versions, processor."""
  return {
      "date": records.today(),
      **records.versions(("jax", "jaxlib", "optax", "flax", "numpy")),
      "device": jax.devices()[0].device_kind,
      "cpu": records.processor(),
      "cores": records.cores(),
  }
