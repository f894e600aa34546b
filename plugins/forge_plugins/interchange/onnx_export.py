"""A network with quantized layers as an ONNX file, by torch's own exporter.

`torch.export` follows the forward pass of a copy whose quantized layers hold packed weights, and
`torch.onnx` turns what it found into operators. The graph is not optimized here: folding constants
would unpack them and part weights that are tied; onnxruntime does that when it loads the file.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from onnx_ir.passes import common
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from forge_plugins.interchange.onnx_layers import (
    PACKED,
    Encoding,
    PackedLayer,
    check_layers,
    pack_layers,
)
from forge_plugins.interchange.onnx_weight import numbers_of
from forge_plugins.mathematics.metrics.label_positions import main_output

INPUT: Final = "inputs"
OUTPUT: Final = "logits"
IR_VERSIONS: Final = {23: 11, 25: 13}
"""The first version of the format that has an operator set."""
LARGEST: Final = 2_000_000_000
"""Bytes of tensors that a single file holds: a protocol buffer ends at 2 GiB."""
_CHATTER: Final = {
    "torch.onnx._internal.exporter._registration": "torchvision is not installed",
    "torch.fx.experimental.symbolic_shapes": "Unable to find user code",
}
_HALF: Final = (torch.float16, torch.bfloat16)
_REASON: Final = 600  # characters


@dataclass(frozen=True, slots=True)
class OnnxNetwork:
    """What is to be written.

    Args:
        model: the graph with its tensors.
        opset: version of the standard's operators.
        numbers: what each stored tensor of the network stands for, fp32, by the name under which a
            reader of the file finds it: that of the state, or the layer's with `.packed`.
        packed_bytes: of the packed weights with their steps.
        packed_weights: how many numbers they hold.
        other_bytes: of all other tensors.
        free_length: whether sequences may be of another length than the example's.
    """

    model: ir.Model
    opset: int
    numbers: dict[str, Tensor]
    packed_bytes: int
    packed_weights: int
    other_bytes: int
    free_length: bool


def export_network(
    model: nn.Module,
    inputs: Tensor,
    encoding: Encoding,
    *,
    finished: bool = True,
    free_length: bool = True,
) -> OnnxNetwork:
    """Follow a network's forward pass and turn it into a graph.

    Args:
        model: with quantized layers; it is not touched.
        inputs: a few samples, whose number and, for tokens and sequences, length may be others
            later.
        encoding: of the packed weights.
        finished: refuse layers that are not on their levels yet.
        free_length: leave the second size of the inputs free where the network allows it.

    Raises:
        ValueError: a layer that the encoding cannot hold or that is not finished, a forward pass
            that `torch.export` cannot follow, or an operation that ONNX does not have; with
            torch's reason and the module's name.
    """
    model = _unwrapped(model)
    check_layers(model, encoding)
    copy = _evaluated_copy(model)
    packed = pack_layers(copy, encoding, finished=finished)
    opset = max(layer.packed.opset for layer in packed.values())
    graph = _graph(copy, inputs, opset, free_length=free_length)
    _tidy(graph)
    _set_types(graph, packed)
    _name_sizes(graph)
    _halve(graph, model)
    graph.ir_version = IR_VERSIONS[opset]
    return _described(graph, opset, copy, packed)


def write_network(network: OnnxNetwork, file: Path) -> list[Path]:
    """Write the file; tensors beyond what it can hold lie beside it.

    Returns:
        What was written: the file, and perhaps `<file>.data`.
    """
    if network.packed_bytes + network.other_bytes <= LARGEST:
        ir.save(network.model, file)
        return [file]
    beside = file.with_name(f"{file.name}.data")
    ir.save(network.model, file, external_data=beside.name)
    return [file, beside]


# -- the copy --------------------------------------------------------------------------------------


def _unwrapped(model: nn.Module) -> nn.Module:
    """The network behind a compiler's module."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def _evaluated_copy(model: nn.Module) -> nn.Module:
    """In fp32 on the CPU, in evaluation, not compiled."""
    try:
        copy = deepcopy(model)
    except Exception as error:
        raise ValueError(
            f"the model cannot be copied to be exported: {_reason(error)}; let copy.deepcopy take "
            "it, or export with packed_ternary or state_dict"
        ) from error
    copy = copy.to("cpu", torch.float32).eval().requires_grad_(False)
    for module in copy.modules():
        module._compiled_call_impl = None
    return copy


# -- torch.export and torch.onnx -------------------------------------------------------------------


def _graph(copy: nn.Module, inputs: Tensor, opset: int, *, free_length: bool) -> ir.Model:
    """The graph, for sequences of any length where the network allows that."""
    if free_length and inputs.dim() in (2, 3):
        try:
            return _converted(_followed(copy, inputs, {0: Dim.DYNAMIC, 1: Dim.AUTO}), opset)
        except ValueError:  # perhaps for want of a fixed length; else it is told below
            pass
    return _converted(_followed(copy, inputs, {0: Dim.DYNAMIC}), opset)


