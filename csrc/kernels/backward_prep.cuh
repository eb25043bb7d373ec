// SPDX-License-Identifier: Apache-2.0
// What the backward kernels need of each query row: the log-sum-exp in base 2, and
// dlse - rowsum(dO * O), which every dS of the row starts from (FlashAttention-2, section 3.1.2).
// On the way it clears the accumulator of dQ, if there is one, and the counter of tiles.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "params.h"
#include "sm90/device.cuh"

namespace eqx_flash {

// dot product of eight 16-bit elements packed in 16 bytes
template <typename Element>
EQX_DEVICE float dot8(const uint4& a, const uint4& b) {
  const auto* x = reinterpret_cast<const Element*>(&a);
  const auto* y = reinterpret_cast<const Element*>(&b);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum += static_cast<float>(x[i]) * static_cast<float>(y[i]);
  return sum;
}

// kLanes neighbouring lanes share a row, eight elements each: kLanes * 8 >= head_dim. A thread
// block takes eight queries of some heads, so that it reads and writes whole sectors of what has a
// float for each row.
template <int kLanes>
struct PrepTile {
  static constexpr int kThreads = 256;
  static constexpr int kQueries = 8;
  static constexpr int kHeads = kThreads / kLanes / kQueries;

  static int64_t blocks(const BackwardParams& params) {
    const ForwardParams& shape = params.forward;
    return int64_t{shape.batch} * (params.padded_seq_q / kQueries) *
           ((shape.heads + kHeads - 1) / kHeads);
  }
};

template <typename Element, int kLanes>
__global__ void __launch_bounds__(PrepTile<kLanes>::kThreads, 6)
    backward_prep_kernel(const BackwardParams params) {
  using Tile = PrepTile<kLanes>;
  sm90::let_next_kernel_start();
  const ForwardParams& shape = params.forward;
  // From the end: the next kernel begins with what was written last, and is still in L2.
  const int block = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  const int head_blocks = (shape.heads + Tile::kHeads - 1) / Tile::kHeads;
  const int seq_block = block / head_blocks;
  const int seq_blocks = params.padded_seq_q / Tile::kQueries;
  const int batch = seq_block / seq_blocks;
  const int row_of_block = static_cast<int>(threadIdx.x) / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int head = (block - seq_block * head_blocks) * Tile::kHeads + row_of_block / Tile::kQueries;
  const int seq = (seq_block - batch * seq_blocks) * Tile::kQueries + row_of_block % Tile::kQueries;
  if (head >= shape.heads) return;
  const bool inside = seq < shape.seq_q;
  const int64_t batch_head = int64_t{batch} * shape.heads + head;
  const int64_t row = batch_head * params.padded_seq_q + seq;

  if (block == 0 && threadIdx.x == 0) *shape.tile_counter = 0;
  if (params.dq_accumulator != nullptr) {  // 32 bytes a thread cover it exactly
    auto* zero = reinterpret_cast<float4*>(params.dq_accumulator) + 2 * (row * kLanes + lane);
    zero[0] = zero[1] = make_float4(0.f, 0.f, 0.f, 0.f);
  }

  // All loads before the first use.
  float lse = -INFINITY, dlse = 0.f;
  uint4 out{}, dout{};
  if (inside) {
    lse = shape.lse[batch_head * shape.seq_q + seq];
    if (params.dlse != nullptr) dlse = params.dlse[batch_head * shape.seq_q + seq];
    if (lane * 8 < shape.head_dim) {
      const int64_t offset =
          ((int64_t{batch} * shape.seq_q + seq) * shape.heads + head) * shape.head_dim + lane * 8;
      out = *reinterpret_cast<const uint4*>(static_cast<const Element*>(shape.out) + offset);
      dout = *reinterpret_cast<const uint4*>(static_cast<const Element*>(params.dout) + offset);
    }
  }
  float sum = dot8<Element>(out, dout);
#pragma unroll
  for (int i = kLanes / 2; i > 0; i /= 2) sum += __shfl_xor_sync(sm90::kAllLanes, sum, i);
  if (lane != 0) return;
  // A row without visible keys, or outside: +inf makes every probability exp2(-inf) = 0, and its
  // dlse must not leak.
  const bool sees_keys = lse != -INFINITY;
  params.lse_log2[row] = sees_keys ? lse * 1.44269504f : INFINITY;
  params.dlse_minus_delta[row] = sees_keys ? dlse - sum : 0.f;
}

}  // namespace eqx_flash
