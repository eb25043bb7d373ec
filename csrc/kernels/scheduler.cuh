// SPDX-License-Identifier: Apache-2.0
// Which block of queries a persistent thread block works on next.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/mask.cuh"
#include "params.h"
#include "sm90/barrier.cuh"

namespace eqx_flash {

// Tiles are numbered so that those in flight together share K and V in L2: sections of a few
// heads, inside a section query blocks from the longest to the shortest (causal), heads fastest.
// The shortest query blocks of all heads come last of all and fill the tail of the grid.
struct TileOrder {
  int tiles;
  int m_blocks;       // query blocks per head
  int tail_m_blocks;  // of those, the first (shortest) ones that are kept for the end
  int batch_heads;
  int section_heads;
};

inline TileOrder make_tile_order(const ForwardParams& params, int block_m) {
  const bool causal = params.mask == Mask::kCausal;
  TileOrder order;
  order.m_blocks = (params.seq_q + block_m - 1) / block_m;
  order.batch_heads = params.batch * params.heads;
  order.tiles = order.m_blocks * order.batch_heads;
  // Below 16 blocks a head, a quarter of them is too little work to level anything.
  order.tail_m_blocks = causal && order.m_blocks >= 16 ? order.m_blocks / 4 : 0;
  // Full: equal tiles need no mixing of heads, and one head at a time reuses its K and V best.
  // Causal: sections of 16 MB (below 2k keys) or 40 MB measured best on the H100's 50 MB of L2.
  const int64_t budget = !causal ? 0 : (params.seq_k < 2048 ? 16 : 40) * int64_t{1 << 20};
  // K and V, 16-bit, shared by a group of query heads.
  const int64_t head_bytes =
      int64_t{params.seq_k} * params.head_dim * 4 / (params.heads / params.heads_k);
  order.section_heads = 1;
  while (order.section_heads * 2 * head_bytes <= budget &&
         order.section_heads * 2 <= order.batch_heads) {
    order.section_heads *= 2;
  }
  return order;
}

struct WorkTile {
  int m_block;
  int batch_head;
  int head;
  int batch;
  KeyBlocks keys;
  bool valid;
};

template <Mask kMask, int kBlockM, int kBlockN>
EQX_DEVICE WorkTile decode_tile(const TileOrder& order, const ForwardParams& params, int tile) {
  WorkTile work;
  work.valid = tile < order.tiles;
  const int body_m_blocks = order.m_blocks - order.tail_m_blocks;
  const int tail_start = body_m_blocks * order.batch_heads;
  int rank;  // 0 is the longest query block
  if (tile >= tail_start) {
    const int in_tail = tile - tail_start;
    rank = body_m_blocks + in_tail / order.batch_heads;
    work.batch_head = in_tail % order.batch_heads;
  } else {
    const int section_tiles = order.section_heads * body_m_blocks;
    const int section = tile / section_tiles;
    const int in_section = tile - section * section_tiles;
    const int first_head = section * order.section_heads;
    const int heads = min(order.section_heads, order.batch_heads - first_head);
    rank = in_section / heads;
    work.batch_head = first_head + in_section - rank * heads;
  }
  work.m_block = kMask == Mask::kCausal ? order.m_blocks - 1 - rank : rank;
  work.batch = work.batch_head / params.heads;
  work.head = work.batch_head - work.batch * params.heads;
  work.keys = key_blocks<kMask, kBlockM, kBlockN>(work.m_block, params.seq_k, params.diagonal);
  return work;
}

// What the producer tells the consumers of a tile, through shared memory. They take it in two
// parts: registers are scarce in the main loop.
struct TileSlot {
  static constexpr uint32_t kBytes = 32;
  uint32_t address;

  struct Extent {  // for the main loop
    int m_block;   // negative: there is no tile left
    KeyBlocks keys;
  };
  struct Place {  // for the epilogue
    int batch_head;
    int head;
    int batch;
  };

  EQX_DEVICE void write(const WorkTile& work) const {
    const int m_block = work.valid ? work.m_block : -1;
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %3};" ::"r"(address), "r"(m_block),
                 "r"(work.keys.count), "r"(work.keys.first_masked)
                 : "memory");
    asm volatile("st.shared.v4.b32 [%0 + 16], {%1, %2, %3, %3};" ::"r"(address),
                 "r"(work.batch_head), "r"(work.head), "r"(work.batch)
                 : "memory");
  }
  EQX_DEVICE Extent extent() const {
    const int4 words = load(0);
    return {sm90::warp_uniform(words.x),
            {sm90::warp_uniform(words.y), sm90::warp_uniform(words.z)}};
  }
  EQX_DEVICE Place place() const {
    const int4 words = load(16);
    return {words.x, words.y, words.z};
  }

 private:
  EQX_DEVICE int4 load(int offset) const {
    int4 words;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "r"(address + offset)
                 : "memory");
    return words;
  }
};

}  // namespace eqx_flash
