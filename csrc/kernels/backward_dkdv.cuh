// SPDX-License-Identifier: Apache-2.0
// The backward kernel of dK and dV: a block of keys stays, the queries of all heads that share it
// pass by (FlashAttention-2, Dao 2023, section 3.1.2).
//
// Scores are computed transposed, S^T = K Q^T, so that P^T and dS^T lie in registers as the left
// operands of dV += P^T dO and dK += dS^T Q. One accumulation order: bitwise reproducible.
#pragma once

#include "kernels/epilogue.cuh"
#include "kernels/mask.cuh"
#include "kernels/scheduler.cuh"
#include "params.h"
#include "sm90/barrier.cuh"
#include "sm90/registers.cuh"
#include "sm90/smem_tile.cuh"
#include "sm90/tma.cuh"
#include "sm90/wgmma.cuh"
#include "tile_config.h"

namespace eqx_flash {

struct BackwardDkdvArguments {
  CUtensorMap q, dout, k, v, dk, dv;
  BackwardParams params;
  BlockOrder order;
};

template <typename Element, int kHeadDim, Mask kMask, BackwardTile kTile_>
struct BackwardDkdvKernel {
  using ElementType = Element;
  static constexpr BackwardTile kTile = kTile_;
  static constexpr int kBlockM = kTile.block_m;
  static constexpr int kBlockN = kTile.block_n;
  static constexpr int kKeySlabs = kBlockN / kWarpgroupRows;
  static constexpr int kKeyStages = kTile.key_stages;
  static constexpr int kThreads = kBackwardThreads;
  static constexpr int kConsumerThreads = 2 * sm90::kWarpgroup;
  // Two slabs: each warpgroup computes dK and dV of its own 64 keys. One slab: the accumulators
  // are too large for that, and one warpgroup computes dV, the other dK.
  static constexpr bool kSplitOutputs = kKeySlabs == 1;
  static constexpr bool kRotates = kTile.keys_abreast > 0 && kMask == Mask::kFull;
  // A thread of its own for dO, since one that waits for Q's buffer would hold back the load of dO:
  // 4 to 7 % from 8k on at head dim 256, where warpgroups release the two at different times. The
  // others lose 1 to 2 % by it.
  static constexpr bool kTwoProducers = kSplitOutputs;
  using QueryTile = sm90::SmemTile<kBlockM, kHeadDim>;       // of Q, or of dO
  using KeySlab = sm90::SmemTile<kWarpgroupRows, kHeadDim>;  // 64 keys of K, V, dK, or dV
  using ScoreTile = sm90::SmemTile<kBlockM, kBlockN>;        // dS of the fused kernels
  using Cursor = sm90::Cursor<kTile.k_stages>;
  using KeyCursor = sm90::Cursor<kKeyStages>;
  static_assert(kTile.k_stages == kTile.v_stages);

  struct Smem {
    static constexpr uint32_t kKeyBytes = kKeySlabs * KeySlab::kBytes;
    static constexpr uint32_t kStatBytes = kBlockM * 4;  // a float for each query
    static constexpr uint32_t kProbabilityBytes = kSplitOutputs ? kBlockM * kBlockN * 4 : 0;
    // What is read most lies first: with Q, dO and dS above 128 KB, the fused kernel of head dim
    // 128 was 5 % slower.
    static constexpr uint32_t kQ = 0;
    static constexpr uint32_t kDout = kQ + kTile.k_stages * QueryTile::kBytes;
    static constexpr uint32_t kDs = kDout + kTile.k_stages * QueryTile::kBytes;
    static constexpr uint32_t kProbabilities = kDs + kTile.ds_stages * ScoreTile::kBytes;
    static constexpr uint32_t kKeys = kProbabilities + 2 * kProbabilityBytes;
    static constexpr uint32_t kStats = kKeys + kKeyStages * 2 * kKeyBytes;
    static constexpr uint32_t kBarriers = kStats + 2 * kTile.k_stages * kStatBytes;
    static constexpr uint32_t kEnd = kBarriers + 192;
    static constexpr int kAlignment = 1024;
    static constexpr int kBytes = kEnd + kAlignment;
    static_assert(kBytes <= kMaxSharedMemory);
    uint32_t base, lse_log2, dlse_minus_delta;
    sm90::Descriptor origin;      // of `base`: what is a constant away from it needs no register
    sm90::Ring<kKeyStages> keys;  // K, then V, of a block
    sm90::Ring<kTile.k_stages> q, dout;
    sm90::Ring<2> probabilities;

