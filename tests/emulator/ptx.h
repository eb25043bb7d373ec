// SPDX-License-Identifier: Apache-2.0
// The PTX instructions that the kernels use, by name, their operands in PTX's order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cmath>

#include "emulator.h"

namespace emulator::ptx {

// ---- Instructions without an effect here --------------------------------------------------------

inline void createpolicy_fractional_L2_evict_first_b64(uint64_t& policy) { policy = 0; }
inline void createpolicy_fractional_L2_evict_last_b64(uint64_t& policy) { policy = 0; }
inline void griddepcontrol_launch_dependents() {}
inline void griddepcontrol_wait() {}
inline void mov_b32(float&, float) {}
inline void mov_b32(float& x, uint32_t bits) { std::memcpy(&x, &bits, 4); }

// ---- Registers ----------------------------------------------------------------------------------

inline void setmaxnreg(int count) {
  const int more = count - block.thread->registers;
  block.wait_until([more] { return block.free_registers >= more; }, "registers");
  block.free_registers -= more;
  block.thread->registers = count;
}
inline void setmaxnreg_dec_sync_aligned_u32(int count) { setmaxnreg(count); }
inline void setmaxnreg_inc_sync_aligned_u32(int count) { setmaxnreg(count); }

inline void mov_b64(uint64_t& pair, uint32_t low, uint32_t high) {
  pair = uint64_t{high} << 32 | low;
}
inline void ex2_approx_ftz_f32(float& y, float x) {
  y = std::exp2(x);
  if (std::fpclassify(y) == FP_SUBNORMAL) y = 0.f;
}
template <typename Element>
uint32_t bits16(float x) {
  return std::bit_cast<uint16_t>(Element(x));
}
inline void cvt_rn_bf16x2_f32(uint32_t& pair, float high, float low) {
  pair = bits16<__nv_bfloat16>(high) << 16 | bits16<__nv_bfloat16>(low);
}
inline void cvt_rn_f16x2_f32(uint32_t& pair, float high, float low) {
  pair = bits16<__half>(high) << 16 | bits16<__half>(low);
}

// ---- Shared memory ------------------------------------------------------------------------------

template <typename... Words>
void load(uint32_t address, Words&... words) {
  static_assert(((sizeof(Words) == 4) && ...));
  const uint8_t* at = block.memory.of_threads(address, 4 * sizeof...(Words));
  ((std::memcpy(&words, at, 4), at += 4), ...);
}
template <typename... Words>
void store(uint32_t address, Words... words) {
  static_assert(((sizeof(Words) == 4) && ...));
  constexpr uint32_t kBytes = 4 * sizeof...(Words);
  uint8_t* at = block.memory.of_threads(address, kBytes);
  ((std::memcpy(at, &words, 4), at += 4), ...);
  block.thread->unfenced.push_back({address, kBytes});
}
inline void ld_shared_v2_f32(float& x, float& y, uint32_t address) { load(address, x, y); }
inline void ld_shared_v4_f32(float& x, float& y, float& z, float& w, uint32_t address) {
  load(address, x, y, z, w);
}
inline void ld_shared_v4_b32(int& x, int& y, int& z, int& w, uint32_t address) {
  load(address, x, y, z, w);
}
inline void st_shared_v4_f32(uint32_t address, float x, float y, float z, float w) {
  store(address, x, y, z, w);
}
inline void st_shared_v4_b32(uint32_t address, int x, int y, int z, int w) {
  store(address, x, y, z, w);
}
inline void fence_proxy_async_shared_cta() {
  for (const auto& [address, bytes] : block.thread->unfenced) {
    block.memory.show_async_proxy(address, bytes);
  }
  block.thread->unfenced.clear();
}

// Four 8x8 matrices. Lane l holds of each the elements (l / 4, l % 4 * 2) and the next one. The
// lanes meet before and after: it is one instruction of the warp.
inline void ldmatrix_sync_aligned_m8n8_x4_shared_b16(uint32_t& a, uint32_t& b, uint32_t& c,
                                                     uint32_t& d, uint32_t address) {
  const auto rows = block.exchange(address);
  const unsigned lane = block.thread->index % 32;
  block.begin_read(address);
  uint32_t* const registers[4] = {&a, &b, &c, &d};
  for (unsigned m = 0; m < 4; ++m) {
    const auto row = static_cast<uint32_t>(rows[m * 8 + lane / 4]);
    block.memory.of_threads(row, 16);  // checks the address
    load(row + lane % 4 * 4, *registers[m]);
  }
  block.exchange(0);
}
inline void stmatrix_sync_aligned_m8n8_x4_shared_b16(uint32_t address, uint32_t a, uint32_t b,
                                                     uint32_t c, uint32_t d) {
  const auto rows = block.exchange(address);
  const unsigned lane = block.thread->index % 32;
  const uint32_t registers[4] = {a, b, c, d};
  for (unsigned m = 0; m < 4; ++m) {
    store(static_cast<uint32_t>(rows[m * 8 + lane / 4]) + lane % 4 * 4, registers[m]);
  }
  block.exchange(0);
}
inline void stmatrix_sync_aligned_m8n8_x4_trans_shared_b16(uint32_t address, uint32_t a, uint32_t b,
                                                           uint32_t c, uint32_t d) {
  const auto rows = block.exchange(address);
  const unsigned lane = block.thread->index % 32;
  const uint32_t registers[4] = {a, b, c, d};
  for (unsigned m = 0; m < 4; ++m) {
    for (unsigned i = 0; i < 2; ++i) {
      const auto row = static_cast<uint32_t>(rows[m * 8 + lane % 4 * 2 + i]);
      const auto element = static_cast<uint16_t>(registers[m] >> (16 * i));
      std::memcpy(block.memory.of_threads(row + lane / 4 * 2, 2), &element, 2);
      block.thread->unfenced.push_back({row + lane / 4 * 2, 2});
    }
  }
  block.exchange(0);
}

// ---- Barriers -----------------------------------------------------------------------------------

inline Mbarrier& mbarrier(uint32_t address) {
  const auto found = block.mbarriers.find(address);
  if (found == block.mbarriers.end() || !found->second.published) {
    fail("no mbarrier is initialised, and fenced, at " + std::to_string(address));
  }
  return found->second;
}
inline void mbarrier_init_shared_cta_b64(uint32_t address, int arrivals) {
  block.memory.of_threads(address, 8);  // checks the address
  if (!block.mbarriers.insert({address, Mbarrier(arrivals, blockDim.x)}).second) {
    fail("an mbarrier is initialised twice");
  }
  block.thread->unpublished.push_back(address);
}
inline void fence_mbarrier_init_release_cluster() {
  for (uint32_t address : block.thread->unpublished) block.mbarriers.at(address).published = true;
  block.thread->unpublished.clear();
}
inline void mbarrier_arrive_expect_tx_shared_cta_b64(uint32_t address, uint32_t bytes) {
  mbarrier(address).arrive(bytes);
}
inline void mbarrier_arrive_shared_cta_b64(uint32_t address) { mbarrier(address).arrive(); }
inline void mbarrier_arrive_shared_cta_b64_if(int predicate, uint32_t address) {
  if (predicate) mbarrier(address).arrive();
}
inline void mbarrier_try_wait_parity_shared_cta_b64(uint32_t address, uint32_t parity) {
  Mbarrier& barrier = mbarrier(address);
  const int64_t phase = barrier.await(block.thread->index, parity);
  block.wait_until(
      [&barrier, phase] { return barrier.has_completed(phase); },
      "phase " + std::to_string(phase) + " of the mbarrier at " + std::to_string(address));
  if (barrier.has_overrun(phase))
    fail("an mbarrier is a phase ahead of a thread that waits for it");
}
inline NamedBarrier& named_barrier(int number) {
  if (number < 0 || number > 15) fail("there is no named barrier " + std::to_string(number));
  return block.named_barriers[number];
}
inline void bar_arrive(int number, int threads) {
  named_barrier(number).arrive(block.thread->index, threads);
}
inline void bar_sync(int number, int threads) {
  NamedBarrier& barrier = named_barrier(number);
  const uint64_t generation = barrier.generation;
  barrier.arrive(block.thread->index, threads);
  block.wait_until([&barrier, generation] { return barrier.generation != generation; },
                   "named barrier " + std::to_string(number));
}

// ---- Bulk copies --------------------------------------------------------------------------------

// What the emulated cuTensorMapEncodeTiled leaves in a CUtensorMap. Innermost axis first.
struct TensorMap {
  uint8_t* data;
  std::array<int64_t, 4> sizes;
  std::array<int64_t, 4> strides;  // bytes
  std::array<int, 2> box;          // columns, rows; one head, one batch element

