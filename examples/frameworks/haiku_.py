"""ASAM in Haiku, with batch norm and dropout.

``python -m examples.frameworks.haiku_``
"""

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from sklearn import datasets

import asam_jax

x, y = datasets.load_digits(return_X_y=True)
x, y = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)
tx = optax.sgd(0.1, momentum=0.9)


def forward(x, train):
  x = hk.BatchNorm(True, True, decay_rate=0.9)(hk.Linear(32)(x), is_training=train)
  x = hk.dropout(hk.next_rng_key(), 0.2 if train else 0.0, jax.nn.relu(x))
  return hk.Linear(10)(x)


model = hk.transform_with_state(forward)


def loss_fn(params, state, key, x, y):
  logits, state = model.apply(params, state, key, x, train=True)
  return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), state


@jax.jit
def train_step(params, state, opt_state, key, x, y):
  (loss, state), grads = asam_jax.value_and_grad(loss_fn, rho=0.5, has_aux=True)(
      params, state, key, x, y)
  updates, opt_state = tx.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), state, opt_state, loss


def main(steps=200):
  params, state = model.init(jax.random.key(0), x[:1], train=True)
  opt_state, losses = tx.init(params), []
  for step in range(steps):
    rows, mask = jax.random.split(jax.random.key(step))
    i = jax.random.choice(rows, len(x), (128,))
    params, state, opt_state, loss = train_step(
        params, state, opt_state, mask, x[i], y[i])
    losses.append(float(loss))
  print(f"loss of the first step {losses[0]:.3f}, of the last {losses[-1]:.3f}")
  return losses


if __name__ == "__main__":
  main()
