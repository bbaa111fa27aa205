"""Models of the proof set in NNX, whose layers follow the shapes of their arrays but for grouped convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from proof_cases import Case, declared, filled, floats

RNG = np.random.default_rng(3)


class Inverted(nnx.Module):
    """A block of MobileNet: expand, depthwise, project; added where shapes allow it."""

    def __init__(self, into, inside, out, strides, rngs):
        self.expand = nnx.Conv(into, inside, (1, 1), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(inside, use_running_average=True, rngs=rngs)
        self.depthwise = nnx.Conv(
            inside, inside, (3, 3), strides, feature_group_count=inside, use_bias=False, rngs=rngs
        )
        self.bn2 = nnx.BatchNorm(inside, use_running_average=True, rngs=rngs)
        self.project = nnx.Conv(inside, out, (1, 1), rngs=rngs)
        self.added = strides == 1

    def __call__(self, x):
        y = jax.nn.relu6(self.bn1(self.expand(x)))
        y = self.project(jax.nn.relu6(self.bn2(self.depthwise(y))))
        return x + y if self.added else y


class MobileNet(nnx.Module):
    def __init__(self, stem, inside1, inside2, out):
        rngs = nnx.Rngs(0)
        self.stem = nnx.Conv(3, stem, (3, 3), rngs=rngs)
        self.block1 = Inverted(stem, inside1, stem, 1, rngs)
        self.block2 = Inverted(stem, inside2, out, 2, rngs)
        self.head = nnx.Linear(out, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.block2(self.block1(jax.nn.silu(self.stem(x)))).mean((1, 2)))


class ConvNeXt(nnx.Module):
    """Its stream is under a LayerNorm, so the inside of the MLP and the last maps are what can be cut."""

    def __init__(self, last):
        rngs = nnx.Rngs(0)
        self.stem = nnx.Conv(3, 6, (2, 2), 2, rngs=rngs)
        self.depthwise = nnx.Conv(6, 6, (7, 7), feature_group_count=6, rngs=rngs)
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.widen = nnx.Linear(6, 20, rngs=rngs)
        self.narrow = nnx.Linear(20, 6, rngs=rngs)
        self.gamma = nnx.Param(jnp.ones(6))
        self.before = nnx.Conv(6, last, (1, 1), rngs=rngs)
        self.last = nnx.Conv(last, last, (7, 7), feature_group_count=last, rngs=rngs)
        self.head = nnx.Linear(last, 3, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        y = self.narrow(jax.nn.gelu(self.widen(self.norm(self.depthwise(x)))))
        return self.head(self.last(self.before(x + y * self.gamma[...])).mean((1, 2)))


class DenseNet(nnx.Module):
    """Every layer reads all maps before it."""

    def __init__(self, stem=5, grown=(4, 6, 7)):
        rngs = nnx.Rngs(0)
        self.stem = nnx.Conv(3, stem, (3, 3), rngs=rngs)
        widths = [stem + sum(grown[:i]) for i in range(4)]
        self.norms = nnx.List([nnx.BatchNorm(n, use_running_average=True, rngs=rngs) for n in widths])
        self.layers = nnx.List([nnx.Conv(n, m, (3, 3), rngs=rngs) for n, m in zip(widths, grown, strict=False)])
        self.head = nnx.Linear(widths[-1], 3, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = jnp.concatenate([x, layer(jax.nn.relu(norm(x)))], -1)
        return self.head(jax.nn.relu(self.norms[3](x)).mean((1, 2)))


class Lstm(nnx.Module):
    def __init__(self, hidden):
        rngs = nnx.Rngs(0)
        self.hidden = hidden
        self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(4, hidden, rngs=rngs))
        self.head = nnx.Linear(hidden, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.rnn(x))


def _split(model):
    return nnx.split(model, nnx.Any(nnx.Param, nnx.BatchStat), ...)


def _apply(model):
    graphdef, _, rest = _split(model)
    return lambda state, x: nnx.merge(graphdef, state, rest, copy=True)(x)


def _case(model, *shape, found, rebuild=None):
    variables = filled(_split(model)[1], RNG)
    return Case(_apply(model), variables, (floats(RNG, *shape),), found, rebuild)


def _declared(build, widths, *shape, found=()):
    model, rebuild = declared(build, widths, _apply)
    found = found or tuple((path, -1, n) for path, n in widths.items())
    return _case(model, *shape, found=found, rebuild=rebuild)


def _mobilenet(w):
    names = ("stem/kernel", "block1/expand/kernel", "block2/expand/kernel", "block2/project/kernel")
    return MobileNet(*map(w, names))


MOBILENET = {
    "stem/kernel": 6,
    "block1/expand/kernel": 10,
    "block2/expand/kernel": 14,
    "block2/project/kernel": 8,
}
GROWN = tuple((f"layers/{i}/kernel", -1, n) for i, n in enumerate((4, 6, 7)))
CASES = {
    "mobilenet": _declared(_mobilenet, MOBILENET, 2, 6, 6, 3),
    "convnext": _declared(
        lambda w: ConvNeXt(w("before/kernel")),
        {"before/kernel": 12},
        2,
        8,
        8,
        3,
        found=(("widen/kernel", -1, 20), ("before/kernel", -1, 12)),
    ),
    "densenet": _case(DenseNet(), 2, 6, 6, 3, found=(("stem/kernel", -1, 5), *GROWN)),
    "lstm": _declared(
        lambda w: Lstm(w("rnn/cell/dense_h/kernel") // 4),
        {("rnn/cell/dense_h/kernel", -1): 28},
        *(2, 5, 4),
        found=(("rnn/cell/dense_h/kernel", -1, 7), ("head/kernel", -2, 7)),
    ),
}
