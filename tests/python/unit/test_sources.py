# SPDX-License-Identifier: Apache-2.0
"""Rules of the sources that no compiler checks."""

import re
from pathlib import Path

KERNELS = Path(__file__).parents[3] / "src" / "cuda"


def test_every_kernel_waits_for_the_one_before() -> None:
    """Kernels are launched before the one ahead has finished (cuda/common/launch.cuh): one whose
    first statement does not wait for it would read what is not written yet, now and then."""
    found = 0
    for path in sorted(KERNELS.rglob("*.cu*")):
        code = re.sub(r"//.*", "", path.read_text())
        for match in re.finditer(r"__global__", code):
            depth, at = 0, match.end()
            while depth > 0 or code[at] not in "{;":
                depth += {"(": 1, ")": -1}.get(code[at], 0)
                at += 1
            assert code[at] == "{", f"{path.name}: a kernel declared apart from its body"
            body = code[at + 1 :].lstrip()
            assert body.startswith("begin_kernel();"), f"{path.name}: {body[:60]!r}"
            found += 1
    assert found > 20
