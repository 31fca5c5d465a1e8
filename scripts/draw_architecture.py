"""Draw the README's diagram of the default model: python scripts/draw_architecture.py"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the folder of `captioning`

from captioning.figures.diagrams import architecture
from captioning.learning.options import ModelConfig

ROOT = Path(__file__).resolve().parent.parent
image = Image.open(ROOT / "photos" / "coffee.jpg")
words = ["a", "cup", "of", "coffee", "and", "a", "spoon", "on", "a", "red", "saucer"]
plt.rcParams["svg.hashsalt"] = "0"  # with this and without a date, the file is always the same
ax = architecture(ModelConfig(), 9_000, 2_048, words=words, image=image)
ax.figure.savefig(ROOT / "docs" / "architecture.svg", metadata={"Date": None})  # text as paths
