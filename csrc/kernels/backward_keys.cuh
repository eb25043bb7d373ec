// SPDX-License-Identifier: Apache-2.0
// What the backward kernels share whose blocks hold keys: a block of keys stays, the queries of all
// heads that share it pass by (FlashAttention-2, Dao 2023, section 3.1.2).
//
// Scores are computed transposed, S^T = K Q^T, so that P^T and dS^T lie in registers as the left
// operands of dV += P^T dO and dK += dS^T Q. The statistics of the queries belong to columns then,
// and the products start from them: S from -lse / scale, dP from dlse - delta (StartTile).
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

struct BackwardKeysArguments {
  CUtensorMap q, dout, k, v, dk, dv;
  BackwardParams params;
  BlockOrder order;
};

template <typename Element, int kHeadDim, Mask kMask, BackwardTile kTile_>
struct BackwardKeys {
  using ElementType = Element;
  static constexpr BackwardTile kTile = kTile_;
  static constexpr int kBlockM = kTile.block_m;
  static constexpr int kBlockN = kTile.block_n;
  static constexpr int kKeySlabs = kBlockN / kWarpgroupRows;
  static constexpr int kKeyStages = kTile.key_stages;
  static constexpr int kKeyWarps = 2 * sm90::kWarpgroup / sm90::kWarp;  // that compute dK and dV
  // Two slabs: each warpgroup computes dK and dV of its own 64 keys. One slab: the accumulators
  // are too large for that, and one warpgroup computes dV, the other dK.
  static constexpr bool kSplitOutputs = kKeySlabs == 1;
  static constexpr bool kRotates = kTile.staggered && kMask == Mask::kFull;
  using QueryTile = sm90::SmemTile<kBlockM, kHeadDim>;       // of Q, or of dO
  using KeySlab = sm90::SmemTile<kWarpgroupRows, kHeadDim>;  // 64 keys of K, V, dK, or dV
  using ScoreTile = sm90::SmemTile<kBlockM, kBlockN>;        // dS of the fused kernels
  // The statistics of a step's queries: S starts from -lse / scale, dP from dlse - delta.
  using Starts = sm90::StartTile<kBlockM>;
  using Cursor = sm90::Cursor<kTile.k_stages>;
  using KeyCursor = sm90::Cursor<kKeyStages>;
  static_assert(kTile.k_stages == kTile.v_stages);

  struct Smem {
    static constexpr uint32_t kKeyBytes = kKeySlabs * KeySlab::kBytes;
    static constexpr uint32_t kProbabilityBytes = kSplitOutputs ? kBlockM * kBlockN * 4 : 0;
    // What is read most lies first: with Q, dO and dS above 128 KB, the fused kernel of head dim
    // 128 was 5 % slower.
    static constexpr uint32_t kQ = 0;
    static constexpr uint32_t kDout = kQ + kTile.k_stages * QueryTile::kBytes;
    static constexpr uint32_t kDs = kDout + kTile.k_stages * QueryTile::kBytes;
    static constexpr uint32_t kProbabilities = kDs + kTile.ds_stages * ScoreTile::kBytes;
    // Small things lie before the last stage of K and V: compute-sanitizer takes an operand of
    // wgmma for 2 KB in a row, which the ones, read over and over, must therefore have behind them.
    static constexpr uint32_t kLarge = kProbabilities + 2 * kProbabilityBytes;
    static constexpr uint32_t kStarts = kLarge + (kKeyStages - 1) * 2 * kKeyBytes;
    static constexpr uint32_t kOnes = kStarts + kTile.k_stages * Starts::kBytes;
    static constexpr uint32_t kBarriers = kOnes + Starts::kOnesBytes;
    static constexpr uint32_t kMore = kBarriers + 192;  // what a kernel adds
    static constexpr uint32_t kMoreBytes = 160;
    static constexpr uint32_t kLastKeys = (kMore + kMoreBytes + 1023) / 1024 * 1024;
    static constexpr uint32_t kKeyStride = kLastKeys - kLarge;  // from stage to stage
    static constexpr uint32_t kKeys = kLastKeys - (kKeyStages - 1) * kKeyStride;
    static constexpr int kBytes = kLastKeys + 2 * kKeyBytes;
    static_assert(kKeyStages <= 2);
    static_assert(kBytes <= kMaxSharedMemory);
    uint32_t base;
    sm90::Descriptor origin;       // of `base`: what is a constant away from it needs no register
    sm90::Ring<kKeyStages> keys;   // K, then V, of a block
    sm90::Ring<kTile.k_stages> q;  // Q, and what S and dP start from
    sm90::Ring<kTile.k_stages> dout;
    sm90::Ring<2> probabilities;

