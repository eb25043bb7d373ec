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

// The backward pass reads everything the forward has, O and LSE included.
struct BackwardParams {
  ForwardParams forward;
  const void* dout;   // [batch, seq_q, heads, head_dim]
  const float* dlse;  // [batch, heads, seq_q], or null: zeros
  void* dq;           // [batch, seq_q, heads, head_dim]
  void* dk;           // [batch, seq_k, heads_k, head_dim]
  void* dv;           // [batch, seq_k, heads_k, head_dim]

  int padded_seq_q;         // seq_q rounded up to kQueryPadding
  float* lse_log2;          // [batch, heads, padded_seq_q], scratch; +inf for rows that see nothing
  float* dlse_minus_delta;  // [batch, heads, padded_seq_q], scratch
  float* dq_accumulator;    // [batch, heads, padded_seq_q, tile head_dim], scratch of the fused
                            // kernel, or null: dQ in fragment order, unscaled
};

// The scratch rows of a query block are read as a whole: every query tile divides this.
inline constexpr int kQueryPadding = 128;

}  // namespace eqx_flash
