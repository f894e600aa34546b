"""Outputs of an ONNX file by onnxruntime, or what it makes of targets."""

from __future__ import annotations

import sys


def main(file: str, request: str, answer: str) -> None:
    """Load, run, write."""
    import onnxruntime
    import torch
    from safetensors.torch import load_file, save_file

    from forge_plugins.clients.target_answers import answers_by_logits

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def logits(inputs: torch.Tensor) -> torch.Tensor:
        (result,) = session.run(None, {name: inputs.numpy()})
        return torch.from_numpy(result)

    save_file(answers_by_logits(load_file(request), logits), answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
