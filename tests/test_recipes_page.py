"""The page of recipes: its code runs, and gives what the equations give."""

from pathlib import Path
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import asam_jax
from tests import problems

PAGE = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
CODE = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def page():
  """The names that the page's code leaves, one block after the other."""
  assert len(CODE) > 4
  names = {}
  for number, code in enumerate(CODE):
    exec(compile(code, f"recipes.md, block {number}", "exec"), names)
  return names


def test_the_weighted_mean(page):
  start, gradient = page["start"], page["gradient"]
  clean = gradient(start)
  perturbed = gradient(problems.oracle_point(start, clean, 0.5))
  alpha = 0.8 / (1 - 0.8)
  expected = jax.tree.map(
      lambda g, h: -0.05 * ((1 - alpha) * g + alpha * h), clean, perturbed)
  chex.assert_trees_all_close(page["wsam_updates"], expected, rtol=1e-3, atol=1e-6)


def test_the_averages_are_those_of_the_iterates(page):
  iterates = page["iterates"]
  swa = jax.tree.map(lambda *ws: np.mean(np.float64(ws), 0), *iterates[20:])
  chex.assert_trees_all_close(page["swa"], swa, rtol=1e-4, atol=1e-6)
  ema = page["start"]
  for w in iterates:
    ema = jax.tree.map(lambda a, b: 0.9 * np.float64(a) + 0.1 * b, ema, w)
  chex.assert_trees_all_close(page["ema"], ema, rtol=1e-4, atol=1e-6)
  assert page["averaging_step"]._cache_size() == 1


def test_averaging_leaves_training_alone(page):
  w, gradient = page["start"], page["gradient"]
  for step in range(22):
    grads = gradient(w)
    if step >= 20:
      grads = gradient(problems.oracle_point(w, grads, 0.5))
    w = jax.tree.map(lambda x, g: x - 0.1 * g, w, grads)
  chex.assert_trees_all_close(page["iterates"][21], w, rtol=1e-4, atol=1e-6)


def test_of_one_gradient_methods_the_clean_parameters_are_averaged(page):
  tx = asam_jax.momentum_sam(page["optax"].sgd(0.1), 0.5)
  params, state = page["start"], tx.init(page["start"])
  for _ in range(2):
    updates, state = tx.update(page["gradient"](params), state, params)
    params = page["optax"].apply_updates(params, updates)
  moved = jax.tree.map(
      lambda a, b: float(jnp.abs(a - b).max()), params, asam_jax.eval_params(state))
  assert max(jax.tree.leaves(moved)) > 1e-3


def test_lora_learns_and_is_asam_of_the_adapters(page):
  values = page["lora_values"]
  assert values[-1] < 0.7 * values[0]
  adapters, args = page["tuned"], (page["start"], page["x"], page["y"])
  clean = jax.grad(page["lora_loss"])(adapters, *args)
  point = problems.oracle_point(adapters, clean, 0.5)
  expected = jax.grad(page["lora_loss"])(point, *args)
  got = asam_jax.grad(page["lora_loss"], rho=0.5)(adapters, *args)
  chex.assert_trees_all_close(got, expected, rtol=1e-3, atol=1e-6)


def test_asam_sees_no_scale_in_adapters_and_sam_does(page):
  args = (page["start"], page["x"], page["y"])

  def gap(scale, **options):
    adapters = {"a": scale * page["tuned"]["a"], "b": page["tuned"]["b"] / scale}
    fun = asam_jax.value_and_grad(
        page["lora_loss"], rho=0.1, eta=0.0, with_info=True, **options)
    return float(fun(adapters, *args)[-1].gap)

  assert gap(1.0) > 0
  assert gap(4.0) == pytest.approx(gap(1.0), rel=1e-3)
  assert abs(gap(4.0, normalization="none") / gap(1.0, normalization="none") - 1) > 0.2


def test_the_first_perturbation_of_b_is_of_the_size_of_eta(page):
  adapters, args = page["adapters"], (page["start"], page["x"], page["y"])
  tx = asam_jax.ascent(rho=0.5)
  grads = jax.grad(page["lora_loss"])(adapters, *args)
  epsilon, _ = tx.update(grads, tx.init(adapters), adapters)
  assert 0 < jnp.abs(epsilon["b"]).max() <= 0.5 * 0.01


def test_the_meta_gradient_is_that_of_finite_differences(page):
  with problems.enable_x64(True):
    double = lambda tree: jax.tree.map(  # noqa: E731
        lambda x: jnp.asarray(np.float64(x)), tree)
    start, support, query = map(double, (page["start"], page["support"], page["query"]))
    rng = np.random.default_rng(1)
    along = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape)), start)
    meta = jax.jit(lambda t: page["meta_loss"](
        jax.tree.map(lambda w, d: w + t * d, start, along), support, query,
        page["full"]))
    h = 1e-5
    difference = (meta(h) - meta(-h)) / (2 * h)
    grads = jax.grad(page["meta_loss"])(start, support, query, page["full"])
    slope = sum(jnp.sum(g * d) for g, d in zip(
        jax.tree.leaves(grads), jax.tree.leaves(along), strict=True))
    assert abs(slope) > 1e-3
    np.testing.assert_allclose(slope, difference, rtol=1e-6)
  chex.assert_trees_all_close(
      page["meta_gradients"]["full"], grads, rtol=1e-3, atol=1e-5)


def test_the_stopped_meta_gradient_takes_the_perturbation_for_a_constant(page):
  # One inner step, with the perturbation found outside the derivative.
  loss, start = page["loss"], page["start"]
  support, query = page["support"], page["query"]
  clean = jax.grad(loss)(start, *support)
  epsilon = jax.tree.map(
      lambda a, b: a - b, problems.oracle_point(start, clean, 0.1), start)

  def by_hand(w):
    point = jax.tree.map(jnp.add, w, epsilon)
    grads = jax.grad(loss)(point, *support)
    return loss(jax.tree.map(lambda x, g: x - 0.1 * g, w, grads), *query)

  def one_step(w, ascent):
    return loss(page["adapt"](w, support, ascent, steps=1), *query)

  got = jax.grad(one_step)(start, page["stopped"])
  chex.assert_trees_all_close(got, jax.grad(by_hand)(start), rtol=1e-3, atol=1e-5)
  full = jax.grad(one_step)(start, page["full"])
  assert max(jax.tree.leaves(jax.tree.map(
      lambda a, b: float(jnp.abs(a - b).max()), got, full))) > 1e-5


def test_links():
  for link in re.findall(r"\]\(([^)#:]+)\)", PAGE):
    assert (Path(__file__).parent.parent / "docs" / link).exists()
