// SPDX-License-Identifier: Apache-2.0
// What the backward kernels need of each query row: the log-sum-exp in base 2, and
// dlse - rowsum(dO * O), which every dS of the row starts from (FlashAttention-2, section 3.1.2).
// On the way it clears the accumulator of dQ, if there is one.
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

// kLanes neighbouring lanes share a row, eight elements each: kLanes * 8 >= head_dim.
// The rows of [batch, padded_seq_q, heads] are taken heads fastest, as O and dO lie in memory.
template <typename Element, int kLanes>
__global__ void __launch_bounds__(256) backward_prep_kernel(const BackwardParams params) {
  sm90::let_next_kernel_start();
  const ForwardParams& shape = params.forward;
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t row = thread / kLanes;
  const int lane = thread % kLanes;
  if (row >= int64_t{shape.batch} * params.padded_seq_q * shape.heads) return;
  const int head = row % shape.heads;
  const int64_t batch_seq = row / shape.heads;
  const int seq = batch_seq % params.padded_seq_q;
  const int batch = batch_seq / params.padded_seq_q;
  const bool inside = seq < shape.seq_q;

  if (params.dq_accumulator != nullptr) {  // 32 bytes a thread cover it exactly
    auto* zero = reinterpret_cast<float4*>(params.dq_accumulator) + 2 * thread;
    zero[0] = zero[1] = make_float4(0.f, 0.f, 0.f, 0.f);
  }

  float sum = 0.f;
  if (inside && lane * 8 < shape.head_dim) {
    const int64_t offset =
        ((int64_t{batch} * shape.seq_q + seq) * shape.heads + head) * shape.head_dim + lane * 8;
    const auto* out = static_cast<const Element*>(shape.out) + offset;
    const auto* dout = static_cast<const Element*>(params.dout) + offset;
    sum =
        dot8<Element>(*reinterpret_cast<const uint4*>(out), *reinterpret_cast<const uint4*>(dout));
  }
#pragma unroll
  for (int i = kLanes / 2; i > 0; i /= 2) sum += __shfl_xor_sync(sm90::kAllLanes, sum, i);
  if (lane != 0) return;

  const int64_t batch_head = int64_t{batch} * shape.heads + head;
  float lse_log2 = INFINITY;  // makes every probability of the row exp2(-inf) = 0
  float dlse_minus_delta = 0.f;
  if (inside) {
    const float lse = shape.lse[batch_head * shape.seq_q + seq];
    if (lse != -INFINITY) {  // else a row without visible keys, whose dlse must not leak
      lse_log2 = lse * 1.44269504f;
      dlse_minus_delta = params.dlse[batch_head * shape.seq_q + seq] - sum;
    }
  }
  params.lse_log2[batch_head * params.padded_seq_q + seq] = lse_log2;
  params.dlse_minus_delta[batch_head * params.padded_seq_q + seq] = dlse_minus_delta;
}

}  // namespace eqx_flash
