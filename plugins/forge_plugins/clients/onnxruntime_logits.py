"""Outputs of an ONNX file by onnxruntime."""

from __future__ import annotations

import sys


def main(file: str, request: str, answer: str) -> None:
    """Load, run, write."""
    import onnxruntime
    import torch
    from safetensors.torch import load_file, save_file

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    inputs = load_file(request)["inputs"].numpy()
    (result,) = session.run(None, {session.get_inputs()[0].name: inputs})
    save_file({"logits": torch.from_numpy(result).contiguous()}, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
