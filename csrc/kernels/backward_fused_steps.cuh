// SPDX-License-Identifier: Apache-2.0
// What a warpgroup of the fused backward kernel does with its 64 keys: from step to step dV and dK,
// and dS for the warpgroup of dQ. In which order depends on how many registers the gradients leave.
#pragma once

#include "kernels/backward_dkdv.cuh"

namespace eqx_flash {

template <typename Base>
struct BackwardFusedSteps {
  using Consumer = typename Base::Consumer;
  using Cursor = typename Base::Cursor;
  using Element = typename Base::ElementType;
  using KeySlab = typename Base::KeySlab;
  using QueryTile = typename Base::QueryTile;
  using ScoreCursor = sm90::Cursor<Base::kTile.ds_stages>;
  using Stats = typename Consumer::Stats;
  static constexpr int kBlockM = Base::kBlockM;
  static constexpr int kHeadDim = QueryTile::kCols;
  // Up to head dim 64 S, dP, P and dS have registers of their own, and V does, too.
  static constexpr bool kRoomy = kHeadDim <= 64;

  const Consumer& me;
  const sm90::Ring<Base::kTile.ds_stages>& ds;
  Cursor cursor;  // of Q and dO
  ScoreCursor ds_cursor;

  EQX_DEVICE BackwardFusedSteps(const Consumer& me_, const sm90::Ring<Base::kTile.ds_stages>& ds_)
      : me(me_), ds(ds_) {}

  // Warpgroups take turns in issuing the first products of a step: worth 1 % at head dim 64, and 2
  // to 3 at 128 without a mask.
  EQX_DEVICE void wait_turn() const {  // until the other warpgroup has issued its products
    sm90::named_barrier_sync(sm90::NamedBarrier::kTurn, me.key_slab, 2 * sm90::kWarpgroup);
  }
  EQX_DEVICE void pass_turn() const {
    sm90::named_barrier_arrive(sm90::NamedBarrier::kTurn, 1 - me.key_slab, 2 * sm90::kWarpgroup);
  }

  EQX_DEVICE void store_ds(const uint32_t (&rdS)[kBlockM / 4]) {
    ds.wait_empty(ds_cursor);  // dQ has read the dS before the last
    me.store_ds(ds.buffer(ds_cursor.stage), rdS);
  }
  // The fence waits for the stores: at head dim 128 the next products are issued before it, which
  // is worth 4 %; at 64 dQ would get dS too late.
  EQX_DEVICE void hand_over_ds() {
    sm90::fence_async_proxy();
    ds.full(ds_cursor.stage).arrive();  // dQ may have it
    ds_cursor.advance();
  }

  EQX_DEVICE void start_dk(float (&rdK)[kHeadDim / 2], const uint32_t (&rdS)[kBlockM / 4],
                           Cursor at) const {  // dK += dS^T Q
    me.multiply(rdK, rdS, me.q_at(at));
    sm90::wgmma_commit();
  }
  EQX_DEVICE void finish_dk(float (&rdK)[kHeadDim / 2], Cursor at) const {
    sm90::wgmma_wait<0>();  // dK, and all before it
    sm90::pin(rdK);
    me.release(me.smem.q, at);  // the producer may refill Q
  }

  // All steps of a block of keys. Calls beside_first_scores() when those are in flight.
  template <typename BesideFirstScores>
  EQX_DEVICE void run(float (&rdK)[kHeadDim / 2], float (&rdV)[kHeadDim / 2],
                      BesideFirstScores&& beside_first_scores) {
    if (me.at.steps == 0) {
      beside_first_scores();
    } else if constexpr (kRoomy) {
      run_roomy(rdK, rdV, beside_first_scores);
    } else {
      run_tight(rdK, rdV, beside_first_scores);
    }
  }

  // ------------------------------------------------------------------------ up to head dim 64

