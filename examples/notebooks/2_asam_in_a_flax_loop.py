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
# # ASAM in a Flax training loop
#
# You have a training loop in Flax and want to try ASAM in it. Two lines change. This
# notebook shows which, what each does, and what becomes of the rest of a real loop:
# batch norm, dropout, weight decay, a learning rate schedule, checkpoints. First with
# NNX modules, then with linen and a `TrainState`.
#
# ASAM takes two gradients in each step: one at the weights $w$, to find the direction
# in which the loss rises fastest, and one a small way in that direction, at $w +
# \hat\epsilon$. The optimizer steps from $w$ along the second. (Why that helps is told
# in *1 What ASAM does*.)

# %% tags=["skip-execution"]
# Needed where asam_jax is not installed yet, as in Colab.
# %pip install -q "asam_jax[examples,nnx,sharpness]"

# %%
import pathlib
import tempfile
from typing import Any

from flax import linen as nn
from flax import nnx
from flax.training import train_state
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
from sklearn import datasets
from sklearn import model_selection

import asam_jax
import asam_jax.nnx

COLORS = {"SGD": "#404040", "ASAM": "#D55E00"}
plt.rcParams.update({
    "figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.3, "axes.titlesize": 11,
    "legend.frameon": False, "lines.linewidth": 1.6,
})

# %% [markdown]
# ## The task
#
# The 8×8 digits that come with scikit-learn: one half to train on, with 40 % of its
# labels made wrong; the other half, with all labels right, to test on. A network that
# fits everything learns the wrong labels by heart, and its test accuracy falls.

# %%
images, labels = datasets.load_digits(return_X_y=True)
train_x, test_x, train_y, test_y = model_selection.train_test_split(
    np.float32(images / 16), np.int32(labels), train_size=0.5, stratify=labels,
    random_state=0)
rng = np.random.default_rng(0)
wrong = rng.permutation(len(train_y))[: round(0.4 * len(train_y))]
noisy_y = train_y.copy()
noisy_y[wrong] = (noisy_y[wrong] + rng.integers(1, 10, len(wrong))) % 10
print(f"{len(train_y)} images to train on, {np.sum(noisy_y != train_y)} of their labels"
      f" wrong; {len(test_y)} to test on")

figure, axes = plt.subplots(1, 10, figsize=(9, 1.3), layout="constrained")
for axis, image, given, true in zip(axes, train_x, noisy_y, train_y, strict=False):
  axis.imshow(image.reshape(8, 8), cmap="gray_r")
  axis.axis("off")
  color = "black" if given == true else "#D55E00"
  axis.set_title(str(given) if given == true else f"{given} (is {true})", fontsize=9,
                 color=color)
plt.show()

# %% [markdown]
# ## The loop as it is
#
# Nothing in here knows of ASAM: an NNX module with batch norm and dropout, SGD with
# momentum, weight decay and a cosine schedule.

