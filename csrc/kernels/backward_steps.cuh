// SPDX-License-Identifier: Apache-2.0
// What a warpgroup does with its 64 keys: from step to step dV and dK, and dS for whoever wants it.
// In which order depends on how many registers the gradients leave.
#pragma once

#include "kernels/backward_keys.cuh"

namespace eqx_flash {

// Ds takes dS, if it is kWanted: store() it at once, then hand_over() what has been stored. The
// latter waits for the stores: at head dim 128 the next products are issued before, which is worth
// 4 %; at 64 dQ would get dS too late.
template <typename Base, typename Ds>
struct BackwardSteps {
  using Consumer = typename Base::Consumer;
  using Cursor = typename Base::Cursor;
  using Element = typename Base::ElementType;
  using KeySlab = typename Base::KeySlab;
  using QueryTile = typename Base::QueryTile;
  static constexpr int kBlockM = Base::kBlockM;
  static constexpr int kHeadDim = QueryTile::kCols;
  // Up to head dim 64 S, dP, P and dS have registers of their own, and V does, too.
  static constexpr bool kRoomy = kHeadDim <= 64;

  const Consumer& me;
  Ds ds;
  Cursor cursor;  // of Q and dO

  EQX_DEVICE BackwardSteps(const Consumer& me_, Ds ds_) : me(me_), ds(ds_) {}

  EQX_DEVICE void start_dk(float (&rdK)[kHeadDim / 2], const uint32_t (&rdS)[kBlockM / 4],
                           Cursor at) const {  // dK += dS^T Q
    me.multiply(rdK, rdS, me.q_at(at));
    sm90::wgmma_commit();
  }
  EQX_DEVICE void release_queries(float (&rdK)[kHeadDim / 2], Cursor at) const {  // dK is done
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
    } else if constexpr (Ds::kWanted) {
      run_tight(rdK, rdV, beside_first_scores);
    } else {
      run_dp_last(rdK, rdV, beside_first_scores);
    }
  }

  // ------------------------------------------------------------------------ up to head dim 64

  // Step i: S(i), dP(i) and dK(i-1) run on the tensor cores one after the other; the exponentials
  // hide behind the last two, dS behind dV.
  template <typename BesideFirstScores>
  EQX_DEVICE void run_roomy(float (&rdK)[kHeadDim / 2], float (&rdV)[kHeadDim / 2],
                            BesideFirstScores&& beside_first_scores) {
    float rS[kBlockM / 2], rdP[kBlockM / 2];
    uint32_t rP[kBlockM / 4], rdS[kBlockM / 4];
    uint32_t rV[kHeadDim / 4];  // for good, since it spares shared memory; no room for K, too
    int m_block = me.at.first_query_block();

    auto start_dp = [&] {              // dP^T - delta + dlse = V dO^T + (dlse - delta)
      me.smem.dout.wait_full(cursor);  // dO has landed
      me.template start<sm90::Start::kSecond>(rdP, cursor);
      sm90::mma_registers_k_major<Element, QueryTile, true>(rdP, rV,
                                                            QueryTile::k_major(me.dout_at(cursor)));
      sm90::wgmma_commit();
    };
    auto start_dv = [&] {  // dV += P^T dO
      Consumer::pack(rP, rS);
      me.multiply(rdV, rP, me.dout_at(cursor));
      sm90::wgmma_commit();
      sm90::pin(rS);
    };
    auto finish_step = [&] {
      sm90::pin(rdP);
      Consumer::pack_product(rdS, rS, rdP);  // dS^T = P^T * (dP^T - delta + dlse)
      ds.store(me, rdS);
      ds.hand_over();
      sm90::wgmma_wait<0>();  // dV
      sm90::pin(rdV);
      me.release(me.smem.dout, cursor);  // the producer may refill dO
    };

    sm90::load_operand<KeySlab>(rV, me.v(), me.thread);
    me.start_scores(rS, cursor);
    start_dp();
    beside_first_scores();
    sm90::wgmma_wait<1>();  // S(0)
    me.probabilities(rS, m_block);
    start_dv();
    sm90::wgmma_wait<1>();  // dP(0)
    finish_step();
#pragma unroll 1
    for (int step = 1; step < me.at.steps; ++step) {
      const Cursor previous = cursor;
      cursor.advance();
      m_block = me.at.next_query_block(m_block);
      me.start_scores(rS, cursor);
      start_dp();
      start_dk(rdK, rdS, previous);
      sm90::wgmma_wait<2>();  // S(i)
      me.probabilities(rS, m_block);
      start_dv();
      sm90::wgmma_wait<1>();  // dP(i), dK(i-1)
      release_queries(rdK, previous);
      finish_step();
    }
    start_dk(rdK, rdS, cursor);
    sm90::wgmma_wait<0>();  // dK
    release_queries(rdK, cursor);
    cursor.advance();
  }

  // --------------------------------------------------------- head dim 128, with dQ's warpgroup

