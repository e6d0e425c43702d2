"""ASAM in an Optimistix solver, which passes value_fn to the optimizer by itself.

Optimistix minimizes one function, so the whole data set is the batch.

``python -m examples.frameworks.optimistix_``
"""

import jax
import jax.numpy as jnp
import optax
import optimistix as optx
from sklearn import datasets

import asam_jax

x, y = datasets.load_digits(return_X_y=True)
x, y = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)


def init(key):
  keys, sizes = jax.random.split(key), ((64, 32), (32, 10))
  return [
      {"kernel": jax.random.normal(key, size) / size[0] ** 0.5,
       "bias": jnp.zeros(size[1])}
      for key, size in zip(keys, sizes, strict=True)
  ]


def loss_fn(params, data):
  (x, y), (hidden, head) = data, params
  x = jax.nn.relu(x @ hidden["kernel"] + hidden["bias"])
  logits = x @ head["kernel"] + head["bias"]
  return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def main(steps=200):
  tx = asam_jax.adaptive_sam(optax.sgd(0.1, momentum=0.9), rho=0.5)
  solver = optx.OptaxMinimiser(tx, rtol=1e-6, atol=1e-6)
  params = init(jax.random.key(0))
  before = float(loss_fn(params, (x, y)))
  solution = optx.minimise(
      loss_fn, solver, params, args=(x, y), max_steps=steps, throw=False)
  after = float(loss_fn(solution.value, (x, y)))
  print(f"loss before {before:.3f}, after {after:.3f}")
  return [before, after]


if __name__ == "__main__":
  main()
