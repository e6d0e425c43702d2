"""The Optax door: what update takes, hands on, averages and refuses."""

import functools
import inspect
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asam_jax
from tests import problems

if hasattr(jax, "shard_map"):
  shard_map = jax.shard_map
else:
  from jax.experimental.shard_map import shard_map  # pyright: ignore

PARAMS = {"kernel": jnp.array([1.0, -2.0, 0.5]), "bias": jnp.array([0.5])}


# Newer JAX tracks which values vary over the mesh and can be told so.
KNOWS_VARYING = "check_vma" in inspect.signature(shard_map).parameters
NO_CHECK = {"check_vma": False} if KNOWS_VARYING else {"check_rep": False}


def varying(tree, axis):
  if hasattr(jax.lax, "pcast"):
    return jax.lax.pcast(tree, axis, to="varying")
  return jax.lax.pvary(tree, axis) if KNOWS_VARYING else tree


def loss(params):
  return jnp.sum(params["kernel"] ** 4) + jnp.sum(params["bias"] ** 2)


gradient = jax.jit(jax.grad(loss))


def record_base():
  """A base optimizer that returns what it is given."""
  return optax.GradientTransformationExtraArgs(
      lambda params: optax.EmptyState(),
      lambda updates, state, params=None, **extra_args: (updates, state),
  )


def test_gradient_is_taken_once_at_the_perturbed_point():
  points = []

  def grad_fn(params):
    points.append(params)
    return jax.grad(loss)(params)

  grads = gradient(PARAMS)
  ascent = asam_jax.ascent(0.3, 0.05)
  epsilon, _ = ascent.update(grads, ascent.init(PARAMS), PARAMS)
  tx = asam_jax.adaptive_sam(record_base(), 0.3, 0.05)
  updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, grad_fn=grad_fn)
  assert len(points) == 1
  chex.assert_trees_all_equal(points[0], optax.apply_updates(PARAMS, epsilon))
  chex.assert_trees_all_equal(updates, jax.grad(loss)(points[0]))


def test_adaptive_sam_is_the_chain():
  base_tx = optax.adam(0.1)
  short = asam_jax.adaptive_sam(base_tx, 0.3, 0.1, 3, normalization="layerwise")
  long = optax.chain(
      asam_jax.perturbed_gradient(
          asam_jax.ascent(0.3, 0.1, 3, normalization="layerwise")
      ),
      base_tx,
  )
  grads = gradient(PARAMS)
  results = [
      jax.jit(functools.partial(tx.update, grad_fn=gradient))(
          grads, tx.init(PARAMS), PARAMS
      )
      for tx in (short, long)
  ]
  chex.assert_trees_all_equal(*results)


def test_sam_is_the_published_rule():
  tx = asam_jax.sam(record_base(), 0.3)
  grads = jax.grad(loss)(PARAMS)
  updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, grad_fn=lambda params: params)
  norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
  expected = jax.tree.map(lambda w, g: w + 0.3 * g / norm, PARAMS, grads)
  chex.assert_trees_all_close(updates, expected, rtol=1e-6)


def test_value_fn_in_place_of_grad_fn():
  tx = asam_jax.adaptive_sam(optax.sgd(0.1), 0.3)
  grads = jax.grad(loss)(PARAMS)
  expected = tx.update(grads, tx.init(PARAMS), PARAMS, grad_fn=jax.grad(loss))
  got = tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=loss)
  chex.assert_trees_all_equal(got, expected)


