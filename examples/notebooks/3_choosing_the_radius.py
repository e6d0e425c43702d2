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
# # Choosing the radius
#
# ASAM asks for one number, the radius $\rho$: how far it walks uphill before it takes
# the gradient that it steps along. Too small, and you pay two gradients for what one
# gives. Too large, and the network does not train at all, and the two can be a factor
# of four apart. This notebook shows runs of each kind, how a run tells which it is
# without any look at test data, and a rule that sets the radius while training goes.

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

COLORS = {"ASAM": "#D55E00"}
plt.rcParams.update({
    "figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.3, "axes.titlesize": 11,
    "legend.frameon": False, "lines.linewidth": 1.6,
})

# %% [markdown]
# ## The task
#
# The 8×8 digits of scikit-learn. One half to train on, with 40 % of its labels made
# wrong; the other half, with all labels right, to test on. A network that fits
# everything learns the wrong labels by heart.

# %%
images, labels = datasets.load_digits(return_X_y=True)
train_x, test_x, train_y, test_y = model_selection.train_test_split(
    np.float32(images / 16), np.int32(labels), train_size=0.5, stratify=labels,
    random_state=0)
rng = np.random.default_rng(0)
wrong = rng.permutation(len(train_y))[: round(0.4 * len(train_y))]
noisy_y = train_y.copy()
noisy_y[wrong] = (noisy_y[wrong] + rng.integers(1, 10, len(wrong))) % 10
BATCH, EPOCHS = 64, 30
PER_EPOCH = len(train_x) // BATCH
STEPS = EPOCHS * PER_EPOCH


class MLP(nn.Module):
  @nn.compact
  def __call__(self, x):
    for _ in range(2):
      x = nn.relu(nn.Dense(128)(x))
    return nn.Dense(10)(x)


model = MLP()
start = model.init(jax.random.key(0), train_x[:1])
base = optax.sgd(optax.cosine_decay_schedule(0.1, STEPS), momentum=0.9)


def loss(params, batch):
  x, y = batch
  logits = model.apply(params, x)
  return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@jax.jit
def accuracy(params):
  return 100 * jnp.mean(jnp.argmax(model.apply(params, test_x), -1) == test_y)


# %% [markdown]
# With `with_info=True` a step says what it saw: both losses, and the cosine of the
# angle between the two gradients. It costs no pass through the network. The radius is
# a traced number here, so that one compiled step serves all runs.

# %%
@jax.jit
def step(params, state, batch, rho):
  fun = asam_jax.value_and_grad(loss, rho=rho, with_info=True)
  _, grads, info = fun(params, batch)
  updates, state = base.update(grads, state, params)
  return optax.apply_updates(params, updates), state, info


def batches(seed=0):
  rng = np.random.default_rng(seed)
  for _ in range(EPOCHS):
    order = rng.permutation(len(train_x))
    for i in range(PER_EPOCH):
      rows = order[i * BATCH : (i + 1) * BATCH]
      yield train_x[rows], noisy_y[rows]


def run(rho):
  params, state, infos, curve = start, base.init(start), [], []
  for i, batch in enumerate(batches()):
    params, state, info = step(params, state, batch, rho)
    infos.append(info)
    if (i + 1) % PER_EPOCH == 0:
      curve.append(float(accuracy(params)))
  return infos, curve


RADII = (0.1, 2.0, 3.0, 16.0)
runs = {rho: run(rho) for rho in RADII}

# %% [markdown]
# ## What the runs say of themselves
#
# `radius_verdict` reads the infos of a run. It is told the loss of a network that has
# learned nothing, $\log 10$ for ten classes. It sees no test data:

# %% tags=["varies"]
for infos, _ in runs.values():
  print(asam_jax.radius_verdict(infos, chance=np.log(10)))

# %% [markdown]
# And this is what happened, with the test half that the verdict did not see:

# %% tags=["varies"]
def smooth(x):
  return np.convolve(x, np.ones(PER_EPOCH) / PER_EPOCH, "valid")


figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.1), layout="constrained")
epochs = np.arange(1, EPOCHS + 1)
shades = plt.colormaps["viridis"](np.linspace(0.85, 0.0, len(RADII)))
for (rho, (infos, curve)), marker, shade in zip(
    runs.items(), "os^D", shades, strict=True):
  verdict = asam_jax.radius_verdict(infos, chance=np.log(10)).verdict
  style = {"color": shade, "label": f"ρ = {rho:g}: {verdict}"}
  axes[0].plot(epochs, curve, marker=marker, markersize=3, **style)
  cosines = smooth([float(info.cosine) for info in infos])
  axes[1].plot(np.linspace(1, EPOCHS, len(cosines)), cosines, **style)
  losses = smooth([float(info.value) for info in infos])
  axes[2].plot(np.linspace(1, EPOCHS, len(losses)), losses, **style)
