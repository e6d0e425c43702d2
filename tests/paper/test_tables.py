"""Tables say what the records say, and the pictures are there."""

import dataclasses
import math
import re

import numpy as np
import pytest

from examples import style
from examples.paper import comparison
from examples.paper import configs
from examples.paper import figures
from examples.paper import groups
from examples.paper import methods
from examples.paper import models
from examples.paper import page
from examples.paper import pictures
from examples.paper import published
from examples.paper import results
from examples.paper import sections
from examples.paper import small
from examples.paper import tables
from tests import pages
from tests.paper.fake_records import record

replace = dataclasses.replace
SGD = replace(small.CIFAR10, name="sgd", epochs=2)
ASAM = replace(SGD, name="asam", method="asam", rho=0.5)


def runs(config, *accuracies, **fields):
  return [
      record(replace(config, seed=seed), 0.1, accuracy, **fields)
      for seed, accuracy in enumerate(accuracies)
  ]


def small_records():
  sweep = replace(ASAM, validation=5000, name="asam-sweep")
  return [
      *runs(SGD, 0.70, 0.72, 0.71),
      *runs(ASAM, 0.71, 0.73, 0.75, gradients=2.0),
      *runs(replace(SGD, epochs=4), 0.74, 0.74, 0.74),
      record(replace(sweep, rho=1.0), 0.66),
      record(replace(sweep, rho=0.5), 0.68),
  ]


def test_mean_and_standard_error():
  mean, error = groups.value([1.0, 2.0, 3.0, 6.0])
  expected = np.std([1, 2, 3, 6], ddof=1) / 2
  assert (mean, error) == (3.0, pytest.approx(expected))
  assert math.isnan(groups.value([1.0]).error)
  assert str(groups.value([50.0])) == "50.00"


def test_a_table_has_accuracy_and_cost_in_the_same_row():
  text = "\n".join(sections.small_table("cifar10-small", small_records()))
  # 6 x 1e9 multiply-adds x 20 steps of 128 images.
  assert "| SGD | – | 2 | 71.00 ± 0.58 | 50.0 | 3 | 2 | 15.4 | 2.0 |" in text
  assert "| ASAM | 0.5 | 2 | 73.00 ± 1.15 | 50.0 | 3 | 4 | 30.7 | 2.0 |" in text
  assert "| SGD, 2 × epochs | – | 4 | 74.00 ± 0.00 | 50.0 | 3 | 4 | 15.4 |" in text
  assert "from 0.07 minutes (ASAM) to 0.13 (SGD, 2 × epochs), which" in text
  assert "the validation score after 2 epochs: ASAM 0.5: 68.00, 1: 66.00." in text
  assert "a test's machine; jax 1.2.3; 2026-01-02." in text
  assert "1,000 training images" in text


def test_every_method_has_a_name_and_a_look():
  configs_of = [replace(ASAM, method=method) for method in methods.METHODS]
  names = [groups.label(config) for config in configs_of]
  looks = [style.of(groups.style_of(config)) for config in configs_of]
  assert len(set(names)) == len(set(looks)) == len(names)


def test_rows_stand_in_the_order_of_the_plan_and_the_missing_are_named():
  double = next(e.config for e in small.PLAN if e.config.name.endswith("-double"))
  asam = next(e.config for e in small.PLAN if e.config.method == "asam")
  records = [*runs(double, 0.8, 0.8, 0.8), *runs(replace(asam, rho=0.5), 0.7)]
  text = "\n".join(sections.small_table(double.table, records))
  assert 0 < text.index("| ASAM |") < text.index("| SGD, 2 × epochs |")
  missing = next(line for line in text.splitlines() if line.startswith("Not trained"))
  assert "SGD; ASAM (1 of 5 seeds); SAM; ASAM, auto radius; ASAM in the" in missing
  assert "2 × epochs" not in missing


def test_every_network_has_the_name_that_papers_give_it():
  for name in models.NAMES:
    assert published.network(name) != name


