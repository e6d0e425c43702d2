"""Figures in README and documentation are those of the results that are committed."""

import importlib
import re
import statistics

import pytest

from benchmarks import compile_time
from benchmarks import timing
from examples import radius_report
from examples import radius_study
from examples import records
from examples.frontier_methods import METHODS
from examples.paper import angle
from tests import pages

RESULTS = pages.ROOT / "results"


def text(name):
  return (pages.ROOT / name).read_text(encoding="utf-8")


def load_report(name):
  """A module of the examples that draws, which needs their extra."""
  pytest.importorskip("matplotlib", reason="the examples need the extra 'examples'")
  pytest.importorskip("sklearn", reason="the examples need the extra 'examples'")
  return importlib.import_module(f"examples.{name}")


def test_quickstart_table():
  quickstart_report = load_report("quickstart_report")
  rows = records.read(RESULTS / "quickstart/results.jsonl")
  assert quickstart_report.table(rows) in text("README.md")


def rows_of(name):
  return records.read(RESULTS / f"benchmarks/{name}.jsonl")[1:]


def test_cost_tables():
  page = text("docs/cost.md")
  flat = page.replace("\n", " ")
  columns = ("ASAM by hand", "adaptive_sam", "value_and_grad", "sam")
  modes = ("optax.contrib.sam, opaque", "optax.contrib.sam, transparent")
  for name, label in (("mlp", "MLP"), ("resnet", "ResNet-8")):
    times = {row["method"]: timing.show(row["ratio"]) for row in rows_of(name)}
    cells = [*(times[key] for key in columns), " / ".join(times[key] for key in modes)]
    line = next(x for x in page.splitlines() if x.startswith(f"| {label}, "))
    assert line.endswith(" | " + " | ".join(cells) + " |")
  for name in ("mlp", "mlp_bfloat16", "resnet"):
    by_hand = {row["method"]: row["ratio_to_by_hand"][1] for row in rows_of(name)}
    for method in ("adaptive_sam", "value_and_grad"):
      assert f"{by_hand[method]:.3f}" in flat
  for row in rows_of("resnet_against_opaque"):
    if row["method"] in columns:
      assert row["against"] == "optax.contrib.sam, opaque"
      assert f"{row['ratio_against'][1]:.3f} ± {row['error_against']:.3f}" in flat
  ours = [
      row["ratio"]
      for row in rows_of("perturbation")
      if row["method"] == "asam_jax.ascent"
  ]
  assert len(ours) == 2
  for ratio in ours:
    assert timing.show(ratio) in flat


def test_times_to_trace_and_lower():
  page, seconds, median = text("docs/cost.md"), {}, statistics.median
  for row in rows_of("compile_time"):
    seconds.setdefault(row["part"], {})[row["method"]] = row["lower_seconds"]
  for part, label in (("mlp", "MLP"), ("cnn", "CNN"), ("resnet", "ResNet-8")):
    plain, *others = (seconds[part][name] for name in compile_time.METHODS[:4])
    cells = [label, f"{median(plain):.2f}"]
    for each in others:
      ratio = median(a / b for a, b in zip(each, plain, strict=True))
      cells.append(f"{median(each):.2f} ({ratio:.2f})")
    assert f"| {' | '.join(cells)} |" in page


def test_compile_times():
  page, seconds = text("docs/cost.md"), {}
  for row in rows_of("compile_time"):
    seconds.setdefault(row["part"], {})[row["method"]] = row["compile_seconds"]
  median = statistics.median
  for part, label in (("mlp", "MLP"), ("cnn", "CNN"), ("resnet", "ResNet-8")):
    plain, by_hand, *ours = (seconds[part][name] for name in compile_time.METHODS)
    cells = [label, f"{median(plain):.2f}", f"{median(by_hand):.2f}"]
    for each in ours:  # of one round, as the machine's speed changes between them
      ratio = median(a / b for a, b in zip(each, by_hand, strict=True))
      cells.append(f"{median(each):.2f} ({ratio:.2f})")
    assert f"| {' | '.join(cells)} |" in page
  for leaves in (300, 3000):
    taken = seconds[f"{leaves} leaves"]
    cells = [f"{taken[name][0]:.2f}" for name in compile_time.SPELLINGS]
    assert f"| {leaves:,} | {' | '.join(cells)} |" in page
  (many,) = rows_of("compile_time_10000")
  each = [many["compile_seconds"][0] / 10,
          seconds["3000 leaves"][many["method"]][0] / 3]
  words = "takes {:.0f} s, {:.0f} ms a leaf where it was {:.0f} of 3,000"
  assert words.format(10 * each[0], *each) in page.replace("\n", " ")


