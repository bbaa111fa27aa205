"""clipjax makes a JAX model small while it trains, with nothing but Optax transformations."""

from clipjax import projections, roundings, scores, selections, steps, structures, thresholds, widths
from clipjax._clamping import clamp_weights
from clipjax._clipping import clip, clip_norm
from clipjax._following import Rule
from clipjax._forwarding import fake_quant
from clipjax._grids import clamp, dequantize, quantize, round_to_step
from clipjax._masks import make_mask
from clipjax._packing import load, pack, save, unpack
from clipjax._projecting import project, with_gradient
from clipjax._pruning import prune_mask
from clipjax._quantizing import Quantized, fake_quantize, quantized
from clipjax._reporting import report
from clipjax._shrinking import Shrunk, shrink
from clipjax._skipping import skip_spikes
from clipjax._summarizing import Summary, summarize
from clipjax._trees import per_leaf
from clipjax.projections import Context, Projection
from clipjax.scores import snip, synflow
from clipjax.steps import choose_step
from clipjax.widths import choose_bits

__version__ = "0.1.0"

__all__ = [
    "Context",
    "Projection",
    "Quantized",
    "Rule",
    "Shrunk",
    "Summary",
    "choose_bits",
    "choose_step",
    "clamp",
    "clamp_weights",
    "clip",
    "clip_norm",
    "dequantize",
    "fake_quant",
    "fake_quantize",
    "load",
    "make_mask",
    "pack",
    "per_leaf",
    "project",
    "projections",
    "prune_mask",
    "quantize",
    "quantized",
    "report",
    "round_to_step",
    "roundings",
    "save",
    "scores",
    "selections",
    "shrink",
    "skip_spikes",
    "snip",
    "steps",
    "structures",
    "summarize",
    "synflow",
    "thresholds",
    "unpack",
    "widths",
    "with_gradient",
]