    EQX_DEVICE explicit Smem(const void* dynamic) {
      constexpr uint32_t kRingBarriers = sm90::Ring<kTile.k_stages>::kBarrierBytes;
      base = (sm90::shared_address(dynamic) + 1023) & ~1023u;
      origin = sm90::Descriptor::origin(base);
      lse_log2 = base + kStats;
      dlse_minus_delta = lse_log2 + kTile.k_stages * kStatBytes;
      q = {base + kQ, QueryTile::kBytes, base + kBarriers};
      dout = {base + kDout, QueryTile::kBytes, base + kBarriers + kRingBarriers};
      probabilities = {base + kProbabilities, kProbabilityBytes,
                       base + kBarriers + 2 * kRingBarriers};
      keys = {base + kKeys, 2 * kKeyBytes, probabilities.barriers + sm90::Ring<2>::kBarrierBytes};
    }
    EQX_DEVICE void init_barriers() const {
      q.init(kConsumerThreads);
      dout.init(kConsumerThreads);
      for (int stage = 0; stage < 2; ++stage) {
        probabilities.full(stage).init(sm90::kWarpgroup);
        probabilities.empty(stage).init(sm90::kWarpgroup);
      }
      keys.init(kKeySlabs);  // whoever stores through a slab gives it back
      sm90::fence_barrier_init();
    }
  };

  // The keys of a thread block, and the queries that see them.
  struct Block {
    int n_block;
    int key_head;
    int batch;
    QueryBlocks queries;
    int steps;  // query blocks of all heads of the group

    // The query block that has the turn of `m_block`: as far on as the first keys of those abreast.
    EQX_DEVICE int rotated(int m_block) const {
      if constexpr (kRotates) {
        const int group = n_block / kTile.keys_abreast;
        return (m_block + group * kTile.keys_abreast * (kBlockN / kBlockM)) % queries.end;
      } else {
        return m_block;
      }
    }
    EQX_DEVICE int first_query_block() const { return rotated(queries.first); }
    EQX_DEVICE int next_query_block(int m_block) const {
      return m_block + 1 < queries.end ? m_block + 1 : queries.first;  // next head
    }
  };
  EQX_DEVICE static Block block(const BackwardDkdvArguments& args, int index) {
    const ForwardParams& shape = args.params.forward;
    const RankedHead place = args.order.place(index);
    Block block;
    block.n_block = place.rank;  // causal: the first keys are seen by most
    block.batch = place.batch_head / shape.heads_k;
    block.key_head = place.batch_head - block.batch * shape.heads_k;
    block.queries = query_blocks<kMask, kBlockM, kBlockN>(block.n_block, shape.seq_q, shape.seq_k,
                                                          shape.diagonal);
    block.steps = (block.queries.end - block.queries.first) * (shape.heads / shape.heads_k);
    return block;
  }

  // ----------------------------------------------------------------------------------- producers

  // A ring of query blocks and what fills it.
  struct Stream {
    const CUtensorMap& map;
    const sm90::Ring<kTile.k_stages>& ring;
    const float* stats;
    uint32_t stats_buffer;
  };
  EQX_DEVICE static Stream queries(const BackwardDkdvArguments& args, const Smem& smem) {
    return {args.q, smem.q, args.params.lse_log2, smem.lse_log2};
  }
  EQX_DEVICE static Stream douts(const BackwardDkdvArguments& args, const Smem& smem) {
    return {args.dout, smem.dout, args.params.dlse_minus_delta, smem.dlse_minus_delta};
  }

