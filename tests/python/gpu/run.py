# SPDX-License-Identifier: Apache-2.0
"""The GPU tests, where a lost device context costs one test and not those after it.

    python tests/python/gpu/run.py [pytest arguments]

is ``pytest -m gpu tests/python/gpu``, started again without the tests that are done whenever the
process's context is gone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

#: What conftest.py ends with when the device answers no more.
LOST_CONTEXT = 86
MOST_STARTS = 12


def main() -> int:
    here = Path(__file__).parent
    codes = []
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "SPARLINE_GPU_DONE": str(Path(folder) / "done")}
        for _ in range(MOST_STARTS):
            command = [sys.executable, "-m", "pytest", "-m", "gpu", str(here), *sys.argv[1:]]
            done = subprocess.run(command, env=environment, check=False)
            codes.append(done.returncode)
            if done.returncode != LOST_CONTEXT and done.returncode >= 0:
                break
            print(f"started again: the process ended with {done.returncode}", flush=True)
    return max((abs(code) for code in codes), default=0)


if __name__ == "__main__":
    raise SystemExit(main())
