"""ASAM in Flax linen with an unmodified TrainState, batch norm and dropout.

``python -m examples.frameworks.linen``
"""

import flax.linen as nn
from flax.training import train_state
import jax
import jax.numpy as jnp
import optax
from sklearn import datasets

import asam_jax

x, y = datasets.load_digits(return_X_y=True)
x, y = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)


class Model(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(32)(x))
    x = nn.Dropout(0.2, deterministic=not train)(nn.relu(x))
    return nn.Dense(10)(x)


@jax.jit
def train_step(state, batch_stats, x, y, key):
  def loss_fn(params):
    logits, changes = state.apply_fn(
        {"params": params, "batch_stats": batch_stats}, x, train=True,
        mutable="batch_stats", rngs={"dropout": key},
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, changes["batch_stats"]

  # The statistics are of the clean pass; both passes drop the same units.
  (loss, batch_stats), grads = asam_jax.value_and_grad(
      loss_fn, rho=0.5, has_aux=True)(state.params)
  return state.apply_gradients(grads=grads), batch_stats, loss


def main(steps=200):
  model = Model()
  variables = model.init(jax.random.key(0), x[:1], train=False)
  state = train_state.TrainState.create(
      apply_fn=model.apply, params=variables["params"], tx=optax.sgd(0.1, momentum=0.9))
  batch_stats, losses = variables["batch_stats"], []
  for step in range(steps):
    rows, mask = jax.random.split(jax.random.key(step))
    i = jax.random.choice(rows, len(x), (128,))
    state, batch_stats, loss = train_step(state, batch_stats, x[i], y[i], mask)
    losses.append(float(loss))
  print(f"loss of the first step {losses[0]:.3f}, of the last {losses[-1]:.3f}")
  return losses


if __name__ == "__main__":
  main()
