"""The time of a step on many chips, from what its program does and what a chip can."""

from collections.abc import Iterable, Mapping, Sequence
import math
from typing import Any, NamedTuple

# Of one array of B bytes on n devices, a ring sends this share past every device.
SHARES = {
    "all-reduce": 2.0,
    "all-gather": 1.0,
    "reduce-scatter": 1.0,
    "all-to-all": 1.0,
    "collective-permute": 1.0,
}


class Chip(NamedTuple):
  """What a chip can do, by its maker, and what is assumed beside.

  Attributes:
    name: of the generation.
    flops: operations a second, at the precision of the networks' products.
    memory: bytes a second between the chip and its memory.
    link: bytes a second that the chip sends to all its neighbours together.
    slice_: the most chips that are linked so; more slices go through the network.
    network: bytes a second of one chip to other slices.
    hop: seconds that a message takes to a neighbour. Assumed, not published.
    network_hop: seconds that a message takes to another slice. Assumed.
  """

  name: str
  flops: float
  memory: float
  link: float
  slice_: int
  network: float
  hop: float
  network_hop: float


# cloud.google.com/tpu/docs/v5e: 197 TFLOP/s in bfloat16, 819 GB/s, 1600 Gbit/s between
# chips (each way), 256 chips with 6.4 Tbit/s to the data centre's network.
V5E = Chip("v5e", 197e12, 819e9, 200e9, 256, 3.125e9, 1e-6, 20e-6)

ASSUMPTIONS = """\
Assumptions of the model:
- weak scaling: every chip has the same number of examples at every size;
- compute takes the longer of FLOPs / peak and bytes accessed / memory bandwidth, for
  the step as a whole: nothing waits, every product runs at the bfloat16 peak, and what
  the compiler keeps in the chip's fast memory costs as much as the rest;
- an all-reduce of B bytes sends 2 B (n - 1) / n past every chip of n, an all-gather or
  reduce-scatter half of that, at the full bandwidth of all links, plus a time for the
  way across the torus (1 us a hop: assumed, not published);
- beyond one slice of {slice_} chips, each chip exchanges its part with the other slices
  over the data centre's network ({network:.1f} GB/s a chip, 20 us: assumed);
- "exposed": no exchange overlaps with compute; "hidden": all of it does. A real step
  lies between the two, for the compiler hides a part;
- the numbers of a program are those of the nearest size that was compiled; one chip has
  no exchange."""


class Time(NamedTuple):
  """The predicted parts of a step's time, in seconds.

  Attributes:
    compute: of what a chip does alone.
    exchange: of all exchanges between the chips.
  """

  compute: float
  exchange: float

  @property
  def exposed(self) -> float:
    """The step's time if no exchange is hidden."""
    return self.compute + self.exchange

  @property
  def hidden(self) -> float:
    """The step's time if exchange and compute run side by side."""
    return max(self.compute, self.exchange)


def step_time(row: Mapping[str, Any], chips: int, chip: Chip) -> Time:
  """The time of a step on that many chips.

  Args:
    row: what one chip does, as :func:`benchmarks.pod.report.row` has it.
    chips: their number, at least 1.
    chip: what each can do.

  Returns:
    The parts of the time.
  """
  compute = max(row["flops"] / chip.flops, row["bytes_accessed"] / chip.memory)
  exchange = sum(
      exchange_time(kind, size, chips, chip)
      for kind, sizes in row["collectives"].items()
      for size in sizes
  )
  return Time(compute, exchange)


def exchange_time(kind: str, size: float, chips: int, chip: Chip) -> float:
  """The seconds of one exchange of an array of ``size`` bytes."""
  inside = min(chips, chip.slice_)
  slices = math.ceil(chips / chip.slice_)
  share = SHARES[kind]
  # Two axes of sqrt(n) chips, each a ring that is gone round both ways.
  hops = 2 * (math.sqrt(inside) / 2 if inside > 1 else 0)
  seconds = share * (size * (inside - 1) / inside / chip.link + hops * chip.hop)
  if slices > 1:
    part = size / inside
    seconds += share * (part * (slices - 1) / slices / chip.network + chip.network_hop)
  return seconds


def predictions(
    rows: Iterable[Mapping[str, Any]], sizes: Sequence[int], chip: Chip
) -> list[dict[str, Any]]:
  """A row for each method and number of chips.

  Args:
    rows: the costs of one network, each method at one or several sizes.
    sizes: the numbers of chips to predict for.
    chip: what each can do.

  Returns:
    Rows with the times, their ratio to SGD's at the same size, and the efficiency:
    the time on one chip over the time on that many.
  """
  by_method: dict[str, dict[int, Mapping[str, Any]]] = {}
  for each in rows:
    by_method.setdefault(each["method"], {})[each["chips"]] = each
  result = []
  for method, compiled in by_method.items():
    alone = step_time(compiled[min(compiled)], 1, chip)
    for size in sizes:
      row = compiled[_nearest(compiled, size)]
      time, plain = step_time(row, size, chip), None
      if "SGD" in by_method:
        others = by_method["SGD"]
        plain = step_time(others[_nearest(others, size)], size, chip)
      result.append({
          "part": row["part"],
          "method": method,
          "chips": size,
          "compute_seconds": time.compute,
          "exchange_seconds": time.exchange,
          **{
              f"{name}_{kind}": value
              for kind in ("exposed", "hidden")
              for name, value in _compared(time, alone, plain, kind).items()
          },
      })
  return result


def _compared(time: Time, alone: Time, plain: Time | None, kind: str) -> dict[str, Any]:
  seconds = getattr(time, kind)
  return {
      "seconds": seconds,
      "efficiency": getattr(alone, kind) / seconds,
      "ratio": seconds / getattr(plain, kind) if plain else None,
  }


def _nearest(compiled: Mapping[int, Any], size: int) -> int:
  return min(compiled, key=lambda other: abs(math.log(other / size)))
