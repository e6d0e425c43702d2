"""Bad configurations are refused before anything is loaded or trained."""

import math

import jax

from examples.paper import models
from examples.paper import optimizers
from examples.paper.config import Config
from examples.paper.config import ConfigError
from examples.paper.config import Options

_AT_LEAST = {
    "examples": 0, "validation": 0, "crop": 0, "cutout": 0, "epochs": 1,
    "batch_size": 1, "eval_every": 1, "warmup": 0, "every": 1, "vocabulary": 100,
    "longest": 1, "subwords": 1, "beam": 1,
    "m": 1, "ascent_steps": 1,
    "seed": 0, "momentum": 0, "beta2": 0, "weight_decay": 0, "clip": 0, "rho": 0,
    "eta": 0, "p": 1, "reuse": 0, "rise": 0, "budget": 0, "weight": 0,
    "last": 0, "noise": 0, "dropout": 0,
    "label_smoothing": 0, "learning_rate": 0, "length_penalty": 0,
}
_BELOW_ONE = ("momentum", "beta2", "dropout", "label_smoothing")
_AT_MOST_ONE = ("noise", "last")


def check(config: Config, options: Options) -> None:
  """Raises ConfigError, which names the field, the value and what it must be."""
  for field, least in _AT_LEAST.items():
    value = getattr(config, field)
    if not value >= least or (math.isinf(value) and field != "p"):
      raise ConfigError(f"{field}={value}: must be a number of at least {least}.")
  for field in _BELOW_ONE:
    if getattr(config, field) >= 1:
      raise ConfigError(f"{field}={getattr(config, field)}: must be below 1.")
  for field in _AT_MOST_ONE:
    if getattr(config, field) > 1:
      raise ConfigError(f"{field}={getattr(config, field)}: must be at most 1.")
  if config.learning_rate == 0:
    raise ConfigError("learning_rate=0: must be above 0.")
  if config.seed >= 2**31:
    raise ConfigError(f"seed={config.seed}: must be below 2^31.")
  optimizers.check(config)
  _check_model(config)
  _check_labels(config)
  _check_options(config, options)


def _check_model(config: Config) -> None:
  """Text is for translators, images are for all others; a typo is left to build."""
  is_text = config.dataset == "parallel"
  fitting = [name for name in models.NAMES if (name in models.TRANSLATORS) == is_text]
  if config.model in models.NAMES and config.model not in fitting:
    raise ConfigError(
        f"model={config.model!r}: not for dataset={config.dataset}; take one of"
        f" {', '.join(fitting)}."
    )


def _check_labels(config: Config) -> None:
  if config.noise and config.human_labels:
    raise ConfigError(
        f"noise={config.noise} and human_labels={config.human_labels!r}: choose one"
        " of the two kinds of wrong labels."
    )
  if config.human_labels and config.dataset != "cifar10":
    raise ConfigError(
        f"human_labels={config.human_labels!r}: CIFAR-10N's labels are for"
        f" dataset=cifar10, not {config.dataset}."
    )


def _check_options(config: Config, options: Options) -> None:
  for field in ("checkpoint_every", "checkpoint_steps", "devices", "workers"):
    if getattr(options, field) < 0:
      raise ConfigError(f"{field}={getattr(options, field)}: must be at least 0.")
  available = len(jax.devices())
  devices = options.devices or available
  if devices > available:
    raise ConfigError(f"devices={devices}: there are {available}.")
  if config.conv == "shifts" and devices > 1:
    raise ConfigError(f"conv=shifts: for one device, not {devices}; take conv=lax.")
  if config.batch_size % devices and config.dataset != "parallel":
    raise ConfigError(
        f"batch_size={config.batch_size}: does not divide into {devices} equal parts,"
        f" one for each device; take a multiple of {devices}."
    )
  places = {"imagenet": "its place", "parallel": "its place (of a plan: --text)"}
  if options.data is None and config.dataset in places:
    place = places[config.dataset]
    raise ConfigError(f"dataset={config.dataset} needs --data, {place}.")
  for field in ("data", "labels"):
    path = getattr(options, field)
    if path is not None and not path.exists():
      raise ConfigError(f"{field}={path}: there is no such file or folder.")
  if config.human_labels and options.labels is None:
    raise ConfigError("human_labels needs --labels, the place of CIFAR-10N's labels.")
