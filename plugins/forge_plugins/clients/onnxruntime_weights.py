"""All weights of an ONNX file, as onnxruntime's own operators read them.

Each operator that multiplies by a packed weight is run alone, with the file's bytes, on the unit
matrix: what it gives is the weight.
"""

from __future__ import annotations

import sys
from typing import Any

_PACKED = ("MatMulNBits", "DequantizeLinear", "MatMulInteger")


def _weight(model: Any, node: Any, constants: dict[str, Any]) -> Any:
    """The weight of a node that unpacks one, shape (out, in)."""
    import numpy as np
    import onnxruntime
    from onnx import helper

    kind = node.op_type
    first, output = node.input[0], node.output[0]
    feeds, given = {}, []
    if kind != "DequantizeLinear":
        wide = next((item.i for item in node.attribute if item.name == "K"), None)
        wide = wide or constants[node.input[1]].dims[0]
        dtype, number = (np.int8, 3) if kind == "MatMulInteger" else (np.float32, 1)
        feeds[first] = np.eye(wide, dtype=dtype)
        given = [helper.make_tensor_value_info(first, number, [wide, wide])]
    message = 6 if kind == "MatMulInteger" else 1
    probe = helper.make_model(
        helper.make_graph(
            [node], "probe", given, [helper.make_tensor_value_info(output, message, None)],
            initializer=[constants[name] for name in node.input if name in constants],
        ),
        opset_imports=model.opset_import, ir_version=model.ir_version,
    )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        probe.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (result,) = session.run(None, feeds)
    return result if kind == "DequantizeLinear" else result.T


def main(file: str, request: str, answer: str) -> None:
    """Load, unpack each weight, write."""
    import numpy as np
    import onnx
    import torch
    from safetensors.torch import save_file

    del request
    model = onnx.load(file)
    constants = {item.name: item for item in model.graph.initializer}
    result: dict[str, Any] = {
        name: onnx.numpy_helper.to_array(item)
        for name, item in constants.items()
        if not name.endswith(".levels")
    }
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in result:
            result[node.input[1]] = result[node.input[1]].T
        if node.op_type not in _PACKED:
            continue
        packed = next(name for name in node.input if name.endswith(".levels"))
        name = packed.removesuffix(".levels")
        weight = _weight(model, node, constants)
        if node.op_type == "MatMulInteger":
            weight = weight.astype(np.float32) / result[f"{name}.scale"]
        result[f"{name}.weight"] = weight
    tensors = {
        name: torch.from_numpy(np.array(value, dtype=np.float32, order="C"))
        for name, value in result.items()
    }
    save_file(tensors, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
