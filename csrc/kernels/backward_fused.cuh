// SPDX-License-Identifier: Apache-2.0
// The fast backward kernel: dK, dV and dQ in one pass, five products a step instead of seven.
// Keys stay; each step's share of dQ is added in fp32 to an accumulator in L2 by a warp of its own,
// in whatever order the thread blocks get there.
#pragma once

#include "kernels/backward_dkdv.cuh"

namespace eqx_flash {

// dQ of one step is computed and staged in two parts, each half of the head dim, one a warpgroup.
// The accumulator holds the parts of a query block one after the other, each as the threads of the
// warpgroup hold it: float4 [columns / 8][thread].
template <int kHeadDim>
struct DqParts {
  static constexpr int kBlockM = backward_fused_tile(kHeadDim).block_m;
  static constexpr int kCols = kHeadDim / 2;
  static constexpr int kFloats = kBlockM * kCols;
  static_assert(kBlockM == kWarpgroupRows);

  EQX_DEVICE static int64_t offset(int64_t batch_head, int padded_seq_q, int m_block, int part) {
    return (batch_head * padded_seq_q + int64_t{m_block} * kBlockM) * kHeadDim + part * kFloats;
  }
};

template <typename Element, int kHeadDim, Mask kMask>
struct BackwardFusedKernel
    : BackwardDkdvKernel<Element, kHeadDim, kMask, backward_fused_tile(kHeadDim)> {
  using Base = BackwardDkdvKernel<Element, kHeadDim, kMask, backward_fused_tile(kHeadDim)>;
  using Consumer = typename Base::Consumer;
  using Cursor = typename Base::Cursor;
  using KeySlab = typename Base::KeySlab;
  using Parts = DqParts<kHeadDim>;
  using ScoreTile = sm90::SmemTile<Base::kBlockM, Base::kBlockN>;  // dS, queries by keys
  static constexpr int kBlockM = Base::kBlockM;
  static constexpr int kPartBytes = Parts::kFloats * 4;
  static constexpr int kReducerBarrierThreads = sm90::kWarpgroup + sm90::kWarp;
  static_assert(!Base::kSplitOutputs);

  struct Smem : Base::Smem {
    static constexpr uint32_t kDs = (Base::Smem::kEnd + 1023) / 1024 * 1024;
    static constexpr uint32_t kDq = kDs + 2 * ScoreTile::kBytes;  // dS twice, see consume()
    static constexpr int kBytes = kDq + 2 * kPartBytes + 1024;    // alignment
    static_assert(kBytes <= kMaxSharedMemory);
    uint32_t ds, dq;

    EQX_DEVICE explicit Smem(const void* dynamic) : Base::Smem(dynamic) {
      ds = this->k + kDs;
      dq = this->k + kDq;
    }
  };

  // One warp: sends each staged part of dQ to the accumulator.
  EQX_DEVICE static void reduce(const BackwardDkdvArguments& args, const Smem& smem) {
    const BackwardParams& params = args.params;
    const ForwardParams& shape = params.forward;
    const auto at = Base::block(args);
    const int group = shape.heads / shape.heads_k;
    for (int part = 0; part < 2; ++part) {  // both buffers start empty
      sm90::named_barrier_arrive(sm90::NamedBarrier::kDqEmpty, part, kReducerBarrierThreads);
    }
    for (int head = at.key_head * group; head < (at.key_head + 1) * group; ++head) {
      const int64_t batch_head = int64_t{at.batch} * shape.heads + head;
#pragma unroll 1
      for (int m_block = at.queries.first; m_block < at.queries.end; ++m_block) {
        for (int part = 0; part < 2; ++part) {
          // The warpgroup has staged its part.
          sm90::named_barrier_sync(sm90::NamedBarrier::kDqFull, part, kReducerBarrierThreads);
          if (threadIdx.x % sm90::kWarp == 0) {
            sm90::bulk_reduce_add(params.dq_accumulator +
                                      Parts::offset(batch_head, params.padded_seq_q, m_block, part),
                                  smem.dq + part * kPartBytes, kPartBytes);
            sm90::tma_store_commit();
            sm90::tma_store_wait_read();
          }
          __syncwarp();
          // The warpgroup may stage the next part.
          sm90::named_barrier_arrive(sm90::NamedBarrier::kDqEmpty, part, kReducerBarrierThreads);
        }
      }
    }
  }

  EQX_DEVICE static void consume(const BackwardDkdvArguments& args, const Smem& smem,
                                 int warpgroup) {
    const Consumer me(args, smem, warpgroup);
    float rS[kBlockM / 2], rdP[kBlockM / 2];
    uint32_t rP[kBlockM / 4], rdS[kBlockM / 4];
    float rdK[kHeadDim / 2], rdV[kHeadDim / 2];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) rdK[i] = rdV[i] = 0.f;

    // dS^T in registers -> dS in shared memory; this warpgroup's keys are one slab of columns.
    auto store_ds = [&](uint32_t ds) {
      const int lane = me.thread % sm90::kWarp;
      const int piece = 8 * warpgroup + 2 * (me.thread / sm90::kWarp) + (lane / 8) % 2;
#pragma unroll
      for (int j = 0; j < kBlockM / 16; ++j) {
        const int row = 16 * j + 8 * (lane / 16) + lane % 8;
        sm90::store_matrix_x4_transposed(ds + ScoreTile::piece_offset(row, piece), rdS + 4 * j);
      }
      sm90::fence_async_proxy();
    };
    auto start_dq = [&](float (&rdQ)[Parts::kCols / 2], uint32_t ds) {  // dQ = dS K
      const auto a = ScoreTile::k_major(ds);
      const int cols = warpgroup * Parts::kCols;
      const auto b = KeySlab::mn_major(smem.k) + (cols / 64 * KeySlab::kSlabBytes + cols % 64 * 2);
      sm90::wgmma_fence();
#pragma unroll
      for (int k = 0; k < Base::kBlockN / 16; ++k) {
        const int keys = (k / 4) * KeySlab::kBytes + KeySlab::mn_major_step(k % 4);
        sm90::WgmmaAtom<Element, Parts::kCols, sm90::Major::kMN>::shared(
            rdQ, (a + ScoreTile::k_major_step(k)).bits(), (b + keys).bits(), k > 0);
      }
      sm90::wgmma_commit();
    };
    auto stage_dq = [&](const float (&rdQ)[Parts::kCols / 2]) {
      // The reducer has read the previous part.
      sm90::named_barrier_sync(sm90::NamedBarrier::kDqEmpty, warpgroup, kReducerBarrierThreads);
      const uint32_t part = smem.dq + warpgroup * kPartBytes + me.thread * 16;
#pragma unroll
      for (int i = 0; i < Parts::kCols / 8; ++i) {
        asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(part + i * 2048),
                     "f"(rdQ[4 * i]), "f"(rdQ[4 * i + 1]), "f"(rdQ[4 * i + 2]), "f"(rdQ[4 * i + 3])
                     : "memory");
      }
      sm90::fence_async_proxy();
      // The part is staged.
      sm90::named_barrier_arrive(sm90::NamedBarrier::kDqFull, warpgroup, kReducerBarrierThreads);
    };

