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
# # Sharpness: measure it, see it, and what it tells
#
# SAM and ASAM train for flat minima. Whether they found one can be measured. This
# notebook trains one network with SGD, one with SAM, one with ASAM; measures how sharp
# the loss is around each, in three ways; draws it; and then asks of forty networks
# whether sharpness tells which will do well on new data. The answer is yes here, and
# not everywhere.
#
# Two words are enough. A *geometry* says what counts as near: with weights $w$ and $T_w
# = \mathrm{diag}(|w| + \eta)$ the ball is $\|T_w^{-1}\epsilon\|_p \le \rho$; with $T =
# 1$ it is SAM's. And *sharpness* is how much the loss rises in that ball. Measures take
# the same geometry that an optimizer takes, so what is trained and what is measured
# can't differ.

# %% tags=["skip-execution"]
# Needed where asam_jax is not installed yet, as in Colab.
# %pip install -q "asam_jax[examples,nnx,sharpness]"

# %%
import functools
import itertools

from flax import linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn import datasets
from sklearn import model_selection

import asam_jax
from asam_jax import landscape
from asam_jax import sharpness

COLORS = {"SGD": "#404040", "SAM": "#0072B2", "ASAM": "#D55E00"}
plt.rcParams.update({
    "figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 11, "legend.frameon": False, "lines.linewidth": 1.6,
})

# %% [markdown]
# ## Three networks
#
# Half of scikit-learn's digits to train on, 40 % of their labels wrong; the other half,
# all labels right, to test on. The same network, batches and schedule for all three.

# %%
images, labels = datasets.load_digits(return_X_y=True)
images, labels = np.float32(images / 16), np.int32(labels)
train_x, test_x, train_y, test_y = model_selection.train_test_split(
    images, labels, train_size=0.5, stratify=labels, random_state=0)
rng = np.random.default_rng(0)
wrong = rng.permutation(len(train_y))[: round(0.4 * len(train_y))]
noisy_y = train_y.copy()
noisy_y[wrong] = (noisy_y[wrong] + rng.integers(1, 10, len(wrong))) % 10


class MLP(nn.Module):
  width: int = 128

  @nn.compact
  def __call__(self, x):
    for _ in range(2):
      x = nn.relu(nn.Dense(self.width)(x))
    return nn.Dense(10)(x)


model = MLP()


def loss(params, batch):
  x, y = batch
  logits = model.apply(params, x)
  return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def accuracy(params, x, y):
  return float(np.mean(np.argmax(model.apply(params, x), -1) == y))


# %% tags=["varies"]
EPOCHS, BATCH = 60, 64
STEPS = EPOCHS * (len(train_x) // BATCH)


def train(tx):
  params = model.init(jax.random.key(0), train_x[:1])
  state = tx.init(params)

  @jax.jit
  def step(params, state, batch):
    def grad_fn(params):
      return jax.grad(loss)(params, batch)

    updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), state

  rng = np.random.default_rng(0)
  for _ in range(EPOCHS):
    order = rng.permutation(len(train_x))
    for start in range(0, len(order) - BATCH + 1, BATCH):
      rows = order[start : start + BATCH]
      params, state = step(params, state, (train_x[rows], noisy_y[rows]))
  return params


base = optax.sgd(optax.cosine_decay_schedule(0.1, STEPS), momentum=0.9)
networks = {
    "SGD": train(optax.with_extra_args_support(base)),
    "SAM": train(asam_jax.sam(base, rho=0.5)),
    "ASAM": train(asam_jax.adaptive_sam(base, rho=2.0)),
}
for method, params in networks.items():
  print(f"{method:5} training loss {loss(params, (train_x, noisy_y)):.2f},"
        f" test accuracy {100 * accuracy(params, test_x, test_y):.1f} %")

# %% [markdown]
# ## Measure it
#
# Three measures, on the training set as it is, wrong labels included:
#
# - **worst case**: the largest rise of the loss in the ball, found by a search
#   (Auto-PGD). This is what the objective of ASAM has in it.
# - **average case**: the mean rise under random moves, with its standard error. Cheap:
#   no gradient.
# - **curvature**: the largest eigenvalue of $T_w \nabla^2 L\, T_w$, what the rise is
#   like for very small moves.
#
# All are pure functions of the loss and the parameters; put them under `jax.jit`.

# %% tags=["varies"]
GEOMETRY = asam_jax.Geometry()  # ASAM's default: |w| + 0.01, biases with T = 1
SPHERE = asam_jax.Geometry(normalization="none")


def training_loss(params):
  return loss(params, (train_x, noisy_y))


