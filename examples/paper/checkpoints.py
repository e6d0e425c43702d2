"""Checkpoints by Orbax, which appear whole or not at all."""

import hashlib
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from examples.paper.config import Options


def digest(tree: Any) -> str:
  """A digest of every bit of a tree's arrays, in the order of its leaves."""
  total = hashlib.sha256()
  for leaf in jax.tree.leaves(tree):
    array = np.asarray(leaf)
    total.update(f"{array.dtype}{array.shape}".encode())
    total.update(array.tobytes())
  return total.hexdigest()


class Keeper:
  """Keeps the newest checkpoint of a run: its state and the history so far."""

  def __init__(self, folder: pathlib.Path, options: Options):
    self._epochs, self._steps = options.checkpoint_every, options.checkpoint_steps
    self._keep = options.keep_checkpoints
    self._folder = folder.absolute() / "checkpoints"
    self._served = self._folder.with_name("checkpoints-served")
    shutil.rmtree(self._served, ignore_errors=True)  # left by a stop in finish()
    self._manager = ocp.CheckpointManager(
        self._folder,
        options=ocp.CheckpointManagerOptions(
            max_to_keep=1,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
        ),
    )

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self._manager.close()

  def restore(self, state: Any) -> tuple[Any, list[dict[str, Any]]]:
    """The newest (state, history); the given state and no history without one."""
    step = self._manager.latest_step()
    if step is None:
      return state, []
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    kept = self._manager.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), history=ocp.args.JsonRestore()
        ),
    )
    return kept["state"], kept["history"]

  def is_due(self, step: int, steps: int) -> bool:
    """Whether a checkpoint is due inside an epoch."""
    return bool(self._steps) and step % self._steps == 0 and step % steps != 0

  def save(self, step: int, state: Any, history: Any) -> None:
    self._manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), history=ocp.args.JsonSave(history)
        ),
    )

  def save_epoch(self, epoch, step, state, history, last: bool) -> None:
    """After an epoch, if it is due."""
    if self._epochs and (last or epoch % self._epochs == 0):
      self.save(step, state, history)

  def finish(self) -> None:
    """The run is done and its record written: its checkpoint has served."""
    self._manager.wait_until_finished()
    if not self._keep:
      self._manager.close()
      # A removal that is stopped half-way must leave no half of a checkpoint.
      self._folder.rename(self._served)
      shutil.rmtree(self._served, ignore_errors=True)
