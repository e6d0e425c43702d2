# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # At the price of SGD
#
# ASAM takes two gradients in each step and so costs twice an SGD step. Much of what it
# gains can be had for less. This notebook trains the same network with the ways to
# save, counts their gradients, and then shows the two things to know about the cheapest
# of them: which parameters to evaluate and save, and what to do with batch norm.
#
# The ways:
#
# - **Take the second gradient less often.** LookSAM takes it at every fifth step, and
#   between these reuses what was new in it.
# - **Take it late.** What the last part of training does decides in which minimum you
#   end, so the first part can be plain.
# - **Do not take it at all.** Momentum-SAM walks uphill against the optimizer's
#   momentum, which is at hand, in place of the gradient. One gradient a step, at the
#   moved weights.

# %% tags=["skip-execution"]
# Needed where asam_jax is not installed yet, as in Colab.
# %pip install -q "asam_jax[examples,nnx,sharpness]"

# %%
from flax import linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn import datasets
from sklearn import model_selection

import asam_jax

COLORS = {
    "SGD": "#404040", "ASAM": "#D55E00", "last half": "#AA4499", "LookSAM": "#117733",
    "Momentum-ASAM": "#009E73",
}
MARKERS = {"SGD": "o", "ASAM": "s", "last half": "^", "LookSAM": "v",
           "Momentum-ASAM": "o"}
plt.rcParams.update({
    "figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.3, "axes.titlesize": 11,
    "legend.frameon": False, "lines.linewidth": 1.6,
})

# %% [markdown]
# ## The methods
#
# Each is an optimizer of Optax, around the same base. What they call ρ is not on one
# scale: against the momentum the loss rises less, and LookSAM's reused part has a
# length of its own. These radii are from the repository's study of this task
# (`results/frontier`), where each method had the best of seven, chosen on held-out
# noisy labels.

