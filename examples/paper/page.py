"""The page of results, in Markdown, from the records alone."""

from collections.abc import Mapping, Sequence
import os
import pathlib
from typing import Any

from examples import summary
from examples.paper import comparison
from examples.paper import configs
from examples.paper import figures
from examples.paper import groups
from examples.paper import published
from examples.paper import sections

COMMAND = """\
python -m examples.paper.tables --results results/paper \\
        --page docs/results.md --pictures results/paper"""

_INTRODUCTION = f"""\
# Results

All numbers here are made from the JSON lines of finished runs by

    {COMMAND}

Accuracies are percentages of the whole test set after the last epoch, as mean ±
standard error over seeds; "training" is the mean over the last epoch's own batches, as
they were augmented, and says how much of the training set was learned. Radii were
chosen on 5,000 held-out training images (of text, on its validation set) with the first
seed, never with the test set, and of equal scores the lower loss decided; the radii
that were tried stand below each table.
"Gradients" are passes over the training set, where a step with a second gradient counts
twice. FLOPs are those of the convolutions and products (the backward pass counted as
two forward passes), for one run. Minutes are the processor's, over its cores together,
without compilation and evaluation; {sections.BUSY} is for the machine, which was busy
with other programs at times, and so slower. FLOPs are what compares methods.
"""

# The command is that in the docstring of small.py.
_TRAINED = """\
Sharpness matters once a network can learn its training set by heart. The paper's
networks do so in 200 epochs of 50,000 images. In the time of two cores a small one
comes near it in 60 epochs of 2,000 images, and stays far from it in 12 of 20,000: so
most tables have 2,000 or some more, and one has 20,000. Two processes, each on a core
of its own, shared the runs:

    for core in 0 1; do
      XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=DOT taskset -c $core python -m \\
        examples.paper.run small --data PATH --labels PATH --text PATH &
    done"""


def page(
    records: Sequence[Mapping[str, Any]],
    drawn: Mapping[str, pathlib.Path],
    folder: pathlib.Path,
    measured: Sequence[Mapping[str, Any]] = (),
) -> str:
  """The whole page.

  Args:
    records: the finished runs.
    drawn: pictures by table.
    folder: where the page lies, for the links.
    measured: what the study of the rank correlation measured, a row for each network.
  """
  parts = [
      _INTRODUCTION,
      "## What was trained here", _TRAINED, *_trained(records, drawn, folder),
      "## Next to the best public comparison", momentum_sam(),
      "## The paper's figures", _FIGURES,
      _FIGURE_1, *picture(drawn, "figure_1", "The regions of SAM and ASAM at w = (1, 1)"
                          " and at A w = (3, 1/3)", folder),
      figure_3(), *picture(drawn, "figure_3", "Paths of SAM and ASAM from the two"
                           " starts", folder),
      "## The paper's tables", _PAPER, *_paper(records, drawn, folder),
      *correlation(measured),
  ]
  return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _trained(records, drawn, folder: pathlib.Path) -> list[str]:
  """The tables of the plan for two cores."""
  parts, without = [], []
  for table, title in sections.TITLES.items():
    chosen = [r for r in records if r["table"] == table]
    if not chosen:
      without.append(title)
      continue
    parts += [f"### {title}", *sections.small_table(table, chosen)]
    parts += picture(drawn, table, title, folder)
  if without:
    parts += [f"Tables of the plan without a run yet: {'; '.join(without)}."]
  return parts


def _paper(records, drawn, folder: pathlib.Path) -> list[str]:
  """The tables of the paper."""
  parts = []
  for table in comparison.TABLES:
    chosen = [r for r in records if r["table"] == table.name]
    parts += [f"### {table.title}", comparison.table_text(table, chosen)]
    parts += [table.note] if table.note else []
    parts += [sections.provenance(chosen)] if chosen else []
    parts += picture(drawn, table.name, table.title, folder)
  parts += normalization([r for r in records if r["table"] == "normalization"])
  return parts + picture(
      drawn, "normalization", "Accuracy of each scheme against the radius", folder
  )


_FIGURES = """\
Both are computed by the library, in a few seconds:

    python -m examples.paper.figures --folder results/paper"""

