"""Mutation testing: small faults planted in the package, which the tests must see.

    python tools/mutate.py --sample 40 --seed 0

takes a seeded sample of all mutants of ``asam_jax``, plants one at a time in a scratch
copy, and runs there the test files that belong to its module. It writes one line per
mutant to ``results/mutation/report.jsonl`` and the score to ``summary.json`` beside
it. A survivor is a hole in the tests, unless nobody could tell it from the original:
whoever finds that writes it into ``equivalent.json`` with the reason, and it no longer
counts. Slow, and so no part of CI.
"""

import argparse
import ast
from collections.abc import Iterator
import datetime
import json
import os
from pathlib import Path
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import jax
import optax

ROOT = Path(__file__).resolve().parent.parent
# The files of the suite that see a module's faults soonest.
TESTS = {
    "__init__": "user_errors package",
    "_adaptive_sam": "options transform bad_input",
    "_aliases": "options bad_input variants",
    "_arguments": "bad_input user_errors transform sharpness/bad_input",
    "_ascent": "options ascent ascent_range autodiff ascent_compiled paper",
    "_carried": "options momentum carried",
    "_combined": "bad_input variants",
    "_coordinates": "sharpness/average_case sharpness/curvature sharpness/worst_case"
                    " sharpness/auto_pgd",
    "_describe": "normalization defects bad_input",
    "_door": "bad_input transform autodiff microbatch m_sharpness functional",
    "_functional": "functional bad_input",
    "_geometry": "normalization bad_input defects ascent autodiff",
    "_groups": "m_sharpness bad_input nnx_groups",
    "_info": "metrics precision",
    "_interop": "user_errors compositions",
    "_mesh": "transform options layouts microbatch_devices",
    "_microbatched": "microbatch microbatch_devices",
    "_nnx_groups": "nnx_groups bad_input",
    "_radius": "radius bad_input shard_map",
    "_shards": "sharded_by_hand",
    "_skip_nonfinite": "options nonfinite shard_map",
    "_sometimes": "bad_input variants_periodic shard_map",
    "_stochastic_rounding": "bad_input precision",
    "_trees": "variants metrics nonfinite normalization",
    "_two_passes": "options transform compositions user_errors bad_input",
    "_verdict": "verdict bad_input",
    "_value_and_grad": "bad_input transform defects compositions microbatch",
    "nnx": "bad_input nnx",
    "landscape/_directions": "options landscape sharpness/bad_input",
    "landscape/_plots": "options landscape sharpness/bad_input",
    "landscape/_slices": "options landscape sharpness/bad_input",
    "sharpness/_average_case": "options sharpness/average_case sharpness/bad_input",
    "sharpness/_curvature": "options sharpness/curvature sharpness/bad_input",
    "sharpness/_data": "options sharpness/data sharpness/bad_input",
    "sharpness/_rank": "options sharpness/rank sharpness/bad_input",
    "sharpness/_worst_case": "options sharpness/auto_pgd sharpness/worst_case",
}
COMPARE = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=",
           ast.NotEq: "==", ast.Is: "is not", ast.IsNot: "is", ast.In: "not in",
           ast.NotIn: "in"}
ARITHMETIC = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.Pow: "*",
              ast.BitAnd: "|", ast.BitOr: "&", ast.Mod: "//", ast.FloorDiv: "*"}


class Mutant(NamedTuple):
  """A piece of a file, and what stands there instead."""

  file: str
  line: int
  start: int
  end: int
  before: str
  after: str
  around: str

  @property
  def name(self) -> str:
    """What names it in ``equivalent.json``, however lines move."""
    return f"{self.file}, in {self.around!r}: {self.before} -> {self.after}"

  @property
  def place(self) -> tuple[str, int]:
    """What tells it from all others of one state of the package, or nearly so."""
    return self.name, self.line


# What is known of mutants, by their places.
Records = dict[tuple[str, int], dict[str, Any]]


def replacement(node: ast.AST) -> str | None:
  """The faulty spelling of one node."""
  text = ast.unparse
  match node:
    case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in COMPARE:
      return f"{text(left)} {COMPARE[type(op)]} {text(right)}"
    case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
      return f"(({text(left)}) {ARITHMETIC[type(op)]} ({text(right)}))"
    case ast.BoolOp(op=op, values=values):
      other = " or " if isinstance(op, ast.And) else " and "
      return f"({other.join(f'({text(value)})' for value in values)})"
    case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert(), operand=operand):
      return f"({text(operand)})"
    case ast.Constant(value=bool(value)):
      return str(not value)
    case ast.Constant(value=int(value) | float(value)):
      return repr(value + 1)
    case ast.IfExp(test=test, body=body, orelse=other):
      return f"({text(other)} if {text(test)} else {text(body)})"
    case ast.Call(func=function, args=[first, second, *rest], keywords=keywords) if (
        text(first) != text(second) and not isinstance(first, ast.Starred)):
      call = ast.Call(function, [second, first, *rest], keywords)
      return text(call)
    case ast.Expr(value=value) if not isinstance(value, ast.Constant):
      return "pass"
    case ast.Raise():
      return "pass"
  return None


