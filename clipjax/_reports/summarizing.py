"""A table of what became of each leaf, and of how its weights are distributed."""

from __future__ import annotations

import contextlib
import dataclasses
import html
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipjax import widths as widening
from clipjax._arrays import dtypes, picking, trees
from clipjax._files import leaf_codec
from clipjax._reports import distributions
from clipjax._weights.projecting import ProjectState
from clipjax._weights.pruning import PruneState
from clipjax._weights.quantizing import QuantizeState
from clipjax.typing import Tree


@dataclasses.dataclass(frozen=True, repr=False)
class Summary:
    """A row per leaf: prints as text, shows as HTML in a notebook, converts to a dict.

    Text and HTML are two tables: what became of each leaf, and how the weights of those that have some are distributed.

    Attributes:
      rows: one dict per leaf, with the columns of both tables, and the total as the last one.
    """

    rows: list[dict[str, Any]]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The rows keyed by path; the total under "total"."""
        return {row["path"]: {k: v for k, v in row.items() if k != "path"} for row in self.rows}

    def __str__(self) -> str:
        """The tables as aligned text."""
        return "\n\n".join(_text(rows) for rows in self._tables())

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return "".join(_html(rows) for rows in self._tables())

    def _tables(self) -> list[list[dict[str, Any]]]:
        """The columns of each table, and the rows that it has."""
        fates = [{k: v for k, v in row.items() if not _distributed(k)} for row in self.rows]
        alive = [row for row in self.rows if row.get("sigma") is not None]
        facts = [{k: v for k, v in row.items() if k == "path" or _distributed(k)} for row in alive]
        return [fates, facts] if facts else [fates]


def _distributed(key: str) -> bool:
    """True for a column of the second table."""
    return key in ("sigma", "max_sigma", "kurtosis") or key.startswith("sqnr_db_")


def _text(rows: list[dict[str, Any]]) -> str:
    cells = [list(rows[0]), *([_shown(v) for v in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def _html(rows: list[dict[str, Any]]) -> str:
    head = "".join(f"<th>{html.escape(key)}</th>" for key in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_shown(v))}</td>" for v in row.values()) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def summarize(params: Tree, opt_state: Any = None, *, widths: tuple[int, ...] = (2, 3, 4, 5, 8)) -> Summary:
    r"""What became of each leaf (picked, shape, sparsity, bits, step, SQNR, bytes) and how its weights are distributed.

    `sqnr_db`, the signal to noise in decibels, is :math:`10 \log_{10} (\sum z^2 / \sum (w - z)^2)`, z being
    the carried float weights. The bytes are: `bytes` raw; `packed_bytes` as a codebook or steps with packed codes;
    `coded_bytes` as `save` writes the leaf; `entropy_bytes` the order-0 entropy of its bit patterns, with each distinct
    pattern once. The middle two need `constriction` (`pip install 'clipjax[files]'`), and are None without.

    The distribution is that of the n surviving weights, which are finite, not 0 and not pruned, and are the float
    weights z where a quantizer carries them, w elsewhere:

    .. math::
        \sigma = \sqrt{\tfrac{1}{n} \sum w^2},\quad \mathrm{max\_sigma} = \frac{\max |w|}{\sigma},\quad
        \mathrm{kurtosis} = \frac{1}{n \sigma^4} \sum w^4,\quad
        \mathrm{sqnr\_db}_b = 10 \log_{10} \frac{\sum w^2}{\min_s \sum (Q_{s,b}(w) - w)^2}

    from 0, where grids are centred, and with one step s for the leaf, that of `steps.mse()`. The kurtosis is the plain
    one, not the excess: 1 for two values -s and s, 1.8 for uniform weights, 3 for Gaussian, 6 for Laplacian ones; the
    larger, the more bits a target takes (`choose_bits`). All are None where no float weight survives.

    Args:
      params: a tree of concrete arrays; PRNG keys among them are passed over.
      opt_state: the optimizer state that belongs to them; without it only the params are described. Of a group
        (`structures.unit(groups=)`) the first leaf has the mask, and is the one that is marked as pruned.
      widths: those of the columns `sqnr_db_2` and so on, each 1 to 16. Each takes 32 passes over the weights; () none.

    Returns:
      A `Summary`.

    Raises:
      ValueError: for widths outside 1 to 16.

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
    tried = () if isinstance(widths, tuple | list) and not widths else widening.checked(widths, "widths")
    grids = [g for g in trees.find(opt_state, QuantizeState) if isinstance(g.step, dict)]
    projects = _projects(opt_state)
    carried = [dict(trees.governed(s.carry)) for s in projects if isinstance(s.projection, QuantizeState)]
    masks = [dict(trees.governed(s.projection.mask)) for s in projects if isinstance(s.projection, PruneState)]
    leaves = [(path, leaf) for path, leaf in trees.governed(params) if not _is_key(leaf)]
    rows = [_row(path, leaf, grids, masks, carried, tried) for path, leaf in leaves]
    total = {
        "path": "total",
        "picked": "",
        "shape": (sum(int(np.prod(r["shape"])) for r in rows),),
        "sparsity": _share(sum(r["sparsity"] * np.prod(r["shape"]) for r in rows), rows),
        "bits": None,
        "step": None,
        "sqnr_db": None,
        **{key: _total(rows, key) for key in ("bytes", "packed_bytes", "coded_bytes", "entropy_bytes")},
        **_facts(None, tried),
    }
    return Summary([*rows, total])


