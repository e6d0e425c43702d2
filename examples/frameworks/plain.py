"""ASAM on a plain pytree of parameters: the Optax door.

``python -m examples.frameworks.plain``
"""

import jax
import jax.numpy as jnp
import optax
from sklearn import datasets

import asam_jax

x, y = datasets.load_digits(return_X_y=True)
x, y = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)
tx = asam_jax.adaptive_sam(optax.sgd(0.1, momentum=0.9), rho=0.5)


def init(key):
  keys, sizes = jax.random.split(key), ((64, 32), (32, 10))
  return [
      {"kernel": jax.random.normal(key, size) / size[0] ** 0.5,
       "bias": jnp.zeros(size[1])}
      for key, size in zip(keys, sizes, strict=True)
  ]


def loss_fn(params, x, y, key):
  hidden, head = params
  x = jax.nn.relu(x @ hidden["kernel"] + hidden["bias"])
  x = jnp.where(jax.random.bernoulli(key, 0.8, x.shape), x / 0.8, 0)  # dropout
  logits = x @ head["kernel"] + head["bias"]
  return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@jax.jit
def train_step(params, opt_state, x, y, key):
  loss, grads = jax.value_and_grad(loss_fn)(params, x, y, key)

  def grad_fn(params):
    return jax.grad(loss_fn)(params, x, y, key)  # the same batch and mask

  updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
  return optax.apply_updates(params, updates), opt_state, loss


def main(steps=200):
  params = init(jax.random.key(0))
  opt_state, losses = tx.init(params), []
  for step in range(steps):
    rows, mask = jax.random.split(jax.random.key(step))
    i = jax.random.choice(rows, len(x), (128,))
    params, opt_state, loss = train_step(params, opt_state, x[i], y[i], mask)
    losses.append(float(loss))
  print(f"loss of the first step {losses[0]:.3f}, of the last {losses[-1]:.3f}")
  return losses


if __name__ == "__main__":
  main()
