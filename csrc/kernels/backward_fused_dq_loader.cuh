// SPDX-License-Identifier: Apache-2.0
// The fast backward kernel with three warpgroups: two hold keys and compute dK and dV, the third
// takes dS from them, computes dQ, and adds it to the accumulator straight from its registers. That
// warpgroup loads, too: a dS says that the step before it is over, and its stage free.
//
// A thread block takes several blocks of keys, one after the other. The stages of Q and dO run on
// from one to the next, so that the loads of the next block begin before this one ends.
//
// Where it takes all key blocks of a head, each thread of dQ's warpgroup meets the same elements of
// the accumulator again: the first block stores, the others add, and the last one that a query sees
// converts what it completes. Nobody clears the accumulator before, or reads it after.
#pragma once

#include "kernels/backward_dkdv.cuh"
#include "kernels/dq_accumulator.cuh"

namespace eqx_flash {

template <typename Element, int kHeadDim, Mask kMask, bool kTakesWholeHeads_>
struct BackwardFusedDqLoaderKernel
    : BackwardDkdvKernel<Element, kHeadDim, kMask, backward_fused_tile(kHeadDim)> {
  using Base = BackwardDkdvKernel<Element, kHeadDim, kMask, backward_fused_tile(kHeadDim)>;
  using Block = typename Base::Block;
  using Consumer = typename Base::Consumer;
  using Cursor = typename Base::Cursor;
  using KeySlab = typename Base::KeySlab;
  using QueryTile = typename Base::QueryTile;
  using ScoreTile = typename Base::ScoreTile;
  using Parts = DqParts<kHeadDim>;
  using DqSlab = sm90::SmemTile<kWarpgroupRows, kHeadDim>;
  static constexpr int kBlockM = Base::kBlockM;
  static constexpr int kStages = Base::kTile.k_stages;
  static constexpr int kScoreStages = 2;  // of dS
  // At head dim 64 K and V stay in registers, since shared memory is what limits this; it also has
  // room for the keys of the next block, and for dK and dV on their way out.
  static constexpr bool kKeysInRegisters = kHeadDim <= 64;
  static constexpr int kKeyBuffers = kKeysInRegisters ? 2 : 1;
  using ScoreCursor = sm90::Cursor<kScoreStages>;
  using KeyCursor = sm90::Cursor<kKeyBuffers>;
  static constexpr bool kPersistent = kPersistentBackward || kTakesWholeHeads_;
  static constexpr bool kTakesWholeHeads = kTakesWholeHeads_;
  static constexpr int kThreads = 3 * sm90::kWarpgroup;
  static constexpr int kConsumerRegisters = kHeadDim <= 64 ? 208 : 224;
  static constexpr int kLoaderRegisters = kHeadDim <= 64 ? 88 : 56;
  static constexpr int kDqCols = kHeadDim <= 64 ? 64 : 32;  // of a product: 16 registers of 56
  static_assert(2 * kConsumerRegisters + kLoaderRegisters <= 504);
  static_assert(!Base::kSplitOutputs);

  struct Smem : Base::Smem {
    static constexpr uint32_t kDs = (Base::Smem::kEnd + 1023) / 1024 * 1024;
    static constexpr uint32_t kSecondKeys = kDs + kScoreStages * ScoreTile::kBytes;
    static constexpr uint32_t kOut = kSecondKeys + (kKeyBuffers - 1) * 2 * Base::Smem::kKeyBytes;
    static constexpr uint32_t kOutEnd = kOut + (kKeysInRegisters ? 2 * Base::Smem::kKeyBytes : 0);
    static constexpr uint32_t kDq = kOutEnd;
    static constexpr uint32_t kDqEnd = kDq + (kTakesWholeHeads ? DqSlab::kBytes : 0);
    static constexpr int kBytes = kDqEnd + 1024;  // alignment
    static_assert(kBytes <= kMaxSharedMemory);
    sm90::Ring<kScoreStages> ds;
    sm90::Ring<kKeyBuffers> keys;  // K, and V behind it
    uint32_t dk, dv, dq;

    EQX_DEVICE explicit Smem(const void* dynamic) : Base::Smem(dynamic) {
      const uint32_t base = this->k;
      ds = {base + kDs, ScoreTile::kBytes, this->probabilities.barriers};  // which this has none of
      keys = {base, kSecondKeys, ds.barriers + decltype(ds)::kBarrierBytes};
      dk = kKeysInRegisters ? base + kOut : base;
      dv = dk + Base::Smem::kKeyBytes;
      dq = base + kDq;
    }
    EQX_DEVICE void init_barriers() const {
      this->q.init(Base::kConsumerThreads);
      this->dout.init(Base::kConsumerThreads);
      for (int stage = 0; stage < kScoreStages; ++stage) {
        ds.full(stage).init(Base::kConsumerThreads);
        ds.empty(stage).init(sm90::kWarpgroup);
      }
      for (int stage = 0; stage < kKeyBuffers; ++stage) {
        keys.full(stage).init(1);
        // Every thread is done with K and V; or a thread of each warpgroup has seen dK and dV
        // leave.
        keys.empty(stage).init(kKeysInRegisters ? kThreads : 2);
      }
      sm90::fence_barrier_init();
    }
  };

  // The blocks of keys of this thread block, by number. They are sorted by length: every other
  // round goes backwards, so that no thread block has the longest of all.
  EQX_DEVICE static int block_index(const BackwardDkdvArguments& args, int round) {
    if constexpr (kTakesWholeHeads) {
      const int blocks = args.order.blocks;
      const int head = static_cast<int>(blockIdx.x) + round / blocks * static_cast<int>(gridDim.x);
      return head * blocks + round % blocks;
    }
    const int forwards = static_cast<int>(blockIdx.x);
    const int backwards = static_cast<int>(gridDim.x) - 1 - forwards;
    return round * static_cast<int>(gridDim.x) + (round % 2 == 0 ? forwards : backwards);
  }
  EQX_DEVICE static bool is_block(const BackwardDkdvArguments& args, int round) {
    return block_index(args, round) < args.order.total;
  }

  // ---------------------------------------------------------------- the warpgroup of dQ and loads

  // Every warp of the warpgroup keeps count of what to load next; one thread loads.
  struct Loader {
    const BackwardDkdvArguments& args;
    const Smem& smem;
    const bool elected;
    int keys_round = 0;
    int round = 0;
    Block at =
        Base::block(args, block_index(args, 0));  // of the next step, its head and its block there
    int left = at.steps;
    int head = first_head(args, at);
    int i = at.queries.first;
    Cursor cursor;

    // K and V of the next block, if there is one, as soon as their buffer is free.
    EQX_DEVICE void load_keys() {
      if (!is_block(args, keys_round)) return;
      const Block keys = Base::block(args, block_index(args, keys_round));
      const auto to = KeyCursor::after(keys_round);
      ++keys_round;
      smem.keys.wait_empty(to);  // the keys this buffer held are done with
      if (!elected) return;
      const sm90::Barrier full = smem.keys.full(to.stage);
      full.arrive_and_expect(2 * Smem::kKeyBytes);
      for (int w = 0; w < Base::kKeySlabs; ++w) {
        for (int s = 0; s < KeySlab::kSlabs; ++s) {
          const uint32_t k =
              smem.keys.buffer(to.stage) + w * KeySlab::kBytes + s * KeySlab::kSlabBytes;
          const sm90::TmaCoordinates from{s * KeySlab::kSlabCols,
                                          keys.n_block * Base::kBlockN + w * kWarpgroupRows,
                                          keys.key_head, keys.batch};
          sm90::tma_load(args.k, k, full.address, from);
          sm90::tma_load(args.v, k + Smem::kKeyBytes, full.address, from);
        }
      }
    }
    // Q, dO and the statistics of the next step, if there is one. The stage must be free.
    EQX_DEVICE void load_step() {
      while (left == 0) {
        if (!is_block(args, round + 1)) return;
        at = Base::block(args, block_index(args, ++round));
        left = at.steps;
        head = first_head(args, at);
        i = at.queries.first;
      }
      const int m_block = Base::kRotates ? at.rotated(i) : i;
      if (elected) {
        load(args.q, smem.q, args.params.lse_log2, smem.lse_log2, m_block);
        load(args.dout, smem.dout, args.params.dlse_minus_delta, smem.dlse_minus_delta, m_block);
      }
      cursor.advance();
      --left;
      if (++i == at.queries.end) {
        i = at.queries.first;
        ++head;
      }
    }

   private:
    EQX_DEVICE void load(const CUtensorMap& map, const sm90::Ring<kStages>& ring,
                         const float* stats, uint32_t stats_buffer, int m_block) const {
      const sm90::Barrier full = ring.full(cursor.stage);
      full.arrive_and_expect(QueryTile::kBytes + Smem::kStatBytes);
      const int64_t row =
          (int64_t{at.batch} * args.params.forward.heads + head) * args.params.padded_seq_q +
          m_block * kBlockM;
      sm90::bulk_load(stats + row, stats_buffer + cursor.stage * Smem::kStatBytes, full.address,
                      Smem::kStatBytes);
      for (int s = 0; s < QueryTile::kSlabs; ++s) {
        sm90::tma_load(map, ring.buffer(cursor.stage) + s * QueryTile::kSlabBytes, full.address,
                       {s * QueryTile::kSlabCols, m_block * kBlockM, head, at.batch});
      }
    }
  };
  EQX_DEVICE static int first_head(const BackwardDkdvArguments& args, const Block& at) {
    const ForwardParams& shape = args.params.forward;
    return at.key_head * (shape.heads / shape.heads_k);
  }

  EQX_DEVICE static void load_and_accumulate_dq(const BackwardDkdvArguments& args,
                                                const Smem& smem) {
    const ForwardParams& shape = args.params.forward;
    const int thread = threadIdx.x % sm90::kWarpgroup;
    Loader loader{args, smem, thread == 0};
    loader.load_keys();
    sm90::wait_for_previous_kernel();  // the statistics are there, and dQ's accumulator is clear
    sm90::let_next_kernel_start();     // which may therefore use the statistics
    for (int stage = 0; stage < kStages; ++stage) loader.load_step();
    ScoreCursor cursor;
    bool first_step = true;
#pragma unroll 1
    for (int round = 0; is_block(args, round); ++round) {
      const Block at = Base::block(args, block_index(args, round));
      const auto keys_at = KeyCursor::after(round);
      const auto k = KeySlab::mn_major(smem.keys.buffer(keys_at.stage));
      if constexpr (kKeyBuffers > 1) loader.load_keys();  // the next block's
      __syncwarp();
      smem.keys.wait_full(keys_at);  // K has landed
      const int first = first_head(args, at);
#pragma unroll 1
      for (int head = first; head < first + shape.heads / shape.heads_k; ++head) {
        float* accumulator =
            args.params.dq_accumulator +
            Parts::offset(int64_t{at.batch} * shape.heads + head, args.params.padded_seq_q, 0, 0) +
            thread * 4;
#pragma unroll 1
        for (int i = at.queries.first; i < at.queries.end; ++i) {
          const int m_block = Base::kRotates ? at.rotated(i) : i;
          smem.ds.wait_full(cursor);  // both warpgroups have stored their keys of dS
          // They are therefore done with the step before, and its stage is free.
          if (!first_step) loader.load_step();
          __syncwarp();
          first_step = false;
          Share share = Share::kOther;
          if constexpr (kTakesWholeHeads) share = share_of(shape, at.n_block, m_block);
          accumulate_dq(accumulator + int64_t{m_block} * kBlockM * kHeadDim, smem, k, cursor, share,
                        shape.softmax_scale);
          if (complete(share)) store_dq(args, smem, m_block, head, at.batch);
          cursor.advance();
        }
        if constexpr (kTakesWholeHeads) {
          if (at.n_block == 0) clear_unseen(args, smem, at, head);
        }
      }
      if constexpr (kKeysInRegisters) {
        smem.keys.empty(keys_at.stage).arrive();  // dQ is done with K
      } else {
        // dQ is done with K: its buffer may take dK.
        sm90::named_barrier_arrive(sm90::NamedBarrier::kKeysRead, 0, kThreads);
        loader.load_keys();  // the next block's
        __syncwarp();
      }
    }
    if (kTakesWholeHeads && thread == 0) sm90::tma_store_wait_read();
  }

  // What a block of keys contributes to a block of queries, if it alone adds to dQ at a time.
  enum class Share { kFirst, kOther, kLast, kOnly };
  EQX_DEVICE static bool complete(Share share) {
    return kTakesWholeHeads && (share == Share::kLast || share == Share::kOnly);
  }
  EQX_DEVICE static Share share_of(const ForwardParams& shape, int n_block, int m_block) {
    int last_key = shape.seq_k - 1;
    if constexpr (kMask == Mask::kCausal) {
      last_key = min(last_key, (m_block + 1) * kBlockM - 1 + shape.diagonal);
    }
    const bool last = n_block == last_key / Base::kBlockN;
    if (n_block == 0) return last ? Share::kOnly : Share::kFirst;
    return last ? Share::kLast : Share::kOther;
  }

  // Adds a step's dS K to the accumulator, or writes the whole dQ to its slab: some columns after
  // the other, since registers are scarce.
  EQX_DEVICE static void accumulate_dq(float* accumulator, const Smem& smem, sm90::Descriptor k,
                                       ScoreCursor cursor, Share share, float softmax_scale) {
    const auto ds = ScoreTile::k_major(smem.ds.buffer(0)) + cursor.stage * ScoreTile::kBytes;
    if (complete(share)) wait_for_dq_slab();
#pragma unroll
    for (int part = 0; part < kHeadDim / kDqCols; ++part) {
      constexpr int kSlab = KeySlab::kSlabCols;
      const auto k_cols =
          k + (part * kDqCols / kSlab * KeySlab::kSlabBytes + part * kDqCols % kSlab * 2);
      float rdQ[kDqCols / 2];
      sm90::wgmma_fence();
#pragma unroll
      for (int j = 0; j < Base::kBlockN / 16; ++j) {
        const int keys = (j / 4) * KeySlab::kBytes + KeySlab::mn_major_step(j % 4);
        sm90::WgmmaAtom<Element, kDqCols, sm90::Major::kMN>::shared(
            rdQ, (ds + ScoreTile::k_major_step(j)).bits(), (k_cols + keys).bits(), j > 0);
      }
      sm90::wgmma_commit();
      sm90::wgmma_wait<0>();
      sm90::pin(rdQ);
      if (part == kHeadDim / kDqCols - 1) {
        smem.ds.empty(cursor.stage).arrive();  // the stage may take another dS
      }
      float* const sums = accumulator + part * kDqCols / 8 * sm90::kWarpgroup * 4;
      if (complete(share)) {
        if (share == Share::kLast) {
#pragma unroll
          for (int j = 0; j < kDqCols / 8; ++j) {
            const float4 sum = __ldcg(reinterpret_cast<const float4*>(sums) + j * sm90::kWarpgroup);
            rdQ[4 * j] += sum.x;
            rdQ[4 * j + 1] += sum.y;
            rdQ[4 * j + 2] += sum.z;
            rdQ[4 * j + 3] += sum.w;
          }
        }
        write_dq_slab(smem.dq, rdQ, part, softmax_scale);
      } else if (share == Share::kFirst) {
#pragma unroll
        for (int j = 0; j < kDqCols / 8; ++j) {
          reinterpret_cast<float4*>(sums)[j * sm90::kWarpgroup] =
              make_float4(rdQ[4 * j], rdQ[4 * j + 1], rdQ[4 * j + 2], rdQ[4 * j + 3]);
        }
      } else {
#pragma unroll
        for (int j = 0; j < kDqCols / 8; ++j) {
          sm90::reduce_add_x4(sums + j * sm90::kWarpgroup * 4, rdQ + 4 * j);
        }
      }
    }
  }

  static constexpr int kDqBarrier = 2;  // behind those of the warpgroups of the keys
  EQX_DEVICE static void sync_dq() {
    sm90::named_barrier_sync(sm90::NamedBarrier::kEpilogue, kDqBarrier, sm90::kWarpgroup);
  }
  // Until the slab's last dQ has left.
  EQX_DEVICE static void wait_for_dq_slab() {
    if (threadIdx.x % sm90::kWarpgroup == 0) sm90::tma_store_wait_read();
    sync_dq();
  }
  EQX_DEVICE static void write_dq_slab(uint32_t slab, const float (&rdQ)[kDqCols / 2], int part,
                                       float scale) {
    const float factors[2] = {scale, scale};
    write_output_columns<Element, DqSlab, kDqCols>(slab, part * kDqCols, rdQ, factors,
                                                   threadIdx.x % sm90::kWarpgroup);
  }
  EQX_DEVICE static void store_dq(const BackwardDkdvArguments& args, const Smem& smem, int m_block,
                                  int head, int batch) {
    sm90::fence_async_proxy();
    sync_dq();  // the slab is written
    if (threadIdx.x % sm90::kWarpgroup == 0) {
      store_output_slab<DqSlab>(args.dq, smem.dq, m_block * kBlockM, head, batch);
    }
  }
  // dQ of the queries before the first that sees a key.
  EQX_DEVICE static void clear_unseen(const BackwardDkdvArguments& args, const Smem& smem,
                                      const Block& at, int head) {
    for (int m_block = 0; m_block < at.queries.first; ++m_block) {
      wait_for_dq_slab();
      float zeros[kDqCols / 2] = {};
#pragma unroll
      for (int part = 0; part < kHeadDim / kDqCols; ++part)
        write_dq_slab(smem.dq, zeros, part, 0.f);
      store_dq(args, smem, m_block, head, at.batch);
    }
  }

  // ------------------------------------------------------------------- the warpgroups of the keys

  EQX_DEVICE static void consume(const BackwardDkdvArguments& args, const Smem& smem,
                                 int warpgroup) {
    Cursor cursor;
    ScoreCursor ds_cursor;
#pragma unroll 1
    for (int round = 0; is_block(args, round); ++round) {
      const Consumer me(args, smem, warpgroup, Base::block(args, block_index(args, round)));
      consume_block(me, smem, KeyCursor::after(round), cursor, ds_cursor);
    }
    // Shared memory must outlive the stores.
    if (threadIdx.x % sm90::kWarpgroup == 0) sm90::tma_store_wait_read();
  }

  EQX_DEVICE static void consume_block(const Consumer& me, const Smem& smem, KeyCursor keys_at,
                                       Cursor& cursor, ScoreCursor& ds_cursor) {
    const BackwardDkdvArguments& args = me.args;
    const int warpgroup = me.key_slab;
    const uint32_t slab = warpgroup * KeySlab::kBytes;
    constexpr int kOperand = kKeysInRegisters ? kHeadDim / 4 : 1;
    uint32_t rP[kBlockM / 4], rdS[kBlockM / 4];
    uint32_t rK[kOperand], rV[kOperand];
    float rdK[kHeadDim / 2], rdV[kHeadDim / 2];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) rdK[i] = rdV[i] = 0.f;
    int m_block = me.first_query_block();

    auto start_scores = [&](float (&rS)[kBlockM / 2]) {  // S^T = K Q^T
      if constexpr (kKeysInRegisters) {
        const auto q = QueryTile::k_major(smem.q.buffer(0)) + cursor.stage * QueryTile::kBytes;
        smem.q.wait_full(cursor);  // Q and LSE have landed
        sm90::wgmma_fence();
        sm90::mma_registers_k_major<Element, QueryTile>(rS, rK, q);
        sm90::wgmma_commit();
      } else {
        me.start_scores(rS, cursor);
      }
    };
    auto start_dp = [&](float (&rdP)[kBlockM / 2]) {  // dP^T - delta + dlse
      me.init_dp(rdP, cursor);
      if constexpr (kKeysInRegisters) {
        const auto dout =
            QueryTile::k_major(smem.dout.buffer(0)) + cursor.stage * QueryTile::kBytes;
        sm90::wgmma_fence();
        sm90::mma_registers_k_major<Element, QueryTile, true>(rdP, rV, dout);
        sm90::wgmma_commit();
      } else {
        me.start_dp(rdP, cursor);
      }
    };
    auto start_dk = [&](Cursor at) {  // dK += dS^T Q
      me.multiply(rdK, rdS, smem.q, at);
      sm90::wgmma_commit();
    };
    auto finish_dk = [&] {
      sm90::wgmma_wait<0>();  // dK
      sm90::pin(rdK);
    };
    // dP, then dV: dS is computed and handed over beside the second. P waits for dP as packed for
    // the product, since S, dP, P and dS at once exceed the registers.
    auto finish_scores = [&](float (&rS)[kBlockM / 2]) {
      Consumer::pack(rP, rS);
      float rdP[kBlockM / 2];
      start_dp(rdP);
      me.multiply(rdV, rP, smem.dout, cursor);  // dV += P^T dO
      sm90::wgmma_commit();
      sm90::wgmma_wait<1>();  // dP
      sm90::pin(rdP);
#pragma unroll
      for (int i = 0; i < kBlockM / 4; ++i) {
        const float2 p = sm90::unpack<Element>(rP[i]);
        rdS[i] = sm90::pack<Element>(p.x * rdP[2 * i], p.y * rdP[2 * i + 1]);
      }
      smem.ds.wait_empty(ds_cursor);  // dQ has read the dS before the last
      me.store_ds(smem.ds.buffer(ds_cursor.stage), rdS);
      smem.ds.full(ds_cursor.stage).arrive();  // dQ may have this one, and the step before is over
      ds_cursor.advance();
      sm90::wgmma_wait<0>();  // dV
      sm90::pin(rdV);
    };

    smem.keys.wait_full(keys_at);  // K and V have landed
    if constexpr (kKeysInRegisters) {
      const uint32_t k = smem.keys.buffer(keys_at.stage) + slab;
      sm90::load_operand<KeySlab>(rK, k, me.thread);
      sm90::load_operand<KeySlab>(rV, k + Smem::kKeyBytes, me.thread);
      smem.keys.empty(keys_at.stage).arrive();  // K and V have been read
    }
    if (me.at.steps > 0) {
      {
        float rS[kBlockM / 2];
        start_scores(rS);
        sm90::wgmma_wait<0>();
        me.probabilities(rS, cursor, m_block);
        finish_scores(rS);
      }
      // Step i: S(i), then dK(i-1), which runs beside the exponentials; what else this warpgroup
      // leaves idle, the other one uses, half a step away.
#pragma unroll 1
      for (int step = 1; step < me.at.steps; ++step) {
        const Cursor previous = cursor;
        cursor.advance();
        m_block = me.next_query_block(m_block);
        float rS[kBlockM / 2];
        start_scores(rS);
        start_dk(previous);
        sm90::wgmma_wait<1>();  // S(i)
        me.probabilities(rS, cursor, m_block);
        finish_dk();
        finish_scores(rS);
      }
      start_dk(cursor);
      finish_dk();
      cursor.advance();
    }
    if constexpr (kKeysInRegisters) {
      if (me.thread == 0) sm90::tma_store_wait_read();  // the previous dK and dV have left
      sm90::named_barrier_sync(sm90::NamedBarrier::kEpilogue, warpgroup, sm90::kWarpgroup);
      me.store(args.dv, smem.dv + slab, rdV, 1.f, warpgroup);
    } else {
      me.store(args.dv, smem.dv + slab, rdV, 1.f, warpgroup);
      // dQ is done with K.
      sm90::named_barrier_sync(sm90::NamedBarrier::kKeysRead, 0, kThreads);
    }
    me.store(args.dk, smem.dk + slab, rdK, args.params.forward.softmax_scale, warpgroup);
    if (!kKeysInRegisters && me.thread == 0) {
      sm90::tma_store_wait_read();
      smem.keys.empty(keys_at.stage).arrive();  // dK and dV have left the buffers of K and V
    }
  }
};

template <typename Element, int kHeadDim, Mask kMask, bool kTakesWholeHeads>
__global__ void __launch_bounds__(
    BackwardFusedDqLoaderKernel<Element, kHeadDim, kMask, kTakesWholeHeads>::kThreads, 1)
    backward_fused_dq_loader_kernel(const __grid_constant__ BackwardDkdvArguments args) {
  using Kernel = BackwardFusedDqLoaderKernel<Element, kHeadDim, kMask, kTakesWholeHeads>;
  extern __shared__ uint8_t dynamic_smem[];
  const typename Kernel::Smem smem(dynamic_smem);
  const int warpgroup = sm90::warp_uniform(threadIdx.x / sm90::kWarpgroup);
  if (threadIdx.x == 0) smem.init_barriers();
  __syncthreads();
  if (warpgroup == 0) {
    sm90::shrink_registers<Kernel::kLoaderRegisters>();
    Kernel::load_and_accumulate_dq(args, smem);
  } else {
    sm90::grow_registers<Kernel::kConsumerRegisters>();
    Kernel::consume(args, smem, warpgroup - 1);
  }
}

}  // namespace eqx_flash
