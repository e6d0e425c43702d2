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
# # Many devices, on one CPU
#
# ASAM has a norm over all parameters and a mean over the batch in it, so one might fear
# for it on many devices. Under `jit` there is nothing to fear and nothing to do: you
# place the arrays, the compiler does the sums, and the numbers are those of one device.
# This notebook shows that for two layouts, counts what the devices exchange, and then
# comes to what is left to choose: over how many examples a perturbation is taken, and
# batches that do not fit.
#
# It runs anywhere, for JAX can pretend that a CPU is eight devices. That has to be said
# before JAX starts, so on Colab choose a runtime without accelerator.

# %% tags=["skip-execution"]
# Needed where asam_jax is not installed yet, as in Colab.
# %pip install -q "asam_jax[examples,nnx,sharpness]"

# %%
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import re

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn import datasets
from sklearn import model_selection

import asam_jax

COLORS = {"SGD": "#404040", "ASAM": "#D55E00"}
plt.rcParams.update({
    "figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.3, "axes.titlesize": 11,
    "legend.frameon": False, "lines.linewidth": 1.6,
})
print(len(jax.devices()), "devices")

# %% [markdown]
# ## A step, written for one device

# %%
images, labels = datasets.load_digits(return_X_y=True)
train_x, test_x, train_y, test_y = model_selection.train_test_split(
    np.float32(images / 16), np.int32(labels), train_size=0.5, stratify=labels,
    random_state=0)
rng = np.random.default_rng(0)
wrong = rng.permutation(len(train_y))[: round(0.4 * len(train_y))]
noisy_y = train_y.copy()
noisy_y[wrong] = (noisy_y[wrong] + rng.integers(1, 10, len(wrong))) % 10
BATCH = 64


class MLP(nn.Module):
  @nn.compact
  def __call__(self, x):
    for _ in range(2):
      x = nn.relu(nn.Dense(128)(x))
    return nn.Dense(16)(x)[..., :10]  # 16 can be split over 8 devices, 10 can't


model = MLP()
start = jax.device_get(model.init(jax.random.key(0), train_x[:1]))
example_batch = (train_x[:BATCH], noisy_y[:BATCH])


def loss(params, batch):
  x, y = batch
  logits = model.apply(params, x)
  return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


base = optax.sgd(0.1, momentum=0.9)
optimizers = {
    "SGD": optax.with_extra_args_support(base),
    "ASAM": asam_jax.adaptive_sam(base, rho=2.0),
}


def make_step(tx):
  def step(params, state, batch):
    def grad_fn(params):
      return jax.grad(loss)(params, batch)

    updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), state

  return jax.jit(step)


# %% [markdown]
# ## The same step in two layouts
#
# **Data parallel**: each device has all parameters and an eighth of the batch.
# **FSDP**: the parameters and the optimizer's state are split as well, for models that
# do not fit on a device. A layout is nothing but where the arrays are when the step is
# called. The step above is not touched:

# %%
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
whole = NamedSharding(mesh, PartitionSpec())
split = NamedSharding(mesh, PartitionSpec("data"))
layouts = {
    "one device": (jax.devices()[0], jax.devices()[0]),
    "data parallel": (whole, split),  # where the parameters are, where the batch is
    "FSDP": (split, split),
}


def run(tx, layout, steps=10):
  where_params, where_batch = layouts[layout]
  params = jax.device_put(start, where_params)
  state, step = tx.init(params), make_step(tx)
  for i in range(steps):
    rows = np.arange(i * BATCH, (i + 1) * BATCH)
    batch = jax.device_put((train_x[rows], noisy_y[rows]), where_batch)
    params, state = step(params, state, batch)
  return params


def largest_difference(a, b):
  gaps = jax.tree.map(lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max(), a, b)
  return max(jax.tree.leaves(gaps))


tx = optimizers["ASAM"]
reference = run(tx, "one device")
for layout in ("data parallel", "FSDP"):
  params = run(tx, layout)
  kernel = params["params"]["Dense_0"]["kernel"]
  shard = kernel.addressable_shards[0].data.shape
  close = largest_difference(params, reference) < 1e-5
  print(f"{layout:14} a device holds {shard} of the first kernel {kernel.shape};"
        f" as on one device after 10 steps: {close}")