    EQX_DEVICE explicit Smem(const void* dynamic) {
      constexpr uint32_t kRingBarriers = sm90::Ring<kTile.k_stages>::kBarrierBytes;
      static_assert(2 * kRingBarriers + sm90::Ring<2>::kBarrierBytes +
                        sm90::Ring<kKeyStages>::kBarrierBytes <=
                    kMore - kBarriers);
      base = sm90::shared_address(dynamic);
      origin = sm90::Descriptor::origin(base);
      q = {base + kQ, QueryTile::kBytes, base + kBarriers};
      dout = {base + kDout, QueryTile::kBytes, base + kBarriers + kRingBarriers};
      probabilities = {base + kProbabilities, kProbabilityBytes,
                       base + kBarriers + 2 * kRingBarriers};
      keys = {base + kKeys, kKeyStride, probabilities.barriers + sm90::Ring<2>::kBarrierBytes};
    }
    // By all threads; a __syncthreads must follow.
    EQX_DEVICE void init_ones() const {
      if (threadIdx.x >= Starts::kOnesThreads) return;
      Starts::write_ones(base + kOnes, threadIdx.x);
      sm90::fence_async_proxy();
    }
    // By one thread, as above.
    EQX_DEVICE void init_barriers() const {
      q.init(kKeyWarps, 1 + sm90::kWarp);  // the load, and write_starts
      dout.init(kKeyWarps);
      probabilities.init(sm90::kWarpgroup, sm90::kWarpgroup);
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

    // The query block that has the turn of `m_block`.
    EQX_DEVICE int rotated(int m_block) const {
      if constexpr (kRotates) {
        return (m_block + n_block) % queries.end;
      } else {
        return m_block;
      }
    }
    EQX_DEVICE int first_query_block() const { return rotated(queries.first); }
    EQX_DEVICE int next_query_block(int m_block) const {
      return m_block + 1 < queries.end ? m_block + 1 : queries.first;  // next head
    }
  };
  EQX_DEVICE static Block block(const BackwardKeysArguments& args, int index) {
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
  };
  EQX_DEVICE static Stream queries(const BackwardKeysArguments& args, const Smem& smem) {
    return {args.q, smem.q};
  }
  EQX_DEVICE static Stream douts(const BackwardKeysArguments& args, const Smem& smem) {
    return {args.dout, smem.dout};
  }