def mutants_of(path: Path) -> list[Mutant]:
  """Every mutant of one file; annotations, messages and decorators are left alone."""
  source = path.read_text()
  starts = [0]
  for line in source.splitlines(keepends=True):
    starts.append(starts[-1] + len(line))
  skipped = set()
  for node in ast.walk(tree := ast.parse(source)):
    aside = [getattr(node, "annotation", None), getattr(node, "returns", None)]
    aside += getattr(node, "decorator_list", [])
    if isinstance(node, ast.Raise):  # as a whole, not the words of its message
      aside += [node.exc, node.cause]
    if isinstance(node, ast.JoinedStr):
      aside.append(node)
    if isinstance(node, ast.AnnAssign) and "TypeAlias" in ast.unparse(node.annotation):
      aside.append(node.value)
    skipped |= {inner for top in aside if top for inner in ast.walk(top)}
  found = []
  nodes: Iterator[Any] = ast.walk(tree)
  for node in nodes:
    after = None if node in skipped else replacement(node)
    if after is None:
      continue
    start, end = (
        starts[line - 1] + column for line, column in (
            (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
    )
    name = str(path.relative_to(ROOT / "asam_jax"))
    line = node.lineno
    around = source.splitlines()[line - 1].strip()
    found.append(Mutant(name, line, start, end, source[start:end], after, around))
  return found


def outcome(mutant: Mutant, copy: Path, limit: float) -> dict[str, object]:
  """Whether the tests see it in a copy of the project, and how soon."""
  names = [Path("tests", x) for x in TESTS[mutant.file.removesuffix(".py")].split()]
  tests = [str(path.with_name(f"test_{path.name}.py")) for path in names]
  command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
  environment = {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
  target, start, seen = copy / "asam_jax" / mutant.file, time.monotonic(), []
  source = target.read_text()
  target.write_text(source[: mutant.start] + mutant.after + source[mutant.end :])
  try:
    run = subprocess.run(
        [*command, *tests], cwd=copy, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=limit,
    )
    verdict = "killed" if run.returncode else "survived"
    seen = [x for x in run.stdout.splitlines() if x.startswith(("FAILED", "ERROR"))]
  except subprocess.TimeoutExpired:
    verdict = "too slow"
  finally:
    target.write_text(source)
  return {
      "mutant": mutant.name, "line": mutant.line, "outcome": verdict,
      "seen_by": seen[0].split(" - ")[0] if seen else None,
      "seconds": round(time.monotonic() - start),
  }


def judged(record: dict[str, Any], known: dict[str, str]) -> dict[str, Any]:
  """The record of a survivor that nobody could tell from the original says so."""
  if record["outcome"] != "survived" or record["mutant"] not in known:
    return record
  return record | {"outcome": "equivalent", "reason": known[record["mutant"]]}


def summary_of(records: list[dict[str, object]]) -> dict[str, object]:
  """The score: the share of the mutants that can be told from the original."""
  counted = [r for r in records if r["outcome"] != "equivalent"]
  survived = sum(r["outcome"] == "survived" for r in counted)
  return {
      "date": datetime.date.today().isoformat(), "run": len(records),
      "equivalent": len(records) - len(counted), "survived": survived,
      "score": 1 - survived / max(len(counted), 1),
      "python": platform.python_version(), "jax": jax.__version__,
      "optax": optax.__version__,
  }


def unseen(everything: list[Mutant], records: Records) -> list[Mutant]:
  """Mutants that no failing test of the last report has seen, though one could."""
  was_seen = lambda record: (record["seen_by"] or "").startswith("FAILED")  # noqa: E731
  found = {mutant.place: mutant for mutant in everything}
  return [found[place] for place, record in records.items()
          if place in found and not was_seen(record)
          and record["outcome"] != "equivalent"]


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--sample", type=int, default=40, help="how many mutants")
  parser.add_argument("--seed", type=int, default=0, help="of the sample")
  parser.add_argument("--limit", type=float, default=600, help="seconds for one mutant")
  parser.add_argument(
      "--again", action="store_true",
      help="instead, those of the last report that no failing test has seen")
  parser.add_argument("--out", type=Path, default=ROOT / "results/mutation")
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  everything = [m for name in TESTS for m in mutants_of(ROOT / f"asam_jax/{name}.py")]
  chosen = random.Random(args.seed).sample(everything, args.sample)
  known_file = args.out / "equivalent.json"
  known = json.loads(known_file.read_text()) if known_file.exists() else {}
  records: Records = {}
  drawn = {"seed": args.seed, "sample": args.sample, "mutants": len(everything),
           "drawn": datetime.date.today().isoformat()}
  if args.again:
    lines = (args.out / "report.jsonl").read_text().splitlines()
    of = [json.loads(line) for line in lines]
    records = {(one["mutant"], one["line"]): judged(one, known) for one in of}
    chosen = unseen(everything, records)
    before = json.loads((args.out / "summary.json").read_text())
    drawn = {key: before[key] for key in drawn}
  with tempfile.TemporaryDirectory() as scratch:
    copy = Path(scratch)
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True)
    for name in tracked.splitlines():  # some tests import what stands beside
      (copy / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(ROOT / name, copy / name)
    for mutant in chosen:
      record = outcome(mutant, copy, args.limit)
      records[mutant.place] = judged(record, known)
      record = records[mutant.place]
      print(record["outcome"], mutant.name, f"(line {mutant.line})", flush=True)
      lines = [json.dumps(record) + "\n" for record in records.values()]
      (args.out / "report.jsonl").write_text("".join(lines))
      summary = summary_of(list(records.values())) | drawn
      (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
  main()
