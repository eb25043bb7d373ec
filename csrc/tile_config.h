// SPDX-License-Identifier: Apache-2.0
// The tile sizes of every kernel, in one place. Python reads them through _C.tile_config().
#pragma once

#include <cstdint>

#include "params.h"

namespace eqx_flash {

inline constexpr int kMaxSharedMemory = 232448;  // a block's limit on sm_90, bytes
inline constexpr int kWarpgroupRows = 64;        // rows of one wgmma

// What setmaxnreg can distribute: the registers of a thread of each warpgroup, summed, as they are
// when a block starts. For more it waits forever.
constexpr int registers_at_start(int threads) { return 65536 / threads / 8 * 8 * (threads / 128); }

struct ForwardTile {
  int consumer_warpgroups;  // each owns 64 query rows
  int block_n;              // keys per step
  int k_stages;             // depth of the K ring
  int v_stages;
  int q_buffers;            // one will do where Q moves on to registers
  bool own_output_buffer;   // for TMA's stores; else O leaves from the registers
  bool query_in_registers;  // Q as register operand of S = Q K^T: frees shared-memory bandwidth
  bool two_producers;       // a thread of its own loads V
  bool overlap_tiles;       // the first scores of the next tile beside the last product of this one
  int producer_registers;   // 24 would do for loads alone; decoding tiles needs more
  int consumer_registers;

