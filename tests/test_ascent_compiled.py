"""The ascent as it is compiled: on each platform, over devices, again and again."""

import functools
import inspect
import math

import chex
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

import asam_jax
from asam_jax import _ascent
from asam_jax import _shards
from tests import problems
from tests.test_ascent import EXPONENTS
from tests.test_ascent import random_tree

if hasattr(jax, "shard_map"):
  shard_map = jax.shard_map
else:
  from jax.experimental.shard_map import shard_map  # pyright: ignore

CHECK = next(
    name for name in ("check_vma", "check_rep")
    if name in inspect.signature(shard_map).parameters
)
AxisType = getattr(jax.sharding, "AxisType", None)


def step(p, normalization="elementwise"):
  tx = asam_jax.ascent(0.5, 0.01, p, normalization=normalization)
  return lambda grads, params: tx.update(grads, tx.init(params), params)


def lowered(platform, p, normalization="elementwise"):
  """The program that XLA is given for a platform: branches on it are settled there."""
  traced = jax.jit(step(p, normalization)).trace(*random_tree(6))
  return traced.lower(lowering_platforms=(platform,)).as_text("hlo")


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
@pytest.mark.parametrize("p", EXPONENTS)
def test_no_loop_and_no_branch_on_an_accelerator(platform, p):
  for normalization in ("elementwise", "filterwise"):
    program = lowered(platform, p, normalization)
    assert "reduce(" in program
    for word in (" while(", " conditional(", " case("):
      assert word not in program


@pytest.mark.parametrize("p", EXPONENTS)
def test_one_loop_and_no_branch_on_cpu(p):
  program = lowered("cpu", p)
  assert program.count(" while(") == (0 if math.isinf(p) else 1)
  assert " conditional(" not in program


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("normalization", ["elementwise", "none"])
def test_leaves_have_barriers_but_for_t_1_on_an_accelerator(platform, normalization):
  found = lowered(platform, 2, normalization).count(" opt-barrier(")
  # One is around the scalars; leaves that are alike share their code.
  assert (found == 1) == (platform == "tpu" and normalization == "none"), found
  assert found >= 1


@pytest.fixture
def accelerated(monkeypatch):
  """Has the CPU run what is meant for accelerators, where the function is called."""
  def run(function):
    with monkeypatch.context() as patch:
      patch.setattr(
          lax, "platform_dependent", lambda *args, cpu, default: default(*args)
      )
      # It would remember the loop.
      patch.setattr(_ascent, "_compiled_closed_form", _ascent._closed_form)
      return function()

  return run


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
def test_both_spellings_agree(accelerated, p):
  rng = np.random.default_rng(0)
  params, grads = random_tree(6, (jnp.float32,))
  loop, one_pass = jax.jit(step(p)), jax.jit(step(p))
  sizes = [0, 1, math.nan, 1e-39, 1e-36, 1e-25, 1e-12, 1e12, 1e19, 1e25, 1e36]
  for size in sizes:
    scaled = jax.tree.map(
        lambda g, size=size: size * rng.permutation(np.ravel(g)).reshape(g.shape), grads
    )
    expected = loop(scaled, params)
    got = accelerated(lambda scaled=scaled: one_pass(scaled, params))
    chex.assert_trees_all_close(got, expected, rtol=1e-5)
  huge = jax.tree.map(lambda w: 1e22 * w, params)
  scaled = jax.tree.map(lambda g: 1e22 * g, grads)
  chex.assert_trees_all_close(
      accelerated(lambda: one_pass(scaled, huge)), loop(scaled, huge), rtol=1e-5
  )
  # A scale that one weight can't bear is taken back.
  held = lambda: jax.jit(  # noqa: E731
      lambda w, g: asam_jax.ascent(0.5, 0.0, p).update(
          g, asam_jax.ascent().init(w), w
      )
  )(jnp.array([0.0, 1.0, 2.0]), jnp.array([1e30, 3e-12, 2e-12]))
  chex.assert_trees_all_close(accelerated(held), held(), rtol=1e-5)
  # Under vmap each takes the scale that it needs.
  batch = jnp.array([1e-25, 1.0, 1e25])[:, None, None] * jnp.ones((3, 2, 4))
  w = jnp.arange(1.0, 9.0).reshape(2, 4)
  over = lambda: jax.jit(jax.vmap(step(p), (0, None)))(batch, w)  # noqa: E731
  for epsilon in (over()[0], accelerated(over)[0]):
    expected = step(p)(jnp.ones((2, 4)), w)[0]
    np.testing.assert_allclose(epsilon, np.broadcast_to(expected, (3, 2, 4)), rtol=1e-5)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_derivatives_of_both_spellings_agree(accelerated, p):
  w, g = jnp.array([1.0, 0.0, -2.0]), jnp.array([0.5, 0.0, 1.5])

  def slopes():
    def loss(w, g):
      epsilon, state = step(p)(g, w)
      return jnp.sum(epsilon**2) + state.sharpness

    first = jax.jit(jax.grad(loss, (0, 1)))(w, g)
    return first, jax.jit(jax.hessian(loss))(w, g)

  chex.assert_trees_all_close(slopes(), accelerated(slopes), rtol=1e-5)