  // Calls row(offset in the box in bytes, row in memory, bytes inside the tensor).
  template <typename Row>
  void for_each_row(std::array<int, 4> at, Row&& row) const {
    if (*std::min_element(at.begin(), at.end()) < 0) fail("TMA: a negative coordinate");
    for (int r = 0; r < box[1]; ++r) {
      const bool inside = at[1] + r < sizes[1] && at[2] < sizes[2] && at[3] < sizes[3];
      const int64_t cols = inside ? std::clamp<int64_t>(sizes[0] - at[0], 0, box[0]) : 0;
      row(r * box[0] * 2,
          data + at[0] * 2 + (at[1] + r) * strides[1] + at[2] * strides[2] + at[3] * strides[3],
          cols * 2);
    }
  }
};
inline const TensorMap& tensor_map(const void* map) { return *static_cast<const TensorMap*>(map); }

inline void cp_async_bulk_tensor_4d_shared_cluster_global_mbarrier_complete_tx_bytes(
    uint32_t destination, const void* map, int col, int row, int head, int batch, uint32_t full) {
  if (destination % 128) fail("TMA: a destination that is no multiple of 128");
  block.queue_copy([=, &barrier = mbarrier(full), tensor = tensor_map(map)] {
    tensor.for_each_row({col, row, head, batch}, [&](int offset, const uint8_t* source, int64_t n) {
      for (int piece = 0; piece < 128; piece += 16) {
        uint8_t bytes[16] = {};
        if (piece < n) std::memcpy(bytes, source + piece, 16);
        uint32_t address = destination + offset + piece;
        address ^= (address >> 7 & 7) << 4;
        block.memory.write_async(address, bytes, 16);
      }
    });
    barrier.deliver(tensor.box[0] * tensor.box[1] * 2);
  });
}
inline void cp_async_bulk_tensor_4d_shared_cluster_global_mbarrier_complete_tx_bytes_L2_cache_hint(
    uint32_t destination, const void* map, int col, int row, int head, int batch, uint32_t full,
    uint64_t) {
  cp_async_bulk_tensor_4d_shared_cluster_global_mbarrier_complete_tx_bytes(destination, map, col,
                                                                           row, head, batch, full);
}
inline void cp_async_bulk_tensor_4d_global_shared_cta_bulk_group(const void* map, int col, int row,
                                                                 int head, int batch,
                                                                 uint32_t source) {
  if (source % 128) fail("TMA: a source that is no multiple of 128");
  block.queue_store([=, tensor = tensor_map(map)] {
    tensor.for_each_row({col, row, head, batch}, [&](int offset, uint8_t* target, int64_t n) {
      for (int piece = 0; piece < n; piece += 16) {
        uint32_t address = source + offset + piece;
        address ^= (address >> 7 & 7) << 4;
        std::memcpy(target + piece, block.memory.of_async_proxy(address, 16), 16);
      }
    });
  });
}
inline void cp_async_bulk_commit_group() {
  for (Queued& store : block.thread->stores) store.committed = true;
}
inline void cp_async_bulk_wait_group_read() {
  const Thread& me = *block.thread;
  block.wait_until([&me] { return me.stores.empty() || !me.stores.front().committed; },
                   "its bulk stores");
}
inline void red_global_add_v4_f32(float* destination, float x, float y, float z, float w) {
  if (reinterpret_cast<uintptr_t>(destination) % 16) fail("a misaligned reduction");
  destination[0] += x;
  destination[1] += y;
  destination[2] += z;
  destination[3] += w;
}

// ---- wgmma --------------------------------------------------------------------------------------

inline void wgmma_fence_sync_aligned() { block.thread->registers_fenced = true; }
inline void wgmma_commit_group_sync_aligned() {
  block.thread->batches.push_back(block.thread->products);
}
inline void wgmma_wait_group_sync_aligned(int pending) {
  block.exchange(0);  // the lanes meet: it is one instruction of the warp
  block.wait_for_batches(pending);
}

template <typename Element>
float to_float(uint16_t bits) {
  return static_cast<float>(std::bit_cast<Element>(bits));
}

// ---- mma ----------------------------------------------------------------------------------------

// One warp's product. Lane l has of A and D the rows l / 4 and l / 4 + 8, of B the column l / 4.
template <typename Element>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const unsigned lane = block.thread->index % 32;
  float left[16][16], right[16][8];
  for (int i = 0; i < 6; ++i) {
    const auto all = block.exchange(i < 4 ? a[i] : b[i - 4]);
    for (int l = 0; l < 32; ++l) {
      for (int half = 0; half < 2; ++half) {
        const float x = to_float<Element>(static_cast<uint16_t>(all[l] >> (16 * half)));
        if (i < 4) {
          left[l / 4 + i % 2 * 8][l % 4 * 2 + i / 2 * 8 + half] = x;
        } else {
          right[l % 4 * 2 + (i - 4) * 8 + half][l / 4] = x;
        }
      }
    }
  }
  for (unsigned i = 0; i < 4; ++i) {
    for (int k = 0; k < 16; ++k) {
      d[i] += left[lane / 4 + i / 2 * 8][k] * right[k][lane % 4 * 2 + i % 2];
    }
  }
  block.end_reads(block.thread->batches.size());
}
inline void mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(float& d0, float& d1, float& d2,
                                                                float& d3, uint32_t a0, uint32_t a1,
                                                                uint32_t a2, uint32_t a3,
                                                                uint32_t b0, uint32_t b1, float c0,
                                                                float c1, float c2, float c3) {
  float d[4] = {c0, c1, c2, c3};
  mma_m16n8k16<__nv_bfloat16>(d, {a0, a1, a2, a3}, {b0, b1});
  d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
}
inline void mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(float& d0, float& d1, float& d2,
                                                              float& d3, uint32_t a0, uint32_t a1,
                                                              uint32_t a2, uint32_t a3, uint32_t b0,
                                                              uint32_t b1, float c0, float c1,
                                                              float c2, float c3) {
  float d[4] = {c0, c1, c2, c3};
  mma_m16n8k16<__half>(d, {a0, a1, a2, a3}, {b0, b1});
  d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
}

}  // namespace emulator::ptx