# %%
EPOCHS, BATCH, SEEDS = 40, 64, 5
STEPS = EPOCHS * (898 // BATCH)
base = optax.chain(
    optax.add_decayed_weights(5e-4),
    optax.sgd(optax.cosine_decay_schedule(0.1, STEPS), momentum=0.9))
second_gradient = asam_jax.perturbed_gradient(asam_jax.ascent(rho=2.0))
late = asam_jax.sometimes(second_gradient, when=lambda step: step >= STEPS // 2)

methods = {
    "SGD": base,
    "ASAM": asam_jax.adaptive_sam(base, rho=2.0),
    "last half": optax.chain(late, base),
    "LookSAM": asam_jax.looksam(base, rho=0.25, k=5),
    "Momentum-ASAM": asam_jax.momentum_sam(base, rho=4.0),
}
gradients = {"SGD": 1, "ASAM": 2, "last half": 1.5, "LookSAM": 1.2, "Momentum-ASAM": 1}

# %% [markdown]
# ## Train
#
# The task: half of scikit-learn's digits with 40 % of their labels wrong, the other
# half to test on. One loop serves all methods. A method that wants a second gradient
# asks `grad_fn` for it; one that does not leaves it alone. Five seeds train side by
# side under `vmap`, each with its own wrong labels, start and batches.

# %%
images, labels = datasets.load_digits(return_X_y=True)
train_x, test_x, train_y, test_y = model_selection.train_test_split(
    np.float32(images / 16), np.int32(labels), train_size=0.5, stratify=labels,
    random_state=0)


def wrong_labels(seed):
  rng = np.random.default_rng(seed)
  wrong = rng.permutation(len(train_y))[: round(0.4 * len(train_y))]
  noisy = train_y.copy()
  noisy[wrong] = (noisy[wrong] + rng.integers(1, 10, len(wrong))) % 10
  return noisy


noisy_y = jnp.stack([wrong_labels(seed) for seed in range(SEEDS)])
train_x, test_x, test_y = map(jnp.asarray, (train_x, test_x, test_y))


class MLP(nn.Module):
  @nn.compact
  def __call__(self, x):
    for _ in range(2):
      x = nn.relu(nn.Dense(128)(x))
    return nn.Dense(10)(x)


model = MLP()


def loss(params, x, y):
  logits = model.apply(params, x)
  return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def make_step(tx):
  tx = optax.with_extra_args_support(tx)

  def step(params, state, x, y):
    def grad_fn(params):
      return jax.grad(loss)(params, x, y)

    updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), state

  return step


def clean(params, state):
  """The parameters to judge: of Momentum-SAM, those in its state."""
  carried = any(isinstance(x, asam_jax.CarriedState) for x in jax.tree.leaves(
      state, is_leaf=lambda x: isinstance(x, asam_jax.CarriedState)))
  return asam_jax.eval_params(state) if carried else params


@jax.jit
def accuracies(params):
  def of_one(params):
    return jnp.mean(jnp.argmax(model.apply(params, test_x), -1) == test_y)

  return 100 * jax.vmap(of_one)(params)


def train(tx):
  params = jax.vmap(lambda key: model.init(key, test_x[:1]))(
      jax.random.split(jax.random.key(0), SEEDS))
  state = jax.vmap(tx.init)(params)

  @jax.jit
  def step(params, state, rows):
    y = jnp.take_along_axis(noisy_y, rows, axis=1)
    return jax.vmap(make_step(tx))(params, state, train_x[rows], y)

  rngs = [np.random.default_rng(seed) for seed in range(SEEDS)]
  curve = []
  for _ in range(EPOCHS):
    order = np.stack([rng.permutation(len(train_x)) for rng in rngs])
    for first in range(0, len(train_x) - BATCH + 1, BATCH):
      params, state = step(params, state, order[:, first : first + BATCH])
    curve.append(accuracies(clean(params, state)))
  return params, state, np.stack(curve)


# %% tags=["varies"]
runs = {method: train(tx) for method, tx in methods.items()}


def mean_and_error(curve):
  return curve[-1].mean(), curve[-1].std(ddof=1) / np.sqrt(SEEDS)


print("               gradients a step   test accuracy (%)")
for method, (_, _, curve) in runs.items():
  mean, error = mean_and_error(curve)
  print(f"{method:14} {gradients[method]:16} {mean:13.1f} ± {error:.1f}")

# %% tags=["varies"]
figure, axes = plt.subplots(
    1, 2, figsize=(9.5, 3.5), sharey=True, width_ratios=[1.3, 1], layout="constrained")
epochs = np.arange(1, EPOCHS + 1)
for method, (_, _, curve) in runs.items():
  mean, error = mean_and_error(curve)
  axes[0].plot(epochs, curve.mean(1), color=COLORS[method], label=method)
  axes[1].errorbar(
      gradients[method], mean, error, color=COLORS[method], marker=MARKERS[method],
      markersize=7, capsize=3, ls="none", label=method)
axes[0].set(xlabel="epoch", ylabel="test accuracy (%)", title="by epoch")
axes[1].set(xlabel="gradients in a step", title="after the last epoch", xlim=(0.8, 2.2))
axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
figure.supxlabel("Mean of 5 seeds; bars: ± one standard error of that mean.",
                 fontsize=9, color="0.3")
plt.show()

# %% [markdown]
# All of them have most of the gain here. It is not so on every task: in the study of
# two networks (`results/frontier`) Momentum-ASAM has 101 and 95 % of ASAM's gain with
# wrong labels, and 44 and 72 % of the much smaller one with right labels. LookSAM has
# 94 and 95 %, and with right labels none. If one method is to be tried first, take
# Momentum-ASAM for its price; if a run is to be the best possible, ASAM.
#
# The number of gradients is nearly all of the price. What else is in a step shows in
# the operations that the compiler counts:

# %%
def operations(tx):
  params = model.init(jax.random.key(0), test_x[:1])
  step = jax.jit(make_step(tx))
  compiled = step.lower(params, tx.init(params), test_x[:BATCH], test_y[:BATCH])
  return compiled.compile().cost_analysis()["flops"]


counted = {m: operations(methods[m]) for m in ("SGD", "ASAM", "Momentum-ASAM")}
for method, number in counted.items():
  print(f"{method:14} {number / counted['SGD']:.2f} times the operations of SGD")

# %% [markdown]
# ## Evaluate and save `eval_params`
#
# How can one gradient be enough? Under Momentum-SAM the parameters that you hold *rest
# at the moved point* $w + \hat\epsilon$. There your loop takes its gradient as ever,
# and the update leads to the next moved point. So your loop need not change at all:
#
# ```diff
# -tx = base
# +tx = asam_jax.momentum_sam(base, rho=4.0)
# ```
#
# The price is one thing to remember. The weights $w$ are in the optimizer's state, and
# `asam_jax.eval_params(state)` returns them. Those are to be evaluated, averaged and
# exported:

# %% tags=["varies"]
params, state, _ = runs["Momentum-ASAM"]
train_loss = jax.jit(jax.vmap(loss, in_axes=(0, None, 0)))
for name, judged in (("the parameters you hold", params),
                     ("eval_params(state)", asam_jax.eval_params(state))):
  losses = train_loss(judged, train_x, noisy_y)
  print(f"{name:24} training loss {np.mean(losses):.2f},"
        f" test accuracy {np.mean(accuracies(judged)):.1f} %")

# %% [markdown]
# To go on with a run later, save parameters and state as with any optimizer. To hand a
# model on, save `eval_params(state)` alone. The state is one copy of the parameters
# larger than the base optimizer's.
#
# ## Batch norm
#
# Under the two-gradient methods the running statistics are those of the pass at $w$,
# and all is well. Under Momentum-SAM there is one pass, and it is at $w +
# \hat\epsilon$: the statistics that it gathers belong to the moved weights. Gather them
# anew before an evaluation that counts, by some passes in training mode at $w$, without
# a step:

# %% tags=["varies"]
class Normalized(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    for _ in range(2):
      x = nn.Dense(128)(x)
      x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
    return nn.Dense(10)(x)


normalized = Normalized()
tx = asam_jax.momentum_sam(base, rho=4.0)


@jax.jit
def step(params, stats, state, x, y):
  def loss(params):
    logits, changes = normalized.apply(
        {"params": params, "batch_stats": stats}, x, train=True, mutable="batch_stats")
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return losses.mean(), changes["batch_stats"]

  grads, stats = jax.grad(loss, has_aux=True)(params)
  updates, state = tx.update(grads, state, params)
  return optax.apply_updates(params, updates), stats, state


@jax.jit
def gathered(params, stats, x):
  _, changes = normalized.apply(
      {"params": params, "batch_stats": stats}, x, train=True, mutable="batch_stats")
  return changes["batch_stats"]


@jax.jit
def accuracy(params, stats):
  logits = normalized.apply(
      {"params": params, "batch_stats": stats}, test_x, train=False)
  return 100 * jnp.mean(jnp.argmax(logits, -1) == test_y)


results = []
for seed in range(3):
  variables = normalized.init(jax.random.key(seed), test_x[:1], train=False)
  params, stats = variables["params"], variables["batch_stats"]
  state, rng = tx.init(params), np.random.default_rng(seed)
  for _ in range(EPOCHS):
    order = rng.permutation(len(train_x))
    for first in range(0, len(order) - BATCH + 1, BATCH):
      rows = order[first : first + BATCH]
      params, stats, state = step(
          params, stats, state, train_x[rows], noisy_y[seed][rows])

  weights, fresh = asam_jax.eval_params(state), stats
  for first in range(0, len(train_x) - BATCH + 1, BATCH):  # one pass over the data
    fresh = gathered(weights, fresh, train_x[first : first + BATCH])
  results.append([accuracy(params, stats), accuracy(weights, stats),
                  accuracy(weights, fresh)])

rows = ("parameters you hold, statistics of training",
        "eval_params, statistics of training",
        "eval_params, statistics gathered anew")
for name, row in zip(rows, np.transpose(results), strict=True):
  print(f"{name:45} test accuracy {np.mean(row):.1f} %")

# %% [markdown]
# ## In short
#
# | | gradients a step | memory, in copies of the parameters | to remember |
# |---|---|---|---|
# | `adaptive_sam(base)` | 2 | none | |
# | `chain(sometimes(link, when), base)` | 1 to 2 | none | |
# | `looksam(base, k=5)` | 1 + 1/k | one | its radius is its own |
# | `momentum_sam(base)` | 1 | one | `eval_params`; batch statistics |
#
# Next: *6 Many devices*.
