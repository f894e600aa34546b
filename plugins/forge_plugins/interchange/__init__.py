"""Files of other programs: GGUF, ONNX, transformers' folders, packed ternary weights."""
