// SPDX-License-Identifier: Apache-2.0
// The fast backward kernel where registers allow a third consumer warpgroup: two hold keys and
// compute dK and dV, the third takes dS from them and computes dQ, which it adds to the accumulator
// straight from its registers. The warpgroups of the keys never wait for each other, nor for dQ.
#pragma once

#include "kernels/backward_dkdv.cuh"
#include "kernels/dq_accumulator.cuh"

namespace eqx_flash {

template <typename Element, int kHeadDim, Mask kMask>
struct BackwardFusedDqWarpgroupKernel
    : BackwardDkdvKernel<Element, kHeadDim, kMask, backward_fused_tile(kHeadDim)> {
  using Base = BackwardDkdvKernel<Element, kHeadDim, kMask, backward_fused_tile(kHeadDim)>;
  using Consumer = typename Base::Consumer;
  using Cursor = typename Base::Cursor;
  using KeySlab = typename Base::KeySlab;
  using QueryTile = typename Base::QueryTile;
  using ScoreTile = typename Base::ScoreTile;
  using Parts = DqParts<kHeadDim>;
  static constexpr int kBlockM = Base::kBlockM;
  static constexpr int kScoreStages = 2;  // of dS
  using ScoreCursor = sm90::Cursor<kScoreStages>;
  static constexpr int kThreads = 4 * sm90::kWarpgroup;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 208;  // S, dP, P, dS, dK, dV and V: 176
  static constexpr int kDqRegisters = 72;
  static_assert(kProducerRegisters + 2 * kConsumerRegisters + kDqRegisters <= 512);
  static_assert(!Base::kSplitOutputs);

  struct Smem : Base::Smem {
    static constexpr uint32_t kDs = (Base::Smem::kEnd + 1023) / 1024 * 1024;
    static constexpr int kBytes = kDs + kScoreStages * ScoreTile::kBytes + 1024;  // alignment
    static_assert(kBytes <= kMaxSharedMemory);
    sm90::Ring<kScoreStages> ds;

    EQX_DEVICE explicit Smem(const void* dynamic) : Base::Smem(dynamic) {
      ds = {this->k + kDs, ScoreTile::kBytes, this->keys_full.address + sm90::Barrier::kBytes};
    }
    EQX_DEVICE void init_barriers() const {
      for (int stage = 0; stage < kScoreStages; ++stage) {
        ds.full(stage).init(Base::kConsumerThreads);
        ds.empty(stage).init(sm90::kWarpgroup);
      }
      Base::Smem::init_barriers();
    }
  };

  // --------------------------------------------------------------------------- dQ's warpgroup

  EQX_DEVICE static void accumulate_dq(const BackwardDkdvArguments& args, const Smem& smem) {
    const ForwardParams& shape = args.params.forward;
    const auto at = Base::block(args);
    const int group = shape.heads / shape.heads_k;
    const int thread = threadIdx.x % sm90::kWarpgroup;
    const auto k = KeySlab::mn_major(smem.k);
    const auto ds = ScoreTile::k_major(smem.ds.buffer(0));
    ScoreCursor cursor;
    smem.keys_full.wait(0);  // K has landed
    for (int head = at.key_head * group; head < (at.key_head + 1) * group; ++head) {
      const int64_t batch_head = int64_t{at.batch} * shape.heads + head;
      float* block = args.params.dq_accumulator +
                     Parts::offset(batch_head, args.params.padded_seq_q, at.queries.first, 0);
#pragma unroll 1
      for (int m_block = at.queries.first; m_block < at.queries.end; ++m_block) {
        float rdQ[kHeadDim / 2];
        smem.ds.wait_full(cursor);  // both warpgroups have stored their keys of dS
        sm90::wgmma_fence();
#pragma unroll
        for (int i = 0; i < Base::kBlockN / 16; ++i) {  // dQ = dS K
          const int keys = (i / 4) * KeySlab::kBytes + KeySlab::mn_major_step(i % 4);
          sm90::WgmmaAtom<Element, kHeadDim, sm90::Major::kMN>::shared(
              rdQ, (ds + (cursor.stage * ScoreTile::kBytes + ScoreTile::k_major_step(i))).bits(),
              (k + keys).bits(), i > 0);
        }
        sm90::wgmma_commit();
        sm90::wgmma_wait<0>();
        sm90::pin(rdQ);
        smem.ds.empty(cursor.stage).arrive();  // the stage may take another dS
        cursor.advance();
        // Both parts of the accumulator at once: one follows the other.
#pragma unroll
        for (int i = 0; i < kHeadDim / 8; ++i) {
          sm90::reduce_add_x4(block + (i * sm90::kWarpgroup + thread) * 4, rdQ + 4 * i);
        }
        block += kBlockM * kHeadDim;
      }
    }
    // dQ is done with K: its buffer may take dK.
    sm90::named_barrier_arrive(sm90::NamedBarrier::kKeysRead, 0, 3 * sm90::kWarpgroup);
  }

  // ------------------------------------------------------------------- the warpgroups of the keys

  EQX_DEVICE static void consume(const BackwardDkdvArguments& args, const Smem& smem,
                                 int warpgroup) {
    const Consumer me(args, smem, warpgroup);
    const uint32_t slab = warpgroup * KeySlab::kBytes;
    float rS[kBlockM / 2], rdP[kBlockM / 2];
    uint32_t rP[kBlockM / 4], rdS[kBlockM / 4];
    // V for good, since shared memory is what limits this; there is no room for K, too.
    uint32_t rV[kHeadDim / 4];
    float rdK[kHeadDim / 2], rdV[kHeadDim / 2];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) rdK[i] = rdV[i] = 0.f;
    Cursor cursor;
    ScoreCursor ds_cursor;
    int m_block = me.at.queries.first;

    auto start_dp = [&] {  // dP^T = V dO^T
      const auto dout = QueryTile::k_major(smem.dout.buffer(0)) + cursor.stage * QueryTile::kBytes;
      smem.dout.wait_full(cursor);  // dO and delta have landed
      sm90::wgmma_fence();
      sm90::mma_registers_k_major<Element, QueryTile>(rdP, rV, dout);
      sm90::wgmma_commit();
    };
    auto start_dk = [&](Cursor at) {  // dK += dS^T Q
      me.multiply(rdK, rdS, smem.q, at);
      sm90::wgmma_commit();
    };
    auto finish_dk = [&](Cursor at) {
      sm90::wgmma_wait<0>();  // dK
      sm90::pin(rdK);
      me.release(smem.q, at);  // the producer may refill Q
    };
    // dV, beside which dS is computed and handed over.
    auto finish_step = [&] {
      Consumer::pack(rP, rS);
      me.multiply(rdV, rP, smem.dout, cursor);  // dV += P^T dO
      sm90::wgmma_commit();
      sm90::pin(rS);
      me.pack_ds(rdS, rS, rdP, cursor);
      smem.ds.wait_empty(ds_cursor);  // dQ has read the dS before the last
      me.store_ds(smem.ds.buffer(ds_cursor.stage), rdS);
      smem.ds.full(ds_cursor.stage).arrive();  // dQ may have this one
      ds_cursor.advance();
      sm90::wgmma_wait<0>();  // dV
      sm90::pin(rdV);
      me.release(smem.dout, cursor);  // the producer may refill dO
    };

    smem.keys_full.wait(0);  // K and V have landed
    sm90::load_operand<KeySlab>(rV, smem.v + slab, me.thread);
    if (me.at.steps > 0) {
      me.start_scores(rS, cursor);
      start_dp();
      sm90::wgmma_wait<1>();  // S
      me.probabilities(rS, cursor, m_block);
      sm90::wgmma_wait<0>();  // dP
      sm90::pin(rdP);
      finish_step();
      // Step i: S(i), dP(i) and dK(i-1) run on the tensor cores one after the other; the
      // exponentials hide behind the last two. What else this warpgroup leaves idle, the other one
      // uses, half a step away. dP starts at zero: to initialise it while S is in flight, ptxas
      // would wait for S.
#pragma unroll 1
      for (int step = 1; step < me.at.steps; ++step) {
        const Cursor previous = cursor;
        cursor.advance();
        m_block = me.next_query_block(m_block);
        me.start_scores(rS, cursor);
        start_dp();
        start_dk(previous);
        sm90::wgmma_wait<2>();  // S(i)
        me.probabilities(rS, cursor, m_block);
        finish_dk(previous);  // and dP(i) with it
        sm90::pin(rdP);
        finish_step();
      }
      start_dk(cursor);
      finish_dk(cursor);
    }
    me.store(args.dv, smem.v + slab, rdV, 1.f, warpgroup);
    // dQ is done with K.
    sm90::named_barrier_sync(sm90::NamedBarrier::kKeysRead, 0, 3 * sm90::kWarpgroup);
    me.store(args.dk, smem.k + slab, rdK, args.params.forward.softmax_scale, warpgroup);
    if (me.thread == 0) sm90::tma_store_wait_read();  // shared memory must outlive the stores
  }
};

template <typename Element, int kHeadDim, Mask kMask>
__global__ void __launch_bounds__(
    BackwardFusedDqWarpgroupKernel<Element, kHeadDim, kMask>::kThreads, 1)
    backward_fused_dq_warpgroup_kernel(const __grid_constant__ BackwardDkdvArguments args) {
  using Kernel = BackwardFusedDqWarpgroupKernel<Element, kHeadDim, kMask>;
  extern __shared__ uint8_t dynamic_smem[];
  const typename Kernel::Smem smem(dynamic_smem);
  const int warpgroup = sm90::warp_uniform(threadIdx.x / sm90::kWarpgroup);
  if (threadIdx.x == 0) smem.init_barriers();
  __syncthreads();
  if (warpgroup == 0) {
    sm90::shrink_registers<Kernel::kProducerRegisters>();
    if (threadIdx.x == 0) Kernel::produce(args, smem);
  } else if (warpgroup == 3) {
    sm90::shrink_registers<Kernel::kDqRegisters>();
    Kernel::accumulate_dq(args, smem);
  } else {
    sm90::grow_registers<Kernel::kConsumerRegisters>();
    Kernel::consume(args, smem, warpgroup - 1);
  }
}

}  // namespace eqx_flash
