// SPDX-License-Identifier: Apache-2.0
// The backward kernel of dK and dV: one accumulation order, bitwise reproducible.
#pragma once

#include "kernels/backward_steps.cuh"

namespace eqx_flash {

template <typename Element, int kHeadDim, Mask kMask>
struct BackwardDkdvKernel : BackwardKeys<Element, kHeadDim, kMask, backward_dkdv_tile(kHeadDim)> {
  using Base = BackwardKeys<Element, kHeadDim, kMask, backward_dkdv_tile(kHeadDim)>;
  using Consumer = typename Base::Consumer;
  using Cursor = typename Base::Cursor;
  using KeyCursor = typename Base::KeyCursor;
  using Smem = typename Base::Smem;
  using Base::kBlockM;
  static constexpr int kThreads = kBackwardThreads;
  // A thread of its own for dO, since one that waits for Q's buffer would hold back the load of dO:
  // 4 to 7 % from 8k on at head dim 256, where warpgroups release the two at different times. The
  // others lose 1 to 2 % by it.
  static constexpr bool kTwoProducers = Base::kSplitOutputs;

  // ----------------------------------------------------------------------------------- producers

  // One thread.
  EQX_DEVICE static void produce(const BackwardKeysArguments& args, const Smem& smem) {
    const auto at = Base::block(args, blockIdx.x);
    Base::load_keys(args, smem, at, KeyCursor{});
    sm90::wait_for_previous_kernel();  // the statistics are there,
    sm90::let_next_kernel_start();     // and the next kernel may use them
    Cursor cursor;
    if constexpr (kTwoProducers) {
      Base::load_blocks(args, at, cursor, [](int) {}, Base::queries(args, smem));
    } else {
      Base::load_blocks(
          args, at, cursor, [](int) {}, Base::queries(args, smem), Base::douts(args, smem));
    }
  }
  // One thread of another warp, if there are two producers.
  EQX_DEVICE static void produce_douts(const BackwardKeysArguments& args, const Smem& smem) {
    Cursor cursor;
    Base::load_blocks(
        args, Base::block(args, blockIdx.x), cursor, [](int) {}, Base::douts(args, smem));
  }
  // One warp: what S and dP of each step start from.
  EQX_DEVICE static void write_starts(const BackwardKeysArguments& args, const Smem& smem) {
    Cursor cursor;
    sm90::wait_for_previous_kernel();  // the statistics are there
    Base::write_starts(args, smem, Base::block(args, blockIdx.x), cursor);
  }

  // --------------------------------------------------- 64 keys a warpgroup: dK and dV of its own

  struct NobodyWantsDs {
    static constexpr bool kWanted = false;
    EQX_DEVICE void store(const Consumer&, const uint32_t (&)[kBlockM / 4]) {}
    EQX_DEVICE void hand_over() {}
  };

  EQX_DEVICE static void consume_keys(const BackwardKeysArguments& args, const Smem& smem,
                                      int warpgroup) {
    Consumer me(args, smem, warpgroup);
    BackwardSteps<Base, NobodyWantsDs> steps(me, {});
    float rdK[kHeadDim / 2], rdV[kHeadDim / 2];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) rdK[i] = rdV[i] = 0.f;
    me.take_only_block();
    steps.run(rdK, rdV, [] {});
    me.store(args.dv, me.v(), rdV, 1.f, warpgroup);
    me.store(args.dk, me.k(), rdK, args.params.forward.softmax_scale, warpgroup);
    if (me.thread == 0) sm90::tma_store_wait_read();  // shared memory must outlive the stores
  }

  // ------------------------------- split outputs: one warpgroup for P and dV, one for dS and dK

  // A thread's 64 x kBlockM probabilities in fp32, for the same thread of the other warpgroup.
  EQX_DEVICE static uint32_t probability_address(const Smem& smem, int stage, int thread, int j) {
    return smem.probabilities.buffer(stage) + (j * sm90::kWarpgroup + thread) * 16;
  }

