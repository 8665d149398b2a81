# SPDX-License-Identifier: Apache-2.0
"""Rules of the sources that no compiler checks."""

import re
from pathlib import Path

KERNELS = Path(__file__).parents[3] / "src" / "cuda"
#: Kernels that wait later, and how often that stands in them: before whatever another kernel wrote
#: is read, and in every thread before anything is written.
WAITS_LATER = {
    "pool_kernel": ("await_last_kernel();", 3),  # reads q while the pooling of k ends
    "fold_kernel": ("await_last_kernel();", 1),  # multiplies matrices of the caller before
    "route_tile_kernel": ("begin_kernel();", 1),  # finds its tile before
    # With a linear branch its loading warps wait, once they need the sums of the last kernel.
    "sparse_forward_sm90_kernel": ("begin_kernel();", 1),
}


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
            names = re.findall(r"(\w+)\s*\(", code[match.end() : at])
            name = next(name for name in names if name != "__launch_bounds__")
            body = code[at + 1 : code.index("\n}", at)].lstrip()
            if name in WAITS_LATER:
                wait, count = WAITS_LATER[name]
                assert body.count(wait) == count, f"{path.name}: {name}"
            else:
                assert body.startswith("begin_kernel();"), f"{path.name}: {body[:60]!r}"
            found += 1
    assert found > 20