@jax.jit
def measures(params):
  return {
      "worst, adaptive": sharpness.worst_case(
          training_loss, params, 1.0, geometry=GEOMETRY, restarts=0).value,
      "worst, plain": sharpness.worst_case(
          training_loss, params, 0.25, geometry=SPHERE, restarts=0).value,
      "average, adaptive": sharpness.average_case(
          training_loss, params, 0.1, geometry=GEOMETRY),
      "curvature, adaptive": sharpness.hessian_eigenvalues(
          training_loss, params, geometry=GEOMETRY).values[0],
  }


measured = {method: measures(params) for method, params in networks.items()}
print(f"{'':20}" + "".join(f"{method:>16}" for method in networks))
for name in measured["SGD"]:
  cells = []
  for values in measured.values():
    value = values[name]
    with_error = isinstance(value, sharpness.AverageCase)
    cells.append(f"{value.value:.2f} ± {value.standard_error:.2f}" if with_error
                 else f"{value:.2f}")
  print(f"{name:20}" + "".join(f"{cell:>16}" for cell in cells))

# %% [markdown]
# By every measure, also by that of the other method, the two sharpness-aware networks
# lie in a flatter place than SGD's. A value means something only next to another one
# with the same radius, geometry and data: say all three when you report one.
#
# Over a data set that does not fit into one batch, `m_sharpness` measures batch by
# batch and averages, with a standard error. Its `m`, the number of examples that share
# a perturbation, is part of the definition as well:

# %% tags=["varies"]
measure = sharpness.m_sharpness(
    sharpness.classification_loss(model.apply), m=128, rho=1.0, geometry=GEOMETRY,
    restarts=0)
for method, params in networks.items():
  result = measure(params, (train_x[:512], noisy_y[:512]))
  print(f"{method:5} {result.value:.2f} ± {result.standard_error:.2f}"
        f" over {len(result.values)} batches")

# %% [markdown]
# ## See it
#
# Follow the loss along a line through the weights. `landscape.direction` gives
# directions of length 1 in the geometry, so that at ±1 the line leaves the ball of
# radius ρ. First the direction along which the loss rises fastest:

# %% tags=["varies"]
figure, axis = plt.subplots(figsize=(5.5, 3.3), layout="constrained")
axis.axvspan(-1, 1, color="0.93", zorder=0)
for method, params in networks.items():
  uphill = landscape.direction("gradient", params, geometry=GEOMETRY,
                               loss=training_loss)
  line = landscape.line(training_loss, params, uphill, 4.0, extent=1.5, points=61)
  axis.plot(line.x, line.values, color=COLORS[method], label=method)
axis.set(title="uphill (left: downhill at first), ρ = 4", xlabel="position / ρ",
         ylabel="loss on the training set", xlim=(-1.5, 1.5), ylim=(0, 4))
axis.legend(loc="upper center")
plt.show()

# %% [markdown]
# The shaded part is the ball. SGD's loss is the lowest at $w$ itself, for it has
# learned the wrong labels too, and it does not take much to lose that.
#
# In a plane there is more to see. Both axes are random directions of the geometry; the
# closed curve is where the plane leaves the ball. There are many thousand directions
# and few of them matter, so random ones have to go much farther: here ρ = 48. The
# levels are the same in all pictures.

# %% tags=["varies"]
levels = np.geomspace(0.25, 5.66, 19)
figure, axes = plt.subplots(
    1, 3, figsize=(10, 3.3), sharey=True, layout="constrained")
for axis, (method, params) in zip(axes, networks.items(), strict=True):
  ways = [landscape.direction("adaptive", params, geometry=GEOMETRY,
                              key=jax.random.key(seed)) for seed in (0, 1)]
  plane = landscape.surface(
      training_loss, params, ways, 48.0, geometry=GEOMETRY, extent=1.5, points=21)
  drawn = axis.contourf(plane.x, plane.y, plane.values, levels, cmap="viridis",
                        norm="log", extend="both")
  axis.plot(*np.asarray(plane.ball).T, color="white", lw=1.2)
  axis.plot(0, 0, "o", color="white", markersize=4)
  axis.set(title=method, xlabel=r"$\epsilon_1 / \rho$", aspect="equal")
axes[0].set_ylabel(r"$\epsilon_2 / \rho$")
bar = figure.colorbar(drawn, ax=axes, shrink=0.9, label="loss on the training set",
                      ticks=[0.25, 0.5, 1, 2, 4], format="%g")
bar.ax.minorticks_off()
plt.show()

# %% [markdown]
# ## What it tells
#
# Does the sharper of two networks generalize worse? Take networks that differ in how
# they were trained and all fit their training set, which is small here and has right
# labels: four learning rates, four strengths of weight decay, three seeds. All
# forty-eight train side by side under `vmap`. The generalization gap is training
# accuracy minus test accuracy.

