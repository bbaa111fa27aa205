"""Changes of an ONNX graph, collected and then made at once."""

from __future__ import annotations

from typing import Any

import numpy as np

from clipjax._exports.onnx_weights import Proto, Use, Weight, graphs

IR_VERSIONS = {"float8_e4m3fn": 9, "float8_e5m2": 9, "int4": 10, "float4_e2m1fn": 11, "float8_e8m0fnu": 12, "int2": 13}
"""The version of ONNX's file format that has a dtype first."""


class Editor:
    """Changes of one model. Nodes are put in at the end, so that those found in the graph stay where they are.

    Attributes:
      model: the model.
      opset: the version of ONNX's own operators that it uses.
    """

    def __init__(self, model: Proto) -> None:
        self.model = model
        self.opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=1)
        self._names = {name for graph in graphs(model.graph) for name in _names(graph)}
        # By identity, with the object itself, as protobuf knows no other one while that is held.
        self._fronts: dict[int, tuple[Proto, list[Proto]]] = {}
        self._replaced: dict[int, tuple[Proto, list[Proto]]] = {}

    def constant(self, graph: Proto, name: str, values: np.ndarray) -> str:
        """A new initializer; returns its name."""
        import onnx

        name = self.fresh(name)
        graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(values), name))
        self.model.ir_version = max(self.model.ir_version, IR_VERSIONS.get(values.dtype.name, 0))
        return name

    def fresh(self, name: str) -> str:
        """This name, or with a number one that nothing has."""
        number, found = 0, name
        while found in self._names:
            number, found = number + 1, f"{name}_{number}"
        self._names.add(found)
        return found

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> Proto:
        """A node with a name of its own."""
        import onnx

        return onnx.helper.make_node(kind, inputs, [output], name=self.fresh(f"{output}_{kind}"), **attributes)

    def front(self, graph: Proto, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """A node before all others of a graph, which needs initializers alone; returns the name of its output."""
        _, nodes = self._fronts.setdefault(id(graph), (graph, []))
        nodes.append(self.node(kind, inputs, output, **attributes))
        return output

    def replace(self, use: Use, nodes: list[Proto]) -> None:
        """Nodes in the place of the one of a use; their domains are imported."""
        self._replaced[id(use.node)] = (use.node, nodes)
        known = {opset.domain for opset in self.model.opset_import}
        for domain in {node.domain for node in nodes} - known:
            self.model.opset_import.add(domain=domain, version=1)

    def change(self, weight: Weight, values: np.ndarray) -> None:
        """Give an initializer other values."""
        import onnx

        weight.proto.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values), weight.name))

    def drop(self, weight: Weight) -> None:
        """Take an initializer out of its graph, and out of the inputs, where the first versions of ONNX list it too."""
        for held in (weight.graph.initializer, weight.graph.input):
            for i in reversed(range(len(held))):
                if held[i].name == weight.name:
                    del held[i]

    def finish(self) -> None:
        """Put all nodes where they belong, in inner graphs first: nodes that are laid anew are other objects."""
        import onnx

        for graph in reversed(list(graphs(self.model.graph))):
            laid = onnx.GraphProto()
            laid.node.extend(self._fronts.get(id(graph), (graph, []))[1])
            for node in graph.node:
                laid.node.extend(self._replaced.get(id(node), (node, [node]))[1])
            del graph.node[:]
            graph.node.extend(laid.node)


def _names(graph: Proto) -> list[str]:
    named = [x.name for field in (graph.initializer, graph.input, graph.output, graph.node) for x in field]
    return named + [name for node in graph.node for name in (*node.input, *node.output)]
