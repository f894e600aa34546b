"""The network as a GGUF file for llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginError, PluginInfo, Run, hookimpl

if TYPE_CHECKING:
    from torch import nn

    from forge_plugins.clients import llama_cpp_rounding, reading, verification
    from forge_plugins.interchange import (
        gguf,
        gguf_model,
        llama_cpp_tokenizer,
        tokenizer_files,
        tokenizer_texts,
    )
    from forge_plugins.mathematics.text import tokenizer_library
    from forge_plugins.mathematics.text.tokenizers import Tokenizer
else:
    llama_cpp_rounding = LazyModule("forge_plugins.clients.llama_cpp_rounding")
    reading = LazyModule("forge_plugins.clients.reading")
    verification = LazyModule("forge_plugins.clients.verification")
    gguf = LazyModule("forge_plugins.interchange.gguf")
    gguf_model = LazyModule("forge_plugins.interchange.gguf_model")
    llama_cpp_tokenizer = LazyModule("forge_plugins.interchange.llama_cpp_tokenizer")
    tokenizer_files = LazyModule("forge_plugins.interchange.tokenizer_files")
    tokenizer_library = LazyModule("forge_plugins.mathematics.text.tokenizer_library")
    tokenizer_texts = LazyModule("forge_plugins.interchange.tokenizer_texts")

WORST = 0.02  # relative L2, under llama.cpp's own rounding: ten times what was found

UNKNOWN_CHARACTERS = (
    "llama.cpp leaves characters out that are not in the alphabet, where the training has "
    "<|unknown|>: texts with such characters are not compared"
)


@dataclass(frozen=True, kw_only=True)
class GgufConfig:
    """Types of the tensors."""

    type: Annotated[
        Literal["tq2_0", "tq1_0", "q2_0", "q1_0", "q4_0"],
        Meta(
            description="of the quantized weights: tq2_0 takes 2.06 bits each, tq1_0 1.69 (rows of "
            "a multiple of 256), q2_0 2.25 (of 64; recent builds), q1_0 1.13 (of 128, for "
            "weight_bits: 1; recent builds), q4_0 4.5 (of 32)"
        ),
    ] = "tq2_0"
    scale: Annotated[
        Literal["block", "tensor"],
        Meta(
            description="where the scale stands: fp16 in each block (any llama.cpp reads it), or "
            "exactly, in a tensor of its own (recent builds)"
        ),
    ] = "block"
    other: Annotated[
        Literal["f16", "f32"], Meta(description="type of embedding, head and unquantized layers")
    ] = "f16"
    verify: Annotated[
        bool, Meta(description="load the file in llama.cpp, where installed, and compare")
    ] = True


def _tokenizer(run: Run) -> Tokenizer | None:
    """That of the run's data, if it has one."""
    result: Tokenizer | None = getattr(run.data, "tokenizer", None)
    return result


def requirements(config: GgufConfig) -> tuple[str, ...]:
    """What llama.cpp computes, in rows that fill the blocks."""
    levels = "model:binary" if config.type == "q1_0" else "model:ternary"
    needs = (levels, "model:llama_cpp")
    return (*needs, "model:rows_of_256") if config.type in ("tq2_0", "tq1_0") else needs


