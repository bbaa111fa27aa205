"""Random small networks, and for each hidden width whether its units can be cut: told by how the network was built.

A network is a graph of nodes; a layer reads some and adds one. The truth is kept beside: what the feature axis of each
node consists of, and whether the features of a dead unit are 0 there. It knows nothing of the program's equations.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

CUT, EITHER, REFUSED = "can be cut", "either", "must be refused"


class Width:
    """Units: those of one hidden width, or of one factor of it."""

    def __init__(self, size, verdict=CUT):
        self.size, self._verdict, self._link, self._sites = size, verdict, None, []

    def found(self):
        return self if self._link is None else self._link.found()

    @property
    def verdict(self):
        return self.found()._verdict

    @property
    def sites(self):
        return self.found()._sites

    def judge(self, verdict):
        own = self.found()
        own._verdict = max(own._verdict, verdict, key=[CUT, EITHER, REFUSED].index)

    def unite(self, other):
        one, two = self.found(), other.found()
        if one is not two:
            assert one.size == two.size
            two.judge(one._verdict)
            two._sites += one._sites
            one._link = two


class Part(NamedTuple):
    """A part of a feature axis: the product of widths, and of numbers that are no units."""

    factors: tuple[Any, ...]

    @property
    def size(self):
        return math.prod(f if isinstance(f, int) else f.size for f in self.factors)

    def places(self, width):
        """For each entry the unit of the width that it belongs to, -1 for none."""
        own = [i for i, f in enumerate(self.factors) if isinstance(f, Width) and f.found() is width.found()]
        if len(own) != 1:
            return np.full(self.size, -1)
        inner = Part(self.factors[own[0] + 1 :]).size
        outer = Part(self.factors[: own[0]]).size
        return np.tile(np.repeat(np.arange(width.size), inner), outer)


class Node(NamedTuple):
    """An array of the network: its axes between the batch and the features, and what the features are.

    `zero` are the widths whose dead units have features of 0.
    """

    index: int
    between: tuple[int, ...]
    parts: tuple[Part, ...]
    zero: tuple[Width, ...]

    @property
    def size(self):
        return sum(part.size for part in self.parts)

    @property
    def widths(self):
        return tuple({f.found(): None for part in self.parts for f in part.factors if isinstance(f, Width)})

    def zeros(self):
        own = {w.found() for w in self.zero}
        return tuple(w for w in self.widths if w in own)

    def all_zero(self):
        return all(any(f.found() in self.zeros() for f in p.factors if isinstance(f, Width)) for p in self.parts)


class Network(NamedTuple):
    """A network: its function, its params, what it is applied to, its widths, and its layers for a reader."""

    apply: Callable[..., Any]
    params: dict[str, np.ndarray]
    inputs: np.ndarray
    widths: list[Width]
    text: str


LAYERS: dict[str, Callable[["Builder"], Node | None]] = {}


def layer(build):
    LAYERS[build.__name__] = build
    return build


class Builder:
    """A network that is being built."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.params, self.widths, self.nodes, self.ops, self.lines = {}, [], [], [], []
        self.read, self.epsilons = set(), {}

    def chance(self, p):
        return self.rng.random() < p

    def choice(self, things):
        return things[self.rng.integers(len(things))]

    def width(self, size=None, verdict=CUT):
        made = Width(int(size or self.rng.choice([2, 4, 5, 6])), verdict)
        self.widths.append(made)
        return made

    def param(self, name, *axes, scale=None):
        """A leaf; an axis is a number, or the parts that it has."""
        path = f"{len(self.params)}_{name}"
        axes = [(Part((axis,)),) if isinstance(axis, int | Width) else axis for axis in axes]
        shape = tuple(sum(part.size for part in axis) for axis in axes)
        scale = scale or 1 / math.sqrt(max(math.prod(shape[:-1]), 1))
        self.params[path] = self.rng.normal(size=shape) * scale + (0.3 if len(shape) == 1 else 0.0)
        for i, axis in enumerate(axes):
            for width in {f for part in axis for f in part.factors if isinstance(f, Width)}:
                places = np.concatenate([part.places(width) for part in axis])
                width.sites.append((path, i - len(shape), places))
        return path

    def statistic(self, name, axis):
        """A leaf that no optimizer updates."""
        path = self.param(name, axis)
        del self.params[path]
        self.params[f"{path}/{name}"] = np.abs(self.rng.normal(size=sum(p.size for p in axis))) + 0.5
        for width in {f for part in axis for f in part.factors if isinstance(f, Width)}:
            width.sites[:] = [site for site in width.sites if site[0] != path]
        return f"{path}/{name}"

    def pick(self, rank=None, most=40):
        """A node to read, the last one more often than not."""
        fits = [n for n in self.nodes if (rank is None or len(n.between) in rank) and n.size <= most]
        if not fits:
            return None
        return fits[-1] if self.chance(0.6) else self.choice(fits)

    def add(self, name, fn, inputs, parts, zero, between=None):
        """The node that `fn(params, *arrays)` makes, called plainly or through a transformation."""
        wrapped = str(self.rng.choice(["", "jit", "remat", "vmap"], p=[0.7, 0.1, 0.1, 0.1]))
        self.ops.append((fn, wrapped, [n.index for n in inputs]))
        node = Node(len(self.nodes), inputs[0].between if between is None else between, tuple(parts), tuple(zero))
        self.nodes.append(node)
        self.read |= {n.index for n in inputs}
        self.lines.append(f"{node.index} = {wrapped} {name}({[n.index for n in inputs]}) {[p.size for p in parts]}")
        return node

    def dense(self, h, parts, name="dense", bias=None, between=None):
        """A kernel in any orientation that reads a node, with a bias or without."""
        turned = self.chance(0.3)
        w = self.param("w", parts, h.parts) if turned else self.param("w", h.parts, parts)
        b = self.param("b", parts) if (self.chance(0.5) if bias is None else bias) else None

        def fn(p, x):
            y = jnp.einsum("...i,oi->...o", x, p[w]) if turned else x @ p[w]
            return y if b is None else y + along(p[b], y)

        return self.add(name, fn, [h], parts, [f for part in parts for f in part.factors if isinstance(f, Width)])

    def unary(self, name, fn, h, keeps=True, verdict=CUT):
        """An operation that keeps the features."""
        for width in h.widths:
            width.judge(verdict)
        return self.add(name, fn, [h], h.parts, h.zeros() if keeps else ())

    def network(self, layers, most):
        """Add layers, and heads that read every node that nothing else reads."""
        self.start()
        for _ in range(self.rng.integers(3, most + 1)):
            LAYERS[self.choice(layers)](self)
        ends = [node for node in self.nodes if node.index not in self.read]
        heads = [self.param("head", node.parts, 3) for node in ends]
        hidden = self.choice(self.nodes) if self.chance(0.1) else None
        for width in () if hidden is None else hidden.widths:
            width.judge(REFUSED)

        def apply(params, x, epsilons=None):
            self.epsilons = epsilons or {}
            arrays = [self.first(params, x)]
            for fn, wrapped, inputs in self.ops:
                arrays.append(_wrapped(fn, wrapped)(params, *[arrays[i] for i in inputs]))
            tops = [arrays[n.index].mean(tuple(range(1, 1 + len(n.between)))) for n in ends]
            out = sum(jnp.tanh(top @ params[head]) for top, head in zip(tops, heads, strict=True))
            return (out,) if hidden is None else (out, arrays[hidden.index])

        widths = list(dict.fromkeys(w.found() for w in self.widths if w.found().size > 1))
        text = "\n".join([*self.lines, f"output {None if hidden is None else hidden.index}"])
        return Network(apply, self.params, self.inputs, widths, text)

    def start(self):
        """What the network is applied to, as its first node."""
        kind = self.choice(["flat", "sequence", "image", "tokens"])
        self.lines.append(f"0 = {kind}")
        if kind == "tokens":
            width = self.width()
            table = self.param("embedding", 7, (Part((width,)),), scale=1.0)
            taken = self.chance(0.5)
            self.inputs = self.rng.integers(0, 7, (2, 4))
            self.first = lambda p, x: jnp.take(p[table], x, 0) if taken else p[table][x]
            self.nodes.append(Node(0, (4,), (Part((width,)),), (width,)))
            return
        between = {"flat": (), "sequence": (4,), "image": (4, 4)}[kind]
        self.inputs = self.rng.normal(size=(2, *between, 3))
        self.first = lambda p, x: x
        self.nodes.append(Node(0, between, (Part((3,)),), ()))


def network(seed, layers=None, most=6):
    """The network of a seed, of these layers where they are named."""
    return Builder(seed).network(sorted(LAYERS) if layers is None else layers, most)


def along(v, like):
    """A vector along the last axis of an array."""
    return v.reshape((1,) * (like.ndim - 1) + (-1,))


def _wrapped(fn, how):
    if how == "jit":
        return jax.jit(lambda *args: fn(*args))  # a function of its own, as `fn` reads the epsilons of the builder
    if how == "remat":
        return jax.checkpoint(lambda *args: fn(*args))
    if how == "vmap":
        return lambda p, *xs: jax.vmap(lambda *ys: fn(p, *[y[None] for y in ys])[0])(*xs)
    return fn


def one(width):
    return (Part((width,)),)