def test_the_best_epoch_stands_beside_the_last_where_labels_are_wrong():
  config = replace(small.WORSE, name="sgd", epochs=2)
  records = [record(replace(config, seed=s), 0.6, 0.5) for s in range(3)]
  text = "\n".join(sections.small_table("cifar10n-small", records))
  assert "| SGD | – | 2 | 50.00 ± 0.00 | 60.00 ± 0.00 | 50.0 | 3 |" in text


def swept(entry, accuracies):
  """The records of an entry's sweep, by radius."""
  return [
      record(entry.sweep.run(replace(entry.config, seed=0), rho), accuracy)
      for rho, accuracy in accuracies.items()
  ]


def entry_of(name):
  (entry,) = (entry for entry in small.PLAN if entry.config.name == name)
  return entry


def test_radii_that_an_earlier_plan_chose_are_left_out():
  looksam = entry_of("cifar10-few-looksam")
  older = runs(replace(looksam.config, rho=0.25), 0.4, 0.4)
  newer = runs(replace(looksam.config, rho=0.5), 0.5, 0.5, 0.5)
  other = runs(replace(ASAM, rho=0.1), 0.7)
  sweep = swept(looksam, {0.25: 0.1, 0.5: 0.3, 1.0: 0.2})
  records = [*older, *newer, *other, *sweep]
  kept = groups.of_plan(records, small.PLAN)
  assert kept == [*newer, *other, *sweep]
  # While the sweep is not done, nothing is known to be an older choice.
  assert groups.of_plan(records[:-1], small.PLAN) == records[:-1]


def test_the_best_radius_at_the_end_of_the_sweep_is_named():
  def sentence(name, accuracies):
    records = swept(entry_of(name), accuracies)
    return sections.sweep_sentence(groups.group(records, swept=True), records)

  inside = sentence("cifar10-few-momentum", {0.25: 0.1, 0.5: 0.3, 1.0: 0.2})
  assert "at the end" not in inside
  at_end = sentence("cifar10-few-momentum", {0.125: 0.4, 0.25: 0.3, 0.5: 0.2, 1.0: 0.2})
  assert "at the end of what was tried for adaptive Momentum-SAM (0.125):" in at_end
  unfinished = sentence("cifar10-few-momentum", {0.25: 0.3, 0.5: 0.2})
  assert "at the end" not in unfinished


def test_what_is_wrong_about_the_labels_and_where_radii_come_from_is_said():
  wrong = "; the test set's are right"
  noisy = runs(replace(small.NOISY, name="noise-small-sgd"), 0.5)
  text = "\n".join(sections.small_table("noise-small", noisy))
  assert wrong in text
  assert "Radii are those that were chosen for: CIFAR-10N, human labels" in text
  assert wrong in sections.setting(runs(small.WORSE, 0.5)[0])
  text = "\n".join(sections.small_table("cifar10-small", small_records()))
  assert wrong not in text
  assert "chosen for" not in text


def test_what_disappoints_on_few_images_is_told_with_its_numbers():
  entries = [entry_of(f"cifar10-few-{name}") for name in
             ("sgd", "auto", "auto-0.9", "looksam", "looksam-0.2")]
  records = [
      one for i, entry in enumerate(entries)
      for one in runs(replace(entry.config, rho=0.25 * (i > 2)), 0.6 - i / 100)
  ]
  sweep = swept(entries[3], {0.25: 0.1, 0.5: 0.3})
  def text(*found):
    return sections.disappointing(
        groups.group(found), groups.group(sweep, swept=True)
    )

  assert text(*records) == (
      "The auto radius, which holds the cosine of the two gradients at 0.8, gets 59.0 %"
      " where SGD gets 60.0 %; its training accuracy is 50.0 % where SGD's is 50.0 %."
      " A target of 0.9 gives 58.0 %, with 50.0 % in training. What tuning finds turns"
      " the gradient less: [where the auto radius costs"
      " accuracy](radius.md#what-it-reaches). LookSAM gets 57.0 % at the best of 2"
      " radii, with 50.0 % in training. With 0.2 of the direction reused in place of"
      " 0.7 it gets 56.0 %."
  )
  assert "reused" not in text(*records[:-1])
  assert text(*runs(entries[0].config, 0.1), *records[3:6]) == ""
  assert text(records[0]) == ""


