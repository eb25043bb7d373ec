# SPDX-License-Identifier: Apache-2.0
"""What JAX hands to XLA, for CUDA too: that needs neither a GPU nor compiled kernels."""

import re
from collections import Counter

import jax

KERNEL = "eqx_flash_forward"
BACKWARD = "eqx_flash_backward"


def cuda_text(fn, *args) -> str:
    """The StableHLO of `jax.jit(fn)(*args)` for CUDA."""
    return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def kernel_calls(text: str, target: str = KERNEL) -> int:
    """How often the program in StableHLO calls a kernel; JAX shares functions between calls."""
    bodies = dict(re.findall(r"func\.func \w+ @(\w+)\((.*?)\n  }", text, flags=re.DOTALL))

    def count(body: str) -> int:
        callees = re.findall(r"(?:\s|func\.)call @(\w+)\(", body)
        return body.count(f"custom_call @{target}(") + sum(count(bodies[name]) for name in callees)

    return count(bodies["main"])


def collectives(compiled: jax.stages.Compiled) -> Counter[str]:
    """The communication in a compiled program."""
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return Counter(re.findall(rf" ({names})(?:-start)?\(", compiled.as_text() or ""))
