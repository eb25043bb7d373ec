// SPDX-License-Identifier: Apache-2.0
// A warpgroup's 64 output rows: registers -> shared memory -> TMA store.
#pragma once

#include "sm90/registers.cuh"
#include "sm90/smem_tile.cuh"
#include "sm90/tma.cuh"

namespace eqx_flash {

// Writes accumulator * factor to the slab as 16-bit rows. All four warps take part.
template <typename Element, typename Slab>
EQX_DEVICE void write_output_slab(uint32_t slab, const float (&acc)[Slab::kCols / 2],
                                  const float (&factor)[2], int thread) {
  const int lane = thread % sm90::kWarp;
  const int row = (thread / sm90::kWarp) * 16 + lane % 16;
#pragma unroll
  for (int k = 0; k < Slab::kCols / 16; ++k) {
    const float* o = acc + 8 * k;
    sm90::store_matrix_x4(slab + Slab::piece_offset(row, 2 * k + lane / 16),
                          sm90::pack<Element>(o[0] * factor[0], o[1] * factor[0]),
                          sm90::pack<Element>(o[2] * factor[1], o[3] * factor[1]),
                          sm90::pack<Element>(o[4] * factor[0], o[5] * factor[0]),
                          sm90::pack<Element>(o[6] * factor[1], o[7] * factor[1]));
  }
  sm90::fence_async_proxy();  // a barrier must follow before the store
}

// One thread sends the slab off; rows and columns outside the tensor are dropped.
template <typename Slab>
EQX_DEVICE void store_output_slab(const CUtensorMap& map, uint32_t slab, int first_row, int head,
                                  int batch) {
#pragma unroll
  for (int s = 0; s < Slab::kSlabs; ++s) {
    sm90::tma_store(map, slab + s * Slab::kSlabBytes,
                    {s * Slab::kSlabCols, first_row, head, batch});
  }
  sm90::tma_store_commit();
}

}  // namespace eqx_flash