  EQX_DEVICE static void consume_values(const BackwardKeysArguments& args, const Smem& smem) {
    Consumer me(args, smem, 0);
    me.take_only_block();
    float rS[kBlockM / 2];
    uint32_t rP[kBlockM / 4];
    float rdV[kHeadDim / 2];
#pragma unroll
    for (float& x : rdV) x = 0.f;
    auto finish_scores = [&](Cursor cursor, int step, int m_block) {
      me.probabilities(rS, m_block);
      me.release(smem.q, cursor);  // this warpgroup is done with Q
      const auto slot = sm90::Cursor<2>::after(step);
      smem.probabilities.wait_empty(slot);  // the other warpgroup has read the slot
#pragma unroll
      for (int j = 0; j < kBlockM / 8; ++j) {
        sm90::store_shared_x4(probability_address(smem, slot.stage, me.thread, j), rS + 4 * j);
      }
      smem.probabilities.full(slot.stage).arrive();  // P is there for dS
    };

    if (me.at.steps > 0) {
      Cursor cursor;
      int m_block = me.at.first_query_block();
      me.start_scores(rS, cursor);
      sm90::wgmma_wait<0>();
      finish_scores(cursor, 0, m_block);
      Consumer::pack(rP, rS);
#pragma unroll 1
      for (int step = 1; step < me.at.steps; ++step) {
        const Cursor previous = cursor;
        cursor.advance();
        m_block = me.at.next_query_block(m_block);
        me.start_scores(rS, cursor);
        smem.dout.wait_full(previous);  // dO(i-1) has landed
        me.multiply(rdV, rP, me.dout_at(previous));
        sm90::wgmma_commit();
        sm90::wgmma_wait<1>();  // S(i)
        finish_scores(cursor, step, m_block);
        sm90::wgmma_wait<0>();  // dV
        sm90::pin(rdV);
        me.release(smem.dout, previous);  // done with dO(i-1)
        Consumer::pack(rP, rS);
      }
      smem.dout.wait_full(cursor);  // the last dO has landed
      me.multiply(rdV, rP, me.dout_at(cursor));
      sm90::wgmma_commit();
      sm90::wgmma_wait<0>();
      sm90::pin(rdV);
    }
    me.store(args.dv, me.k(), rdV, 1.f, 0);  // only this warpgroup reads K
    if (me.thread == 0) sm90::tma_store_wait_read();
  }

  EQX_DEVICE static void consume_scores(const BackwardKeysArguments& args, const Smem& smem) {
    Consumer me(args, smem, 0);
    me.take_only_block();
    float rP[kBlockM / 2], rdP[kBlockM / 2];
    uint32_t rdS[kBlockM / 4];
    float rdK[kHeadDim / 2];
#pragma unroll
    for (float& x : rdK) x = 0.f;
    auto read_probabilities = [&](int step) {
      const auto slot = sm90::Cursor<2>::after(step);
      smem.probabilities.wait_full(slot);  // P is complete
#pragma unroll
      for (int j = 0; j < kBlockM / 8; ++j) {
        sm90::load_shared_x4(probability_address(smem, slot.stage, me.thread, j), rP + 4 * j);
      }
      smem.probabilities.empty(slot.stage).arrive();  // the slot may be overwritten
    };

    if (me.at.steps > 0) {
      Cursor cursor;
      smem.q.wait_full(cursor);  // what dP(0) starts from
      me.start_dp(rdP, cursor);
      sm90::wgmma_wait<0>();
      sm90::pin(rdP);
      me.release(smem.dout, cursor);  // done with dO(0)
      read_probabilities(0);
      Consumer::pack_product(rdS, rP, rdP);
#pragma unroll 1
      for (int step = 1; step < me.at.steps; ++step) {
        const Cursor previous = cursor;
        cursor.advance();
        // dK goes first: the other warpgroup waits for the Q that takes the place of Q(i-1).
        me.multiply(rdK, rdS, me.q_at(previous));
        sm90::wgmma_commit();
        smem.q.wait_full(cursor);  // Q(i) has landed, and what dP(i) starts from
        me.start_dp(rdP, cursor);
        sm90::wgmma_wait<1>();  // dK
        sm90::pin(rdK);
        me.release(smem.q, previous);  // done with Q(i-1)
        sm90::wgmma_wait<0>();         // dP(i)
        sm90::pin(rdP);
        me.release(smem.dout, cursor);  // done with dO(i)
        read_probabilities(step);
        Consumer::pack_product(rdS, rP, rdP);
      }
      me.multiply(rdK, rdS, me.q_at(cursor));
      sm90::wgmma_commit();
      sm90::wgmma_wait<0>();
      sm90::pin(rdK);
    }
    // Only this warpgroup reads V.
    me.store(args.dk, me.v(), rdK, args.params.forward.softmax_scale, 1);
    if (me.thread == 0) sm90::tma_store_wait_read();
  }
};

template <typename Element, int kHeadDim, Mask kMask>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    backward_dkdv_kernel(const __grid_constant__ BackwardKeysArguments args) {
  using Kernel = BackwardDkdvKernel<Element, kHeadDim, kMask>;
  extern __shared__ __align__(1024) uint8_t aligned_dynamic_smem[];
  const typename Kernel::Smem smem(aligned_dynamic_smem);
  const int warpgroup = sm90::warp_uniform(threadIdx.x / sm90::kWarpgroup);
  smem.init_ones();
  if (threadIdx.x == 0) smem.init_barriers();
  __syncthreads();
  if (warpgroup == 0) {
    sm90::shrink_registers<kBackwardProducerRegisters>();
    if (threadIdx.x == 0) Kernel::produce(args, smem);
    if (Kernel::kTwoProducers && threadIdx.x == sm90::kWarp) Kernel::produce_douts(args, smem);
    if (threadIdx.x / sm90::kWarp == 2) Kernel::write_starts(args, smem);
  } else {
    sm90::grow_registers<kBackwardConsumerRegisters>();
    if constexpr (!Kernel::kSplitOutputs) {
      Kernel::consume_keys(args, smem, warpgroup - 1);
    } else if (warpgroup == 1) {
      Kernel::consume_values(args, smem);
    } else {
      Kernel::consume_scores(args, smem);
    }
  }
}

}  // namespace eqx_flash
