// SPDX-License-Identifier: Apache-2.0
// A problem as tune_device.py describes it: what a kernel's C functions are called with, on a GPU
// (tune_entry.cu.in) and on the emulator (tests/emulator/entry.cpp.in).
#pragma once

#include <cstdint>

#include "params.h"
#include "tile_config.h"

namespace eqx_flash {

// tune_device.py has the same. What a pass does not know is null.
struct Arguments {
  const void *q, *k, *v;
  void* out;
  float* lse;
  int* tile_counter;
  const void* dout;
  const float* dlse;  // null: zeros
  void *dq, *dk, *dv;
  float *lse_log2, *dlse_minus_delta;
  float* dq_accumulator;  // null: the deterministic kernels
  int batch, seq_q, seq_k, heads, heads_k, head_dim, diagonal;
  float softmax_scale;
};

inline int padded_seq_q(const Arguments& args) {
  return (args.seq_q + kQueryPadding - 1) / kQueryPadding * kQueryPadding;
}

inline ForwardParams forward_params(const Arguments& args, Mask mask) {
  return {.q = args.q,
          .k = args.k,
          .v = args.v,
          .out = args.out,
          .lse = args.lse,
          .tile_counter = args.tile_counter,
          .batch = args.batch,
          .seq_q = args.seq_q,
          .seq_k = args.seq_k,
          .heads = args.heads,
          .heads_k = args.heads_k,
          .head_dim = args.head_dim,
          .softmax_scale = args.softmax_scale,
          .mask = mask,
          .diagonal = args.diagonal};
}

inline BackwardParams backward_params(const Arguments& args, Mask mask) {
  return {.forward = forward_params(args, mask),
          .dout = args.dout,
          .dlse = args.dlse,
          .dq = args.dq,
          .dk = args.dk,
          .dv = args.dv,
          .padded_seq_q = padded_seq_q(args),
          .lse_log2 = args.lse_log2,
          .dlse_minus_delta = args.dlse_minus_delta,
          .dq_accumulator = args.dq_accumulator};
}

// Elements of lse_log2, as many as of dlse_minus_delta.
inline int64_t row_stats_size(const Arguments& args) {
  return int64_t{args.batch} * args.heads * padded_seq_q(args);
}

// Elements of dq_accumulator, 0 if it must be null. `head_dim` is the tile's.
inline int64_t dq_accumulator_size(const Arguments& args, int head_dim) {
  return has_fused_backward(head_dim) ? row_stats_size(args) * head_dim : 0;
}

}  // namespace eqx_flash
