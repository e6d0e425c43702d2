# ruff: noqa: F722  (the shapes in jaxtyping's annotations)
"""m-sharpness: a measure over a data set, batch by batch."""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
from jax import tree_util as jtu
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
import numpy as np
import optax

from asam_jax import _arguments
from asam_jax.sharpness import _worst_case


class MSharpness(NamedTuple):
  """What :func:`m_sharpness` measured.

  Attributes:
    value: the mean over the batches, weighted by their size, a scalar.
    standard_error: its standard error over the batches, a scalar; NaN for one batch.
    values: the measure of each batch, ``[batches]``.
    sizes: the number of examples in each, ``[batches]``; all m but perhaps the last.
  """

  value: Float[Array, ""]
  standard_error: Float[Array, ""]
  values: Float[Array, " batches"]
  sizes: Float[Array, " batches"]


def m_sharpness(
    loss: Callable[[Any, Any], Any],
    m: int = 128,
    *,
    measure: Callable[..., Any] = _worst_case.worst_case,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = False,
    **options: Any,
) -> Callable[..., MSharpness]:
  r"""A function that measures sharpness over a data set in batches of m examples.

  .. math:: \frac1n \sum_B |B| \max_{\|T_w^{-1}\epsilon\|_p \le \rho}
    L_B(w + \epsilon) - L_B(w)

  Each batch has its own maximum, as in m-sharpness. Every example counts: if m does
  not divide n, the last batch is smaller and weighs less. The measure is compiled
  once (and once more for a smaller last batch), in the first call; keep the
  returned function and call it again, during training for example. Only one batch
  is on a device at a time.

  Args:
    loss: ``loss(params, batch) -> scalar``, the mean over the batch.
    m: the number of examples in a batch.
    measure: :func:`worst_case`, :func:`average_case`, :func:`hessian_trace`, or any
      function ``(loss, params, key=..., **options)`` whose result has a scalar
      ``value``.
    mesh: devices to share the batches among, one batch each: a one-dimensional
      ``jax.sharding.Mesh``. The values are those of one device. None: no sharing.
    progress: whether to show a progress bar over the batches (tqdm).
    **options: further arguments of the measure: rho, geometry, steps, ...

  Returns:
    ``f(params, data, key=None) -> MSharpness``. ``data`` is a pytree of arrays with
    a common leading axis of n examples, on the host or on a device. Batch i gets
    the key ``fold_in(key, i)``; key is ``jax.random.key(0)`` if not given.

  Raises:
    ValueError: if m is below 1, the mesh has more than one axis, or (in the call) the
      data are empty or their leading axes differ.
    TypeError: if m is no int, loss or measure no function, mesh no mesh, or (in the
      call) key is no random key, or the measure's result has no scalar ``value``.

  Examples:
    >>> import jax.numpy as jnp
    >>> import asam_jax
    >>> from asam_jax import sharpness
    >>> loss = lambda w, batch: jnp.mean((batch["x"] * w - batch["y"]) ** 2)
    >>> data = {"x": jnp.arange(10.0), "y": 2 * jnp.arange(10.0)}
    >>> measure = sharpness.m_sharpness(
    ...     loss, m=4, rho=0.1, geometry=asam_jax.Geometry(eta=0.0))
    >>> result = measure(jnp.array(2.0), data)
    >>> print(f"{result.value:.2f}", result.sizes)
    1.14 [4. 4. 2.]

  References:
    Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
    Generalization <https://arxiv.org/abs/2010.01412>`_, 2021
  """
  m = _arguments.count("m", m, 1)
  _arguments.function("loss", loss, "of the parameters and a batch")
  _arguments.function("measure", measure, "(loss, params, key=..., **options)")
  _arguments.flag("progress", progress)
  if mesh is not None:
    _arguments.instance("mesh", mesh, jax.sharding.Mesh)
  if mesh is not None and len(mesh.axis_names) != 1:
    raise ValueError(f"mesh={mesh} must have one axis; flatten it to one.")

  def of_batch(params, batch, key):
    result = measure(lambda w: loss(w, batch), params, key=key, **options)
    if getattr(getattr(result, "value", None), "shape", None) != ():
      raise TypeError(
          f"measure={measure!r} returned {result!r}; its result must have a scalar"
          " attribute value."
      )
    return result.value

  single = jax.jit(of_batch)
  shared = single if mesh is None else jax.jit(_share(of_batch, mesh))
  lanes = 1 if mesh is None else mesh.size

  def over_data(params, data, key=None) -> MSharpness:
    _arguments.arrays("params", params)
    n = _length(data)
    key = _arguments.random_key(key)
    whole = n // m
    # Rounds of one batch per device; what is left over goes one by one.
    rounds = [(i, lanes) for i in range(0, whole - lanes + 1, lanes)]
    rounds += [(i, 1) for i in range(len(rounds) * lanes, math.ceil(n / m))]
    values = []
    for first, width in _bar(rounds, progress):
      batch = _rows(data, first * m, (first + width) * m)
      keys = jax.vmap(jax.random.fold_in, (None, 0))(
          key, jnp.arange(first, first + width)
      )
      if width == 1:
        values.append(single(params, batch, keys[0])[None])
      else:
        batch = jtu.tree_map(lambda x: x.reshape(-1, m, *x.shape[1:]), batch)
        values.append(shared(params, batch, keys))
      if progress:
        values[-1].block_until_ready()  # or the bar would run ahead of the work
    sizes = np.full(math.ceil(n / m), m)
    sizes[-1] = n - m * (len(sizes) - 1)
    return _summary(np.concatenate([np.asarray(v) for v in values]), sizes)

  return over_data


