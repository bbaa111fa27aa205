"""The small file: what training left as zeros and few distinct values is small on disk, exactly, and safe to open."""

from __future__ import annotations

import io
import os
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import arguments
from clipjax._files import container, layouts, leaf_codec, leaf_entries
from clipjax._maths.integers import Quantized
from clipjax.typing import Tree


def save(path: str | os.PathLike[str], params: Tree) -> None:
    r"""Write a tree of arrays as a file that is as small as its values allow, without losing a bit.

    Each leaf takes the smallest of: raw; a codebook of its repeated bit patterns; codes :math:`k` where every value is
    :math:`k \cdot s`, with one step, one a column or one a group of rows. Symbols are packed, or entropy coded, zeros
    by the density of their rows and columns where that is smaller. The file is a safetensors file: other tools list it.
    It takes the place of an old one at once and only when it is on the disk.

    Args:
      path: where to write.
      params: any tree of arrays of any dtype of JAX, outside of jit. A tree with other leaves (functions in an Equinox
        module) is split first: `eqx.filter(model, eqx.is_array)`.

    Raises:
      TypeError: for a leaf that is no array, or a key that is no string or whole number.
      ImportError: where `constriction` is missing: `pip install 'clipjax[files]'`.

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
    folder = os.path.dirname(os.path.abspath(os.fspath(path)))
    with container.replacing(path) as file:
        write(file, params, folder)


def load(
    path: str | os.PathLike[str],
    *,
    like: Tree = None,
    sharding: Any = None,
    dequantize: bool = True,
    max_bytes: int | None = None,
) -> Tree:
    """Read what `save` wrote, leaf by leaf.

    Args:
      path: the file.
      like: a tree of arrays or ShapeDtypeStructs with the same leaves, to return in the structure of: FrozenDict, NNX
        state, Equinox module. Leaves of it that are no arrays are kept. Without it dicts, lists, tuples and None come
        back as they were, and other containers as dicts.
      sharding: where leaves go: one sharding or device, a tree of them, or a function of `(path, ShapeDtypeStruct)`.
      dequantize: False returns a `Quantized` for every leaf that is codes * steps, for inference with integers.
      max_bytes: how many bytes the leaves may take together; by default 2^26, or 1000 times the file where that is
        more, so that a small hostile file cannot ask for gigabytes.

    Returns:
      A tree of JAX arrays; NumPy arrays for dtypes that JAX's 64-bit switch leaves out.

    Raises:
      ValueError: for a file that is damaged, cut, or not of this kind, one that needs more than `max_bytes`, and one
        whose leaves are not those of `like`.

    Example:
      >>> import tempfile, os, jax.numpy as jnp
      >>> path = os.path.join(tempfile.mkdtemp(), "net.safetensors")
      >>> save(path, {"kernel": jnp.array([[1.0, -0.5], [0.0, 1.5]])})
      >>> load(path)["kernel"].tolist()
      [[1.0, -0.5], [0.0, 1.5]]
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
    data: bytes, *, like: Tree = None, sharding: Any = None, dequantize: bool = True, max_bytes: int | None = None
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
        metadata = {"clipjax": leaf_entries.VERSION, "leaves": " ".join(notes)}
        writer.write(file, metadata if layout is None else {**metadata, "layout": layout})


def _host(name: str, leaf: Any) -> np.ndarray:
    """A leaf as a NumPy array of a dtype that a file can hold."""
    known = isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex)
    if not known or jnp.issubdtype(getattr(leaf, "dtype", jnp.float32), jax.dtypes.extended):
        raise TypeError(
            f"Leaves must be arrays, got {type(leaf).__name__} at {name!r}. Save the arrays alone, and give the whole"
            " tree as `like` to `load`; keys go through `jax.random.key_data`."
        )
    x = np.asarray(leaf)
    if x.dtype.name not in leaf_codec.DTYPES:
        raise TypeError(f"A leaf's dtype must be one of JAX's, got {x.dtype} at {name!r}. Convert it first.")
    return x.astype(x.dtype.newbyteorder("="), copy=False)


def _read(file: IO[bytes], like: Tree, sharding: Any, dequantize: bool, max_bytes: int | None) -> Tree:
    reader = container.Reader(file)
    found = {leaf.entry.name: leaf for leaf in leaf_entries.leaves(reader)}
    leaf_entries.check_size(list(found.values()), reader.size, max_bytes)
    place = _placer(sharding)

    def read(name: str) -> Any:
        value = found[name].read(reader, dequantize)
        return _quantized(name, value, place) if isinstance(value, leaf_codec.Grid) else place(name, value)

    if like is not None:
        return _like(like, found, read)
    return layouts.unflatten(list(found), [read(name) for name in found], reader.metadata.get("layout"))


def _like(like: Tree, found: dict[str, leaf_entries.Leaf], read: Any) -> Tree:
    """The leaves in the structure of a template, which must have the same ones."""
    names, templates, _ = layouts.flatten(like)
    here = dict(zip(names, templates, strict=True))
    arrays = {n for n, t in here.items() if hasattr(t, "shape") and hasattr(t, "dtype")}
    apart = sorted((arrays - set(found)) | (set(found) - set(here)))
    arguments.require(not apart, "like", "have the leaves of the file", apart[:8], "These are in one of them alone.")
    for name in arrays:
        want, have = (tuple(here[name].shape), here[name].dtype.name), (found[name].shape, found[name].dtype.name)
        remedy = f"The file has {have[1]}{list(have[0])} at {name!r}."
        arguments.require(want == have, "like", "have the file's shapes and dtypes", want, remedy)
    values = [read(n) if n in found else t for n, t in here.items()]
    return jax.tree.unflatten(jax.tree.structure(like), values)


def _placer(sharding: Any) -> Any:
    """A function that puts the leaf of a name where it shall be."""
    if isinstance(sharding, jax.sharding.Sharding | jax.Device) or sharding is None:
        chosen = lambda name, x: sharding  # noqa: E731
    elif callable(sharding):
        chosen = lambda name, x: sharding(name, jax.ShapeDtypeStruct(x.shape, x.dtype))  # noqa: E731
    else:
        names, targets, _ = layouts.flatten(sharding)
        by_name = dict(zip(names, targets, strict=True))
        chosen = lambda name, x: by_name.get(name)  # noqa: E731

    def place(name: str, x: np.ndarray) -> Any:
        if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
            return np.array(x)
        return jax.device_put(x, chosen(name, x))

    return place


def _quantized(name: str, grid: leaf_codec.Grid, place: Any) -> Quantized:
    """Codes in the narrowest integers, where the leaf shall be; steps in the form of the weight, everywhere."""
    codes, (blocks, columns) = grid.codes, grid.step.shape
    low, high = int(codes.min(initial=0)), int(codes.max(initial=0))
    bits = max(max(-low, high).bit_length() + 1, 2)
    shift = -128 - low if bits > 8 and high - low < 256 else 0
    kept = (codes + np.int16(shift)).astype(np.int8) if bits <= 8 or shift else codes
    lead = codes.shape[:-2] if blocks > 1 else ()
    shape = () if blocks == columns == 1 else (*lead, -1, columns) if blocks > 1 else (1,) * (codes.ndim - 1) + (-1,)
    group = codes.size // codes.shape[-1] // blocks if blocks > 1 else None
    axis = -1 if columns > 1 else None
    step, zero_point = jnp.asarray(grid.step.reshape(shape)), jnp.asarray(shift, jnp.int32)
    return Quantized(place(name, kept), step, zero_point, min(bits, 8) if shift else bits, axis, group)
