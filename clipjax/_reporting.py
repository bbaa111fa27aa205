"""Telemetry of every clipjax member inside any optimizer state, and a table of what became of each leaf."""

from __future__ import annotations

import contextlib
import dataclasses
import html
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipjax import _payloads as payloads
from clipjax import _trees as trees
from clipjax._clamping import ClampState
from clipjax._clipping import ClipNormState, ClipState
from clipjax._projecting import ProjectState
from clipjax._pruning import PruneState
from clipjax._quantizing import QuantizeState
from clipjax._skipping import SkipState
from clipjax._typing import Tree

Entries = dict[str, jax.Array]


def report(opt_state: Any, per_leaf: bool = False) -> Entries:
    """Scalars that tell what the members do, for a progress bar, TensorBoard or a scan.

    Keys read `prune_mask/sparsity`, `clip_norm/norm_pre`; a second member of a kind is `prune_mask_1/…`. Members inside
    an `inner=` come before the one that owns them. Works in jit and scan.

    Args:
      opt_state: any optimizer state, boxed ones of `nnx.Optimizer` included.
      per_leaf: add an entry for each leaf: `prune_mask/sparsity/encoder/kernel`.

    Returns:
      dict of scalars; empty where the state holds no member of clipjax.

    Example:
      >>> import clipjax, jax.numpy as jnp
      >>> tx = clipjax.prune_mask(0.5)
      >>> params = {"kernel": jnp.array([[1.0, 2.0]])}
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> {key: float(x) for key, x in report(state).items()}
      {'prune_mask/sparsity': 0.5, 'prune_mask/removed': 1.0}
    """
    entries: Entries = {}
    seen: dict[str, int] = {}
    for kind, state in _members(opt_state):
        number = seen.get(kind, 0)
        seen[kind] = number + 1
        prefix = f"{kind}_{number}" if number else kind
        entries |= {f"{prefix}/{key}": value for key, value in _ENTRIES[kind](state, per_leaf).items()}
    return entries


def _members(opt_state: Any) -> Iterator[tuple[str, Any]]:
    """Every member's own state with its kind, in the order in which they act."""
    kinds = (ClipState, ClipNormState, SkipState, ProjectState)
    for found in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kinds)):
        if isinstance(found, ProjectState):
            yield from _members(found.inner)
            kind = _PROJECTIONS.get(type(found.projection), "project")
            state = found if kind == "project" else found.projection
            yield kind, jax.tree.map(jnp.asarray, state)
        elif isinstance(found, kinds):
            if isinstance(found, SkipState):
                yield from _members(found.inner)
                found = found._replace(inner=())
            yield _GRADIENT[type(found)], jax.tree.map(jnp.asarray, found)


_GRADIENT: dict[type, str] = {ClipState: "clip", ClipNormState: "clip_norm", SkipState: "skip_spikes"}

_PROJECTIONS: dict[type, str] = {
    ClampState: "clamp_weights",
    PruneState: "prune_mask",
    QuantizeState: "fake_quantize",
}


def _clip(state: ClipState, per_leaf: bool) -> Entries:
    return {"threshold": state.threshold}


def _clip_norm(state: ClipNormState, per_leaf: bool) -> Entries:
    values = {
        "norm_pre": state.norm_pre,
        "threshold": state.threshold,
        "coefficient": state.coefficient,
        "norm_post": state.norm_pre * state.coefficient,
    }
    entries = {key: value if value.ndim == 0 else value.mean() for key, value in values.items()}
    if per_leaf:
        wide = {key: value for key, value in values.items() if value.ndim}
        entries |= {f"{key}/{i}": x for key, value in wide.items() for i, x in enumerate(value)}
    share = state.clipped / jnp.maximum(state.count, 1)
    return entries | {"clipped": state.clipped, "fraction_clipped": share, "nonfinite": state.nonfinite}


def _skip(state: SkipState, per_leaf: bool) -> Entries:
    share = state.skipped / jnp.maximum(state.count, 1)
    entries = {"norm_pre": state.norm_pre, "threshold": state.threshold, "skipped": state.skipped}
    return entries | {"fraction_skipped": share, "nonfinite": state.nonfinite}


def _clamp(state: ClampState, per_leaf: bool) -> Entries:
    return {"low": state.bound[0], "high": state.bound[1]}


def _prune(state: PruneState, per_leaf: bool) -> Entries:
    """Of weights, or of units where they are what is removed."""
    masks = [(path, m) for path, m in trees.governed(state.mask) if m.dtype == bool]
    removed = [jnp.sum(~m, dtype=jnp.float32) for _, m in masks]
    total = sum(m.size for _, m in masks)
    gone = sum(removed, jnp.zeros(()))
    entries = {"sparsity": gone / max(total, 1), "removed": gone}
    if per_leaf:
        entries |= {f"sparsity/{path}": r / m.size for (path, m), r in zip(masks, removed, strict=True)}
    return entries


def _quantize(state: QuantizeState, per_leaf: bool) -> Entries:
    bits = {path: b.astype(jnp.float32) for path, b in trees.governed(_leaves(state.bits))}
    steps = {path: s.mean() for path, s in trees.governed(_leaves(state.step))}
    count = max(len(bits), 1)
    entries = {
        "bits": sum(bits.values(), jnp.zeros(())) / count,
        "step": sum(steps.values(), jnp.zeros(())) / count,
    }
    if per_leaf:
        entries |= {f"bits/{path}": b for path, b in bits.items()}
        entries |= {f"step/{path}": s for path, s in steps.items()}
    return entries


