"""What a compiled program does, read from the program itself."""

from collections.abc import Iterator
import math
import re
from typing import Any, NamedTuple

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
LOOPS = ("while", "conditional")

_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\(([^)]*)\)(.*)$"
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_COMMENT = re.compile(r"/\*.*?\*/")
_LAYOUT = re.compile(r"\{[^{}]*\}")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_GROUP_SHAPE = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_GROUP_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_FIRST_GROUP = re.compile(r"replica_groups=\{\{([\d,]*)\}")


class Collective(NamedTuple):
  """One exchange between the devices.

  Attributes:
    kind: one of :data:`COLLECTIVES`.
    bytes: of the whole array on a device: what an all-reduce sums, what an
      all-gather has gathered, what a reduce-scatter starts from.
    devices: the number of devices that take part, or 0 where the program does not
      say (all of them, or pairs).
  """

  kind: str
  bytes: int
  devices: int


class Cost(NamedTuple):
  """What one execution of a program costs one device, as its compiler has it.

  Attributes:
    flops: floating-point operations.
    bytes_accessed: bytes that its operations read and write.
    temporary_bytes: memory beside arguments and results.
    peak_bytes: the most memory at one time, arguments included; 0 if not known.
    collectives: every exchange, in the order of the program.
    loops: how often each of :data:`LOOPS` stands in the program. The body of a loop
      is counted once in all the other numbers.
  """

  flops: float
  bytes_accessed: float
  temporary_bytes: int
  peak_bytes: int
  collectives: tuple[Collective, ...]
  loops: dict[str, int]


class _Instruction(NamedTuple):
  computation: str
  name: str
  shape: str
  kind: str
  operands: list[str]
  attributes: str


def cost(compiled: Any) -> Cost:
  """The cost of a ``jax.stages.Compiled``."""
  analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
  text = compiled.as_text()
  return Cost(
      flops=analysis["flops"],
      bytes_accessed=analysis["bytes accessed"],
      temporary_bytes=memory.temp_size_in_bytes,
      peak_bytes=getattr(memory, "peak_memory_in_bytes", 0),
      collectives=collectives(text),
      loops=loops(text),
  )


def collectives(text: str) -> tuple[Collective, ...]:
  """The exchanges in a program's text.

  An asynchronous one counts at its start. One that a TPU spreads over several fusions,
  to run beside them, stands in each of these with the same channel, and counts once.
  """
  instructions = list(_instructions(text))
  sizes = {each.name: array_bytes(each.shape) for each in instructions}
  found, channels = [], set()
  for each in instructions:
    kind = each.kind.removesuffix("-start")
    if each.computation.startswith("all-reduce-scatter"):  # as a TPU fuses it
      kind = kind.replace("all-reduce", "reduce-scatter")
    if kind not in COLLECTIVES:
      continue
    channel = _CHANNEL.search(each.attributes)
    if channel:
      if channel.group(1) in channels:
        continue
      channels.add(channel.group(1))
    before = sum(sizes.get(name, 0) for name in each.operands)
    after = array_bytes(each.shape)
    if each.kind.endswith("-start"):
      after -= before if kind != "all-reduce" else 0  # (operands, results, ...)
    found.append(Collective(kind, max(before, after), _devices(each.attributes)))
  return tuple(found)


def loops(text: str) -> dict[str, int]:
  """How often each kind of loop or branch stands in a program's text."""
  kinds = [each.kind for each in _instructions(text)]
  return {kind: kinds.count(kind) for kind in LOOPS}


def array_bytes(shape: str) -> int:
  """The bytes of a shape as programs write it: ``f32[2,3]``, or a tuple of such."""
  total = 0
  for element, dimensions in _ARRAY.findall(_LAYOUT.sub("", shape)):
    size = math.prod(int(n) for n in dimensions.split(",") if n)
    total += -(-size * _bits(element) // 8)
  return total


def _bits(element: str) -> int:
  if element == "pred":
    return 8
  digits = re.match(r"[a-z]+(\d+)", element)  # f32, bf16, s8, f8e4m3fn
  return int(digits.group(1)) if digits else 0  # a token has none


def _instructions(text: str) -> Iterator[_Instruction]:
  computation = ""
  for line in _COMMENT.sub("", text).splitlines():
    header = _COMPUTATION.match(line)
    if header:
      computation = header.group(1)
    match = _INSTRUCTION.match(line)
    if match:
      name, shape, kind, operands, attributes = match.groups()
      # Some programs write each operand with its shape in front of the name.
      names = [part.split()[-1].lstrip("%") for part in operands.split(", ") if part]
      yield _Instruction(computation, name, shape, kind, names, attributes)


def _devices(attributes: str) -> int:
  shape = _GROUP_SHAPE.search(attributes)
  if shape:
    return int(shape.group(2))
  axes = _GROUP_AXES.search(attributes)
  if axes:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes.group(1)))
    return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", axes.group(2)))
  first = _FIRST_GROUP.search(attributes)
  return len(first.group(1).split(",")) if first and first.group(1) else 0
