"""What computes convolutions on a CPU: ``python -m benchmarks.convolutions``.

A training step (loss, gradient) of a network on noise in the shape of CIFAR-10, in
processes that take turns, for XLA changes its code by flags that it reads once:

- XLA: its own convolutions, channels last;
- channels first: the same, between two transpositions;
- patches: shifted images beside each other, times a matrix;
- shifts: XLA's, but for the gradient to a 3x3 kernel (``examples.paper``'s
  ``conv="shifts"``);
- the first and the last again, with the flag that ``examples/paper/small.py`` names.

It prints the median time of a step with its quartiles and its ratio to the first within
a round, and writes a JSON line for each.
"""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import pathlib
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import tyro

from benchmarks import timing
from examples import records
from examples.paper import image_task
from examples.paper import models

FLAG = "--xla_cpu_experimental_ynn_fusion_type=DOT"


@dataclasses.dataclass(frozen=True)
class Arguments:
  model: str = "resnet8_wide"
  """Name of the network."""
  batch_size: int = 128
  """Images in a step."""
  steps: int = 2
  """Steps in a sample."""
  rounds: int = 15
  """Samples of each case."""
  cases: tuple[str, ...] = ()
  """Which of the cases; all by default."""
  output: pathlib.Path = pathlib.Path("runs/benchmarks/convolutions.jsonl")
  """File of the JSON lines."""


def patches(
    images: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any
) -> jax.Array:
  """A convolution without groups, channels last, as one product of matrices."""
  del options
  height, width, _, features = kernel.shape
  images = jnp.pad(images, [(0, 0), *padding, (0, 0)])
  tall, wide = images.shape[1] - height + 1, images.shape[2] - width + 1
  columns = [
      images[:, i : i + tall : strides[0], j : j + wide : strides[1]]
      for i in range(height)
      for j in range(width)
  ]
  return jnp.concatenate(columns, axis=-1) @ kernel.reshape(-1, features)


def channels_first(
    images: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any
) -> jax.Array:
  """A convolution without groups whose arrays are NCHW, between transpositions."""
  del options
  found = lax.conv_general_dilated(
      images.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1), strides, padding,
      dimension_numbers=("NCHW", "OIHW", "NCHW"),
  )
  return found.transpose(0, 2, 3, 1)


# Each with the flags that it needs.
CASES: dict[str, tuple[str | Callable[..., jax.Array], str]] = {
    "XLA": ("lax", ""),
    "channels first": (channels_first, ""),
    "patches": (patches, ""),
    "shifts": ("shifts", ""),
    "XLA, flag": ("lax", FLAG),
    "shifts, flag": ("shifts", FLAG),
}


def step_of(network: Any, batch_size: int) -> Callable[[], Any]:
  """Computes loss, batch statistics and gradient on noise."""
  images = jax.random.normal(jax.random.key(0), (batch_size, 32, 32, 3))
  labels = jnp.arange(batch_size) % 10
  variables = network.init(jax.random.key(1), images[:1], train=False)
  params = variables.pop("params")

  def loss(params):
    key = jax.random.key(2)
    logits, new = image_task.forward(network, params, variables, images, key)
    return image_task.classification_loss(logits, labels, 0.1)[0], new

  step = jax.jit(jax.value_and_grad(loss, has_aux=True))
  return lambda: step(params)


def worker(case: str, arguments: Arguments, pipe: Any) -> None:
  """Takes the steps of a sample whenever it is asked, and answers with the seconds."""
  network = models.build(arguments.model, 10, conv=CASES[case][0])
  step = step_of(network, arguments.batch_size)
  while pipe.recv():
    pipe.send(timing.seconds(step, arguments.steps))


def measured(arguments: Arguments) -> list[dict[str, Any]]:
  """A row for each case: milliseconds a step, and its ratio to the first case's."""
  context = multiprocessing.get_context("spawn")
  names = list(arguments.cases or CASES)
  flags = os.environ.get("XLA_FLAGS", "")
  pipes = {}
  try:
    for name in names:
      # A new process reads them; this one has its devices already.
      os.environ["XLA_FLAGS"] = f"{flags} {CASES[name][1]}".strip()
      pipes[name], there = context.Pipe()
      context.Process(target=worker, args=(name, arguments, there), daemon=True).start()
      there.close()

    def ask(pipe):
      pipe.send(True)
      return pipe.recv()

    cases = {name: functools.partial(ask, pipe) for name, pipe in pipes.items()}
    times = timing.interleaved(cases, arguments.rounds)
  finally:
    os.environ["XLA_FLAGS"] = flags
    for pipe in pipes.values():
      with contextlib.suppress(OSError):  # its process has failed, and said why
        pipe.send(False)
      pipe.close()
  settings = {k: v for k, v in dataclasses.asdict(arguments).items()
              if k not in ("cases", "output")}
  return [
      {
          "case": name,
          "milliseconds": timing.quartiles(1e3 * values / arguments.steps),
          "to_first": timing.quartiles(values / times[names[0]]),
          "config": {**settings, "flags": CASES[name][1]},
          **timing.environment(),
      }
      for name, values in times.items()
  ]


def main(argv: Sequence[str] | None = None) -> None:
  arguments = tyro.cli(
      Arguments, args=argv, prog="python -m benchmarks.convolutions",
      description=__doc__,
  )
  unknown = sorted(set(arguments.cases) - set(CASES))
  if unknown:
    raise SystemExit(f"error: cases={unknown}: there are {', '.join(CASES)}.")
  try:
    models.build(arguments.model, 10)
  except ValueError as error:
    raise SystemExit(f"error: model={arguments.model}: {error}") from error
  rows = measured(arguments)
  for row in rows:
    print(f"{row['case']:16} {timing.show(row['milliseconds'], 1)} ms,"
          f" {timing.show(row['to_first'], 3)} of {rows[0]['case']}")
  records.write(arguments.output, rows)


if __name__ == "__main__":
  main()
