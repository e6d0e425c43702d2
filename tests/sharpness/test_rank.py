"""Rank correlation against counts by hand and its definition."""

import itertools
import math

import numpy as np
import pytest

from asam_jax import sharpness


def grid(seed=0):
  rng = np.random.default_rng(seed)
  rows = list(itertools.product([1, 2, 4], [0.1, 0.2, 0.4], [0, 1]))
  columns = np.array(rows).T
  settings: dict[str, np.ndarray] = {
      name: columns[i] for i, name in enumerate(("batch", "rate", "decay"))}
  return rng.normal(size=len(rows)), rng.normal(size=len(rows)), settings


def count_tau(x, y):
  """Concordant minus discordant pairs over all pairs, for distinct values."""
  signs = [np.sign(x[i] - x[j]) * np.sign(y[i] - y[j])
           for i, j in itertools.combinations(range(len(x)), 2)]
  return np.mean(signs)


def test_against_pair_counts():
  measure, gap, settings = grid()
  result = sharpness.rank_correlation(measure, gap, settings)
  assert math.isclose(result.tau.value, count_tau(measure, gap))
  for name in settings:
    others = [k for k in settings if k != name]
    groups = {}
    for i in range(len(gap)):
      groups.setdefault(tuple(settings[k][i] for k in others), []).append(i)
    taus = [count_tau(measure[g], gap[g]) for g in groups.values()]
    assert math.isclose(result.psi[name].value, np.mean(taus), abs_tol=1e-12)
    assert result.groups[name] == len(groups)
  values = [psi.value for psi in result.psi.values()]
  assert math.isclose(result.mean_psi.value, np.mean(values))


def test_a_measure_of_one_hyperparameter():
  """Granulation tells which hyper-parameter a correlation comes from."""
  _, _, settings = grid()
  gap = settings["rate"] + 1e-3 * settings["batch"]
  result = sharpness.rank_correlation(settings["rate"], gap, settings)
  assert result.psi["rate"].value == 1
  # Constant along the others: no tau, and said so.
  assert result.groups == {"batch": 0, "rate": 6, "decay": 0}
  assert math.isnan(result.psi["batch"].value)
  assert math.isnan(result.mean_psi.value)


def test_seeds_are_not_compared_within_a_group():
  measure, gap, settings = grid()
  doubled = {k: np.tile(v, 2) for k, v in settings.items()}
  doubled["seed"] = np.repeat([0, 1], len(gap))
  twice = sharpness.rank_correlation(
      np.tile(measure, 2), np.tile(gap, 2), doubled, along=list(settings))
  once = sharpness.rank_correlation(measure, gap, settings)
  assert list(twice.psi) == list(settings)
  for name in settings:
    assert math.isclose(twice.psi[name].value, once.psi[name].value, abs_tol=1e-12)


def test_intervals_cover_the_truth():
  """Of 40 samples of a population, about 38 intervals hold its tau."""
  rng = np.random.default_rng(0)
  truth = 2 / np.pi * np.arcsin(0.6)  # tau of a normal pair with correlation 0.6
  hits = 0
  for _ in range(40):
    x, z = rng.normal(size=(2, 60))
    y = 0.6 * x + 0.8 * z
    tau = sharpness.rank_correlation(x, y, resamples=100).tau
    assert tau.low <= tau.value <= tau.high
    hits += tau.low <= truth <= tau.high
  assert hits >= 33


def test_seed_decides_the_intervals():
  measure, gap, settings = grid()
  first, same, other = (
      sharpness.rank_correlation(measure, gap, settings, seed=s) for s in (0, 0, 1))
  assert first == same
  assert first.tau != other.tau


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([1.0], [1.0]), {}, "at least two"),
        (([1.0, np.nan], [1.0, 2.0]), {}, "measure"),
        (([1.0, 2.0], [1.0, 2.0, 3.0]), {}, "gap has shape"),
        (([1.0, 2.0], [1.0, 2.0], {"lr": [1.0]}), {}, "lr'] has shape"),
        (([1.0, 2.0], [1.0, 2.0]), {"along": ["wd"]}, "'wd'"),
        (([1.0, 2.0], [1.0, 2.0]), {"level": 95}, "level=95"),
    ],
)
def test_bad_values(arguments, options, message):
  with pytest.raises(ValueError, match=message):
    sharpness.rank_correlation(*arguments, **options)
