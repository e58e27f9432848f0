"""Converts a transformers folder to ONNX, which is several times faster on a CPU.

    python -m llm_sidecar.loader convert SOURCE OUT --precision int4

onnxruntime-genai's builder writes the model in float32, and a quantizer of our own makes it
smaller. The result is kept only if it is as good as the source.
"""

from llm_sidecar.models.conversion.builder import Precision, build
from llm_sidecar.models.conversion.errors import ConversionFailed
from llm_sidecar.models.conversion.pipeline import MAX_PERPLEXITY_RATIO, convert
from llm_sidecar.models.conversion.trials import Conversion

__all__ = [
    "MAX_PERPLEXITY_RATIO",
    "Conversion",
    "ConversionFailed",
    "Precision",
    "build",
    "convert",
]
