"""The small file: what training left as zeros and few distinct values is small on disk, exactly, and safe to open."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Callable
from typing import IO, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import arguments
from clipjax._files import atomic_file, container, layouts, leaf_codec, leaf_entries
from clipjax._maths.integers import Quantized
from clipjax.typing import Tree

SMALL = 1 << 16
"""Trees whose leaves take at most so many bytes become one entry, in which other tools cannot look up a leaf."""

Device: TypeAlias = jax.sharding.Sharding | jax.Device | None
"""Where one leaf goes; None for the default device."""

Placement: TypeAlias = Device | Callable[[str, jax.ShapeDtypeStruct], Device] | Tree
"""Where leaves go: one sharding or device, a function of path and shape, or a tree of them."""


def save(path: str | os.PathLike[str], params: Tree) -> None:
    r"""Write a tree of arrays as a file that is as small as its values allow, without losing a bit.

    Each leaf takes the smallest of three forms: raw; a codebook of the bit patterns that repeat; or codes :math:`k`
    where every value is :math:`k \cdot s`, with a step s for the array, for each column or for each group of rows.
    Codes are packed or entropy coded; the entropy coder exploits that rows and columns differ in how many zeros they
    have. The file is a safetensors file: other tools can list its entries, one for each leaf, and `load` decodes it.
    Trees whose coded leaves take 64 KiB or less together are one entry, as names and shapes would take much of the
    file. An existing file is replaced atomically, after the new one is fully written.

    Args:
      path: where to write.
      params: a tree whose leaves are arrays of any dtype of JAX, or `Quantized` as `quantized(params, opt_state)` gives
        them; their codes, and steps or scales of a format, are stored, not searched for again. `save` works outside of
        jit. A tree with other leaves (functions in an Equinox module) is split first: `eqx.filter(model,
        eqx.is_array)`.

    Raises:
      TypeError: for a leaf that is no array or a PRNG key (save its `jax.random.key_data`), and for a key of a dict
        that is no string or whole number.
      ValueError: for a `Quantized` whose step, zero point or scales do not broadcast to its codes.
      ImportError: where `constriction` is missing and a leaf is smallest entropy coded: `pip install 'clipjax[files]'`.

    Example:
      >>> import tempfile, os, jax.numpy as jnp
      >>> path = os.path.join(tempfile.mkdtemp(), "net.safetensors")
      >>> kernel = jnp.where(jnp.arange(100_000).reshape(100, -1) % 50 == 0, 0.25, 0.0)
      >>> save(path, {"kernel": kernel})
      >>> kernel.nbytes, os.path.getsize(path) < 2_500
      (400000, True)
      >>> bool((load(path)["kernel"] == kernel).all())
      True

    References:
      D4, section 2.2: fewer bytes are stored. Duda, Asymmetric numeral systems, 2009, https://arxiv.org/abs/0902.0271.
    """
    folder = atomic_file.folder_of(path)
    with atomic_file.replacing(path) as file:
        write(file, params, folder)


def load(
    path: str | os.PathLike[str],
    *,
    like: Tree = None,
    sharding: Placement = None,
    dequantize: bool = True,
    max_bytes: int | None = None,
) -> Tree:
    """Read what `save` wrote, leaf by leaf.

    Args:
      path: the file.
      like: a tree with the same leaves, arrays or ShapeDtypeStructs of the file's shapes and dtypes, whose structure
        the result takes: FrozenDict, NNX state, Equinox module. Leaves of it that are no arrays are kept. Values of a
        saved `Quantized` take the float dtype that stands here; a `Quantized` here stands for a leaf of floats. Without
        `like` dicts, lists, tuples and None come back as they were, and other containers as dicts.
      sharding: where leaves go: one sharding or device, a tree of them, or a function of `(path, ShapeDtypeStruct)`. Of
        a `Quantized` it is for the codes.
      dequantize: True returns arrays: of a saved `Quantized` the values, f32 without `like`. False is for inference
        with integers: it returns every `Quantized` as it was saved; from a file of plain arrays, saved without any, it
        returns a `Quantized` for each leaf that is codes * steps.
      max_bytes: how many bytes the leaves may take together; by default 2^26, or 1000 times the file where that is
        more, so that a small hostile file cannot ask for gigabytes.

    Returns:
      A tree of JAX arrays; NumPy arrays for dtypes that JAX's 64-bit switch leaves out.

    Raises:
      ValueError: for a file that is damaged, cut, or not of this kind, one that needs more than `max_bytes`, one whose
        leaves are not those of `like`, and values of a `Quantized` whose format this version does not know.

    Example:
      >>> import tempfile, os, jax.numpy as jnp
      >>> path = os.path.join(tempfile.mkdtemp(), "net.safetensors")
      >>> save(path, {"kernel": jnp.array([[1.0, -0.5], [0.0, 1.5]])})
      >>> load(path)["kernel"].tolist()
      [[1.0, -0.5], [0.0, 1.5]]
      >>> q = Quantized(jnp.array([2, -1], jnp.int8), jnp.float32(0.5), jnp.int32(0), bits=4, axis=None, group=None)
      >>> save(path, {"kernel": q})
      >>> load(path)["kernel"].tolist(), load(path, dequantize=False)["kernel"].codes.tolist()
      ([1.0, -0.5], [2, -1])
    """
    with open(path, "rb") as file:
        return _read(file, like, sharding, dequantize, max_bytes)


def pack(params: Tree) -> bytes:
    """The bytes of the file that `save` writes.

    Args:
      params: as for `save`; a single array is a tree too.

    Returns:
      The file's bytes.

    Example:
      >>> import jax.numpy as jnp
      >>> unpack(pack(jnp.array([1.0, jnp.nan, -0.0]))).tolist()
      [1.0, nan, -0.0]
    """
    file = io.BytesIO()
    write(file, params)
    return file.getvalue()


def unpack(
    data: bytes, *, like: Tree = None, sharding: Placement = None, dequantize: bool = True, max_bytes: int | None = None
) -> Tree:
    """The tree behind the bytes that `pack` returns; arguments and errors are those of `load`.

    Args:
      data: the bytes.
      like: see `load`.
      sharding: see `load`.
      dequantize: see `load`.
      max_bytes: see `load`.

    Returns:
      The tree.

    Example:
      >>> import jax.numpy as jnp
      >>> unpack(pack({"a": [jnp.zeros(3), None]}))
      {'a': [Array([0., 0., 0.], dtype=float32), None]}
    """
    return _read(io.BytesIO(data), like, sharding, dequantize, max_bytes)


def write(file: IO[bytes], params: Tree, folder: str | None = None) -> None:
    """Write a tree, leaf by leaf; large ones wait in a temporary file of `folder`."""
    names, leaves, layout = layouts.flatten(params)
    with container.Writer(folder) as writer:
        notes = [leaf_entries.add(writer, name, _host(name, leaf)) for name, leaf in zip(names, leaves, strict=True)]
        metadata = {"clipjax": leaf_entries.version(notes), "leaves": " ".join(notes)}
        metadata |= {} if layout is None else {"layout": layout}
        small = writer.size <= SMALL
        one = leaf_entries.together(names, list(map(_host, names, leaves)), layout) if small else None
        if one is not None and len(one) < writer.whole(metadata):
            file.write(one)
        else:
            writer.write(file, metadata)


def _host(name: str, leaf: object) -> np.ndarray | Quantized:
    """A leaf as a NumPy array of a dtype that a file can hold, or a `Quantized` as it is."""
    if isinstance(leaf, Quantized):
        return leaf
    if jnp.issubdtype(getattr(leaf, "dtype", jnp.float32), jax.dtypes.extended):
        raise TypeError(
            f"Leaves must be arrays of numbers, got a PRNG key at {name!r}. Save the params alone, of an NNX model"
            " `nnx.state(model, nnx.Param)`; or give `jax.random.key_data(key)`, an array that `save` takes and"
            " `jax.random.wrap_key_data` makes a key again."
        )
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
        raise TypeError(
            f"Leaves must be arrays, got {type(leaf).__name__} at {name!r}. Save the arrays alone, and give the whole"
            " tree as `like` to `load`."
        )
    x = np.asarray(leaf)
    if x.dtype.name not in leaf_codec.DTYPES:
        raise TypeError(f"A leaf's dtype must be one of JAX's, got {x.dtype} at {name!r}. Convert it first.")
    return x.astype(x.dtype.newbyteorder("="), copy=False)


def _read(file: IO[bytes], like: Tree, sharding: Placement, dequantize: bool, max_bytes: int | None) -> Tree:
    reader = container.Reader(file)
    leaves, layout = leaf_entries.stored(reader)
    found = {leaf.entry.name: leaf for leaf in leaves}
    leaf_entries.check_size(list(found.values()), reader.size, max_bytes)
    place = _placer(sharding)
    # Who saved integers has chosen which leaves are some: the others come back as they were. In a file of plain arrays
    # every leaf on a grid is one of integers.
    chosen = any(leaf.quantized for leaf in found.values())

    def read(name: str, dtype: np.dtype | None = None, template: object = None) -> Any:
        if name not in found:  # a `Quantized` of the first version: an array for each field
            arrays = {
                field: place(name, found[f"{name}/{field}"].read(reader)) for field in ("codes", "step", "zero_point")
            }
            return dataclasses.replace(template, **arrays)  # type: ignore[type-var]
        leaf = found[name]
        plain = dequantize or (chosen and not leaf.quantized)
        return place(name, leaf.read(reader, dtype) if plain else leaf.read_codes(reader))

    if like is not None:
        return _like(like, found, read)
    return layouts.unflatten(list(found), [read(name) for name in found], layout)


def _like(like: Tree, found: dict[str, leaf_entries.StoredLeaf], read: Callable[..., Any]) -> Tree:
    """The leaves in the structure of a template, which must have the same ones."""
    names, templates, _ = layouts.flatten(like)
    # The first version had no entry for a `Quantized`: an array stands for each of its fields.
    split = {n for n, t in zip(names, templates, strict=True) if isinstance(t, Quantized) and f"{n}/codes" in found}
    fields = {entry for entry in found for name in split if entry.startswith(f"{name}/")}
    wanted = {name: _described(template) for name, template in zip(names, templates, strict=True)}
    arrays = {name: described for name, described in wanted.items() if described is not None}
    apart = sorted((set(arrays) - set(found) - split) | (set(found) - set(wanted) - fields))
    arguments.require(not apart, "like", "have the leaves of the file", apart[:8], "These are in one of them alone.")
    for name, (shape, dtype) in arrays.items():
        have = found[f"{name}/codes" if name in split else name]
        # Codes have no float dtype of their own: their values take the one of the template. A `Quantized` in the
        # template, of dtype None here, stands for any floats.
        free = have.quantized or dtype is None
        fits = free and all(x is None or jnp.issubdtype(x, jnp.floating) for x in (dtype, have.dtype))
        remedy = f"The file has {have.dtype.name}{list(have.shape)} at {name!r}."
        want = shape, "Quantized" if dtype is None else dtype.name
        same = shape == have.shape and (fits or dtype == have.dtype or name in split)
        arguments.require(same, "like", "have the file's shapes and dtypes", want, remedy)
    values = [
        read(name, arrays[name][1] if name in arrays else None, template) if name in split.union(found) else template
        for name, template in zip(names, templates, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(like, is_leaf=lambda x: isinstance(x, Quantized)), values)


def _described(template: Any) -> tuple[tuple[int, ...], np.dtype | None] | None:
    """Shape and dtype of a leaf of a template, without a dtype for a `Quantized`; None for what is no array."""
    if isinstance(template, Quantized):
        return tuple(template.codes.shape), None
    if hasattr(template, "shape") and hasattr(template, "dtype"):
        return tuple(template.shape), np.dtype(template.dtype)
    return None


def _placer(sharding: Placement) -> Callable[[str, np.ndarray | Quantized], Any]:
    """A function that puts the leaf of a name where it shall be; of a `Quantized`, the codes."""
    chosen: Callable[[str, np.ndarray], Any]
    if isinstance(sharding, jax.sharding.Sharding | jax.Device) or sharding is None:
        chosen = lambda name, x: sharding  # noqa: E731
    elif callable(sharding):
        chosen = lambda name, x: sharding(name, jax.ShapeDtypeStruct(x.shape, x.dtype))  # noqa: E731
    else:
        names, targets, _ = layouts.flatten(sharding)
        codes = [target.codes if isinstance(target, Quantized) else target for target in targets]
        for target in codes:
            if not isinstance(target, jax.sharding.Sharding | jax.Device):
                raise TypeError(
                    "`sharding` must be a sharding, a device, a function of path and shape, or a tree of these, got"
                    f" {target!r}. Give one for all leaves: `jax.devices()[0]`."
                )
        by_name = dict(zip(names, codes, strict=True))
        chosen = lambda name, x: by_name.get(name)  # noqa: E731

    def place(name: str, x: np.ndarray | Quantized) -> Any:
        if isinstance(x, Quantized):
            # A sharding is for the shape of the weight, which the codes have. Steps, zero points and scales are small
            # and stay uncommitted, so that a product with the codes takes place where these are.
            small = jax.tree.map(jnp.asarray, {"step": x.step, "zero_point": x.zero_point, "scales": x.scales})
            return dataclasses.replace(x, codes=place(name, np.asarray(x.codes)), **small)
        if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
            return np.array(x)
        return jax.device_put(x, chosen(name, x))

    return place