def test_a_tuned_row_below_the_base_is_told_too():
  plain, asam = (entry_of(f"vit-small-{name}") for name in ("adamw", "asam"))
  records = [*runs(plain.config, 0.4), *runs(replace(asam.config, rho=0.125), 0.3)]
  text = sections.disappointing(groups.group(records), [])
  assert text == (
      "AdamW + ASAM (30.0 %) stays behind AdamW (40.0 %) with the radius that"
      " validation chose. AdamW gets no further than 50.0 % of the training set:"
      " nothing is learned by heart yet, and to hold learning back costs more than it"
      " gives."
  )
  within = [*runs(plain.config, 0.40, 0.44), *runs(asam.config, 0.39, 0.43)]
  assert not sections.disappointing(groups.group(within), [])
  beyond = [*runs(plain.config, 0.40, 0.41), *runs(asam.config, 0.35, 0.36)]
  assert "stays behind" in sections.disappointing(groups.group(beyond), [])


def test_the_command_on_the_page_is_that_of_the_plan():
  lines = [line for line in page.page([], {}, pages.ROOT).splitlines()
           if line.startswith("    ")]
  start = lines.index("    for core in 0 1; do")
  source = (pages.ROOT / "examples/paper/small.py").read_text("utf-8")
  assert "\n".join(lines[start : start + 4]) in source


def paper(name):
  (table,) = (table for table in comparison.TABLES if table.name == name)
  return table


def test_published_figures_stand_beside_ours_with_their_marks():
  asam = configs.NAMED["cifar10-resnet20-asam"]
  validated = record(replace(asam, validation=100), 0.1)  # is no test accuracy
  text = comparison.table_text(paper("cifar10"), [validated, *runs(asam, 0.93, 0.94)])
  line = next(line for line in text.splitlines() if "ResNet-20" in line)
  assert line == ("| ResNet-20 | 93.18 ± 0.21 † | – | 93.56 ± 0.15 † | – |"
                  " 93.82 ± 0.17 † | 93.50 ± 0.50 |")
  noise = comparison.table_text(
      paper("noise"), runs(configs.NAMED["noise-80-sam"], 0.6)
  )
  assert "| 80 % | 68.35 ± 0.85 | – | 69.92 ± 0.98 | 60.00 |" in noise
  assert "†" not in noise


def test_top_5_and_bleu_on_the_validation_set_have_rows():
  (run,) = runs(configs.NAMED["imagenet-resnet50-sam"], 0.75)
  run["history"][-1]["top_5"] = 0.93
  text = comparison.table_text(paper("imagenet"), [run])
  assert "| top-1 | 75.79 ± 0.22 † | – | 76.39 ± 0.03 † | 75.00 |" in text
  assert "| top-5 | 92.62 ± 0.04 † | – | 92.97 ± 0.07 † | 93.00 |" in text
  adam = configs.NAMED["iwslt14-adam"]
  records = [record(adam, 0.6, bleu=34.0),
             record(replace(adam, validation=1), 0.6, bleu=35.0)]
  text = comparison.table_text(paper("iwslt14"), records)
  assert "| validation | 35.34 | 35.00 | 35.52 | – |" in text
  assert "| test | 34.86 | 34.00 | 34.78 | – |" in text


def test_the_normalization_schemes_of_the_paper_have_a_table():
  config = configs.NAMED["normalization-elementwise-inf-0.01"]
  text = "\n".join(page.normalization(runs(config, 0.9)))
  assert "| – (ρ = 0.005) | 90.00 (ρ = 0.01) | – (ρ = 0.02) |" in text
  assert "| elementwise, p = 2 | 2.37 | – | – | – |" in text


