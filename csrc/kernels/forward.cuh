// SPDX-License-Identifier: Apache-2.0
// The forward kernel: O = softmax(scale * Q K^T) V and the log-sum-exp of each row.
//
// The threads of one warpgroup decide on tiles and load them with TMA; each consumer warpgroup owns
// 64 query rows and keeps S, P and O in registers (FlashAttention-3, Shah et al. 2024, section 3).
// Two overlaps hide the softmax: warpgroups take turns on the tensor cores, and inside a warpgroup
// S of the next key block is in flight together with P V of the current one.
#pragma once

#include <type_traits>

#include "kernels/epilogue.cuh"
#include "kernels/lazy_softmax.cuh"
#include "kernels/mask.cuh"
#include "kernels/scheduler.cuh"
#include "kernels/softmax.cuh"
#include "params.h"
#include "sm90/barrier.cuh"
#include "sm90/registers.cuh"
#include "sm90/smem_tile.cuh"
#include "sm90/tma.cuh"
#include "sm90/wgmma.cuh"
#include "tile_config.h"

namespace eqx_flash {

struct ForwardArguments {
  CUtensorMap q, k, v, out;
  ForwardParams params;
  BlockOrder order;
};

template <typename Element, int kHeadDim, Mask kMask>
struct ForwardKernel {
  static constexpr ForwardTile kTile = forward_tile(kHeadDim, kMask);
  static constexpr int kBlockM = kTile.block_m();
  static constexpr int kBlockN = kTile.block_n;
  static constexpr int kConsumers = kTile.consumer_warpgroups;
  static constexpr int kConsumerWarps = 4 * kConsumers;
  static constexpr int kQBuffers = kTile.q_buffers;
  static constexpr bool kOwnOutput = kTile.own_output_buffer;
  static constexpr bool kRegisterQ = kTile.query_in_registers;
  static constexpr bool kTwoProducers = kTile.two_producers;
  static constexpr bool kOverlapTiles = kTile.overlap_tiles;
  // Equal tiles are dealt out in turn; causal ones, of unequal length, go to whoever is free.
  static constexpr bool kDynamicTiles = kMask == Mask::kCausal;
  // Probabilities far above 1 need bf16's range.
  static constexpr bool kLazy = std::is_same_v<Element, __nv_bfloat16>;
  // A warpgroup leaves out the last block of keys where only the rows of others see it: 1 to
  // 10 % at 512 keys, less above. As many rows as keys have none such.
  static constexpr bool kSkips = kMask == Mask::kCausal && kBlockM > kBlockN;
  static_assert(!kSkips || kBlockM - kWarpgroupRows <= kBlockN, "more than one block to skip");
  // Where Q's buffer is free early, Q is asked for before K: it comes from further away.
  static constexpr bool kQFirst = kRegisterQ || kQBuffers > 1;
  // The next tile is claimed when so many blocks of this one are still to be loaded: late, so that
  // the longest tiles find whoever is free, but early enough for what the claim and Q take.
  static constexpr int kClaimAhead = 4;

  using QSlab = sm90::SmemTile<kWarpgroupRows, kHeadDim>;  // one warpgroup's rows of Q, or of O
  using KeyTile = sm90::SmemTile<kBlockN, kHeadDim>;       // of K, or of V
  using KeyCursor = sm90::Cursor<kTile.k_stages>;
  using ValueCursor = sm90::Cursor<kTile.v_stages>;
  using QCursor = sm90::Cursor<kQBuffers>;
  using QRing = sm90::Ring<kQBuffers>;
  using SlotCursor = sm90::Cursor<2>;
  static constexpr uint32_t kQBytes = kConsumers * QSlab::kBytes;

  // Shared memory, from the first 1024-byte boundary on.
  struct Smem {
    sm90::Ring<kTile.k_stages> k;
    sm90::Ring<kTile.v_stages> v;
    QRing queries;         // of the first warpgroup; the others' follow, see q()
    sm90::Ring<2> tile;    // the scheduler works one tile ahead
    sm90::Barrier wanted;  // the next tile, by who loads this one
    uint32_t out;

