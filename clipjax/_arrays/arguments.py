"""Checks of arguments: known values are checked early, traced values never raise."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from clipjax.typing import Count, Format, Number, PerLeaf, Schedule

Value = TypeVar("Value")

NO_PARAMS = (
    "You are using a transformation that requires the current value of parameters, but you are not"
    " passing `params` when calling `update`. Pass them: `tx.update(updates, state, params)`."
)


def traced(value: object) -> bool:
    """True for a value that is known only when the compiled program runs."""
    return isinstance(value, jax.core.Tracer)


def known(value: object) -> bool:
    """True for a number whose value can be checked now: not a schedule, not traced."""
    return value is not None and checkable(value)


def checkable(value: object) -> bool:
    """True for a value that must be a number now; None counts, so that it is refused as one."""
    return not callable(value) and not traced(value)


def is_tree(value: object) -> bool:
    """True for a container with a value for each leaf, such as a dict or an Equinox model.

    A callable is a schedule, unless it is a container of containers, as a model is of its layers.
    """
    if value is None or isinstance(value, jax.tree_util.Partial):
        return False
    inside = [value] if not callable(value) else jax.tree.leaves(value, is_leaf=lambda child: child is not value)
    return any(not jax.tree_util.treedef_is_leaf(jax.tree.structure(child)) for child in inside if child is not None)


def is_schedule(value: object) -> bool:
    """True for a callable that is no tree."""
    return callable(value) and not is_tree(value)


def require(ok: object, name: str, rule: str, value: object, remedy: str) -> None:
    """Raise the ValueError of this library unless `ok`: it names argument, rule, value and remedy."""
    if not ok:
        shown = value.tolist() if isinstance(value, np.ndarray | jax.Array) else value
        raise ValueError(f"`{name}` must {rule}, got {shown!r}. {remedy}")


def static(value: Value, name: str) -> Value:
    """Return `value`; refuse an array, and say how to keep an argument that decides shapes out of tracing."""
    if isinstance(value, jax.Array):
        raise TypeError(
            f"`{name}` must be a static Python value, got an array. Keep it out of tracing:"
            f" pass it as a Python value, or `optax.inject_hyperparams(..., static_args=('{name}',))`."
        )
    return value


def hashable(value: object) -> bool:
    """True for what a cache may find again; a tuple of functions is, unless one of these holds arrays."""
    try:
        hash(value)
    except TypeError:
        return False
    return True


def finite(value: object) -> bool:
    """True where every entry of a known number is finite."""
    return bool(np.all(np.isfinite(np.asarray(value, np.float64))))


def numeric(value: object, name: str, remedy: str) -> np.ndarray:
    """A known value as f64; anything that is no number raises."""
    try:
        number = None if value is None or isinstance(value, str) else np.asarray(value, np.float64)
    except (TypeError, ValueError):
        number = None
    if number is None:
        raise TypeError(f"`{name}` must be a number, got {value!r}. {remedy}")
    return number


def scalar(value: object, name: str, remedy: str) -> None:
    """Refuse an array where one number is meant, a traced one too: its shape is known."""
    shape = np.shape(value) if isinstance(value, list) else getattr(value, "shape", ())
    if shape:
        raise ValueError(f"`{name}` must be one number, got an array of shape {shape}. {remedy}")


def spreads(value: object, shape: tuple[int, ...], name: str) -> None:
    """Refuse what does not broadcast to an array of this shape, block by block: the result would have another shape."""
    own: tuple[int, ...] = jnp.shape(value)  # type: ignore[arg-type]
    ok = len(own) <= len(shape) and all(
        n in (1, m) or (n and m % n == 0) for n, m in zip(own[::-1], shape[::-1], strict=False)
    )
    remedy = "Give one number, or one for each index or block of an axis."
    require(ok, name, f"broadcast to the array of shape {shape}", f"shape {own}", remedy)


def real(value: object, name: str) -> jax.Array:
    """An argument as an array; complex numbers are refused, whose imaginary parts would be dropped."""
    x = jnp.asarray(value)
    if jnp.iscomplexobj(x):
        raise TypeError(f"`{name}` must be real, got {x.dtype}. Pass its real and imaginary parts as two arrays.")
    return x


def non_negative(value: object, name: str, remedy: str) -> None:
    """Check a known bound or threshold: a number >= 0, infinity allowed, NaN not."""
    if checkable(value):
        number = numeric(value, name, remedy)
        require(np.all(number >= 0), name, "be a number >= 0", value, remedy)


def fraction(value: object, name: str, remedy: str) -> None:
    """Check a fraction in [0, 1), where it is known."""
    scalar(value, name, remedy)
    if checkable(value):
        number = numeric(value, name, remedy)
        require(np.all((number >= 0) & (number < 1)), name, "lie in [0, 1)", value, remedy)


def whole(value: object, name: str, *, low: int, remedy: str) -> None:
    """Check a known whole number that is at least `low`."""
    scalar(value, name, remedy)
    if not traced(value):
        number = numeric(value, name, remedy)
        ok = np.all((number >= low) & (number == np.floor(number)) & np.isfinite(number))
        require(ok, name, f"be a whole number >= {low}", value, remedy)


def times(start: Count, every: Count | None, stop: Count | None) -> None:
    """Check the arguments that say when a transformation starts, refreshes and stops."""
    whole(start, "start", low=0, remedy="Updates are counted from 0.")
    if every is not None:
        whole(every, "every", low=1, remedy="Give the number of updates between two refreshes.")
    if stop is not None:
        whole(stop, "stop", low=0, remedy="Updates are counted from 0.")
    if known(start) and known(stop):
        remedy = f"Refreshes happen from `start` ({start}) to `stop`."
        require(np.asarray(stop) >= np.asarray(start), "stop", "not be smaller than `start`", stop, remedy)


def axis(value: object) -> None:
    """Check one static axis."""
    static(value, "axis")
    ok = isinstance(value, int | np.integer)
    require(ok, "axis", "be a whole number", value, "Output units of Flax kernels are on axis -1.")


def axes(value: object) -> tuple[int, ...]:
    """One static axis or a tuple of some, checked."""
    found = tuple(value) if isinstance(value, tuple | list) else (value,)
    require(found, "axis", "name an axis", value, "Output units of Flax kernels are on axis -1.")
    for one in found:
        axis(one)
    return found


def bits(value: object, name: str = "bits") -> None:
    """Check a bit width: a static whole number between 1 and 16."""
    static(value, name)
    called(value, name, "a width or a format")
    named = isinstance(value, str)
    remedy = "A format comes from its factory: `formats.q4_0()`." if named else "2 is ternary, 4 and 8 are usual."
    ok = isinstance(value, int | np.integer) and not isinstance(value, bool) and 1 <= value <= 16
    require(ok, name, "be between 1 and 16", value, remedy)


def widths(values: Sequence[int], name: str) -> tuple[int, ...]:
    """Bit widths to choose from, checked, rising and without repetition."""
    ok = isinstance(values, tuple | list | range) and len(values) > 0
    require(ok, name, "hold widths", values, "Try (2, 4, 8).")
    for width in values:
        bits(width, name)
    return tuple(sorted({int(width) for width in values}))


def widths_or_formats(values: Sequence[int | Format], name: str) -> tuple[int | Format, ...]:
    """The same with formats among them, rising by their bits a weight."""
    known = isinstance(values, tuple | list | range)
    formed = {width for width in values if isinstance(width, Format)} if known else set()
    numbers = [width for width in values if not isinstance(width, Format)] if formed else values
    checked: tuple[int, ...] = () if formed and not numbers else widths(numbers, name)  # type: ignore[arg-type]
    return tuple(sorted({*checked, *formed}, key=nominal))


def nominal(width: int | Format) -> float:
    """Bits a weight of a width, or of a format; without its scales where the size of a block is that of the leaf."""
    return width.bits if isinstance(width, Format) else width


def choice(value: object, name: str, options: tuple[object, ...]) -> None:
    """Check an option given by name."""
    static(value, name)
    listed = ", ".join(repr(option) for option in options)
    require(value in options, name, f"be one of {listed}", value, "Other values have no meaning.")


def instance(value: object, kind: type | tuple[type, ...], name: str, remedy: str) -> None:
    """Check that an argument of a family (a score, a structure, a step) was built by its factory."""
    if not isinstance(value, kind):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        called(value, name, f"a {names}")
        raise TypeError(f"`{name}` must be a {names}, got {value!r}. {remedy}")


def called(value: object, name: str, kinds: str) -> None:
    """Refuse a factory of this library that was not called: no function of its modules is a schedule."""
    module = str(getattr(value, "__module__", ""))
    if inspect.isfunction(value) and module.split(".")[0] == "clipjax" and "<" not in value.__qualname__:
        family = module.removeprefix("clipjax.") if "._" not in module else module.rpartition("_")[2]
        factory = f"{family}.{value.__name__}" if "._" not in module or family == "formats" else value.__name__
        raise TypeError(f"`{name}` must be {kinds}, got the function `{factory}`. Call it: `{factory}()`.")


def schedule(value: Any) -> Callable[[jax.Array], Any]:
    """Turn a number into the constant schedule; a bare callable is always a schedule."""
    return value if callable(value) else lambda count: value


def is_number(value: object) -> bool:
    """True for a Python or NumPy number that is not NaN."""
    return isinstance(value, int | float | np.number) and not math.isnan(float(value))


def transformation(value: object, name: str) -> None:
    """Refuse what is no Optax transformation, and no None."""
    if value is not None and not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
        remedy = f"Call its factory: `{name}=optax.adam(1e-3)`."
        raise TypeError(f"`{name}` must be an optax.GradientTransformation, got {value!r}. {remedy}")


def takes(fn: Callable[..., Any], name: str, parameters: tuple[str, ...], remedy: str) -> None:
    """Refuse a function that cannot be called with these arguments, before its own errors could be mistaken for it."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # a builtin that does not tell its arguments
        return
    try:
        signature.bind(*parameters)
    except TypeError:
        listed = ", ".join(parameters)
        raise TypeError(f"`{name}` must be a function of ({listed}), got one of {signature}. {remedy}") from None