# %% tags=["varies"]
few_x, many_x, few_y, many_y = model_selection.train_test_split(
    images, labels, train_size=300, stratify=labels, random_state=0)
few = (few_x, few_y)
model = MLP(64)
settings = jnp.array(list(itertools.product(
    (0.01, 0.03, 0.1, 0.3), (5e-6, 5e-5, 5e-4, 5e-3), (0, 1, 2))))
epochs, batch = 80, 32
steps = epochs * (len(few_x) // batch)


def make_tx(learning_rate, weight_decay):
  schedule = optax.cosine_decay_schedule(learning_rate, steps)
  return optax.chain(optax.add_decayed_weights(weight_decay),
                     optax.sgd(schedule, momentum=0.9))


def start(setting):
  params = model.init(jax.random.key(setting[2].astype(int)), few_x[:1])
  return params, make_tx(*setting[:2]).init(params)


@jax.jit
def step(carry, rows):
  def one(params, state, setting):
    grads = jax.grad(loss)(params, (jnp.asarray(few_x)[rows], jnp.asarray(few_y)[rows]))
    updates, state = make_tx(*setting[:2]).update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return jax.vmap(one)(*carry, settings)


carry = jax.vmap(start)(settings)
rng = np.random.default_rng(0)
for _ in range(epochs):
  order = rng.permutation(len(few_x))
  for first in range(0, len(order) - batch + 1, batch):
    carry = step(carry, order[first : first + batch])
many = carry[0]


def accuracies(x, y):
  def right(params):
    return jnp.mean(jnp.argmax(model.apply(params, x), -1) == y)

  return np.asarray(jax.jit(jax.vmap(right))(many))


fits = accuracies(few_x, few_y) >= 0.99
gap = 100 * (accuracies(few_x, few_y) - accuracies(many_x, many_y))
print(f"{fits.sum()} networks fit their training set; their gaps are"
      f" {gap[fits].min():.1f} to {gap[fits].max():.1f} %")

# %% [markdown]
# Rank them by worst-case sharpness, plain and adaptive, and compare the ranking with
# that by the gap. Kendall's τ is 1 for the same order and 0 for no relation; in
# brackets is its 95 % bootstrap interval.

# %% tags=["varies"]
INVARIANT = asam_jax.Geometry(eta=0.0, normalize=lambda path, leaf: True)
kinds = {
    "sharpness": (0.1, SPHERE, COLORS["SAM"]),
    "adaptive sharpness": (1.0, INVARIANT, COLORS["ASAM"]),
}
figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
for axis, (kind, (rho, geometry, color)) in zip(axes, kinds.items(), strict=True):
  measure = functools.partial(
      sharpness.worst_case, lambda params: loss(params, few), rho=rho,
      geometry=geometry, restarts=0, steps=10)
  values = np.asarray(jax.jit(jax.vmap(measure))(many).value)
  tau = sharpness.rank_correlation(values[fits], gap[fits]).tau
  print(f"{kind:18} τ = {tau.value:.2f} [{tau.low:.2f}, {tau.high:.2f}]")
  sizes = {5e-6: 16, 5e-5: 32, 5e-4: 56, 5e-3: 90}
  for decay, size in sizes.items():
    chosen = fits & np.isclose(settings[:, 1], decay)
    axis.scatter(values[chosen], gap[chosen], s=size, color=color, alpha=0.55, lw=0,
                 label=f"{decay:g}")
  axis.set(title=f"τ = {tau.value:.2f}", xlabel=f"{kind}, ρ = {rho:g}", xscale="log")
axes[0].set_ylabel("generalization gap (%)")
axes[1].legend(title="weight decay", loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# Plain sharpness is misled by the size of the weights, which learning rate and weight
# decay change and predictions hardly feel. Adaptive sharpness has that taken out, and
# orders these networks better than chance.
#
# ## What it does not tell
#
# - These are forty small networks of one kind. The repository's study of 625 networks
#   on the same digits (`examples/sharpness_study.md`) has τ = 0.51 [0.46, 0.56] for
#   adaptive and 0.29 [0.22, 0.36] for plain sharpness. That is an order, no law: two
#   networks picked at random are still ordered the wrong way round in one of four
#   cases.
# - Elsewhere it fails. [Andriushchenko et al., 2023](https://arxiv.org/abs/2302.07011)
#   find that with large networks, strong augmentation or fine-tuning, sharpness
#   correlates little with generalization, and rather tells how large the learning rate
#   was.
# - So compare networks of the same kind, with the same data, radius and geometry. And
#   judge a method by its test accuracy.
#
# Next: *5 At the price of SGD*.
