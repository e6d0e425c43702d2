"""ASAM in Equinox, with batch norm and dropout.

``python -m examples.frameworks.equinox_``
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from sklearn import datasets

import asam_jax

x, y = datasets.load_digits(return_X_y=True)
x, y = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)


class Model(eqx.Module):
  hidden: eqx.nn.Linear
  norm: eqx.nn.BatchNorm
  dropout: eqx.nn.Dropout
  head: eqx.nn.Linear

  def __init__(self, key):
    keys = jax.random.split(key)
    self.hidden = eqx.nn.Linear(64, 32, key=keys[0])
    self.norm = eqx.nn.BatchNorm(32, "batch", momentum=0.9, mode="ema")
    self.dropout = eqx.nn.Dropout(0.2)
    self.head = eqx.nn.Linear(32, 10, key=keys[1])

  def __call__(self, x, state, key):
    x, state = self.norm(self.hidden(x), state)
    return self.head(self.dropout(jax.nn.relu(x), key=key)), state


def loss_fn(params, static, state, x, y, keys):
  model = eqx.combine(params, static)
  batched = jax.vmap(model, (0, None, 0), out_axes=(0, None), axis_name="batch")
  logits, state = batched(x, state, keys)
  return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), state


tx = optax.sgd(0.1, momentum=0.9)


@eqx.filter_jit
def train_step(model, state, opt_state, x, y, key):
  # A convolution's filters would be on axis 0: normalization=functools.partial(
  # asam_jax.filterwise, filter_axis=0).
  params, static = eqx.partition(model, eqx.is_inexact_array)
  (loss, state), grads = asam_jax.value_and_grad(loss_fn, rho=0.5, has_aux=True)(
      params, static, state, x, y, jax.random.split(key, len(x)))
  updates, opt_state = tx.update(grads, opt_state, params)
  return eqx.apply_updates(model, updates), state, opt_state, loss


def main(steps=200):
  model, state = eqx.nn.make_with_state(Model)(jax.random.key(0))
  opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
  losses = []
  for step in range(steps):
    rows, mask = jax.random.split(jax.random.key(step))
    i = jax.random.choice(rows, len(x), (128,))
    model, state, opt_state, loss = train_step(
        model, state, opt_state, x[i], y[i], mask)
    losses.append(float(loss))
  print(f"loss of the first step {losses[0]:.3f}, of the last {losses[-1]:.3f}")
  return losses


if __name__ == "__main__":
  main()
