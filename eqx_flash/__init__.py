# SPDX-License-Identifier: Apache-2.0
"""FlashAttention-3 for JAX on Hopper GPUs, and the same functions in plain JAX everywhere else."""

from . import nn as nn
from ._dot_product_attention import dot_product_attention as dot_product_attention
from ._explain import explain as explain
from ._ffi import export_checks as export_checks
from ._hopper import flash_attention_hopper_bwd as flash_attention_hopper_bwd
from ._hopper import flash_attention_hopper_fwd as flash_attention_hopper_fwd