  constexpr int block_m() const { return kWarpgroupRows * consumer_warpgroups; }
  constexpr int threads() const { return 128 * (1 + consumer_warpgroups); }
  constexpr int shared_memory_bytes(int head_dim) const {
    const int row = head_dim * 2;
    const int queries = block_m() * row * (q_buffers + (own_output_buffer ? 1 : 0));
    const int keys_and_values = (k_stages + v_stages) * block_n * row;
    constexpr int kBarriersAndTileSlots = 320;
    constexpr int kAlignment = 1024;  // the dynamic base is only 16-byte aligned
    return queries + keys_and_values + kBarriersAndTileSlots + kAlignment;
  }
};

// `head_dim` is the size of the tile; smaller head dims run in the next larger one, where TMA fills
// the missing columns with zeros on the way in and drops them on the way out.
constexpr ForwardTile forward_tile(int head_dim, Mask mask) {
  switch (head_dim) {
    case 64:
      // exp2, tensor cores and instruction issue are level at this head dim: a third warpgroup
      // keeps one of them in its softmax while the others multiply.
      return {.consumer_warpgroups = 3,
              .block_n = 128,
              .k_stages = 3,
              .v_stages = 4,  // the fourth is worth 2 % at 512 keys without a mask
              .q_buffers = 2,
              .own_output_buffer = true,
              .query_in_registers = false,  // 160 registers do not hold it
              .two_producers = false,
              .overlap_tiles = true,  // 1 to 4 %
              .producer_registers = 32,
              .consumer_registers = 160};
    case 128:
      return {.consumer_warpgroups = 2,
              .block_n = 128,
              .k_stages = mask == Mask::kFull ? 3 : 2,
              .v_stages = mask == Mask::kFull ? 2 : 3,
              .q_buffers = 1,
              .own_output_buffer = true,
              .query_in_registers = true,
              // Worth 9 % at 512 keys and 2 at 2k. With a mask it costs 1 to 4 %.
              .two_producers = mask == Mask::kFull,
              .overlap_tiles = true,  // 1 %; with a mask 4 % at 512 keys and 1 to 3 above
              .producer_registers = 40,
              .consumer_registers = 232};
    default:
      // 256: O alone takes 128 registers a thread and Q 64 KB. More stages of fewer keys, 64 and
      // not 80, are worth 4 to 6 % at 512 keys and 1 to 3 at 2k; O from the registers, which leaves
      // Q's buffer to the next Q, 1 to 7 and 2 to 3 %.
      return {.consumer_warpgroups = 2,
              .block_n = 64,
              .k_stages = 2,
              .v_stages = 3,
              .q_buffers = 1,
              .own_output_buffer = false,
              .query_in_registers = false,
              .two_producers = false,
              .overlap_tiles = false,
              .producer_registers = 40,
              .consumer_registers = 232};
  }
}

// The deterministic backward is two kernels, each with one accumulation order: dK and dV with a key
// block stationary, dQ with a query block stationary. Two consumer warpgroups in both.
struct BackwardTile {
  int block_m;   // queries per step of the dK/dV kernel, queries per block of the dQ kernel
  int block_n;   // keys per block of the dK/dV kernel, keys per step of the dQ kernel
  int k_stages;  // of the operand that two products of a step read
  int v_stages;
  int key_stages = 1;  // of a block's K and V: the fused kernels load the next one's in advance
  int ds_stages = 0;   // of dS, which the fused kernels hand over
  // Without a mask, blocks of keys that run side by side would read the same queries at the same
  // moments. Staggered, each begins where the one before it is after a step.
  bool staggered = false;
};

constexpr int kBackwardThreads = 3 * 128;
constexpr int kBackwardProducerRegisters = 24;
constexpr int kBackwardConsumerRegisters = 240;
static_assert(kBackwardProducerRegisters + 2 * kBackwardConsumerRegisters <=
              registers_at_start(kBackwardThreads));

constexpr BackwardTile backward_dq_tile(int head_dim) {
  switch (head_dim) {
    case 64:
      return {.block_m = 128, .block_n = 128, .k_stages = 2, .v_stages = 2};
    case 128:
      // 128 keys would leave no register beside S, dP, dS and dQ.
      return {.block_m = 128, .block_n = 96, .k_stages = 2, .v_stages = 2};
    default:
      return {.block_m = 128, .block_n = 64, .k_stages = 2, .v_stages = 1};
  }
}

constexpr BackwardTile backward_dkdv_tile(int head_dim) {
  switch (head_dim) {
    case 64:
      return {.block_m = 64, .block_n = 128, .k_stages = 3, .v_stages = 3};
    case 128:
      return {.block_m = 64, .block_n = 128, .k_stages = 2, .v_stages = 2};
    default:
      // dK and dV take 128 registers each: one warpgroup for one, over 64 keys.
      // L2 is what limits this: blocks that begin at queries of their own are worth 7 to 11 % on
      // long sequences.
      return {.block_m = 64, .block_n = 64, .k_stages = 2, .v_stages = 2, .staggered = true};
  }
}

// At head dim 256 the accumulators of dK and dV leave no registers for dQ.
constexpr bool has_fused_backward(int head_dim) { return head_dim <= 128; }

constexpr BackwardTile backward_fused_tile(int head_dim) {
  switch (head_dim) {
    case 64:
      // 128 queries a step would not leave registers for S and dP (C7512). The third stage is worth
      // 8 %.
      return {.block_m = 64,
              .block_n = 128,
              .k_stages = 3,
              .v_stages = 3,
              .key_stages = 2,
              .ds_stages = 2};
    default:
      return {.block_m = 64,
              .block_n = 128,
              .k_stages = 2,
              .v_stages = 2,
              .key_stages = 2,
              .ds_stages = 2};
  }
}

// ---- Schedules ----------------------------------------------------------------------------------

// What the heads of a section (see BlockOrder) may read together, in bytes. Without a mask, blocks
// are equal: one head at a time reuses what it reads best. With one, blocks that begin together
// read the same keys at the same time, and mixing heads levels their lengths: few heads, but enough
// for all multiprocessors, which at head dim 256 takes more bytes. Measured with benchmarks/tune.py
// at 512, 2k, 8k and 16k; half as much costs up to 4 %, twice as much up to 2.
constexpr int64_t forward_section_bytes(int head_dim, Mask mask, int seq_k) {
  if (mask == Mask::kFull) return 0;
  return seq_k < 2048 && head_dim <= 128 ? 8 << 20 : 16 << 20;
}
// The same for the backward: half or twice as much costs up to 9 %.
constexpr int64_t backward_section_bytes(int head_dim, Mask mask, int seq_k) {
  if (mask == Mask::kFull) return 0;
  if (seq_k < 2048) return 2 << 20;
  return head_dim <= 64 ? 4 << 20 : 16 << 20;
}

constexpr bool fits(int head_dim, Mask mask) {
  const ForwardTile tile = forward_tile(head_dim, mask);
  return tile.shared_memory_bytes(head_dim) <= kMaxSharedMemory &&
         tile.producer_registers + tile.consumer_warpgroups * tile.consumer_registers <=
             registers_at_start(tile.threads());
}
static_assert(fits(64, Mask::kFull) && fits(64, Mask::kCausal));
static_assert(fits(128, Mask::kFull) && fits(128, Mask::kCausal));
static_assert(fits(256, Mask::kFull) && fits(256, Mask::kCausal));

}  // namespace eqx_flash
