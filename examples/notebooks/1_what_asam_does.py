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
# # What ASAM does
#
# Two networks can fit the training set equally well and still differ in how they fare
# on new data. One of the better predictors of that is how *flat* the loss is around the
# weights: if it hardly rises when the weights are moved a little, then it hardly
# matters that the loss of new data is not quite that of the training data.
# Sharpness-aware minimization (SAM) trains for flatness directly. Instead of the loss
# at the weights $w$ it lowers the worst loss in a neighbourhood of them:
#
# $$\min_w\ \max_{\|\epsilon\|_2 \le \rho} L(w + \epsilon)$$
#
# ASAM, *adaptive* SAM ([Kwon et al., 2021](https://arxiv.org/abs/2102.11600)), asks
# what neighbourhood that should be. Moving a weight of 0.01 by 0.1 is a lot; moving one
# of 10 by 0.1 is nothing. So it measures the move relative to the weights:
#
# $$\min_w\ \max_{\|T_w^{-1} \epsilon\|_2 \le \rho} L(w + \epsilon),
# \qquad T_w = \mathrm{diag}(|w_1|, \ldots, |w_k|)$$
#
# This notebook shows with two weights, and then with a network, why that makes a
# difference. You need to know what a gradient is, and no paper.

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

import asam_jax
from asam_jax import sharpness

COLORS = {"SGD": "#404040", "SAM": "#0072B2", "ASAM": "#D55E00"}
plt.rcParams.update({
    "figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 11, "legend.frameon": False, "lines.linewidth": 1.6,
})

# %% [markdown]
# ## One step, by hand
#
# The inner maximum is not solved, it is approximated: replace $L$ around $w$ by its
# tangent plane, whose slope is the gradient $g = \nabla L(w)$, and the worst point of
# the neighbourhood has a formula,
#
# $$\hat\epsilon = \rho\,\frac{T_w^2\, g}{\|T_w\, g\|_2}
# \qquad\text{(for SAM, } T_w = 1\text{:}\quad \hat\epsilon = \rho\, g / \|g\|_2).$$
#
# Then comes the second gradient, at that point, and the optimizer of your choice takes
# its step from $w$ with it. So the whole method is: *gradient, walk uphill by
# $\hat\epsilon$, gradient, step*. Take a loss of two weights which, like two layers of
# a network, act by their product:

# %%
def loss(w):
  return (w[0] * w[1] - 3.0) ** 2


w, rho = jnp.array([2.0, 0.6]), 0.5
g = jax.grad(loss)(w)
T = jnp.abs(w)

by_hand = {
    "SAM": rho * g / jnp.linalg.norm(g),
    "ASAM": rho * T**2 * g / jnp.linalg.norm(T * g),
}
print(f"gradient ({g[0]:.2f}, {g[1]:.2f})")
for method, (a, b) in by_hand.items():
  print(f"{method:5} moves w by ({a:.3f}, {b:.3f}), which is"
        f" {a / w[0]:+.0%} and {b / w[1]:+.0%}")

# %% [markdown]
# Both moves have the same length in their own measure. SAM nearly wipes out the small
# weight and leaves the large one as it is. ASAM changes both by the same share.
#
# In the library, whatever turns a gradient into such a move is an ordinary
# `optax.GradientTransformation`, the *ascent*. Around it there is a replacement for
# `jax.value_and_grad` that does the two passes, and it is all that a training loop
# needs:

# %%
for method, normalization in (("SAM", "none"), ("ASAM", "elementwise")):
  ascent = asam_jax.ascent(rho, eta=0.0, normalization=normalization)
  epsilon, _ = ascent.update(g, ascent.init(w), w)
  np.testing.assert_allclose(epsilon, by_hand[method], rtol=1e-5)

  value, (a, b) = asam_jax.value_and_grad(
      loss, rho=rho, eta=0.0, normalization=normalization)(w)
  np.testing.assert_allclose((a, b), jax.grad(loss)(w + epsilon), rtol=1e-5)
  print(f"{method:5} loss at w {value:.2f}, gradient at w + epsilon ({a:.2f}, {b:.2f})")

# %% [markdown]
# (`eta` is a small number, 0.01 by default, that is added to $|w|$ so that a weight of
# zero can move as well. Here we leave it out, to see the pure thing.)

# %%
def arrow(axis, start, move, color, label):
  axis.annotate(
      "", start + move, start,
      arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.8, "shrinkA": 0,
                  "shrinkB": 0})
  axis.plot([], [], color=color, lw=1.8, label=label)