def _leaves(by_path: Any) -> Any:
    """The entries of a dict of paths; nothing where a member governs nothing."""
    return by_path if isinstance(by_path, dict) else {}


def _project(state: ProjectState, per_leaf: bool) -> Entries:
    return {"count": state.count}


_ENTRIES: dict[str, Any] = {
    "clip": _clip,
    "clip_norm": _clip_norm,
    "skip_spikes": _skip,
    "clamp_weights": _clamp,
    "prune_mask": _prune,
    "fake_quantize": _quantize,
    "project": _project,
}


@dataclasses.dataclass(frozen=True)
class Summary:
    """A table with a row per leaf: prints as text, shows as HTML in a notebook, converts to a dict.

    Attributes:
      rows: one dict per leaf, and the total as the last one.
    """

    rows: list[dict[str, Any]]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The rows keyed by path; the total under "total"."""
        return {row["path"]: {k: v for k, v in row.items() if k != "path"} for row in self.rows}

    def __str__(self) -> str:
        """The table as aligned text."""
        cells = [list(self.rows[0]), *([_shown(v) for v in row.values()] for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(key)}</th>" for key in self.rows[0])
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_shown(v))}</td>" for v in row.values()) + "</tr>" for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def summarize(params: Tree, opt_state: Any = None) -> Summary:
    r"""What became of each leaf: picked or not, shape, sparsity, bits, step, SQNR and bytes.

    The signal to quantization noise is :math:`10 \log_{10} (\sum z^2 / \sum (w - z)^2)` in decibels, z being the
    carried float weights. The bytes are: `bytes` raw; `packed_bytes` as a codebook or steps with packed codes;
    `coded_bytes` as `save` writes the leaf; `entropy_bytes` the order-0 entropy of its bit patterns, with each distinct
    pattern once. The middle two need `constriction` (`pip install 'clipjax[files]'`), and are None without.

    Args:
      params: a tree of concrete arrays.
      opt_state: the optimizer state that belongs to them; without it only the params are described.

    Returns:
      A `Summary`.

    Example:
      >>> import jax.numpy as jnp
      >>> summarize({"kernel": jnp.array([[0.0, 2.0]])}).to_dict()["kernel"]["sparsity"]
      0.5
    """
    grids = [g for g in trees.find(opt_state, QuantizeState) if isinstance(g.step, dict)]
    projects = _projects(opt_state)
    carried = [(s.projection, dict(trees.governed(s.carry))) for s in projects if s.carry != ()]
    masks = [dict(trees.governed(s.projection.mask)) for s in projects if isinstance(s.projection, PruneState)]
    rows = [_row(path, leaf, grids, masks, carried) for path, leaf in trees.governed(params)]
    total = {
        "path": "total",
        "picked": "",
        "shape": (sum(int(np.prod(r["shape"])) for r in rows),),
        "sparsity": _share(sum(r["sparsity"] * np.prod(r["shape"]) for r in rows), rows),
        "bits": None,
        "step": None,
        "sqnr_db": None,
        **{key: _total(rows, key) for key in ("bytes", "packed_bytes", "coded_bytes", "entropy_bytes")},
    }
    return Summary([*rows, total])


def _projects(opt_state: Any) -> list[ProjectState]:
    """Every `ProjectState`, those inside an `inner=` too."""
    outer = trees.find(opt_state, ProjectState)
    return [s for state in outer for s in (*_projects(state.inner), state)]


def _row(path: str, leaf: Any, grids: list[Any], masks: list[Any], carried: list[Any]) -> dict[str, Any]:
    x = np.asarray(jnp.asarray(leaf).astype(jnp.float32) if trees.floating(leaf) else leaf)
    grid = next((g for g in grids if path in g.step), None)
    picked = ["prune"] * any(path in m for m in masks) + ["quantize"] * (grid is not None)
    float_weights = next((z[path] for s, z in carried if isinstance(s, QuantizeState) and path in z), None)
    return {
        "path": path,
        "picked": "+".join(picked),
        "shape": x.shape,
        "sparsity": float(np.mean(x == 0)) if x.size else 0.0,
        "bits": (int(grid.bits[path]) or None) if grid else None,
        "step": float(np.mean(grid.step[path])) if grid else None,
        "sqnr_db": _sqnr(x, float_weights),
        **_sizes(np.asarray(leaf)),
    }


def _sizes(x: np.ndarray) -> dict[str, int | None]:
    packed, coded = None, None
    with contextlib.suppress(ImportError):
        data, packed = payloads.pack(x)
        coded = x.nbytes if data is None else len(data)
    return {"bytes": x.nbytes, "packed_bytes": packed, "coded_bytes": coded, "entropy_bytes": payloads.entropy(x)}


def _total(rows: list[dict[str, Any]], key: str) -> int | None:
    return None if any(row[key] is None for row in rows) else sum(row[key] for row in rows)


def _sqnr(levels: np.ndarray, weights: Any) -> float | None:
    if weights is None:
        return None
    z = np.asarray(weights, np.float64)
    noise = np.sum(np.square(levels - z))
    return float(10 * np.log10(np.sum(np.square(z)) / noise)) if noise else float("inf")


def _share(part: Any, rows: list[dict[str, Any]]) -> float:
    return float(part / max(sum(np.prod(r["shape"]) for r in rows), 1))


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
