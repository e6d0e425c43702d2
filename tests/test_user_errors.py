"""What people run into: errors and notes say what to write instead."""

import subprocess
import sys
import textwrap

import chex
import equinox as eqx
from flax import linen as nn
from flax import nnx
from flax.training import train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asam_jax

W = {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([0.5])}


def loss(w):
  return jnp.sum((w["kernel"] + w["bias"]) ** 2)


def notes(error):
  return " ".join(getattr(error.value, "__notes__", ()))


def test_train_state_hands_no_grad_fn_on():
  model = nn.Dense(1)
  params = model.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
  state = train_state.TrainState.create(
      apply_fn=model.apply, params=params, tx=asam_jax.adaptive_sam(optax.sgd(0.1))
  )
  with pytest.raises(
      ValueError, match=r"TrainState\.apply_gradients .* asam_jax\.value_and_grad"
  ):
    state.apply_gradients(grads=params, grad_fn=lambda params: params)


def test_a_naive_grad_fn_through_nnx_optimizer():
  model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
  tx = asam_jax.adaptive_sam(optax.sgd(0.1))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  loss_fn = lambda model: jnp.mean(model(jnp.ones((2, 3))) ** 2)  # noqa: E731
  grads = nnx.grad(loss_fn)(model)
  with pytest.raises(TypeError) as error:
    optimizer.update(model, grads, grad_fn=nnx.grad(loss_fn))
  assert "asam_jax.nnx.grad_fn" in notes(error)


def test_an_nnx_module_in_the_plain_door():
  model = nnx.Sequential(
      nnx.Linear(3, 1, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(0))
  )
  with pytest.raises(Exception) as error:  # noqa: PT011  (JAX's affair which)
    asam_jax.value_and_grad(lambda model: jnp.sum(model(jnp.ones((2, 3)))))(model)
  assert "asam_jax.nnx.value_and_grad" in str(error.value) + notes(error)


def test_an_equinox_module_in_the_plain_door():
  model = eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0))
  with pytest.raises(TypeError) as error:
    asam_jax.value_and_grad(lambda model: jnp.sum(model(jnp.ones(3))))(model)
  assert "eqx.partition" in str(error.value) + notes(error)


def test_the_step_index_of_optax_contrib_sam():
  tx = asam_jax.adaptive_sam(optax.sgd(0.1))
  with pytest.raises(TypeError) as error:
    tx.update(W, tx.init(W), W, grad_fn=lambda params, i: params)
  assert "leave out the missing i" in notes(error)


def test_flat_parameters():
  tx = optax.flatten(asam_jax.adaptive_sam(optax.sgd(0.1)))
  with pytest.raises(Exception) as error:  # noqa: PT011  (the loss's own)
    tx.update(W, tx.init(W), W, grad_fn=jax.grad(loss))
  assert "optax.flatten" in notes(error)


def test_an_error_of_the_users_own_has_no_note():
  def broken(params):
    raise KeyError("mine")

  tx = asam_jax.adaptive_sam(optax.sgd(0.1))
  with pytest.raises(KeyError, match="mine") as error:
    tx.update(W, tx.init(W), W, grad_fn=broken)
  assert notes(error) == ""


# Radii and stabilizers.

BAD_VALUES = [-1.0, np.nan, np.inf, jnp.array(-1.0), jnp.array(jnp.nan),
              np.array(np.inf), np.float32(-1)]
BAD_TYPES = [True, "0.1", None, [0.1], 1j, jnp.array(True), jnp.array(1j),
             jnp.ones(2), np.ones(1)]