axes[1].axhspan(0.70, 0.93, color="0.5", alpha=0.15, linewidth=0)
axes[1].annotate("about right", (EPOCHS, 0.94), ha="right", fontsize=9, color="0.3")
axes[2].axhline(np.log(10), color="0.6", linestyle=":", linewidth=1)
axes[2].annotate("chance", (EPOCHS, np.log(10)), (0, -12), textcoords="offset points",
                 ha="right", fontsize=9, color="0.3")
for axis, name in zip(
    axes, ("test accuracy (%)", "cosine of the two gradients", "training loss"),
    strict=True):
  axis.set(xlabel="epoch", ylabel=name)
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=4)
plt.show()

# %% [markdown]
# - **Too small**: the two gradients are nearly the same, so the step is nearly SGD's.
#   The training loss goes down because wrong labels are learned by heart, and test
#   accuracy with it.
# - **About right**: the loss stays up where the wrong labels keep it.
# - **Too large**: the second gradient has little to do with the first. The network
#   learns, but late and little.
# - **Collapsed**: the loss stays that of a network that says the same of every image.
#   The cosine can be high again there: look at the loss first.
#
# From right to too large it is a factor of 1.5 here, and not much further to the cliff.
#
# ## A radius that sets itself
#
# The cosine has no unit. It knows neither how large the weights are nor which of them
# are normalized, and it is about the same in well-tuned runs of different networks. So
# it can be *held*: `auto_radius(cosine)` in the place of the number begins with a small
# radius, and lets it grow while the cosine is above its target and shrink below.

# %%
def run_auto(target):
  tx = asam_jax.adaptive_sam(base, rho=asam_jax.auto_radius(target))

  @jax.jit
  def step(params, state, batch):
    def grad_fn(params):
      return jax.grad(loss)(params, batch)

    updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), state

  params, state, radii = start, tx.init(start), []
  for batch in batches():
    params, state = step(params, state, batch)
    radii.append(optax.tree_utils.tree_get(state, "rho"))
  return np.array(radii), float(accuracy(params))


TARGETS = {0.7: "-", 0.8: "--", 0.9: ":"}
automatic = {target: run_auto(target) for target in TARGETS}

# %% tags=["varies"]
SWEEP = [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
swept = [runs[rho][1][-1] if rho in runs else run(rho)[1][-1] for rho in SWEEP]
figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.3), layout="constrained")
axes[0].plot(SWEEP, swept, "s-", color=COLORS["ASAM"], markersize=5,
             label="fixed radius")
for target, line in TARGETS.items():
  radii, reached = automatic[target]
  axes[0].axhline(reached, color="0.3", linestyle=line, linewidth=1.4,
                  label=f"auto, cosine {target:g}")
  axes[1].plot(np.arange(STEPS) / PER_EPOCH, radii, color="0.3", linestyle=line,
               label=f"cosine {target:g}")
axes[0].set(xlabel="radius ρ", ylabel="test accuracy (%)", xscale="log")
axes[0].set_xticks(SWEEP, [f"{rho:g}" for rho in SWEEP])
axes[0].minorticks_off()
axes[0].legend(loc="lower left", fontsize=9)
axes[1].set(xlabel="epoch", ylabel="radius ρ that the rule chose", yscale="log")
axes[1].set_yticks([0.3, 1, 3], ["0.3", "1", "3"])
axes[1].minorticks_off()
axes[1].legend(fontsize=9)
figure.supxlabel("One run of each.", fontsize=9, color="0.3")
plt.show()

# %% [markdown]
# The left panel is the reason for the rule: right of the best radius there is a cliff,
# and the three targets stay on the hill. How much one wants to regularize, no rule can
# know, so a knob is left; but it means the same for every network and every $T_w$, and
# no value of it collapses here.
#
# It is not perfect. With batch norm and many wrong labels the default of 0.8 is too
# timid, and 0.7 or less is better; `docs/radius.md` has the table of 26 tasks.
#
# ## In short
#
# - Begin with $\rho$ = 0.5 for ASAM and 0.05 for SAM, or with `auto_radius()`.
# - Go up by factors of two, and stop a factor of two below where the loss no longer
#   falls.
# - `with_info=True` and `radius_verdict(infos, chance=...)` tell where you stand.
