"""Files of a new plugin package and of a new pipeline, made from `templates/`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from forge_kernel.errors import ConfigError, Fault

TEMPLATES: Final = Path(__file__).parent / "templates"
KINDS: Final = (
    "observers", "gradients", "loss", "regularizers", "schedule", "callbacks", "exporters",
)  # fmt: skip
"""Kinds of which there is a template."""
ONE: Final = ("loss", "schedule")  # a pipeline has one of them
BATTERY: Final = """\
\"\"\"The battery that every plugin passes.\"\"\"

from forge_kernel.testing.contracts import *
"""  # a line that no module of the command line may have: `testing` stands beside it
SHOWN: Final = "observers"  # the kind that the templates of all kinds speak of


def package_files(name: str, module: str, kind: str) -> dict[str, str]:
    """The files of a new package by relative path.

    Args:
        name: of the distribution.
        module: the importable name; also the plugin's name.
        kind: one of `KINDS`.
    """
    cls = "".join(part.capitalize() for part in module.split("_"))
    title = name.replace("-", " ").capitalize()
    plugin = (TEMPLATES / f"{kind}.py").read_text(encoding="utf-8")
    setting = re.findall(r"^    (\w+): Annotated", plugin, re.MULTILINE)[0]
    use = f"{{use: {module}, with: {{{setting}: 1.0}}}}"
    names = {
        "{use: new_plugin, with: {scale: 1.0}}": use,
        f"{SHOWN}: [{use}]": f"{kind}: {use}" if kind in ONE else f"{kind}: [{use}]",
        f"forge_kernel.cli.templates.{SHOWN}": f"{module}.plugin",
        f"{SHOWN}.new_plugin": f"{kind}.{module}",
        f"kind {SHOWN}": f"kind {kind}",
        f"kind `{SHOWN}`": f"kind `{kind}`",
        "().scale": f"().{setting}",
        "new-plugin": name,
        "new_plugin": module,
        "NewPlugin": cls,
        "New plugin": title,
    }

    def made(template: str) -> str:
        text = (TEMPLATES / template).read_text(encoding="utf-8")
        for old, new in names.items():
            text = text.replace(old, new)
        return text

    return {
        "pyproject.toml": made("project.toml"),
        "README.md": made("README.md"),
        f"src/{module}/__init__.py": f'"""{title}."""\n',
        f"src/{module}/py.typed": "",
        f"src/{module}/plugin.py": made(f"{kind}.py"),
        "tests/test_plugin.py": made("its_tests.py"),
        "tests/test_contracts.py": BATTERY,
    }


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
