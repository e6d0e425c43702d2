"""The README's diffs apply and run; its commands and its names are as it says."""

import re

from flax import nnx
from flax.training import train_state
import jax
import jax.numpy as jnp
import optax
import pytest

import asam_jax
from tests import pages

README = (pages.ROOT / "README.md").read_text(encoding="utf-8")
DIFFS = dict(
    zip(["optax", "nnx", "linen"], pages.blocks(README, "diff"), strict=True)
)

OPTAX = """
import jax
tx = optax.sgd(0.1, momentum=0.9)

@jax.jit
def train_step(params, opt_state, batch):
  loss, grads = jax.value_and_grad(loss_fn)(params, batch)
  updates, opt_state = tx.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, loss
"""
NNX = """
from flax import nnx

@nnx.jit
def train_step(model, optimizer, batch):
  loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
  optimizer.update(model, grads)
  return loss
"""
LINEN = """
import jax

@jax.jit
def train_step(state, batch):
  (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
  return state.apply_gradients(grads=grads), loss
"""


def batch():
  x = jax.random.normal(jax.random.key(0), (32, 3))
  return x, x @ jnp.array([[1.0], [-2.0], [0.5]]) + 0.3


def predictions(params, x):
  return x @ params["kernel"] + params["bias"]


def mean_square(predicted, y):
  return jnp.mean((predicted - y) ** 2)


def start():
  return {"kernel": jnp.ones((3, 1)), "bias": jnp.zeros(1)}


def after(name, code, changed, **scope):
  """The loop's names; ``changed`` with the README's diff applied."""
  diff = DIFFS[name].code
  for line in diff.splitlines():  # what the diff keeps stands in the loop as well
    assert line[:1] in ("", "+", "-", " ")
    if line.startswith(" ") and line.strip():
      assert line[1:] in code.splitlines(), line
  exec(pages.patched(code, diff) if changed else code, scope)
  return scope


@pytest.mark.parametrize("changed", [False, True], ids=["before", "after"])
def test_optax_loop(changed):
  loss_fn = lambda params, batch: mean_square(  # noqa: E731
      predictions(params, batch[0]), batch[1])
  loop = after("optax", OPTAX, changed, optax=optax, loss_fn=loss_fn)
  params, state, losses = start(), loop["tx"].init(start()), []
  for _ in range(30):
    params, state, loss = loop["train_step"](params, state, batch())
    losses.append(float(loss))
  assert losses[-1] < 0.1 * losses[0]
  is_ascent = lambda x: isinstance(x, asam_jax.AscentState)  # noqa: E731
  assert any(map(is_ascent, jax.tree.leaves(state, is_leaf=is_ascent))) == changed


def expected_step(changed):
  """One step of SGD from the start, along the gradient there or at w + epsilon."""
  loss = lambda params: mean_square(  # noqa: E731
      predictions(params, batch()[0]), batch()[1])
  grad = asam_jax.grad(loss, rho=0.5) if changed else jax.grad(loss)
  return jax.tree.map(lambda w, g: w - 0.1 * g, start(), grad(start()))


def close(got, expected):
  for name, leaf in expected.items():
    assert jnp.allclose(got[name], leaf, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("changed", [False, True], ids=["before", "after"])
def test_nnx_loop(changed):
  loss_fn = lambda model, batch: mean_square(model(batch[0]), batch[1])  # noqa: E731
  loop = after("nnx", NNX, changed, loss_fn=loss_fn)
  model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
  nnx.update(model, start())
  optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
  loop["train_step"](model, optimizer, batch())
  close({"kernel": model.kernel[...], "bias": model.bias[...]}, expected_step(changed))


@pytest.mark.parametrize("changed", [False, True], ids=["before", "after"])
def test_train_state_loop(changed):
  def loss_fn(params, batch):
    predicted = predictions(params, batch[0])
    return mean_square(predicted, batch[1]), predicted

  loop = after("linen", LINEN, changed, loss_fn=loss_fn)
  state = train_state.TrainState.create(
      apply_fn=predictions, params=start(), tx=optax.sgd(0.1))
  close(loop["train_step"](state, batch())[0].params, expected_step(changed))


def test_it_is_short():
  assert len(README.splitlines()) <= 150
  assert not re.findall(r"[A-Z]+_[A-Z]+", README), "a place that is still to be filled"


def test_the_commands_are_a_line_each_and_alike():
  commands = [block.code for block in pages.blocks(README, "sh")]
  assert len(commands) == 2
  for command in commands:
    assert command.count("\n") == 1
    # Either may be the first: each makes its own environment, or finds it.
    assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -e '.[")


def test_the_family_is_a_table_of_names_that_run():
  section = README.split("## The family")[1].split("\n## ")[0]
  calls = re.findall(r"`(\w+\([^`]*\))`", section)
  assert len(calls) >= 10
  scope = {**vars(asam_jax), "base_tx": optax.sgd(0.1), "fun": jnp.sum}
  for call in calls:
    result = eval(call, scope)
    assert callable(getattr(result, "update", result))
