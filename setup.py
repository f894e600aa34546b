"""The build's one step of its own; everything else stands in pyproject.toml.

`pipelines/` and the schema that its files name lie at the root of the checkout, where people look
for them. In a wheel they lie in the package `forge_plugins`. An editable install copies nothing: it
finds them at the root.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SCHEMA = "schemas/pipeline.schema.json"


def shipped() -> list[Path]:
    """The files, relative to the root."""
    files = (ROOT / "pipelines").rglob("*")
    return [*sorted(f.relative_to(ROOT) for f in files if f.is_file()), Path(SCHEMA)]


class BuildWithPipelines(build_py):
    """Puts the shipped pipelines into the package."""

    def run(self) -> None:
        """Build the modules, then copy."""
        super().run()
        for source, target in [] if self.editable_mode else self._copies():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """What the step writes, too."""
        copies = [] if self.editable_mode else [str(target) for _, target in self._copies()]
        return [*super().get_outputs(include_bytecode), *copies]

    def get_source_files(self) -> list[str]:
        """What a source archive must hold, too."""
        return [*super().get_source_files(), *map(str, shipped())]

    def _copies(self) -> list[tuple[Path, Path]]:
        top = Path(self.build_lib) / "forge_plugins"
        return [(ROOT / file, top / file) for file in shipped()]


setup(cmdclass={"build_py": BuildWithPipelines})