# %% [markdown]
# (The sums are in another order, so the last bits differ, and no more.)
#
# ## What the devices exchange
#
# It stands in the compiled program. Count the bytes that each exchange brings to a
# device in one step:

# %%
BYTES = {"f32": 4, "s32": 4, "pred": 1, "u32": 4}
EXCHANGE = re.compile(
    r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|"
    r"collective-permute)(?:-start)?\(")


def exchanged(tx, layout):
  """Kilobytes by kind of exchange in the compiled step."""
  where_params, where_batch = layouts[layout]
  params = jax.device_put(start, where_params)
  batch = jax.device_put(example_batch, where_batch)
  program = make_step(tx).lower(params, tx.init(params), batch).compile().as_text()
  found = {}
  for shapes, kind in EXCHANGE.findall(program):
    for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
      size = np.prod([int(n) for n in shape.split(",") if n], dtype=int)
      found[kind] = found.get(kind, 0) + size * BYTES[dtype] / 1e3
  return found


volumes = {
    (layout, method): exchanged(tx, layout)
    for layout in ("data parallel", "FSDP") for method, tx in optimizers.items()
}
for (layout, method), kinds in volumes.items():
  parts = ", ".join(f"{kind} {kilobytes:.1f} kB" for kind, kilobytes in kinds.items())
  print(f"{layout:14} {method:5} {parts}")

# %%
figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
for place, (layout, method) in enumerate(volumes):
  total = sum(volumes[layout, method].values())
  share = total / sum(volumes[layout, "SGD"].values())
  axis.barh(place + (place > 1) * 0.4, total, color=COLORS[method], height=0.8)
  axis.annotate(f"{method}, {share:.2f} × SGD", (total, place + (place > 1) * 0.4),
                (5, 0), textcoords="offset points", va="center")
axis.set(xlabel="kB that a device receives in one step", ylabel="layout",
         xlim=(0, 1.45 * max(sum(kinds.values()) for kinds in volumes.values())))
axis.set_yticks([0.5, 2.9], ["data parallel", "FSDP"])
axis.invert_yaxis()
axis.grid(visible=False)
plt.show()

# %% [markdown]
# Two gradients, two exchanges: twice SGD's, and where the parameters are split a few
# numbers for the norm on top. Computation doubles as well, so how well training scales
# stays what it was.
#
# ## Over how many examples: m
#
# One perturbation for the whole batch is not the only choice, and often not the best.
# The SAM paper ([Foret et al., 2021](https://arxiv.org/abs/2010.01412)) takes one for
# each accelerator's share of the batch, and finds that fewer examples to a
# perturbation, *m*, generalize better. `m_sharpness=m` says it, on any number of
# devices, with the same result on all of them. Where a device holds at least m
# examples, nothing is exchanged for the perturbations: only the gradients for the step
# are averaged, as SGD's are.

# %%
params = {layout: jax.device_put(start, layouts[layout][0]) for layout in layouts}
batch = {layout: jax.device_put(example_batch, layouts[layout][1])
         for layout in layouts}

for m in (8, 32):
  fun = jax.jit(asam_jax.value_and_grad(loss, rho=2.0, m_sharpness=m))
  _, one = fun(params["one device"], batch["one device"])
  _, eight = fun(params["data parallel"], batch["data parallel"])
  print(f"m = {m:2}, one device and eight: the same gradient:",
        largest_difference(one, eight) < 1e-5)

# %% [markdown]
# What m does to training, with everything else alike. (One device is enough here, as
# the numbers do not depend on it.) The task: digits with 40 % wrong labels.