def check_schedule(value: object, name: str, kinds: str) -> None:
    """Check that a callable can be a schedule: no factory, and a function of the count alone."""
    if callable(value):
        called(value, name, kinds)
        takes(value, name, ("count",), "Mark a function (path, leaf) by `clipjax.per_leaf`, where that is taken.")


def per_leaf(fn: Callable[[str, Any], Any]) -> PerLeaf:
    """Give every leaf its own value of an argument.

    Wherever an argument takes a function, a bare callable means a schedule, a function of the count. A function of the
    leaf is marked by `per_leaf`. It can be given as the bound of `clamp_weights`, the sparsity of `prune_mask`, the
    bits, axis and group of `fake_quantize` and `choose_bits`, the axis of `structures.n_of_m` and `unit`, and the
    `axis_name` of `clip_norm` and, with ``per="leaf"``, its threshold.

    Args:
      fn: `fn(path, leaf) -> value`, a function of path, shape and dtype; a path reads `"encoder/lin/kernel"`. It is
        called at init, and again whenever an update is traced; leaves have no values then.

    Returns:
      The argument to pass.

    Raises:
      TypeError: for something that is no function of (path, leaf).

    Example:
      >>> import clipjax, jax.numpy as jnp
      >>> tx = clipjax.clamp_weights(clipjax.per_leaf(lambda path, leaf: 1.0 if "head" in path else 0.5))
      >>> params = {"body": jnp.array([2.0]), "head": jnp.array([2.0])}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> {k: float((params[k] + u)[0]) for k, u in updates.items()}
      {'body': 0.5, 'head': 1.0}
    """
    if not callable(fn):
        raise TypeError(f"`fn` must be a function (path, leaf) -> value, got {fn!r}. Give a plain value as it is.")
    takes(fn, "fn", ("path", "leaf"), "Try `lambda path, leaf: ...`.")
    return PerLeaf(fn)


