"""Whether a run's radius was right, from what its steps said of themselves."""

from __future__ import annotations

from collections.abc import Sequence
import math
from typing import NamedTuple

import jax
import numpy as np

from asam_jax import _arguments
from asam_jax import _info

# Chosen on the digits MLP and judged on the CNN, see docs/radius_gauge.md.
_TOO_SMALL = 0.93  # the cosine above which the radius changes little
_TOO_LARGE = 0.70  # the cosine below which it harms
_FALLEN = 0.02  # a collapsed run loses less than this share of the loss at chance
_FEWEST = 8


class RadiusVerdict(NamedTuple):
  """What :func:`radius_verdict` found; it prints as one line.

  Attributes:
    verdict: ``"too small"``, ``"about right"``, ``"too large"`` or ``"collapsed"``.
    cosine: of the clean and the perturbed gradient.
    linearity: gap / predicted gap.
    rise: sqrt(L(w + epsilon)) - sqrt(L(w)).
    radius: ||T_w^{-1} epsilon||_p, which is rho.
    value: the loss L(w).
    chance: the loss of a model that has learned nothing.
  """

  verdict: str
  cosine: float
  linearity: float
  rise: float
  radius: float
  value: float
  chance: float

  def __str__(self) -> str:
    return (
        f"radius {self.radius:.3g} {self.verdict}: cosine {self.cosine:.2f} (right from"
        f" {_TOO_LARGE:.2f} to {_TOO_SMALL:.2f}), linearity {self.linearity:.2f}, rise"
        f" {self.rise:.3f}, loss {self.chance:.3g} -> {self.value:.3g}"
    )


def radius_verdict(
    infos: Sequence[_info.AscentInfo] | _info.AscentInfo, chance: float | None = None
) -> RadiusVerdict:
  """Whether the radius of a run is too small, right or too large, in one line.

  A radius is too small if the gradients at w and at w + epsilon are nearly the same: a
  cosine above 0.93, where ASAM does little more than its base optimizer. It is too
  large if they have little to do with each other: a cosine below 0.7. Beyond that the
  model collapses: it never leaves the plateau at which all its outputs are alike. There
  the cosine is high again, so that only the loss tells, which has not fallen by 2 %.
  ``docs/radius_gauge.md`` shows runs of each kind, and how often this is right. The
  bounds are of networks without batch norm that come to learn their training set by
  heart; where augmentation keeps them from it, tuned radii have cosines above 0.93.

  The numbers are medians over the last quarter of the infos, so give those of the whole
  run so far: of every step, or of every k-th.

  Args:
    infos: at least 8 :class:`AscentInfo` in the order of the steps, of
      ``value_and_grad(..., with_info=True)`` or of an optimizer's state; or one whose
      entries are arrays over the steps, as ``lax.scan`` gives.
    chance: the loss of a model that has learned nothing: log(classes) for a cross
      entropy. By default the loss of the first infos (a fiftieth of them), a rough
      guess where training starts from nothing, and wrong where you fine-tune.

  Returns:
    A :class:`RadiusVerdict` with the verdict and the numbers, which prints as a line.

  Raises:
    TypeError: if infos are no such infos or are traced, or chance is no number.
    ValueError: for fewer than 8 infos, entries of different sizes, or a chance that is
      not finite.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> import asam_jax
    >>> fun = asam_jax.value_and_grad(
    ...     lambda w: jnp.mean(jnp.log(1 + w**2)), rho=0.5, with_info=True)
    >>> w, infos = jnp.array([1.0, -2.0, 3.0]), []
    >>> for _ in range(40):
    ...   value, grads, info = fun(w)
    ...   infos.append(info)
    ...   w = w - 0.2 * grads
    >>> verdict = asam_jax.radius_verdict(infos)
    >>> print(verdict.verdict, f"{verdict.cosine:.2f} {verdict.linearity:.2f}")
    too small 0.99 0.88
  """
  entries = _stacked(infos)
  count = entries["value"].size
  if chance is None:
    at_start = float(np.median(entries["value"][: max(1, count // 50)]))
  else:
    at_start = float(_arguments.scalar("chance", chance, low=-math.inf))
  late = {
      name: float(np.median(x[-max(1, count // 4):])) for name, x in entries.items()
  }
  # Not so if one of the two is NaN.
  has_learned = late["value"] < at_start - _FALLEN * abs(at_start)
  if not has_learned or math.isnan(late["cosine"]):
    verdict = "collapsed"
  elif late["cosine"] < _TOO_LARGE:
    verdict = "too large"
  else:
    verdict = "too small" if late["cosine"] > _TOO_SMALL else "about right"
  shown = {name: late[name] for name in RadiusVerdict._fields if name in late}
  return RadiusVerdict(verdict, chance=at_start, **shown)


def _stacked(
    infos: Sequence[_info.AscentInfo] | _info.AscentInfo,
) -> dict[str, np.ndarray]:
  """Each entry of the info over the steps, checked."""
  if isinstance(infos, _info.AscentInfo):
    each = [infos]
  elif isinstance(infos, (list, tuple)):
    each = list(infos)
  else:
    raise TypeError(
        f"infos={infos!r} must be a list of asam_jax.AscentInfo, or one with arrays."
    )
  for info in each:
    if not isinstance(info, _info.AscentInfo):
      raise TypeError(
          f"infos has {type(info).__name__} among its entries; give the AscentInfo that"
          " value_and_grad(..., with_info=True) returns, or the one in the state of"
          " adaptive_sam(..., with_info=True)."
      )
    for name, x in zip(info._fields, info, strict=True):
      _arguments.arrays(f"infos: {name}", x)
      if not _arguments.is_concrete(x):
        raise TypeError(
            f"infos: {name} is traced; return the infos from jit, and ask outside."
        )
  columns = [
      np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in column])
      for column in zip(*jax.device_get(each), strict=True)
  ]
  sizes = {column.size for column in columns}
  if len(sizes) != 1 or min(sizes) < _FEWEST:
    raise ValueError(
        f"infos has {sorted(sizes)} steps; give at least {_FEWEST} of a run, the same"
        " number for each entry."
    )
  return dict(zip(_info.AscentInfo._fields, columns, strict=True))
