"""BitNet: few-level weights and activations in the linear layers."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from msgspec import Meta

from forge_kernel.api import (
    Kind,
    LazyModule,
    MetricInfo,
    PluginError,
    PluginInfo,
    Run,
    Step,
    hookimpl,
    stream_seed,
)
from forge_plugins.mathematics.quantization.scheme import (
    ACTIVATION_BITS,
    SKIPPED,
    WEIGHT_BITS,
    Scheme,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from forge_plugins.mathematics.quantization import (
        bit_layer,
        conversion,
        device_kernels,
        quantized_linear,
        warmup,
        weight_statistics,
    )
    from forge_plugins.mathematics.quantization.bit_layer import BitLayer
else:
    bit_layer = LazyModule("forge_plugins.mathematics.quantization.bit_layer")
    warmup = LazyModule("forge_plugins.mathematics.quantization.warmup")
    conversion = LazyModule("forge_plugins.mathematics.quantization.conversion")
    device_kernels = LazyModule("forge_plugins.mathematics.quantization.device_kernels")
    weight_statistics = LazyModule("forge_plugins.mathematics.quantization.weight_statistics")
    quantized_linear = LazyModule("forge_plugins.mathematics.quantization.quantized_linear")

ACCOUNT = "quantization.json"
"""File of the run folder that says which layers are quantized and which are not, and why."""


@dataclass(frozen=True, kw_only=True)
class BitNetConfig:
    """Levels of what the layers apply, how they are reached, and which layers stay as they are."""

    renamed: ClassVar[Mapping[str, str]] = {
        "measure": "scale_statistic",
        "straight_through": "ste",
        "warmup_share": "warmup_fraction",
        "figures": "metrics",
    }
    renamed_values: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "straight_through": {"plain": "identity", "off": "none"}
    }

    weight_bits: Annotated[
        float,
        Meta(description="1: {-1, 1} round the mean; 1.58: {-1, 0, 1}; 2, 4, 8: symmetric integer "
             "grid; 16, 32: weights as they are",
             extra_json_schema={"enum": list(WEIGHT_BITS)}),
    ] = 1.58  # fmt: skip
    activation_bits: Annotated[
        int,
        Meta(description="8, 4: integer grid of the largest value; 16, 32: activations as they are",
             extra_json_schema={"enum": list(ACTIVATION_BITS)}),
    ] = 8  # fmt: skip
    scale_statistic: Annotated[
        Literal["absmean", "absmedian", "absmax"] | None,
        Meta(description="what the step between weights is taken from; null: absmean for 1 and "
             "1.58 bits, absmax for more"),
    ] = None  # fmt: skip
    granularity: Annotated[
        Literal["tensor", "row", "group"],
        Meta(description="which weights share a step: all, those of an output, groups of inputs"),
    ] = "tensor"
    group_size: Annotated[
        int, Meta(ge=1, description="inputs in a group (granularity group); divides the row")
    ] = 128
    activation_granularity: Annotated[
        Literal["token", "tensor"],
        Meta(description="which activations share a step (token: of a convolution, a sample)"),
    ] = "token"
    rounding: Annotated[
        Literal["deterministic", "stochastic", "learned_threshold"],
        Meta(description="to the nearest level; at random with the latent weight as the mean, "
             "while training (drawn once a step); or with a learned border between levels"),
    ] = "deterministic"  # fmt: skip
    threshold_rate: Annotated[
        float, Meta(gt=0, description="how many times faster than weights a learned border moves")
    ] = 10.0
    ste: Annotated[
        Literal["identity", "clipped", "none"],
        Meta(description="gradient of the rounding: passed on, passed within the grid, or none "
             "(then only biases, norms, thresholds and unquantized layers are trained)"),
    ] = "identity"  # fmt: skip
    parity: Annotated[
        Literal["hf", "torchao"],
        Meta(description="whose arithmetic is followed: transformers' AutoBitLinear bit for bit, "
             "or torchao's bitnet_training"),
    ] = "hf"  # fmt: skip
    arithmetic: Annotated[
        Literal["exact", "int8", "int8_bf16_backward", "int8_backward"],
        Meta(description="exact: dequantized values are multiplied; int8: whole numbers in the "
             "forward pass (the same result up to rounding); int8_bf16_backward: bf16 products "
             "on the way back (gradients off by about 3e-3); int8_backward: whole numbers on the "
             "way back too, for speed on a GPU (the weights' gradients off by about 1e-2)"),
    ] = "exact"  # fmt: skip
    warmup_start: Annotated[
        int,
        Meta(ge=0, description="steps in full precision before the levels are blended in; they "
             "cost what plain layers cost"),
    ] = 0  # fmt: skip
    warmup_steps: Annotated[
        int, Meta(ge=0, description="steps over which the levels are blended in")
    ] = 0
    warmup_curve: Annotated[
        Literal["linear", "exponential", "sigmoid"], Meta(description="how the blend rises")
    ] = "linear"
    warmup_order: Annotated[
        Literal["together", "first_to_last", "last_to_first"],
        Meta(description="all layers at once, or one after the other over the same steps, from "
             "the input or from the output on"),
    ] = "together"  # fmt: skip
    warmup_fraction: Annotated[
        float,
        Meta(gt=0, lt=1, description="longest share of the run that the blend, and the ramp of "
             "the sparsity, may take: longer ones are shortened, and said to be; so is a blend "
             "that would end with the run or after it, to end here"),
    ] = 0.5  # fmt: skip
    target_sparsity: Annotated[
        float,
        Meta(ge=0, lt=1, description="smallest fraction of exact zeros in each applied weight"),
    ] = 0.0
    sparsity_warmup_steps: Annotated[
        int,
        Meta(ge=0, description="steps over which the sparsity rises to its target, from "
             "warmup_start on"),
    ] = 0  # fmt: skip
    sub_norm: Annotated[
        tuple[str, ...],
        Meta(description="layers that get an RMSNorm in front (SubLN), by name; glob pattern"),
    ] = ()
    convolutions: Annotated[bool, Meta(description="quantize nn.Conv2d too")] = False
    skip: Annotated[
        tuple[str, ...],
        Meta(
            description="layers left as they are, by name; glob pattern, "
            "output_embeddings also for what get_output_embeddings() of a live model gives"
        ),
    ] = SKIPPED
    metrics: Annotated[
        Literal["totals", "layers"],
        Meta(description="metrics over all layers, or those of each layer as well"),
    ] = "totals"

    def __post_init__(self) -> None:
        scheme = self.scheme()
        if self.target_sparsity and not scheme.quantizes_weight:
            raise ValueError(
                f"target_sparsity {self.target_sparsity:g} is of levels, and weight_bits "
                f"{self.weight_bits:g} has none"
            )
        if self.sparsity_warmup_steps and not self.target_sparsity:
            raise ValueError("sparsity_warmup_steps without a target_sparsity does nothing")
        if self.threshold_rate != 10.0 and self.rounding != "learned_threshold":
            raise ValueError("threshold_rate is read by rounding: learned_threshold only")
        if not (scheme.quantizes_weight or scheme.quantizes_activation):
            for name in ("warmup_steps", "warmup_start"):
                if getattr(self, name):
                    raise ValueError(f"{name} without weight_bits or activation_bits does nothing")
        if self.warmup_order != "together" and not self.warmup_steps:
            raise ValueError(f"warmup_order {self.warmup_order} without warmup_steps does nothing")

    def scheme(self) -> Scheme:
        """What the layers apply.

        Raises:
            ValueError: the settings cannot work together.
        """
        return Scheme(
            weight_bits=self.weight_bits,
            scale_statistic=self.scale_statistic,
            granularity=self.granularity,
            group_size=self.group_size,
            activation_bits=self.activation_bits,
            activation_granularity=self.activation_granularity,
            rounding=self.rounding,
            ste=self.ste,
            parity=self.parity,
            arithmetic=self.arithmetic,
            threshold_rate=self.threshold_rate,
        )


def _provided(config: BitNetConfig) -> tuple[str, ...]:
    if config.weight_bits >= 16:
        return ()
    # the levels of 1 and 2 bits are among -1, 0 and 1 as well
    kinds = {1: ("model:binary", "model:ternary"), 1.58: ("model:ternary",), 2: ("model:ternary",)}
    return ("model:quantized", *kinds.get(config.weight_bits, ()))


class BitNet:
    """BitNet: few-level weights and activations in the linear layers.

    Where the run has a folder, `quantization.json` there says what became of each layer, and what
    was done otherwise than asked for.
    """

    info = PluginInfo(
        name="bitnet",
        kind=Kind.QUANTIZER,
        config=BitNetConfig,
        provides=_provided,
        metrics=(
            *(
                MetricInfo(name, unit, title=title, section="Quantized weights")
                for name, unit, title in (
                    ("weight_sparsity", "share", "Weights that are zero, share"),
                    ("weight_flips", "share", "Weights that changed level, share"),
                    ("quantization_error", "share", ""),
                    ("warmup_lambda", "share", ""),
                    ("latent_mean", "", "Latent weights, mean"),
                    ("latent_std", "", "Latent weights, deviation"),
                    ("latent_kurtosis", "", "Latent weights, kurtosis"),
                    ("level_*", "share", ""),
                )
            ),
        ),
    )

    def __init__(self, config: BitNetConfig) -> None:
        self.config = config
        self._layers: dict[str, BitLayer] = {}
        self._quantization: Any = None
        self._in_order: list[Any] = []  # of layers that are quantized one after the other
        self._account: dict[str, Any] = {}
        self._summary = ""
        self._notices: list[str] = []
        self._start = self._warmup = self._ramp = 0
        self._before: dict[str, Tensor] = {}  # levels before the update that a log line is due for
        self._before_step = 0

    @hookimpl
    def transform_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Replace the layers in place (a bare linear layer: the new one).

        Raises:
            PluginError: no layer can be quantized, or the settings do not fit one.
        """
        config, scheme = self.config, self.config.scheme()
        self._notices = []
        self._quantization = bit_layer.QuantizationState()
        if not (scheme.quantizes_weight or scheme.quantizes_activation):
            self._notices.append("weights and activations stay as they are: nothing is quantized")
            return model
        try:
            model, report = conversion.convert_model_to_bitnet(
                model,
                scheme,
                quantization=self._quantization,
                skip=config.skip,
                convolutions=config.convolutions,
                sub_norm=config.sub_norm,
            )
        except ValueError as error:
            raise PluginError(f"bitnet: {error}") from error
        if not report.layers:
            left = "".join(f"; {name}: {why}" for name, why in list(report.left.items())[:5])
            raise PluginError(
                f"bitnet found no linear layer to quantize in {type(model).__name__}: "
                f"skip is {list(config.skip)}{left}"
            )
        self._layers = dict(report.layers)
        self._account = report.to_data()
        self._summary = report.summary() if scheme.quantizes_weight else ""
        # a draw holds for a whole step; else keeping pays when a weight is used more than once
        keeps = run.settings.accumulate > 1 or config.rounding == "stochastic"
        for place, layer in enumerate(self._layers.values()):
            layer.weight_cache.enabled, layer.layer_index = keeps, place
        self._in_order = [] if config.warmup_order == "together" else self._each_its_own()
        self._plan_warmup(run)
        self._take_notice(run)
        return model

    def _each_its_own(self) -> list[Any]:
        """States of the layers, in the order in which they are quantized.

        Layers that share a weight, or are on their levels from the start, are no stages of it.
        """
        states: dict[int, Any] = {}
        for layer in self._layers.values():
            if not layer.continued:
                state = states.setdefault(
                    id(bit_layer.latent(layer)), bit_layer.QuantizationState()
                )
                layer.quantization = state
        result = list(states.values())
        return result[::-1] if self.config.warmup_order == "last_to_first" else result

    def _plan_warmup(self, run: Run) -> None:
        config, total = self.config, run.total_steps
        asked = {"warmup_start": config.warmup_start, "warmup_steps": config.warmup_steps,
                 "sparsity_warmup_steps": config.sparsity_warmup_steps}  # fmt: skip
        share = config.warmup_fraction
        start, steps = warmup.fitting_window(config.warmup_start, config.warmup_steps, total, share)
        ramp = warmup.fitting(config.sparsity_warmup_steps, total, share)
        if start and total is not None:
            ramp = min(ramp, max(0, total - 1 - start))
        result = {"warmup_start": start, "warmup_steps": steps, "sparsity_warmup_steps": ramp}
        for name, wanted in asked.items():
            if result[name] < wanted:
                self._notices.append(
                    f"{name} {wanted} is too long for {share:g} of the run's "
                    f"{total} steps: shortened to {result[name]}"
                )
            if wanted and total is None:
                self._notices.append(
                    f"the run's length in steps is not known: if it ends before {name} ({wanted}) "
                    "is over, the model is not fully quantized"
                )
        self._start, self._warmup, self._ramp = start, steps, ramp

    def _take_notice(self, run: Run) -> None:
        """What the user should know of how the settings are met here."""
        config, device = self.config, run.device.type
        if config.ste == "none" and config.weight_bits < 16:
            self._notices.append(
                "ste is none: the weights of quantized layers get no gradient and "
                "keep their values; only biases, norms, thresholds and other layers are trained"
            )
        if plain := device_kernels.lacks_kernels(device):
            self._notices.append(f"quantization takes many passes over memory here: {plain}")
        if config.arithmetic != "exact":
            lacking = quantized_linear.lacks_int8(device)
            if lacking:
                self._notices.append(
                    f"arithmetic {config.arithmetic}: {lacking}; the exact path is taken"
                )
            elif config.arithmetic == "int8_bf16_backward":
                slow = quantized_linear.lacks_bf16(device)
                if slow:
                    self._notices.append(f"arithmetic int8_bf16_backward is slow here: {slow}")
        for notice in self._notices:
            logging.getLogger("forge_plugins.bitnet").warning("bitnet: %s", notice)

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Say what became of each layer; set what the first step applies."""
        self._settle(run)
        if self._summary and not run.progress.step:  # a resumed run's record has it
            account = self._account
            run.emit_event(
                "quantized",
                f"bitnet: {self._summary}.",
                weights=account["weights"],
                converted_weights=account["converted_weights"],
                left_weights=account["weights"] - account["converted_weights"],
            )
        if run.folder is not None:
            account = {
                "weight_bits": self.config.weight_bits,
                "activation_bits": self.config.activation_bits,
                "arithmetic": self.config.arithmetic,
                "warmup_start": self._start,
                "warmup_steps": self._warmup,
                "sparsity_warmup_steps": self._ramp,
                "notices": self._notices,
                **self._account,
            }
            text = json.dumps(account, indent=1, allow_nan=False) + "\n"
            (run.folder / ACCOUNT).write_text(text, encoding="utf-8")

    def _settle(self, run: Run) -> None:
        """Bring blend and sparsity to the number of steps done."""
        quantization, done = self._quantization, run.progress.step
        seed = None
        if self.config.rounding == "stochastic":
            seed = quantization.seed = stream_seed(run.seed, "rounding", done)
        passed, curve = done - self._start, self.config.warmup_curve
        quantization.warmup_lambda = warmup.warmup_lambda(passed, self._warmup, curve)
        quantization.steps = max(0, passed - self._warmup)
        ramp = warmup.warmup_lambda(passed, self._ramp, "linear")
        quantization.sparsity = self.config.target_sparsity * ramp
        count = len(self._in_order)
        for place, state in enumerate(self._in_order):
            state.warmup_lambda = warmup.layer_lambda(passed, self._warmup, place, count, curve)
            state.steps, state.sparsity, state.seed = (
                quantization.steps, quantization.sparsity, seed,
            )  # fmt: skip

    @hookimpl
    def unfinished(self, run: Run) -> str | None:
        """Levels or zeros that are still on their way."""
        del run
        quantization = self._quantization
        if quantization is None or not self._layers:
            return None
        if quantization.warmup_lambda < 1.0:
            return f"bitnet: the levels are blended in at {self._mean_lambda():.3g}"
        if quantization.sparsity < self.config.target_sparsity:
            wanted = self.config.target_sparsity
            return f"bitnet: the sparsity is {quantization.sparsity:.3g} of {wanted:g}"
        return None

    def _mean_lambda(self) -> float:
        """Share of the quantized values, over the layers."""
        shares = [state.warmup_lambda for state in self._in_order or [self._quantization]]
        return float(sum(shares) / len(shares))

    @hookimpl
    def on_weights_changed(self, run: Run) -> None:
        """The kept quantized weights are of the old ones."""
        for layer in self._layers.values():
            layer.invalidate()
        self._settle(run)  # after a restore the step is another

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        """A step of the warm-up is done."""
        self._settle(run)

    @hookimpl
    def on_gradients(self, run: Run, step: Step) -> None:
        """Remember the levels when a log line is due: the flips of this step are told there."""
        del run
        if not step.logs or self.config.weight_bits >= 16:
            return
        layers = {id(layer): (name, layer) for name, layer in self._layers.items()}
        self._before = {name: layer.levels()[0] for name, layer in layers.values()}
        self._before_step = step.number

    @hookimpl
    def log_metrics(self, run: Run, step: Step) -> dict[str, Any]:
        """Error, sparsity, flips, levels and latent distribution, over all layers and of each."""
        metrics: dict[str, Any] = {}
        if self._warmup or self._start:
            metrics["warmup_lambda"] = self._mean_lambda()
        layers = {id(layer): (name, layer) for name, layer in self._layers.items()}
        if not layers or self.config.weight_bits >= 16:
            return metrics
        before = self._before if self._before_step == run.progress.step else {}
        self._before = {}
        qmax = self.config.scheme().qmax
        total: Tensor | None = None
        for name, layer in layers.values():
            sums = weight_statistics.weight_sums(layer, before.get(name))
            total = sums if total is None else total + sums
            if self.config.metrics == "layers":
                result = weight_statistics.weight_metrics(sums, qmax)
                metrics |= {f"{metric}/{name}": value for metric, value in result.items()}
        assert total is not None
        return metrics | weight_statistics.weight_metrics(total, qmax)