def test_line_search_as_base_gets_the_same_value_fn():
  base_tx = optax.chain(
      optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=20)
  )
  tx = asam_jax.adaptive_sam(base_tx, 0.01)

  @jax.jit
  def step(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(
        grads, state, params, value=value, grad=grads, value_fn=loss
    )
    return optax.apply_updates(params, updates), state

  params, state = PARAMS, tx.init(PARAMS)
  for _ in range(30):
    params, state = step(params, state)
  assert loss(params) < 0.01 < loss(PARAMS)


def test_sharpness_and_count_are_in_the_state():
  tx = asam_jax.adaptive_sam(optax.adam(0.1), 0.3, 0.0)
  state = tx.init(PARAMS)
  update = jax.jit(functools.partial(tx.update, grad_fn=gradient))
  grads = gradient(PARAMS)
  for _ in range(3):
    _, state = update(grads, state, PARAMS)
  ascent_state = state[0].ascent
  assert isinstance(ascent_state, asam_jax.AscentState)
  assert ascent_state.count == 3
  t = [np.ones(1), np.abs(np.asarray(PARAMS["kernel"]))]
  _, expected = problems.oracle_perturbation(
      [grads["bias"], grads["kernel"]], t, 0.3, 2
  )
  np.testing.assert_allclose(ascent_state.sharpness, expected, rtol=1e-6)
  found = optax.tree_utils.tree_get(state, "sharpness")
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_ascent_chain_with_a_state_of_its_own():
  # The EMA of the gradients, kept from step to step, is what is ascended along.
  chain = optax.chain(optax.ema(0.5, debias=False), asam_jax.ascent(0.3, 0.0))
  tx = optax.chain(asam_jax.perturbed_gradient(chain), record_base())
  state, mean = tx.init(PARAMS), jax.tree.map(jnp.zeros_like, PARAMS)
  single = asam_jax.ascent(0.3, 0.0)
  update = jax.jit(functools.partial(tx.update, grad_fn=lambda params: params))
  single_update = jax.jit(single.update)
  for i in range(3):
    grads = jax.tree.map(lambda w, i=i: (-1.5) ** i * w, PARAMS)
    mean = jax.tree.map(lambda m, g: 0.5 * m + 0.5 * g, mean, grads)
    epsilon, _ = single_update(mean, single.init(PARAMS), PARAMS)
    point, state = update(grads, state, PARAMS)
    chex.assert_trees_all_close(
        point, optax.apply_updates(PARAMS, epsilon), rtol=1e-6
    )


def test_inject_hyperparams_on_rho_and_eta_does_not_retrace():
  make = optax.inject_hyperparams(asam_jax.adaptive_sam, static_args=("p",))
  tx = make(base_tx=optax.sgd(0.1), rho=0.3, eta=0.01)

  @jax.jit
  def step(params, state):
    grads = jax.grad(loss)(params)
    updates, state = tx.update(grads, state, params, grad_fn=jax.grad(loss))
    return optax.apply_updates(params, updates), state

  state = tx.init(PARAMS)
  for rho, eta in ((0.3, 0.01), (0.1, 0.02), (0.0, 0.0)):
    state.hyperparams["rho"] = jnp.asarray(rho)
    state.hyperparams["eta"] = jnp.asarray(eta)
    got, state = step(PARAMS, state)
    plain = asam_jax.adaptive_sam(optax.sgd(0.1), rho, eta)
    updates, _ = plain.update(
        jax.grad(loss)(PARAMS), plain.init(PARAMS), PARAMS, grad_fn=jax.grad(loss)
    )
    chex.assert_trees_all_close(got, optax.apply_updates(PARAMS, updates), rtol=1e-6)
  assert step._cache_size() == 1


def test_inject_hyperparams_with_a_schedule():
  make = optax.inject_hyperparams(asam_jax.adaptive_sam, static_args=("p",))
  tx = make(base_tx=record_base(), rho=lambda count: 0.1 * (1 + count), eta=0.0)
  update = jax.jit(functools.partial(tx.update, grad_fn=lambda params: params))
  state, radii = tx.init(PARAMS), []
  for _ in range(3):
    point, state = update(gradient(PARAMS), state, PARAMS)
    t = {"kernel": jnp.abs(PARAMS["kernel"]), "bias": 1.0}
    deltas = jax.tree.map(lambda a, b, t: (a - b) / t, point, PARAMS, t)
    radii.append(problems.oracle_norm(jax.tree.leaves(deltas), 2))
  np.testing.assert_allclose(radii, [0.1, 0.2, 0.3], rtol=1e-5)


def test_clipping_and_decay_inside_the_base_act_on_the_descent():
  base_tx = optax.chain(
      optax.clip_by_global_norm(1.0), optax.add_decayed_weights(0.5), optax.sgd(1.0)
  )
  tx = asam_jax.adaptive_sam(base_tx, 0.3)
  update = jax.jit(functools.partial(tx.update, grad_fn=gradient))
  updates, _ = update(gradient(PARAMS), tx.init(PARAMS), PARAMS)
  ascent = asam_jax.ascent(0.3)
  epsilon, _ = ascent.update(gradient(PARAMS), ascent.init(PARAMS), PARAMS)
  grads = gradient(optax.apply_updates(PARAMS, epsilon))
  norm = problems.oracle_norm(jax.tree.leaves(grads), 2)
  expected = jax.tree.map(lambda w, g: -(g / norm + 0.5 * w), PARAMS, grads)
  chex.assert_trees_all_close(updates, expected, rtol=1e-5)


# Several devices.


def batch():
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
  return {"kernel": normal(3), "bias": jnp.zeros(())}, normal(4, 8, 3), normal(4, 8)


def regression_loss(params, x, y):
  return jnp.mean((x @ params["kernel"] + params["bias"] - y) ** 2)


@jax.jit
def one_device_reference(params, x, y):
  tx = asam_jax.ascent(0.3)
  grad_fn = functools.partial(jax.grad(regression_loss), x=x, y=y)
  epsilon, _ = tx.update(grad_fn(params), tx.init(params), params)
  return grad_fn(optax.apply_updates(params, epsilon))


def per_device_reference(params, x, y):
  """m-sharpness: each device ascends on its share, the descent is averaged."""
  shares = [one_device_reference(params, x[i], y[i]) for i in range(4)]
  return jax.tree.map(lambda *g: sum(g) / 4, *shares)


def common_reference(params, x, y):
  """One perturbation for the whole batch."""
  return one_device_reference(params, x.reshape(-1, 3), y.reshape(-1))


def door_update(params, x, y, average):
  grad_fn = functools.partial(jax.grad(regression_loss), x=x, y=y)
  tx = asam_jax.adaptive_sam(
      record_base(), 0.3, axis_name="batch", average_ascent=average
  )
  return tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)[0]


