// SPDX-License-Identifier: Apache-2.0
// Which keys a query sees: block ranges for the loop, and the element mask of edge blocks.
#pragma once

#include <cmath>

#include "params.h"
#include "sm90/wgmma.cuh"

namespace eqx_flash {

// The key blocks of one query tile, processed from the last to the first. Blocks from
// `first_masked` on touch the diagonal or the end of the keys.
struct KeyBlocks {
  int count;  // at least one: a tile whose rows see nothing masks one block completely
  int first_masked;
};

template <Mask kMask, int kBlockM, int kBlockN>
EQX_DEVICE KeyBlocks key_blocks(int m_block, int seq_k, int diagonal) {
  KeyBlocks blocks{(seq_k + kBlockN - 1) / kBlockN, seq_k / kBlockN};
  if constexpr (kMask == Mask::kCausal) {
    const int first_row_end = m_block * kBlockM + diagonal + 1;  // keys that its first row sees
    const int last_row_end = first_row_end + kBlockM - 1;
    blocks.count = max(1, min(blocks.count, (last_row_end + kBlockN - 1) / kBlockN));
    blocks.first_masked = min(blocks.first_masked, max(0, first_row_end / kBlockN));
  }
  return blocks;
}

// Sets the scores of invisible keys to minus infinity. `row` is this thread's first query row.
template <Mask kMask, int kBlockN>
EQX_DEVICE void apply_mask(float (&scores)[kBlockN / 2], int row, int n_block, int seq_k,
                           int diagonal) {
  const int first_col = n_block * kBlockN + sm90::accumulator_col(threadIdx.x);
  int visible[2];  // of this thread's two rows: columns left to see, counted from its first one
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    visible[r] = seq_k - first_col;
    if constexpr (kMask == Mask::kCausal) {
      visible[r] = min(visible[r], row + 8 * r + diagonal + 1 - first_col);
    }
  }
#pragma unroll
  for (int i = 0; i < kBlockN / 2; ++i) {
    const int col = (i / 4) * 8 + i % 2;
    scores[i] = col < visible[(i / 2) % 2] ? scores[i] : -INFINITY;
  }
}

}  // namespace eqx_flash