def _is_key(leaf: Any) -> bool:
    """True for PRNG keys, which are no weights."""
    return jnp.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.extended)


def _projects(opt_state: Any) -> list[ProjectState]:
    """Every `ProjectState`, those inside an `inner=` too."""
    outer = trees.find(opt_state, ProjectState)
    return [s for state in outer for s in (*_projects(state.inner), state)]


def _row(
    path: str, leaf: Any, grids: list[Any], masks: list[Any], carried: list[Any], widths: tuple[int, ...]
) -> dict[str, Any]:
    x = np.asarray(jnp.asarray(leaf).astype(dtypes.wide(leaf.dtype)) if picking.floating(leaf) else leaf)
    grid = next((g for g in grids if path in g.step), None)
    held = [m[path] for m in masks if path in m]
    picked = ["prune"] * bool(held) + ["quantize"] * (grid is not None)
    float_weights = next((z[path] for z in carried if path in z), None)
    return {
        "path": path,
        "picked": "+".join(picked),
        "shape": x.shape,
        "sparsity": float(np.mean(x == 0)) if x.size else 0.0,
        "bits": (int(grid.bits[path]) or None) if grid else None,
        "step": float(np.mean(grid.step[path])) if grid else None,
        "sqnr_db": _sqnr(x, float_weights),
        **_sizes(np.asarray(leaf)),
        **_facts(_surviving(leaf if float_weights is None else float_weights, held), widths),
    }


def _surviving(leaf: Any, masks: list[Any]) -> np.ndarray | None:
    """The weights of a leaf, 0 where a mask that broadcasts to them removes them; None where they are no floats."""
    w = np.asarray(leaf)
    if not jnp.issubdtype(w.dtype, jnp.floating):
        return None
    for mask in masks:
        if all(a in (1, b) for a, b in zip(mask.shape[::-1], w.shape[::-1], strict=False)):
            w = np.where(mask, w, np.zeros_like(w))
    return w


def _facts(weights: np.ndarray | None, widths: tuple[int, ...]) -> dict[str, float | None]:
    found = None if weights is None else distributions.describe(weights, widths)
    keys = [f"sqnr_db_{b}" for b in widths]
    if found is None:
        return dict.fromkeys(("sigma", "max_sigma", "kurtosis", *keys))
    facts: dict[str, float | None] = {"sigma": found.sigma, "max_sigma": found.max_sigma, "kurtosis": found.kurtosis}
    return facts | dict(zip(keys, found.sqnr_db.values(), strict=True))


def _sizes(x: np.ndarray) -> dict[str, int | None]:
    packed, coded = None, None
    with contextlib.suppress(ImportError):
        data, packed = leaf_codec.pack(x)
        coded = x.nbytes if data is None else len(data)
    return {"bytes": x.nbytes, "packed_bytes": packed, "coded_bytes": coded, "entropy_bytes": leaf_codec.entropy(x)}


def _total(rows: list[dict[str, Any]], key: str) -> int | None:
    return None if any(row[key] is None for row in rows) else sum(row[key] for row in rows)


def _sqnr(levels: np.ndarray, weights: Any) -> float | None:
    if weights is None:
        return None
    z = np.asarray(weights, np.float64)
    finite = np.isfinite(z) & np.isfinite(levels)
    z, levels = z[finite], levels[finite]
    noise = np.sum(np.square(levels - z))
    return float(10 * np.log10(np.sum(np.square(z)) / noise)) if noise else float("inf")


def _share(part: Any, rows: list[dict[str, Any]]) -> float:
    return float(part / max(sum(np.prod(r["shape"]) for r in rows), 1))


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
