"""What is missing of a list of runs is done next, and a radius is chosen first."""

import dataclasses
import json

import pytest

from examples.paper import configs
from examples.paper import groups
from examples.paper import plans
from examples.paper import results
from examples.paper import run
from examples.paper import small
from examples.paper.config import folder_of
from examples.paper.config import key_of
from examples.paper.config import Options
from tests.paper.fake_records import record
from tests.paper.tiny import CONFIG
from tests.paper.tiny import tiny  # noqa: F401

replace = dataclasses.replace
ASAM = replace(configs.FAKE, name="asam", method="asam", examples=100)
SWEPT = plans.Entry(ASAM, (3, 4), plans.Sweep((0.5, 1.0, 2.0), 50, extensions=1))


def finished(pairs):
  """Records by key, of (configuration, accuracy)."""
  return {key_of(c): record(c, accuracy) for c, accuracy in pairs}


def names(plan, records, failed=frozenset()):
  return [(c.name, c.seed, c.rho) for c in plans.missing(plan, records, failed)]


def test_rows_without_a_sweep_give_their_seeds_in_order():
  plan = [plans.Entry(replace(configs.FAKE, name="sgd"), (0, 1))]
  assert names(plan, {}) == [("sgd", 0, 0.0), ("sgd", 1, 0.0)]
  done = finished([(configs.FAKE, 0.5)])
  assert names(plan, done) == [("sgd", 1, 0.0)]


def test_a_sweep_may_take_a_share_of_the_epochs():
  long = replace(ASAM, epochs=12)
  sweep = plans.Entry(long, (0,), plans.Sweep((0.5, 1.0), 50, share=0.5))
  assert [(c.epochs, c.eval_every) for c in plans.missing([sweep], {})] == [(6, 6)] * 2
  done = finished((c, c.rho) for c in plans.missing([sweep], {}))
  beyond = replace(long, epochs=6, eval_every=6, validation=50, rho=2.0)
  done |= finished([(beyond, 0.5)])
  assert [(c.epochs, c.rho) for c in plans.missing([sweep], done)] == [(12, 1.0)]


def test_the_sweep_holds_images_out_and_has_the_whole_budget():
  for config in plans.missing([SWEPT], {}):
    assert config.validation == 50
    assert config.seed == 3
    assert config.epochs == config.eval_every == ASAM.epochs
  assert [rho for _, _, rho in names([SWEPT], {})] == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(("accuracies", "expected"), [
    ({0.5: 0.1, 1.0: 0.3, 2.0: 0.2}, 1.0),  # inside: it is the best
    ({0.5: 0.1, 1.0: 0.2, 2.0: 0.3, 4.0: 0.1}, 2.0),  # at the end: one more is tried
    ({0.5: 0.3, 1.0: 0.2, 2.0: 0.1, 0.25: 0.4}, 0.25),  # and not more than one
])
def test_the_best_radius_of_the_sweep_is_taken(accuracies, expected):
  scores = {}
  while SWEPT.sweep and (rho := plans.chosen([SWEPT], SWEPT, scores)) is None:
    missing = list(plans.missing([SWEPT], scores))
    assert all(c.validation for c in missing)
    scores |= finished((c, accuracies[c.rho]) for c in missing)
  assert rho == expected
  assert len(scores) == len(accuracies)
  final = list(plans.missing([SWEPT], scores))
  assert [(c.seed, c.rho, c.validation) for c in final] == [
      (3, expected, 0), (4, expected, 0)
  ]


@pytest.mark.parametrize("first", [1.2, float("nan")])
def test_of_equal_scores_the_lower_loss_decides(first):
  sweep = list(plans.missing([SWEPT], {}))
  scores = finished((c, 0.5) for c in sweep)
  for config, loss in zip(sweep, (first, 1.1, 1.3), strict=True):
    scores[key_of(config)]["history"][-1]["loss"] = loss
  assert plans.chosen([SWEPT], SWEPT, scores) == 1.0


def test_a_row_waits_for_the_radius_of_another():
  like = plans.Entry(replace(ASAM, name="late", method="late"), (0,), like="asam")
  plan = [SWEPT, like]
  assert all("late" not in name for name, _, _ in names(plan, {}))
  scores = finished(
      (c, 0.5 - abs(c.rho - 1.0)) for c in plans.missing([SWEPT], {})
  )
  assert names(plan, scores)[-1] == ("late", 0, 1.0)
  with pytest.raises(ValueError, match="late is like asam, which is not there"):
    names([like], {})


def test_what_failed_is_not_tried_again():
  sweep = list(plans.missing([SWEPT], {}))
  failed = frozenset({key_of(sweep[2])})
  scores = finished([(sweep[0], 0.2), (sweep[1], 0.1)])
  # 0.5 is the best of those that there are, and at the end.
  assert [rho for _, _, rho in names([SWEPT], scores, failed)] == [0.25]


