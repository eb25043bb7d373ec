// SPDX-License-Identifier: Apache-2.0
// dQ while it is being summed: in fp32, unscaled, in the order in which threads hold it. And the
// kernel that turns it into what the caller asked for.
#pragma once

#include "kernels/mask.cuh"
#include "params.h"
#include "sm90/registers.cuh"
#include "tile_config.h"

namespace eqx_flash {

// The accumulator holds 64 queries after the other, and of those first the left half of the
// columns, then the right half: float4 [columns / 8][thread of a warpgroup].
template <int kHeadDim>
struct DqParts {
  static constexpr int kBlockM = backward_fused_tile(kHeadDim).block_m;
  static constexpr int kCols = kHeadDim / 2;
  static constexpr int kFloats = kBlockM * kCols;
  static_assert(kBlockM == kWarpgroupRows);

  EQX_DEVICE static int64_t offset(int64_t batch_head, int padded_seq_q, int m_block,
                                   int part = 0) {
    return (batch_head * padded_seq_q + int64_t{m_block} * kBlockM) * kHeadDim + part * kFloats;
  }
};

// The accumulated dQ, scaled, as 16-bit rows. A thread block a part; a thread eight columns of the
// rows r and r + 8.
template <int kHeadDim>
inline constexpr int kFinishDqThreads = 4 * 8 * DqParts<kHeadDim>::kCols / 8;

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kFinishDqThreads<kHeadDim>)
    backward_finish_dq_kernel(const BackwardParams params) {
  using Parts = DqParts<kHeadDim>;
  constexpr int kGroups = Parts::kCols / 8;
  const ForwardParams& shape = params.forward;
  const int m_blocks = (shape.seq_q + Parts::kBlockM - 1) / Parts::kBlockM;
  const int index = gridDim.x - 1 - blockIdx.x;  // from the end, which is still in L2
  const int part = index % 2;
  const int batch_head = index / 2 / m_blocks;
  const int m_block = index / 2 - batch_head * m_blocks;
  const int batch = batch_head / shape.heads;
  const int head = batch_head - batch * shape.heads;
  const int group = threadIdx.x % kGroups;
  const int warp = threadIdx.x / (8 * kGroups);
  const int row_of_eight = threadIdx.x / kGroups % 8;
  const auto* fragments = reinterpret_cast<const float4*>(
      params.dq_accumulator + Parts::offset(batch_head, params.padded_seq_q, m_block, part));

  sm90::wait_for_previous_kernel();  // dQ is complete
  float4 f[4];                       // of the four threads that held these eight columns
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    f[i] = __ldcs(fragments + group * sm90::kWarpgroup + warp * sm90::kWarp + row_of_eight * 4 + i);
  }
  const float s = shape.softmax_scale;
  const uint4 rows[2] = {
      {sm90::pack<Element>(f[0].x * s, f[0].y * s), sm90::pack<Element>(f[1].x * s, f[1].y * s),
       sm90::pack<Element>(f[2].x * s, f[2].y * s), sm90::pack<Element>(f[3].x * s, f[3].y * s)},
      {sm90::pack<Element>(f[0].z * s, f[0].w * s), sm90::pack<Element>(f[1].z * s, f[1].w * s),
       sm90::pack<Element>(f[2].z * s, f[2].w * s), sm90::pack<Element>(f[3].z * s, f[3].w * s)}};

  const int col = part * Parts::kCols + group * 8;
  if (col >= shape.head_dim) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = m_block * Parts::kBlockM + warp * 16 + row_of_eight + 8 * r;
    if (row >= shape.seq_q) continue;
    const int64_t offset =
        ((int64_t{batch} * shape.seq_q + row) * shape.heads + head) * shape.head_dim + col;
    *reinterpret_cast<uint4*>(static_cast<Element*>(params.dq) + offset) = rows[r];
  }
}

}  // namespace eqx_flash
