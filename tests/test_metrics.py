"""The info of a step, in both doors, against float64 NumPy; and that it is free."""

import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asam_jax
from tests import problems

W = {"bias": jnp.array([0.1, -0.2]), "kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]])}
X = jnp.array([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]])
OPTIONS = [
    {},
    {"p": 1, "rho": 0.1},
    {"p": 3},
    {"p": math.inf, "rho": 0.05},
    {"normalization": "none"},
    {"normalization": "layerwise", "perturb": asam_jax.is_not_bias},
]


def loss(w, x=X):
  return jnp.mean(jnp.tanh(x @ w["kernel"] + w["bias"]) ** 2)


value_and_gradient = jax.jit(jax.value_and_grad(loss))


@functools.cache
def info_of_the_function_door(index):
  options = OPTIONS[index]
  return jax.jit(asam_jax.value_and_grad(loss, with_info=True, **options))(W)[-1]


def expected_info(w, rho=0.5, eta=0.01, p=2, normalization="elementwise", perturb=None):
  """The definitions, in NumPy but for the gradients."""
  names = ["bias", "kernel"] if perturb is None else ["kernel"]
  value, g = value_and_gradient(w)
  gs = [np.float64(g[name]) for name in names]
  ts = [
      problems.oracle_factor(w[name], eta, "none" if name == "bias" else normalization)
      for name in names
  ]
  epsilons, first_order = problems.oracle_perturbation(gs, ts, rho, p)
  point = dict(w)
  for name, epsilon in zip(names, epsilons, strict=True):
    point[name] = np.asarray(w[name] + epsilon, w[name].dtype)
  perturbed_value, h = value_and_gradient(point)
  flat = lambda tree: np.concatenate(  # noqa: E731
      [np.float64(x).ravel() for x in jax.tree.leaves(tree)]
  )
  moves = [np.float64(point[name]) - np.float64(w[name]) for name in names]
  q = math.inf if p == 1 else 1.0 if math.isinf(p) else p / (p - 1)
  return asam_jax.AscentInfo(
      value=value,
      perturbed_value=perturbed_value,
      gap=perturbed_value - value,
      predicted_gap=first_order,
      linearity=(perturbed_value - value) / first_order,
      rise=np.sqrt(perturbed_value) - np.sqrt(value),
      gradient_norm=np.linalg.norm(flat(g)),
      normalized_gradient_norm=problems.oracle_norm(
          [t * g for t, g in zip(ts, gs, strict=True)], q
      ),
      cosine=flat(g) @ flat(h) / np.linalg.norm(flat(g)) / np.linalg.norm(flat(h)),
      radius=problems.oracle_norm([m / t for m, t in zip(moves, ts, strict=True)], p),
      kept_share=sum((g * m).sum() for g, m in zip(gs, moves, strict=True))
      / first_order,
      nonfinite_steps=0,
  )


