# SPDX-License-Identifier: Apache-2.0
"""Array types of the public functions and of everything below them (axis names: see `_spec.py`)."""

from jaxtyping import Array, Bool, Float, Int32, Num

Query = Float[Array, "batch seq_q heads head_dim"]
KeyValue = Float[Array, "batch seq_k heads_k head_dim"]
Bias = Num[Array, "#batch #heads #seq_q #seq_k"]
Mask = Bool[Array, "#batch #heads #seq_q #seq_k"]
Lengths = Int32[Array, " batch"]

LogSumExp = Float[Array, "batch heads seq_q"]
"""Natural logarithm, float32 (float64 for float64 inputs)."""
