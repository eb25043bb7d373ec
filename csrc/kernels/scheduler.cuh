// SPDX-License-Identifier: Apache-2.0
// Which block of queries a persistent thread block works on next.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/mask.cuh"
#include "params.h"
#include "sm90/barrier.cuh"
#include "sm90/registers.cuh"
#include "tile_config.h"

namespace eqx_flash {

struct RankedHead {
  int rank;  // of the block inside its head; 0 is the longest
  int batch_head;
};

// Blocks are numbered so that those in flight together share what they read in L2: sections of a
// few heads, inside a section blocks from the longest to the shortest (causal), heads fastest.
// The shortest blocks of all heads may be kept for the very end, to fill the tail of the grid.
struct BlockOrder {
  int total;
  int blocks;       // per head
  int tail_blocks;  // of those, the shortest ones that are kept for the end
  int batch_heads;
  int section_heads;

  EQX_DEVICE RankedHead place(int index) const {
    const int body_blocks = blocks - tail_blocks;
    const int tail_start = body_blocks * batch_heads;
    if (index >= tail_start) {
      const int in_tail = index - tail_start;
      const int rank = in_tail / batch_heads;
      return {body_blocks + rank, in_tail - rank * batch_heads};
    }
    const int section_total = section_heads * body_blocks;
    const int section = index / section_total;
    const int in_section = index - section * section_total;
    const int first_head = section * section_heads;
    const int heads = min(section_heads, batch_heads - first_head);
    const int rank = in_section / heads;
    return {rank, first_head + in_section - rank * heads};
  }
};

// Sections hold as many heads as read `section_bytes` together; at least one.
inline BlockOrder make_block_order(int blocks, int tail_blocks, int batch_heads, int64_t head_bytes,
                                   int64_t section_bytes) {
  BlockOrder order{.total = blocks * batch_heads,
                   .blocks = blocks,
                   .tail_blocks = tail_blocks,
                   .batch_heads = batch_heads,
                   .section_heads = 1};
  while (order.section_heads * 2 * head_bytes <= section_bytes &&
         order.section_heads * 2 <= batch_heads) {
    order.section_heads *= 2;
  }
  return order;
}

// Query blocks of the forward pass.
inline BlockOrder make_forward_order(const ForwardParams& params, int block_m) {
  const bool causal = params.mask == Mask::kCausal;
  const int blocks = (params.seq_q + block_m - 1) / block_m;
  // Below 16 blocks a head, a quarter of them is too little work to level anything.
  const int tail_blocks = causal && blocks >= 16 ? blocks / 4 : 0;
  // K and V, 16-bit, shared by a group of query heads.
  const int64_t head_bytes =
      int64_t{params.seq_k} * params.head_dim * 4 / (params.heads / params.heads_k);
  return make_block_order(blocks, tail_blocks, params.batch * params.heads, head_bytes,
                          forward_section_bytes(params.head_dim, params.mask, params.seq_k));
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
EQX_DEVICE WorkTile decode_tile(const BlockOrder& order, const ForwardParams& params, int tile) {
  const RankedHead at = order.place(tile);
  WorkTile work;
  work.valid = tile < order.total;
  work.m_block = kMask == Mask::kCausal ? order.blocks - 1 - at.rank : at.rank;
  work.batch_head = at.batch_head;
  work.batch = at.batch_head / params.heads;
  work.head = at.batch_head - work.batch * params.heads;
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

    EQX_DEVICE Extent uniform() const {
      return {sm90::warp_uniform(m_block),
              {sm90::warp_uniform(keys.count), sm90::warp_uniform(keys.first_masked)}};
    }
  };
  struct Place {  // for the epilogue
    int batch_head;
    int head;
    int batch;
    int m_block;
  };

  EQX_DEVICE void write(const WorkTile& work) const {
    const int m_block = work.valid ? work.m_block : -1;
    sm90::store_shared_x4(address, m_block, work.keys.count, work.keys.first_masked, 0);
    sm90::store_shared_x4(address + 16, work.batch_head, work.head, work.batch, work.m_block);
  }
  EQX_DEVICE Extent extent() const {
    const int4 words = sm90::load_shared_x4(address);
    return {words.x, {words.y, words.z}};
  }
  EQX_DEVICE Place place() const {
    const int4 words = sm90::load_shared_x4(address + 16);
    return {words.x, words.y, words.z, words.w};
  }
};

// One thread decides on this thread block's tiles, one ahead of the others, who read of it in a
// ring of slots: write(slot, tile, decode(tile)) says whether there is such a tile. The first ones
// are given; the next are the counter's, asked for when `wanted` says so, or every gridDim.x-th.
template <bool kDynamic, typename Decode, typename Write>
EQX_DEVICE void deal_tiles(const sm90::Ring<2>& slots, sm90::Barrier wanted, int* counter,
                           Decode&& decode, Write&& write) {
  int tile = blockIdx.x;
  for (int tile_index = 0;; ++tile_index) {
    const auto slot_at = sm90::Cursor<2>::after(tile_index);
    const auto work = decode(tile);
    slots.wait_empty(slot_at);  // all have read the tile before the last
    const bool valid = write(slots.buffer(slot_at.stage), tile, work);
    slots.full(slot_at.stage).arrive();
    if (!valid) break;
    if constexpr (kDynamic) {
      wanted.wait(tile_index % 2);  // most of this tile has been asked for
      tile = gridDim.x + atomicAdd(counter, 1);
    } else {
      tile += gridDim.x;
    }
  }
}

}  // namespace eqx_flash
