"""Compiles training steps for TPU pods, without a TPU, and says what they cost.

    pip install '.[pod]'
    python -m benchmarks.pod

For an MLP, ResNet-50 and a transformer of a billion parameters, on slices of a pod,
it compiles the steps of SGD, of ASAM and SAM as a user would write them, of this
library and of Optax's SAM, and prints for one chip, from the compiled programs: FLOPs,
bytes that are read and written, temporary memory (also in copies of the chip's
parameters), every exchange between chips with its bytes, loops and branches. No time
is measured. It ends with where the library takes more than it may: 3 % of FLOPs and
5 % of bytes and of temporary memory over the step by hand, more exchanges, or a loop.

The transformer's layers stand one by one in the program, since a compiler counts the
body of a loop once. To keep the compilation short there are a few of them, twice (2
and 4), and the rows of the whole network are extrapolated from these and marked so.
With --scanned the whole network is compiled with one loop over its layers: then the
memory is the compiler's own, and all other numbers count one layer.
"""

import argparse
from collections.abc import Iterator, Sequence
import json
import pathlib
import sys
import time
from typing import Any

import jax

from benchmarks import timing
from benchmarks.pod import compiler
from benchmarks.pod import methods
from benchmarks.pod import networks
from benchmarks.pod import program
from benchmarks.pod import report
from benchmarks.pod import transformer
from examples import options
from examples import records

PARTS = ("mlp", "resnet", "transformer")
BATCH_PER_CHIP = {"mlp": 512, "resnet": 32, "transformer": 4}
RESULTS = pathlib.Path("runs/pod.jsonl")


def parser() -> argparse.ArgumentParser:
  """The options."""
  parser = options.parser(__doc__)
  names = list(methods.methods(lambda params, batch: 0.0, _no_mesh()))
  add = parser.add_argument
  count = options.number(int, 1)
  add("--parts", nargs="+", choices=PARTS, default=list(PARTS),
      help="networks whose steps are compiled")
  add("--chips", nargs="+", type=count, default=[4, 16, 64, 256],
      help="numbers of chips of the slices")
  add("--chip", default="v5e", help="generation of the chips, as libtpu names it")
  add("--methods", nargs="+", choices=names, default=names,
      help="methods whose steps are compiled")
  add("--layers", nargs=2, type=count, default=[2, 4],
      help="numbers of layers of the two transformers that the whole is made from")
  add("--scanned", action="store_true",
      help="compile the whole transformer, its layers in a loop")
  add("--results", type=pathlib.Path, default=RESULTS, metavar="FILE",
      help="file for the JSON lines, which is replaced")
  return parser


def _no_mesh() -> Any:
  """Enough of a mesh to name the methods."""
  return jax.sharding.AbstractMesh((1,), (compiler.AXIS,))


def variants(part: str, mesh: Any, args: argparse.Namespace) -> Iterator[Any]:
  """(problem, what identifies it) for each program of a part."""
  if part == "mlp":
    yield networks.mlp(), {}
  elif part == "resnet":
    yield networks.resnet(), {}
  else:
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def whole(weights: Any) -> Any:
      return jax.lax.with_sharding_constraint(weights, everywhere)

    depths = [transformer.LAYERS] if args.scanned else args.layers
    for layers in depths:
      problem = transformer.transformer(layers, args.scanned, whole)
      yield problem, {"layers": layers, "scanned": args.scanned}


def compiled_rows(
    problem: networks.Problem,
    identity: report.Row,
    mesh: Any,
    names: Sequence[str],
) -> Iterator[report.Row]:
  """A row for each method, as it is compiled."""
  params = compiler.placed(jax.eval_shape(problem.init), mesh, problem.sharded)
  batch = problem.batch(identity["batch_per_chip"] * mesh.size)
  batch = compiler.placed_batch(batch, mesh)
  sizes = {
      "parameters": sum(w.size for w in jax.tree.leaves(params)),
      "parameter_bytes": compiler.bytes_per_device(params),
  }
  every = methods.methods(problem.loss, mesh)
  for name in names:
    if every[name].whole and problem.sharded:
      continue  # a device that holds a part can't have a perturbation of its own
    state = jax.eval_shape(every[name].init, params)
    state = compiler.placed(state, mesh, problem.sharded)
    start = time.perf_counter()
    compiled = compiler.compile_step(every[name].step, params, state, batch)
    seconds = time.perf_counter() - start
    yield {
        **identity,
        "method": name,
        "by_hand": every[name].by_hand,
        **sizes,
        **report.row(program.cost(compiled)),
        "compile_seconds": round(seconds, 1),
    }


def part_rows(
    part: str, chips: int, args: argparse.Namespace
) -> Iterator[report.Row]:
  """The rows of a part on one slice; those that are extrapolated come last."""
  mesh = compiler.pod_mesh(chips, args.chip)
  slice_ = {"part": part, "chip": args.chip, "chips": chips}
  slice_ |= {"batch_per_chip": BATCH_PER_CHIP[part]}
  depths = []
  for problem, identity in variants(part, mesh, args):
    depths.append([])
    for row in compiled_rows(problem, slice_ | identity, mesh, args.methods):
      depths[-1].append(row)
      yield row
  if len(depths) == 2:
    for fewer, more in zip(*depths, strict=True):
      yield report.extrapolated(fewer, more, transformer.LAYERS)


def main(arguments: Sequence[str] | None = None) -> list[report.Row]:
  """Compiles, prints and writes; returns the rows."""
  args = parser().parse_args(arguments)
  reason = compiler.missing()
  if reason:
    sys.exit(reason)
  command = list(sys.argv[1:] if arguments is None else arguments)
  header = {"command": ["benchmarks.pod", *command], **timing.environment()}
  header |= {"libtpu": compiler.version()}
  print(json.dumps(header), flush=True)
  rows = []
  for part in args.parts:
    for chips in args.chips:
      group = []
      for row in part_rows(part, chips, args):
        group.append(row)  # written as it comes: some take minutes
        records.write(args.results, [header, *rows, *group])
      print(f"\n{report.table(group)}", flush=True)
      rows += group
  print("\nMore than the step by hand may take:")
  print("\n".join(report.violations(rows)) or "nothing")
  print(f"\nwritten to {args.results}")
  return rows


if __name__ == "__main__":
  main()
