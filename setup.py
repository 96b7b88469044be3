"""Puts checkpoints/ and configs/ into the wheel as data of the package; all else is in setup.cfg."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithShipped(build_py):
    """Where msdiffusion/places.py finds them: msdiffusion/shipped. An editable install uses the repository's own."""

    def run(self) -> None:
        """Builds, then copies what ends in nothing but the kinds of files that are meant to travel."""
        super().run()
        if self.editable_mode:
            return
        for folder in ("checkpoints", "configs"):
            for path in Path(folder).rglob("*"):
                if path.suffix in (".json", ".safetensors", ".txt", ".yaml"):
                    place = Path(self.build_lib, "msdiffusion", "shipped", path)
                    self.mkpath(str(place.parent))
                    self.copy_file(str(path), str(place))


setup(cmdclass={"build_py": BuildWithShipped})