def boundary(w, normalization, rho, points=400):
  """The points that the ascent reaches, for gradients in all directions."""
  ascent = asam_jax.ascent(rho, eta=0.0, normalization=normalization)
  angles = np.linspace(0, 2 * np.pi, points)
  gradients = jnp.stack([jnp.cos(angles), jnp.sin(angles)], 1)
  epsilon, _ = jax.vmap(lambda g: ascent.update(g, ascent.init(w), w))(gradients)
  return np.asarray(w + epsilon)


x, y = np.meshgrid(np.linspace(0, 3.6, 200), np.linspace(-0.2, 2.4, 200))
figure, axes = plt.subplots(1, 2, figsize=(9, 4.3), sharey=True, layout="constrained")
for axis, (method, normalization) in zip(
    axes, (("SAM", "none"), ("ASAM", "elementwise")), strict=True):
  color = COLORS[method]
  contours = axis.contour(
      x, y, loss((x, y)), (0.1, 0.5, 1, 2, 3, 5, 7), colors="0.75", linewidths=0.8)
  axis.clabel(contours, fontsize=7)
  axis.plot(*boundary(w, normalization, rho).T, color=color, lw=1)
  epsilon = by_hand[method]
  perturbed = jax.grad(loss)(w + epsilon)
  arrow(axis, np.asarray(w), np.asarray(epsilon), color, r"$\hat\epsilon$, uphill")
  arrow(axis, np.asarray(w), np.asarray(-0.1 * g), COLORS["SGD"],
        r"$-0.1\,\nabla L(w)$, SGD's step")
  arrow(axis, np.asarray(w), np.asarray(-0.1 * perturbed), "#009E73",
        rf"$-0.1\,\nabla L(w + \hat\epsilon)$, {method}'s step")
  axis.plot(*w, "o", color="black", markersize=5)
  axis.annotate("$w$", w, (7, -12), textcoords="offset points")
  axis.set(title=f"{method}, ρ = {rho}", xlabel="$w_1$", aspect="equal",
           xlim=(0.4, 3.6), ylim=(-0.2, 2.4))
  axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=9)
axes[0].set_ylabel("$w_2$")
plt.show()

# %% [markdown]
# The grey lines are contours of the loss; on the closed curve lie the points that the
# ascent can reach: a circle for SAM, and for ASAM an ellipse that is long where the
# weight is large.
#
# ## Why the shape matters: the same network, written differently
#
# In a ReLU network you can multiply all that goes into a unit by 3 and divide all that
# comes out by 3, and no output changes, for $\mathrm{ReLU}(3 z) = 3\,\mathrm{ReLU}(z)$.
# It is the same function with other weights, $A w$ in place of $w$. Our loss of two
# weights has that symmetry too: with $A = \mathrm{diag}(3, 1/3)$, $L(A w) = L(w)$.
#
# A measure of flatness that says something about the *function* must give both the same
# value. This is Figure 1 of the paper:

# %%
def rise(w, normalization, rho):
  """By how much the loss rises at the worst of the points."""
  points = boundary(w, normalization, rho, 2000)
  return float(max(map(loss, points)) - loss(np.asarray(w)))


A = np.array([3.0, 1 / 3])
w = np.ones(2)
x, y = np.meshgrid(np.linspace(0, 5, 300), np.linspace(-0.3, 2, 300))
figure, axes = plt.subplots(1, 2, figsize=(9, 2.9), sharey=True, layout="constrained")
for axis, (method, normalization) in zip(
    axes, (("SAM", "none"), ("ASAM", "elementwise")), strict=True):
  axis.contour(x, y, loss((x, y)), (0.5, 1, 2, 3, 4, 6, 8, 10, 12), colors="0.8",
               linewidths=0.8)
  for center, name in ((w, "w"), (A * w, "Aw")):
    points = boundary(jnp.asarray(center), normalization, rho)
    axis.fill(*points.T, color=COLORS[method], alpha=0.2, lw=0)
    axis.plot(*points.T, color=COLORS[method])
    axis.plot(*center, "o", color="black", markersize=4)
    worst = rise(jnp.asarray(center), normalization, rho)
    axis.annotate(f"{name}: +{worst:.2f}", (center[0], points[:, 1].max()), (0, 4),
                  textcoords="offset points", ha="center")
    print(f"{method:5} at {name:2}: the loss rises by {worst:.2f}")
  axis.set(title=method, xlabel="$w_1$", aspect="equal")
axes[0].set_ylabel("$w_2$")
plt.show()

# %% [markdown]
# SAM's circle has the same size everywhere. At $A w$ it reaches far along the weight
# that has become small, and finds a rise three times as large: the same function looks
# sharper. ASAM's ellipse moves along with the weights and finds the same.
#
# The same in a network. We fit a small one to handwritten digits, rescale a layer by
# $c$ and the next one by $1/c$, and measure the worst rise of the loss in either
# neighbourhood by a search (`asam_jax.sharpness`). For exact invariance `eta` is 0 and
# the biases are scaled as well; by default they are not, as in the paper's experiments.