def check_step(step: object) -> None:
    """Check a known step: positive and finite."""
    check_positive(step, "step", "It is the distance of two levels.")


def check_positive(value: object, name: str, remedy: str) -> None:
    """Check a known number: positive and finite."""
    if checkable(value):
        number = numeric(value, name, remedy)
        ok = np.all(number > 0) and finite(value)
        require(ok, name, "be positive and finite", value, remedy)


def no_function(value: object, name: str) -> None:
    """Refuse a schedule where none is followed."""
    if callable(value):
        raise TypeError(
            f"`{name}` must be a number, got {value!r}. It is the same at every update: no schedule is taken."
        )


def positive_schedule(value: Number | Schedule, name: str, remedy: str) -> Schedule:
    """The function of a count that a positive number, or a schedule, is."""
    check_schedule(value, name, "a number or a schedule")
    if not callable(value):
        scalar(value, name, remedy)
        check_positive(value, name, remedy)
    return schedule(value)


_RANGES = {
    "be a number > 0": lambda n: n > 0,
    "be a number >= 0": lambda n: n >= 0,
    "be a whole number >= 1": lambda n: (n >= 1) & (n == n // 1),
    "lie in [0, 1)": lambda n: (n >= 0) & (n < 1),
    "lie in [0, 1]": lambda n: (n >= 0) & (n <= 1),
    "lie in [0, 100]": lambda n: (n >= 0) & (n <= 100),
}


def in_range(value: Number, name: str, rule: str, remedy: str) -> None:
    """Check a number against a rule in these words, unless it is traced; None and schedules raise too."""
    if not traced(value):
        require(_RANGES[rule](numeric(value, name, remedy)), name, rule, value, remedy)