    EQX_DEVICE explicit Smem(const void* dynamic) {
      const uint32_t base = (sm90::shared_address(dynamic) + 1023) & ~1023u;
      constexpr uint32_t kVOffset = kTile.k_stages * KeyTile::kBytes;
      constexpr uint32_t kQOffset = kVOffset + kTile.v_stages * KeyTile::kBytes;
      constexpr uint32_t kOutOffset = kQOffset + kQBuffers * kQBytes;
      constexpr uint32_t kBarriers = kOutOffset + (kOwnOutput ? kQBytes : 0);
      constexpr uint32_t kKeyBarriers = sm90::Ring<kTile.k_stages>::kBarrierBytes;
      constexpr uint32_t kValueBarriers = sm90::Ring<kTile.v_stages>::kBarrierBytes;
      constexpr uint32_t kQBarriers = kBarriers + kKeyBarriers + kValueBarriers;
      constexpr uint32_t kTileBarriers = kQBarriers + kConsumers * QRing::kBarrierBytes;
      constexpr uint32_t kTileSlots = kBarriers + 256;
      static_assert(kTileBarriers + sm90::Ring<2>::kBarrierBytes + sm90::Barrier::kBytes <=
                    kTileSlots);
      static_assert(kTileSlots + 2 * TileSlot::kBytes + 1024 <=
                    kTile.shared_memory_bytes(kHeadDim));
      k = {base, KeyTile::kBytes, base + kBarriers};
      v = {base + kVOffset, KeyTile::kBytes, base + kBarriers + kKeyBarriers};
      queries = {base + kQOffset, kQBytes, base + kQBarriers};
      tile = {base + kTileSlots, TileSlot::kBytes, base + kTileBarriers};
      out = base + kOutOffset;
      wanted = {tile.barriers + sm90::Ring<2>::kBarrierBytes};
    }

    // A warpgroup's own rows: each gets its next ones as soon as it is done with these.
    EQX_DEVICE QRing q(int warpgroup) const {
      return {queries.buffers + warpgroup * QSlab::kBytes, kQBytes,
              queries.barriers + warpgroup * QRing::kBarrierBytes};
    }
    EQX_DEVICE void init_barriers() const {
      k.init(kConsumerWarps);
      v.init(kConsumerWarps);
      for (int w = 0; w < kConsumers; ++w) q(w).init(kConsumerWarps / kConsumers);
      tile.init(kConsumerWarps + (kTwoProducers ? 2 : 1));
      wanted.init(1);
      sm90::fence_barrier_init();
    }
  };

  // ----------------------------------------------------------------------------------- producers

  // A block of K, or of V.
  template <int kStages>
  EQX_DEVICE static void load_keys(const CUtensorMap& map, const sm90::Ring<kStages>& ring,
                                   sm90::Cursor<kStages>& at, uint64_t policy, int n_block,
                                   int key_head, int batch) {
    ring.wait_empty(at);  // all consumers are done with the block this stage held
    ring.full(at.stage).arrive_and_expect(KeyTile::kBytes);
    for (int s = 0; s < KeyTile::kSlabs; ++s) {
      sm90::tma_load(map, ring.buffer(at.stage) + s * KeyTile::kSlabBytes,
                     ring.full(at.stage).address, policy,
                     {s * KeyTile::kSlabCols, n_block * kBlockN, key_head, batch});
    }
    at.advance();
  }

  // One thread: decides what this thread block works on, and tells the others.
  EQX_DEVICE static void schedule(const ForwardArguments& args, const Smem& smem) {
    deal_tiles<kDynamicTiles>(
        smem.tile, smem.wanted, args.params.tile_counter,
        [&](int tile) {
          return decode_tile<kMask, kBlockM, kBlockN>(args.order, args.params, tile);
        },
        [&](uint32_t slot, int, const WorkTile& work) {
          TileSlot{slot}.write(work);
          return work.valid;
        });
  }