  // One thread.
  EQX_DEVICE static void produce(const BackwardDkdvArguments& args, const Smem& smem) {
    const Block at = block(args, blockIdx.x);
    load_keys(args, smem, at, KeyCursor{});
    sm90::wait_for_previous_kernel();  // the statistics are there
    sm90::let_next_kernel_start();     // which may therefore use the statistics
    Cursor cursor;
    auto nothing = [](int) {};
    if constexpr (kTwoProducers) {
      load_blocks(args, at, cursor, nothing, queries(args, smem));
    } else {
      load_blocks(args, at, cursor, nothing, queries(args, smem), douts(args, smem));
    }
  }
  // One thread of another warp, if there are two producers.
  EQX_DEVICE static void produce_douts(const BackwardDkdvArguments& args, const Smem& smem) {
    sm90::wait_for_previous_kernel();  // the statistics are there
    Cursor cursor;
    load_blocks(args, block(args, blockIdx.x), cursor, [](int) {}, douts(args, smem));
  }

  EQX_DEVICE static void load_keys(const BackwardDkdvArguments& args, const Smem& smem,
                                   const Block& at, KeyCursor key_at) {
    smem.keys.wait_empty(key_at);  // the gradients of the block before have left the buffers
    const sm90::Barrier full = smem.keys.full(key_at.stage);
    full.arrive_and_expect(2 * Smem::kKeyBytes);
    const uint32_t k = smem.keys.buffer(key_at.stage);
    for (int w = 0; w < kKeySlabs; ++w) {
      for (int s = 0; s < KeySlab::kSlabs; ++s) {
        const uint32_t offset = w * KeySlab::kBytes + s * KeySlab::kSlabBytes;
        const sm90::TmaCoordinates from{s * KeySlab::kSlabCols,
                                        at.n_block * kBlockN + w * kWarpgroupRows, at.key_head,
                                        at.batch};
        sm90::tma_load(args.k, k + offset, full.address, from);
        sm90::tma_load(args.v, k + Smem::kKeyBytes + offset, full.address, from);
      }
    }
  }

  // Calls before_step(step) before it asks for the step's queries.
  template <typename BeforeStep, typename... Streams>
  EQX_DEVICE static void load_blocks(const BackwardDkdvArguments& args, const Block& at,
                                     Cursor& cursor, BeforeStep&& before_step,
                                     const Streams&... streams) {
    const ForwardParams& shape = args.params.forward;
    auto load = [&](const Stream& from, int m_block, int head) {
      from.ring.wait_empty(cursor);  // all consumers are done with the block this stage held
      const sm90::Barrier full = from.ring.full(cursor.stage);
      full.arrive_and_expect(QueryTile::kBytes + Smem::kStatBytes);
      const int64_t row =
          (int64_t{at.batch} * shape.heads + head) * args.params.padded_seq_q + m_block * kBlockM;
      sm90::bulk_load(from.stats + row, from.stats_buffer + cursor.stage * Smem::kStatBytes,
                      full.address, Smem::kStatBytes);
      for (int s = 0; s < QueryTile::kSlabs; ++s) {
        sm90::tma_load(from.map, from.ring.buffer(cursor.stage) + s * QueryTile::kSlabBytes,
                       full.address, {s * QueryTile::kSlabCols, m_block * kBlockM, head, at.batch});
      }
    };
    int head = at.key_head * (shape.heads / shape.heads_k);
    int m_block = at.queries.first;
#pragma unroll 1
    for (int step = 0; step < at.steps; ++step) {
      before_step(step);
      (load(streams, at.rotated(m_block), head), ...);
      cursor.advance();
      if (++m_block == at.queries.end) {  // the next head of the group
        m_block = at.queries.first;
        ++head;
      }
    }
  }

  // ---------------------------------------------------------------------- steps of the consumers