def door_function(params, x, y, average):
  transformed = asam_jax.value_and_grad(
      regression_loss, rho=0.3, axis_name="batch", average_ascent=average
  )
  return transformed(params, x, y)[1]


@pytest.mark.parametrize("door", [door_update, door_function])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
def test_pmap(door, average):
  params, x, y = batch()
  expected = (common_reference if average else per_device_reference)(params, x, y)
  step = functools.partial(door, average=average)
  got = jax.pmap(step, axis_name="batch", in_axes=(None, 0, 0))(params, x, y)
  for i in range(4):
    one = jax.tree.map(lambda g, i=i: np.asarray(g)[i], got)
    chex.assert_trees_all_close(one, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("door", [door_update, door_function])
@pytest.mark.parametrize("average", [False, True])
def test_shard_map(door, average):
  params, x, y = batch()
  expected = (common_reference if average else per_device_reference)(params, x, y)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("batch",))
  spec = jax.sharding.PartitionSpec

  def step(params, x, y):
    # Without this, shard_map sums the gradient of replicated parameters over the
    # devices by itself, and there is no local gradient to ascend along.
    params = varying(params, "batch")
    return door(params, x[0], y[0], average=average)

  # The check of replication that came before knows no while loops.
  options = {} if KNOWS_VARYING else NO_CHECK
  sharded = shard_map(
      step,
      mesh=mesh,
      in_specs=(spec(), spec("batch"), spec("batch")),
      out_specs=spec(),
      **options,
  )
  chex.assert_trees_all_close(
      jax.jit(sharded)(params, x, y), expected, rtol=1e-5, atol=1e-7
  )