def test_the_small_plan_has_a_seed_for_the_error_and_never_tunes_on_the_test_set():
  for entry in small.PLAN:
    assert len(entry.seeds) >= 3 or entry.config.table == "normalization-small"
    assert entry.config.method in ("plain", "auto") or entry.sweep or entry.like or (
        entry.config.table == "normalization-small"
    )
  rows = [entry.config for entry in small.PLAN]
  assert len({key_of(c) for c in rows}) == len({c.name for c in rows})
  runs = [(key_of(entry.config), x) for entry in small.PLAN for x in entry.seeds]
  assert len(set(runs)) == len(runs)


def test_no_two_rows_of_a_table_have_one_name():
  rows = [entry.config for entry in small.PLAN]
  for table in {c.table for c in rows} - {"normalization-small"}:
    here = [c for c in rows if c.table == table]
    least = min(c.epochs for c in here)
    labels = [groups.label(c, least) for c in here]
    assert len(set(labels)) == len(labels), labels


@pytest.mark.usefixtures("tiny")
def test_the_runner_does_what_is_missing_and_no_more(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  base = replace(CONFIG, table="t", epochs=1)
  plan = [
      plans.Entry(replace(base, name="sgd"), (0, 1)),
      plans.Entry(replace(base, name="bad", model="none", batch_size=999), (0,)),
      plans.Entry(replace(base, name="asam", method="asam"), (0,),
                  plans.Sweep((0.1, 0.2), 100, extensions=0)),
  ]
  monkeypatch.setattr(small, "PLAN", plan)
  arguments = ["small", "--results", str(tmp_path), "--progress", "False"]
  with pytest.raises(SystemExit, match="1 runs failed"):
    run.main(arguments)
  assert "batch_size=999: there are only 64" in capsys.readouterr().err
  path = tmp_path / "t.jsonl"
  done = results.read(path)
  assert [r["name"] for r in done] == [
      "sgd", "sgd", "asam-sweep-0.1", "asam-sweep-0.2", "asam"
  ]
  # A line is taken out: that run alone is done again, to the same end.
  lines = path.read_text("utf-8").splitlines(keepends=True)
  path.write_text("".join(lines[:1] + lines[2:]), "utf-8")
  run.main([*arguments, "--only", "sgd"])
  again = results.read(path)
  assert [r["name"] for r in again][-1] == "sgd"
  assert again[-1]["digest"] == json.loads(lines[1])["digest"]
  run.main([*arguments, "--only", "sgd", "--dry", "True"])
  assert capsys.readouterr().out.endswith("all is done\n")


@pytest.mark.usefixtures("tiny")
def test_a_run_that_another_process_is_at_is_left_to_it(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  base = replace(CONFIG, table="t", epochs=1, name="sgd")
  monkeypatch.setattr(small, "PLAN", [plans.Entry(base, (0, 1))])
  path, options = tmp_path / "t.jsonl", Options()
  arguments = ["small", "--results", str(tmp_path), "--progress", "False"]

  def other_ends(seconds):
    # While the other one is at seed 0, seed 1 alone was done here.
    assert [r["config"]["seed"] for r in results.read(path)] == [1]
    results.add(path, record(base, 0.25))

  monkeypatch.setattr(run.time, "sleep", other_ends)
  with results.locked(folder_of(base, options)) as held:
    assert held
    with results.locked(folder_of(base, options), wait=False) as again:
      assert not again
    run.main(arguments)
  assert [results.accuracy(r) for r in results.read(path)][1:] == [0.25]


def test_an_unknown_plan_is_refused(capsys):
  with pytest.raises(SystemExit, match="plan='smal': unknown; take small or one of"):
    run.main(["smal"])


def test_a_plan_of_text_asks_for_its_own_option(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit, match="3 runs failed"):
    run.main(["iwslt14", "--seeds", "0", "--progress", "False"])
  assert "dataset=parallel needs --data, its place (of a plan: --text)" in (
      capsys.readouterr().err
  )


def test_results_keep_one_line_a_configuration(tmp_path):
  path = tmp_path / "t.jsonl"
  results.add(path, record(ASAM, 0.1))
  results.add(path, record(replace(ASAM, seed=1), 0.2))
  results.add(path, record(ASAM, 0.3))
  assert [results.accuracy(r) for r in results.read(path)] == [0.2, 0.3]
  path.write_text('{"key": 1}\n', "utf-8")
  with pytest.raises(ValueError, match=r"t\.jsonl, line 1: not a run"):
    results.read(path)
