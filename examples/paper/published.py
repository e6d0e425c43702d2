"""Figures of papers, for comparison with ours.

Kwon et al. 2021 (arXiv 2102.11600), mean ± standard error. ``DAGGER`` marks figures
that were taken from a secondary source and not checked against the paper's own text.
The rank correlations are with :mod:`examples.sharpness_report`.
"""

from examples.paper import groups

DAGGER = "†"

_Table = dict[str, tuple[str, str, str]]  # row: SGD (or Adam), SAM, ASAM

_NETWORKS = {
    "densenet121": "DenseNet-121",
    "pyramidnet272": "PyramidNet-272",
    "resnet8": "ResNet-8",
    "resnet8_wide": "ResNet-8 of width 32, its first convolution with stride 2",
    "resnet20": "ResNet-20",
    "resnet32": "ResNet-32",
    "resnet50": "ResNet-50",
    "resnet56": "ResNet-56",
    "resnext29_32x4d": "ResNeXt29-32x4d",
    "transformer": "Transformer",
    "transformer_small": "a small Transformer",
    "vgg19_bn": "VGG19-BN",
    "vit_small": "a small ViT",
    "vit_tiny": "a ViT of 4 blocks and width 96, on patches of 8 x 8",
    "wrn16_8": "WRN-16-8",
    "wrn28_2": "WRN-28-2",
    "wrn28_10": "WRN-28-10",
}


def value(text: str) -> groups.Value:
  """A published figure as mean and error, NaN where there is none."""
  mean, _, error = text.partition(" ± ")
  return groups.Value(float(mean), float(error or "nan"))


def network(name: str) -> str:
  """A network's name as papers write it; other words stay as they are."""
  return _NETWORKS.get(name, name)


CIFAR10: _Table = {
    "densenet121": ("91.00 ± 0.13", "92.00 ± 0.17", "93.33 ± 0.04"),
    "resnet20": ("93.18 ± 0.21", "93.56 ± 0.15", "93.82 ± 0.17"),
    "resnet56": ("94.58 ± 0.20", "95.18 ± 0.15", "95.42 ± 0.16"),
    "vgg19_bn": ("93.87 ± 0.09", "94.60", "95.07 ± 0.05"),
    "resnext29_32x4d": ("95.84 ± 0.24", "96.34 ± 0.30", "96.80 ± 0.06"),
    "wrn28_2": ("95.13 ± 0.16", "95.74 ± 0.08", "95.94 ± 0.05"),
    "wrn28_10": ("96.34 ± 0.12", "96.98 ± 0.04", "97.28 ± 0.07"),
    "pyramidnet272": ("98.44 ± 0.08", "98.55 ± 0.05", "98.68 ± 0.08"),
}
CIFAR100: _Table = {
    "densenet121": ("68.70 ± 0.31", "69.84 ± 0.12", "70.60 ± 0.20"),
    "resnet20": ("69.76 ± 0.44", "71.06 ± 0.31", "71.40 ± 0.30"),
    "resnet56": ("73.12 ± 0.19", "75.16 ± 0.05", "75.86 ± 0.22"),
    "vgg19_bn": ("71.80 ± 1.35", "73.52 ± 1.74", "75.80 ± 0.27"),
    "resnext29_32x4d": ("79.48 ± 0.42", "81.48 ± 0.17", "82.30 ± 0.11"),
    "wrn28_2": ("75.28 ± 0.17", "77.25 ± 0.35", "77.54 ± 0.14"),
    "wrn28_10": ("81.56 ± 0.13", "83.42 ± 0.04", "83.68 ± 0.12"),
    "pyramidnet272": ("88.91 ± 0.12", "89.36 ± 0.20", "89.90 ± 0.13"),
}
IMAGENET: _Table = {
    "top-1": ("75.79 ± 0.22", "76.39 ± 0.03", "76.63 ± 0.18"),
    "top-5": ("92.62 ± 0.04", "92.97 ± 0.07", "93.16 ± 0.18"),
}
IWSLT14: _Table = {
    "validation": ("35.34", "35.52", "35.66"),
    "test": ("34.86", "34.78", "35.02"),
}
NOISE: _Table = {
    "0 %": ("94.50 ± 0.11", "94.80 ± 0.12", "94.88 ± 0.12"),
    "20 %": ("91.32 ± 0.23", "92.94 ± 0.12", "93.21 ± 0.10"),
    "40 %": ("87.68", "90.62", "90.89"),
    "60 %": ("82.50", "86.58", "87.41"),
    "80 %": ("68.35 ± 0.85", "69.92 ± 0.98", "67.69 ± 1.34"),
}

# Scheme: {radius: test error in percent} of WRN-16-8 on CIFAR-10, from the first author
# in the discussion https://github.com/davda54/sam/issues/37, with that repository's
# settings but for the first, which is from his own. The paper has a figure.
NORMALIZATION = {
    "elementwise-2": {0.5: "2.37"},
    "elementwise-2-bias": {0.5: "2.75", 1.0: "2.69", 2.0: "2.55", 5.0: "2.90"},
}

# Becker et al. 2024 (arXiv 2401.12033), CIFAR-100, test accuracy of WRN-16-4 and
# WRN-28-10.
MOMENTUM_SAM = {
    "SGD": ("76.9", "81.5"),
    "SAM": ("79.3", "84.2"),
    "ASAM": ("80.0", "84.7"),
    "LookSAM": ("79.0", "83.3"),
    "Momentum-SAM": ("79.1", "83.2"),
    "adaptive Momentum-SAM": ("79.9", "84.2"),
}