  // dP takes the registers of S, dS those of P. Step i: S(i) and dK(i-1); the exponentials; dP(i)
  // and dV(i); dS(i). In between the tensor cores are the others'.
  template <typename BesideFirstScores>
  EQX_DEVICE void run_tight(float (&rdK)[kHeadDim / 2], float (&rdV)[kHeadDim / 2],
                            BesideFirstScores&& beside_first_scores) {
    float rS[kBlockM / 2];     // S, then P, then dP
    uint32_t rP[kBlockM / 4];  // P, then dS
    int m_block = me.at.first_query_block();

    // It is nothing that dP is added to. ptxas may not know that, else it begins dP before P is
    // complete, in registers that there are not.
    const bool never = me.at.steps < 0;
    auto finish_step = [&] {
      sm90::pin(rS);
      Consumer::pack(rP, rS);
      me.start_dp(rS, cursor, never);
      me.multiply(rdV, rP, me.dout_at(cursor));  // dV += P^T dO
      sm90::wgmma_commit();
      sm90::wgmma_wait<0>();  // dP, dV
      sm90::pin(rS);
      sm90::pin(rdV);
      // dS^T = P^T * (dP^T - delta + dlse), with P as rounded for dV
#pragma unroll
      for (int i = 0; i < kBlockM / 4; ++i) {
        const float2 p = sm90::unpack<Element>(rP[i]);
        rP[i] = sm90::pack<Element>(p.x * rS[2 * i], p.y * rS[2 * i + 1]);
      }
      me.release(me.smem.dout, cursor);  // the producer may refill dO
      ds.store(me, rP);
    };

    me.start_scores(rS, cursor);
    beside_first_scores();
    sm90::wgmma_wait<0>();  // S
    me.probabilities(rS, m_block);
    finish_step();
#pragma unroll 1
    for (int step = 1; step < me.at.steps; ++step) {
      const Cursor previous = cursor;
      cursor.advance();
      m_block = me.at.next_query_block(m_block);
      me.start_scores(rS, cursor);
      start_dk(rdK, rP, previous);
      ds.hand_over();
      sm90::wgmma_wait<1>();  // S(i)
      me.probabilities(rS, m_block);
      sm90::wgmma_wait<0>();  // dK(i-1)
      release_queries(rdK, previous);
      finish_step();
    }
    start_dk(rdK, rP, cursor);
    ds.hand_over();
    sm90::wgmma_wait<0>();  // dK
    release_queries(rdK, cursor);
    cursor.advance();
  }

  // -------------------------------------------------------------------- head dim 128, without it

  // Step i: S(i), then dV and dK of step i-1 run on the tensor cores one after the other; the
  // exponentials hide behind the second. dP(i) comes last, once P and dS of step i-1 have left
  // their registers: all at once there are not enough.
  template <typename BesideFirstScores>
  EQX_DEVICE void run_dp_last(float (&rdK)[kHeadDim / 2], float (&rdV)[kHeadDim / 2],
                              BesideFirstScores&& beside_first_scores) {
    float rS[kBlockM / 2], rdP[kBlockM / 2];
    uint32_t rP[kBlockM / 4], rdS[kBlockM / 4];
    int m_block = me.at.first_query_block();

    auto finish_ds = [&] {  // P and dS as operands of the next step's products
      me.start_dp(rdP, cursor);
      Consumer::pack(rP, rS);
      sm90::wgmma_wait<0>();  // dP
      sm90::pin(rdP);
      Consumer::pack_product(rdS, rS, rdP);  // dS^T = P^T * (dP^T - delta + dlse)
    };
    auto start_gradients = [&](Cursor at) {
      me.multiply(rdV, rP, me.dout_at(at));  // dV += P^T dO
      me.multiply(rdK, rdS, me.q_at(at));    // dK += dS^T Q
      sm90::wgmma_commit();
    };
    auto release_step = [&](Cursor at) {  // dV and dK are done
      sm90::pin(rdV);
      me.release(me.smem.dout, at);  // the producer may refill dO
      release_queries(rdK, at);
    };

    me.start_scores(rS, cursor);
    beside_first_scores();
    sm90::wgmma_wait<0>();  // S(0)
    me.probabilities(rS, m_block);
    finish_ds();
#pragma unroll 1
    for (int step = 1; step < me.at.steps; ++step) {
      const Cursor previous = cursor;
      cursor.advance();
      m_block = me.at.next_query_block(m_block);
      me.start_scores(rS, cursor);
      start_gradients(previous);
      sm90::wgmma_wait<1>();  // S(i)
      me.probabilities(rS, m_block);
      sm90::wgmma_wait<0>();  // dV, dK
      release_step(previous);
      finish_ds();
    }
    start_gradients(cursor);
    sm90::wgmma_wait<0>();  // dV, dK
    release_step(cursor);
    cursor.advance();
  }
};

}  // namespace eqx_flash
