"""The named configurations: one for each row of each table of the paper.

Settings and radii are those of Kwon et al. 2021; SGD trains for twice the epochs, the
paper's own rule. ``python -m examples.paper.train`` lists the names.
"""

from collections.abc import Iterator
import dataclasses
import itertools
from typing import Any

from examples.paper.config import Config

replace = dataclasses.replace

CIFAR_MODELS = (
    "densenet121",
    "resnet20",
    "resnet56",
    "vgg19_bn",
    "resnext29_32x4d",
    "wrn28_2",
    "wrn28_10",
    "pyramidnet272",
)
RADII = {
    "cifar10": {"sam": 0.05, "asam": 0.5},
    "cifar100": {"sam": 0.1, "asam": 1.0},
    "imagenet": {"sam": 0.05, "asam": 1.0},
    "iwslt14": {"sam": 0.1, "asam": 0.2},
}
NOISE_LEVELS = (0.0, 0.2, 0.4, 0.6, 0.8)
# Scheme: (fields, radii). The radii of p = inf bound each weight, not their norm.
_RADII_2 = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_RADII_INF = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
SCHEMES: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "elementwise-2": ({}, _RADII_2),
    "elementwise-2-bias": ({"normalize_bias": True}, _RADII_2),
    "elementwise-inf": ({"p": float("inf")}, _RADII_INF),
    "filterwise-2": ({"normalization": "filterwise"}, _RADII_2),
}
CORRELATION = {
    "batch_size": (32, 64, 128, 256, 512),
    "learning_rate": (0.0033, 0.01, 0.033, 0.1, 0.33),
    "weight_decay": (5e-7, 5e-6, 5e-5, 5e-4, 5e-3),
    "dropout": (0.0, 0.125, 0.25, 0.375, 0.5),
}


def methods(config: Config, radii: dict[str, float], plain: str) -> Iterator[Config]:
  """SGD (or whatever the base is) at twice the epochs, SAM and ASAM."""
  yield replace(config, name=f"{config.name}-{plain}", epochs=2 * config.epochs)
  for method, rho in radii.items():
    yield replace(config, name=f"{config.name}-{method}", method=method, rho=rho)


def cifar(dataset: Any) -> Iterator[Config]:
  """Eight networks with SGD, SAM and ASAM."""
  for model in CIFAR_MODELS:
    config = Config(
        name=f"{dataset}-{model}", table=dataset, dataset=dataset, model=model
    )
    if model == "pyramidnet272":
      config = replace(
          config, batch_size=256, learning_rate=0.05, epochs=900, auto_augment=True
      )
    yield from methods(config, RADII[dataset], "sgd")


def imagenet() -> Iterator[Config]:
  """ResNet-50."""
  config = Config(
      name="imagenet-resnet50", table="imagenet", dataset="imagenet", model="resnet50",
      batch_size=512, learning_rate=0.2, weight_decay=1e-4, epochs=100,
  )
  yield from methods(config, RADII["imagenet"], "sgd")


def translation() -> Iterator[Config]:
  """The IWSLT'14 German-English Transformer; Adam gets no more epochs than SAM."""
  config = Config(
      name="iwslt14", table="iwslt14", dataset="parallel", model="transformer",
      base="adamw", learning_rate=5e-4, schedule="inverse_sqrt", warmup=4000,
      beta2=0.98, weight_decay=1e-4, dropout=0.3, epochs=50, vocabulary=10_000,
      validation_files="valid", test_files="test",
  )
  yield replace(config, name="iwslt14-adam")
  for method, rho in RADII["iwslt14"].items():
    yield replace(config, name=f"iwslt14-{method}", method=method, rho=rho)


def label_noise() -> Iterator[Config]:
  """ResNet-32 on CIFAR-10 with a part of the labels wrong."""
  for noise in NOISE_LEVELS:
    config = Config(
        name=f"noise-{noise:.0%}".replace("%", ""), table="noise", model="resnet32",
        noise=noise,
    )
    yield from methods(config, RADII["cifar10"], "sgd")


def normalization(config: Config) -> Iterator[Config]:
  """Each scheme at each radius."""
  for scheme, (fields, radii) in SCHEMES.items():
    for rho in radii:
      yield replace(
          config, name=f"{config.name}-{scheme}-{rho:g}", method="asam", rho=rho,
          **fields,
      )


def correlation() -> Iterator[Config]:
  """625 WRN-28-2, whose sharpness and generalization gap are compared."""
  for values in itertools.product(*CORRELATION.values()):
    fields: dict[str, Any] = dict(zip(CORRELATION, values, strict=True))
    yield Config(
        name="correlation-" + "-".join(f"{value:g}" for value in values),
        table="correlation", model="wrn28_2", **fields,
    )


# For tests and timings: no data is needed.
FAKE = Config(name="fake", table="fake", dataset="fake", model="resnet8", epochs=2)

# Everything but the 625, which are a plan of their own; see run.py.
NAMED: dict[str, Config] = {
    config.name: config
    for config in itertools.chain(
        cifar("cifar10"),
        cifar("cifar100"),
        imagenet(),
        translation(),
        label_noise(),
        normalization(Config(
            name="normalization", table="normalization", model="wrn16_8")),
        (FAKE,),
    )
}
