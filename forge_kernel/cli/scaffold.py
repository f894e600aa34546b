"""Texts of a new plugin package and of a new pipeline."""

from __future__ import annotations

import re
from dataclasses import dataclass
from string import Template
from typing import Final

from forge_kernel.errors import ConfigError, Fault


@dataclass(frozen=True)
class KindTemplate:
    """What differs between packages of different kinds."""

    imports: str  # names from forge_kernel.api, beside those that every plugin needs
    typing: str  # imports for the type checker only
    body: str  # the class body after the constructor
    setting: str = "scale"
    about: str = "a factor"


KINDS: Final[dict[str, KindTemplate]] = {
    "observers": KindTemplate(
        "LogRecord, Run",
        "",
        '''
    @hookimpl
    def on_log(self, run: Run, record: LogRecord) -> None:
        """Tell the loss of each log interval, times the factor."""
        loss = record.metrics.get("loss")
        if loss is not None and not run.quiet:
            print(f"step {record.step}: {loss * self.config.scale:.4f}", file=sys.stderr)
''',
    ),
    "gradients": KindTemplate(
        "Run, Step",
        "",
        '''
    @hookimpl
    def on_gradients(self, run: Run, step: Step) -> None:
        """Multiply the gradients in place."""
        for gradient in step.gradients:
            gradient.mul_(self.config.scale)
''',
    ),
    "loss": KindTemplate(
        "Batch, LazyModule, Run, Step",
        "    import torch.nn.functional as functional\n    from torch import Tensor\n",
        '''
    @hookimpl
    def compute_loss(self, run: Run, step: Step, batch: Batch, outputs: Any) -> Tensor:
        """Cross-entropy times the factor, target by target: the kernel takes the mean."""
        logits = outputs.reshape(-1, outputs.shape[-1])
        losses = functional.cross_entropy(
            logits, batch.targets.reshape(-1), reduction="none", ignore_index=batch.ignore_index
        )
        return losses * self.config.scale
''',
    ),
    "regularizers": KindTemplate(
        "Run, Step",
        "    from torch import Tensor\n",
        '''
    @hookimpl
    def regularize(self, run: Run, step: Step) -> Tensor | None:
        """The mean square of all weights, times the factor."""
        terms = [p.square().mean() for _, p in run.named_parameters() if p.requires_grad]
        return sum(terms[1:], terms[0]) * self.config.scale if terms else None
''',
    ),
    "schedule": KindTemplate(
        "ScheduleFactors, Run, Step",
        "",
        '''
    @hookimpl
    def compute_schedule_factors(self, run: Run, step: Step) -> ScheduleFactors:
        """The rate falls with the root of the step's number."""
        return ScheduleFactors(self.config.scale / step.number**0.5)
''',
    ),
    "callbacks": KindTemplate(
        "Run",
        "",
        '''
    @hookimpl
    def on_validation(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Stop when the loss is below the threshold."""
        if metrics.get("loss", float("inf")) < self.config.threshold:
            run.request("stop", reason=f"loss below {self.config.threshold}")
''',
        setting="threshold",
        about="loss at which to stop",
    ),
    "exporters": KindTemplate(
        "Run",
        "",
        '''
    @hookimpl
    def export(self, run: Run, folder: Path) -> Mapping[str, Any]:
        """Write the number of parameters, times the factor."""
        count = sum(parameter.numel() for _, parameter in run.named_parameters())
        (folder / "size.txt").write_text(f"{count * self.config.scale}\\n", encoding="utf-8")
        return {"format": "text", "parameters": count}
''',
    ),
}

_MODULE = Template(
    '''"""$title: a forge plugin of the kind $kind."""

from __future__ import annotations

${std}from typing import ${typing_names}

from forge_kernel.api import $api_names
from msgspec import Meta
${checked}

@dataclass(frozen=True, kw_only=True)
class ${cls}Config:
    """Settings of $title."""

    $setting: Annotated[float, Meta(gt=0, description="$about")] = 1.0


class $cls:
    """$title."""

    info = PluginInfo(
        name="$module",
        kind=Kind.$kind_member,
        config=${cls}Config,
    )

    def __init__(self, config: ${cls}Config) -> None:
        self.config = config
$body'''
)