def _followed(copy: nn.Module, inputs: Tensor, sizes: dict[int, Any]) -> ExportedProgram:
    inputs = inputs.detach().cpu()
    inputs = inputs.float() if inputs.is_floating_point() else inputs
    if len(inputs) < 2:  # sizes of 0 and 1 are taken for constants
        inputs = torch.cat([inputs, inputs])
    experts: Any = getattr(copy, "set_experts_implementation", None)
    if experts is not None:  # transformers' other ways are no operators
        experts("batched_mm")
    active: list[str] = []
    handles = [_tracked(name, module, active) for name, module in copy.named_modules()]
    plain = copy.register_forward_hook(lambda _, __, outputs: _named_logits(outputs))
    handles.append((plain, plain))
    try:
        # torch prints the whole graph beside an error
        with _quiet(), torch.no_grad(), redirect_stderr(io.StringIO()):
            program = torch.export.export(copy, (inputs,), dynamic_shapes=(sizes,), strict=False)
    except Exception as error:
        where = active[-1] if active else ""
        kind = type(copy.get_submodule(where)).__name__
        raise ValueError(
            f"torch.export cannot follow the forward pass of {where or 'the model'} ({kind}): "
            f"{_reason(error)}; rewrite that part so that it can (no Python decisions by the "
            "values of tensors, any number of samples), or export with packed_ternary or state_dict"
        ) from error
    finally:
        for handle in (item for pair in handles for item in pair):
            handle.remove()
    outputs = program.graph_signature.user_outputs
    if len(outputs) != 1 or not program.call_spec.out_spec.is_leaf():
        raise ValueError(
            f"forward gives {len(outputs)} tensors or a structure round them, and the file has one "
            f"output, `{OUTPUT}`: let forward return the tensor of logits, or export with "
            "packed_ternary or state_dict"
        )
    return program


def _named_logits(outputs: Any) -> Any:
    """The logits of an object that names them; what else a model gives stays for the check."""
    return outputs if isinstance(outputs, Tensor | tuple | list) else main_output(outputs)


def _tracked(name: str, module: nn.Module, active: list[str]) -> tuple[Any, Any]:
    """Keep the name of the module whose forward pass is being followed."""

    def enter(*_: Any) -> None:
        active.append(name)

    def leave(*_: Any) -> None:
        active.pop()

    return module.register_forward_pre_hook(enter), module.register_forward_hook(leave)


def _name_dimensions(program: ExportedProgram) -> None:
    """Give reductions over everything their dimensions: torch's ONNX operators want them."""
    aten = torch.ops.aten
    for node in program.graph.nodes:
        if node.target not in {aten.amax.default, aten.amin.default}:
            continue
        values, dims, *rest = (*node.args, []) if len(node.args) == 1 else node.args
        if not dims and not node.kwargs.get("dim"):
            node.args = (values, list(range(values.meta["val"].dim())), *rest)


def _converted(program: ExportedProgram, opset: int) -> ir.Model:
    _name_dimensions(program)
    try:
        with _quiet():
            result = torch.onnx.export(
                program, dynamo=True, opset_version=opset, verbose=False, optimize=False,
                input_names=[INPUT], output_names=[OUTPUT],
            )  # fmt: skip
    except Exception as error:
        innermost = _innermost(error)
        raise ValueError(
            f"torch.onnx cannot turn a part of the model{_place(program, innermost)} into ONNX "
            f"operators: {_reason(innermost)}; use another operation there, or export with "
            "packed_ternary or state_dict"
        ) from error
    assert result is not None
    assert result.exported_program is not None
    _fix_sizes(result.model, result.exported_program)
    return result.model


def _fix_sizes(model: ir.Model, program: ExportedProgram) -> None:
    """Sizes that became constants only when operations were taken apart: the file says so."""
    names = set(program.graph_signature.user_inputs)
    (node,) = (
        item for item in program.graph.nodes if item.op == "placeholder" and item.name in names
    )
    value = model.graph.inputs[0]
    assert value.shape is not None
    sizes: list[Any] = list(value.shape)
    for axis, size in enumerate(node.meta["val"].shape):
        if isinstance(size, torch.SymInt):
            known = size.node.shape_env.replace(size.node.expr)
            sizes[axis] = int(known) if known.is_number else sizes[axis]
    value.shape = ir.Shape(sizes)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says of itself; what it refuses is in its errors."""
    loggers = [logging.getLogger(name) for name in _CHATTER]
    for logger in loggers:
        logger.addFilter(_is_of_use)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*treespec, LeafSpec.*", FutureWarning)
            # recurrent networks keep a list of their parameters
            warnings.filterwarnings("ignore", r"The tensor attribute.*_flat_weights", UserWarning)
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_of_use)


def _is_of_use(record: logging.LogRecord) -> bool:
    return _CHATTER[record.name] not in record.getMessage()


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error: BaseException) -> str:
    """The first paragraph of what torch says, without its colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    first = " ".join(text.split("\n\n")[0].split()).rstrip(".") or type(error).__name__
    return first if len(first) <= _REASON else f"{first[:_REASON]}..."


