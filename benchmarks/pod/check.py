"""The model of scale against the clock, on the CPU devices of this machine."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from benchmarks import timing
from benchmarks.pod import compiler
from benchmarks.pod import methods
from benchmarks.pod import networks
from benchmarks.pod import program
from benchmarks.pod import report
from benchmarks.pod import scaling

METHODS = ("SGD", "adaptive_sam", "adaptive_sam, per device", "momentum_sam")
LAYERS, WIDTH, BATCH = 6, 512, 64  # of the network, and examples a device


def measure(
    devices: int,
    repeats: int,
    layers: int = LAYERS,
    width: int = WIDTH,
    batch: int = BATCH,
) -> list[dict[str, Any]]:
  """Predicted and measured time over SGD's, on so many devices.

  The devices share the machine's cores, so what one of them can do is measured with
  all of them at work; the model knows nothing else of the machine.

  Args:
    devices: how many, of those that JAX has.
    repeats: the rounds, in each of which every method is timed once.
    layers: of the MLP.
    width: of its layers.
    batch: examples a device.

  Returns:
    A row for each method with the ratio that the model predicts, and quartiles of
    the measured one.
  """
  mesh = Mesh(np.array(jax.devices()[:devices]), (compiler.AXIS,))
  chip = measured_chip(mesh, width, batch, repeats)
  problem = networks.mlp(layers, width)
  rng = np.random.default_rng(0)
  arrays = [
      np.float32(rng.normal(size=leaf.shape)) for leaf in problem.batch(batch * devices)
  ]
  data = jax.device_put(tuple(arrays), _sharding(mesh, compiler.AXIS))
  everywhere = _sharding(mesh)
  start = jax.device_put(jax.jit(problem.init)(), everywhere)
  start = jax.tree.map(lambda w: w + 0.01, start)  # no zero gradient
  cases, costs = {}, {}
  every = methods.methods(problem.loss, mesh)
  for name in METHODS:
    state = jax.device_put(every[name].init(start), everywhere)
    compiled = jax.jit(every[name].step).lower(start, state, data).compile()
    costs[name] = report.row(program.cost(compiled))
    cases[name] = functools.partial(compiled, start, state, data)
  times = timing.interleaved(
      {name: functools.partial(timing.seconds, run) for name, run in cases.items()},
      repeats,
  )
  predicted = {
      name: scaling.step_time(cost, devices, chip).exposed
      for name, cost in costs.items()
  }
  return [
      {
          "method": name,
          "devices": devices,
          "predicted_ratio": predicted[name] / predicted["SGD"],
          "measured_ratio": timing.quartiles(times[name] / times["SGD"]),
          "predicted_seconds": predicted[name],
          "measured_seconds": timing.quartiles(times[name]),
          "chip": chip._asdict(),
      }
      for name in METHODS
  ]


def measured_chip(mesh: Mesh, width: int, batch: int, repeats: int) -> scaling.Chip:
  """What one device does while all of them do the same."""
  rows = jax.device_put(
      np.ones((batch * mesh.size, width), np.float32), _sharding(mesh, compiler.AXIS)
  )
  weights = jax.device_put(np.ones((width, width), np.float32), _sharding(mesh))
  # Larger than the caches, and divided among the devices.
  large = jax.device_put(
      np.ones((mesh.size, 1 << 22), np.float32), _sharding(mesh, compiler.AXIS)
  )
  summed = jax.jit(lambda x: jnp.sum(x, 0), out_shardings=_sharding(mesh))

  def median(function: Callable[..., Any], *arrays: jax.Array) -> float:
    function(*arrays)
    times = [timing.seconds(lambda: function(*arrays)) for _ in range(repeats)]
    return float(np.median(times))

  product = median(jax.jit(lambda x, w: x @ w), rows, weights)
  copy = median(jax.jit(lambda x: 2 * x), large)
  exchange = median(summed, large)
  bytes_ = large.nbytes / mesh.size
  return scaling.Chip(
      name="CPU device",
      flops=2 * batch * width**2 / product,
      memory=2 * bytes_ / copy,
      link=2 * bytes_ * (mesh.size - 1) / mesh.size / exchange,
      slice_=mesh.size,
      network=1.0,
      hop=0.0,
      network_hop=0.0,
  )


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Predicted beside measured, in Markdown."""
  lines = [["method", "predicted / SGD", "measured / SGD", "difference"]]
  lines.append(["---", "---:", "---:", "---:"])
  for row in rows:
    difference = row["predicted_ratio"] / row["measured_ratio"][1] - 1
    lines.append([
        row["method"],
        f"{row['predicted_ratio']:.3f}",
        timing.show(row["measured_ratio"], 3),
        f"{difference:+.1%}",
    ])
  title = f"{rows[0]['devices']} CPU devices of this machine"
  return title + "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _sharding(mesh: Mesh, *axes: str) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec(*axes))
