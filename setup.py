# SPDX-License-Identifier: MIT
"""A wheel carries what `copy` hands out beside the package: the concepts' tests and the licence."""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))
from dsv2_ref import copying  # noqa: E402


class Carrying(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:                      # the checkout has them
            return
        files = {file for name in copying.concepts() for file in copying.needed(name).values()}
        for file in sorted(files):
            if file.parent.parent != copying.PACKAGE:
                target = Path(self.build_lib, "dsv2_ref", "carried", file.relative_to(ROOT))
                self.mkpath(str(target.parent))
                self.copy_file(str(file), str(target))


setup(cmdclass={"build_py": Carrying})