  // Step i: S(i), dP(i) and dK(i-1) run on the tensor cores one after the other; the exponentials
  // hide behind the last two, dS behind dV. dP starts at zero: to initialise it while S is in
  // flight, ptxas would wait for S.
  template <typename BesideFirstScores>
  EQX_DEVICE void run_roomy(float (&rdK)[kHeadDim / 2], float (&rdV)[kHeadDim / 2],
                            BesideFirstScores&& beside_first_scores) {
    float rS[kBlockM / 2], rdP[kBlockM / 2];
    uint32_t rP[kBlockM / 4], rdS[kBlockM / 4];
    uint32_t rV[kHeadDim / 4];  // for good, since it spares shared memory; no room for K, too
    int m_block = me.at.queries.first;

    auto start_dp = [&] {              // dP^T = V dO^T
      me.smem.dout.wait_full(cursor);  // dO and delta have landed
      sm90::wgmma_fence();
      sm90::mma_registers_k_major<Element, QueryTile>(rdP, rV,
                                                      QueryTile::k_major(me.dout_at(cursor)));
      sm90::wgmma_commit();
    };
    // dV, beside which dS is computed and stored.
    auto finish_step = [&] {
      Consumer::pack(rP, rS);
      me.multiply(rdV, rP, me.dout_at(cursor));  // dV += P^T dO
      sm90::wgmma_commit();
      sm90::pin(rS);
      Stats start;
      me.load_stats(start, me.smem.dlse_minus_delta, cursor);
      // dS^T = P^T * (dP^T - delta + dlse)
#pragma unroll
      for (int i = 0; i < kBlockM / 4; ++i) {
        const float2 s = start[i / 2];
        rdS[i] = sm90::pack<Element>(rS[2 * i] * (rdP[2 * i] + s.x),
                                     rS[2 * i + 1] * (rdP[2 * i + 1] + s.y));
      }
      store_ds(rdS);
      hand_over_ds();
      sm90::wgmma_wait<0>();  // dV
      sm90::pin(rdV);
      me.release(me.smem.dout, cursor);  // the producer may refill dO
    };

    sm90::load_operand<KeySlab>(rV, me.v(), me.thread);
    wait_turn();
    me.start_scores(rS, cursor);
    start_dp();
    pass_turn();
    beside_first_scores();
    sm90::wgmma_wait<1>();  // S
    me.probabilities(rS, cursor, m_block);
    sm90::wgmma_wait<0>();  // dP(0)
    sm90::pin(rdP);
    finish_step();
#pragma unroll 1
    for (int step = 1; step < me.at.steps; ++step) {
      const Cursor previous = cursor;
      cursor.advance();
      m_block = me.at.next_query_block(m_block);
      wait_turn();
      me.start_scores(rS, cursor);
      start_dp();
      start_dk(rdK, rdS, previous);
      pass_turn();
      sm90::wgmma_wait<2>();  // S(i)
      me.probabilities(rS, cursor, m_block);
      finish_dk(rdK, previous);
      sm90::pin(rdP);
      finish_step();
    }
    start_dk(rdK, rdS, cursor);
    finish_dk(rdK, cursor);
    cursor.advance();
  }

  // ----------------------------------------------------------------------------- head dim 128

  // dP takes the registers of S, dS those of P. Step i: S(i) and dK(i-1); the exponentials; dP(i)
  // and dV(i); dS(i). In between the tensor cores are the others'.
  template <typename BesideFirstScores>
  EQX_DEVICE void run_tight(float (&rdK)[kHeadDim / 2], float (&rdV)[kHeadDim / 2],
                            BesideFirstScores&& beside_first_scores) {
    float rS[kBlockM / 2];     // S, then P, then dP
    uint32_t rP[kBlockM / 4];  // P, then dS
    int m_block = me.at.queries.first;

    auto start_dp = [&] {  // dP^T = V dO^T
      const auto v = KeySlab::k_major(me.v_at());
      const auto dout = QueryTile::k_major(me.dout_at(cursor));
      me.smem.dout.wait_full(cursor);  // dO and delta have landed
      // It is zero that is accumulated to. ptxas may not know that, else it begins dP before P is
      // complete, in registers that there are not.
      const bool never = me.at.steps < 0;
      sm90::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k) {
        sm90::WgmmaAtom<Element, kBlockM, sm90::Major::kK>::shared(
            rS, (v + KeySlab::k_major_step(k)).bits(), (dout + QueryTile::k_major_step(k)).bits(),
            k > 0 || never);
      }
      sm90::wgmma_commit();
    };
    auto finish_step = [&] {
      sm90::pin(rS);
      Consumer::pack(rP, rS);
      start_dp();
      me.multiply(rdV, rP, me.dout_at(cursor));  // dV += P^T dO
      sm90::wgmma_commit();
      Stats start;
      me.load_stats(start, me.smem.dlse_minus_delta, cursor);
      sm90::wgmma_wait<0>();  // dP, dV
      sm90::pin(rS);
      sm90::pin(rdV);
      // dS^T = P^T * (dP^T - delta + dlse), with P as rounded for dV
#pragma unroll
      for (int i = 0; i < kBlockM / 4; ++i) {
        const float2 p = sm90::unpack<Element>(rP[i]);
        const float2 s = start[i / 2];
        rP[i] = sm90::pack<Element>(p.x * (rS[2 * i] + s.x), p.y * (rS[2 * i + 1] + s.y));
      }
      me.release(me.smem.dout, cursor);  // the producer may refill dO
      store_ds(rP);
    };

    Stats lse;
    wait_turn();
    me.start_scores(rS, cursor);
    pass_turn();
    beside_first_scores();
    me.load_stats(lse, me.smem.lse_log2, cursor);
    sm90::wgmma_wait<0>();  // S
    me.probabilities(rS, lse, m_block);
    finish_step();
#pragma unroll 1
    for (int step = 1; step < me.at.steps; ++step) {
      const Cursor previous = cursor;
      cursor.advance();
      m_block = me.at.next_query_block(m_block);
      wait_turn();
      me.start_scores(rS, cursor);
      start_dk(rdK, rP, previous);
      pass_turn();
      hand_over_ds();
      me.load_stats(lse, me.smem.lse_log2, cursor);
      sm90::wgmma_wait<1>();  // S(i)
      me.probabilities(rS, lse, m_block);
      finish_dk(rdK, previous);
      finish_step();
    }
    start_dk(rdK, rP, cursor);
    hand_over_ds();
    finish_dk(rdK, cursor);
    cursor.advance();
  }
};

}  // namespace eqx_flash