# %%
EPOCHS, BATCH = 40, 64
STEPS = EPOCHS * (len(train_x) // BATCH)


class Model(nnx.Module):
  def __init__(self, rngs):
    self.hidden = nnx.Linear(64, 128, rngs=rngs)
    self.norm = nnx.BatchNorm(128, momentum=0.9, rngs=rngs)
    self.dropout = nnx.Dropout(0.2, rngs=rngs)
    self.head = nnx.Linear(128, 10, rngs=rngs)

  def __call__(self, x):
    return self.head(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def make_tx():
  schedule = optax.cosine_decay_schedule(0.1, STEPS)
  return optax.chain(
      optax.add_decayed_weights(5e-4), optax.sgd(schedule, momentum=0.9))


def loss_fn(model, x, y):
  return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def sgd_step(model, optimizer, x, y):
  loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
  optimizer.update(model, grads)
  return loss


# %% [markdown]
# ## The loop with ASAM
#
# Another function takes the place of `nnx.value_and_grad`. The model, the optimizer and
# the call of `update` stay:
#
# ```diff
# +import asam_jax.nnx
#
# -  loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
# +  loss, grads = asam_jax.nnx.value_and_grad(loss_fn, rho=2.0)(model, x, y)
# ```

# %%
RHO = 2.0


@nnx.jit
def asam_step(model, optimizer, x, y):
  loss, grads = asam_jax.nnx.value_and_grad(loss_fn, rho=RHO)(model, x, y)
  optimizer.update(model, grads)
  return loss


# %% [markdown]
# What the new line does with the parts of a real loop:
#
# | part | what happens |
# |---|---|
# | `loss` | is the loss at $w$, as before |
# | `grads` | is the gradient at $w + \hat\epsilon$, and the optimizer's to use |
# | batch statistics | are those of the pass at $w$; the second pass leaves none |
# | dropout | both passes draw the same masks: they are about the same network |
# | weight decay, clipping | are the optimizer's, so $\hat\epsilon$ has none of them |
# | learning rate schedule | stays as it is |
# | `rho` | the length of $\hat\epsilon$, relative to the size of the weights |
#
# The radius is the one number that ASAM adds. 0.5 is the paper's value for CIFAR-10;
# with so many wrong labels a larger one is better. *3 Choosing the radius* is about
# that.

# %% tags=["varies"]
@nnx.jit
def accuracy(model, x, y):
  return jnp.mean(jnp.argmax(model(x), -1) == y)


def train(step, seed=0):
  model = Model(nnx.Rngs(seed))
  optimizer = nnx.Optimizer(model, make_tx(), wrt=nnx.Param)
  rng = np.random.default_rng(seed)
  curves = []
  for _ in range(EPOCHS):
    model.train()
    order = rng.permutation(len(train_x))
    for start in range(0, len(order) - BATCH + 1, BATCH):
      rows = order[start : start + BATCH]
      step(model, optimizer, train_x[rows], noisy_y[rows])
    model.eval()
    curves.append([accuracy(model, train_x, noisy_y), accuracy(model, test_x, test_y)])
  return model, optimizer, 100 * np.array(curves)


runs = {"SGD": train(sgd_step), "ASAM": train(asam_step)}
for method, (_, _, curves) in runs.items():
  print(f"{method:4}  fits {curves[-1, 0]:.1f} % of the training labels, 40 % of which"
        f" are wrong;  test accuracy {curves[-1, 1]:.1f} %")

# %% tags=["varies"]
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
epochs = np.arange(1, EPOCHS + 1)
for method, (_, _, curves) in runs.items():
  for axis, curve in zip(axes, curves.T, strict=True):
    axis.plot(epochs, curve, color=COLORS[method], label=method)
axes[0].axhline(60, color="0.5", ls=":", lw=1.2)
axes[0].annotate("60 % are right", (EPOCHS, 60), (0, -12), textcoords="offset points",
                 ha="right", color="0.4")
axes[0].set(title="training images: agrees with the label given", xlabel="epoch",
            ylabel="share of the images (%)", ylim=(30, 100))
axes[1].set(title="test images: agrees with the true label", xlabel="epoch")
axes[1].legend(loc="lower left")
plt.show()

# %% [markdown]
# SGD goes on to fit labels that are wrong, and loses digits for that. ASAM stays nearer
# the share of labels that are right, and keeps the digits. It has had as many epochs,
# but two gradients in each step; and one run is one run: the repository's quickstart
# has five of each, with the radius chosen on held-out noisy labels.
#
# ## What a step tells about itself
#
# With `with_info=True` there is a third result. All of it is at hand in a step anyway.

# %% tags=["varies"]
@nnx.jit
def asam_step_with_info(model, optimizer, x, y):
  loss, grads, info = asam_jax.nnx.value_and_grad(
      loss_fn, rho=RHO, with_info=True)(model, x, y)
  optimizer.update(model, grads)
  return loss, info


model, optimizer, _ = runs["ASAM"]
model.train()
_, info = asam_step_with_info(model, optimizer, train_x[:BATCH], noisy_y[:BATCH])
for field in ("value", "perturbed_value", "gap", "cosine", "radius"):
  print(f"{field:15} {getattr(info, field):.3f}")

# %% [markdown]
# `gap` is how much the loss rises on the way to $w + \hat\epsilon$: the sharpness that
# this training lowers. `cosine` tells how much the two gradients differ in direction.
# At 1 the second is a waste; near 0 it has lost touch with the loss that you want to
# minimize.
#
# ## The other door: an optimizer
#
# The same two passes can also live in the optimizer. That is the place for what needs a
# memory from step to step: a schedule of the radius, or a second gradient only now and
# then. It costs two more lines, for the optimizer has to be able to ask for a gradient
# at a point of its choice:

# %%
def make_asam_tx(rho):
  return asam_jax.adaptive_sam(make_tx(), rho=rho)


@nnx.jit
def optimizer_step(model, optimizer, x, y):
  grad_fn = asam_jax.nnx.grad_fn(loss_fn, model, x, y)  # before the forward pass
  loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
  optimizer.update(model, grads, grad_fn=grad_fn)
  return loss


def distance(model, other):
  """The largest difference between parameters of two models."""
  states = [nnx.as_pure(nnx.state(m, nnx.Param)) for m in (model, other)]
  differences = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), *states)
  return max(map(float, jax.tree.leaves(differences)))


