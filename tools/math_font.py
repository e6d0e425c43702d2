"""The font of the site's formulas: the part of Latin Modern Math that they use.

    pip install fonttools brotli
    python -m tools.math_font latinmodern-math.otf

writes ``docs/_static/fonts/formulas.woff2``. The original (version 1.959) is at CTAN,
and in Debian's package fonts-lmodern. Without a font for mathematics browsers set
subscripts too high.
"""

import argparse
from pathlib import Path

from fontTools import subset

TARGET = Path(__file__).resolve().parent.parent / "docs/_static/fonts/formulas.woff2"
RANGES = (
    (0x20, 0x7E),  # what is on the keyboard
    (0x391, 0x3C9),  # Greek
    (0x1D434, 0x1D467),  # italic letters
    (0x1D6E2, 0x1D71B),  # italic Greek
)
SIGNS = (
    "¬±×÷·‖′…−←→↦⇒∂∇∈∑∏√∞∥≈≠≤≥≪≫⊥⋅⋯∩∫⟨⟩ℓℝℎ𝔼"
    "ϑϕϱϵ\u0302\u0303\u0304¯˜ˆ\u2061\u2062"
)


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("font", type=Path)
  source = parser.parse_args().font
  options = subset.Options(
      flavor="woff2", layout_features=["*"], name_IDs=[0, 1, 2, 13, 14],
      glyph_names=False,
  )
  font = subset.load_font(str(source), options)
  subsetter = subset.Subsetter(options)
  signs = [ord(sign) for sign in SIGNS]
  ranges = [code for first, last in RANGES for code in range(first, last + 1)]
  subsetter.populate(unicodes=signs + ranges)
  subsetter.subset(font)
  subset.save_font(font, str(TARGET), options)
  print(f"{TARGET}: {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
  main()
