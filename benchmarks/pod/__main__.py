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

PARTS = ("mlp", "resnet", "transformer")
BATCH_PER_CHIP = {"mlp": 512, "resnet": 32, "transformer": 4}
RESULTS = pathlib.Path("runs/pod.jsonl")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  """The options."""
  parser = argparse.ArgumentParser(
      prog="python -m benchmarks.pod",
      description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  names = list(methods.methods(lambda params, batch: 0.0, _no_mesh()))
  add = parser.add_argument
  add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
  add("--chips", nargs="+", type=int, default=[4, 16, 64, 256], help="of a slice")
  add("--chip", default="v5e", help="the generation, as libtpu names it")
  add("--methods", nargs="+", choices=names, default=names)
  add("--layers", nargs=2, type=int, default=[2, 4], help="of the transformer")
  add("--scanned", action="store_true", help="the transformer's layers in a loop")
  add("--results", type=pathlib.Path, default=RESULTS, help="JSON lines, overwritten")
  return parser.parse_args(arguments)


def _no_mesh() -> Any:
  """Enough of a mesh to name the methods."""
  return jax.sharding.AbstractMesh((1,), (compiler.AXIS,))


def variants(part: str, mesh: Any, options: argparse.Namespace) -> Iterator[Any]:
  """(problem, what identifies it) for each program of a part."""
  if part == "mlp":
    yield networks.mlp(), {}
  elif part == "resnet":
    yield networks.resnet(), {}
  else:
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def whole(weights: Any) -> Any:
      return jax.lax.with_sharding_constraint(weights, everywhere)

    depths = [transformer.LAYERS] if options.scanned else options.layers
    for layers in depths:
      problem = transformer.transformer(layers, options.scanned, whole)
      yield problem, {"layers": layers, "scanned": options.scanned}


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
    part: str, chips: int, options: argparse.Namespace
) -> Iterator[report.Row]:
  """The rows of a part on one slice; those that are extrapolated come last."""
  mesh = compiler.pod_mesh(chips, options.chip)
  slice_ = {"part": part, "chip": options.chip, "chips": chips}
  slice_ |= {"batch_per_chip": BATCH_PER_CHIP[part]}
  depths = []
  for problem, identity in variants(part, mesh, options):
    depths.append([])
    for row in compiled_rows(problem, slice_ | identity, mesh, options.methods):
      depths[-1].append(row)
      yield row
  if len(depths) == 2:
    for fewer, more in zip(*depths, strict=True):
      yield report.extrapolated(fewer, more, transformer.LAYERS)


def main(arguments: Sequence[str] | None = None) -> list[report.Row]:
  """Compiles, prints and writes; returns the rows."""
  options = parse(arguments)
  reason = compiler.missing()
  if reason:
    sys.exit(reason)
  command = list(sys.argv[1:] if arguments is None else arguments)
  header = {"command": ["benchmarks.pod", *command], **timing.environment()}
  header |= {"libtpu": compiler.version()}
  print(json.dumps(header), flush=True)
  options.results.parent.mkdir(parents=True, exist_ok=True)
  rows = []
  with options.results.open("w") as file:
    file.write(json.dumps(header) + "\n")
    for part in options.parts:
      for chips in options.chips:
        group = []
        for row in part_rows(part, chips, options):
          # Each as it comes: some take minutes.
          file.write(json.dumps(row) + "\n")
          file.flush()
          group.append(row)
        print(f"\n{report.table(group)}", flush=True)
        rows += group
  print("\nMore than the step by hand may take:")
  print("\n".join(report.violations(rows)) or "nothing")
  print(f"\nwritten to {options.results}")
  return rows


if __name__ == "__main__":
  main()