def test_the_rank_correlations_stand_beside_the_published_ones():
  text = "\n".join(page.correlation([]))
  assert "| ψ dropout | +0.102 † | – | -0.092 † | – |" in text
  measured = [
      {"batch_size": 32, "learning_rate": rate, "weight_decay": 5e-4, "dropout": 0.0,
       "train_accuracy": 1.0, "test_accuracy": 0.9 - rate,
       "sharpness": {"sharpness, p=2": -rate, "adaptive, p=2": rate,
                     "sharpness, p=inf": rate, "adaptive, p=inf": rate}}
      for rate in (0.01, 0.02, 0.05)
  ]
  text = "\n".join(page.correlation([*measured, {"train_accuracy": 0.5}]))
  assert "Here 3 of 4 were kept." in text
  assert "| Kendall τ | +0.174 † | -1.000 | +0.636 † | +1.000 |" in text
  assert "| ψ dropout | +0.102 † | – |" in text


def test_translation_is_judged_by_bleu():
  config = replace(small.TRANSLATION, method="sam", rho=0.1, epochs=2)
  records = [record(replace(config, seed=s), 0.5, bleu=30 + s) for s in range(3)]
  text = "\n".join(sections.small_table("multi30k", records))
  assert "| AdamW + SAM | 0.1 | 2 | 31.00 ± 0.58 | 50.0 | 3 |" in text
  assert "| BLEU |" in text
  assert "FLOPs are those of a sentence of median length" in text
  (group,) = groups.group(records)
  # 6 x 1e9 multiply-adds x 1000 sentences, an epoch looked at.
  assert group.teraflop() == pytest.approx(6.0)


def test_one_command_makes_page_and_pictures(tmp_path, capsys):
  for one in small_records():
    results.add(tmp_path / "cifar10-small.jsonl", one)
  for config in configs.normalization(small.NORMALIZATION):
    results.add(tmp_path / "normalization-small.jsonl", record(config, 0.5))
  target = tmp_path / "docs" / "results.md"
  tables.main(["--results", str(tmp_path), "--page", str(target),
               "--pictures", str(tmp_path / "pictures")])
  text = target.read_text("utf-8")
  links = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
  assert len(links) == 4
  for link in links:
    data = (target.parent / link).read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 10_000
  assert "| filter-wise, p = 2 | 50.00 (ρ = 0.1) |" in text
  assert str(tmp_path) not in text
  assert "4 pictures" in capsys.readouterr().out


def test_no_runs_no_page(tmp_path):
  with pytest.raises(SystemExit, match="no runs in"):
    tables.main(["--results", str(tmp_path)])


def test_figure_1_s_rise_is_the_same_at_both_places_for_asam_alone():
  here, there = (1.0, 1.0), figures.SCALE
  assert figures.rise(here, True) == pytest.approx(figures.rise(there, True), rel=1e-3)
  assert figures.rise(there, False) > 2 * figures.rise(here, False)


def test_figure_3_s_paths_are_the_published_ones():
  sam = figures.trajectory("sam", figures.STARTS["left"])
  np.testing.assert_allclose(sam[-20:].mean(0), [0.205, 0.19], atol=0.01)
  stuck = figures.trajectory("sam", figures.STARTS["right"])
  np.testing.assert_allclose(stuck, np.broadcast_to(stuck[0], stuck.shape))
  asam = figures.trajectory("asam", figures.STARTS["right"])
  assert figures.toy_loss(asam[7]) < 0.005


def test_figure_3_s_text_says_how_far_the_paths_creep():
  stuck = figures.creep("sam", figures.STARTS["right"])
  assert stuck == 0
  sam = figures.trajectory("sam", figures.STARTS["left"])
  first = next(i for i, (x, y) in enumerate(sam) if x * y > 0.04)
  far = np.linalg.norm(sam[first : first + 20].mean(0) - sam[-20:].mean(0))
  text = page.figure_3()
  assert f"SAM's path moves by {far:.3f}" in text
  assert f"{figures.creep('asam', figures.STARTS['right']):.3f}." in text