# %%
images, labels = datasets.load_digits(return_X_y=True)
images = jnp.asarray(images / 16, jnp.float32)


class Network(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Dense(32, name="first")(x))
    return nn.Dense(10, name="second")(x)


network = Network()
params = network.init(jax.random.key(0), images)["params"]


def digits_loss(params):
  logits = network.apply({"params": params}, images)
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def descend(params):
  return jax.tree.map(lambda w, g: w - 0.5 * g, params, jax.grad(digits_loss)(params))


for _ in range(200):
  params = descend(params)


def rescaled(params, c):
  first = jax.tree.map(lambda w: c * w, params["first"])
  second = {**params["second"], "kernel": params["second"]["kernel"] / c}
  return {"first": first, "second": second}


plain = asam_jax.Geometry(normalization="none")
adaptive = asam_jax.Geometry(eta=0.0, normalize=lambda path, leaf: True)


@jax.jit
def sharpnesses(params):
  return [
      sharpness.worst_case(digits_loss, params, radius, geometry=geometry).value
      for radius, geometry in ((0.3, plain), (1.0, adaptive))
  ]


scales = (1, 2, 4, 8)
rises = []
print("  c   loss  sharpness  adaptive sharpness")
for c in scales:
  point = rescaled(params, c)
  rises.append([float(x) for x in sharpnesses(point)])
  print(f"{c:3} {digits_loss(point):6.3f} {rises[-1][0]:10.2f} {rises[-1][1]:19.2f}")

# %%
figure, axis = plt.subplots(figsize=(4.6, 3.1), layout="constrained")
for method, values in zip(("SAM", "ASAM"), np.transpose(rises), strict=True):
  name = "sharpness" if method == "SAM" else "adaptive sharpness"
  axis.plot(scales, values, "s-", color=COLORS[method], label=f"{name} ({method}'s)")
axis.set(xlabel="c: first layer times c, second divided by c",
         ylabel="worst rise of the loss", yscale="log")
axis.set_xscale("log", base=2)
axis.set_xticks(scales, [str(c) for c in scales])
axis.set_ylim(0.05, 200)
axis.legend(loc="upper left")
plt.show()

# %% [markdown]
# ## What it does to the path
#
# Figure 3 of the paper has a loss with a ReLU in it, $L(w_1, w_2) =
# |w_1\,\mathrm{ReLU}(w_2) - 0.04|$, and two starts that are rescalings of each other.
# The minima lie on a curve, flatter towards its middle. Both methods have the same
# radius, 0.05, and the same learning rate. A method link of the library wraps any
# optimizer of Optax; here it is plain gradient descent:

# %%
def toy(w):
  return jnp.abs(w[0] * jax.nn.relu(w[1]) - 0.04)


def path(tx, start, steps=120):
  def step(carry, _):
    w, state = carry
    grad_fn = jax.grad(toy)
    updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
    w = optax.apply_updates(w, updates)
    return (w, state), w

  start = jnp.asarray(start)
  _, points = jax.lax.scan(step, (start, tx.init(start)), length=steps)
  return np.concatenate([start[None], points])


optimizers = {
    "SAM": asam_jax.sam(optax.sgd(0.05), rho=0.05),
    "ASAM": asam_jax.adaptive_sam(optax.sgd(0.05), rho=0.05, eta=0.0),
}
starts = ((0.2, 0.05), (0.3, 0.1 / 3))
x, y = np.meshgrid(np.linspace(0.15, 0.4, 300), np.linspace(-0.02, 0.24, 300))
figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
for axis, (method, tx) in zip(axes, optimizers.items(), strict=True):
  axis.contour(x, y, np.abs(x * np.maximum(y, 0) - 0.04), 12, colors="0.8",
               linewidths=0.8)
  valley = np.linspace(0.168, 0.4, 100)
  axis.plot(valley, 0.04 / valley, color="0.5", ls=":", label="loss 0")
  for start in starts:
    points = path(tx, start)
    moved = np.linalg.norm(points[-1] - points[0])
    print(f"{method:5} from ({start[0]:.3f}, {start[1]:.3f}) to"
          f" ({points[-1][0]:.2f}, {points[-1][1]:.2f}), loss {toy(points[-1]):.3f}")
    axis.plot(*points.T, ".-", color=COLORS[method], markersize=4, lw=0.8)
    axis.plot(*start, "o", color="black", markersize=5)
    below = moved > 0
    axis.annotate("start" if below else "start, and end", start, (7, -11),
                  textcoords="offset points", fontsize=9)
    if below:
      axis.plot(*points[-1], "*", color=COLORS[method], markersize=12)
  axis.set(title=f"{method}, ρ = 0.05, 120 steps", xlabel="$w_1$")
