"""All weights of a GGUF file, unpacked by the package gguf of the llama.cpp project."""

from __future__ import annotations

import sys


def main(file: str, request: str, answer: str) -> None:
    """Read, unpack, write."""
    import gguf
    import numpy as np
    import torch
    from safetensors.torch import save_file

    del request
    result = {}
    for tensor in gguf.GGUFReader(file).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        result[tensor.name] = torch.from_numpy(np.array(values, dtype=np.float32))
    save_file(result, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
