// SPDX-License-Identifier: Apache-2.0
// A warpgroup's 64 output rows: registers -> shared memory -> TMA store, or straight to global
// memory.
#pragma once

#include "sm90/registers.cuh"
#include "sm90/smem_tile.cuh"
#include "sm90/tma.cuh"
#include "sm90/wgmma.cuh"

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

// Among four neighbouring lanes: word i of lane j goes to word j of lane i.
EQX_DEVICE void transpose_words(uint32_t (&words)[4]) {
#pragma unroll
  for (int distance = 1; distance <= 2; ++distance) {
    const bool upper = threadIdx.x & distance;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const int i = pair * (3 - distance);
      const uint32_t low = words[i], high = words[i + distance];
      const uint32_t other = __shfl_xor_sync(sm90::kAllLanes, upper ? low : high, distance);
      words[i] = upper ? other : low;
      words[i + distance] = upper ? high : other;
    }
  }
}

// Writes accumulator * factor as 16-bit rows from the registers on: no buffer has to be free, at
// the cost of some shuffles. `out` is the first row's first element; `rows` and `cols` are what
// there is.
template <typename Element, int kCols>
EQX_DEVICE void store_output_rows(Element* out, int64_t row_stride, int rows, int cols,
                                  const float (&acc)[kCols / 2], const float (&factor)[2],
                                  int thread) {
  const int first_row = sm90::accumulator_row(thread);
  const int piece = thread % 4;  // of 16 bytes, after the exchange
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row + 8 * r;
    Element* const destination = out + row * row_stride + piece * 8;
#pragma unroll
    for (int j = 0; j < kCols / 32; ++j) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* o = acc + 16 * j + 4 * i + 2 * r;
        words[i] = sm90::pack<Element>(o[0] * factor[r], o[1] * factor[r]);
      }
      transpose_words(words);
      if (row < rows && 32 * j + piece * 8 < cols) {
        *reinterpret_cast<uint4*>(destination + 32 * j) = {words[0], words[1], words[2], words[3]};
      }
    }
  }
}

}  // namespace eqx_flash