def three_steps(step, tx):
  model = Model(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  for start in (0, BATCH, 2 * BATCH):
    rows = slice(start, start + BATCH)
    step(model, optimizer, train_x[rows], noisy_y[rows])
  return model


models = [
    three_steps(asam_step, make_tx()),
    three_steps(optimizer_step, make_asam_tx(RHO)),
    three_steps(optimizer_step, make_asam_tx(optax.linear_schedule(0, RHO, 100))),
]
print("Do both doors give the same model?", distance(models[0], models[1]) < 1e-5)
print("And with a radius that starts from 0?", distance(models[0], models[2]) < 1e-5)

# %% [markdown]
# `grad_fn` is made *before* the forward pass, from the module as it is then. So it
# draws the dropout masks that the forward pass is going to draw, and it never touches
# your module.
#
# ## linen and TrainState
#
# In linen the batch statistics come back as an auxiliary output and the dropout key is
# an argument, so the change is even smaller: `jax.value_and_grad` becomes
# `asam_jax.value_and_grad`. The `TrainState` need not know.
#
# ```diff
# -  (loss, batch_stats), grads = jax.value_and_grad(
# -      loss_fn, has_aux=True)(state.params)
# +  (loss, batch_stats), grads = asam_jax.value_and_grad(
# +      loss_fn, rho=2.0, has_aux=True)(state.params)
# ```

# %%
class LinenModel(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    x = nn.Dense(128)(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
    x = nn.Dropout(0.2, deterministic=not train)(x)
    return nn.Dense(10)(x)


class TrainState(train_state.TrainState):
  batch_stats: Any


@jax.jit
def linen_step(state, x, y, key):
  def loss_fn(params):
    logits, changes = state.apply_fn(
        {"params": params, "batch_stats": state.batch_stats}, x, train=True,
        mutable="batch_stats", rngs={"dropout": key})
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, changes["batch_stats"]

  (_, batch_stats), grads = asam_jax.value_and_grad(
      loss_fn, rho=RHO, has_aux=True)(state.params)
  return state.apply_gradients(grads=grads, batch_stats=batch_stats)


linen_model = LinenModel()


def new_state():
  variables = linen_model.init(jax.random.key(0), train_x[:1], train=False)
  return TrainState.create(apply_fn=linen_model.apply, tx=make_tx(), **variables)


# %% tags=["varies"]
state = new_state()
for step in range(STEPS):
  rows, mask = jax.random.split(jax.random.key(step))
  rows = jax.random.choice(rows, len(train_x), (BATCH,), replace=False)
  state = linen_step(state, train_x[rows], noisy_y[rows], mask)

variables = {"params": state.params, "batch_stats": state.batch_stats}
logits = linen_model.apply(variables, test_x, train=False)
print(f"linen  test accuracy {100 * np.mean(np.argmax(logits, -1) == test_y):.1f} %")

# %% [markdown]
# ## Checkpoints
#
# With the functions of this notebook ASAM keeps no state: save what you saved before.
# The optimizer of the other door keeps three numbers, in Optax's state with the rest.
# Either way Orbax saves and restores it all, and training goes on bit for bit:

# %%
def saved(model, optimizer):
  return nnx.to_pure_dict(nnx.state((model, optimizer)))


def new_run():
  model = Model(nnx.Rngs(0))
  return model, nnx.Optimizer(model, make_asam_tx(RHO), wrt=nnx.Param)


run = new_run()
for start in (0, BATCH):
  optimizer_step(*run, train_x[start : start + BATCH], noisy_y[start : start + BATCH])

with (
    tempfile.TemporaryDirectory() as folder,
    ocp.StandardCheckpointer() as checkpointer,
):
  path = pathlib.Path(folder) / "run"
  checkpointer.save(path, saved(*run))
  checkpointer.wait_until_finished()
  resumed = new_run()
  nnx.update(resumed, checkpointer.restore(path, saved(*resumed)))

for model, optimizer in (run, resumed):
  optimizer_step(model, optimizer, train_x[-BATCH:], noisy_y[-BATCH:])
print("Largest difference after the next step:", distance(run[0], resumed[0]))

# %% [markdown]
# ## In short
#
# - Replace `nnx.value_and_grad` or `jax.value_and_grad` by the function of the same
#   name in `asam_jax.nnx` or `asam_jax`, with a radius. Everything else stays.
# - Weight decay and clipping belong into the optimizer, where they are.
# - If the radius follows a schedule, wrap the optimizer instead:
#   `asam_jax.adaptive_sam(tx, rho=schedule)`, and hand it a `grad_fn`.
#
# The pages under `examples/frameworks` in the repository have the same for Equinox,
# Haiku and plain pytrees.