    smem.keys_full.wait(0);  // K and V have landed
    Cursor cursor;
    int m_block = me.at.queries.first;
#pragma unroll 1
    for (int step = 0; step < me.at.steps; ++step) {
      // Two buffers: one warpgroup may write the next dS while the other still multiplies this one.
      const uint32_t ds = smem.ds + (step % 2) * ScoreTile::kBytes;
      me.init_dp(rdP, cursor);
      me.start_scores(rS, cursor);
      me.start_dp(rdP, cursor);
      sm90::wgmma_wait<1>();  // S
      me.probabilities(rS, cursor, m_block);
      sm90::wgmma_wait<0>();  // dP
      sm90::pin(rdP);
      sm90::pin(rS);  // packing earlier would need more registers than there are
      Consumer::pack(rP, rS);
      Consumer::pack_product(rdS, rS, rdP);
      me.multiply(rdV, rP, smem.dout, cursor);  // dV += P^T dO
      sm90::wgmma_commit();
      store_ds(ds);
      // Both halves of dS are in shared memory.
      sm90::named_barrier_sync(sm90::NamedBarrier::kDsReady, 0, 2 * sm90::kWarpgroup);
      float rdQ[Parts::kCols / 2];
      start_dq(rdQ, ds);
      sm90::wgmma_wait<1>();  // dV
      sm90::pin(rdV);
      me.release(smem.dout, cursor);          // the producer may refill dO
      me.multiply(rdK, rdS, smem.q, cursor);  // dK += dS^T Q
      sm90::wgmma_commit();
      sm90::wgmma_wait<1>();  // dQ
      sm90::pin(rdQ);
      stage_dq(rdQ);
      sm90::wgmma_wait<0>();  // dK
      sm90::pin(rdK);
      me.release(smem.q, cursor);  // the producer may refill Q
      cursor.advance();
      m_block = me.next_query_block(m_block);
    }
    // The other warpgroup reads all of K for dQ: wait for it before K's slab takes dK.
    sm90::named_barrier_sync(sm90::NamedBarrier::kDsReady, 0, 2 * sm90::kWarpgroup);
    const uint32_t slab = warpgroup * KeySlab::kBytes;
    me.store(args.dv, smem.v + slab, rdV, 1.f, warpgroup);
    me.store(args.dk, smem.k + slab, rdK, args.params.forward.softmax_scale, warpgroup);
    if (me.thread == 0) sm90::tma_store_wait_read();  // shared memory must outlive the stores
  }
};

template <typename Element, int kHeadDim, Mask kMask>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    backward_fused_kernel(const __grid_constant__ BackwardDkdvArguments args) {
  using Kernel = BackwardFusedKernel<Element, kHeadDim, kMask>;
  extern __shared__ uint8_t dynamic_smem[];
  const typename Kernel::Smem smem(dynamic_smem);
  const int warpgroup = sm90::warp_uniform(threadIdx.x / sm90::kWarpgroup);
  if (threadIdx.x == 0) smem.init_barriers();
  __syncthreads();
  if (warpgroup == 0) {
    sm90::shrink_registers<kBackwardProducerRegisters>();
    const int warp = sm90::warp_uniform(threadIdx.x / sm90::kWarp);
    if (threadIdx.x == 0) Kernel::produce(args, smem);
    if (warp == 1) Kernel::reduce(args, smem);
  } else {
    sm90::grow_registers<kBackwardConsumerRegisters>();
    Kernel::consume(args, smem, warpgroup - 1);
  }
}

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
  const int part = blockIdx.x % 2;
  const int batch_head = blockIdx.x / 2 / m_blocks;
  const int m_block = blockIdx.x / 2 - batch_head * m_blocks;
  const int batch = batch_head / shape.heads;
  const int head = batch_head - batch * shape.heads;
  const int group = threadIdx.x % kGroups;
  const int warp = threadIdx.x / (8 * kGroups);
  const int row_of_eight = threadIdx.x / kGroups % 8;
  const auto* fragments = reinterpret_cast<const float4*>(
      params.dq_accumulator + Parts::offset(batch_head, params.padded_seq_q, m_block, part));

  float4 f[4];  // of the four threads that held these eight columns
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