  struct Consumer {
    const BackwardDkdvArguments& args;
    const Smem& smem;
    const int thread = threadIdx.x % sm90::kWarpgroup;
    const int key_slab;  // of this warpgroup
    Block at;
    int slab;  // where this warpgroup's keys begin
    float scale_log2 = args.params.forward.softmax_scale * 1.44269504f;

    EQX_DEVICE Consumer(const BackwardDkdvArguments& args_, const Smem& smem_, int key_slab_)
        : args(args_), smem(smem_), key_slab(key_slab_) {
      asm volatile("mov.b32 %0, %0;" : "+f"(scale_log2));  // a vector register: operand reuse
    }
    EQX_DEVICE void take(const Block& block, KeyCursor key_at) {
      at = block;
      slab = Smem::kKeys + key_at.stage * 2 * Smem::kKeyBytes + key_slab * KeySlab::kBytes;
      smem.keys.wait_full(key_at);  // K and V have landed
    }
    // The block of a thread block that has but one.
    EQX_DEVICE void take_only_block() {
      Block block = BackwardDkdvKernel::block(args, blockIdx.x);
      block.n_block = sm90::warp_uniform(block.n_block);
      take(block, KeyCursor{});
    }
    // This thread is done with a stage. Every lane arrives for itself, since each has read some of
    // the stage's statistics: one lane for all, after __syncwarp, is no faster, and racecheck does
    // not see that it waits for the others.
    template <typename Ring>
    EQX_DEVICE void release(const Ring& ring, Cursor cursor) const {
      ring.empty(cursor.stage).arrive();
    }
    // Of the queries of a stage, the first two that this thread holds; the next are 32 bytes on.
    EQX_DEVICE uint32_t first_stat(uint32_t stats, Cursor cursor) const {
      return stats + cursor.stage * Smem::kStatBytes + sm90::accumulator_col(thread) * 4;
    }
    EQX_DEVICE uint32_t k() const { return smem.base + slab; }
    EQX_DEVICE uint32_t v() const { return k() + Smem::kKeyBytes; }
    EQX_DEVICE sm90::Descriptor k_at() const { return smem.origin + slab; }
    EQX_DEVICE sm90::Descriptor v_at() const { return k_at() + Smem::kKeyBytes; }
    EQX_DEVICE sm90::Descriptor q_at(Cursor cursor) const {
      return smem.origin + Smem::kQ + cursor.stage * QueryTile::kBytes;
    }
    EQX_DEVICE sm90::Descriptor dout_at(Cursor cursor) const {
      return smem.origin + Smem::kDout + cursor.stage * QueryTile::kBytes;
    }
    EQX_DEVICE int first_key() const { return at.n_block * kBlockN + key_slab * kWarpgroupRows; }

    // The statistics of all queries that this thread holds, two of each eight.
    using Stats = float2[kBlockM / 8];
    EQX_DEVICE void load_stats(Stats& stats, uint32_t buffers, Cursor cursor) const {
      const uint32_t first = first_stat(buffers, cursor);
#pragma unroll
      for (int j = 0; j < kBlockM / 8; ++j) stats[j] = sm90::load_shared_pair(first + j * 32);
    }

