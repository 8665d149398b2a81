# SPDX-License-Identifier: Apache-2.0
"""The benchmark from a clone: ``sparline bench`` with results kept in bench/results.

python bench/attention.py [--suite cpu|quick] [--workload cpu-8k] [--repetitions 20] [--check |
--no-check]
"""

import sys
from pathlib import Path

from sparline.cli import app

if __name__ == "__main__":
    results = Path(__file__).parent / "results"
    app(["bench", "--out", str(results), *sys.argv[1:]])
