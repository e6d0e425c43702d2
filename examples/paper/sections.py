"""The tables of the runs that were done here, each with what is to be known of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from examples import summary
from examples.paper import comparison
from examples.paper import groups
from examples.paper import plans
from examples.paper import published
from examples.paper import results
from examples.paper import small
from examples.paper.config import Config
from examples.paper.config import from_json

# Beside what depends on the machine.
BUSY = "‡"

TITLES = {
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
# Where examples.paper.angle has looked.
ANGLES = (small.FEW.table, small.WORSE.table)


def small_table(table: str, records: Sequence[Mapping[str, Any]]) -> list[str]:
  """Setting, table, radii and provenance."""
  found = groups.in_order(groups.group(map(dict, records)), small.PLAN)
  swept = groups.group(map(dict, records), swept=True)
  parts = [setting(records[0])]
  if found and table.startswith("normalization"):
    parts.append(comparison.normalization_text(found))
  elif found:
    parts += [methods_table(found, best=table in _BEST_TOO), pace_sentence(found)]
    parts.append(disappointing(found, swept))
  if swept:
    parts.append(sweep_sentence(swept, records))
  parts += [borrowed_sentence(table), missing_sentence(table, found)]
  return [*filter(None, parts), provenance(records)]


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
    return f"Not trained yet: {len(names)} of {len(entries)} cells." if names else ""
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
      f"{groups.BASES[config.base]}, learning rate {config.learning_rate:g}"
      f" ({config.schedule}), weight decay {config.weight_decay:g}",
      f"label smoothing {config.label_smoothing:g}",
  ]
  text = "; ".join(words) + "."
  text = text[0].upper() + text[1:]
  if config.human_labels or config.noise:
    text += (" The labels are wrong in part where training and validation scores are"
             " taken; the test set's are right.")
  if config.dataset == "parallel":
    text += " FLOPs are those of a sentence of median length, times the sentences."
    if config.base == "adamw":
      text += (" AdamW stands where the paper has Adam: its weight decay is decoupled,"
               " as in fairseq's Adam.")
  return text


def methods_table(found: Sequence[groups.Group], best: bool) -> str:
  """A row for each method: accuracy, cost and time."""
  least = min(g.config.epochs for g in found)
  score = "BLEU" if found[0].bleu() else "accuracy (%)"
  header = ["method", "ρ", "epochs", score, *(["best epoch (%)"] if best else []),
            "training (%)", "seeds", "gradients", "TFLOP", f"CPU minutes {BUSY}"]
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
  text = summary.markdown(header, body)
  if best:
    text += ("\n\nThe best epoch is the best of those that were looked at, by the test"
             " set itself: no one can choose it so.")
  return text


def pace_sentence(found: Sequence[groups.Group]) -> str:
  """How far minutes are from being a measure of a method."""
  if len(found) < 2:
    return ""
  least = min(g.config.epochs for g in found)
  paces = sorted(
      (g.minutes() / g.teraflop(), groups.label(g.config, least)) for g in found
  )
  (fast, first), (slow, last) = paces[0], paces[-1]
  return (f"{BUSY} A TFLOP took from {fast:.2f} minutes ({first}) to {slow:.2f}"
          f" ({last}), which says more of the machine than of the methods.")


# Who learns less of the training set, in percent, does not learn it by heart.
_BY_HEART = 75


def disappointing(
    found: Sequence[groups.Group], swept: Sequence[groups.Group]
) -> str:
  """The rows that stay behind the base optimizer, in words."""
  plain = [g for g in found if g.config.method == "plain"]
  if not plain:
    return ""
  base = min(plain, key=lambda g: g.config.epochs)
  table, label = base.config.table, groups.label(base.config)
  everything = {g.config.name.removeprefix(f"{table}-"): g for g in found}
  rows = {name: g for name, g in everything.items() if _score(g) < _score(base)}
  parts = [_tuned(rows, base, label)]
  if "auto" in rows:
    parts += [_auto(everything, base, label)]
  if look := rows.get("looksam"):
    tried = [g for g in swept if g.config.name.startswith(f"{table}-looksam-sweep")]
    parts += [f"LookSAM gets {_shown(look)} at the best of {len(tried)} radii, with"
              f" {look.training().mean:.1f} % in training."]
  if less := rows.get("looksam-0.2"):
    parts += [f"With {less.config.reuse:g} of the direction reused in place of"
              f" {Config.reuse:g} it gets {_shown(less)}."]
  return " ".join(filter(None, parts))


def _shown(group: groups.Group) -> str:
  return f"{_score(group):.1f} {'BLEU' if group.bleu() else '%'}"


def _tuned(rows: dict[str, groups.Group], base: groups.Group, label: str) -> str:
  """ASAM and SAM with the radius that validation chose, if it is more than noise."""
  behind = []
  for group in [rows[name] for name in ("asam", "sam") if name in rows]:
    gap = groups.difference(_value(base), _value(group))
    if gap and not gap.mean < gap.error:  # which is NaN of a single run
      behind.append(group)
  if not behind:
    return ""
  text = " and ".join(f"{groups.label(g.config)} ({_shown(g)})" for g in behind)
  text += (f" {'stays' if len(behind) == 1 else 'stay'} behind {label}"
           f" ({_shown(base)}) with the radius that validation chose.")
  if base.training().mean < _BY_HEART:
    text += (f" {label} gets no further than {base.training().mean:.1f} % of the"
             " training set: nothing is learned by heart yet, and to hold learning"
             " back costs more than it gives.")
  return text


def _auto(rows: dict[str, groups.Group], base: groups.Group, label: str) -> str:
  """The radius that sets itself, with the targets that turn the gradient less."""
  auto = rows["auto"]
  text = (
      f"The auto radius, which holds the cosine of the two gradients at"
      f" {auto.config.cosine:g}, gets {_shown(auto)} where {label} gets"
      f" {_shown(base)}; its training accuracy is {auto.training().mean:.1f} %"
      f" where {label}'s is {base.training().mean:.1f} %."
  )
  for name, milder in rows.items():
    if name.startswith("auto-"):
      text += (f" A target of {milder.config.cosine:g} gives {_shown(milder)}, with"
               f" {milder.training().mean:.1f} % in training.")
  if base.config.table in ANGLES:
    text += (" What tuning finds turns the gradient less: [where the auto radius"
             " costs accuracy](radius.md#what-it-reaches).")
  return text


def sweep_sentence(
    swept: Sequence[groups.Group], records: Sequence[Mapping[str, Any]]
) -> str:
  """The radii that were tried, with what the held-out images said."""
  methods: dict[str, list[groups.Group]] = {}
  for group in sorted(swept, key=lambda g: g.config.rho):
    methods.setdefault(groups.label(group.config), []).append(group)
  tried = "; ".join(
      f"{name} " + ", ".join(f"{g.config.rho:g}: {_score(g):.2f}" for g in tries)
      for name, tries in methods.items()
  )
  epochs = " or ".join(map(str, sorted({g.config.epochs for g in swept})))
  text = f"Radii tried, with the validation score after {epochs} epochs: {tried}."
  ends = [
      f"{name} ({best.config.rho:g})"
      for name, tries in methods.items()
      if _is_done(tries[0], records)
      and (best := max(tries, key=_rank)) in (tries[0], tries[-1])
  ]
  if ends:
    text += (f" The best is at the end of what was tried for {' and '.join(ends)}: a"
             " radius beyond it may be better still.")
  return text


def _rank(tried: groups.Group) -> tuple[float, float]:
  return results.rank(tried.runs[0])


def _score(group: groups.Group) -> float:
  return _value(group).mean


def _value(group: groups.Group) -> groups.Value:
  return group.bleu() or group.last()


def _is_done(tried: groups.Group, records: Sequence[Mapping[str, Any]]) -> bool:
  """Whether the sweep that a run belongs to has chosen its radius."""
  name = tried.config.name.rpartition("-sweep-")[0]
  by_key = {record["key"]: dict(record) for record in records}
  return any(
      plans.chosen(small.PLAN, entry, by_key) is not None
      for entry in small.PLAN if entry.config.name == name
  )


def borrowed_sentence(table: str) -> str:
  """Where radii come from that other data chose."""
  tables = {entry.config.name: entry.config.table for entry in small.PLAN}
  others = dict.fromkeys(
      tables[entry.like] for entry in small.PLAN
      if entry.config.table == table and entry.like and tables[entry.like] != table
  )
  titles = "; ".join(TITLES[other] for other in others)
  return f"Radii are those that were chosen for: {titles}." if titles else ""


def provenance(records: Sequence[Mapping[str, Any]]) -> str:
  """Hardware, versions and dates."""
  hardware, flags = (
      "; ".join(dict.fromkeys(r[key] for r in records if r.get(key)))
      for key in ("hardware", "xla_flags")
  )
  packages: dict[str, dict[str, None]] = {}
  for record in records:
    for package, version in record["versions"].items():
      packages.setdefault(package, {})[version] = None
  versions = ", ".join(f"{name} {' and '.join(v)}" for name, v in packages.items())
  dates = sorted({r["date"] for r in records})
  when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
  return (f"{hardware}; {versions}; {when}"
          f"{f'; XLA_FLAGS `{flags}`' if flags else ''}.")