    // S^T = K Q^T
    EQX_DEVICE void start_scores(float (&rS)[kBlockM / 2], Cursor cursor) const {
      smem.q.wait_full(cursor);  // Q and LSE have landed
      sm90::wgmma_fence();
      sm90::mma_shared_k_major<Element, KeySlab, QueryTile>(rS, KeySlab::k_major(k_at()),
                                                            QueryTile::k_major(q_at(cursor)));
      sm90::wgmma_commit();
    }
    // dP starts at dlse - delta. Before S is in flight: ptxas would wait for S first.
    EQX_DEVICE void init_dp(float (&rdP)[kBlockM / 2], Cursor cursor) const {
      smem.dout.wait_full(cursor);  // dO and delta have landed
      const uint32_t stats = first_stat(smem.dlse_minus_delta, cursor);
#pragma unroll
      for (int j = 0; j < kBlockM / 8; ++j) {
        const float2 start = sm90::load_shared_pair(stats + j * 32);
        rdP[4 * j] = rdP[4 * j + 2] = start.x;
        rdP[4 * j + 1] = rdP[4 * j + 3] = start.y;
      }
      sm90::pin(rdP);
    }
    // dP^T - delta + dlse = V dO^T + (dlse - delta), if dP has been initialised
    EQX_DEVICE void start_dp(float (&rdP)[kBlockM / 2], Cursor cursor) const {
      sm90::wgmma_fence();
      sm90::mma_shared_k_major<Element, KeySlab, QueryTile, true>(
          rdP, KeySlab::k_major(v_at()), QueryTile::k_major(dout_at(cursor)));
      sm90::wgmma_commit();
    }
    // acc += P^T dO, or dS^T Q
    EQX_DEVICE void multiply(float (&acc)[kHeadDim / 2], const uint32_t (&a)[kBlockM / 4],
                             sm90::Descriptor queries) const {
      sm90::pin(acc);
      sm90::wgmma_fence();
      sm90::mma_registers_mn_major<Element, QueryTile>(acc, a, QueryTile::mn_major(queries));
    }
    // P^T = exp2(S^T * scale - lse)
    EQX_DEVICE void probabilities(float (&rS)[kBlockM / 2], Cursor cursor, int m_block) const {
      mask(rS, m_block);
      const uint32_t stats = first_stat(smem.lse_log2, cursor);
#pragma unroll
      for (int j = 0; j < kBlockM / 8; ++j)
        exponentiate(rS, j, sm90::load_shared_pair(stats + j * 32));
    }
    EQX_DEVICE void probabilities(float (&rS)[kBlockM / 2], const Stats& lse_log2,
                                  int m_block) const {
      mask(rS, m_block);
#pragma unroll
      for (int j = 0; j < kBlockM / 8; ++j) exponentiate(rS, j, lse_log2[j]);
    }
    EQX_DEVICE static void pack(uint32_t (&packed)[kBlockM / 4], const float (&x)[kBlockM / 2]) {
#pragma unroll
      for (int i = 0; i < kBlockM / 4; ++i) {
        packed[i] = sm90::pack<Element>(x[2 * i], x[2 * i + 1]);
      }
    }
    // dS^T = P^T * (dP^T - delta + dlse)
    EQX_DEVICE static void pack_product(uint32_t (&packed)[kBlockM / 4],
                                        const float (&x)[kBlockM / 2],
                                        const float (&y)[kBlockM / 2]) {
#pragma unroll
      for (int i = 0; i < kBlockM / 4; ++i) {
        packed[i] = sm90::pack<Element>(x[2 * i] * y[2 * i], x[2 * i + 1] * y[2 * i + 1]);
      }
    }
    // dS^T in registers -> dS in shared memory; this warpgroup's keys are one slab of columns. A
    // fence must follow.
    EQX_DEVICE void store_ds(uint32_t ds, const uint32_t (&rdS)[kBlockM / 4]) const {
      const int lane = thread % sm90::kWarp;
      const int piece = 8 * key_slab + 2 * (thread / sm90::kWarp) + (lane / 8) % 2;
#pragma unroll
      for (int j = 0; j < kBlockM / 16; ++j) {
        const int row = 16 * j + 8 * (lane / 16) + lane % 8;
        sm90::store_matrix_x4_transposed(ds + ScoreTile::piece_offset(row, piece), rdS + 4 * j);
      }
    }
    // The gradient leaves through a slab that only this warpgroup has read.
    EQX_DEVICE void store(const CUtensorMap& map, uint32_t slab, const float (&acc)[kHeadDim / 2],
                          float factor, int barrier) const {
      const float factors[2] = {factor, factor};
      write_output_slab<Element, KeySlab>(slab, acc, factors, thread);
      sm90::named_barrier_sync(sm90::NamedBarrier::kEpilogue, barrier, sm90::kWarpgroup);
      if (thread == 0) store_output_slab<KeySlab>(map, slab, first_key(), at.key_head, at.batch);
    }