_FIGURE_1 = """\
**Figure 1.** Multiplying the first weight of a two-weight network by 3 and the second
by 1/3 changes nothing that the network computes. SAM's ball stays as it is, and so
finds a larger rise of the loss at the rescaled weights. ASAM's ellipsoid moves along
with them, and the rise is the same."""


def figure_3() -> str:
  """What the picture shows, with its numbers."""
  creeps = [
      figures.creep(method, figures.STARTS[start])
      for method, start in (("sam", "left"), ("asam", "left"), ("asam", "right"))
  ]
  return """\
**Figure 3.** The loss |w₁ ReLU(w₂) − 0.04| from two starts that are rescalings of each
other, with ρ = 0.05 and {} steps of 0.05. From (0.2, 0.05) SAM comes to the valley, and
from (0.3, 0.0333) it never moves, for its perturbation turns the ReLU off, and there
the gradient is zero. ASAM comes to the valley from both. No path that is there stays in
its place: all three swing from side to side and creep along, towards w₁ = w₂. Between
the first 20 steps in the valley and the last 20 the mean of SAM's path moves by {:.3f},
those of ASAM's by {:.3f} and, from (0.3, 0.0333), {:.3f}.""".format(
      figures.STEPS, *creeps
  )


def picture(drawn, name: str, title: str, folder: pathlib.Path) -> list[str]:
  if name not in drawn:
    return []
  link = pathlib.PurePath(os.path.relpath(drawn[name], folder)).as_posix()
  return [f"![{title}]({link})"]


def momentum_sam() -> str:
  """Becker et al.'s comparison."""
  table = summary.markdown(
      ["method", "WRN-16-4", "WRN-28-10"],
      [[name, *values] for name, values in published.MOMENTUM_SAM.items()],
  )
  return (
      "Becker et al. 2024 (arXiv 2401.12033), CIFAR-100: other networks and a budget of"
      f" another size than anything above, for orientation.\n\n{table}"
  )


_PAPER = f"""\
Each row is a configuration, such as `python -m examples.paper.train
cifar10-resnet20-asam --data PATH`, and each table a plan, such as `python -m
examples.paper.run cifar10 --data PATH --seeds 0 1 2 3 4`. Published figures are those
of Kwon et al. 2021, mean ± standard error; {published.DAGGER} marks those that were
not checked against the paper's own text. "–" under "here" is a row that was not trained
here: its command stands ready. CIFAR's published figures are maxima over epochs; ours
are of the last. Pictures of a table come with its runs."""


def normalization(records: Sequence[Mapping[str, Any]]) -> list[str]:
  """The comparison of operators."""
  return [
      "### Normalization schemes, CIFAR-10, WRN-16-8",
      comparison.normalization_text(groups.group(map(dict, records))),
      *([sections.provenance(records)] if records else []),
      """\
The paper has a figure of it: elementwise with p = 2 is the best, and normalizing biases
too does not help. These numbers are from a
[comment of its first author](https://github.com/davda54/sam/issues/37): the first row
is of the authors' code, the second of another one, where the stabilizer η is 0.""",
      comparison.published_normalization(),
  ]


def correlation(measured: Sequence[Mapping[str, Any]]) -> list[str]:
  """The study of the rank correlation."""
  networks = len(list(configs.correlation()))
  kept = [row for row in measured if "sharpness" in row]
  count = f" Here {len(kept)} of {len(measured)} were kept." if measured else ""
  return [
      "### Rank correlation with the generalization gap",
      f"""\
Kendall's τ between a measure of sharpness and the gap, and the granulated coefficients
ψ along each hyper-parameter with their mean Ψ, over those of {networks} WRN-28-2 on
CIFAR-10 that learn 99 % of their training images.{count} The first command trains the
networks, the second measures them:

    python -m examples.paper.run correlation --data PATH --seeds 0 \\
        --keep-checkpoints True --results results/paper
    python -m examples.paper.correlation --data PATH --results results/paper

[The same study on digits](sharpness_study.md) takes minutes.""",
      comparison.correlation_text(kept),
  ]
