"""The pages for those who come from elsewhere: before and after make the same steps."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib
import pytest

import asam_jax
from tests import pages

FOLDER = pages.ROOT / "docs/coming_from"
START = {"kernel": jnp.array([[1.0], [0.5], [-2.0]]), "bias": jnp.array([0.1])}
X = jax.random.normal(jax.random.key(0), (32, 3))
BATCH = (X, X @ jnp.array([[1.0], [-2.0], [0.5]]) + 0.3)


def text(name):
  return (FOLDER / f"{name}.md").read_text(encoding="utf-8")


def trained(step, state, steps=4):
  params = jax.tree.map(jnp.copy, START)
  for _ in range(steps):
    params, state, _ = step(params, state, BATCH)
  return params


def close(got, expected):
  chex.assert_trees_all_close(got, expected, rtol=2e-5, atol=2e-6)


@pytest.fixture(scope="module")
def optax_page():
  """The names before the change, and those at the end of the page."""
  page = text("optax")
  before = {}
  for block in pages.blocks(page, "python")[:2]:
    exec(block.code, before)
  return before, pages.run(page, "optax.md")


def test_optax_opaque(optax_page):
  before, after = optax_page
  close(
      trained(after["train_step"], after["tx"].init(START)),
      trained(before["train_step"], before["tx"].init(START)),
  )


def test_optax_transparent(optax_page):
  page = optax_page[1]
  loss_fn = page["loss_fn"]
  adversary = optax.chain(contrib.normalize(), optax.sgd(0.05))
  tx = contrib.sam(optax.sgd(0.1, momentum=0.9), adversary, sync_period=2)
  params, state = START, tx.init(START)
  for _ in range(8):  # two calls for a step
    grads = jax.grad(loss_fn)(params, BATCH)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  close(trained(page["plain_step"], page["plain_tx"].init(START)), params)


def loss(params, batch):
  x, y = batch
  return jnp.mean((x @ params["kernel"] + params["bias"] - y) ** 2)


def by_hand(normalized, rho, eta, weight_decay=0.0):
  """The PyTorch packages' step in NumPy, with SGD's momentum of 0.9."""
  gradient = lambda w: jax.device_get(jax.grad(loss)(w, BATCH))  # noqa: E731
  w = {name: np.float64(leaf) for name, leaf in START.items()}
  momentum = {name: np.zeros_like(leaf) for name, leaf in w.items()}
  for _ in range(4):
    t = {name: np.abs(w[name]) + eta if name in normalized else 1.0 for name in w}
    g = {name: np.float64(leaf) for name, leaf in gradient(w).items()}
    norm = np.sqrt(sum(np.sum((t[name] * g[name]) ** 2) for name in w))
    there = {name: w[name] + rho * t[name] ** 2 * g[name] / norm for name in w}
    for name, leaf in gradient(there).items():
      momentum[name] = 0.9 * momentum[name] + leaf + weight_decay * w[name]
      w[name] = w[name] - 0.1 * momentum[name]
  return w


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("davda54", {"normalized": ("kernel", "bias"), "rho": 2.0, "eta": 0.0}),
        ("samsung", {"normalized": ("kernel",), "rho": 0.5, "eta": 0.01,
                     "weight_decay": 5e-4}),
    ],
)
def test_pytorch(name, options):
  page = pages.run(text(name), f"{name}.md")
  close(trained(page["train_step"], page["tx"].init(START)), by_hand(**options))


def test_what_the_tables_name_is_there():
  for name in ("optax", "davda54", "samsung"):
    for module, attribute in re.findall(r"\b(asam_jax|optax)\.(\w+)", text(name)):
      assert hasattr({"asam_jax": asam_jax, "optax": optax}[module], attribute)
