"""All weights of an ONNX file, as onnxruntime's own operators read them.

Each packed weight is taken through the operators that unpack it, with the file's bytes; what they
give, or what the operator that multiplies by it makes of the unit matrix, is the weight.
"""

from __future__ import annotations

import sys
from typing import Any

_LEVELS, _STEPS = "packed.levels", "packed.steps"


def _run(model: Any, nodes: list[Any], feeds: dict[str, Any], output: str, kind: int) -> Any:
    """What a part of the graph gives; the tensors that it needs are the file's."""
    import numpy as np
    import onnxruntime
    from onnx import helper

    used = {name for node in nodes for name in node.input}
    given = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(np.dtype(value.dtype)), value.shape
        )
        for name, value in feeds.items()
    ]
    probe = helper.make_model(
        helper.make_graph(
            nodes, "probe", given, [helper.make_tensor_value_info(output, kind, None)],
            initializer=[item for item in model.graph.initializer if item.name in used],
        ),
        opset_imports=model.opset_import, ir_version=model.ir_version,
    )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        probe.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (result,) = session.run(None, feeds)
    return result


def _before(model: Any, names: list[str]) -> list[Any]:
    """The nodes that make values, in the graph's order."""
    made = {output: node for node in model.graph.node for output in node.output}
    wanted, needed = list(names), set()
    while wanted:
        node = made.get(wanted.pop())
        if node is not None and node.name not in needed:
            needed.add(node.name)
            wanted += node.input
    return [node for node in model.graph.node if node.name in needed]


def _reader(model: Any, levels: str) -> Any:
    """The node that unpacks or multiplies, behind those that rearrange bytes."""
    names = {levels}
    for node in model.graph.node:
        if not names.intersection(node.input):
            continue
        if node.op_type in {"MatMulNBits", "DequantizeLinear", "MatMulInteger", "ConvInteger"}:
            return node
        names.update(node.output)
    return None


def _weight(model: Any, levels: str) -> Any:
    """The numbers that a packed weight stands for, in the order of the state."""
    import numpy as np
    from onnx import numpy_helper

    node = _reader(model, levels)
    if node.op_type == "DequantizeLinear":
        nodes = _before(model, [node.output[0]])
        return _run(model, nodes, {}, node.output[0], 1)
    if node.op_type == "MatMulNBits":
        wide = next(item.i for item in node.attribute if item.name == "K")
        nodes = [*_before(model, list(node.input[1:])), node]
        unit = np.eye(wide, dtype=np.float32)
        return _run(model, nodes, {node.input[0]: unit}, node.output[0], 1).T
    constants = {item.name: item for item in model.graph.initializer}
    steps = numpy_helper.to_array(constants[levels.removesuffix(_LEVELS) + _STEPS])
    unsigned = len(node.input) > 3
    source = node.input[1]
    nodes = _before(model, [source])
    if not nodes:
        whole = numpy_helper.to_array(constants[source])
    else:
        whole = _run(model, nodes, {}, source, 2 if unsigned else 3)
    whole = whole.astype(np.float32) - (128 if unsigned else 0)
    if node.op_type == "MatMulInteger":  # (in, out), or (groups, in, out)
        whole = whole.T if whole.ndim == 2 else whole.transpose(2, 0, 1)
    parts: Any = whole.reshape(len(steps), -1) * steps[:, None]
    return parts


def main(file: str, request: str, answer: str) -> None:
    """Load, unpack each weight, write."""
    import numpy as np
    import onnx
    import torch
    from safetensors.torch import save_file

    del request
    model = onnx.load(file)
    result: dict[str, Any] = {}
    for item in model.graph.initializer:
        if item.name == _LEVELS or item.name.endswith(f".{_LEVELS}"):
            result[item.name.removesuffix(".levels")] = _weight(model, item.name)
        elif item.data_type in {
            onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16,
            onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL,
        }:  # fmt: skip
            result[item.name] = onnx.numpy_helper.to_array(item)
    tensors = {
        name: torch.from_numpy(np.array(value, dtype=np.float32, order="C"))
        for name, value in result.items()
    }
    save_file(tensors, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