def test_what_a_trainer_adds():
  page = text("docs/cost.md")
  cases = {
      row["case"]: row for row in records.read(RESULTS / "benchmarks/trainer.jsonl")
  }
  for method, label in (("plain", "SGD"), ("asam", "ASAM")):
    bare, synthetic, real = (
        cases[f"{method} {kind}"] for kind in ("bare", "synthetic", "real")
    )
    line = (f"| {label} | {bare['milliseconds'][1]:.0f} ms"
            f" | {synthetic['to_bare'][1]:.3f} | {real['to_bare'][1]:.3f}"
            f" | {timing.show(real['to_synthetic'], 3)} |")
    assert line in page
    assert abs(real["to_synthetic"][1] - 1) < 0.03


def test_convolutions():
  page = text("docs/cost.md")
  for row in records.read(RESULTS / "benchmarks/convolutions.jsonl"):
    line = (f"| {row['case']} | {row['milliseconds'][1]:.0f} ms"
            f" | {timing.show(row['to_first'], 3)} |")
    assert line in page


TASKS = (("mlp", 0.4), ("cnn", 0.4), ("mlp", 0.0), ("cnn", 0.0))


def frontier():
  kinds = {"accuracy": [], "cost": []}
  for row in records.read(RESULTS / "frontier/frontier.jsonl"):
    kinds[row["config"]["kind"]].append(row)
  return kinds


def test_table_of_methods():
  report, page = load_report("frontier_report"), text("docs/which_method.md")
  kinds = frontier()
  rows = {
      task: {row.method: row for row in report.rows_of(*kinds.values(), *task)}
      for task in TASKS
  }
  table = page.split("## What was measured")[1].split("## ")[0]
  lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
  assert len(lines) > 9
  names = {method.label.replace(" (T_w)", ""): name for name, method in METHODS.items()}
  for line in lines:
    label, flops, copies, *gains = [cell.strip() for cell in line.strip("|").split("|")]
    method = names[label]
    assert copies == str(METHODS[method].memory), label
    assert flops == f"{rows['mlp', 0.4][method].flops:.2f}", label
    assert gains == [f"{100 * rows[task][method].share:.0f} %" for task in TASKS], label


def test_table_of_radii():
  """The cliff, on the page about the radius, is that of the frontier's table."""
  page, source = text("docs/which_radius.md"), text("results/frontier/frontier.md")
  sections = {part.split("\n")[0]: part for part in source.split("\n## ")}
  table = page.split("## The cliff, measured")[1].split("\n## ")[0]
  lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
  assert len(lines) >= 5
  for line in lines:
    label, _, cells = line.removeprefix("| ").partition(" | ")
    method, _, network = label.rpartition(", ")
    section = sections[f"{network}, 40 % wrong labels"]
    assert f"\n| {method} | {cells}" in section.split("Validation accuracy")[1], label


def test_times_of_one_gradient():
  flat = text("docs/cost.md").replace("\n", " ")
  for row in frontier()["cost"]:
    if row["method"] == "momentum" and row["config"]["network"] not in ("mlp", "cnn"):
      assert timing.show(row["time"][1]) in flat


def few_images(table="cifar10-few", what="accuracy"):
  """The accuracies of each row of a table after its last epoch, by name and radius."""
  found = {}
  for row in records.read(RESULTS / f"paper/{table}.jsonl"):
    if not row["config"]["validation"]:
      name = (row["name"].removeprefix(f"{table}-"), row["config"]["rho"])
      found.setdefault(name, []).append(100 * row["history"][-1][what])
  return {key: values for key, values in found.items() if len(values) >= 3}


def test_what_methods_gain_on_few_images():
  means = {name: statistics.mean(values) for (name, _), values in few_images().items()}
  gains = [means[name] - means["sgd"] for name in ("asam", "momentum", "looksam")]
  words = ("ASAM gains {:.1f} points over SGD, adaptive Momentum-SAM {:.1f} at SGD's"
           " cost, and LookSAM loses {:.1f} at the best")
  gains[2] *= -1
  assert words.format(*gains) in text("docs/which_method.md").replace("\n", " ")


