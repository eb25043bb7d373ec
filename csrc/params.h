// SPDX-License-Identifier: Apache-2.0
// What a launch needs to know. Buffers are dense and row-major, so sizes say it all.
#pragma once

namespace eqx_flash {

enum class Mask { kFull, kCausal };

struct ForwardParams {
  const void* q;      // [batch, seq_q, heads, head_dim]
  const void* k;      // [batch, seq_k, heads_k, head_dim]
  const void* v;      // [batch, seq_k, heads_k, head_dim]
  void* out;          // [batch, seq_q, heads, head_dim]
  float* lse;         // [batch, heads, seq_q], natural logarithm
  int* tile_counter;  // [1], scratch: the next tile to hand out

  int batch;
  int seq_q;
  int seq_k;
  int heads;
  int heads_k;
  int head_dim;

  float softmax_scale;  // > 0
  Mask mask;
  int diagonal;  // causal: query t sees the keys s <= t + diagonal
};

}  // namespace eqx_flash