def test_one_all_reduce_for_a_per_device_ascent():
  params, x, y = batch()
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("batch",))
  spec = jax.sharding.PartitionSpec
  counts = {}
  for average in (False, True):
    sharded = shard_map(
        lambda params, x, y, average=average: door_update(params, x[0], y[0], average),
        mesh=mesh,
        in_specs=(spec(), spec("batch"), spec("batch")),
        out_specs=spec(),
        **NO_CHECK,
    )
    text = jax.jit(sharded).lower(params, x, y).compile().as_text()
    counts[average] = len(re.findall(r"= .* all-reduce(?:-start)?\(", text))
  leaves = len(jax.tree.leaves(params))
  assert 1 <= counts[False] <= leaves
  assert counts[True] <= 2 * leaves
  assert counts[False] < counts[True]


# Errors.


@pytest.mark.parametrize("make", [asam_jax.adaptive_sam, asam_jax.sam])
def test_bad_radius(make):
  for rho in (-0.1, math.nan, math.inf, np.float32(-1)):
    with pytest.raises(ValueError, match=r"rho=.* must be a finite number >= 0"):
      make(optax.sgd(0.1), rho)
  for rho in ("0.1", None, True, [0.1]):
    with pytest.raises(TypeError, match=r"rho=.* must be one real number"):
      make(optax.sgd(0.1), rho)


def test_bad_eta():
  with pytest.raises(ValueError, match=r"eta=-0.1 must be a finite number >= 0"):
    asam_jax.ascent(0.1, -0.1)
  with pytest.raises(TypeError, match=r"eta=None must be one real number"):
    asam_jax.ascent(0.1, None)


def test_bad_exponent():
  for p in (0.99, -1, 0, math.nan):
    with pytest.raises(ValueError, match=r"p=.* must be in \[1, inf\]"):
      asam_jax.ascent(p=p)
  for p in ("2", None, jnp.array(2.0), True):
    with pytest.raises(TypeError, match=r"p=.* must be a Python number.*static_args"):
      asam_jax.ascent(p=p)
  # What inject_hyperparams does when it is not told that p is static.
  tx = optax.inject_hyperparams(asam_jax.adaptive_sam)(base_tx=optax.sgd(0.1), rho=0.1)
  with pytest.raises(TypeError, match=r'static_args=\("p",\)'):
    tx.init(PARAMS)


def test_unknown_operator():
  with pytest.raises(ValueError, match="normalization='filter' is unknown; use one of"):
    asam_jax.adaptive_sam(optax.sgd(0.1), normalization="filter")


def test_mask_of_another_structure():
  for argument in ("normalize", "perturb"):
    tx = asam_jax.adaptive_sam(optax.sgd(0.1), **{argument: {"kernel": True}})
    with pytest.raises(ValueError, match=f"{argument} has the structure"):
      tx.init(PARAMS)


def test_missing_grad_fn():
  tx = asam_jax.adaptive_sam(optax.sgd(0.1))
  with pytest.raises(ValueError, match=r"grad_fn=None: .* pass update\("):
    tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_missing_params():
  for tx in (asam_jax.adaptive_sam(optax.sgd(0.1)), asam_jax.ascent()):
    with pytest.raises(ValueError, match=r"params=None: .* call update\(grads"):
      tx.update(PARAMS, tx.init(PARAMS), grad_fn=jax.grad(loss))


