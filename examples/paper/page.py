"""The page of results, in Markdown, from the records alone."""

from collections.abc import Callable, Mapping, Sequence
import os
import pathlib
from typing import Any

from examples.paper import configs
from examples.paper import groups
from examples.paper import pictures
from examples.paper import published
from examples.paper import small
from examples.paper.config import from_json

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
chosen on 5,000 held-out training images with the first seed, never with the test set;
the radii that were tried stand below each table. "Gradients" are passes over the
training set, where a step with a second gradient counts twice. FLOPs are those of the
convolutions and products (the backward pass counted as two forward passes), for one
run. Minutes are the processor's, over its cores together, without compilation and
evaluation; other programs ran at the same time.
"""

_SMALL = {
    "cifar10-few": "CIFAR-10, few images",
    "cifar10-small": "CIFAR-10, ten times the images in a fifth of the epochs",
    "cifar10n-small": "CIFAR-10N, human labels, 40 % wrong",
    "noise-small": "CIFAR-10 with 40 % symmetric label noise",
    "cifar100-small": "CIFAR-100",
    "normalization-small": "Normalization schemes",
    "vit-small": "A small vision transformer, CIFAR-10",
    "multi30k": "Multi30k, German to English",
}
_BEST_TOO = ("cifar10n-small", "noise-small")


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
  """A table."""
  lines = [header, ["---"] * len(header), *body]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(
    records: Sequence[Mapping[str, Any]],
    drawn: Mapping[str, pathlib.Path],
    folder: pathlib.Path,
) -> str:
  """The whole page.

  Args:
    records: the finished runs.
    drawn: pictures by table.
    folder: where the page lies, for the links.
  """
  parts = [_INTRODUCTION, "## What was trained here"]
  for table, title in _SMALL.items():
    chosen = [r for r in records if r["table"] == table]
    if chosen:
      parts += [f"### {title}", *small_table(table, chosen)]
      parts += picture(drawn, table, title, folder)
  trained = {record["table"] for record in records}
  if without := [title for table, title in _SMALL.items() if table not in trained]:
    parts += [f"Tables of the plan without a run yet: {'; '.join(without)}."]
  parts += ["## Next to the best public comparison", momentum_sam()]
  parts += ["## The paper's figures", _FIGURES]
  for name, (title, text) in _FIGURE.items():
    parts += [text, *picture(drawn, name, title, folder)]
  parts += ["## The paper's tables", _PAPER]
  for title, table, rows, key in _PAPER_TABLES:
    chosen = [r for r in records if r["table"] == table]
    parts += [f"### {title}", paper_table(table, rows, key, chosen)]
  return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


_FIGURES = """\
Both are computed by the library, in a few seconds:

    python -m examples.paper.figures --folder results/paper"""

_FIGURE = {
    "figure_1": (
        "The regions of SAM and ASAM at w = (1, 1) and at A w = (3, 1/3)",
        """\
**Figure 1.** Multiplying the first weight of a two-weight network by 3 and the second
by 1/3 changes nothing that the network computes. SAM's ball stays as it is, and so
finds a larger rise of the loss at the rescaled weights. ASAM's ellipsoid moves along
with them, and the rise is the same.""",
    ),
    "figure_3": (
        "Paths of SAM and ASAM from the two starts",
        """\
**Figure 3.** The loss |w₁ ReLU(w₂) − 0.04| from two starts that are rescalings of each
other, with ρ = 0.05 and steps of 0.05. From (0.2, 0.05) SAM comes to the valley and
then creeps along it. From (0.3, 0.0333) it never moves, for its perturbation turns the
ReLU off, and there the gradient is zero. ASAM comes to the valley from both.""",
    ),
}


def picture(drawn, name: str, title: str, folder: pathlib.Path) -> list[str]:
  if name not in drawn:
    return []
  link = pathlib.PurePath(os.path.relpath(drawn[name], folder)).as_posix()
  return [f"![{title}]({link})"]


def small_table(table: str, records: Sequence[Mapping[str, Any]]) -> list[str]:
  """Setting, table, radii and provenance."""
  found = sorted(groups.group(map(dict, records)), key=_place)
  swept = groups.group(map(dict, records), swept=True)
  parts = [setting(records[0])]
  if found and table.startswith("normalization"):
    parts.append(normalization_table(found))
  elif found:
    parts.append(methods_table(found, best=table in _BEST_TOO))
  if swept:
    parts.append(sweep_sentence(swept))
  missing = missing_sentence(table, found)
  return [*parts, *([missing] if missing else []), provenance(records)]


def _place(group: groups.Group) -> int:
  """The row's place in the plan, after all of its rows if it has none."""
  names = [entry.config.name for entry in small.PLAN]
  return names.index(group.config.name) if group.config.name in names else len(names)


def missing_sentence(table: str, found: Sequence[groups.Group]) -> str:
  """The rows of the plan that are not, or not with all seeds, in the table."""
  seeds = {group.config.name: len(group.runs) for group in found}
  entries = [entry for entry in small.PLAN if entry.config.table == table]
  least = min((entry.config.epochs for entry in entries), default=0)
  names = [
      groups.label(entry.config, least)
      + (f" ({count} of {len(entry.seeds)} seeds)" if count else "")
      for entry in entries
      if (count := seeds.get(entry.config.name, 0)) < len(entry.seeds)
  ]
  if table.startswith("normalization"):  # rows are schemes there, its cells the runs
    return f"Not trained yet: {len(names)} of {len(entries)} runs." if names else ""
  return f"Not trained yet: {'; '.join(names)}." if names else ""