  // Calls load(tile_index, extent, place) for each tile, by one thread.
  template <typename Load>
  EQX_DEVICE static void for_each_tile(const Smem& smem, Load&& load) {
    for (int tile_index = 0;; ++tile_index) {
      const auto slot_at = SlotCursor::after(tile_index);
      smem.tile.wait_full(slot_at);  // the tile has been decided on
      const TileSlot slot{smem.tile.buffer(slot_at.stage)};
      const TileSlot::Extent extent = slot.extent();
      const TileSlot::Place place = slot.place();
      smem.tile.empty(slot_at.stage).arrive();  // the slot may be overwritten
      if (extent.m_block < 0) break;
      load(tile_index, extent, place);
    }
  }

  // One thread: keeps the rings filled; that of V, if there is no other producer.
  EQX_DEVICE static void produce(const ForwardArguments& args, const Smem& smem) {
    const ForwardParams& params = args.params;
    const uint64_t keep = sm90::l2_policy<sm90::L2Policy::kEvictLast>();     // K, V: many readers
    const uint64_t stream = sm90::l2_policy<sm90::L2Policy::kEvictFirst>();  // Q: one reader
    const int heads_per_key_head = params.heads / params.heads_k;
    KeyCursor k_at;
    ValueCursor v_at;
    for_each_tile(
        smem, [&](int tile_index, const TileSlot::Extent& extent, const TileSlot::Place& place) {
          auto load_queries = [&] {
            const auto q_at = QCursor::after(tile_index);
            for (int w = 0; w < kConsumers; ++w) {
              const QRing q = smem.q(w);
              q.wait_empty(q_at);  // the warpgroup is done with the Q this buffer held
              q.full(q_at.stage).arrive_and_expect(QSlab::kBytes);
              for (int s = 0; s < QSlab::kSlabs; ++s) {
                sm90::tma_load(args.q, q.buffer(q_at.stage) + s * QSlab::kSlabBytes,
                               q.full(q_at.stage).address, stream,
                               {s * QSlab::kSlabCols, extent.m_block * kBlockM + w * kWarpgroupRows,
                                place.head, place.batch});
              }
            }
          };
          const int key_head = place.head / heads_per_key_head;
          const int last_block = extent.keys.count - 1;
          if constexpr (kQFirst) load_queries();
          load_keys(args.k, smem.k, k_at, keep, 0, key_head, place.batch);
          if constexpr (!kQFirst) load_queries();
#pragma unroll 1  // its registers are few
          for (int n_block = 0; n_block <= last_block; ++n_block) {
            if (kDynamicTiles && n_block == max(0, last_block - kClaimAhead)) {
              smem.wanted.arrive();
            }
            if (n_block < last_block)
              load_keys(args.k, smem.k, k_at, keep, n_block + 1, key_head, place.batch);
            if constexpr (!kTwoProducers) {
              load_keys(args.v, smem.v, v_at, keep, n_block, key_head, place.batch);
            }
          }
        });
  }

  // One thread of another warp: keeps the ring of V filled, whatever the first one waits for.
  EQX_DEVICE static void produce_values(const ForwardArguments& args, const Smem& smem) {
    const uint64_t keep = sm90::l2_policy<sm90::L2Policy::kEvictLast>();
    const int heads_per_key_head = args.params.heads / args.params.heads_k;
    ValueCursor at;
    for_each_tile(smem, [&](int, const TileSlot::Extent& extent, const TileSlot::Place& place) {
      const int key_head = place.head / heads_per_key_head;
#pragma unroll 1
      for (int n_block = 0; n_block < extent.keys.count; ++n_block) {
        load_keys(args.v, smem.v, at, keep, n_block, key_head, place.batch);
      }
    });
  }

  // ----------------------------------------------------------------------------------- consumers