@pytest.mark.parametrize(
    ("grad_fn", "message"),
    [
        (jax.value_and_grad(loss), r"looks like \(value, gradient\)"),
        (
            jax.grad(lambda params: (loss(params), 1.0), has_aux=True),
            r"looks like \(gradient, aux\)",
        ),
        (loss, "Return the gradient with respect to params"),
        (lambda params: tuple(params.values()), "result of grad_fn has the str"),
        (lambda params: None, "result of grad_fn has the structure"),
        (
            lambda params: {**params, "bias": jnp.zeros(2)},
            r"grad_fn\['bias'\] has shape \(2,\) .* but params have shape \(1,\)",
        ),
        (
            lambda params: jax.tree.map(lambda w: w.astype(jnp.bfloat16), params),
            r"grad_fn\['bias'\] .* dtype bfloat16, but .* float32 there; return",
        ),
    ],
)
def test_grad_fn_with_another_result(grad_fn, message):
  tx = asam_jax.adaptive_sam(optax.sgd(0.1))
  with pytest.raises(TypeError, match=message):
    jax.jit(lambda g: tx.update(g, tx.init(PARAMS), PARAMS, grad_fn=grad_fn))(PARAMS)


def test_value_fn_with_aux():
  tx = asam_jax.adaptive_sam(optax.sgd(0.1))
  with pytest.raises(TypeError, match=r"(?s)value_fn\(params\) returned .* one real"):
    tx.update(PARAMS, tx.init(PARAMS), PARAMS, value_fn=lambda w: (loss(w), 1.0))


def test_gradient_that_does_not_belong_to_params():
  tx = asam_jax.ascent()
  state = tx.init(PARAMS)
  with pytest.raises(TypeError, match=r"the gradient has the structure .*, but params"):
    tx.update(PARAMS["kernel"], state, PARAMS)
  with pytest.raises(TypeError, match=r"gradient\['bias'\] has shape \(3,\)"):
    tx.update({**PARAMS, "bias": jnp.zeros(3)}, state, PARAMS)
  with pytest.raises(TypeError, match=r"gradient\['bias'\] .* dtype int32"):
    tx.update({**PARAMS, "bias": jnp.zeros(1, jnp.int32)}, state, PARAMS)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, jnp.bool_])
def test_leaves_that_are_not_real_floats(dtype):
  params = {"w": jnp.ones(2), "odd": jnp.ones(2, dtype)}
  message = rf"params\['odd'\] has dtype {jnp.dtype(dtype).name}, which can't be pert"
  with pytest.raises(TypeError, match=message):
    asam_jax.adaptive_sam(optax.sgd(0.1)).init(params)
  tx = asam_jax.ascent(0.5, 0.0, perturb={"w": True, "odd": False})
  epsilon, _ = tx.update(params, tx.init(params), params)
  chex.assert_trees_all_equal(epsilon["odd"], jnp.zeros(2, dtype))


def test_integers_beside_the_weights():
  # jax.grad gives a float0 for an integer leaf; the base optimizer must allow it.
  params = {"w": jnp.ones(2), "n": jnp.ones(2, jnp.int32)}
  tx = asam_jax.perturbed_gradient(
      asam_jax.ascent(0.1, perturb={"w": True, "n": False})
  )
  grad_fn = jax.grad(lambda params: jnp.sum(params["w"] ** 2), allow_int=True)
  grads, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
  assert grads["n"].dtype == jax.dtypes.float0
  assert (grads["w"] > 2).all()


def test_parameters_that_are_python_numbers():
  tx = asam_jax.adaptive_sam(optax.sgd(0.1))
  grad_fn = jax.grad(lambda params: params["w"] ** 2 + params["bias"])

  def step(params):
    return tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)[0]

  numbers = {"w": 1.5, "bias": 2.0}
  chex.assert_trees_all_close(step(numbers), step(jax.tree.map(jnp.array, numbers)))


def test_params_with_holes():
  inner = asam_jax.adaptive_sam(optax.sgd(0.1))
  tx = optax.masked(inner, {"kernel": True, "bias": False})
  with pytest.raises(ValueError, match=r"hole .* Use the arguments perturb and norm"):
    tx.init(PARAMS)