_PYPROJECT = Template(
    """[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$name"
version = "0.1.0"
description = "A forge plugin of the kind $kind"
requires-python = ">=3.11"
dependencies = ["forge-kernel", "msgspec"]

[project.optional-dependencies]
dev = ["pytest", "ruff", "mypy"]

[project.entry-points."forge_kernel.plugins"]
"$kind.$module" = "$module.plugin:$cls"

[tool.setuptools.packages.find]
where = ["src"]

[tool.setuptools.package-data]
$module = ["py.typed"]

[tool.ruff]
line-length = 100
src = ["src"]

[tool.ruff.lint]
select = ["E", "F", "W", "I", "UP", "B", "D1"]
ignore = ["D105", "D107"] # the class docstring describes construction

[tool.ruff.lint.per-file-ignores]
"tests/**" = ["D", "F403"]

[tool.mypy]
strict = true
packages = ["$module"]
mypy_path = "src"

[tool.pytest.ini_options]
forge_distributions = ["$name"]
"""
)

_TEST = Template(
    '''"""The plugin is found and has its settings; add what it is to do."""

from __future__ import annotations

from importlib.metadata import entry_points

import pytest

from $module.plugin import (
    $cls,
    ${cls}Config,
)

NAME = "$kind.$module"


def test_its_entry_point_leads_to_it() -> None:
    (entry,) = entry_points(group="forge_kernel.plugins", name=NAME)
    assert entry.load() is $cls


def test_its_setting_has_a_default() -> None:
    assert ${cls}Config().$setting == pytest.approx(1.0)
'''
)

_CONTRACTS = '''"""The battery that every plugin passes."""

from forge_kernel.testing.contracts import *
'''

_README = Template(
    """# $name

A [forge](https://pypi.org/project/forge-kernel) plugin of the kind `$kind`.

    pip install -e .[dev]
    pytest
    forge plugins $module

In a pipeline: `$example`
"""
)


_STANDARD: Final = {
    "Mapping[": "from collections.abc import Mapping\n",
    "Path": "from pathlib import Path\n",
    "sys.": "import sys\n",
}
"""Imports by the word of a body that needs them."""


def _import_order(line: str) -> tuple[bool, str]:
    """As import sorters have it: whole modules first."""
    return line.startswith("from"), line


def package_files(name: str, module: str, kind: str) -> dict[str, str]:
    """The files of a new package by relative path.

    Args:
        name: of the distribution.
        module: the importable name; also the plugin's name.
        kind: one of `KINDS`.
    """
    template = KINDS[kind]
    cls = "".join(part.capitalize() for part in module.split("_"))
    std = [line for word, line in _STANDARD.items() if word in template.body]
    order = sorted([*std, "from dataclasses import dataclass\n"], key=_import_order)
    typing_names = ["Annotated", *(["Any"] if "Any" in template.body else [])]
    if template.typing:
        typing_names.insert(0, "TYPE_CHECKING")
    checked = ""
    if template.typing:
        checked = f"\nif TYPE_CHECKING:\n{template.typing}"
        if "functional" in template.typing:
            checked += 'else:\n    functional = LazyModule("torch.nn.functional")\n'
    api = ["Kind", "PluginInfo", *template.imports.split(", ")]
    values = {
        "name": name,
        "module": module,
        "kind": kind,
        "kind_member": kind.upper(),
        "cls": cls,
        "title": name.replace("-", " ").capitalize(),
        "std": "".join(order),
        "typing_names": ", ".join(
            sorted(typing_names, key=lambda word: (word != "TYPE_CHECKING", word))
        ),
        "api_names": ", ".join([*sorted(api), "hookimpl"]),
        "checked": checked,
        "setting": template.setting,
        "about": template.about,
        "body": template.body,
        "example": _example(kind, module, template.setting),
    }
    return {
        "pyproject.toml": _PYPROJECT.substitute(values),
        "README.md": _README.substitute(values),
        f"src/{module}/__init__.py": f'"""{values["title"]}."""\n',
        f"src/{module}/py.typed": "",
        f"src/{module}/plugin.py": _MODULE.substitute(values),
        "tests/test_plugin.py": _TEST.substitute(values),
        "tests/test_contracts.py": _CONTRACTS,
    }


def _example(kind: str, module: str, setting: str) -> str:
    use = f"{{use: {module}, with: {{{setting}: 1.0}}}}"
    return f"{kind}: {use}" if kind in ("loss", "schedule") else f"{kind}: [{use}]"


def pipeline_text(name: str, schema: str) -> str:
    """A commented pipeline: a shipped one that is marked as the template, under a new name.

    Args:
        name: of the run.
        schema: where its schema lies, seen from the file.

    Raises:
        ConfigError: no installed distribution ships one.
    """
    from forge_kernel.planning.pipeline_file import shipped_pipelines

    for file in shipped_pipelines().values():
        text = file.read_text(encoding="utf-8")
        if "# template: forge new pipeline" in text:
            text = re.sub(r"\$schema=\S+", lambda _: f"$schema={schema}", text, count=1)
            return text.replace("# template: forge new pipeline\n", "").replace("TEMPLATE", name)
    raise ConfigError([Fault("no installed distribution ships a pipeline template")])