@pytest.mark.parametrize("argument", ["rho", "eta"])
@pytest.mark.parametrize("make", [
    lambda **kw: asam_jax.ascent(**kw),
    lambda **kw: asam_jax.adaptive_sam(optax.sgd(0.1), **kw),
    lambda **kw: asam_jax.momentum_sam(optax.sgd(0.1), **kw),
    lambda **kw: asam_jax.value_and_grad(loss, **kw),
    lambda **kw: asam_jax.nnx.value_and_grad(loss, **kw),
], ids=["ascent", "adaptive_sam", "momentum_sam", "value_and_grad", "nnx"])
def test_a_radius_is_one_number(make, argument):
  for value in BAD_VALUES:
    with pytest.raises(ValueError, match=f"{argument}=.* must be a finite number >= 0"):
      make(**{argument: value})
  for value in BAD_TYPES:
    with pytest.raises(TypeError, match=f"{argument}=.* must be one real number"):
      make(**{argument: value})


@pytest.mark.parametrize("argument", ["rho", "eta"])
@pytest.mark.parametrize("value", [-1.0, jnp.array(-1.0), jnp.nan, jnp.ones(2), None])
def test_what_a_schedule_returns_is_checked(argument, value):
  tx = asam_jax.ascent(**{argument: lambda count: value})
  with pytest.raises((ValueError, TypeError), match=rf"{argument}.*=.* must be"):
    tx.update(W, tx.init(W), W)


@pytest.mark.parametrize("argument", ["rho", "eta"])
@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_what_can_t_be_checked_under_jit_gives_nan(argument, value):
  tx = asam_jax.ascent(**{argument: lambda count: value + 0 * count})
  epsilon, _ = jax.jit(tx.update)(W, tx.init(W), W)
  assert all(np.isnan(e).all() for e in jax.tree.leaves(epsilon))
  door = lambda x: asam_jax.value_and_grad(loss, **{argument: x})(W)[1]  # noqa: E731
  assert all(np.isnan(g).all() for g in jax.tree.leaves(jax.jit(door)(value)))
  chex.assert_trees_all_equal(
      jax.jit(door)(0.3), jax.jit(lambda: door(0.3))())


@pytest.mark.parametrize("value", [np.array(0.5), np.float64(0.5), jnp.array(0.5), 1])
def test_zero_dimensional_arrays_are_numbers(value):
  tx = asam_jax.ascent(rho=value, eta=value)
  expected = asam_jax.ascent(rho=float(value), eta=float(value))
  got, _ = tx.update(W, tx.init(W), W)
  want, _ = expected.update(W, expected.init(W), W)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_the_old_place_of_rho_says_where_it_is_now():
  with pytest.raises(TypeError, match=r"argnums=0\.5 .* by name: rho=0\.5"):
    asam_jax.value_and_grad(loss, 0.5)  # pyright: ignore


# Modules that need more than the core.


def run(code):
  return subprocess.run(
      [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
      capture_output=True, text=True,
  )


def test_the_modules_are_there_without_an_import_of_their_own():
  result = run("""
      import asam_jax
      for name in ("landscape", "nnx", "sharpness"):
        assert name in dir(asam_jax)
        getattr(asam_jax, name)
      try:
        asam_jax.nothing
      except AttributeError as error:
        assert "has no attribute 'nothing'" in str(error)
  """)
  assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("module", "missing"),
    [("sharpness", "jaxtyping"), ("landscape", "jaxtyping"), ("nnx", "flax")],
)
@pytest.mark.parametrize(
    "statement", ["asam_jax.{0}", "import asam_jax.{0}", "from asam_jax import {0}"]
)
def test_without_the_extra_the_error_names_it(module, missing, statement):
  result = run(f"""
      import importlib.abc
      import sys
      import asam_jax

      class Hidden(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
          if name.split(".")[0] == "{missing}":
            raise ModuleNotFoundError(name)

      import importlib.util
      real = importlib.util.find_spec
      importlib.util.find_spec = (
          lambda name, *rest: None if name == "{missing}" else real(name, *rest)
      )
      {statement.format(module)}
  """)
  assert result.returncode != 0
  extra = "nnx" if module == "nnx" else "sharpness"
  assert f"pip install 'asam_jax[{extra}]'" in result.stderr, result.stderr
