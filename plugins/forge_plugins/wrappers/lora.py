"""Adapters of low rank beside linear layers that are frozen (LoRA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from forge_kernel.api import (
    Kind,
    LazyModule,
    Order,
    PluginError,
    PluginInfo,
    Run,
    hookimpl,
    stream_seed,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from forge_plugins.mathematics.networks import low_rank_adapter
else:
    torch = LazyModule("torch")
    low_rank_adapter = LazyModule("forge_plugins.mathematics.networks.low_rank_adapter")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Size of the adapters, and the layers that have one."""

    rank: Annotated[
        int, Meta(ge=1, le=4096, description="of the product of two matrices that is learned")
    ] = 8
    alpha: Annotated[
        float, Meta(gt=0, description="the product counts alpha / rank times")
    ] = 16.0  # fmt: skip
    dropout: Annotated[
        float, Meta(ge=0, lt=1, description="share of an adapter's input left out while training")
    ] = 0.0
    targets: Annotated[
        Annotated[tuple[Annotated[str, Meta(min_length=1)], ...], Meta(min_length=1)] | None,
        Meta(description="names of layers that get an adapter; glob pattern (of what matches, the "
             "linear layers); null: all linear layers but a language model's head"),
    ] = None  # fmt: skip
    also: Annotated[
        tuple[Annotated[str, Meta(min_length=1)], ...],
        Meta(description="names of modules that are trained in full beside the adapters, such as a "
             "new head (modules_to_save of PEFT); glob pattern"),
    ] = ()  # fmt: skip


class Lora:
    """Adapters of low rank beside linear layers that are frozen (LoRA).

    Nothing of the model itself is changed, on levels or not: the adapters (Hu et al. 2021, arXiv
    2106.09685) are all that is trained of it. The exporter `lora` writes them for PEFT.
    """

    info = PluginInfo(
        name="lora",
        kind=Kind.WRAPPERS,
        config=LoraConfig,
        order=Order(before=("compile", "activation_checkpointing"), after=("start_from",)),
        provides=("model:adapters",),
        conflicts=(
            "wrappers.lora", "exporters.gguf", "exporters.onnx", "exporters.packed_ternary",
            "exporters.transformers",
        ),
    )  # fmt: skip

    def __init__(self, config: LoraConfig) -> None:
        self.config = config
        self._counts = (0, 0, 0)

    @hookimpl
    def transform_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Freeze the model and set the adapters beside its layers, in place.

        Raises:
            PluginError: a pattern names no linear layer.
        """
        config = self.config
        model, _ = low_rank_adapter.differentiable(model)
        setting = "also"
        try:
            full = low_rank_adapter.trained_in_full(model, config.also)
            setting = "targets"
            layers = low_rank_adapter.chosen(model, config.targets, full)
        except ValueError as error:
            raise PluginError(f"lora: {error} (wrappers.lora.{setting})") from error
        model.requires_grad_(False)
        low_rank_adapter.freeze_running_means(model, full)
        whole = sum(parameter.numel() for parameter in model.parameters())
        generator = torch.Generator().manual_seed(stream_seed(run.seed, "lora"))
        trained = 0
        for name in full:
            for parameter in model.get_submodule(name).requires_grad_(True).parameters():
                trained += parameter.numel()
                whole -= parameter.numel()
        for layer in layers.values():
            adapter = low_rank_adapter.LowRankAdapter(
                low_rank_adapter.features_of(layer),
                config.rank, config.alpha, config.dropout, generator,
            )  # fmt: skip
            adapter.train(layer.training)
            low_rank_adapter.set_beside(layer, adapter)
            trained += sum(parameter.numel() for parameter in adapter.parameters())
        self._counts = len(layers), trained, whole
        return model

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Say how much is trained; a resumed run's record has it."""
        layers, trained, whole = self._counts
        if not run.progress.step:
            run.emit_event(
                "adapters",
                f"{layers} layers have adapters of rank {self.config.rank}: {trained:,} parameters "
                f"are trained, {whole:,} are frozen.",
                layers=layers,
                trained=trained,
                frozen=whole,
            )
