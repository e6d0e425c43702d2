"""Rows of numbers, what they have to hold, and the tables that show them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.pod import program

Row = dict[str, Any]

# How much more than the hand-written step the library's may take.
ALLOWED = {"flops": 1.03, "bytes_accessed": 1.05, "temporary_bytes": 1.05}
OURS = ("adaptive_sam", "sam", "adaptive_sam, per device")
# A temporary of a few scalars is no difference to speak of.
SMALL_BYTES = 1 << 16


def row(cost: program.Cost) -> Row:
  """What is written of a cost."""
  kinds = sorted({each.kind for each in cost.collectives})
  return {
      "flops": cost.flops,
      "bytes_accessed": cost.bytes_accessed,
      "temporary_bytes": cost.temporary_bytes,
      "peak_bytes": cost.peak_bytes,
      "collectives": {
          kind: [each.bytes for each in cost.collectives if each.kind == kind]
          for kind in kinds
      },
      **{kind: count for kind, count in cost.loops.items()},
  }


def extrapolated(fewer: Row, more: Row, layers: int) -> Row:
  """The row of a network of that many layers, from two of its with fewer.

  Each further layer is taken to add what the last ones added: to operations, bytes and
  exchanges. Memory does not add up so, and is left out (None).
  """
  step = (layers - more["layers"]) / (more["layers"] - fewer["layers"])

  def line(a: Any, b: Any) -> Any:
    return b + (b - a) * step

  numbers = ("parameters", "parameter_bytes", "flops", "bytes_accessed")
  kinds = fewer["collectives"].keys() | more["collectives"].keys()
  sums = {
      kind: line(*(sum(each["collectives"].get(kind, [])) for each in (fewer, more)))
      for kind in sorted(kinds)
  }
  return more | {
      **{name: line(fewer[name], more[name]) for name in numbers},
      "temporary_bytes": None,
      "peak_bytes": None,
      "layers": layers,
      "extrapolated_from": [fewer["layers"], more["layers"]],
      "collectives": {kind: [total] for kind, total in sums.items()},
      "compile_seconds": 0.0,
  }


def violations(rows: Iterable[Row]) -> list[str]:
  """Where the library's step takes more than the hand-written one may."""
  by_key = {(*_key(each), each["method"]): each for each in rows}
  found = []
  for key, each in by_key.items():
    if each["method"] not in OURS:
      continue
    by_hand = by_key.get((*key[:-1], each["by_hand"]))
    if by_hand is None:
      continue
    label = f"{each['part']}, {each['chips']} chips, {each['method']}"
    for name, ratio in ALLOWED.items():
      if each[name] is None:
        continue
      limit = ratio * by_hand[name]
      if name == "temporary_bytes":
        limit += SMALL_BYTES
      if each[name] > limit:
        found.append(f"{label}: {name} {each[name] / by_hand[name]:.3f} by hand")
    for kind in program.LOOPS:
      if each[kind] > by_hand[kind]:
        found.append(f"{label}: {each[kind]} {kind}, by hand {by_hand[kind]}")
    counts = exchanges(each), exchanges(by_hand)
    if counts[0] > counts[1]:
      found.append(f"{label}: {counts[0]} collectives, by hand {counts[1]}")
  return found


def exchanges(each: Row) -> int:
  """The number of collectives."""
  return sum(len(sizes) for sizes in each["collectives"].values())


def _key(each: Row) -> tuple[Any, ...]:
  return tuple(
      str(each.get(name))
      for name in ("part", "chips", "layers", "scanned", "extrapolated_from")
  )


def table(rows: Sequence[Row]) -> str:
  """One table for each network and number of chips, in Markdown."""
  groups: dict[Any, list[Row]] = {}
  for each in rows:
    groups.setdefault(_key(each), []).append(each)
  return "\n\n".join(_one_table(group) for group in groups.values())


def _one_table(rows: Sequence[Row]) -> str:
  first = rows[0]
  by_name = {each["method"]: each for each in rows}
  header = ["method", "FLOPs", "bytes", "temporary", "copies", "collectives"]
  header += ["exchanged", "loops", "/ by hand: FLOPs", "bytes", "temporary"]
  lines = [header, ["---", *["---:"] * (len(header) - 1)]]
  for each in rows:
    lines.append([
        each["method"],
        f"{each['flops']:.4g}",
        f"{each['bytes_accessed']:.4g}",
        *_memory(each),
        " ".join(f"{len(v)} {k}" for k, v in each["collectives"].items()) or "none",
        f"{sum(map(sum, each['collectives'].values())):.4g}",
        str(sum(each[kind] for kind in program.LOOPS)),
        *_ratios(each, by_name),
    ])
  body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
  return f"{_title(first)}\n\n{body}"


def _memory(each: Row) -> list[str]:
  if each["temporary_bytes"] is None:
    return ["", ""]
  copies = each["temporary_bytes"] / each["parameter_bytes"]
  return [f"{each['temporary_bytes']:.4g}", f"{copies:.3f}"]


def _ratios(each: Row, by_name: Mapping[str, Row]) -> list[str]:
  by_hand = by_name.get(each["by_hand"] or "")
  if by_hand is None:
    return [""] * len(ALLOWED)
  return [
      f"{each[name] / by_hand[name]:.3f}" if by_hand[name] else ""
      for name in ALLOWED
  ]


def _title(first: Row) -> str:
  layers = ""
  if "layers" in first:
    kind = "scanned" if first["scanned"] else "unrolled"
    layers = f", {first['layers']} layers, {kind}"
  if "extrapolated_from" in first:
    fewer, more = first["extrapolated_from"]
    layers += f" (EXTRAPOLATED from {fewer} and {more} compiled layers)"
  return (
      f"{first['part']}{layers}: {first['chips']} chips of {first['chip']},"
      f" {first['batch_per_chip']} examples a chip, {first['parameters']:,.0f}"
      f" parameters, {first['parameter_bytes']:,.0f} bytes of them a chip"
  )
