"""The compiled step, on one device or on several, started by step or by epoch."""

from collections.abc import Iterator
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from examples.paper.clock import Clock
from examples.paper.config import Config
from examples.paper.config import ConfigError
from examples.paper.config import Options

_AXIS = "batch"


class Program:
  """Compiles a step once for each kind of step and shape of batch, and runs epochs.

  Args:
    step: ``(ascend, state, data, batch, seed) -> state``.
    task: has the data and the batches.
    ascend: which steps take a second gradient, where the host decides.
    config: what is trained.
    options: how.
    clock: waits where the run is to pause, and does not count compilation.
  """

  def __init__(
      self, step, task, ascend, config: Config, options: Options, clock: Clock
  ):
    self._step, self._task, self._ascend, self._clock = step, task, ascend, clock
    self._seed = np.uint32(config.seed)
    devices = jax.devices()[: options.devices or None]
    self.devices = len(devices)
    self._sharded = None
    if self.devices > 1:
      mesh = jax.sharding.Mesh(np.array(devices), (_AXIS,))
      self._replicated = NamedSharding(mesh, PartitionSpec())
      self._sharded = NamedSharding(mesh, PartitionSpec(_AXIS))
    self._data = self.place(task.data)
    on_cpu = devices[0].platform == "cpu"
    by_step = options.dispatch == "step" or (options.dispatch == "auto" and on_cpu)
    self.by_step = by_step or not task.stackable or ascend is not None
    if options.dispatch == "epoch" and self.by_step:
      raise ConfigError(
          f"dispatch=epoch: batches of {config.dataset} with method={config.method}"
          " can't be run in one loop; take dispatch=step."
      )
    self._compiled: dict[Any, Any] = {}

  @property
  def compilations(self) -> int:
    """How many programs were compiled so far."""
    return len(self._compiled)

  def place(self, tree: Any) -> Any:
    """The tree on every device of the run."""
    if self._sharded is None:
      return jax.device_put(tree, jax.devices()[0])
    return jax.device_put(tree, self._replicated)

  def epoch(self, state: Any, epoch: int, done: int) -> Iterator[tuple[int, Any]]:
    """Yields (steps taken since the start of the run, state) until the epoch ends."""
    batches = self._task.batches(epoch, done)
    first = epoch * self._task.steps
    if not self.by_step:
      self._clock.wait()
      rest = self._place_batch(batches, stacked=True)
      yield first + self._task.steps, self._call(self._scan, state, rest, None)
      return
    for i, batch in enumerate(batches, start=first + done):
      self._clock.wait()
      ascend = None if self._ascend is None else bool(self._ascend(i))
      state = self._call(self._step_alone, state, self._place_batch(batch), ascend)
      yield i + 1, state
      if i + 1 == first + self._task.steps:
        return  # some streams go on for ever

  def _place_batch(self, batch: Any, stacked: bool = False) -> Any:
    if self._sharded is None:
      return batch
    if not stacked:
      return jax.device_put(batch, self._sharded)
    mesh = self._sharded.mesh
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec(None, _AXIS)))

  def _step_alone(self, ascend, state, data, batch, seed):
    return self._step(ascend, state, data, batch, seed)

  def _scan(self, ascend, state, data, batches, seed):
    def body(state, batch):
      return self._step(ascend, state, data, batch, seed), None

    return lax.scan(body, state, batches)[0]

  def _call(self, function, state, batch, ascend):
    shapes = tuple(np.shape(x) for x in jax.tree.leaves(batch))
    key = (function.__name__, ascend, shapes)
    if key not in self._compiled:
      out: dict[str, Any] = {}
      if self._sharded is not None:
        out["out_shardings"] = self._replicated
      jitted = jax.jit(function, static_argnums=0, donate_argnums=1, **out)
      with self._clock.excluded():
        lowered = jitted.lower(ascend, state, self._data, batch, self._seed)
        self._compiled[key] = lowered.compile()
    return self._compiled[key](state, self._data, batch, self._seed)
