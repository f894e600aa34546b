"""The strategy of one process and one device."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from forge_kernel.renamed import tensors_today

if TYPE_CHECKING:
    from torch import Tensor, nn

    from forge_kernel.contract.strategy import Trained


class OneProcess:
    """The whole run in this process."""

    rank = 0
    world_size = 1

    def start(self) -> None:
        """Nothing to join."""

    def transform_model(self, run: Trained, model: nn.Module) -> nn.Module:
        """The model as it is."""
        del run
        return model

    def backward_scope(self, *, last: bool) -> AbstractContextManager[None]:
        """No scope."""
        del last
        return nullcontext()

    def reduce(self, value: Tensor) -> Tensor:
        """The tensor itself."""
        return value

    def decide(self, code: int) -> int:
        """The code itself."""
        return code

    def model_state(self, run: Trained) -> dict[str, Tensor]:
        """The live tensors of the model and its companions; their extra state is kept apart."""
        state = _tensors(run.model)
        for name, module in run.modules.items():
            state.update({f"{name}.{key}": value for key, value in _tensors(module).items()})
        return state

    def load_model_state(self, run: Trained, state: Mapping[str, Tensor]) -> None:
        """Copy the tensors into the live ones."""
        import torch

        own = self.model_state(run)
        state = tensors_today(state, own.keys())
        missing, foreign = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or foreign:
            raise KeyError(f"missing tensors {missing[:5]}, unknown tensors {foreign[:5]}")
        with torch.no_grad():
            for name, tensor in own.items():
                if tensor.shape != state[name].shape:
                    shapes = f"{tuple(state[name].shape)}, the model has {tuple(tensor.shape)}"
                    raise ValueError(f"the tensor {name} has the shape {shapes}")
                tensor.copy_(state[name])

    def finish(self) -> None:
        """Nothing to leave."""


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The state dict without what `get_extra_state` of its modules gives."""
    return {
        key: value
        for key, value in module.state_dict().items()
        if key.rpartition(".")[2] != "_extra_state"
    }
