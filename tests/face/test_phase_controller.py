"""Phase 5 between Phase 4 and Phase 6, in one process, for both shapes of orchestrators."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agent_forge.phases.phase5_training import TrainingConfig, ValidationConfig
from agent_forge.phases.phase5_training.phase_controller import Phase5Controller, PhaseResult
from forge_plugins.mathematics.quantization.bit_linear import BitLinear


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    inputs = torch.randn(300, 8)
    targets = (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long()
    rows = [
        {"input": row, "target": target}
        for row, target in zip(inputs.tolist(), targets.tolist(), strict=True)
    ]
    file = tmp_path / "train.json"
    file.write_text(json.dumps(rows))
    return file


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def controller(samples: Path, folder: Path, epochs: int = 3, **options: Any) -> Phase5Controller:
    return Phase5Controller(
        samples,
        experiment_name="phase5",
        output_dir=str(folder / "phase5"),
        training_config=TrainingConfig(epochs=epochs, learning_rate=1e-2, warmup_steps=0),
        validation_config=ValidationConfig(validation_frequency=10),
        device="cpu",
        **options,
    )


def bake(folder: Path) -> Tensor:
    """What a Phase 6 does: load with the default loader into plain layers."""
    model = network()
    model.load_state_dict(torch.load(folder / "model.pth"))
    return torch.cat([one.flatten() for one in model.parameters()])


def test_phase_4_to_5_to_6_in_one_process(samples: Path, tmp_path: Path) -> None:
    """Spec: J1, J3, J7. Planted: `model` None on success."""
    phase4 = tmp_path / "compressed.pt"
    torch.save({"model_state_dict": network().half().state_dict(), "bitnet_config": {}}, phase4)
    phase5 = controller(
        samples, tmp_path, use_bitnet=True, use_grokfast=True, architecture=network,
        phase6_dir=tmp_path / "phase6_input",
    )  # fmt: skip
    assert phase5.validate_input(phase4)
    assert not phase5.validate_input([network(), network()])
    result = phase5.execute([phase4])
    assert result.error is None
    assert result.success
    assert phase5.validate_output(result)
    assert result.phase_name == "training"
    assert result.duration == result.duration_seconds > 0
    assert result.metrics["validation_accuracy"] is not None
    assert isinstance(result.model, nn.Module)
    assert any(isinstance(one, BitLinear) for one in result.model.modules())
    assert set(result.artifacts) >= {"run_folder", "final_model", "metrics", "validation", "phase6"}
    baked = bake(Path(result.artifacts["phase6"]))
    assert torch.isfinite(baked).all()
    json.dumps(result.config)
    phase5.cleanup()
    phase5.cleanup()


def test_the_async_shape_trains_beside_the_event_loop(samples: Path, tmp_path: Path) -> None:
    """Spec: J7."""
    seen: list[str] = []

    async def drive() -> tuple[PhaseResult, int]:
        ticks = 0
        phase5 = controller(
            samples, tmp_path, on_progress=lambda event: seen.append(event["event"])
        )
        work = asyncio.ensure_future(phase5.run(network()))
        while not work.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return await work, ticks

    result, ticks = asyncio.run(drive())
    assert result.success
    assert ticks > 3
    assert "start" in seen
    assert result.end_time > result.start_time


def test_a_cancelled_await_stops_the_run(samples: Path, tmp_path: Path) -> None:
    """Spec: J7. Planted: `cancel` not called: the run goes on for its 100000 epochs."""
    begun = threading.Event()

    async def drive() -> None:
        phase5 = controller(samples, tmp_path, epochs=100_000, on_progress=lambda _: begun.set())
        work = asyncio.ensure_future(phase5.run(network()))
        while not begun.is_set():
            await asyncio.sleep(0.01)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(asyncio.wait_for(drive(), 60))
    (status,) = (tmp_path / "phase5" / "runs").glob("*/result.json")
    assert json.loads(status.read_text())["outcome"] == "stopped"


def test_a_cancel_from_a_thread_is_told_as_such(samples: Path, tmp_path: Path) -> None:
    """Spec: J7."""
    phase5 = controller(samples, tmp_path, epochs=100_000, on_progress=lambda _: phase5.cancel())
    result = phase5.execute(network())
    assert not result.success
    assert "stopped before its end" in str(result.error)
    assert result.model is None


def test_a_failure_is_an_answer_that_says_why(samples: Path, tmp_path: Path) -> None:
    """Spec: J7. Planted: success True whatever happened."""
    missing = controller(tmp_path / "nowhere.json", tmp_path).execute([network()])
    assert not missing.success
    assert "nowhere.json" in str(missing.error)
    weights = controller(samples, tmp_path).execute({"model_state_dict": network().state_dict()})
    assert not weights.success
    assert "model_state_dict" in str(weights.error)
    wrong = nn.Sequential(nn.Linear(5, 3))
    assert not controller(samples, tmp_path).execute([wrong]).success


def test_two_phases_at_once_in_threads_do_not_disturb_each_other(
    samples: Path, tmp_path: Path
) -> None:
    """Spec: J7. Planted: the seed set for the whole process once."""
    alone = controller(samples, tmp_path / "alone").execute(network()).model
    found: dict[int, PhaseResult] = {}

    def work(number: int) -> None:
        found[number] = controller(samples, tmp_path / str(number)).execute(models[number])

    models = [network(), network()]
    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert alone is not None
    for result in found.values():
        assert result.success, result.error
        assert result.model is not None
        for one, other in zip(result.model.parameters(), alone.parameters(), strict=True):
            assert torch.equal(one, other)