# %% tags=["varies"]
EPOCHS, SEEDS, RADII, SIZES = 20, 3, (0.5, 1.0, 2.0), (64, 4)
STEPS = EPOCHS * (len(train_x) // BATCH)
tx = optax.sgd(optax.cosine_decay_schedule(0.1, STEPS), momentum=0.9)
data = tuple(map(jnp.asarray, (train_x, noisy_y)))
runs = [(seed, rho) for rho in RADII for seed in range(SEEDS)]  # side by side
seeds, radii = map(jnp.array, zip(*runs, strict=True))


@jax.jit
@jax.vmap
def accuracy(params):
  return 100 * jnp.mean(jnp.argmax(model.apply(params, test_x), -1) == test_y)


def train(gradient):
  """Test accuracy [radii, seeds] of runs along ``gradient(params, batch, rho)``."""
  params = jax.vmap(lambda seed: model.init(jax.random.key(seed), train_x[:1]))(seeds)
  state = jax.vmap(tx.init)(params)

  @jax.jit
  def step(params, state, rows):
    def one(params, state, rows, rho):
      grads = gradient(params, tuple(x[rows] for x in data), rho)
      updates, state = tx.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    return jax.vmap(one)(params, state, rows, radii)

  rngs = [np.random.default_rng(seed) for seed, _ in runs]
  for _ in range(EPOCHS):
    order = np.stack([rng.permutation(len(train_x)) for rng in rngs])
    for first in range(0, len(train_x) - BATCH + 1, BATCH):
      params, state = step(params, state, order[:, first : first + BATCH])
  return np.asarray(accuracy(params)).reshape(len(RADII), SEEDS)


def asam_gradient(m):
  return lambda params, batch, rho: asam_jax.grad(
      loss, rho=rho, m_sharpness=m)(params, batch)


sgd = train(lambda params, batch, rho: jax.grad(loss)(params, batch))[0]
reached = {m: train(asam_gradient(m)) for m in SIZES}
print(f"SGD     {sgd.mean():.1f} %")
for m, values in reached.items():
  cells = [f"{x:.1f} % at rho {rho:g}" for rho, x in
           zip(RADII, values.mean(1), strict=True)]
  print(f"m = {m:2}  " + ", ".join(cells))

# %% tags=["varies"]
figure, axis = plt.subplots(figsize=(5.6, 3.3), layout="constrained")
axis.axhline(sgd.mean(), color=COLORS["SGD"], label="SGD")
for (m, values), marker, alpha in zip(
    reached.items(), ("s", "^"), (1.0, 0.5), strict=True):
  axis.errorbar(
      RADII, values.mean(1), values.std(1, ddof=1) / np.sqrt(SEEDS), marker=marker,
      color=COLORS["ASAM"], alpha=alpha, capsize=3, label=f"ASAM, m = {m}")
axis.set(xlabel="radius ρ", ylabel="test accuracy (%)", xscale="log")
axis.set_xticks(RADII, [f"{rho:g}" for rho in RADII])
axis.minorticks_off()
axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
figure.supxlabel("Mean of 3 seeds; bars: ± one standard error, a rough guess"
                 " from so few.", fontsize=9, color="0.3")
plt.show()

# %% [markdown]
# With fewer examples to a perturbation a smaller radius does as much: a small group's
# gradient is long, and the walk uphill goes to where *these* examples are worst. So m
# is part of what a radius means, and belongs beside it in a report.
#
# ## Batches that do not fit
#
# `accumulate=size` takes both passes over microbatches of `size` rows, with one
# perturbation for the whole batch: the same gradient in less memory.

# %%
results = [
    jax.jit(asam_jax.value_and_grad(loss, rho=2.0, accumulate=size))(
        params[layout], batch[layout])
    for layout, size in (("one device", None), ("data parallel", 16))
]
(value, at_once), (other, in_pieces) = results
same = abs(float(value) - float(other)) < 1e-5
same &= largest_difference(at_once, in_pieces) < 1e-5
print("64 rows at once on one device and 16 at a time on eight:",
      "the same loss and gradient:", bool(same))

# %% [markdown]
# Do not put `optax.MultiSteps` around `adaptive_sam` for that: it would perturb by the
# gradient of one batch and step along that of another.
#
# ## In short
#
# - Under `jit`, place the arrays as for any optimizer. Nothing else.
# - Twice SGD's exchanges, or as many as SGD's with `m_sharpness` at most a device's
#   share.
# - `accumulate` for batches that do not fit.
#
# `shard_map`, several processes and TPU pods are in the repository's `docs`.
