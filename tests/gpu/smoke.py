# SPDX-License-Identifier: Apache-2.0
"""First contact with the kernel of one head dim: `python smoke.py HEAD_DIM`.

Run it in a process that may be killed: a kernel with a fault in its barriers never ends.
"""

import sys

import numpy as np
import oracle
import untuned  # noqa: F401

SIZES = [(1, 64, 64, 1, 1), (2, 300, 500, 4, 2), (1, 2000, 1990, 6, 1)]


def main(head_dim: int) -> int:
    failures = 0
    for dtype in oracle.DTYPES:
        for sizes in SIZES:
            for mask in oracle.MASKS:
                print(f"{dtype} d{head_dim} {sizes} {mask}: ", end="", flush=True)
                q, k, v = oracle.random_qkv(dtype, *sizes, head_dim=head_dim)
                out, lse = (np.asarray(x) for x in oracle.flash(q, k, v, mask))
                found = oracle.errors(q, k, v, out, lse, mask)
                failures += not found.passed
                print(
                    f"error {found.out:.2e} of {found.bound:.2e}, lse {found.lse:.1e} "
                    f"{'ok' if found.passed else 'WRONG'}",
                    flush=True,
                )
    return min(failures, 100)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
