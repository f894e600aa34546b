"""`forge doctor`: what this machine has."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from forge_kernel.cli.options import AsJson

OPTIONAL: Final = (
    "h5py", "transformers", "gguf", "onnxruntime", "tensorboard", "mlflow", "prometheus_client",
    "sacrebleu",
)  # fmt: skip


_EFFECTS: Final = ("error", "files", "network", "processes", "threads", "changes", "prints")


def doctor_command(
    plugins: Annotated[
        bool,
        typer.Option("--plugins", help="Import each plugin alone: what else does its import do?"),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what this machine supports. Python, torch, devices, optional parts, broken plugins."""
    if plugins:
        _show_effects(as_json=as_json)
        return
    result = _examine()
    if as_json:
        print(json.dumps(result, indent=1))
        return
    for name, value in result.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, item in value.items():
                print(f"  {key}: {_shown(item)}")
        elif isinstance(value, list):
            print(f"{name}: {'none' if not value else ''}".rstrip())
            for item in value:
                print(f"  {item}")
        else:
            print(f"{name}: {_shown(value)}")


def _show_effects(*, as_json: bool) -> None:
    """Each plugin's import in a process of its own; those whose import only imports are counted."""
    from forge_kernel.cli.import_effects import examined
    from forge_kernel.planning.catalog import Catalog

    offers = [offer for offer in Catalog.installed().offers() if offer.entry is not None]
    results = zip(offers, examined([offer.key for offer in offers]), strict=True)
    if as_json:
        rows = {offer.key: {"origin": offer.origin, **row} for offer, row in results}
        print(json.dumps(rows, indent=1))
        return
    quiet = 0
    for offer, row in results:
        effects = {name: row.get(name) for name in _EFFECTS if row.get(name)}
        quiet += not effects
        if effects:
            print(f"{offer.key} ({offer.origin})")
            for name, what in effects.items():
                print(f"  {name}: {'; '.join(what) if isinstance(what, list) else what}")
    print(f"{quiet} of {len(offers)} plugins do nothing but import")


def _shown(value: Any) -> str:
    return {True: "yes", False: "no", None: "absent"}.get(value, str(value))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _fsync_works() -> bool:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        file = Path(folder) / "probe"
        with file.open("wb") as stream:
            stream.write(b"x")
            os.fsync(stream.fileno())
        file.replace(Path(folder) / "renamed")
    return True


def _examine() -> dict[str, Any]:
    import torch

    from forge_kernel.config.schema import config_schema
    from forge_kernel.errors import PluginError
    from forge_kernel.planning.catalog import Catalog
    from forge_kernel.training.precision import fast_arithmetic

    catalog = Catalog.installed()
    broken = list(catalog.misnamed)
    for offer in catalog.offers():
        try:
            config_schema(catalog.load(offer.kind, offer.name).info.config, offer.key)
        except PluginError as error:
            broken.append(error.faults[0].message)
    cuda = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    try:
        writes: bool | str = _fsync_works()
    except OSError as error:
        writes = f"no: {error}"
    compilers = [name for name in ("cc", "gcc", "clang") if shutil.which(name)]
    return {
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "forge-kernel": _version("forge-kernel"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "fast arithmetic": fast_arithmetic(),
        "cuda devices": cuda,
        "mps": torch.backends.mps.is_available(),
        "compiler for torch.compile": ", ".join(compilers) or None,
        "current folder is writable and syncs": writes,
        "free disk, GB": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
        "optional packages": {
            name: (_version(name.replace("_", "-")) or find_spec(name) is not None or None)
            for name in OPTIONAL
        },
        "plugins": len(list(catalog.offers())),
        "broken plugins": broken,
    }