def shown_images(table):
  """Mean and standard error of each row, by its name."""
  return {
      name: f"{statistics.mean(found):.1f} ± "
      f"{statistics.stdev(found) / len(found) ** 0.5:.1f}"
      for (name, _), found in few_images(table).items()
  }


def test_how_far_radii_turn_the_gradient():
  rows = records.read(RESULTS / "paper/angle.jsonl")
  assert angle.table(rows) in text("docs/radius.md")


def signals(scene, network, *settings):
  """Shares of the best radius's gain, or accuracies, with wrong labels; T and not."""
  found = [[] for _ in settings]
  for row in records.read(RESULTS / "radius/signals.jsonl"):
    config = row["config"]
    if (config["scene"], config["network"], config["noise"]) == (scene, network, 0.4):
      scores = [100 * statistics.mean(one) for one in row["accuracy"]]
      by_name = dict(zip(config["settings"], scores, strict=True))
      plain = by_name["fixed 0"]
      best = max(x for name, x in by_name.items() if name.startswith("fixed"))
      for each, setting in zip(found, settings, strict=True):
        score, share = by_name[setting], (by_name[setting] - plain) / (best - plain)
        of_images = scene == "batches of 16"
        each.append(f"{score:.1f}" if of_images else f"{100 * share:.0f}")
  return found


def test_what_the_radius_follows_and_what_moves_the_angle():
  flat = " ".join(text("docs/radius.md").split())
  study, angle_, with_t = "as in the study", "cosine: 0.8", "cosine after T: 0.8"
  careful = "careful: 0.8, rise 0.5"
  mlp = signals(study, "mlp", angle_, with_t, "rise 0.17", "rise 0.5", careful)
  norm = signals(study, "batch_norm_mlp", angle_, with_t, "rise 0.17", careful)
  large = signals("batches of 256", "mlp", angle_, "cosine: 0.7")
  small = signals("batches of 16", "mlp", angle_, "fixed 0", "cosine: 0.9")
  stays, restarted = (
      signals(f"{kind} rate", "mlp", angle_)[0] for kind in ("constant", "restarted")
  )
  words = (
      f"0.8 gets {mlp[1][0]} % on the MLP, where the plain angle gets {mlp[0][0]} %,"
      f" and {norm[1][0]} % with batch norm, where that gets {norm[0][0]} %",
      f"0.17: {mlp[2][0]} and {mlp[2][1]} % on the MLP",
      f"at 0.5 ({mlp[3][0]} and {mlp[3][1]} %), and with batch norm 0.17 gets"
      f" {norm[2][0]} and {norm[2][1]} %",
      f"0.8 and 0.5: {mlp[4][0]} and {mlp[4][1]} % on the MLP, where the angle alone"
      f" gets {mlp[0][0]} and {mlp[0][1]} %; with batch norm {norm[3][0]} and"
      f" {norm[3][1]} %, where it gets {norm[0][0]} and {norm[0][1]} %",
      f"0.8 gets {large[0][0]} and {large[0][1]} % with batches of 256, where 0.7 gets"
      f" {large[1][0]} and {large[1][1]} %",
      f"at {small[0][0]} and {small[0][1]} % of the images right where that has"
      f" {small[1][0]} %, and so does 0.9, at {small[2][0]} and {small[2][1]} %",
      f"{stays[0]} and {stays[1]} % with a rate that stays, {restarted[0]} and"
      f" {restarted[1]} % with one that is restarted",
  )
  for each in words:
    assert each in flat


