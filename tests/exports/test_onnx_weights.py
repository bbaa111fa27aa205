"""Initializers behind other nodes: which axes a use contracts where the graph transposes the weight first."""

import numpy as np
import pytest
from on_format import on_format
from onnx_graphs import evaluated, graph, helper, numpy_helper, operators, values

from clipjax import export_onnx, formats


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("perm", [[1, 0], None])
@pytest.mark.parametrize("kinds", ["Transpose", "Identity Transpose", "Transpose Cast"])
def test_a_weight_that_the_graph_transposes(perm, kinds, tmp_path):
    """A square one that `rename` names lies as the MatMul behind the Transpose tells, whose values are others."""
    w = random(64, 64)
    x, names = np.eye(64, dtype=np.float32), ["w", "a", "b"]
    nodes = []
    for i, kind in enumerate(kinds.split()):
        given = {"perm": perm} if kind == "Transpose" and perm else {"to": 1} if kind == "Cast" else {}
        nodes.append(helper.make_node(kind, [names[i]], [names[i + 1]], **given))
    nodes.append(helper.make_node("MatMul", ["x", nodes[-1].output[0]], ["y"]))
    model = graph(nodes, {"w": random(64, 64, seed=1)}, x)
    for leaf in (w, on_format(formats.nbits(4, 32), w), on_format(formats.mxfp4(), w)):
        export_onnx(model, tmp_path / "m", {"w": leaf}, rename=lambda path, leaf: "w", contrib=False)
        np.testing.assert_array_equal(evaluated(tmp_path / "m", x), values(leaf))
    export_onnx(model, tmp_path / "m", {"w": on_format(formats.nbits(4, 32), w)}, rename=lambda path, leaf: "w")
    whole = ["DequantizeLinear", "Transpose", "Cast", "MatMul"]
    assert operators(tmp_path / "m") == (whole if "Cast" in kinds else ["MatMulNBits"])


def test_a_square_weight_whose_use_does_not_tell_is_refused(tmp_path):
    w = random(64, 64)
    shape = np.array([64, 64])
    nodes = [helper.make_node("Reshape", ["w", "s"], ["a"], "turn"), helper.make_node("MatMul", ["x", "a"], ["y"])]
    model = graph(nodes, {"w": random(64, 64, seed=1), "s": shape}, np.eye(64, dtype=np.float32))
    with pytest.raises(
        ValueError, match=r"axes are known, got 'w'. Leaf 'w' may be .* node 'turn' does not tell: give.*`source=`"
    ):
        export_onnx(model, tmp_path / "m", {"w": w}, rename=lambda path, leaf: "w")
    source = {"w": numpy_helper.to_array(model.graph.initializer[0])}
    export_onnx(model, tmp_path / "m", {"w": w}, source=source, rename=lambda path, leaf: "w")
    np.testing.assert_array_equal(evaluated(tmp_path / "m", np.eye(64, dtype=np.float32)), w)
    assert len(list(tmp_path.iterdir())) == 1