axes[0].set_ylabel("$w_2$")
axes[0].legend(loc="upper right")
plt.show()

# %% [markdown]
# SAM from the right start never moves. Its step uphill, of fixed length 0.05, is longer
# than $w_2 = 0.033$: it lands where the ReLU is off, and there the gradient is zero.
# From the left start, the same function in other weights, it works. ASAM's step uphill
# is at most 5 % of each weight, so it can't switch a unit off, and it arrives from
# both.
#
# In a real network nothing is that stark. The lesson that stays: SAM's $\rho$ is in the
# unit of the weights, so its meaning changes with the layer, with weight decay and as
# training goes on. ASAM's is a share of the weights.
#
# ## Every p
#
# The length of a move can also be measured by another norm, $\|T_w^{-1}\epsilon\|_p$
# for any $p$ from 1 to $\infty$. The paper's choice, and the default, is 2. With $p =
# \infty$ every weight moves by the same share ρ, against or along its sign; with $p =
# 1$ all of it goes to a single weight. Between these, $1/p + 1/q = 1$ and
#
# $$\hat\epsilon = \rho\, T_w\, \mathrm{sign}(g)\,
# \left(\frac{|T_w g|}{\|T_w g\|_q}\right)^{q-1}.$$
#
# Whatever the norm, $\hat\epsilon$ is the point of the neighbourhood that lies farthest
# along the gradient. The dashed line has all points that lie equally far:

# %%
w, g, rho = jnp.array([2.0, 1.0]), jnp.array([0.5, 1.6]), 0.4
angles = np.linspace(0, 2 * np.pi, 721)
rays = np.stack([np.cos(angles), np.sin(angles)], 1)
exponents = (1, 1.5, 2, 4, np.inf)
figure, axes = plt.subplots(
    1, len(exponents), figsize=(10.5, 2.6), sharey=True, layout="constrained")
for axis, p in zip(axes, exponents, strict=True):
  geometry = asam_jax.Geometry(eta=0.0, p=p)
  lengths = jax.vmap(lambda ray, of=geometry: of.norm(ray, w))(jnp.asarray(rays))
  ball = rho * rays / np.asarray(lengths)[:, None]
  ascent = asam_jax.ascent(rho, eta=0.0, p=p)
  epsilon = np.asarray(ascent.update(g, ascent.init(w), w)[0])
  reached = float(g @ epsilon)
  np.testing.assert_allclose(reached, rho * geometry.dual_norm(g, w), rtol=1e-5)
  assert np.all(ball @ np.asarray(g) <= reached * (1 + 1e-5))  # nowhere farther

  axis.fill(*ball.T, color=COLORS["ASAM"], alpha=0.2, lw=0)
  axis.plot(*ball.T, color=COLORS["ASAM"])
  along = np.array([-1.2, 1.2])
  axis.plot(along, (reached - float(g[0]) * along) / float(g[1]), "--", color="0.4",
            lw=1)
  arrow(axis, np.zeros(2), np.asarray(g) / 4, COLORS["SGD"], None)
  axis.plot(*epsilon, "*", color=COLORS["ASAM"], markersize=13, markeredgecolor="white")
  name = "∞" if np.isinf(p) else f"{p:g}"
  axis.set(title=f"p = {name}", xlabel=r"$\epsilon_1$", xlim=(-1.1, 1.1),
           ylim=(-0.75, 0.95), aspect="equal")
  print(f"p = {name:3}  moves w by ({epsilon[0]:+.3f}, {epsilon[1]:+.3f}),"
        f" first-order rise {reached:.3f}")
axes[0].set_ylabel(r"$\epsilon_2$")
plt.show()

# %% [markdown]
# (The arrow is the gradient; $w = (2, 1)$, so the shapes are twice as wide as high.)
#
# ## Which weights get T
#
# $T_w$ need not be $|w|$ for each weight by itself. `"filterwise"` takes one norm for
# each convolution filter, `"layerwise"` one for each array, `"none"` is SAM, and a
# function `(w, eta) -> T` is your own. Biases keep $T = 1$ by default: that is the
# choice of the paper's code, and so part of what its radii mean. `describe` tells what
# happens to your parameters:

# %%
print(asam_jax.describe(params))

# %% [markdown]
# ## In short
#
# - SAM: a second gradient at the worst nearby point, and a step with that. Twice the
#   cost of a step.
# - ASAM: nearby is measured relative to the weights, so writing the same network
#   differently changes nothing.
# - One number to choose, the radius ρ.
#
# Next: *2 ASAM in a Flax training loop*.
