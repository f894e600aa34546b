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
        wide = next((one.i for one in node.attribute if one.name == "K"), None)
        wide = wide or constants[node.input[1]].dims[0]
        dtype, number = (np.int8, 3) if kind == "MatMulInteger" else (np.float32, 1)
        feeds[first] = np.eye(wide, dtype=dtype)
        given = [helper.make_tensor_value_info(first, number, [wide, wide])]
    told = 6 if kind == "MatMulInteger" else 1
    probe = helper.make_model(
        helper.make_graph(
            [node], "probe", given, [helper.make_tensor_value_info(output, told, None)],
            initializer=[constants[name] for name in node.input if name in constants],
        ),
        opset_imports=model.opset_import, ir_version=model.ir_version,
    )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        probe.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, feeds)
    return found if kind == "DequantizeLinear" else found.T


def main(file: str, request: str, answer: str) -> None:
    """Load, unpack each weight, write."""
    import numpy as np
    import onnx
    import torch
    from safetensors.torch import save_file

    del request
    model = onnx.load(file)
    constants = {one.name: one for one in model.graph.initializer}
    found: dict[str, Any] = {
        name: onnx.numpy_helper.to_array(one)
        for name, one in constants.items()
        if not name.endswith(".levels")
    }
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in found:
            found[node.input[1]] = found[node.input[1]].T
        if node.op_type not in _PACKED:
            continue
        packed = next(name for name in node.input if name.endswith(".levels"))
        name = packed.removesuffix(".levels")
        weight = _weight(model, node, constants)
        if node.op_type == "MatMulInteger":
            weight = weight.astype(np.float32) / found[f"{name}.scale"]
        found[f"{name}.weight"] = weight
    tensors = {
        name: torch.from_numpy(np.array(value, dtype=np.float32, order="C"))
        for name, value in found.items()
    }
    save_file(tensors, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