def setting(record: Mapping[str, Any]) -> str:
  """What all rows of a table share, in words."""
  config = from_json(dict(record["config"]))
  words = [f"{published.network(config.model)}, {record['parameters']:,} parameters"]
  if config.dataset == "parallel":
    words += [f"{record['examples']:,} sentences", f"{config.subwords} pieces a batch",
              f"beam search with {config.beam} hypotheses on {config.test_files}"]
  else:
    crop = "crop and flip" if config.crop and config.flip else "no augmentation"
    words += [f"{record['examples']:,} training images", f"batch {config.batch_size}",
              crop]
  words += [
      f"{config.base}, learning rate {config.learning_rate:g} ({config.schedule}),"
      f" weight decay {config.weight_decay:g}",
      f"label smoothing {config.label_smoothing:g}",
  ]
  return "; ".join(words) + "."


def methods_table(found: Sequence[groups.Group], best: bool) -> str:
  """A row for each method: accuracy, cost and time."""
  least = min(g.config.epochs for g in found)
  score = "BLEU" if found[0].bleu() else "accuracy (%)"
  header = ["method", "ρ", "epochs", score, *(["best epoch (%)"] if best else []),
            "training (%)", "seeds", "gradients", "TFLOP", "CPU minutes"]
  body = []
  for group in found:
    config = group.config
    body.append([
        groups.label(config, least),
        f"{config.rho:g}" if config.rho else "–",
        str(config.epochs),
        str(group.bleu() or group.last()),
        *([str(group.best())] if best else []),
        f"{group.training().mean:.1f}",
        str(len(group.runs)),
        f"{group.gradients():g}",
        f"{group.teraflop():.3g}",
        f"{group.minutes():.1f}",
    ])
  text = markdown(header, body)
  if best:
    text += ("\n\nThe best epoch is the best of those that were looked at, by the test"
             " set itself: no one can choose it so.")
  return text


def normalization_table(found: Sequence[groups.Group]) -> str:
  """A row for each scheme, a column for each place in the grid of radii."""
  body = []
  for scheme, (label, _, _) in pictures.SCHEMES.items():
    by_radius = {g.config.rho: g.last() for g in found
                 if pictures.scheme_of(g.config) == scheme}
    cells = [f"{by_radius[rho]} (ρ = {rho:g})" if rho in by_radius else "–"
             for rho in configs.SCHEMES[scheme][1]]
    body.append([label, *cells])
  count = max(len(radii) for _, radii in configs.SCHEMES.values())
  return markdown(["scheme", *(f"radius {i + 1}" for i in range(count))], body)


def sweep_sentence(swept: Sequence[groups.Group]) -> str:
  """The radii that were tried, with what the held-out images said."""
  methods: dict[str, list[str]] = {}
  for group in sorted(swept, key=lambda g: g.config.rho):
    score = group.bleu() or group.last()
    methods.setdefault(groups.label(group.config), []).append(
        f"{group.config.rho:g}: {score.mean:.2f}"
    )
  tried = "; ".join(f"{name} " + ", ".join(v) for name, v in methods.items())
  epochs = " or ".join(map(str, sorted({g.config.epochs for g in swept})))
  return f"Radii tried, with the validation score after {epochs} epochs: {tried}."


def provenance(records: Sequence[Mapping[str, Any]]) -> str:
  """Hardware, versions, dates and command."""
  def join(values: Callable[[Mapping[str, Any]], str]) -> str:
    return "; ".join(dict.fromkeys(map(values, records)))

  versions = join(lambda r: ", ".join(f"{k} {v}" for k, v in r["versions"].items()))
  flags = join(lambda r: r.get("xla_flags", ""))
  dates = sorted({r["date"] for r in records})
  when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
  return (
      f"{join(lambda r: r['hardware'])}; {versions}; {when};"
      f" `{records[-1]['command']}`{f', XLA_FLAGS `{flags}`' if flags else ''}."
  )


def momentum_sam() -> str:
  """Becker et al.'s comparison."""
  table = markdown(
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
are of the last."""


def paper_table(
    table: str,
    rows: Mapping[str, Sequence[str]],
    key: Callable[[Any], str],
    records: Sequence[Mapping[str, Any]],
) -> str:
  """Published and own figures side by side."""
  mark = "" if table in ("iwslt14", "noise") else f" {published.DAGGER}"
  found = groups.group(map(dict, records))
  names = ("plain", "sam", "asam")
  base = "Adam" if table == "iwslt14" else "SGD"
  body = []
  for row, values in rows.items():
    cells = [published.network(row)]
    for method, value in zip(names, values, strict=True):
      ours = [g for g in found if key(g.config) == row and g.config.method == method]
      cells += [value + mark, str(ours[0].bleu() or ours[0].last()) if ours else "–"]
    body.append(cells)
  header = [""]
  for label in (base, "SAM", "ASAM"):
    header += [f"{label}, published", "here"]
  return markdown(header, body)


_PAPER_TABLES = (
    ("CIFAR-10", "cifar10", published.CIFAR10, lambda c: c.model),
    ("CIFAR-100", "cifar100", published.CIFAR100, lambda c: c.model),
    ("ImageNet, top-1", "imagenet", published.IMAGENET, lambda c: c.model),
    ("IWSLT'14 DE-EN, test BLEU", "iwslt14", published.IWSLT14, lambda c: c.model),
    ("CIFAR-10 with symmetric label noise, ResNet-32", "noise", published.NOISE,
     lambda c: f"{c.noise:.0%}".replace("%", " %")),
)
