# SPDX-License-Identifier: Apache-2.0
"""Equinox layers on top of [`eqx_flash.dot_product_attention`][]."""

from ._attention import MultiheadAttention as MultiheadAttention
from ._rotary import RotaryEmbedding as RotaryEmbedding