  EQX_DEVICE static void consume(const ForwardArguments& args, const Smem& smem, int warpgroup) {
    const ForwardParams& params = args.params;
    const int thread = threadIdx.x % sm90::kWarpgroup;
    const bool elected = thread % sm90::kWarp == 0;  // arrives for its warp
    const int next_warpgroup = (warpgroup + 1) % kConsumers;
    const QRing my_q = smem.q(warpgroup);
    const sm90::Descriptor q_tile = QSlab::k_major(my_q.buffer(0));
    const sm90::Descriptor k_tile = KeyTile::k_major(smem.k.buffer(0));
    const sm90::Descriptor v_tile = KeyTile::mn_major(smem.v.buffer(0));

    float rS[kBlockN / 2];     // scores of one key block, then probabilities
    uint32_t rP[kBlockN / 4];  // the probabilities as 16-bit operand
    float rO[kHeadDim / 2];
    uint32_t rQ[kRegisterQ ? kHeadDim / 4 : 1];
    LazySoftmax<kBlockN> softmax(params.softmax_scale * 1.44269504f);
    KeyCursor k_at;
    ValueCursor v_at;
    // The tile being worked on.
    int tile_index = 0;
    TileSlot::Extent extent;
    int first_row, n_block, last_block;
    bool skips;            // the block of keys after that
    bool skipped = false;  // its K, and not yet its V

    // Taking turns is worth 9 % at head dim 64, and 2 to 4 at 128 without a mask. Elsewhere
    // warpgroups settle by themselves.
    auto wait_turn = [&] {  // until the previous warpgroup has issued its products
      sm90::named_barrier_sync(sm90::NamedBarrier::kTurn, warpgroup, 2 * sm90::kWarpgroup);
    };
    auto pass_turn = [&] {
      sm90::named_barrier_arrive(sm90::NamedBarrier::kTurn, next_warpgroup, 2 * sm90::kWarpgroup);
    };
    auto q_stage = [&] { return QCursor::after(tile_index).stage; };
    auto start_scores = [&] {  // S = Q K^T
      const sm90::Descriptor k = k_tile + k_at.stage * KeyTile::kBytes;
      sm90::wgmma_fence();
      if constexpr (kRegisterQ) {
        sm90::mma_registers_k_major<Element, KeyTile>(rS, rQ, k);
      } else {
        const sm90::Descriptor q = q_tile + q_stage() * kQBytes;
        sm90::mma_shared_k_major<Element, QSlab, KeyTile>(rS, q, k);
      }
      sm90::wgmma_commit();
    };
    auto start_output = [&] {  // O += P V
      sm90::pin(rO);
      sm90::wgmma_fence();
      sm90::mma_registers_mn_major<Element, KeyTile>(rO, rP, v_tile + v_at.stage * KeyTile::kBytes);
      sm90::wgmma_commit();
    };
    auto pack_probabilities = [&] {
#pragma unroll
      for (int i = 0; i < kBlockN / 4; ++i) rP[i] = sm90::pack<Element>(rS[2 * i], rS[2 * i + 1]);
    };

    auto rescale_output = [&] {
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) rO[i] *= softmax.rescale[(i / 2) % 2];
    };
    auto query_fragment = [&](uint32_t (&q)[4], int k, int reader) {
      if constexpr (kRegisterQ) {
#pragma unroll
        for (int i = 0; i < 4; ++i) q[i] = rQ[4 * k + i];
      } else {
        sm90::load_operand_step<QSlab>(q, my_q.buffer(q_stage()), reader, k);
      }
    };
    auto mask_scores = [&](int its_thread) {
      apply_mask<kMask, kBlockN>(rS, its_thread, first_row, n_block, params.seq_k, params.diagonal);
    };
    // Rare: this block has scores far above the reference.
    auto raise_reference = [&]<bool kMasked>() {
      if (softmax.any_row_above(
              softmax.kLargest)) {  // overflow: scores once more, while K is still there
        // This thread, which ptxas may not know: else addresses and the mask's predicates would
        // take registers of the main loop.
        const int reader = __shfl_sync(sm90::kAllLanes, thread, thread % sm90::kWarp);
        softmax.take_back();
        sm90::mma_warp_k_major<Element, KeyTile>(
            rS, smem.k.buffer(k_at.stage), reader,
            [&](uint32_t (&q)[4], int k) { query_fragment(q, k, reader); });
        if constexpr (kMasked) mask_scores(reader);
        softmax.template update_max<0>(rS);
        softmax.template update_max<1>(rS);
        softmax.template exponentiate<0>(rS);
        softmax.template exponentiate<1>(rS);
      } else {
        softmax.raise_reference();
#pragma unroll
        for (int i = 0; i < kBlockN / 2; ++i) rS[i] *= softmax.rescale[(i / 2) % 2];
      }
      rescale_output();
    };

