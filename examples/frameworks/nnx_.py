"""ASAM in Flax NNX, with batch norm and dropout.

``python -m examples.frameworks.nnx_``
"""

from flax import nnx
import jax
import jax.numpy as jnp
import optax
from sklearn import datasets

import asam_jax.nnx

x, y = datasets.load_digits(return_X_y=True)
x, y = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)


class Model(nnx.Module):
  def __init__(self, rngs):
    self.hidden = nnx.Linear(64, 32, rngs=rngs)
    self.norm = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
    self.dropout = nnx.Dropout(0.2, rngs=rngs)
    self.head = nnx.Linear(32, 10, rngs=rngs)

  def __call__(self, x):
    return self.head(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def loss_fn(model, x, y):
  return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def train_step(model, optimizer, x, y):
  # Statistics and random counts are those of the clean pass; the masks are the same.
  loss, grads = asam_jax.nnx.value_and_grad(loss_fn, rho=0.5)(model, x, y)
  optimizer.update(model, grads)
  return loss


def main(steps=200):
  model = Model(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
  losses = []
  for step in range(steps):
    i = jax.random.choice(jax.random.key(step), len(x), (128,))
    losses.append(float(train_step(model, optimizer, x[i], y[i])))
  print(f"loss of the first step {losses[0]:.3f}, of the last {losses[-1]:.3f}")
  return losses


if __name__ == "__main__":
  main()