   private:
    EQX_DEVICE void mask(float (&rS)[kBlockM / 2], int m_block) const {
      sm90::pin(rS);
      if (m_block >= at.queries.first_unmasked) return;
      const ForwardParams& shape = args.params.forward;
      apply_mask_transposed<kMask, kBlockM>(rS, first_key() + sm90::accumulator_row(thread),
                                            m_block, shape.seq_k, shape.diagonal);
    }
    // Of the j-th eight queries.
    EQX_DEVICE void exponentiate(float (&rS)[kBlockM / 2], int j, float2 lse_log2) const {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float& even = rS[4 * j + 2 * r];
        float& odd = rS[4 * j + 2 * r + 1];
        even = sm90::exp2_approx(fmaf(even, scale_log2, -lse_log2.x));
        odd = sm90::exp2_approx(fmaf(odd, scale_log2, -lse_log2.y));
      }
    }
  };

  // --------------------------------------------------- 64 keys a warpgroup: dK and dV of its own

  EQX_DEVICE static void consume_keys(const BackwardDkdvArguments& args, const Smem& smem,
                                      int warpgroup) {
    Consumer me(args, smem, warpgroup);
    me.take_only_block();
    float rS[kBlockM / 2], rdP[kBlockM / 2];
    uint32_t rP[kBlockM / 4], rdS[kBlockM / 4];
    float rdK[kHeadDim / 2], rdV[kHeadDim / 2];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) rdK[i] = rdV[i] = 0.f;