def _place(program: ExportedProgram, error: BaseException) -> str:
    """The innermost module with the operation that an error names."""
    operation = re.search(r"op='\w+\.(\w+)'", str(error))
    if operation is None:
        return ""
    name = operation[1].strip("_")  # an operation's inner form begins with an underscore
    for node in program.graph.nodes:
        stack = list(node.meta.get("nn_module_stack", {}).values())
        if name in str(node.target) and stack and stack[-1][0]:
            return f" ({stack[-1][0]})"
    return ""


# -- the graph -------------------------------------------------------------------------------------


def _tidy(model: ir.Model) -> None:
    """Nothing computed twice, nothing that is not used, no traces of where it was made.

    Equal tensors stay apart unless they are one: layers with the same levels have their own steps.
    """
    for step in (
        common.InlinePass(),
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.ClearMetadataAndDocStringPass(),
    ):
        step(model)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in _values(model):
        value.metadata_props.clear()
    model.producer_name, model.producer_version = "forge-kernel", None


def _values(model: ir.Model) -> list[ir.Value]:
    graph = model.graph
    outputs = [value for node in graph for value in node.outputs]
    return [*graph.inputs, *graph.initializers.values(), *outputs]


def _set_types(model: ir.Model, packed: dict[str, PackedLayer]) -> None:
    """Types that torch has not: the same bytes, read otherwise."""
    for name, layer in packed.items():
        weight = layer.packed
        value = model.graph.initializers.get(_joined(name, PACKED, "levels"))
        if value is None or weight.onnx_type is None:
            continue
        kind, dims = weight.onnx_type
        dtype = ir.DataType[kind]
        tensor = ir.PackedTensor(weight.levels.numpy(), dtype, shape=dims, name=value.name)
        value.const_value, value.dtype, value.shape = tensor, dtype, ir.Shape(dims)


def _joined(*names: str) -> str:
    return ".".join(name for name in names if name)


def _name_sizes(model: ir.Model) -> None:
    """Give the free sizes of the input the names that a reader expects."""
    shape = model.graph.inputs[0].shape
    assert shape is not None
    names = {
        str(size.value): name
        for size, name in zip(shape, ("batch", "length"), strict=False)
        if isinstance(size, ir.SymbolicDim)
    }
    for value in _values(model):
        if value.shape is None:
            continue
        value.shape = ir.Shape(
            [_renamed(size.value, names) if isinstance(size, ir.SymbolicDim) else size
             for size in value.shape]
        )  # fmt: skip


def _renamed(size: str | None, names: dict[str, str]) -> str | None:
    if size is None:
        return None
    return re.sub(r"\w+", lambda found: names.get(found[0], found[0]), size)


def _halve(model: ir.Model, trained: nn.Module) -> None:
    """Keep tensors that the network has in half precision so; they are widened on loading."""
    state: dict[str, Tensor] = {
        **dict(trained.named_parameters(remove_duplicate=False)),
        **dict(trained.named_buffers(remove_duplicate=False)),
    }
    for name, value in list(model.graph.initializers.items()):
        own = state.get(name)
        if own is None or own.dtype not in _HALF:
            continue
        tensor = tensor_adapters.TorchTensor(own.detach().cpu().contiguous(), name=name)
        small = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype))
        small.shape = value.shape
        widened = ir.Node("", "Cast", [small], [ir.AttrInt64("to", ir.DataType.FLOAT.value)])
        widened.outputs[0].name = f"{name}.widened"
        widened.outputs[0].type, widened.outputs[0].shape = value.type, value.shape
        value.replace_all_uses_with(widened.outputs[0])
        model.graph.initializers.pop(name)
        model.graph.initializers[name] = small
        model.graph.insert_before(model.graph[0], widened)


def _described(
    model: ir.Model, opset: int, copy: nn.Module, packed: dict[str, PackedLayer]
) -> OnnxNetwork:
    state = copy.state_dict(keep_vars=True)
    by_path = {_joined(name, PACKED): layer for name, layer in packed.items()}
    numbers: dict[str, Tensor] = {}
    packed_bytes = other_bytes = count = 0
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        size = value.const_value.nbytes
        path, _, part = name.rpartition(".")
        owner = by_path.get(path)
        if owner is not None:
            packed_bytes += size
            if part == "levels":
                numbers[path] = numbers_of(owner.weight)
                count += numbers[path].numel()
            continue
        other_bytes += size
        if name in state:
            numbers[name] = state[name].detach().float()
    shape = model.graph.inputs[0].shape
    free = shape is not None and any(isinstance(size, ir.SymbolicDim) for size in shape[1:])
    return OnnxNetwork(model, opset, numbers, packed_bytes, count, other_bytes, free)
