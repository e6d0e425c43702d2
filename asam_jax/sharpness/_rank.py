"""Rank correlation between a measure and the generalization gap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from scipy import stats

from asam_jax import _arguments


class Estimate(NamedTuple):
  """A coefficient and its bootstrap interval.

  Attributes:
    value: the coefficient, in [-1, 1].
    low: the lower end of the interval.
    high: its upper end.
  """

  value: float
  low: float
  high: float


class RankCorrelation(NamedTuple):
  """What :func:`rank_correlation` computed.

  Attributes:
    tau: Kendall's tau over all networks.
    psi: the granulated coefficient of each hyper-parameter.
    mean_psi: Psi, the mean of these; NaN without settings.
    groups: for each hyper-parameter, the number of groups its psi averages.
  """

  tau: Estimate
  psi: dict[str, Estimate]
  mean_psi: Estimate
  groups: dict[str, int]


def rank_correlation(
    measure: Any,
    gap: Any,
    settings: Mapping[str, Any] | None = None,
    *,
    along: Sequence[str] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> RankCorrelation:
  r"""Kendall's tau, and the granulated psi of Jiang et al., with intervals.

  .. math::

    \psi_i = \frac1{m_i} \sum_{\text{settings of the others}}
      \tau(\text{networks that differ in } \theta_i \text{ alone}), \qquad
    \Psi = \frac1n \sum_i \psi_i

  tau is SciPy's tau-b. Groups of one network, and those where the measure or the
  gap is constant, have no tau and are left out.

  The intervals are percentiles of a bootstrap: over networks for tau, over groups
  for psi. For Psi the groups of each hyper-parameter are drawn on their own, as if
  the psi were independent, though they share their networks.

  Args:
    measure: the measure of each network, ``[networks]``, finite.
    gap: its generalization gap, likewise.
    settings: for each hyper-parameter, its value in each network, ``[networks]``.
    along: the hyper-parameters that get a psi; by default all. Leave out, say, the
      seed: networks of different seeds are then never compared in a group.
    level: the probability that the intervals hold, in (0, 1).
    resamples: the number of bootstrap samples.
    seed: the seed of the bootstrap.

  Returns:
    A :class:`RankCorrelation`.

  Raises:
    ValueError: if lengths differ, values are not finite, fewer than two networks
      are given, ``along`` names no setting, level is outside (0, 1), resamples is
      below 1, or seed below 0.
    TypeError: if measure or gap are no real numbers, settings is no mapping, along no
      sequence of names, level no number, or resamples or seed no int.

  Examples:
    >>> from asam_jax import sharpness
    >>> result = sharpness.rank_correlation(
    ...     [1, 2, 3, 4], [1, 2, 4, 3], {"lr": [1, 1, 2, 2], "wd": [1, 2, 1, 2]})
    >>> print(f"{result.tau.value:.3f}", result.psi["lr"].value, result.groups)
    0.667 1.0 {'lr': 2, 'wd': 2}

  References:
    Jiang et al., `Fantastic Generalization Measures and Where to Find Them
    <https://arxiv.org/abs/1912.02178>`_, 2020
  """
  measure, gap = _vector("measure", measure), _vector("gap", gap)
  columns = _columns(settings)
  along = list(columns) if along is None else _names(along)
  _check(measure, gap, columns, along, level)
  resamples = _arguments.count("resamples", resamples)
  seed = _arguments.count("seed", seed, 0)

  rng = np.random.default_rng(seed)
  n = len(measure)
  draws = [_tau(measure[i], gap[i]) for i in rng.integers(n, size=(resamples, n))]
  tau = _estimate(_tau(measure, gap), np.array(draws), level)

  psi, groups, all_draws = {}, {}, []
  for name in along:
    taus = _group_taus(measure, gap, columns, name)
    groups[name] = len(taus)
    if not len(taus):
      psi[name] = Estimate(np.nan, np.nan, np.nan)
      continue
    picks = rng.integers(len(taus), size=(resamples, len(taus)))
    all_draws.append(taus[picks].mean(axis=1))
    psi[name] = _estimate(taus.mean(), all_draws[-1], level)
  values = [estimate.value for estimate in psi.values()]
  if all_draws and not np.isnan(values).any():
    mean = _estimate(np.mean(values), np.mean(all_draws, axis=0), level)
  else:
    mean = Estimate(np.nan, np.nan, np.nan)
  return RankCorrelation(tau, psi, mean, groups)


def _vector(argument: str, values: Any) -> np.ndarray:
  numbers = np.asarray(values)
  is_real = jnp.issubdtype(numbers.dtype, jnp.floating)
  if not (is_real or jnp.issubdtype(numbers.dtype, jnp.integer)):
    raise TypeError(f"{argument}={values!r} must be a vector of real numbers.")
  values = numbers.astype(np.float64)
  if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
    raise ValueError(
        f"{argument}={values!r} must be a vector of at least two finite numbers;"
        " leave out the networks without one."
    )
  return values


def _columns(settings: Any) -> dict[str, np.ndarray]:
  if settings is None:
    return {}
  if not isinstance(settings, Mapping):
    raise TypeError(
        f"settings={settings!r} must be a dict from each hyper-parameter to its values."
    )
  return {name: np.asarray(value) for name, value in settings.items()}


def _names(along: Any) -> list[str]:
  if isinstance(along, str) or not isinstance(along, Sequence):
    raise TypeError(f"along={along!r} must be a list of names of settings.")
  return list(along)


def _check(measure, gap, columns, along, level) -> None:
  named = {f"settings[{name!r}]": column for name, column in columns.items()}
  for name, column in {"gap": gap, **named}.items():
    if column.shape != measure.shape:
      raise ValueError(
          f"{name} has shape {column.shape}, but measure has {measure.shape}; give"
          " one value per network."
      )
  for name in along:
    if name not in columns:
      raise ValueError(f"along={along!r}: {name!r} is none of {list(columns)}.")
  _arguments.scalar("level", level)
  if not 0 < level < 1:
    raise ValueError(f"level={level!r} must be in (0, 1), such as 0.95.")


def _tau(x: np.ndarray, y: np.ndarray) -> float:
  if np.ptp(x) == 0 or np.ptp(y) == 0:
    return np.nan
  result: Any = stats.kendalltau(x, y)
  return float(result.statistic)


def _group_taus(measure, gap, columns, name: str) -> np.ndarray:
  """Kendall's tau in each group of networks that share all settings but ``name``."""
  others = [column for other, column in columns.items() if other != name]
  members: dict[tuple, list[int]] = {}
  for i in range(len(measure)):
    members.setdefault(tuple(c[i].item() for c in others), []).append(i)
  taus = [_tau(measure[g], gap[g]) for g in members.values() if len(g) > 1]
  return np.array([tau for tau in taus if not np.isnan(tau)])


def _estimate(value: Any, draws: np.ndarray, level: float) -> Estimate:
  tails = [(1 - level) / 2, (1 + level) / 2]
  low, high = np.nanquantile(draws, tails) if not np.isnan(draws).all() else (
      np.nan, np.nan)
  return Estimate(float(value), float(low), float(high))