@pytest.mark.parametrize("spelling", ["cpu", "accelerator"])
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("p", EXPONENTS)
def test_in_shard_map(accelerated, spelling, check, p):
  if check and CHECK == "check_rep":
    pytest.skip(f"the check of JAX {jax.__version__} has no rule for while loops")
  devices = jax.devices()[:2]
  mesh = jax.sharding.Mesh(np.array(devices), ("d",))
  rows, whole = PartitionSpec("d"), PartitionSpec()
  rng = np.random.default_rng(0)
  a = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
  grads = {"a": a, "b": jnp.ones((2, 1))}
  params = {"a": jnp.ones((1, 3)), "b": jnp.full((1, 1), 2.0)}

  def local(grads, params):
    epsilon, state = step(p)(grads, params)
    return epsilon, state.dual_norm[None]

  def run():
    mapped = shard_map(
        local, mesh=mesh, in_specs=(rows, whole), out_specs=(rows, rows),
        **{CHECK: check},
    )
    return jax.jit(mapped)(grads, params)

  epsilon, norms = run() if spelling == "cpu" else accelerated(run)
  for i in range(2):
    expected, state = jax.jit(step(p))(
        jax.tree.map(lambda g, i=i: g[i : i + 1], grads), params
    )
    here = jax.tree.map(lambda e, i=i: e[i : i + 1], epsilon)
    chex.assert_trees_all_close(here, expected, rtol=1e-5)
    np.testing.assert_allclose(norms[i], state.dual_norm, rtol=1e-5)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("p", EXPONENTS)
def test_sharded_leaves_send_scalars_only(p, kind):
  if AxisType is None or not hasattr(jax, "set_mesh"):
    if kind == "Explicit":
      pytest.skip(f"JAX {jax.__version__} has no explicit meshes")
    mesh = jax.make_mesh((2, 2), ("x", "y"))
  else:
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(getattr(AxisType, kind),) * 2)
  rng = np.random.default_rng(0)
  specs = {"a": PartitionSpec("x", "y"), "b": PartitionSpec("y"), "c": PartitionSpec()}
  shapes = {"a": (8, 4, 3), "b": (6,), "c": (3, 2)}
  # Small integers, so that many products are equal.
  draw = lambda: {  # noqa: E731
      name: np.asarray(rng.integers(-2, 3, shape), np.float32)
      for name, shape in shapes.items()
  }
  params, grads = draw(), draw()
  expected, _ = jax.jit(step(p))(grads, params)
  place = lambda tree: {  # noqa: E731
      name: jax.device_put(x, jax.sharding.NamedSharding(mesh, specs[name]))
      for name, x in tree.items()
  }
  params, grads = place(params), place(grads)
  compiled = jax.jit(step(p)).lower(grads, params).compile()
  epsilon, _ = compiled(grads, params)
  chex.assert_trees_all_close(
      jax.tree.map(np.asarray, epsilon), jax.tree.map(np.asarray, expected), rtol=1e-5
  )
  for name, x in epsilon.items():
    assert x.sharding.is_equivalent_to(params[name].sharding, x.ndim)
  program = compiled.as_text()
  for word in ("all-gather", "all-to-all", "collective-permute"):
    assert word not in program
  assert "all-reduce" in program
  reduced = [line for line in program.splitlines() if " all-reduce(" in line]
  assert all("[]" in line.split(" all-reduce(")[0] for line in reduced)


def test_first_is_that_of_the_flattened_array():
  rng = np.random.default_rng(0)
  for shape in [(), (7,), (3, 5), (2, 3, 4), (2, 2, 2, 2)]:
    for chance in (0.0, 0.1, 0.5, 1.0):
      hits = rng.random(shape) < chance
      expected = np.zeros(hits.size, bool)
      expected[np.flatnonzero(hits)[:1]] = True
      first, indices = _shards.first(jnp.asarray(hits))
      np.testing.assert_array_equal(first, expected.reshape(shape))
      if hits.any():
        assert tuple(map(int, indices)) == tuple(np.argwhere(hits)[0])


# Compiled once.


@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("normalization", ["elementwise", "partial"])
def test_second_update_does_not_compile_without_jit(p, normalization, caplog):
  def tx():
    """Made anew, as by a user who makes an optimizer for each run."""
    return asam_jax.ascent(0.5, 0.01, p, normalization=normalization if (
        normalization != "partial"
    ) else functools.partial(asam_jax.filterwise, filter_axis=0))

  # Shapes of their own: no other test has compiled them.
  params = {"w": jnp.arange(21.0).reshape(7, 1, 3), "bias": jnp.ones(11)}
  state = tx().init(params)
  jax.clear_caches()
  with jax.log_compiles():
    _, state = tx().update(params, state, params)
    assert "Compiling" in caplog.text
    caplog.clear()
    _, state = tx().update(params, state, params)
    tx().update(params, state, params)
  assert "Compiling" not in caplog.text


def test_partials_with_other_arguments_are_told_apart():
  w = jnp.arange(24.0).reshape(2, 3, 4)
  results = []
  for axis in (0, 1, 0):
    operator = functools.partial(asam_jax.filterwise, filter_axis=axis)
    tx = asam_jax.ascent(0.5, 0.1, normalization=operator)
    results.append(np.asarray(tx.update(w, tx.init(w), w)[0]))
  np.testing.assert_array_equal(results[0], results[2])
  assert (results[0] != results[1]).any()


def test_state_has_the_norm():
  params, grads = {"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([3.0, 1.0])}
  for p in EXPONENTS:
    geometry = asam_jax.Geometry(0.1, p)
    tx = _ascent.from_geometry(0.3, geometry)
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    norm = geometry.dual_norm(grads, params)
    np.testing.assert_allclose(state.dual_norm, norm, rtol=1e-5)
    np.testing.assert_allclose(state.sharpness, 0.3 * norm, rtol=1e-5)
    assert optax.tree_utils.tree_get(state, "dual_norm") is state.dual_norm


def test_doubles_where_a_parameter_is():
  with problems.enable_x64(True):
    for dtype in (jnp.float32, jnp.float64):
      w = jnp.ones(3, dtype)
      tx = asam_jax.ascent()
      start = tx.init(w)
      _, state = tx.update(w, start, w)
      assert start.dual_norm.dtype == state.dual_norm.dtype == dtype
