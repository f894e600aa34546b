"""Tokens of texts by llama.cpp (through the wheel xllamacpp)."""

from __future__ import annotations

import json
import os
import sys
import urllib.request


def main(file: str, request: str, answer: str) -> None:
    """Load, ask the server for the tokens of each text, write."""
    from safetensors.torch import load_file, save_file

    from forge_plugins.clients.llama_cpp_logits import server_of
    from forge_plugins.clients.reading import as_data, as_tensor

    asked = load_file(request)
    server = server_of(file, 64)
    here = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never by a proxy
    result = []
    for text in as_data(asked["texts"]):
        wanted = {"content": text, "add_special": False, "parse_special": bool(asked["specials"])}
        post = urllib.request.Request(  # noqa: S310  the address of the server in this process
            f"{server.listening_address}/tokenize",
            json.dumps(wanted).encode(),
            {"Content-Type": "application/json"},
        )
        with here.open(post, timeout=60) as reply:
            result.append(json.loads(reply.read())["tokens"])
    save_file({"tokens": as_tensor(result)}, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # the answer is written: llama.cpp's server may wait for ever for its own threads
