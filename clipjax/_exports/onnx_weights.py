"""The weights of an ONNX graph: its float initializers, those of subgraphs too, and the nodes that use them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

Proto = Any  # of onnx, which is an extra

FLOATS = (1, 10, 11, 16)  # TensorProto's numbers of float, float16, double and bfloat16


class Use(NamedTuple):
    """One place where a weight is used.

    Attributes:
      graph: the graph or subgraph of the node.
      node: the node, None where the weight is an output of the graph itself.
      place: which of the node's inputs the weight is.
    """

    graph: Proto
    node: Proto
    place: int

    @property
    def kind(self) -> str:
        """The operator, "" for one that is not ONNX's own."""
        own = self.node is not None and self.node.domain in ("", "ai.onnx")
        return self.node.op_type if own else ""

    @property
    def named(self) -> str:
        """The node in words."""
        return f"node {self.node.name or self.node.output[0]!r}"

    def attribute(self, name: str, default: Any) -> Any:
        """An attribute of the node."""
        import onnx

        found = [onnx.helper.get_attribute_value(a) for a in self.node.attribute if a.name == name]
        return found[0] if found else default

    @property
    def contracted(self) -> int | None:
        """The axis of a matrix that the node sums over, where it computes x @ w of the last axis of x; else None."""
        if self.place != 1:
            return None
        if self.kind == "MatMul":
            return 0
        if self.kind == "Gemm":
            return int(bool(self.attribute("transB", 0)))
        if self.kind == "Einsum":
            return _contracted_letter(self.attribute("equation", b"").decode())
        return None


def _contracted_letter(equation: str) -> int | None:
    """Which letter of the second operand is the last one of the first, in "abc,cd->abd" and the like."""
    parts = re.fullmatch(r"(\w*)(\w),(\w)(\w)->(\w+)", equation.replace(" ", ""))
    if parts is None:
        return None
    kept, letter, *pair, out = parts.groups()
    at = [i for i in (0, 1) if pair[i] == letter and kept + pair[1 - i] == out]
    return at[0] if len(at) == 1 else None


class Weight(NamedTuple):
    """One float initializer.

    Attributes:
      graph: the graph that has it.
      proto: the TensorProto.
      uses: where it is used, in subgraphs too.
      between: the nodes that only hand it on, one behind another: transposed, cast or as it is.
      ends: where it is used behind those, and its other uses, each with the order in which it has the weight's axes.
    """

    graph: Proto
    proto: Proto
    uses: tuple[Use, ...]
    between: tuple[Use, ...]
    ends: tuple[tuple[Use, tuple[int, ...]], ...]

    @property
    def name(self) -> str:
        """Its name in the graph."""
        return self.proto.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.proto.dims)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of its entries."""
        import onnx

        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(self.proto.data_type))

    def values(self) -> np.ndarray:
        """Its entries."""
        import onnx

        return onnx.numpy_helper.to_array(self.proto)

    @property
    def convolves(self) -> bool:
        """True for the kernel of a convolution, whose inputs stand before its spatial axes."""
        return any(use.kind in ("Conv", "ConvTranspose") and use.place == 1 for use in self.uses)

    @property
    def outputs(self) -> tuple[int, ...] | None:
        """The axes that a contraction keeps; None where no use tells."""
        found = ((_outputs(use, len(self.shape)), order) for use, order in self.ends)
        return next((tuple(sorted(order[i] for i in axes)) for axes, order in found if axes is not None), None)


def _outputs(use: Use, ndim: int) -> tuple[int, ...] | None:
    if ndim == 2 and use.contracted is not None:
        return (1 - use.contracted,)
    if use.kind == "MatMul" and ndim > 1:
        contracted = ndim - 2 if use.place else ndim - 1
        return tuple(i for i in range(ndim) if i != contracted)
    if use.kind == "Gemm" and use.place == 0:
        return (int(bool(use.attribute("transA", 0))),)
    if use.kind in ("Conv", "ConvTranspose") and use.place == 1:
        return (int(use.kind == "ConvTranspose"),)
    return None


def weights(model: Proto) -> list[Weight]:
    """Every float initializer that something uses. Constants become initializers first, which changes no value."""
    found = []
    for graph in graphs(model.graph):
        _lift_constants(graph)
        uses: dict[str, list[Use]] = {}
        for inner in graphs(graph):
            for node in inner.node:
                for place, name in enumerate(node.input):
                    uses.setdefault(name, []).append(Use(inner, node, place))
            for output in inner.output:
                uses.setdefault(output.name, []).append(Use(inner, None, 0))
        held = (proto for proto in graph.initializer if proto.data_type in FLOATS and proto.name in uses)
        found += [_weight(graph, proto, uses) for proto in held]
    return found


def _weight(graph: Proto, proto: Proto, uses: Mapping[str, list[Use]]) -> Weight:
    between, ends = [], []

    def follow(name: str, order: tuple[int, ...]) -> None:
        for use in uses.get(name, ()):
            if use.kind in ("Transpose", "Identity", "Cast"):
                between.append(use)
                kept = range(len(order))
                moved = use.attribute("perm", kept[::-1]) if use.kind == "Transpose" else kept
                follow(use.node.output[0], tuple(order[i] for i in moved))
            else:
                ends.append((use, order))

    follow(proto.name, tuple(range(len(proto.dims))))
    return Weight(graph, proto, tuple(uses[proto.name]), tuple(between), tuple(ends))


def graphs(graph: Proto) -> Iterator[Proto]:
    """A graph and its subgraphs, the bodies of If, Loop and Scan, each before those in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from graphs(inner)


def _lift_constants(graph: Proto) -> None:
    for i in reversed(range(len(graph.node))):
        node = graph.node[i]
        value = [a.t for a in node.attribute if a.name == "value"] if node.op_type == "Constant" else []
        if value and value[0].data_type in FLOATS and value[0].dims:
            proto = graph.initializer.add()
            proto.CopyFrom(value[0])
            proto.name = node.output[0]
            del graph.node[i]
