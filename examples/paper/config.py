"""What a run trains, as a frozen dataclass, and where and how it runs, as another."""

import dataclasses
import hashlib
import json
import math
import pathlib
from typing import Any, Literal

Dataset = Literal["cifar10", "cifar100", "imagenet", "parallel", "fake"]
Base = Literal["sgd", "adam", "adamw"]
Schedule = Literal["cosine", "inverse_sqrt", "constant"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Everything that decides what comes out of a run; equal ones give equal results."""

  name: str = "custom"
  """Name of the configuration, for people; a row of a table has one."""
  table: str = "custom"
  """The table that the run belongs to; its results go to <table>.jsonl."""
  seed: int = 0
  """Draws the initial weights, the order of the batches, crops, flips and dropout."""

  dataset: Dataset = "cifar10"
  """What is learned; "parallel" is a pair of parallel text files, "fake" is noise in
  the shape of CIFAR-10, for tests and for timings."""
  examples: int = 0
  """Train on so many examples, drawn from the training set; 0: on all."""
  validation: int = 0
  """Hold out so many training images and judge on them, never on the test set; 0:
  judge on the test set. Radii are chosen with it. Text has a part of its own for it,
  and takes that for any number above 0."""
  noise: float = 0.0
  """Part of the training labels that is replaced by a random other class."""
  human_labels: str = ""
  """One of CIFAR-10N's sets of human labels, such as "worse", in place of the right
  ones."""
  crop: int = 4
  """Pixels of padding before a random crop; 0: no crop."""
  flip: bool = True
  """Whether images are mirrored at random."""
  cutout: int = 0
  """Side in pixels of the square that is blanked; 0: none."""
  auto_augment: bool = False
  """Whether images go through AutoAugment's policy for CIFAR."""

  model: str = "resnet20"
  """Name of the network; an unknown one is answered by the list."""
  dropout: float = 0.0
  """Rate of dropout, for networks that have it."""
  conv: Literal["lax", "shifts"] = "lax"
  """What computes convolutions; "shifts" may be faster on one CPU, and rounds
  otherwise."""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """Type of the activations; parameters and their updates stay float32."""

  epochs: int = 200
  """Passes over the training set."""
  batch_size: int = 128
  """Images in a step, over all devices; text has subwords."""
  label_smoothing: float = 0.1
  """Part of each label that is spread over all classes."""
  eval_every: int = 1
  """Epochs between two looks at the test (or validation) set; the last is looked at
  in any case."""

  base: Base = "sgd"
  """The base optimizer. Weight decay is added to the gradient for sgd and adam, and is
  decoupled for adamw; the ascent never sees it."""
  learning_rate: float = 0.1
  """The largest learning rate."""
  schedule: Schedule = "cosine"
  """How the learning rate falls: to 0 along a cosine, by the inverse square root of
  the step after the warm-up, or not at all."""
  warmup: int = 0
  """Steps over which the learning rate rises from 0."""
  momentum: float = 0.9
  """SGD's momentum, and Adam's first decay."""
  beta2: float = 0.999
  """Adam's second decay."""
  weight_decay: float = 5e-4
  """Times the parameters, in the base optimizer."""
  clip: float = 0.0
  """Largest norm of the descent gradient; 0: as large as it comes."""

  method: str = "plain"
  """What is made of the base optimizer: plain, sam, asam, momentum_sam, looksam, late,
  ...; an unknown one is answered by the list."""
  rho: float = 0.0
  """Radius of the perturbation."""
  cosine: float = 0.8
  """auto: the cosine of the two gradients that the radius is set to hold."""
  rise: float = 0.17
  """rise: how much the radius is set to raise the square root of the loss."""
  budget: float = 0.1
  """loss_budget: how much the radius is set to raise the loss, to first order; rho is
  its limit."""
  m: int = 32
  """m_sharpness: images that share one perturbation."""
  ascent_steps: int = 2
  """iterated: gradients on the way to the perturbed parameters."""
  weight: float = 0.5
  """weighted: of the perturbed gradient, the clean one having the rest."""
  eta: float = 0.01
  """Stabilizer, added to T_w."""
  p: float = 2.0
  """Exponent of the norm, 1 to inf."""
  normalization: Literal["elementwise", "filterwise", "layerwise", "none"] = (
      "elementwise"
  )
  """The operator T_w of the adaptive methods."""
  normalize_bias: bool = False
  """Whether biases are normalized too; officially they are not."""
  every: int = 5
  """LookSAM: steps from one perturbed gradient to the next."""
  reuse: float = 0.7
  """LookSAM: weight of the direction that the steps between reuse."""
  last: float = 0.2
  """late: the last part of the steps, which is perturbed."""

  source: str = "de"
  """Text: ending of the source files, as in train.de."""
  target: str = "en"
  """Text: ending of the target files."""
  vocabulary: int = 8000
  """Text: pieces in the subword vocabulary, common to both languages."""
  longest: int = 100
  """Text: sentences of more pieces are not trained on."""
  subwords: int = 4096
  """Text: pieces in a batch of sources or of targets, padding included."""
  train_files: str = "train"
  """Text: the part to train on, as its files' names begin."""
  validation_files: str = "val"
  """Text: the part to choose settings on."""
  test_files: str = "test_2016_flickr"
  """Text: the part to be judged on."""
  beam: int = 5
  """Text: hypotheses that the search keeps."""
  length_penalty: float = 1.0
  """Text: exponent of a hypothesis' length, which its log-probability is divided by."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Where and how a run is done; none of it changes what comes out."""

  data: pathlib.Path | None = None
  """Folder or archive of the data set, in its official format. CIFAR is downloaded
  where it is left out."""
  labels: pathlib.Path | None = None
  """Folder of CIFAR-10N's labels, a file for each set; load_cifar10n of images.py
  says how to get them."""
  folder: pathlib.Path | None = None
  """Folder of the run: log, checkpoints. Default: runs/paper/<name>-<digest>."""
  results: pathlib.Path = pathlib.Path("runs/paper/results")
  """Folder of the tables' JSON lines."""
  checkpoint_every: int = 1
  """Epochs between checkpoints; 0: none."""
  checkpoint_steps: int = 0
  """Steps between checkpoints as well; 0: only by epochs."""
  keep_checkpoints: bool = False
  """Whether the last checkpoint stays when the run is done."""
  devices: int = 1
  """Devices that share each batch; 0: all that there are."""
  dispatch: Literal["auto", "step", "epoch"] = "auto"
  """Whether Python starts each step or each epoch; auto: each epoch but on CPU, where
  XLA's convolutions are slow inside a loop."""
  tensorboard: bool = False
  """Whether to write TensorBoard's event files too."""
  progress: bool = True
  """Whether to show a progress bar."""
  pause_file: pathlib.Path | None = None
  """While this file exists, no step is started."""
  workers: int = 0
  """ImageNet: processes that decode images; 0: threads of this one."""


class ConfigError(ValueError):
  """A configuration that can't be run; the message says why and what to do."""


def as_json(config: Config) -> dict[str, Any]:
  """The configuration as JSON has it; infinity is the string "inf"."""
  return {
      key: str(value) if value in (math.inf, -math.inf) else value
      for key, value in dataclasses.asdict(config).items()
  }


def key_of(config: Config) -> str:
  """A digest of the whole configuration, but for the name that people give it."""
  fields = as_json(config)
  del fields["name"], fields["table"]
  text = json.dumps(fields, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def from_json(fields: dict[str, Any]) -> Config:
  """The inverse of :func:`as_json`; fields that are missing get their defaults."""
  kinds = {field.name: field.type for field in dataclasses.fields(Config)}
  unknown = sorted(set(fields) - set(kinds))
  if unknown:
    raise ConfigError(f"unknown fields {', '.join(unknown)} in a configuration.")
  values: dict[str, Any] = {
      key: float(value) if kinds[key] is float else value
      for key, value in fields.items()
  }
  return Config(**values)


def folder_of(config: Config, options: Options) -> pathlib.Path:
  """The folder of the run."""
  if options.folder is not None:
    return options.folder
  return pathlib.Path("runs/paper") / f"{config.name}-{key_of(config)}"
