"""The perturbation alone, against the machine's bandwidth."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp

import asam_jax
from benchmarks import timing

RHO, ETA = 0.5, 0.01
Leaves = list[jax.Array]

# w and g are read for the norm, both are read again for epsilon, and epsilon is
# written. A scale in place reads and writes once.
STREAMS, STREAMS_OF_SCALE = 5, 2


def library(ws: Leaves, gs: Leaves) -> Leaves:
  """The library's."""
  tx = asam_jax.ascent(RHO, ETA)
  epsilon, _ = tx.update(gs, tx.init(ws), ws)
  return jax.tree.leaves(epsilon)


def equation(ws: Leaves, gs: Leaves) -> Leaves:
  """The equation as it stands. XLA finds T in both places, and keeps it."""
  return _second_pass(ws, gs, _norm(ws, gs))


def barrier(ws: Leaves, gs: Leaves) -> Leaves:
  """The same with a barrier between the passes, so that T is formed twice."""
  return _second_pass(*lax.optimization_barrier((ws, gs, _norm(ws, gs))))


def reuse(ws: Leaves, gs: Leaves) -> Leaves:
  """T g is formed once in the code. XLA:CPU may form it twice all the same."""
  ts = [jnp.abs(w) + ETA for w in ws]
  tgs = [t * g for t, g in zip(ts, gs, strict=True)]
  norm = jnp.sqrt(sum(jnp.sum(tg**2) for tg in tgs))
  return [RHO * t * tg / norm for t, tg in zip(ts, tgs, strict=True)]


def ravelled(ws: Leaves, gs: Leaves) -> Leaves:
  """The tree as one vector."""
  w, _ = ravel_pytree(ws)
  g, unravel = ravel_pytree(gs)
  return unravel(reuse([w], [g])[0])


def _norm(ws: Leaves, gs: Leaves) -> jax.Array:
  pairs = zip(ws, gs, strict=True)
  return jnp.sqrt(sum(jnp.sum(((jnp.abs(w) + ETA) * g) ** 2) for w, g in pairs))


def _second_pass(ws: Leaves, gs: Leaves, norm: jax.Array) -> Leaves:
  pairs = zip(ws, gs, strict=True)
  return [(jnp.abs(w) + ETA) ** 2 * (g * (RHO / norm)) for w, g in pairs]


VARIANTS: dict[str, Callable[[Leaves, Leaves], Leaves]] = {
    "asam_jax.ascent": library,
    "naive: T^2 g / norm(T g)": equation,
    "naive, a barrier between": barrier,
    "naive: T (T g) / norm(T g)": reuse,
    "ravelled into one vector": ravelled,
}


def shapes(parameters: int, leaves: int) -> list[tuple[int, int]]:
  """Equal matrices with ``parameters`` entries or a few less."""
  columns = min(1000, max(1, parameters // leaves))
  rows = parameters // leaves // columns
  if rows < 1:
    raise ValueError(
        f"parameters={parameters} is too few for leaves={leaves}; give at least one"
        " parameter a leaf."
    )
  return [(rows, columns)] * leaves


def measure(parameters: int, leaves: int, repeats: int) -> list[dict[str, Any]]:
  """Times every variant against the floor, in one run.

  Args:
    parameters: the number of float32 parameters.
    leaves: the number of equal leaves they come in.
    repeats: the number of rounds.

  Returns:
    A row for each variant: quartiles of the time over the floor's ("ratio") and in
    seconds, compiled FLOPs a parameter, temporary bytes a parameter's byte, and
    the bandwidth in GB/s that the floor stands for.
  """
  sizes = shapes(parameters, leaves)
  keys = jax.random.split(jax.random.key(0), leaves)
  ws = [jax.random.normal(key, size) for key, size in zip(keys, sizes, strict=True)]
  count = sum(w.size for w in ws)

  # The gradient is donated: epsilon takes its place, and no memory is allocated.
  # Fresh pages would cost more than the arithmetic.
  def compiled(fun):
    return jax.jit(fun, donate_argnums=1, keep_unused=True).lower(ws, ws).compile()

  scale = compiled(lambda ws, gs: [g * 1.0000001 for g in gs])
  refill = compiled(lambda ws, gs: [0.1 * w for w in ws])
  executables = {name: compiled(fun) for name, fun in VARIANTS.items()}
  gs = refill(ws, [jnp.zeros_like(w) for w in ws])

  def case(executable):
    def run() -> float:
      nonlocal gs
      gs = jax.block_until_ready(refill(ws, gs))

      def once():
        nonlocal gs
        gs = executable(ws, gs)
        return gs

      return timing.seconds(once)

    return run

  cases = {name: case(executable) for name, executable in executables.items()}
  times = timing.interleaved({"scale": case(scale), **cases}, repeats)
  floor = times["scale"] * STREAMS / STREAMS_OF_SCALE
  bandwidth = STREAMS_OF_SCALE * 4 * count / times["scale"] / 1e9
  rows = []
  for name, executable in executables.items():
    cost = timing.compiled_cost(executable)
    rows.append({
        "part": "perturbation",
        "parameters": count,
        "leaves": leaves,
        "method": name,
        "ratio": timing.quartiles(times[name] / floor),
        "seconds": timing.quartiles(times[name]),
        "flops_per_parameter": cost["flops"] / count,
        "temporary_per_parameter_byte": cost["temporary_bytes"] / (4 * count),
        "bandwidth_gb_per_s": timing.quartiles(bandwidth),
    })
  return rows
