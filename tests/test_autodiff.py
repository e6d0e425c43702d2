"""The function transformations: JAX's signatures, and the same gradient."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asam_jax
from tests import problems

W = {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.array([0.1, -0.2])}
X = jnp.array([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]])


def loss(w, x, scale=1.0):
  return scale * jnp.mean(jnp.tanh(x @ w["kernel"] + w["bias"]) ** 2)


def loss_and_mean(w, x, scale=1.0):
  return loss(w, x, scale), {"mean": w["kernel"].mean()}


@pytest.mark.parametrize("p", [1, 1.5, 2, math.inf])
@pytest.mark.parametrize("normalization", ["elementwise", "filterwise", "none"])
def test_both_doors_agree(p, normalization):
  options = {"normalization": normalization, "perturb": {"kernel": True, "bias": False}}
  fun = functools.partial(loss, x=X)
  tx = asam_jax.perturbed_gradient(asam_jax.ascent(0.3, 0.02, p, **options))
  expected, state = tx.update(jax.grad(fun)(W), tx.init(W), W, grad_fn=jax.grad(fun))
  value, grads, info = asam_jax.value_and_grad(
      fun, rho=0.3, eta=0.02, p=p, with_info=True, **options
  )(W)
  chex.assert_trees_all_equal(grads, expected)
  assert value == fun(W)
  assert info.predicted_gap == state.ascent.sharpness


def test_value_and_aux_are_of_the_clean_pass():
  transformed = asam_jax.value_and_grad(loss_and_mean, rho=0.5, has_aux=True)
  (value, aux), grads = transformed(W, X)
  assert value == loss(W, X)
  assert aux["mean"] == W["kernel"].mean()
  chex.assert_trees_all_equal(grads, asam_jax.value_and_grad(loss, rho=0.5)(W, X)[1])


def test_the_gradient_is_that_of_the_perturbed_point():
  grads = jax.grad(loss)(W, X)
  ts = [
      problems.oracle_factor(W["bias"], 0.01, "none"),
      problems.oracle_factor(W["kernel"], 0.01, "elementwise"),
  ]
  epsilon, sharpness = problems.oracle_perturbation(
      [grads["bias"], grads["kernel"]], ts, 0.5, 2
  )
  moved = {
      "bias": W["bias"] + jnp.asarray(epsilon[0], jnp.float32),
      "kernel": W["kernel"] + jnp.asarray(epsilon[1], jnp.float32),
  }
  value, got, info = asam_jax.value_and_grad(loss, with_info=True)(W, X)
  chex.assert_trees_all_close(got, jax.grad(loss)(moved, X), rtol=1e-5)
  np.testing.assert_allclose(info.value, value)
  np.testing.assert_allclose(info.perturbed_value, loss(moved, X), rtol=1e-6)
  np.testing.assert_allclose(info.gap, loss(moved, X) - value, rtol=1e-4)
  np.testing.assert_allclose(info.predicted_gap, sharpness, rtol=1e-5)


def test_gap_tends_to_the_first_order_sharpness():
  with problems.enable_x64(True):
    w, x = jax.tree.map(lambda a: a.astype(jnp.float64), (W, X))
    for rho in (1e-3, 1e-5):
      transformed = asam_jax.value_and_grad(loss, rho=rho, with_info=True)
      *_, info = jax.jit(transformed)(w, x)
      np.testing.assert_allclose(info.gap, info.predicted_gap, rtol=100 * rho)


@pytest.mark.parametrize("has_aux", [False, True])
@pytest.mark.parametrize("with_info", [False, True])
@pytest.mark.parametrize("argnums", [0, 1, (0,), (0, 1), [1, 0], -1])
def test_results_are_arranged_as_jax_does(has_aux, with_info, argnums):
  def fun(a, b):
    value = jnp.sum(a["x"] ** 3) * jnp.sum(b**2)
    return (value, "aux") if has_aux else value

  args = ({"x": jnp.array([1.0, 2.0])}, jnp.array([3.0]))
  options = {"argnums": argnums, "has_aux": has_aux}
  for ours, theirs in (
      (asam_jax.value_and_grad, jax.value_and_grad),
      (asam_jax.grad, jax.grad),
  ):
    expected = theirs(fun, **options)(*args)
    got = ours(fun, rho=0.0, with_info=with_info, **options)(*args)
    if with_info:
      is_pair = ours is asam_jax.value_and_grad or has_aux
      *got, info = got
      got = tuple(got) if is_pair else got[0]
      assert isinstance(info, asam_jax.AscentInfo)
      assert info.gap == 0
    chex.assert_trees_all_equal(
        jax.tree.map(lambda x: None if x == "aux" else x, got),
        jax.tree.map(lambda x: None if x == "aux" else x, expected),
    )


def test_several_arguments_share_one_norm():
  def fun(a, b):
    return jnp.sum(a**2) + jnp.sum(b**2)

  a, b = jnp.array([1.0]), jnp.array([2.0])
  grads = asam_jax.grad(fun, rho=0.5, eta=0.0, argnums=(0, 1))(a, b)
  (ea, eb), _ = problems.oracle_perturbation(
      [[2.0], [4.0]], [np.ones(1), 2 * np.ones(1)], 0.5, 2
  )
  np.testing.assert_allclose(grads[0], 2 * (1 + ea), rtol=1e-6)
  np.testing.assert_allclose(grads[1], 2 * (2 + eb), rtol=1e-6)


def test_keyword_arguments_reach_both_passes():
  got = asam_jax.value_and_grad(loss, rho=0.3)(W, x=X, scale=2.0)
  expected = asam_jax.value_and_grad(lambda w: loss(w, X, 2.0), rho=0.3)(W)
  chex.assert_trees_all_close(got, expected, rtol=1e-6)


def test_both_passes_see_the_same_dropout_mask():
  masks = []

  def noisy(w, key):
    mask = jax.random.bernoulli(key, 0.5, w.shape)
    jax.debug.callback(lambda m: masks.append(np.asarray(m)), mask)
    return jnp.sum(mask * w**2)

  asam_jax.grad(noisy, rho=0.1)(jnp.arange(1.0, 65.0), jax.random.key(0))
  jax.effects_barrier()
  assert len(masks) == 2
  np.testing.assert_array_equal(masks[0], masks[1])
  assert 0 < masks[0].sum() < 64


def test_fun_is_differentiated_twice_and_no_more():
  calls = []

  def counted(w):
    calls.append(1)
    return jnp.sum(w**2)

  asam_jax.value_and_grad(counted, rho=0.1, with_info=True)(jnp.ones(2))
  assert len(calls) == 2


def test_rho_zero_is_jax_bit_for_bit():
  got = jax.jit(asam_jax.value_and_grad(loss, rho=0.0))(W, X)
  chex.assert_trees_all_equal(got, jax.jit(jax.value_and_grad(loss))(W, X))


def test_rho_may_be_traced():
  schedule = optax.linear_schedule(0.1, 0.5, 4)

  @jax.jit
  def step(w, count):
    return asam_jax.grad(loss, rho=schedule(count))(w, X)

  for count in range(3):
    expected = asam_jax.grad(loss, rho=0.1 + 0.1 * count)(W, X)
    chex.assert_trees_all_close(step(W, jnp.asarray(count)), expected, rtol=1e-5)
  assert step._cache_size() == 1


def test_jit_vmap_and_scan():
  gradient = asam_jax.grad(loss, rho=0.3)
  expected = gradient(W, X)
  chex.assert_trees_all_close(jax.jit(gradient)(W, X), expected, rtol=1e-5)
  many = jax.tree.map(lambda w: np.stack([w, 2 * w]), W)
  got = jax.jit(jax.vmap(gradient, (0, None)))(many, X)
  chex.assert_trees_all_close(jax.tree.map(lambda g: g[0], got), expected, rtol=1e-5)
  _, scanned = jax.lax.scan(lambda c, _: (c, gradient(W, X)), None, length=2)
  chex.assert_trees_all_close(
      jax.tree.map(lambda g: g[1], scanned), expected, rtol=1e-5
  )


def test_name_and_docstring_are_the_functions_own():
  assert asam_jax.value_and_grad(loss).__name__ == "loss"
  assert asam_jax.grad(loss).__name__ == "loss"


def test_errors():
  with pytest.raises(TypeError, match=r"rho=.* is a schedule.*rho=schedule\(step\)"):
    asam_jax.value_and_grad(loss, rho=optax.constant_schedule(0.1))
  with pytest.raises(TypeError, match=r"eta=.* is a schedule"):
    asam_jax.grad(loss, rho=0.1, eta=optax.constant_schedule(0.1))
  with pytest.raises(ValueError, match="average_ascent=True with axis_name=None"):
    asam_jax.value_and_grad(loss, average_ascent=True)
  with pytest.raises(ValueError, match="rho=-1 must be a finite number"):
    asam_jax.grad(loss, rho=-1)


# Ascent chains and accumulation.


def link_gradient(ascent_tx, w):
  """What the Optax link makes of the same chain."""
  link = asam_jax.perturbed_gradient(ascent_tx)
  grad_fn = lambda w: jax.grad(loss)(w, X)  # noqa: E731
  return link.update(grad_fn(w), link.init(w), w, grad_fn=grad_fn)[0]


@pytest.mark.parametrize("make", [
    lambda: asam_jax.ascent(0.3, p=3),
    lambda: asam_jax.iterated(asam_jax.ascent(0.3), 3),
    lambda: optax.chain(asam_jax.ascent(0.3), asam_jax.stochastic_rounding(7)),
], ids=["ascent", "iterated", "stochastic rounding"])
def test_any_ascent_chain_without_a_state(make):
  for door in (asam_jax.grad, lambda *args, **kw: jax.jit(asam_jax.grad(*args, **kw))):
    got = door(loss, ascent=make())(W, X)
    chex.assert_trees_all_close(got, link_gradient(make(), W), rtol=1e-5)


def test_an_ascent_chain_needs_no_optimizer_state():
  for chain in (
      optax.chain(optax.ema(0.9), asam_jax.ascent(0.3)),
      optax.chain(asam_jax.subtract_ema(0.9), asam_jax.ascent(0.3)),
  ):
    with pytest.raises(ValueError, match="keeps a state between steps"):
      asam_jax.grad(loss, ascent=chain)(W, X)
  for schedule in ({"rho": optax.constant_schedule(0.1)}, {"eta": lambda n: 0.1}):
    with pytest.raises(TypeError, match="is a schedule, but a function transformation"):
      asam_jax.grad(loss, ascent=asam_jax.ascent(**schedule))(W, X)


def test_an_ascent_chain_has_its_own_radius_and_geometry():
  chain = asam_jax.ascent(0.3, p=3)
  for options in ({"rho": 0.1}, {"p": 3}, {"eta": 0.0}, {"normalization": "none"}):
    with pytest.raises(ValueError, match=f"ascent=... and {next(iter(options))}"):
      asam_jax.value_and_grad(loss, ascent=chain, **options)
  # The info may be told in which geometry it measures.
  *_, info = asam_jax.value_and_grad(loss, ascent=chain, p=3, with_info=True)(W, X)
  *_, same = asam_jax.value_and_grad(loss, rho=0.3, p=3, with_info=True)(W, X)
  chex.assert_trees_all_close(info, same, rtol=1e-3, atol=1e-6)
  with pytest.raises(TypeError, match="ascent_tx="):
    asam_jax.value_and_grad(loss, ascent=0.5)  # pyright: ignore


@pytest.mark.parametrize("argnums", [0, 1, (0, 2), -3, -2, (-3, 2)])
def test_accumulation_by_a_number_of_rows(argnums):
  # The batch is the first argument that is not differentiated.
  def fun(a, b, c):
    batch, w, other = (a, b, c) if argnums in (1, -2) else (b, a, c)
    return jnp.mean(jnp.tanh(batch @ w + jnp.sum(other)) ** 2)

  rng = np.random.default_rng(1)
  batch, w, c = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((6, 3), 3, 2))
  args = (batch, w, c) if argnums in (1, -2) else (w, batch, c)
  whole = asam_jax.value_and_grad(fun, argnums, rho=0.3)(*args)
  pieces = asam_jax.value_and_grad(fun, argnums, rho=0.3, accumulate=2)(*args)
  chex.assert_trees_all_close(pieces, whole, rtol=1e-5, atol=1e-6)
  for bad in (0, -1, 2.0, "2", True):
    with pytest.raises((TypeError, ValueError), match="accumulate="):
      asam_jax.value_and_grad(fun, argnums, accumulate=bad)


def test_the_gradient_is_traced_once_for_both_passes():
  traces = []

  def counted(w, x):
    traces.append(1)
    return loss(w, x)

  jax.jit(asam_jax.value_and_grad(counted)).trace(W, X)
  assert len(traces) == 1


def test_a_loss_may_close_over_what_is_traced():
  @jax.jit
  def step(w, x, scale):
    return asam_jax.value_and_grad(lambda w: scale * loss(w, x), rho=0.3)(w)

  got = step(W, X, 2.0)
  expected = asam_jax.value_and_grad(lambda w: 2.0 * loss(w, X), rho=0.3)(W)
  chex.assert_trees_all_close(got, expected, rtol=1e-5)
  # And under the derivative of an outer function, as in MAML.
  outer = jax.grad(lambda scale: jnp.sum(step(W, X, scale)[1]["kernel"]))(2.0)
  step_of = lambda s: float(jnp.sum(step(W, X, s)[1]["kernel"]))  # noqa: E731
  slope = (step_of(2.01) - step_of(1.99)) / 0.02
  np.testing.assert_allclose(outer, slope, rtol=1e-2)