class Gguf:
    """The network as a GGUF file for llama.cpp.

    Writes `model.gguf` with its vocabulary, then asks llama.cpp for its probabilities. Of the
    transformers library it takes Llama, Mistral, Qwen 2 and 3, Gemma 3, Phi-3 and BitNet models.
    """

    info = PluginInfo(
        name="gguf",
        kind=Kind.EXPORTERS,
        config=GgufConfig,
        requires=requirements,
        alternatives="llama.cpp computes llama_decoder with activation: silu, and of transformers "
        "llama, mistral, qwen2, qwen3, gemma3_text, phi3 and bitnet with the activation that it "
        "has for each; type: q2_0 takes rows of any multiple of 64, q4_0 of 32; packed_ternary and "
        "state_dict (weights: applied) hold any levels, and state_dict any network",
    )

    def __init__(self, config: GgufConfig) -> None:
        self.config = config

    @hookimpl
    def check_export(self, run: Run) -> str | None:
        """What llama.cpp cannot compute, and a tokenizer that it would read otherwise."""
        kind, scale_tensors = self.config.type, self.config.scale == "tensor"
        try:
            sizes = gguf_model.check_gguf(run.model, kind, scale_tensors=scale_tensors)
            _ = tokenizer_files.gguf_vocabulary(_tokenizer(run), sizes.vocabulary)
        except ValueError as error:
            return str(error)
        return None

    @hookimpl
    def export(self, run: Run, folder: Path) -> Mapping[str, Any]:
        """Write the file and load it again.

        Raises:
            PluginError: the model is of another architecture, has no ternary layer or computes
                what llama.cpp does not, or llama.cpp computes something else.
        """
        config, tokenizer, model = self.config, _tokenizer(run), run.active_model
        scale_tensors = config.scale == "tensor"
        try:
            sizes = gguf_model.check_gguf(model, config.type, scale_tensors=scale_tensors)
            tensors = gguf_model.gguf_tensors(
                model, config.type, scale_tensors=scale_tensors, other=config.other
            )
            entries = gguf_model.gguf_entries(model, config.type, tokenizer, run.settings.name)
        except ValueError as error:
            raise PluginError(f"gguf: {error}") from error
        file = folder / "model.gguf"
        gguf.write_gguf(file, entries, tensors)
        return {
            "format": f"gguf {config.type}",
            "architecture": entries["general.architecture"],
            "scale": config.scale,
            "context": sizes.context,
            "unquantized": gguf_model.unquantized(tensors),
            "step": run.progress.step,
            "bytes": file.stat().st_size,
            "verified": self._verified(run, file, model, sizes.context),
        }

    def _verified(self, run: Run, file: Path, model: nn.Module, context: int) -> dict[str, Any]:
        config = self.config
        if not config.verify:
            return verification.NOT_ASKED
        meant = gguf_model.gguf_numbers(
            model, config.type, scale_tensors=config.scale == "tensor", other=config.other
        )
        # the package gguf does not know the recent types
        recent = config.type in ("q2_0", "q1_0")
        client = reading.LLAMA_CPP_WEIGHTS if recent else reading.GGUF_WEIGHTS
        result = reading.compared_weights(client, file, meant)
        texts = _texts(_tokenizer(run))
        result |= reading.compared_texts(reading.LLAMA_CPP_TOKENS, file, texts)
        room = context - 1  # one place is for the token that is generated
        if room < 1:
            why = "a context of one token leaves llama.cpp no room"
            return verification.not_verified(why) | result
        inputs = verification.sample_inputs(run.data.validation(), 2, min(32, room))

        def rounded() -> nn.Module:
            return llama_cpp_rounding.as_llama_cpp(
                model, config.type, scale_tensors=config.scale == "tensor", other=config.other
            )

        return result | verification.verify(
            verification.LLAMA_CPP, file, inputs, model, worst=WORST, rounded=rounded
        )


def _texts(tokenizer: Tokenizer | None) -> reading.Texts | None:
    """What to compare tokens of: the texts that both programs are to cut alike."""
    if tokenizer is None:
        return None
    specials: list[str] | None = None
    rare: frozenset[int] = frozenset()
    unknown = getattr(tokenizer, "unknown", None)
    note = None if unknown is None else UNKNOWN_CHARACTERS
    if isinstance(tokenizer, tokenizer_library.LibraryTokenizer):
        specials = tokenizer.specials()
        rare = llama_cpp_tokenizer.rare_bytes(tokenizer)
        note = llama_cpp_tokenizer.rare_bytes_note(rare) if rare else note
    texts, tokens = [], []
    for text in tokenizer_texts.probe_texts(specials or ()):
        result = tokenizer.encode(text).tolist()
        if unknown not in result and rare.isdisjoint(text.encode()):
            texts.append(text)
            tokens.append(result)
    return reading.Texts(texts, tokens, specials=specials is not None, note=note)
