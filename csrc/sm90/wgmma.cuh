// SPDX-License-Identifier: Apache-2.0
// Asynchronous warpgroup matrix products, D[64, N] += A[64, 16] B[16, N], fp32 accumulators.
// PTX ISA: "Asynchronous Warpgroup Level Matrix Instructions".
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "sm90/device.cuh"
#include "sm90/registers.cuh"
#include "sm90/smem_tile.cuh"
#include "sm90/start_tile.cuh"

namespace eqx_flash::sm90 {

// Which axis of B runs along a shared-memory row: k (rows are columns of B), or n.
enum class Major { kK, kMN };

// One instruction: `shared` reads A through a descriptor, `registers` from a fragment of four.
// The specialisations are written by generate_wgmma.py at configure time.
template <typename Element, int kN, Major kMajorB>
struct WgmmaAtom;

#include "wgmma_atoms.inc"

// Orders ordinary register accesses before the wgmmas that follow: once before each batch.
EQX_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

EQX_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending committed batches are in flight. Pin the results afterwards.
template <int kPending>
EQX_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// A lane of warp w holds of a 64 x N accumulator the rows 16 w + lane / 4 (+ 8) and the columns
// 8 j + 2 (lane % 4) (+ 1), in the order: 4 j + {0, 1} first row, 4 j + {2, 3} second row.
// Packed pairwise to 16 bits this is, without any shuffle, the A fragment of the next product.
EQX_DEVICE int accumulator_row(int thread) { return (thread / kWarp) * 16 + (thread % kWarp) / 4; }
EQX_DEVICE int accumulator_col(int thread) { return (thread % 4) * 2; }

// A warpgroup's 64 rows of shared memory as the A operand of step k.
template <typename Slab>
EQX_DEVICE void load_operand_step(uint32_t* a, uint32_t slab, int thread, int k) {
  static_assert(Slab::kRows == 64);
  const int row = (thread / kWarp) * 16 + thread % 16;
  load_matrix_x4(slab + Slab::piece_offset(row, 2 * k + (thread % kWarp) / 16), a);
}

// The same of all steps.
template <typename Slab>
EQX_DEVICE void load_operand(uint32_t (&a)[Slab::kCols / 4], uint32_t slab, int thread) {
#pragma unroll
  for (int k = 0; k < Slab::kCols / 16; ++k) load_operand_step<Slab>(a + 4 * k, slab, thread, k);
}

// D = A B^T, or D += A B^T with kAccumulate: A [64, kCols] and B [N, kCols] K-major in shared
// memory.
template <typename Element, typename TileA, typename TileB, bool kAccumulate = false>
EQX_DEVICE void mma_shared_k_major(float (&acc)[TileB::kRows / 2], Descriptor a, Descriptor b) {
#pragma unroll
  for (int k = 0; k < TileA::kCols / 16; ++k) {
    WgmmaAtom<Element, TileB::kRows, Major::kK>::shared(acc, (a + TileA::k_major_step(k)).bits(),
                                                        (b + TileB::k_major_step(k)).bits(),
                                                        kAccumulate || k > 0);
  }
}

// D[i, j] = start[j], or D[i, j] += start[j].
template <int kN, Start kStart>
EQX_DEVICE void mma_start(float (&acc)[kN / 2], Descriptor ones, Descriptor tile, bool accumulate) {
  using Tile = StartTile<kN>;
  WgmmaAtom<__nv_bfloat16, kN, Major::kK>::shared(acc, Tile::template choice<kStart>(ones),
                                                  Tile::operand(tile), accumulate);
}

// D = A B^T, or D += A B^T with kAccumulate, with A in registers.
template <typename Element, typename TileB, bool kAccumulate = false>
EQX_DEVICE void mma_registers_k_major(float (&acc)[TileB::kRows / 2],
                                      const uint32_t (&a)[TileB::kCols / 4], Descriptor b) {
#pragma unroll
  for (int k = 0; k < TileB::kCols / 16; ++k) {
    WgmmaAtom<Element, TileB::kRows, Major::kK>::registers(
        acc, a + 4 * k, (b + TileB::k_major_step(k)).bits(), kAccumulate || k > 0);
  }
}

// One warp's D[16, 8] += A[16, 16] B[16, 8], at once. A and D are the fragments of its rows of a
// wgmma, B is two matrices of load_matrix_x4. PTX ISA: "mma".
template <typename Element>
EQX_DEVICE void mma_warp(float* d, const uint32_t* a, const uint32_t* b);
template <>
EQX_DEVICE void mma_warp<__nv_bfloat16>(float* d, const uint32_t* a, const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
EQX_DEVICE void mma_warp<__half>(float* d, const uint32_t* a, const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// D = A B^T for the 16 rows of one warp, whatever the others do: B [N, kCols] K-major in shared
// memory; operand(a, k) gives the fragment of A of step k.
template <typename Element, typename TileB, typename Operand>
EQX_DEVICE void mma_warp_k_major(float (&acc)[TileB::kRows / 2], uint32_t tile, int thread,
                                 Operand&& operand) {
  const int lane = thread % kWarp;
#pragma unroll
  for (float& x : acc) x = 0.f;
#pragma unroll
  for (int k = 0; k < TileB::kCols / 16; ++k) {
    uint32_t a[4];
    operand(a, k);
#pragma unroll
    for (int n = 0; n < TileB::kRows / 16; ++n) {
      const int row = 16 * n + (lane / 16) * 8 + lane % 8;
      uint32_t b[4];
      load_matrix_x4(tile + TileB::piece_offset(row, 2 * k + (lane / 8) % 2), b);
      mma_warp<Element>(acc + 8 * n, a, b);
      mma_warp<Element>(acc + 8 * n + 4, a, b + 2);
    }
  }
}

// D += A B with A [64, kRows] in registers and B [kRows, kCols] row by row in shared memory.
template <typename Element, typename TileB>
EQX_DEVICE void mma_registers_mn_major(float (&acc)[TileB::kCols / 2],
                                       const uint32_t (&a)[TileB::kRows / 4], Descriptor b) {
#pragma unroll
  for (int k = 0; k < TileB::kRows / 16; ++k) {
    WgmmaAtom<Element, TileB::kCols, Major::kMN>::registers(
        acc, a + 4 * k, (b + TileB::mn_major_step(k)).bits(), true);
  }
}

}  // namespace eqx_flash::sm90