def test_what_the_smaller_radii_of_the_attention_network_change():
  """The page's words are those of the study's two lists."""
  flat = " ".join(text("docs/radius.md").split())
  whole, seven = text("results/radius/radius.md").split("With seven radii")
  found = [[int(x) for x in re.findall(r"(?:c = 0.8:|validation split:) (\d+) %", part)]
           for part in (seven, whole)]
  (before, best_before), (after, best_after) = found
  assert f"the default from {before} to {after} % of the tuned radius's gain" in flat
  assert f"the best of the three from {best_before} to {best_after} %" in flat
  rows = records.read(RESULTS / "radius/radius.jsonl")
  everything = radius_report.results(rows, radius_study.RATE)
  first = radius_report.results(rows, radius_study.RATE, radius_report.SEVEN)
  moved = [(one, old) for one, old in zip(everything, first, strict=True)
           if one.radii[one.best] != old.radii[old.best]]
  assert {one.cell[0] for one, _ in moved} == {"transformer"}
  assert len(moved) == 3  # "in three of the six cells"
  assert all(old.best == 0 for old in first if old.cell[0] == "transformer")
  worse = {one.cell[1:]: (one.fixed[one.best], old.fixed[old.best])
           for one, old in moved if one.fixed[one.best] < old.fixed[old.best]}
  noisy, clean = worse[0.4, "elementwise", "2"], worse[0.0, "none", "2"]
  words = "{:.1f} ± {:.1f} % where the radius before had {:.1f} ± {:.1f}"
  assert words.format(*noisy[0], *noisy[1]) in flat
  words = "{:.1f} ± {:.1f} where it had {:.1f} ± {:.1f}"
  assert words.format(*clean[0], *clean[1]) in flat
  assert len(worse) == 2
  smallest = [one for one in first if one.cell[0] != "transformer" and not one.best]
  assert len(smallest) == 3
  assert not any(one.cell[1] for one in smallest)


def test_where_the_auto_radius_costs_accuracy():
  """The page on the radius tells of it with the numbers of the results."""
  flat = text("docs/radius.md").replace("\n", " ")
  shown, wrong = map(shown_images, ("cifar10-few", "cifar10n-small"))
  sgd, asam, auto = (shown[name] for name in ("sgd", "asam", "auto"))
  assert f"{auto} % where SGD has {sgd} and ASAM with the tuned radius {asam} %" in flat
  assert f"A target of 0.9 gets to {shown['auto-0.9']} %" in flat
  learned = {
      name: statistics.mean(found)
      for (name, _), found in few_images(what="train_accuracy").items()
  }
  words = ("{auto:.1f} % of the training images are learned, where SGD learns"
           " {sgd:.1f} %.")
  assert words.format(**learned) in flat
  tried = {
      row["config"]["rho"]: row["history"][-1]
      for row in records.read(RESULTS / "paper/cifar10-few.jsonl")
      if row["name"].startswith("cifar10-few-asam-sweep-")
  }
  assert "ρ = 0.0625 has as many images right, and a higher loss" in flat
  assert tried[0.0625]["accuracy"] == tried[0.25]["accuracy"]
  assert tried[0.0625]["loss"] > tried[0.25]["loss"]
  assert f"to what the tuned radius has: {shown['auto-0.98']} %" in flat
  words = "{} % where SGD has {} and ASAM with the tuned radius {} %"
  assert words.format(wrong["auto"], wrong["sgd"], wrong["asam"]) in flat
  words = "Targets of 0.9 and 0.98 get to {} and {} %, above SGD"
  assert words.format(wrong["auto-0.9"], wrong["auto-0.98"]) in flat
  vit = shown_images("vit-small")
  words = ("{} % where AdamW has {} and ASAM with the tuned radius, the smallest of"
           " eight, {} %")
  assert words.format(vit["auto"], vit["adamw"], vit["asam"]) in flat
  learned = few_images("vit-small", "train_accuracy")["adamw", 0.0]
  assert f"which learns {statistics.mean(learned):.1f} % of its 2,000 images" in flat
  assert f"A target of 0.98 gets to {vit['auto-0.98']} %" in flat
  bleu = {}
  for row in records.read(RESULTS / "paper/multi30k.jsonl"):
    if not row["config"]["validation"]:
      name = row["name"].removeprefix("multi30k-"), row["config"]["rho"]
      bleu.setdefault(name, []).append(row["history"][-1]["bleu"])
  mean, error = statistics.mean, lambda x: statistics.stdev(x) / len(x) ** 0.5
  shown = [
      f"{mean(found):.1f} ± {error(found):.1f}"
      for found in (bleu["auto", 0.0], bleu["adam", 0.0], bleu["asam", 0.00625])
  ]
  words = ("{} BLEU where AdamW has {} and ASAM with the tuned radius, the smallest of"
           " seven, {}. A target of 0.98 gets to {:.1f} (one seed so far).")
  (milder,) = bleu["auto-0.98", 0.0]
  assert words.format(*shown, milder) in flat
