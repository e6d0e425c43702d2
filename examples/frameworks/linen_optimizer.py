"""ASAM in Flax linen as an Optax optimizer, in a TrainState that hands grad_fn on.

For what lives in the optimizer: schedules of rho, second gradients now and then, the
sharpness in its state. ``TrainState.apply_gradients`` gives the optimizer no extra
arguments; the subclass does.

``python -m examples.frameworks.linen_optimizer``
"""

from typing import Any

import flax.linen as nn
from flax.training import train_state
import jax
import jax.numpy as jnp
import optax
from sklearn import datasets

import asam_jax

x, y = datasets.load_digits(return_X_y=True)
x, y = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)
tx = asam_jax.adaptive_sam(
    optax.sgd(0.1, momentum=0.9), rho=optax.linear_schedule(0.0, 0.5, 100))


class Model(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(32)(x))
    x = nn.Dropout(0.2, deterministic=not train)(nn.relu(x))
    return nn.Dense(10)(x)


class TrainState(train_state.TrainState):
  batch_stats: Any

  def apply_gradients(self, *, grads, grad_fn, **changes):
    update = optax.with_extra_args_support(self.tx).update
    updates, opt_state = update(grads, self.opt_state, self.params, grad_fn=grad_fn)
    params = optax.apply_updates(self.params, updates)
    return self.replace(
        step=self.step + 1, params=params, opt_state=opt_state, **changes)


@jax.jit
def train_step(state, x, y, key):
  def loss_fn(params):
    logits, changes = state.apply_fn(
        {"params": params, "batch_stats": state.batch_stats}, x, train=True,
        mutable="batch_stats", rngs={"dropout": key},
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, changes["batch_stats"]

  (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)

  def grad_fn(params):
    return jax.grad(loss_fn, has_aux=True)(params)[0]

  state = state.apply_gradients(grads=grads, grad_fn=grad_fn, batch_stats=batch_stats)
  return state, loss


def main(steps=200):
  model = Model()
  variables = model.init(jax.random.key(0), x[:1], train=False)
  state = TrainState.create(apply_fn=model.apply, tx=tx, **variables)
  losses = []
  for step in range(steps):
    rows, mask = jax.random.split(jax.random.key(step))
    i = jax.random.choice(rows, len(x), (128,))
    state, loss = train_step(state, x[i], y[i], mask)
    losses.append(float(loss))
  print(f"loss of the first step {losses[0]:.3f}, of the last {losses[-1]:.3f}")
  return losses


if __name__ == "__main__":
  main()
