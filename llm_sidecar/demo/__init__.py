"""Two tiny trained models and their evaluation; see MODEL_CARD.md.

The server, its tests and its documentation run with them without a download. They know only a
synthetic market: never trade on what they say.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

PHI3_FOLDER: Final = Path(__file__).parent / "phi3"
"""The proposal model, onnxruntime-genai format."""

HERMES_FOLDER: Final = Path(__file__).parent / "hermes"
"""The critique and score model, transformers format."""
