"""Sharpness over the course of training: SGD, SAM and ASAM on noisy digits.

  python examples/sharpness_training.py          # train, measure, draw
  python examples/sharpness_training.py --plot   # draw from the recorded lines

The first-order sharpness costs nothing: SAM and ASAM have it in their state, and the
training step returns it. The worst case is measured every few epochs by a function
that is compiled once. There are no callbacks. results/sharpness_training gets the
records and two figures, of the curves and of the loss around the final weights.
"""

import argparse
import json
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

import asam_jax
from asam_jax import landscape
from asam_jax import sharpness
from examples import digits

NOISE, BATCH, RATE = 0.4, 64, 0.1
RHO = {"SAM": 0.05, "ASAM": 0.5}  # of the optimizers
MEASURED = {  # of the worst-case measures: rho and normalization
    "plain": (0.05, "none"),
    "adaptive": (0.5, "elementwise"),
}


def optimizers(steps: int) -> dict[str, optax.GradientTransformation]:
  base = optax.sgd(optax.cosine_decay_schedule(RATE, steps), momentum=0.9)
  return {
      # rho = 0 is SGD, bit for bit, with the sharpness of a radius of 0 in its state.
      "SGD": asam_jax.adaptive_sam(base, rho=0.0),
      "SAM": asam_jax.sam(base, RHO["SAM"]),
      "ASAM": asam_jax.adaptive_sam(base, RHO["ASAM"]),
  }


def make_step(tx, loss):
  """A training step that also returns what it knows about sharpness for free."""

  @jax.jit
  def step(params, state, batch):
    grad_fn = jax.grad(lambda w: loss(w, batch))
    grads = grad_fn(params)
    updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
    free = optax.tree_utils.tree_get(state, "sharpness")
    return optax.apply_updates(params, updates), state, free

  return step


def make_worst_case(loss, subset):
  """Both worst cases on a fixed subset, compiled once."""

  @jax.jit
  def worst(params):
    return {
        name: sharpness.worst_case(
            lambda w: loss(w, subset), params, rho, normalization=kind,
            steps=10, restarts=0).value
        for name, (rho, kind) in MEASURED.items()
    }

  return worst


def train(seed: int, epochs: int, every: int):
  """The records of the three runs, and their final weights."""
  halves = digits.load_halves()
  labels = digits.flip_labels(halves.train_labels, NOISE, seed)
  images = halves.train_images
  model = digits.MLP()
  loss = lambda w, batch: digits.cross_entropy(model, w, *batch)  # noqa: E731
  subset = (images[:256], labels[:256])
  worst = make_worst_case(loss, subset)
  judge = jax.jit(lambda w: digits.accuracy(
      model, w, halves.test_images, halves.test_labels))
  per_epoch = len(labels) // BATCH
  records, finals = [], {}
  for name, tx in optimizers(per_epoch * epochs).items():
    params = model.init(jax.random.key(seed), images[:1])
    state, step = tx.init(params), make_step(tx, loss)
    rng = np.random.default_rng(seed)
    for epoch in tqdm.trange(epochs + 1, desc=name):
      if epoch % every == 0 or epoch == epochs:
        values = {k: float(v) for k, v in worst(params).items()}
        records.append({
            "optimizer": name, "epoch": epoch, **values,
            "train_loss": float(loss(params, subset)),
            "test_accuracy": float(judge(params))})
      if epoch == epochs:
        break
      frees = []
      order = rng.permutation(len(labels))[: per_epoch * BATCH]
      for index in order.reshape(per_epoch, BATCH):
        params, state, free = step(params, state, (images[index], labels[index]))
        frees.append(free)  # stays on the device: no wait
      if name != "SGD":
        records.append({"optimizer": name, "epoch": epoch + 0.5,
                        "free": float(jnp.mean(jnp.stack(frees)))})
    finals[name] = params
  return records, finals, lambda w: loss(w, subset)


def slices(finals, loss):
  """Lines along each one's gradient, ASAM's surface, and the common plane."""
  rho, kind = MEASURED["adaptive"]
  lines, arrays = {}, {}
  for name, params in finals.items():
    d = landscape.direction("gradient", params, loss=loss, normalization=kind)
    lines[name] = landscape.line(loss, params, d, rho, extent=2, points=41)
  ds = [landscape.direction(k, finals["ASAM"], loss=loss)
        for k in ("gradient", "eigenvector")]
  arrays["surface"] = landscape.surface(
      loss, finals["ASAM"], ds, rho, extent=2, points=25)
  arrays["plane"] = landscape.plane(loss, list(finals.values()), points=25)
  return lines, arrays


def plot_curves(records, path: pathlib.Path) -> None:
  from matplotlib import pyplot as plt

  panels = {
      "plain": f"worst case, ρ={MEASURED['plain'][0]}",
      "adaptive": f"adaptive worst case, ρ={MEASURED['adaptive'][0]}",
      "free": "first order, free, each with its own ρ",
      "test_accuracy": "test accuracy",
  }
  figure, axes = plt.subplots(1, 4, figsize=(13, 3), layout="constrained")
  for ax, (field, title) in zip(axes, panels.items(), strict=True):
    for i, name in enumerate(("SGD", "SAM", "ASAM")):
      rows = [r for r in records if r["optimizer"] == name and field in r]
      if rows:
        ax.plot([r["epoch"] for r in rows], [r[field] for r in rows],
                color=f"C{i}", label=name)
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("epoch")
    if field != "test_accuracy":
      ax.set_yscale("log")
    ax.legend(frameon=False, fontsize=8)
  figure.savefig(path, dpi=150)
  plt.close(figure)


def plot_slices(lines, arrays, path: pathlib.Path) -> None:
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
  landscape.plot_line(lines, axes[0])
  axes[0].set_title("along each one's gradient (adaptive)", fontsize=10)
  landscape.plot_surface(arrays["surface"], axes[1])
  axes[1].set_title("ASAM: gradient and top eigenvector", fontsize=10)
  landscape.plot_plane(arrays["plane"], ("SGD", "SAM", "ASAM"), axes[2])
  axes[2].set_title("the plane of the three", fontsize=10)
  figure.savefig(path, dpi=150)
  plt.close(figure)


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--epochs", type=int, default=100)
  parser.add_argument("--every", type=int, default=5, help="epochs between measures")
  parser.add_argument("--plot", action="store_true", help="draw the curves only")
  parser.add_argument("--results", type=pathlib.Path,
                      default="results/sharpness_training")
  args = parser.parse_args()
  results = pathlib.Path(args.results)
  log = results / "log.jsonl"
  if not args.plot:
    results.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    records, finals, loss = train(args.seed, args.epochs, args.every)
    common = {"seed": args.seed, "jax": jax.__version__, "python":
              platform.python_version(), "device": jax.devices()[0].device_kind}
    log.write_text("".join(json.dumps({**r, **common}) + "\n" for r in records))
    plot_slices(*slices(finals, loss), results / "slices.png")
    print(f"{time.perf_counter() - start:.0f} s")
  records = [json.loads(line) for line in log.read_text().splitlines()]
  plot_curves(records, results / "curves.png")
  for name in ("SGD", "SAM", "ASAM"):
    print([r for r in records if r["optimizer"] == name and "plain" in r][-1])


if __name__ == "__main__":
  main()
