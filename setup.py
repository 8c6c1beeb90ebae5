"""Build the package. `pyproject.toml` holds all but one thing: a wheel contains `configs/` as `unipelt/configs`."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copy the configurations into the built package. An editable install reads them from `configs/`."""

    def run(self) -> None:
        """Build the modules as usual, then copy the configurations."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "unipelt", "configs")
            self.mkpath(str(target))
            for source in sorted(Path(__file__).parent.glob("configs/*.yaml")):
                self.copy_file(str(source), str(target / source.name))


setup(cmdclass={"build_py": BuildWithConfigs})
