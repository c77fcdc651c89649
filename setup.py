"""Puts DomIO as a guest program (guests/domio) into the wheel, built: who installs the wheel has no C compiler.

Built where the package ziglang and Xen's headers are (`./devtool setup` gets both; build with --no-build-isolation). A wheel that is built
elsewhere is whole but for that file, and says so.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent


class BuildWithDomio(build_py):
    """`build_py`, and the program."""

    def run(self) -> None:
        """As the base, then one file more."""
        super().run()
        if self.editable_mode:
            return  # the sources are there
        target = Path(self.build_lib) / "toolstack" / "programs" / "domio.elf"
        sys.path.insert(0, str(HERE))
        try:
            from guests.build import GuestBuildError, build

            built = build("domio")
        except (ImportError, GuestBuildError) as error:
            self.warn(f"this wheel will not have DomIO as a guest program: {error}")
            return
        finally:
            sys.path.remove(str(HERE))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built, target)


setup(cmdclass={"build_py": BuildWithDomio})
