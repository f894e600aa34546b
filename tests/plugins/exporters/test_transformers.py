from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from clients import need
from llamas import distances, prompts, ternary_llama
from safetensors.torch import save_file

from forge_plugins.clients.verification import TRANSFORMERS, _ask
from forge_plugins.interchange.tokenizer_files import transformers_files
from forge_plugins.interchange.transformers_folder import folder_config, folder_tensors
from forge_plugins.mathematics.networks.llama import Llama, LlamaShape
from forge_plugins.mathematics.text.tokenizers import ByteTokenizer, CharacterTokenizer

FORMS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "feed_bias": True},
    "bitnet with biases": {
        "sub_norms": True, "activation": "relu2", "tied": True, "attention_bias": True,
    },
}  # fmt: skip


def client_logits(model: Llama, layout: Any, folder: Path, inputs: torch.Tensor) -> torch.Tensor:
    save_file(folder_tensors(model, layout), folder / "model.safetensors", {"format": "pt"})
    config = folder_config(model, layout, "float32", 256)
    (folder / "config.json").write_text(json.dumps(config))
    return _ask(TRANSFORMERS, folder, inputs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["bitlinear", "autobitlinear", "online"])
def test_transformers_gives_our_logits(form: str, layout: str, tmp_path: Path) -> None:
    """Packed, most prompts agree to 1e-5; in the others an int8 rounding fell to the other side."""
    need("transformers", "accelerate")
    model, inputs = ternary_llama(**FORMS[form]), prompts(8, 6)
    with torch.no_grad():
        reference = model(inputs)
    found = client_logits(model, layout, tmp_path, inputs)
    if layout == "online":
        assert torch.equal(found, reference)
    else:
        apart = distances(found, reference)
        assert float(apart.median()) <= 1e-5
        assert float(apart.max()) <= 1e-2


@pytest.mark.parametrize("form", FORMS)
def test_the_unquantized_network_is_that_of_transformers(form: str) -> None:
    """Bit for bit, with the same weights under their names."""
    need("transformers")
    from transformers import AutoConfig, AutoModelForCausalLM

    from forge_plugins.interchange.llama_names import TRANSFORMERS as NAMES
    from forge_plugins.interchange.llama_names import translate

    shape = LlamaShape(vocabulary=40, context=16, width=32, layers=2, heads=4, groups=2, hidden=48,
                       **FORMS[form])  # fmt: skip
    model = Llama(shape).eval()
    quantized = ternary_llama(**FORMS[form])
    config = folder_config(quantized, "online", "float32", None)
    config |= {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    del config["quantization_config"]
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    state = {}
    for name, value in model.state_dict().items():
        module, _, part = name.rpartition(".")
        state[f"{translate(module, NAMES, 'model.layers.{}')}.{part}"] = value
    theirs.load_state_dict(state)
    tokens = torch.randint(40, (2, 9))
    with torch.no_grad():
        assert torch.equal(model(tokens), theirs(tokens).logits)


def test_rotary_angles_stay_exact_in_a_bf16_model() -> None:
    """The table of a bf16 model is the rounded fp32 one, not one of rounded frequencies."""
    from forge_plugins.mathematics.networks.llama import rotary_table

    exact = rotary_table(torch.arange(512), 64, 1e4, torch.empty(0))
    rounded = rotary_table(torch.arange(512), 64, 1e4, torch.empty(0, dtype=torch.bfloat16))
    assert torch.equal(rounded[0], exact[0].bfloat16())
    assert not list(ternary_llama().buffers())


def test_weight_scale_and_bias_have_two_meanings() -> None:
    model = ternary_llama(attention_bias=True)
    name = "model.layers.0.self_attn.q_proj"
    packed, auto = (folder_tensors(model, kind) for kind in ("bitlinear", "autobitlinear"))
    mean = model.get_parameter("blocks.0.attention.query.weight").abs().mean()
    bias = model.get_parameter("blocks.0.attention.query.bias")
    assert torch.allclose(packed[f"{name}.weight_scale"], 1 / mean)
    assert torch.allclose(auto[f"{name}.weight_scale"], mean)
    assert torch.equal(packed[f"{name}.bias"], bias)
    assert torch.allclose(auto[f"{name}.bias"] * mean, bias)
    assert "lm_head" in folder_config(model, "bitlinear", "float32", None)["quantization_config"][
        "modules_to_not_convert"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "layout", "words"),
    [
        ({"hidden": 254}, "bitlinear", "not a multiple of 4"),
        ({"sub_norms": True, "feed_bias": True}, "online", "feed_bias: false"),
    ],
)
def test_what_transformers_cannot_compute_is_refused(
    shape: dict[str, Any], layout: Any, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        folder_tensors(ternary_llama(**shape), layout)


def test_weights_that_were_never_ternary_are_refused() -> None:
    with pytest.raises(ValueError, match="never trained to be ternary"):
        folder_tensors(Llama(LlamaShape(vocabulary=5, context=4)), "bitlinear")


def test_sixteen_bit_activations_are_refused() -> None:
    model = ternary_llama()
    query = model.blocks[0].attention.query
    query.scheme = dataclasses.replace(query.scheme, activation_bits=16)
    with pytest.raises(ValueError, match="activation_bits: 8"):
        folder_tensors(model, "bitlinear")


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharacterTokenizer.of("abé ▁\n")])
def test_the_tokenizer_of_transformers_reads_and_writes_as_ours(
    tokenizer: Any, tmp_path: Path
) -> None:
    need("transformers")
    from transformers import AutoTokenizer

    for name, content in transformers_files(tokenizer).items():
        (tmp_path / name).write_text(json.dumps(content))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "ab ▁é\nba"
    assert theirs(text).input_ids == tokenizer.encode(text).tolist()
    assert theirs.decode(theirs(text).input_ids) == text == tokenizer.decode(tokenizer.encode(text))
    assert theirs.eos_token_id == tokenizer.end
