"""All weights of a GGUF file, unpacked by llama.cpp itself (the library in the wheel xllamacpp)."""

from __future__ import annotations

import ctypes
import sys
from typing import Any, Final

_NAMES: Final = {0: "f32", 1: "f16", 2: "q4_0", 34: "tq1_0", 35: "tq2_0", 41: "q1_0", 42: "q2_0"}
"""ggml's numbers of the types that are written here."""
_BYTES: Final = {"f32": 4, "f16": 2}


class _Options(ctypes.Structure):
    """`gguf_init_params`: descriptions alone, no tensor in memory."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


def _library() -> Any:
    """llama.cpp's functions, or None: this build keeps them to itself."""
    import xllamacpp

    try:
        library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
        for name, result in (
            ("gguf_init_from_file", ctypes.c_void_p),
            ("gguf_get_n_tensors", ctypes.c_int64),
            ("gguf_get_tensor_name", ctypes.c_char_p),
            ("gguf_get_tensor_type", ctypes.c_int),
            ("gguf_get_tensor_offset", ctypes.c_size_t),
            ("gguf_get_data_offset", ctypes.c_size_t),
            ("gguf_get_tensor_size", ctypes.c_size_t),
            ("ggml_blck_size", ctypes.c_int64),
            ("ggml_type_size", ctypes.c_size_t),
        ):
            getattr(library, name).restype = result
        for kind in ("q1_0", "q2_0"):
            _ = getattr(library, f"dequantize_row_{kind}")
    except (AttributeError, OSError):
        return None
    return library


def main(file: str, request: str, answer: str) -> None:
    """Read, unpack, write."""
    import mmap

    import torch
    from safetensors.torch import save_file

    del request
    library = _library()
    if library is None:
        save_file({"unavailable": torch.ones(1)}, answer)
        return
    context = ctypes.c_void_p(
        library.gguf_init_from_file(file.encode(), _Options(no_alloc=True, context=None))
    )
    if not context:
        sys.exit("llama.cpp cannot read the file")
    result = {}
    with (
        open(file, "rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as raw,
    ):
        begin = library.gguf_get_data_offset(context)
        for index in range(library.gguf_get_n_tensors(context)):
            place = ctypes.c_int64(index)
            kind = library.gguf_get_tensor_type(context, place)
            size = library.gguf_get_tensor_size(context, place)
            first = begin + library.gguf_get_tensor_offset(context, place)
            packed = torch.frombuffer(bytearray(raw[first : first + size]), dtype=torch.uint8)
            name = library.gguf_get_tensor_name(context, place).decode()
            result[name] = _values(library, kind, packed)
    save_file(result, answer)


def _values(library: Any, kind: int, packed: Any) -> Any:
    import torch

    name = _NAMES[kind]
    if name in _BYTES:
        return packed.view(torch.float32 if name == "f32" else torch.float16).float()
    blocks = len(packed) // library.ggml_type_size(kind)
    values = torch.empty(blocks * library.ggml_blck_size(kind))
    getattr(library, f"dequantize_row_{name}")(
        ctypes.c_void_p(packed.data_ptr()),
        ctypes.c_void_p(values.data_ptr()),
        ctypes.c_int64(len(values)),
    )
    return values


if __name__ == "__main__":
    main(*sys.argv[1:])
