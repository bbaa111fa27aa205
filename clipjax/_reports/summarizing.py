"""Tables of all leaves: pruned, quantized, of how many bytes, and how their weights are distributed."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipjax._arrays import arguments, dtypes, picked_leaves, trees
from clipjax._files import format_leaves, leaf_codec
from clipjax._reports import distributions
from clipjax._weights import (
    checking,
    holding_once,
    leaf_format,
    leaf_grid,
    leaf_levels,
    quantize_state,
    quantized_params,
)
from clipjax._weights.projecting import ProjectState
from clipjax._weights.quantize_state import LeafScales, QuantizeState
from clipjax._weights.zeros import PruneState
from clipjax.typing import State, Tree

Row: TypeAlias = dict[str, Any]
"""The cells of one leaf by column; what type a cell has follows from its column."""


@dataclasses.dataclass(frozen=True, repr=False)
class Summary:
    """The result of `summarize`: prints as text, shows as HTML in a notebook, converts to a dict.

    Text and HTML have two tables: all leaves, and the distribution of those that have a weight other than 0.

    Attributes:
      rows: a dict by column for each leaf, with the columns of both tables; the last one is the total.
    """

    rows: list[Row]

    def to_dict(self) -> dict[str, Row]:
        """The rows keyed by path; the total under "total"."""
        return {row["path"]: {k: v for k, v in row.items() if k != "path"} for row in self.rows}

    def __str__(self) -> str:
        """The tables as aligned text."""
        return "\n\n".join(_text(rows) for rows in self._tables())

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return "".join(_html(rows) for rows in self._tables())

    def _tables(self) -> list[list[Row]]:
        """The rows of each table, with its columns alone."""
        first = [{k: v for k, v in row.items() if not _of_distribution(k)} for row in self.rows]
        described = [row for row in self.rows if row.get("sigma") is not None]
        second = [{k: v for k, v in row.items() if k == "path" or _of_distribution(k)} for row in described]
        return [first, second] if second else [first]


def _of_distribution(key: str) -> bool:
    """True for a column of the second table."""
    return key in ("sigma", "max_sigma", "kurtosis") or key.startswith("sqnr_db_")


def _text(rows: list[Row]) -> str:
    cells = [list(rows[0]), *([_shown(v) for v in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def _html(rows: list[Row]) -> str:
    head = "".join(f"<th>{html.escape(key)}</th>" for key in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_shown(v))}</td>" for v in row.values()) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def summarize(
    params: Tree,
    opt_state: State = None,
    *,
    tx: optax.GradientTransformation | None = None,
    widths: tuple[int, ...] = (2, 3, 4, 5, 8),
) -> Summary:
    r"""Tables of all leaves: how sparse, on which grid, of how many bytes, and how their weights are distributed.

    The first table has a row for each leaf, one for the total of all, and before that one for the total of those that
    a transformation governs, "governed": where a part of the weights is pruned, a sparsity is a fraction of that part.

    - `picked`: "prune", "quantize" or both, where such a transformation governs the leaf; `left_out`: why none does, by
      the default of `where`: its dtype, its rank, its name, "embedding", or "where" for a choice of your own.
    - `shape`; `sparsity`, the fraction of zeros that the weights have; `masked`, the fraction that their mask removes.
      A sparsity below it says that something behind `prune_mask` has changed the weights, see `check`.
    - `bits`, with a format those of a weight and its share of the scales; `format`, its name, a column where a leaf has
      one; `step`, the mean of its steps; `off_grid`, how many weights are between the levels, 0 where the grid holds.
      All are None before the first refresh.
    - `sqnr_db`: the signal to quantization noise ratio in decibels, of params w with latent weights z:
      :math:`10 \log_{10} (\sum z^2 / \sum (w - z)^2)`; None without latent weights.
    - `bytes`: of the array itself; `packed_bytes`: as a codebook or steps, with codes of equal width, or as the
      codes and scales of its format; `coded_bytes`: as `save` writes the leaf of `quantized(params, opt_state)`;
      `entropy_bytes`: the order-0 entropy of its bit patterns, plus each distinct pattern once.
      `packed_bytes` and `coded_bytes` need `constriction` (`pip install 'clipjax[files]'`), and are None without it.
      `state_bytes`: of the whole optimizer state, in the last row.

    The second table describes, for each leaf, its n weights w that are finite, not 0 and not pruned. Where a quantizer
    keeps latent weights it describes those, else the params:

    .. math::
        \sigma = \sqrt{\tfrac{1}{n} \sum w^2},\quad \mathrm{max\_sigma} = \frac{\max |w|}{\sigma},\quad
        \mathrm{kurtosis} = \frac{1}{n \sigma^4} \sum w^4,\quad
        \mathrm{sqnr\_db}_b = 10 \log_{10} \frac{\sum w^2}{\min_s \sum (Q_{s,b}(w) - w)^2}

    All moments are about 0, where grids are centred. :math:`Q_{s,b}` rounds to the grid of b bits with one step s for
    the leaf, that of `steps.mse()`. The kurtosis is not the excess: it is 1 for two values -s and s, 1.8 for uniform
    weights, 3 for Gaussian and 6 for Laplacian ones; the larger it is, the more bits a target takes (`choose_bits`). A
    leaf without such weights has no row in this table, and None in these columns.

    Args:
      params: a tree of concrete arrays; PRNG keys in it have no row.
      opt_state: the optimizer state that belongs to them; without it the params alone are described. Of the leaves of
        a group (`structures.unit(groups=)`) only the first is marked as pruned: the mask is stored under its path.
      tx: an optimizer, for a dry run before any training: the table describes what `hold_once` makes of the params:
        which leaves are picked, how sparse they end, at how many bits and bytes, and how large the state is. Gradient
        scores rank by magnitude here.
      widths: the bit widths of the columns `sqnr_db_2` and so on, each 1 to 16. Each takes 32 passes over the weights;
        () leaves these columns out.

    Returns:
      A `Summary`.

    Raises:
      ValueError: for widths outside 1 to 16; for both `opt_state` and `tx`; for the state of other params.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> summarize({"kernel": jnp.array([[0.0, 2.0]])}).to_dict()["kernel"]["sparsity"]
      0.5
      >>> row = summarize({"kernel": jax.random.normal(jax.random.key(0), (256, 256))}).to_dict()["kernel"]
      >>> {key: round(row[key], 1) for key in ("sigma", "max_sigma", "kurtosis", "sqnr_db_2", "sqnr_db_4")}
      {'sigma': 1.0, 'max_sigma': 4.2, 'kurtosis': 3.0, 'sqnr_db_2': 7.2, 'sqnr_db_4': 19.0}

    References:
      D4, section 2.2, step 1: analyse the distribution of each array, then choose its bits.
    """
    remedy = "Leave it out: `tx` is for a dry run, before there is a state."
    arguments.require(tx is None or opt_state is None, "opt_state", "be None with `tx`", type(opt_state), remedy)
    arguments.transformation(tx, "tx")
    if tx is not None:
        params, opt_state = _dry_run(params, tx)
    widths = () if isinstance(widths, tuple | list) and not widths else arguments.widths(widths, "widths")
    states = checking.states(opt_state)
    grids = trees.find(opt_state, QuantizeState)
    latents = [dict(trees.governed(s.carry)) for s in states if isinstance(s.projection, QuantizeState)]
    masks = [dict(trees.governed(s.projection.mask)) for s in states if isinstance(s.projection, PruneState)]
    leaves = [(path, leaf) for path, leaf in trees.governed(params) if not _is_key(leaf)]
    of_state = [path for tree in masks for path, _ in trees.governed(tree)]
    of_state += [path for state in grids for path in quantize_state.paths(state)]
    trees.check_named(of_state, params)
    rows = [_row(path, leaf, grids, masks, latents, widths) for path, leaf in leaves]
    for row in rows:
        row["left_out"] = "" if row["picked"] or not (grids or masks) else row["left_out"]
    governed = [row for row in rows if row["picked"]]
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(opt_state) if hasattr(x, "nbytes")) if opt_state else None
    totals = [_totals("governed", governed, widths)] if governed else []
    table = [*rows, *totals, _totals("total", rows, widths) | {"state_bytes": state_bytes}]
    formed = any(row["format"] for row in rows)
    return Summary([{key: v for key, v in row.items() if formed or key != "format"} for row in table])


def _dry_run(params: Tree, tx: optax.GradientTransformation) -> tuple[Tree, State]:
    """Params and state as they will end, as far as that can be said before training."""
    state = tx.init(params)
    if not trees.find(state, ProjectState):
        return params, state
    return holding_once.hold_once(tx, params, grad=jax.tree.map(jnp.ones_like, params))


def _totals(name: str, rows: list[Row], widths: tuple[int, ...]) -> Row:
    """The row of some leaves together; of the columns of one leaf those that add up."""
    size = sum(int(np.prod(row["shape"])) for row in rows)

    def share(key: str) -> float | None:
        known = [row for row in rows if row[key] is not None]
        size = sum(int(np.prod(row["shape"])) for row in known)
        return float(sum(row[key] * np.prod(row["shape"]) for row in known) / size) if size else None

    off = [row["off_grid"] for row in rows if row["off_grid"] is not None]
    return {
        "path": name,
        "picked": "",
        "left_out": "",
        "shape": (size,),
        "sparsity": share("sparsity") or 0.0,
        "masked": share("masked"),
        "bits": None,
        "format": None,
        "step": None,
        "off_grid": sum(off) if off else None,
        "sqnr_db": None,
        **{key: _total(rows, key) for key in ("bytes", "packed_bytes", "coded_bytes", "entropy_bytes")},
        "state_bytes": None,
        **_distribution(None, widths),
    }


def _is_key(leaf: Any) -> bool:
    """True for PRNG keys, which are no weights."""
    return jnp.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.extended)


def _row(
    path: str,
    leaf: Any,
    grids: list[QuantizeState],
    masks: list[dict[str, jax.Array]],
    latents: list[dict[str, jax.Array]],
    widths: tuple[int, ...],
) -> Row:
    x = np.asarray(jnp.asarray(leaf).astype(dtypes.wide(leaf.dtype)) if picked_leaves.floating(leaf) else leaf)
    state = next((g for g in grids if path in quantize_state.paths(g)), None)
    own_masks = [m[path] for m in masks if path in m]
    picked = ["prune"] * bool(own_masks) + ["quantize"] * (state is not None)
    z = next((z[path] for z in latents if path in z), None)
    levels = _levels(path, leaf, state)
    own = quantize_state.leaf_scales(state, path) if state is not None and levels["off_grid"] == 0 else None
    return {
        "path": path,
        "picked": "+".join(picked),
        "left_out": picked_leaves.why_not(path, leaf),
        "shape": x.shape,
        "sparsity": float(np.mean(x == 0)) if x.size else 0.0,
        "masked": max((float(np.mean(~np.asarray(mask))) for mask in own_masks), default=None),
        **levels,
        "sqnr_db": _sqnr(x, z),
        **_sizes(path, leaf, levels["bits"], own),
        "state_bytes": None,
        **_distribution(_surviving(leaf if z is None else z, own_masks), widths),
    }


def _levels(path: str, leaf: Any, state: QuantizeState | None) -> Row:
    """On which grid or format a leaf is; None in each column before the first refresh."""
    if state is None or not quantize_state.fitted(state):
        return dict.fromkeys(("bits", "format", "step", "off_grid"))
    off = int(leaf_levels.missed(state, path, leaf)[0])
    own = quantize_state.leaf_scales(state, path)
    if own is None:
        grid = leaf_grid.at(state, path)
        return {"bits": int(grid.bits) or None, "format": None, "step": float(np.mean(grid.step)), "off_grid": off}
    bits = float(trees.look_up(state.bits, path))
    return {"bits": bits, "format": leaf_format.form_of(own).name, "step": None, "off_grid": off}


def _surviving(leaf: Any, masks: list[jax.Array]) -> np.ndarray | None:
    """The weights of a leaf, 0 where a mask removes them; None where they are no floats.

    The mask of a structure with blocks does not broadcast to the weights, and is left out: the params are 0 there.
    """
    w = np.asarray(leaf)
    if not jnp.issubdtype(w.dtype, jnp.floating):
        return None
    for mask in masks:
        if all(a in (1, b) for a, b in zip(mask.shape[::-1], w.shape[::-1], strict=False)):
            w = np.where(mask, w, np.zeros_like(w))
    return w


def _distribution(weights: np.ndarray | None, widths: tuple[int, ...]) -> dict[str, float | None]:
    found = None if weights is None else distributions.describe(weights, widths)
    keys = [f"sqnr_db_{b}" for b in widths]
    if found is None:
        return dict.fromkeys(("sigma", "max_sigma", "kurtosis", *keys))
    columns: dict[str, float | None] = {
        "sigma": found.sigma,
        "max_sigma": found.max_sigma,
        "kurtosis": found.kurtosis,
    }
    return columns | dict(zip(keys, found.sqnr_db.values(), strict=True))


def _sizes(path: str, leaf: Any, bits: float | None, own: LeafScales | None) -> dict[str, int | None]:
    """Bytes of a leaf; `own` are the scales of one that is on a format, whose codes are written."""
    x, packed, coded = np.asarray(leaf), None, None
    with contextlib.suppress(ImportError):
        if own is not None and bits is not None:
            packed = math.ceil(bits * x.size / 8)
            coded = len(format_leaves.pack(quantized_params.formed(path, leaf, own), path))
        else:
            data, packed = leaf_codec.pack(x)
            coded = x.nbytes if data is None else len(data)
    return {"bytes": x.nbytes, "packed_bytes": packed, "coded_bytes": coded, "entropy_bytes": leaf_codec.entropy(x)}


def _total(rows: list[Row], key: str) -> int | None:
    return None if any(row[key] is None for row in rows) else sum(row[key] for row in rows)


def _sqnr(w: np.ndarray, latent: jax.Array | None) -> float | None:
    """The signal to quantization noise ratio of params, in decibels; None where there are no latent weights."""
    if latent is None:
        return None
    z = np.asarray(latent, np.float64)
    finite = np.isfinite(z) & np.isfinite(w)
    z, w = z[finite], w[finite]
    noise = np.sum(np.square(w - z))
    return float(10 * np.log10(np.sum(np.square(z)) / noise)) if noise else float("inf")


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
