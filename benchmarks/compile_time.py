"""What a step costs the compiler: ``python -m benchmarks.compile_time``.

Traces, lowers and compiles, each time from empty caches,

- the step of each network, plain, by hand and the library's;
- the perturbation alone of trees with many small leaves in four shapes, the library's
  and the equation in two spellings;
- both with the library's loop taken out, which keeps the norm in the range of its dtype
  on a CPU: what is left of the difference is not the loop's;

and prints the processor's seconds, of all threads of this process, as medians over the
rounds, and writes a JSON line for each. What else the machine does matters
less to such seconds than to a clock; one core (``taskset -c 0``) makes them steadier.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
import contextlib
import json
import pathlib
import sys
import time
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from benchmarks import networks
from benchmarks import perturbation
from benchmarks import steps
from benchmarks import timing
from examples import options
from examples import records

NO_LOOP = ", no loop"
METHODS = (
    "plain SGD", "ASAM by hand", "adaptive_sam", "value_and_grad",
    f"adaptive_sam{NO_LOOP}",
)
SPELLINGS = (
    "asam_jax.ascent", "naive, a barrier between", "naive: T (T g) / norm(T g)",
    f"asam_jax.ascent{NO_LOOP}",
)
SHAPES = ((8, 8), (64,), (16, 32), (3, 3, 4, 8))
BATCH_SIZE = 64
OUTPUT = pathlib.Path("runs/benchmarks/compile_time.jsonl")

Case = Callable[[], Any]  # gives what is lowered


def step_cases(network: str) -> dict[str, Case]:
  """The steps of a network."""
  problem = networks.problem(network, BATCH_SIZE)
  params = jax.eval_shape(problem.init)

  def case(name: str) -> Case:
    step = steps.steps(problem.loss)[name.removesuffix(NO_LOOP)]
    lower = lambda: jax.jit(step.step, donate_argnums=(0, 1)).lower(  # noqa: E731
        params, jax.eval_shape(step.init, params), problem.batch
    )
    return without_loop(lower) if name.endswith(NO_LOOP) else lower

  return {name: case(name) for name in METHODS}


def tree_cases(leaves: int, spellings: Sequence[str] = SPELLINGS) -> dict[str, Case]:
  """The spellings of the perturbation of a tree."""
  tree = [
      jax.ShapeDtypeStruct(SHAPES[i % len(SHAPES)], jnp.float32) for i in range(leaves)
  ]

  def case(name: str) -> Case:
    variant = perturbation.VARIANTS[name.removesuffix(NO_LOOP)]
    # A function of its own: JAX would know the other one's program.
    lower = lambda: jax.jit(lambda *a: variant(*a), donate_argnums=1).lower(tree, tree)  # noqa: E731
    return without_loop(lower) if name.endswith(NO_LOOP) else lower

  return {name: case(name) for name in spellings}


def without_loop(lower: Case) -> Case:
  """The same with each loop's body taken once: what a norm in range needs."""

  @contextlib.contextmanager
  def replaced() -> Iterator[None]:
    jax.clear_caches()  # they hold what was traced with the loop
    kept, lax.while_loop = lax.while_loop, lambda cond, body, init: body(init)
    try:
      yield
    finally:
      lax.while_loop = kept
      jax.clear_caches()

  return replaced()(lower)


def measure(cases: dict[str, Case], rounds: int) -> Iterator[dict[str, Any]]:
  """Processor seconds of each case, the cases in turns.

  Args:
    cases: what to lower, by name.
    rounds: how often each.

  Yields:
    For each case ``lower_seconds`` and ``compile_seconds``, one for each round.
  """
  seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
  for _ in range(rounds):
    for name, lower in cases.items():
      jax.clear_caches()
      start = time.process_time()
      lowered = lower()
      middle = time.process_time()
      lowered.compile()
      seconds[name].append((middle - start, time.process_time() - middle))
  for name, pairs in seconds.items():
    lowering, compiling = np.round(pairs, 3).T.tolist()
    yield {"method": name, "lower_seconds": lowering, "compile_seconds": compiling}


def show(row: dict[str, Any]) -> str:
  """A row in a line."""
  lowering, compiling = (
      float(np.median(row[key])) for key in ("lower_seconds", "compile_seconds")
  )
  return (f"{row['part']}, {row['method']}: {lowering:.2f} s to trace and lower,"
          f" {compiling:.2f} s to compile")


def parser() -> argparse.ArgumentParser:
  """The options."""
  parser = options.parser(__doc__)
  add = parser.add_argument
  count = options.number(int, 1)
  add("--networks", nargs="*", choices=list(networks.NETWORKS),
      default=list(networks.NETWORKS), help="networks whose steps are compiled")
  add("--leaves", nargs="*", type=count, default=[300, 3000],
      help="numbers of leaves of the trees")
  add("--spellings", nargs="*", choices=SPELLINGS, default=list(SPELLINGS),
      help="spellings of the perturbation")
  add("--rounds", type=count, default=9,
      help="number of times that a network's steps are compiled")
  add("--output", type=pathlib.Path, default=OUTPUT, metavar="FILE",
      help="file for the JSON lines")
  return parser


def main(argv: Sequence[str] | None = None) -> None:
  """Measures, prints and writes."""
  args = parser().parse_args(argv)
  command = list(sys.argv[1:] if argv is None else argv)
  rows = [{"command": ["benchmarks.compile_time", *command]} | timing.environment()]
  print(json.dumps(rows[0]))
  list(measure(tree_cases(4), 1))  # what a process does once
  parts = [(name, step_cases(name), args.rounds) for name in args.networks]
  parts += [
      (f"{leaves} leaves", tree_cases(leaves, args.spellings), 1)
      for leaves in args.leaves
  ]
  for part, cases, rounds in parts:
    for row in measure(cases, rounds):
      rows.append({"part": part, **row})
      print(show(rows[-1]), flush=True)
      records.write(args.output, rows)


if __name__ == "__main__":
  main()
