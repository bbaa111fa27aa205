"""Models of the proof set in Haiku, whose modules declare their widths: the small ones are built from what is left."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from proof_cases import Case, declared, filled, floats

RNG = np.random.default_rng(5)


def resnet(stem, inside, out):
    def model(x, training=False):
        norm = lambda x, name: hk.BatchNorm(True, True, 0.9, name=name)(x, is_training=training)

        x = jax.nn.relu(norm(hk.Conv2D(stem, 3, name="stem")(x), "bn0"))
        y = jax.nn.relu(norm(hk.Conv2D(inside, 3, 2, with_bias=False, name="conv1")(x), "bn1"))
        y = norm(hk.Conv2D(out, 3, name="conv2")(y), "bn2")
        x = jax.nn.relu(y + norm(hk.Conv2D(out, 1, 2, name="shortcut")(x), "bn3"))
        return hk.Linear(3, name="head")(x.mean((1, 2)))

    return model


def lstm(hidden):
    def model(x, training=False):
        core = hk.LSTM(hidden, name="lstm")
        every, last = hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))
        return hk.Linear(3, name="head")(every[-1] + last.cell)

    return model


def unet(down, middle, up):
    def model(x, training=False):
        a = jax.nn.relu(hk.Conv2D(down, 3, name="down")(x))
        b = jax.nn.relu(hk.DepthwiseConv2D(1, 3, 2, name="depthwise")(a))
        b = jax.nn.relu(hk.Conv2D(middle, 3, name="middle")(b))
        b = hk.Conv2DTranspose(up, 2, 2, name="up")(b)
        return hk.Conv2D(2, 1, name="head")(jnp.concatenate([a, b], -1))

    return model


def _apply(model):
    """In training, where the state that is returned ties the running averages to the units."""
    transformed = hk.transform_with_state(functools.partial(model, training=True))

    def apply(variables, x):
        out, state = transformed.apply(variables["params"], variables["state"], None, x)
        return out, {"state": state}

    return apply


def _case(build, widths, *shape, found=()):
    """Every width is found, but for those that are `found` in its place."""
    model, rebuild = declared(build, widths, _apply)
    x = floats(RNG, *shape)
    init = functools.partial(hk.transform_with_state(model).init, training=True)
    params, state = jax.eval_shape(init, jax.random.key(0), x)
    found = found or tuple((path, axis, n) for (path, axis), n in widths.items())
    return Case(_apply(model), filled({"params": params, "state": state}, RNG), (x,), found, rebuild)


RESNET = {("stem/w", -1): 6, ("conv1/w", -1): 8, ("conv2/w", -1): 10}
UNET = {("down/w", -1): 6, ("middle/w", -1): 8, ("up/w", -2): 5}
CASES = {
    "resnet": _case(lambda w: resnet(w("stem/w"), w("conv1/w"), w("conv2/w")), RESNET, 2, 8, 8, 3),
    "lstm": _case(
        lambda w: lstm(w("lstm/linear/w") // 4),
        {("lstm/linear/w", -1): 28},
        *(5, 2, 4),
        found=(("lstm/linear/w", -1, 7), ("lstm/linear/w", -2, 7)),
    ),
    "unet": _case(lambda w: unet(w("down/w"), w("middle/w"), w("up/w", -2)), UNET, 2, 6, 6, 3),
}
