"""Tables say what the records say, and the pictures are there."""

import dataclasses
import math
import re

import numpy as np
import pytest

from examples.paper import configs
from examples.paper import figures
from examples.paper import groups
from examples.paper import models
from examples.paper import page
from examples.paper import published
from examples.paper import results
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
  text = "\n".join(page.small_table("cifar10-small", small_records()))
  # 6 x 1e9 multiply-adds x 1000 examples x 2 epochs (looked at twice).
  assert "| SGD | – | 2 | 71.00 ± 0.58 | 50.0 | 3 | 2 | 12 | 2.0 |" in text
  assert "| ASAM | 0.5 | 2 | 73.00 ± 1.15 | 50.0 | 3 | 4 | 24 | 2.0 |" in text
  assert "| SGD, 2 × epochs | – | 4 | 74.00 ± 0.00 | 50.0 | 3 | 4 | 12 | 2.0 |" in text
  assert "the validation score after 2 epochs: ASAM 0.5: 68.00, 1: 66.00." in text
  assert "a test's machine; jax 1.2.3; 2026-01-02; `python -m x`." in text
  assert "1,000 training images" in text


def test_rows_stand_in_the_order_of_the_plan_and_the_missing_are_named():
  double = next(e.config for e in small.PLAN if e.config.name.endswith("-double"))
  asam = next(e.config for e in small.PLAN if e.config.method == "asam")
  records = [*runs(double, 0.8, 0.8, 0.8), *runs(replace(asam, rho=0.5), 0.7)]
  text = "\n".join(page.small_table(double.table, records))
  assert 0 < text.index("| ASAM |") < text.index("| SGD, 2 × epochs |")
  missing = next(line for line in text.splitlines() if line.startswith("Not trained"))
  assert "SGD; ASAM (1 of 3 seeds); SAM; ASAM, auto radius; ASAM in the" in missing
  assert "2 × epochs" not in missing


def test_every_network_has_the_name_that_papers_give_it():
  for name in models.NAMES:
    assert published.network(name) != name


def test_the_best_epoch_stands_beside_the_last_where_labels_are_wrong():
  config = replace(small.WORSE, name="sgd", epochs=2)
  records = [record(replace(config, seed=s), 0.6, 0.5) for s in range(3)]
  text = "\n".join(page.small_table("cifar10n-small", records))
  assert "| SGD | – | 2 | 50.00 ± 0.00 | 60.00 ± 0.00 | 50.0 | 3 |" in text


def test_published_figures_stand_beside_ours_with_their_marks():
  asam = configs.NAMED["cifar10-resnet20-asam"]
  text = page.paper_table(
      "cifar10", published.CIFAR10, lambda c: c.model, runs(asam, 0.93, 0.94)
  )
  line = next(line for line in text.splitlines() if "ResNet-20" in line)
  assert line == ("| ResNet-20 | 93.18 ± 0.21 † | – | 93.56 ± 0.15 † | – |"
                  " 93.82 ± 0.17 † | 93.50 ± 0.50 |")
  noise = page.paper_table(
      "noise", published.NOISE, lambda c: f"{c.noise:.0%}".replace("%", " %"),
      runs(configs.NAMED["noise-80-sam"], 0.6),
  )
  assert "| 80 % | 68.35 ± 0.85 | – | 69.92 ± 0.98 | 60.00 |" in noise
  assert "†" not in noise


def test_translation_is_judged_by_bleu():
  config = replace(small.TRANSLATION, method="sam", rho=0.1, epochs=2)
  records = [record(replace(config, seed=s), 0.5, bleu=30 + s) for s in range(3)]
  text = "\n".join(page.small_table("multi30k", records))
  assert "| AdamW + SAM | 0.1 | 2 | 31.00 ± 0.58 | 50.0 | 3 |" in text
  assert "| BLEU |" in text


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


def test_the_page_is_what_the_records_say():
  folder = pages.ROOT / "results/paper"
  drawn = {path.stem: path for path in folder.glob("*.png")}
  stored = pages.ROOT / "docs/results.md"
  text = page.page(results.read_all(folder), drawn, stored.parent)
  assert stored.read_text("utf-8") == text, f"make it anew: {page.COMMAND}"