    // ---- A tile's ends ----

    auto row_of = [&](int m_block) { return m_block * kBlockM + warpgroup * kWarpgroupRows; };
    auto slot_of = [&](int index) {
      return TileSlot{smem.tile.buffer(SlotCursor::after(index).stage)};
    };
    auto open_tile = [&] {                                 // false: there is none left
      smem.tile.wait_full(SlotCursor::after(tile_index));  // the tile has been decided on
      extent = slot_of(tile_index).extent().uniform();
      first_row = row_of(extent.m_block);
      n_block = 0;
      last_block = extent.keys.count - 1;
      skips = kSkips && last_block > 0 &&
              first_row + kWarpgroupRows + params.diagonal <= last_block * kBlockN;
      if (skips) --last_block;
      return extent.m_block >= 0;
    };
    auto open_next_tile = [&] {
      ++tile_index;
      return open_tile();
    };
    auto has_rows = [&] { return first_row < params.seq_q; };
    auto release_slot = [&](int index) {  // it may be overwritten
      __syncwarp();                       // every lane has read it
      smem.tile.empty(SlotCursor::after(index).stage).arrive_if(elected);
    };
    // The end of the queries may leave a warpgroup without rows: it only gives back what it gets.
    auto leave_out_tile = [&] {
      const auto q_at = QCursor::after(tile_index);
      my_q.wait_full(q_at);
      release_slot(tile_index);
      my_q.empty(q_at.stage).arrive_if(elected);  // at once: the next K may be asked for after it
#pragma unroll 1
      for (; n_block < extent.keys.count; ++n_block) {
        smem.k.wait_full(k_at);
        smem.v.wait_full(v_at);
        wait_turn();
        smem.k.empty(k_at.stage).arrive_if(elected);  // the producer may refill this K stage
        smem.v.empty(v_at.stage).arrive_if(elected);  // the producer may refill this V stage
        pass_turn();
        k_at.advance();
        v_at.advance();
      }
    };
    auto start_first_scores = [&] {
      const auto q_at = QCursor::after(tile_index);
      my_q.wait_full(q_at);  // Q has landed
      if constexpr (kRegisterQ) sm90::load_operand<QSlab>(rQ, my_q.buffer(q_at.stage), thread);
      smem.k.wait_full(k_at);  // the first K block has landed
      start_scores();
    };
    auto first_softmax = [&] {
      sm90::pin(rS);
      smem.k.empty(k_at.stage).arrive_if(elected);  // the producer may refill this K stage
      k_at.advance();
      if constexpr (kRegisterQ) {
        // The next Q may load. Not before S is done: ldmatrix is only known to have read what
        // wgmma has used, and nothing orders it before TMA's next write.
        my_q.empty(q_stage()).arrive_if(elected);
      }
      if (extent.keys.first_masked == 0) mask_scores(thread);
      softmax.start();
      softmax.template update_max<0>(rS);
      softmax.template exponentiate<0>(rS);
      softmax.template update_max<1>(rS);
      softmax.template exponentiate<1>(rS);
    };
    auto skip_keys = [&] {
      skipped = skips;
      if (!skips) return;
      smem.k.wait_full(k_at);  // the stage is no longer that of the block before it there
      smem.k.empty(k_at.stage).arrive_if(elected);  // the producer may refill this K stage
      k_at.advance();
      // The turn of the block that is left out. Whoever took it later would want the next tile's Q
      // and K one step before they are there: 1 to 5 % at head dim 64, up to 2 at 256.
      wait_turn();
      pass_turn();
    };
    auto skip_values = [&] {
      if (!skipped) return;
      smem.v.wait_full(v_at);
      smem.v.empty(v_at.stage).arrive_if(elected);  // the producer may refill this V stage
      v_at.advance();
    };
    auto release_values = [&] {  // O is done
      sm90::pin(rO);
      smem.v.empty(v_at.stage).arrive_if(elected);  // the producer may refill this V stage
      v_at.advance();
    };
    // In the middle of a softmax, which is pinned so that ptxas leaves the rest of it behind this.
    auto await_output = [&] {
      sm90::pin(rS);
      softmax.pin();
      smem.v.wait_full(v_at);  // passes at once: ptxas may not hoist the wait for O above it
      sm90::wgmma_wait<0>();   // O is done
      release_values();
    };
    auto clear_output = [&] {
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) rO[i] = 0.f;
    };
    struct Closing {
      TileSlot::Place place;
      float normaliser[2];
    };
    // What does not need O, beside the last product.
    auto close_rows = [&](int index) -> Closing {
      const TileSlot::Place place = slot_of(index).place();
      release_slot(index);
      softmax.finish();
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = row_of(place.m_block) + sm90::accumulator_row(thread) + 8 * r;
        if (thread % 4 == 0 && row < params.seq_q) {
          params.lse[int64_t{place.batch_head} * params.seq_q + row] =
              softmax.log_sum_exp(r, params.softmax_scale);
        }
      }
      return {place, {softmax.normaliser(0), softmax.normaliser(1)}};
    };
    auto write_output = [&](const Closing& closing) {
      const TileSlot::Place& place = closing.place;
      if constexpr (kOwnOutput) {
        auto sync_slab = [&] {
          sm90::named_barrier_sync(sm90::NamedBarrier::kEpilogue, warpgroup, sm90::kWarpgroup);
        };
        uint32_t slab = smem.out;
        asm volatile("" : "+r"(slab));  // else it would take a register of the main loop
        slab += warpgroup * QSlab::kBytes;
        if (thread == 0) sm90::tma_store_wait_read();  // the previous tile's O has left the slab
        sync_slab();
        write_output_slab<Element, QSlab>(slab, rO, closing.normaliser, thread);
        sync_slab();  // the slab is written
        if (thread == 0) {
          store_output_slab<QSlab>(args.out, slab, row_of(place.m_block), place.head, place.batch);
        }
        __syncwarp();  // else ptxas takes what follows for divergent
      } else {
        const int first = row_of(place.m_block);
        const int64_t row_stride = int64_t{params.heads} * params.head_dim;
        Element* out = static_cast<Element*>(params.out) + place.head * params.head_dim +
                       (int64_t{place.batch} * params.seq_q + first) * row_stride;
        store_output_rows<Element, kHeadDim>(out, row_stride, params.seq_q - first, params.head_dim,
                                             rO, closing.normaliser, thread);
      }
      clear_output();
    };

    // ---- The main loop ----

    // Step n: S(n) and O += P(n-1) V(n-1) go to the tensor cores together; softmax(n) runs beside
    // the second. Where the wait for O stands decides 10 % of the speed: between the two rows'
    // exp2 passes, so that conversions and the rescale of O fill the issue slots of the second.
    auto step = [&]<bool kMasked>() {
      ++n_block;
      smem.k.wait_full(k_at);  // K(n) has landed
      wait_turn();             // my turn on the tensor cores
      sm90::pin(rO);
      start_scores();
      smem.v.wait_full(v_at);  // V(n-1) has landed
      start_output();
      pass_turn();
      sm90::wgmma_wait<1>();  // S(n) is done, P V is still running
      sm90::pin(rS);
      if constexpr (kMasked) mask_scores(thread);
      if constexpr (kLazy) {
        softmax.template exponentiate_lazily<0>(rS);
      } else {
        smem.k.empty(k_at.stage).arrive_if(elected);  // the producer may refill this K stage
        k_at.advance();
        softmax.template update_max<0>(rS);
        softmax.template exponentiate<0>(rS);
        softmax.template update_max<1>(rS);
      }
      await_output();
      if constexpr (kLazy) {
        softmax.template exponentiate_lazily<1>(rS);
        if (softmax.any_row_above(softmax.kLimit)) [[unlikely]]
          raise_reference.template operator()<kMasked>();
        smem.k.empty(k_at.stage).arrive_if(elected);  // the producer may refill this K stage
        k_at.advance();
        pack_probabilities();
      } else {
        softmax.template exponentiate<1>(rS);
        pack_probabilities();
        rescale_output();
      }
    };
    auto take_steps = [&] {
      const int last_unmasked = min(last_block, extent.keys.first_masked - 1);
#pragma unroll 1
      while (n_block < last_unmasked) step.template operator()<false>();
#pragma unroll 1
      while (n_block < last_block) step.template operator()<true>();
    };

    if (warpgroup == kConsumers - 1) pass_turn();  // warpgroup 0 goes first
    clear_output();
    bool open = open_tile();
    while (open) {
      if (!has_rows()) {
        leave_out_tile();
        open = open_next_tile();
        continue;
      }
      start_first_scores();
      sm90::wgmma_wait<0>();  // S is done
      first_softmax();
      pack_probabilities();

      for (;;) {
        take_steps();
        if constexpr (!kRegisterQ) {
          my_q.empty(q_stage()).arrive_if(elected);  // all of S is done: the next Q may load
        }
        skip_keys();
        if constexpr (!kOverlapTiles) break;

        // The last product of this tile beside the first of the next one.
        open = open_next_tile();
        if (!open || !has_rows()) break;
        wait_turn();
        sm90::pin(rO);
        start_first_scores();
        smem.v.wait_full(v_at);  // the last V has landed
        start_output();
        pass_turn();
        const Closing closing = close_rows(tile_index - 1);
        sm90::wgmma_wait<1>();  // S is done, P V is still running
        first_softmax();
        await_output();
        write_output(closing);
        pack_probabilities();
        skip_values();
      }

      smem.v.wait_full(v_at);  // the last V has landed
      wait_turn();
      start_output();
      pass_turn();
      const Closing closing = close_rows(kOverlapTiles ? tile_index - 1 : tile_index);
      sm90::wgmma_wait<0>();  // the last O is done
      release_values();
      write_output(closing);
      skip_values();
      if constexpr (!kOverlapTiles) open = open_next_tile();
    }
    if (thread == 0) sm90::tma_store_wait_read();  // shared memory must outlive the last store
  }
};

template <typename Element, int kHeadDim, Mask kMask>
__global__ void __launch_bounds__(forward_tile(kHeadDim, kMask).threads(), 1)
    forward_kernel(const __grid_constant__ ForwardArguments args) {
  using Kernel = ForwardKernel<Element, kHeadDim, kMask>;
  extern __shared__ uint8_t dynamic_smem[];
  const typename Kernel::Smem smem(dynamic_smem);
  const int warpgroup = sm90::warp_uniform(threadIdx.x / sm90::kWarpgroup);
  if (threadIdx.x == 0) smem.init_barriers();
  __syncthreads();
  if (warpgroup == 0) {
    sm90::shrink_registers<Kernel::kTile.producer_registers>();
    if (threadIdx.x == 0) Kernel::schedule(args, smem);
    if (threadIdx.x == sm90::kWarp) Kernel::produce(args, smem);
    if (Kernel::kTwoProducers && threadIdx.x == 2 * sm90::kWarp) Kernel::produce_values(args, smem);
  } else {
    sm90::grow_registers<Kernel::kTile.consumer_registers>();
    Kernel::consume(args, smem, warpgroup - 1);
  }
}

}  // namespace eqx_flash
