"""clipjax makes a JAX model small while it trains, with nothing but Optax transformations."""

from clipjax import (
    formats,
    plots,
    projections,
    roundings,
    scores,
    selections,
    steps,
    structures,
    thresholds,
    typing,
    widths,
)
from clipjax._arrays.arguments import per_leaf
from clipjax._exports.gguf_reading import import_gguf
from clipjax._exports.gguf_writing import export_gguf
from clipjax._exports.llama import llama_names
from clipjax._exports.llama_sizes import llama_metadata
from clipjax._exports.onnx_writing import export_onnx
from clipjax._exports.safetensors_reading import import_safetensors
from clipjax._exports.safetensors_writing import export_safetensors
from clipjax._files.saving import load, pack, save, unpack
from clipjax._gradients.clipping import clip
from clipjax._gradients.norm_clipping import clip_norm
from clipjax._gradients.scaling_to_norm import scale_to_norm
from clipjax._gradients.skipping import skip_spikes
from clipjax._gradients.with_gradient import with_gradient
from clipjax._maths.integers import Quantized, dequantize, quantize, round_to_step
from clipjax._maths.intervals import clamp
from clipjax._maths.products import dot
from clipjax._maths.straight_through import fake_quant
from clipjax._programs.analysis import Analysis, analyze
from clipjax._programs.sensitivities import sensitivity
from clipjax._programs.shrinking import Shrunk, shrink
from clipjax._reports.reporting import report
from clipjax._reports.summarizing import Summary, summarize
from clipjax._weights.checking import Violation, check
from clipjax._weights.choosing_bits import choose_bits, choose_step
from clipjax._weights.clamping import clamp_weights
from clipjax._weights.holding_once import hold_once
from clipjax._weights.logit_clipping import clip_logits
from clipjax._weights.masks import make_mask
from clipjax._weights.projecting import project
from clipjax._weights.pruning import prune_mask
from clipjax._weights.quantized_params import quantized
from clipjax._weights.quantizing import fake_quantize
from clipjax.scores import snip, synflow
from clipjax.typing import Context, Format, Projection, Rounding, Rule, Score, Selection, Step, Structure, Width

__version__ = "0.2.0"

__all__ = [
    "Analysis",
    "Context",
    "Format",
    "Projection",
    "Quantized",
    "Rounding",
    "Rule",
    "Score",
    "Selection",
    "Shrunk",
    "Step",
    "Structure",
    "Summary",
    "Violation",
    "Width",
    "analyze",
    "check",
    "choose_bits",
    "choose_step",
    "clamp",
    "clamp_weights",
    "clip",
    "clip_logits",
    "clip_norm",
    "dequantize",
    "dot",
    "export_gguf",
    "export_onnx",
    "export_safetensors",
    "fake_quant",
    "fake_quantize",
    "formats",
    "hold_once",
    "import_gguf",
    "import_safetensors",
    "llama_metadata",
    "llama_names",
    "load",
    "make_mask",
    "pack",
    "per_leaf",
    "plots",
    "project",
    "projections",
    "prune_mask",
    "quantize",
    "quantized",
    "report",
    "round_to_step",
    "roundings",
    "save",
    "scale_to_norm",
    "scores",
    "selections",
    "sensitivity",
    "shrink",
    "skip_spikes",
    "snip",
    "steps",
    "structures",
    "summarize",
    "synflow",
    "thresholds",
    "typing",
    "unpack",
    "widths",
    "with_gradient",
]


def __dir__() -> list[str]:
    return __all__