    if (me.at.steps > 0) {
      Cursor cursor;
      int m_block = me.at.first_query_block();
      auto finish_ds = [&] {  // P and dS as operands of the next step's products
        me.init_dp(rdP, cursor);
        me.start_dp(rdP, cursor);
        Consumer::pack(rP, rS);
        sm90::wgmma_wait<0>();  // dP
        sm90::pin(rdP);
        Consumer::pack_product(rdS, rS, rdP);
      };
      me.start_scores(rS, cursor);
      sm90::wgmma_wait<0>();
      me.probabilities(rS, cursor, m_block);
      finish_ds();
      // Step i: S(i), then dV and dK of step i-1 run on the tensor cores one after the other; the
      // exponentials of step i hide behind the second. dP(i) comes last, once P and dS of step i-1
      // have left their registers: all at once there are not enough.
#pragma unroll 1
      for (int step = 1; step < me.at.steps; ++step) {
        const Cursor previous = cursor;
        cursor.advance();
        m_block = me.at.next_query_block(m_block);
        me.start_scores(rS, cursor);
        me.multiply(rdV, rP, me.dout_at(previous));
        me.multiply(rdK, rdS, me.q_at(previous));
        sm90::wgmma_commit();
        sm90::wgmma_wait<1>();  // S(i)
        me.probabilities(rS, cursor, m_block);
        sm90::wgmma_wait<0>();  // dV, dK
        sm90::pin(rdV);
        sm90::pin(rdK);
        me.release(smem.dout, previous);  // the producer may refill dO
        me.release(smem.q, previous);     // the producer may refill Q
        finish_ds();
      }
      me.multiply(rdV, rP, me.dout_at(cursor));
      me.multiply(rdK, rdS, me.q_at(cursor));
      sm90::wgmma_commit();
      sm90::wgmma_wait<0>();
      sm90::pin(rdV);
      sm90::pin(rdK);
    }
    me.store(args.dv, me.v(), rdV, 1.f, warpgroup);
    me.store(args.dk, me.k(), rdK, args.params.forward.softmax_scale, warpgroup);
    if (me.thread == 0) sm90::tma_store_wait_read();  // shared memory must outlive the stores
  }

  // ------------------------------- split outputs: one warpgroup for P and dV, one for dS and dK

  // A thread's 64 x kBlockM probabilities in fp32, for the same thread of the other warpgroup.
  EQX_DEVICE static uint32_t probability_address(const Smem& smem, int stage, int thread, int j) {
    return smem.probabilities.buffer(stage) + (j * sm90::kWarpgroup + thread) * 16;
  }

  EQX_DEVICE static void consume_values(const BackwardDkdvArguments& args, const Smem& smem) {
    Consumer me(args, smem, 0);
    me.take_only_block();
    float rS[kBlockM / 2];
    uint32_t rP[kBlockM / 4];
    float rdV[kHeadDim / 2];
#pragma unroll
    for (float& x : rdV) x = 0.f;
    auto finish_scores = [&](Cursor cursor, int step, int m_block) {
      me.probabilities(rS, cursor, m_block);
      me.release(smem.q, cursor);  // this warpgroup is done with Q and LSE
      const auto slot = sm90::Cursor<2>::after(step);
      smem.probabilities.wait_empty(slot);  // the other warpgroup has read the slot
#pragma unroll
      for (int j = 0; j < kBlockM / 8; ++j) {
        asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(
                         probability_address(smem, slot.stage, me.thread, j)),
                     "f"(rS[4 * j]), "f"(rS[4 * j + 1]), "f"(rS[4 * j + 2]), "f"(rS[4 * j + 3])
                     : "memory");
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

  EQX_DEVICE static void consume_scores(const BackwardDkdvArguments& args, const Smem& smem) {
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
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(rP[4 * j]), "=f"(rP[4 * j + 1]), "=f"(rP[4 * j + 2]),
                       "=f"(rP[4 * j + 3])
                     : "r"(probability_address(smem, slot.stage, me.thread, j))
                     : "memory");
      }
      smem.probabilities.empty(slot.stage).arrive();  // the slot may be overwritten
    };

    if (me.at.steps > 0) {
      Cursor cursor;
      me.init_dp(rdP, cursor);
      me.start_dp(rdP, cursor);
      sm90::wgmma_wait<0>();
      sm90::pin(rdP);
      me.release(smem.dout, cursor);  // done with dO(0) and delta
      read_probabilities(0);
      Consumer::pack_product(rdS, rP, rdP);
#pragma unroll 1
      for (int step = 1; step < me.at.steps; ++step) {
        const Cursor previous = cursor;
        cursor.advance();
        me.init_dp(rdP, cursor);
        smem.q.wait_full(previous);  // Q(i-1) has landed
        // dK goes first: the other warpgroup waits for the Q that takes the place of Q(i-1).
        me.multiply(rdK, rdS, me.q_at(previous));
        sm90::wgmma_commit();
        me.start_dp(rdP, cursor);
        sm90::wgmma_wait<1>();  // dK
        sm90::pin(rdK);
        me.release(smem.q, previous);  // done with Q(i-1)
        sm90::wgmma_wait<0>();         // dP(i)
        sm90::pin(rdP);
        me.release(smem.dout, cursor);  // done with dO(i) and delta
        read_probabilities(step);
        Consumer::pack_product(rdS, rP, rdP);
      }
      smem.q.wait_full(cursor);  // the last Q has landed
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
    backward_dkdv_kernel(const __grid_constant__ BackwardDkdvArguments args) {
  using Kernel = BackwardDkdvKernel<Element, kHeadDim, kMask, backward_dkdv_tile(kHeadDim)>;
  extern __shared__ uint8_t dynamic_smem[];
  const typename Kernel::Smem smem(dynamic_smem);
  const int warpgroup = sm90::warp_uniform(threadIdx.x / sm90::kWarpgroup);
  if (threadIdx.x == 0) smem.init_barriers();
  __syncthreads();
  if (warpgroup == 0) {
    sm90::shrink_registers<kBackwardProducerRegisters>();
    if (threadIdx.x == 0) Kernel::produce(args, smem);
    if (Kernel::kTwoProducers && threadIdx.x == sm90::kWarp) Kernel::produce_douts(args, smem);
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