def _share(of_batch, mesh: jax.sharding.Mesh):
  """``of_batch`` over a leading axis, one entry per device, without traffic."""
  (axis,) = mesh.axis_names
  spec = jax.sharding.PartitionSpec

  def local(params, batch, keys):
    batch = jtu.tree_map(lambda x: x[0], batch)
    return of_batch(params, batch, keys[0])[None]

  specs = {
      "mesh": mesh,
      "in_specs": (spec(), spec(axis), spec(axis)),
      "out_specs": spec(axis),
  }
  # Unchecked: the gradient with respect to the replicated params is local, too.
  if hasattr(jax, "shard_map"):
    return jax.shard_map(local, check_vma=False, **specs)
  from jax.experimental import shard_map  # JAX before 0.6

  return shard_map.shard_map(local, check_rep=False, **specs)


def _length(data: Any) -> int:
  shapes = [getattr(x, "shape", ()) for x in jtu.tree_leaves(data)]
  lengths = {shape[0] if shape else 0 for shape in shapes}
  if len(lengths) != 1 or 0 in lengths:
    raise ValueError(
        f"data have arrays of shapes {shapes}; they must share a leading axis of at"
        " least one example."
    )
  return lengths.pop()


def _rows(data: Any, start: int, stop: int) -> Any:
  return jtu.tree_map(lambda x: x[start:stop], data)


def _bar(rounds, progress: bool):
  if not progress:
    return rounds
  import tqdm  # an extra: only those who want the bar need it

  return tqdm.tqdm(rounds, desc="m-sharpness", unit="batch")


def _summary(values: np.ndarray, sizes: np.ndarray) -> MSharpness:
  weights = sizes / sizes.sum()
  mean = np.sum(weights * values)
  count = len(values)
  error = np.nan
  if count > 1:  # of a weighted mean, by the ratio estimator
    error = np.sqrt(np.sum((weights * (values - mean)) ** 2) * count / (count - 1))
  dtype = values.dtype
  return MSharpness(
      jnp.asarray(mean, dtype),
      jnp.asarray(error, dtype),
      jnp.asarray(values),
      jnp.asarray(sizes, dtype),
  )


def classification_loss(
    predict: Callable[[Any, Any], Any], *, normalize_logits: bool = False
) -> Callable[[Any, Any], Any]:
  r"""The mean cross-entropy as ``loss(params, (inputs, labels))``.

  With ``normalize_logits`` the logits z of each example are divided by their
  standard deviation over the K classes,

  .. math:: \tilde z = z \Big/ \sqrt{\tfrac1K \sum_i (z_i - \bar z)^2}

  which takes the scale of the last layer, and so plain confidence, out of the
  measure. Constant logits stay as they are.

  Args:
    predict: ``predict(params, inputs) -> logits`` of shape ``[m, K]``, in
      evaluation mode.
    normalize_logits: whether to divide by that standard deviation.

  Returns:
    A function of params and a pair of inputs ``[m, ...]`` and integer labels
    ``[m]``, for :func:`m_sharpness`. Labels outside ``[0, K)`` raise; where they are
    traced, as under ``jit`` and in :func:`m_sharpness`, they make the loss NaN.

  Raises:
    TypeError: if predict is no function or normalize_logits no bool; or (in the call)
      the batch is no pair, labels are no integers, or logits have no axis.
    ValueError: (in the call) if labels have not one entry per row of the logits, or
      lie outside ``[0, K)``.

  Examples:
    >>> import jax.numpy as jnp
    >>> from asam_jax import sharpness
    >>> loss = sharpness.classification_loss(
    ...     lambda w, x: x @ w, normalize_logits=True)
    >>> w, batch = jnp.eye(2), (jnp.eye(2), jnp.array([0, 1]))
    >>> print(f"{loss(w, batch):.4f} {loss(10 * w, batch):.4f}")
    0.1269 0.1269

  References:
    Andriushchenko et al., `A modern look at the relationship between sharpness and
    generalization <https://arxiv.org/abs/2302.07011>`_, 2023
  """
  _arguments.function("predict", predict, "of the parameters and inputs")
  _arguments.flag("normalize_logits", normalize_logits)

  def loss(params, batch):
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
      raise TypeError(f"batch={batch!r} must be a pair (inputs, labels).")
    inputs, labels = batch
    logits = jnp.asarray(predict(params, inputs))
    known = _known_labels(labels, logits)
    if normalize_logits:
      variance = jnp.var(logits, axis=-1, keepdims=True)
      logits = logits / jnp.sqrt(jnp.where(variance > 0, variance, 1))
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(jnp.where(known, losses, jnp.nan))

  return loss


def _known_labels(labels: Any, logits: Array) -> Array:
  """Which labels are classes, after a check that there is one per row of logits."""
  dtype = getattr(labels, "dtype", None)
  if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
    raise TypeError(f"labels={labels!r} must be an array of integers, one per example.")
  if logits.ndim == 0:
    raise TypeError("predict returned one number; it must return logits [m, K].")
  *rows, classes = logits.shape
  if labels.shape != tuple(rows):
    raise ValueError(
        f"labels have shape {labels.shape}, but the logits have {logits.shape}; give"
        f" one label per row, an array of shape {tuple(rows)}."
    )
  known_now = _arguments.is_concrete(labels)
  if known_now:  # in a trace, JAX would trace the comparison of known labels too
    labels = np.asarray(labels)
  known = (labels >= 0) & (labels < classes)
  if known_now and not np.all(known):
    raise ValueError(
        f"labels={labels!r} must be in [0, {classes}), one of the {classes} classes of"
        " the logits; leave examples without a class out."
    )
  return jnp.asarray(known)