def test_methods_of_one_cost_stand_apart_and_the_worst_beneath(drawings, tmp_path):
  late = replace(ASAM, method="late", name="late")
  worst = replace(ASAM, method="looksam", name="looksam")
  records = [
      *runs(SGD, 0.70, 0.72), *runs(ASAM, 0.71, 0.73, gradients=2.0),
      *runs(replace(ASAM, method="sam", name="sam"), 0.71, 0.73, gradients=2.0),
      *runs(late, 0.70, 0.72), *runs(worst, 0.30, 0.32),
  ]
  pictures.draw_methods(groups.group(records), tmp_path / "x.png")
  (figure,) = drawings
  curves, costs = figure.axes
  assert [text.get_text() for text in costs.texts] == ["↓ 31.00 ± 1.00"]
  assert costs.get_ylim()[0] > 60
  bars = {bar.get_label(): bar.lines[0].get_xdata()[0] for bar in costs.containers}
  assert len(set(bars.values())) == len(bars) == 5
  assert bars["ASAM"] == pytest.approx(bars["SAM"], abs=0.2)
  assert "LookSAM ($T_w$), every 5th step" in bars
  order = {line.get_color(): line.get_zorder() for line in curves.get_lines()}
  assert max(order, key=lambda color: order[color]) == style.of("sgd").color
  assert style.of("last_fifth").color in order
  assert (tmp_path / "x.png").stat().st_size < 300_000


def test_the_base_is_never_beneath(drawings, tmp_path):
  """However far behind, for the others are compared with it."""
  sam = replace(ASAM, method="sam", name="sam")
  records = [*runs(SGD, 0.38, 0.39), *runs(ASAM, 0.51, 0.52, gradients=2.0),
             *runs(sam, 0.52, 0.53, gradients=2.0)]
  pictures.draw_methods(groups.group(records), tmp_path / "x.png")
  _, costs = drawings[0].axes
  assert not costs.texts
  assert 30 < costs.get_ylim()[0] < 38.5


def test_three_targets_of_the_auto_radius_can_be_told_apart(drawings, tmp_path):
  targets = [replace(ASAM, method="auto", name=f"auto-{c}", cosine=c, rho=0.0)
             for c in (0.8, 0.9, 0.98)]
  records = [one for config in (SGD, *targets) for one in runs(config, 0.6, 0.61)]
  pictures.draw_methods(groups.group(records), tmp_path / "x.png")
  curves, _ = drawings[0].axes
  color = style.of("auto").color
  mine = [line for line in curves.get_lines() if line.get_color() == color]
  assert len(mine) == 3
  assert len({line.get_markerfacecolor() for line in mine}) == 3
  assert len({line.get_linestyle() for line in mine}) == 3


def test_noise_is_drawn_as_a_curve_for_each_method(drawings, tmp_path):
  records = [
      one for config in configs.label_noise()
      for one in runs(config, 0.9 - config.noise / 2, 0.9)
  ]
  paths = pictures.draw_all(records, tmp_path)
  assert paths["noise"] == tmp_path / "noise.png"
  scores, gains = drawings[0].axes
  labels = [bar.get_label() for bar in scores.containers]
  assert labels == ["SGD, published", "SGD", "SAM, published", "SAM",
                    "ASAM, published", "ASAM"]
  assert all(len(bar.lines[0].get_xdata()) == 5 for bar in scores.containers)
  published_gain = gains.containers[0].lines[0].get_ydata()
  np.testing.assert_allclose(published_gain[0], 94.80 - 94.50, atol=1e-9)


def test_the_page_is_what_the_records_say():
  folder = pages.ROOT / "results/paper"
  drawn = {path.stem: path for path in folder.glob("*.png")}
  stored = pages.ROOT / "docs/results.md"
  records, measured = tables.read(folder)
  text = page.page(records, drawn, stored.parent, measured)
  assert stored.read_text("utf-8") == text, f"make it anew: {page.COMMAND}"