  EQX_DEVICE static void load_keys(const BackwardKeysArguments& args, const Smem& smem,
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
  EQX_DEVICE static void load_blocks(const BackwardKeysArguments& args, const Block& at,
                                     Cursor& cursor, BeforeStep&& before_step,
                                     const Streams&... streams) {
    auto load = [&](const Stream& from, int m_block, int head) {
      from.ring.wait_empty(cursor);  // all consumers are done with the block this stage held
      const sm90::Barrier full = from.ring.full(cursor.stage);
      full.arrive_and_expect(QueryTile::kBytes);
      for (int s = 0; s < QueryTile::kSlabs; ++s) {
        sm90::tma_load(from.map, from.ring.buffer(cursor.stage) + s * QueryTile::kSlabBytes,
                       full.address, {s * QueryTile::kSlabCols, m_block * kBlockM, head, at.batch});
      }
    };
    for_each_step(args, at, [&](int step, int m_block, int head) {
      before_step(step);
      (load(streams, m_block, head), ...);
      cursor.advance();
    });
  }

  // Calls work(step, query block, query head).
  template <typename Work>
  EQX_DEVICE static void for_each_step(const BackwardKeysArguments& args, const Block& at,
                                       Work&& work) {
    int head = at.key_head * (args.params.forward.heads / args.params.forward.heads_k);
    int m_block = at.queries.first;
#pragma unroll 1
    for (int step = 0; step < at.steps; ++step) {
      work(step, at.rotated(m_block), head);
      if (++m_block == at.queries.end) {  // the next head of the group
        m_block = at.queries.first;
        ++head;
      }
    }
  }

  // One warp: what S and dP of a step start from.
  EQX_DEVICE static void write_starts(const BackwardKeysArguments& args, const Smem& smem,
                                      const Block& at, Cursor& cursor) {
    constexpr int kRowsPerLane = kBlockM / sm90::kWarp;
    const int lane = threadIdx.x % sm90::kWarp;
    const float per_lse = -1.f / Consumer::scale_log2_of(args);
    for_each_step(args, at, [&](int, int m_block, int head) {
      const int64_t row =
          (int64_t{at.batch} * args.params.forward.heads + head) * args.params.padded_seq_q +
          m_block * kBlockM + lane;
      float scores[kRowsPerLane], dps[kRowsPerLane];
#pragma unroll
      for (int i = 0; i < kRowsPerLane; ++i) {
        scores[i] = __ldcg(args.params.lse_log2 + row + i * sm90::kWarp) * per_lse;
        dps[i] = __ldcg(args.params.dlse_minus_delta + row + i * sm90::kWarp);
      }
      smem.q.wait_empty(cursor);  // all consumers are done with the step this stage held
#pragma unroll
      for (int i = 0; i < kRowsPerLane; ++i) {
        Starts::write(smem.base + Smem::kStarts + cursor.stage * Starts::kBytes,
                      lane + i * sm90::kWarp, scores[i], dps[i]);
      }
      sm90::fence_async_proxy();
      smem.q.full(cursor.stage).arrive();  // the products may start
      cursor.advance();
    });
  }

  // ----------------------------------------------------------------------------------- consumers

  struct Consumer {
    const BackwardKeysArguments& args;
    const Smem& smem;
    const int thread = threadIdx.x % sm90::kWarpgroup;
    const int key_slab;  // of this warpgroup
    Block at;
    int slab;  // where this warpgroup's keys begin
    float scale_log2 = scale_log2_of(args);

    EQX_DEVICE Consumer(const BackwardKeysArguments& args_, const Smem& smem_, int key_slab_)
        : args(args_), smem(smem_), key_slab(key_slab_) {
      asm volatile("mov.b32 %0, %0;" : "+f"(scale_log2));  // a vector register: operand reuse
    }
    // With less, all scores count as equal, and lse / scale stays finite.
    EQX_DEVICE static float scale_log2_of(const BackwardKeysArguments& args) {
      return fmaxf(args.params.forward.softmax_scale * 1.44269504f, 1e-30f);
    }
    EQX_DEVICE void take(const Block& block, KeyCursor key_at) {
      at = block;
      slab = Smem::kKeys + key_at.stage * Smem::kKeyStride + key_slab * KeySlab::kBytes;
      smem.keys.wait_full(key_at);  // K and V have landed
    }
    // The block of a thread block that has but one.
    EQX_DEVICE void take_only_block() {
      Block block = BackwardKeys::block(args, blockIdx.x);
      block.n_block = sm90::warp_uniform(block.n_block);
      take(block, KeyCursor{});
    }
    // This warp is done with a stage, which only products read. One lane for all is worth 1 % from
    // 8k on at head dim 64.
    template <typename Ring>
    EQX_DEVICE void release(const Ring& ring, Cursor cursor) const {
      ring.empty(cursor.stage).arrive_if(thread % sm90::kWarp == 0);
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

    template <sm90::Start kStart>
    EQX_DEVICE void start(float (&acc)[kBlockM / 2], Cursor cursor, bool accumulate = false) const {
      sm90::wgmma_fence();
      sm90::mma_start<kBlockM, kStart>(
          acc, smem.origin + Smem::kOnes,
          smem.origin + (Smem::kStarts + cursor.stage * Starts::kBytes), accumulate);
    }
    // S^T - lse / scale = K Q^T - lse / scale
    EQX_DEVICE void start_scores(float (&rS)[kBlockM / 2], Cursor cursor) const {
      smem.q.wait_full(cursor);  // Q has landed, and what S and dP start from
      start<sm90::Start::kFirst>(rS, cursor);
      sm90::mma_shared_k_major<Element, KeySlab, QueryTile, true>(rS, KeySlab::k_major(k_at()),
                                                                  QueryTile::k_major(q_at(cursor)));
      sm90::wgmma_commit();
    }
    // dP^T - delta + dlse = V dO^T + (dlse - delta). The step's Q must have landed.
    EQX_DEVICE void start_dp(float (&rdP)[kBlockM / 2], Cursor cursor,
                             bool accumulate = false) const {
      smem.dout.wait_full(cursor);  // dO has landed
      start<sm90::Start::kSecond>(rdP, cursor, accumulate);
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
    // P^T = exp2((S^T - lse / scale) * scale)
    EQX_DEVICE void probabilities(float (&rS)[kBlockM / 2], int m_block) const {
      mask(rS, m_block);
#pragma unroll
      for (float& x : rS) x = sm90::exp2_approx(x * scale_log2);
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
  };
};

}  // namespace eqx_flash