@pytest.mark.parametrize("index", range(len(OPTIONS)))
def test_every_entry_of_the_function_door(index):
  info = info_of_the_function_door(index)
  expected = expected_info(W, **OPTIONS[index])
  for name, got, want in zip(info._fields, info, expected, strict=True):
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("index", range(len(OPTIONS)))
def test_every_entry_of_the_optax_door(index):
  tx = asam_jax.adaptive_sam(optax.sgd(0.1), with_info=True, **OPTIONS[index])

  @jax.jit
  def step(w, state):
    value, grads = jax.value_and_grad(loss)(w)
    _, state = tx.update(grads, state, w, value=value, value_fn=loss)
    return state

  info = optax.tree_utils.tree_get(step(W, tx.init(W)), "info")
  expected = info_of_the_function_door(index)
  chex.assert_trees_all_close(info, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("given", ["grad_fn", "value, grad_fn", "value_fn"])
def test_a_loss_that_is_missing_raises(given):
  tx = asam_jax.sam(optax.sgd(0.1), 0.3, with_info=True)
  value, grads = value_and_gradient(W)
  extra = {"value": value, "grad_fn": jax.grad(loss), "value_fn": loss}
  extra = {name: extra[name] for name in given.split(", ")}
  with pytest.raises(ValueError, match=r"losses of both passes: .* value_fn"):
    tx.update(grads, tx.init(W), W, **extra)


def test_a_loss_that_is_no_scalar_raises():
  tx = asam_jax.sam(optax.sgd(0.1), 0.3, with_info=True)
  _, grads = value_and_gradient(W)
  with pytest.raises(TypeError, match=r"value=.* must be one real number"):
    tx.update(grads, tx.init(W), W, value=jnp.ones(2), value_fn=loss)


def test_there_is_one_sharpness_in_the_state():
  tx = asam_jax.adaptive_sam(optax.sgd(0.1), with_info=True)
  value, grads = value_and_gradient(W)
  _, state = tx.update(grads, tx.init(W), W, value=value, value_fn=loss)
  info = optax.tree_utils.tree_get(state, "info")
  assert optax.tree_utils.tree_get(state, "sharpness") == info.predicted_gap


def test_the_info_changes_neither_the_step_nor_the_errors():
  plain, recording = (
      asam_jax.adaptive_sam(optax.adam(0.1), 0.3, with_info=with_info)
      for with_info in (False, True)
  )
  _, grads = value_and_gradient(W)
  expected, got = (
      jax.jit(functools.partial(tx.update, value_fn=loss))(
          grads, tx.init(W), W, value=jnp.array(1.0)
      )
      for tx in (plain, recording)
  )
  chex.assert_trees_all_equal(got[0], expected[0])
  chex.assert_trees_all_equal_shapes_and_dtypes(got[1], recording.init(W))
  with pytest.raises(ValueError, match="grad_fn=None"):
    recording.update(grads, recording.init(W), W)
  with pytest.raises(ValueError, match="params=None"):
    recording.update(grads, recording.init(W), None, grad_fn=jax.grad(loss))


def test_schedules_and_no_recompilation():
  tx = asam_jax.adaptive_sam(
      optax.sgd(0.1), lambda n: 0.1 * n, lambda n: 0.01 * (n + 1), with_info=True
  )

  @jax.jit
  def step(w, state):
    value, grads = jax.value_and_grad(loss)(w)
    updates, state = tx.update(grads, state, w, value=value, value_fn=loss)
    return optax.apply_updates(w, updates), state

  w, state = W, tx.init(W)
  for i in range(3):
    w, state = step(w, state)
    info = optax.tree_utils.tree_get(state, "info")
    np.testing.assert_allclose(info.radius, 0.1 * i, rtol=1e-4)
    assert info.normalized_gradient_norm > 0  # also where rho is zero
    np.testing.assert_allclose(
        info.predicted_gap, 0.1 * i * info.normalized_gradient_norm, rtol=1e-5
    )
    assert info.kept_share == pytest.approx(1, rel=1e-3)
  assert step._cache_size() == 1


def test_the_radius_is_the_length_that_the_measures_have():
  geometry = asam_jax.Geometry(p=3)
  tx = asam_jax.adaptive_sam(optax.identity(), 0.3, p=3, with_info=True)
  value, grads = value_and_gradient(W)
  half_square = lambda w: sum(jnp.sum(x**2) / 2 for x in jax.tree.leaves(w))  # noqa: E731
  update = jax.jit(functools.partial(tx.update, value_fn=half_square))
  point, state = update(grads, tx.init(W), W, value=value)
  move = jax.tree.map(lambda a, b: a - b, point, W)
  np.testing.assert_allclose(
      optax.tree_utils.tree_get(state, "info").radius,
      geometry.norm(move, W),
      rtol=1e-5,
  )


def test_stationary_points_and_fixed_weights_give_no_nan():
  w = {"a": jnp.zeros(3), "b": jnp.ones(2)}
  *_, info = jax.jit(
      asam_jax.value_and_grad(lambda w: jnp.sum(w["b"] ** 2), eta=0.0, with_info=True)
  )(w)
  assert all(np.isfinite(entry) for entry in info)
  *_, info = jax.jit(
      asam_jax.value_and_grad(lambda w: 0.0 * jnp.sum(w["a"]), with_info=True)
  )(w)
  assert info.cosine == 0
  assert info.radius == 0
  assert info.kept_share == 1


def rise_and_linearity(loss, w, rho):
  fun = jax.jit(asam_jax.value_and_grad(loss, rho=rho, eta=0.0, with_info=True))
  info = fun(jnp.asarray(w))[-1]
  return info.rise, info.linearity


def test_the_rise_of_losses_below_zero_is_of_the_signed_root():
  # L = a (w^2 - 5), at w = 2 and rho = 0.5: from -a to 4 a; at rho = 0.1 to -0.16 a.
  for a in (1.0, 9.0):
    loss = lambda w, a=a: a * (w**2 - 5)  # noqa: E731
    rise, _ = rise_and_linearity(loss, 2.0, 0.5)
    assert rise == pytest.approx((2 + 1) * math.sqrt(a), rel=1e-5)
    rise, _ = rise_and_linearity(loss, 2.0, 0.1)
    assert rise == pytest.approx((1 - 0.4) * math.sqrt(a), rel=1e-4)
  rise, _ = rise_and_linearity(lambda w: w**2 - 4, 2.0, 0.5)  # from 0 to 5
  assert rise == pytest.approx(math.sqrt(5), rel=1e-5)


def test_linearity_is_one_of_a_linear_loss_and_its_limit_where_there_is_no_gap():
  _, linearity = rise_and_linearity(lambda w: 3 * w, 2.0, 0.5)
  assert linearity == pytest.approx(1, rel=1e-5)
  # Of w^2 at w = 2: ((1 + rho)^2 - 1) w^2 / (2 rho w^2).
  _, linearity = rise_and_linearity(lambda w: w**2, 2.0, 0.5)
  assert linearity == pytest.approx(1.25, rel=1e-5)
  for loss, rho in ((lambda w: w**2, 0.0), (lambda w: 0.0 * w, 0.5),
                    (lambda w: (w - 2.0) ** 2, 0.5)):
    rise, linearity = rise_and_linearity(loss, 2.0, rho)
    assert (rise, linearity) == (0, 1)


def test_nan_is_not_hidden_in_rise_and_linearity():
  rise, linearity = rise_and_linearity(lambda w: w * jnp.nan, 2.0, 0.5)
  assert np.isnan([rise, linearity]).all()


def test_derivatives_of_the_info_are_finite_at_a_loss_of_zero():
  def total(w):
    info = asam_jax.value_and_grad(
        lambda w: jnp.sum((w - 2) ** 2), rho=0.5, with_info=True)(w)[-1]
    return info.rise + info.linearity

  assert np.isfinite(jax.grad(total)(jnp.full(3, 2.0))).all()


def test_nonfinite_steps_are_counted():
  tx = asam_jax.adaptive_sam(optax.sgd(0.1), with_info=True)

  @jax.jit
  def next_state(state, factor):
    value_fn = lambda w: factor * jnp.sum(w["kernel"] ** 2)  # noqa: E731
    value, grads = jax.value_and_grad(value_fn)(W)
    return tx.update(grads, state, W, value=value, value_fn=value_fn)[1]

  state = tx.init(W)
  for factor in (1.0, jnp.nan, 1.0, jnp.inf):
    state = next_state(state, factor)
  assert optax.tree_utils.tree_get(state, "info").nonfinite_steps == 2


def cost(fun):
  w = {"kernel": jnp.ones((64, 32)), "bias": jnp.ones(32)}
  x = jnp.ones((128, 64))
  compiled = jax.jit(fun).lower(w, x).compile()
  analysis = compiled.cost_analysis()
  analysis = analysis[0] if isinstance(analysis, list) else analysis
  return analysis["flops"], compiled.memory_analysis().temp_size_in_bytes


def test_the_optax_door_keeps_one_gradient_and_reads_it_a_few_times_more():
  sizes = (256, 512, 512, 256, 10)  # 0.5 M weights

  def deep_loss(w, x):
    for layer in w:
      x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return jnp.mean(x**2)

  w = [{"kernel": jax.ShapeDtypeStruct((a, b), jnp.float32),
        "bias": jax.ShapeDtypeStruct((b,), jnp.float32)}
       for a, b in itertools.pairwise(sizes)]
  x = jax.ShapeDtypeStruct((32, sizes[0]), jnp.float32)
  copy = 4 * sum(leaf.size for leaf in jax.tree.leaves(w))

  def temporary_and_traffic(with_info):
    tx = asam_jax.adaptive_sam(optax.sgd(0.1), with_info=with_info)

    def step(w, state, x):
      value_fn = lambda w: deep_loss(w, x)  # noqa: E731
      value, grads = jax.value_and_grad(value_fn)(w)
      updates, state = tx.update(grads, state, w, value=value, value_fn=value_fn)
      return optax.apply_updates(w, updates), state

    state = jax.eval_shape(tx.init, w)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(w, state, x).compile()
    analysis = compiled.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    return compiled.memory_analysis().temp_size_in_bytes, analysis["bytes accessed"]

  without, with_info = map(temporary_and_traffic, (False, True))
  assert with_info[0] - without[0] <= 1.3 * copy
  assert with_info[1] <= 1.35 * without[1]


def test_what_is_not_used_costs_nothing():
  without = asam_jax.value_and_grad(loss)
  with_info = asam_jax.value_and_grad(loss, with_info=True)
  assert cost(lambda w, x: with_info(w, x)[:2]) == cost(without)


def test_all_entries_cost_no_pass_through_the_model():
  flops, _ = cost(asam_jax.value_and_grad(loss))
  with_info, _ = cost(functools.partial(asam_jax.value_and_grad(loss, with_info=True)))
  parameters = 64 * 32 + 32
  assert with_info - flops < 60 * parameters
  one_gradient, _ = cost(jax.value_and_grad(loss))
  assert with_info - flops < 0.2 * one_gradient
