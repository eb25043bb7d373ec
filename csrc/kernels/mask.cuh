// SPDX-License-Identifier: Apache-2.0
// Which keys a query sees: block ranges for the loop, and the element mask of edge blocks.
#pragma once

#include <cmath>

#include "params.h"
#include "sm90/wgmma.cuh"

namespace eqx_flash {

// The key blocks of one query tile, processed from the first to the last. Blocks from
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

// Sets the scores of invisible keys to minus infinity, for one thread of a warpgroup whose rows
// begin at `first_row`.
template <Mask kMask, int kBlockN>
EQX_DEVICE void apply_mask(float (&scores)[kBlockN / 2], int thread, int first_row, int n_block,
                           int seq_k, int diagonal) {
  const int row = first_row + sm90::accumulator_row(thread);
  asm volatile("" : "+r"(thread));  // else the column would take a register of the main loop
  const int first_col = n_block * kBlockN + sm90::accumulator_col(thread);
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

// The query blocks [first, end) that see something of a key block, and, of those, where the
// blocks begin that need no mask. The end of the keys needs the mask in every block.
struct QueryBlocks {
  int first;
  int first_unmasked;
  int end;
};

template <Mask kMask, int kBlockM, int kBlockN>
EQX_DEVICE QueryBlocks query_blocks(int n_block, int seq_q, int seq_k, int diagonal) {
  QueryBlocks blocks{0, 0, (seq_q + kBlockM - 1) / kBlockM};
  const int first_key = n_block * kBlockN;
  if constexpr (kMask == Mask::kCausal) {
    const int first_query = max(0, first_key - diagonal);
    const int first_query_for_all = max(0, first_key + kBlockN - 1 - diagonal);
    blocks.first = min(blocks.end, first_query / kBlockM);
    blocks.first_unmasked = min(blocks.end, (first_query_for_all + kBlockM - 1) / kBlockM);
  }
  if (first_key + kBlockN > seq_k) blocks.first_unmasked = blocks.end;
  return blocks;
}

// The same as apply_mask for transposed scores: rows are keys, columns are queries.
// `key` is this thread's first key.
template <Mask kMask, int kBlockM>
EQX_DEVICE void apply_mask_transposed(float (&scores)[kBlockM / 2], int key, int m_block, int seq_k,
                                      int diagonal) {
  const int first_query = m_block * kBlockM + sm90::accumulator_col(threadIdx.x);
  int hidden[2];  // of this thread's two keys: queries that do not see it, counted from the first
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int k = key + 8 * r;
    hidden[r] = kMask == Mask::kCausal ? k - diagonal - first_query : 0;
    if (k >= seq_k) hidden[r] = kBlockM;
  }
#pragma unroll
  for (int i = 0; i < kBlockM / 2; ++i) {
    const int col = (i / 4) * 8 + i % 2;
    scores[i] = col < hidden[(i / 2) % 2] ? -INFINITY : scores[i];
  }
}

}  // namespace eqx_flash
