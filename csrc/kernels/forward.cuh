// SPDX-License-Identifier: Apache-2.0
// The forward kernel: O = softmax(scale * Q K^T) V and the log-sum-exp of each row.
//
// One producer warpgroup loads tiles with TMA; each consumer warpgroup owns 64 query rows and keeps
// S, P and O in registers (FlashAttention-3, Shah et al. 2024, section 3). Two overlaps hide the
// softmax: warpgroups take turns on the tensor cores, and inside a warpgroup S of the next key
// block is in flight together with P V of the current one.
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
  // Equal tiles are dealt out in turn; causal ones, of unequal length, go to whoever is free.
  static constexpr bool kDynamicTiles = kMask == Mask::kCausal;
  // Probabilities far above 1 need bf16's range.
  static constexpr bool kLazy = std::is_same_v<Element, __nv_bfloat16>;
  // A warpgroup leaves out the last block of keys where only the rows of others see it: 1 to
  // 10 % at 512 keys, less above. As many rows as keys have none such.
  static constexpr bool kSkips = kMask == Mask::kCausal && kBlockM > kBlockN;
  static_assert(!kSkips || kBlockM - kWarpgroupRows <= kBlockN, "more than one block to skip");
  static_assert(kOwnOutput || kQBuffers == 1, "O leaves through Q's only buffer");
  static_assert(kOwnOutput || !kRegisterQ, "Q's buffer is released before O needs it");

  using QSlab = sm90::SmemTile<kWarpgroupRows, kHeadDim>;  // one warpgroup's rows of Q, or of O
  using KeyTile = sm90::SmemTile<kBlockN, kHeadDim>;       // of K, or of V
  using KeyCursor = sm90::Cursor<kTile.stages>;
  using QCursor = sm90::Cursor<kQBuffers>;
  using SlotCursor = sm90::Cursor<2>;
  static constexpr uint32_t kQBytes = kConsumers * QSlab::kBytes;

  // Shared memory, from the first 1024-byte boundary on.
  struct Smem {
    sm90::Ring<kTile.stages> k, v;
    sm90::Ring<kQBuffers> q;
    sm90::Ring<2> tile;  // the producer works one tile ahead
    uint32_t out;

    EQX_DEVICE explicit Smem(const void* dynamic) {
      const uint32_t base = (sm90::shared_address(dynamic) + 1023) & ~1023u;
      constexpr uint32_t kRingBytes = kTile.stages * KeyTile::kBytes;
      constexpr uint32_t kQOffset = 2 * kRingBytes;
      constexpr uint32_t kOutOffset = kOwnOutput ? kQOffset + kQBuffers * kQBytes : kQOffset;
      constexpr uint32_t kBarriers = kOutOffset + kQBytes;
      constexpr uint32_t kKeyBarriers = sm90::Ring<kTile.stages>::kBarrierBytes;
      constexpr uint32_t kQBarriers = kBarriers + 2 * kKeyBarriers;
      constexpr uint32_t kTileBarriers = kQBarriers + sm90::Ring<kQBuffers>::kBarrierBytes;
      constexpr uint32_t kTileSlots = kBarriers + 192;
      static_assert(kTileBarriers + sm90::Ring<2>::kBarrierBytes <= kTileSlots);
      static_assert(kTileSlots + 2 * TileSlot::kBytes + 1024 <=
                    kTile.shared_memory_bytes(kHeadDim));
      k = {base, KeyTile::kBytes, base + kBarriers};
      v = {base + kRingBytes, KeyTile::kBytes, base + kBarriers + kKeyBarriers};
      q = {base + kQOffset, kQBytes, base + kQBarriers};
      tile = {base + kTileSlots, TileSlot::kBytes, base + kTileBarriers};
      out = base + kOutOffset;
    }

    EQX_DEVICE void init_barriers() const {
      k.init(kConsumerWarps);
      v.init(kConsumerWarps);
      // O's store from Q's buffer is one thread's business; reads of Q are every warp's.
      q.init(kOwnOutput ? kConsumerWarps : kConsumers);
      tile.init(kConsumerWarps + (kTwoProducers ? 1 : 0));
      sm90::fence_barrier_init();
    }
  };

  // ----------------------------------------------------------------------------------- producers

  // A block of K, or of V.
  EQX_DEVICE static void load_keys(const CUtensorMap& map, const sm90::Ring<kTile.stages>& ring,
                                   KeyCursor& at, uint64_t policy, int n_block, int key_head,
                                   int batch) {
    ring.wait_empty(at);  // all consumers are done with the block this stage held
    ring.full(at.stage).arrive_and_expect(KeyTile::kBytes);
    for (int s = 0; s < KeyTile::kSlabs; ++s) {
      sm90::tma_load(map, ring.buffer(at.stage) + s * KeyTile::kSlabBytes,
                     ring.full(at.stage).address, policy,
                     {s * KeyTile::kSlabCols, n_block * kBlockN, key_head, batch});
    }
    at.advance();
  }

  // One thread: decodes tiles, hands them to the others, and keeps the rings filled; that of V, if
  // there is no other producer.
  EQX_DEVICE static void produce(const ForwardArguments& args, const Smem& smem) {
    const ForwardParams& params = args.params;
    const uint64_t keep = sm90::l2_policy<sm90::L2Policy::kEvictLast>();     // K, V: many readers
    const uint64_t stream = sm90::l2_policy<sm90::L2Policy::kEvictFirst>();  // Q: one reader
    const int heads_per_key_head = params.heads / params.heads_k;
    KeyCursor k_at, v_at;

    auto load_queries = [&](QCursor q_at, const WorkTile& work) {
      smem.q.wait_empty(q_at);  // Q has been read, and O stored if it leaves through this buffer
      smem.q.full(q_at.stage).arrive_and_expect(kQBytes);
      for (int w = 0; w < kConsumers; ++w) {
        for (int s = 0; s < QSlab::kSlabs; ++s) {
          sm90::tma_load(args.q,
                         smem.q.buffer(q_at.stage) + w * QSlab::kBytes + s * QSlab::kSlabBytes,
                         smem.q.full(q_at.stage).address, stream,
                         {s * QSlab::kSlabCols, work.m_block * kBlockM + w * kWarpgroupRows,
                          work.head, work.batch});
        }
      }
    };

    int tile = blockIdx.x;
    for (int tile_index = 0;; ++tile_index) {
      const auto slot_at = SlotCursor::after(tile_index);
      const WorkTile work = decode_tile<kMask, kBlockM, kBlockN>(args.order, params, tile);
      smem.tile.wait_empty(slot_at);  // the consumers have read the tile before the last
      TileSlot{smem.tile.buffer(slot_at.stage)}.write(work);
      smem.tile.full(slot_at.stage).arrive();
      if (!work.valid) break;
      // Fetched before the loads, so that the counter's latency hides behind them.
      tile = kDynamicTiles ? gridDim.x + atomicAdd(params.tile_counter, 1) : tile + gridDim.x;

      const int key_head = work.head / heads_per_key_head;
      int n_block = work.keys.count - 1;
      load_keys(args.k, smem.k, k_at, keep, n_block, key_head, work.batch);
      load_queries(QCursor::after(tile_index), work);
#pragma unroll 1  // its registers are few
      for (; n_block >= 0; --n_block) {
        if (n_block > 0) load_keys(args.k, smem.k, k_at, keep, n_block - 1, key_head, work.batch);
        if constexpr (!kTwoProducers) {
          load_keys(args.v, smem.v, v_at, keep, n_block, key_head, work.batch);
        }
      }
    }
  }

  // One thread of another warp: keeps the ring of V filled, whatever the first one waits for.
  EQX_DEVICE static void produce_values(const ForwardArguments& args, const Smem& smem) {
    const uint64_t keep = sm90::l2_policy<sm90::L2Policy::kEvictLast>();
    const int heads_per_key_head = args.params.heads / args.params.heads_k;
    KeyCursor at;
    for (int tile_index = 0;; ++tile_index) {
      const auto slot_at = SlotCursor::after(tile_index);
      smem.tile.wait_full(slot_at);  // the tile has been decoded
      const TileSlot slot{smem.tile.buffer(slot_at.stage)};
      const TileSlot::Extent extent = slot.extent();
      const TileSlot::Place place = slot.place();
      smem.tile.empty(slot_at.stage).arrive();  // the slot may be overwritten
      if (extent.m_block < 0) break;
      const int key_head = place.head / heads_per_key_head;
#pragma unroll 1
      for (int n_block = extent.keys.count - 1; n_block >= 0; --n_block) {
        load_keys(args.v, smem.v, at, keep, n_block, key_head, place.batch);
      }
    }
  }

  // ----------------------------------------------------------------------------------- consumers

  EQX_DEVICE static void consume(const ForwardArguments& args, const Smem& smem, int warpgroup) {
    const ForwardParams& params = args.params;
    const int thread = threadIdx.x % sm90::kWarpgroup;
    const bool elected = thread % sm90::kWarp == 0;  // arrives for its warp
    const int next_warpgroup = (warpgroup + 1) % kConsumers;
    const sm90::Descriptor q_tile = QSlab::k_major(smem.q.buffer(0) + warpgroup * QSlab::kBytes);
    const sm90::Descriptor k_tile = KeyTile::k_major(smem.k.buffer(0));
    const sm90::Descriptor v_tile = KeyTile::mn_major(smem.v.buffer(0));
    const uint32_t out_slab = smem.out + warpgroup * QSlab::kBytes;

    float rS[kBlockN / 2];     // scores of one key block, then probabilities
    uint32_t rP[kBlockN / 4];  // the probabilities as 16-bit operand
    float rO[kHeadDim / 2];
    uint32_t rQ[kRegisterQ ? kHeadDim / 4 : 1];
    LazySoftmax<kBlockN> softmax(params.softmax_scale * 1.44269504f);
    KeyCursor at;  // of K; V is one block behind

    // Taking turns is worth 9 % at head dim 64. At 128 and 256 warpgroups settle by themselves.
    auto wait_turn = [&] {  // until the previous warpgroup has issued its products
      sm90::named_barrier_sync(sm90::NamedBarrier::kTurn, warpgroup, 2 * sm90::kWarpgroup);
    };
    auto pass_turn = [&] {
      sm90::named_barrier_arrive(sm90::NamedBarrier::kTurn, next_warpgroup, 2 * sm90::kWarpgroup);
    };
    auto load_query_fragments = [&](QCursor q_at) {
      if constexpr (kRegisterQ) {
        const uint32_t slab = smem.q.buffer(q_at.stage) + warpgroup * QSlab::kBytes;
        sm90::load_operand<QSlab>(rQ, slab, thread);
      }
      smem.q.empty(q_at.stage).arrive_if(elected);  // the next tile's Q may load
    };
    auto start_scores = [&](int q_stage, int stage) {  // S = Q K^T
      const sm90::Descriptor k = k_tile + stage * KeyTile::kBytes;
      sm90::wgmma_fence();
      if constexpr (kRegisterQ) {
        sm90::mma_registers_k_major<Element, KeyTile>(rS, rQ, k);
      } else {
        const sm90::Descriptor q = q_tile + q_stage * kQBytes;
        sm90::mma_shared_k_major<Element, QSlab, KeyTile>(rS, q, k);
      }
      sm90::wgmma_commit();
    };
    auto start_output = [&](int stage) {  // O += P V
      sm90::pin(rO);
      sm90::wgmma_fence();
      sm90::mma_registers_mn_major<Element, KeyTile>(rO, rP, v_tile + stage * KeyTile::kBytes);
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
    auto query_fragment = [&](uint32_t (&q)[4], int q_stage, int k) {
      if constexpr (kRegisterQ) {
#pragma unroll
        for (int i = 0; i < 4; ++i) q[i] = rQ[4 * k + i];
      } else {
        const uint32_t slab = smem.q.buffer(q_stage) + warpgroup * QSlab::kBytes;
        sm90::load_operand_step<QSlab>(q, slab, thread, k);
      }
    };
    // Rare: this block has scores far above the reference.
    auto raise_reference = [&](int q_stage) {
      if (softmax.any_row_above(
              softmax.kLargest)) {  // overflow: scores once more, while K is still there
        softmax.take_back();
        sm90::mma_warp_k_major<Element, KeyTile>(
            rS, smem.k.buffer(at.stage), thread,
            [&](uint32_t (&q)[4], int k) { query_fragment(q, q_stage, k); });
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

    if (warpgroup == kConsumers - 1) pass_turn();  // warpgroup 0 goes first
    for (int tile_index = 0;; ++tile_index) {
      const auto slot_at = SlotCursor::after(tile_index);
      const auto q_at = QCursor::after(tile_index);
      smem.tile.wait_full(slot_at);  // the producer has decoded the tile
      const TileSlot slot{smem.tile.buffer(slot_at.stage)};
      const TileSlot::Extent extent = slot.extent().uniform();
      if (extent.m_block < 0) break;
      const int first_row = extent.m_block * kBlockM + warpgroup * kWarpgroupRows;
      int n_block = extent.keys.count - 1;
      auto mask_scores = [&] {
        if (n_block < extent.keys.first_masked) return;
        apply_mask<kMask, kBlockN>(rS, first_row + sm90::accumulator_row(thread), n_block,
                                   params.seq_k, params.diagonal);
      };
      const KeyCursor last_block = at;
      const bool skips = kSkips && n_block > 0 &&
                         first_row + kWarpgroupRows + params.diagonal <= n_block * kBlockN;
      if (skips) {             // its K
        smem.k.wait_full(at);  // the stage is no longer that of the block before it there
        smem.k.empty(at.stage).arrive_if(elected);  // the producer may refill this K stage
        at.advance();
        --n_block;
      }
      softmax.start();
#pragma unroll
      for (float& o : rO) o = 0.f;
      smem.q.wait_full(q_at);  // Q has landed
      if constexpr (kRegisterQ) load_query_fragments(q_at);
      smem.k.wait_full(at);  // the last K block has landed
      start_scores(q_at.stage, at.stage);
      sm90::wgmma_wait<0>();
      sm90::pin(rS);
      smem.k.empty(at.stage).arrive_if(elected);  // the producer may refill this K stage
      mask_scores();
      softmax.template update_max<0>(rS);
      softmax.template exponentiate<0>(rS);
      softmax.template update_max<1>(rS);
      softmax.template exponentiate<1>(rS);
      pack_probabilities();
      if (skips) {  // its V, and its turn
        smem.v.wait_full(last_block);
        smem.v.empty(last_block.stage).arrive_if(elected);  // the producer may refill this V stage
        wait_turn();
        pass_turn();
      }

      // Step n: S(n) and O += P(n+1) V(n+1) go to the tensor cores together; softmax(n) runs beside
      // the second. Where the wait for O stands decides 10 % of the speed: between the two rows'
      // exp2 passes, so that conversions and the rescale of O fill the issue slots of the second.
      auto step = [&]<bool kLazily>() {
        --n_block;
        const KeyCursor v_at = at;
        at.advance();
        smem.k.wait_full(at);  // K(n) has landed
        wait_turn();           // my turn on the tensor cores
        sm90::pin(rO);
        start_scores(q_at.stage, at.stage);
        smem.v.wait_full(v_at);  // V(n+1) has landed
        start_output(v_at.stage);
        pass_turn();
        sm90::wgmma_wait<1>();  // S(n) is done, P V is still running
        sm90::pin(rS);
        if constexpr (kLazily) {
          softmax.template exponentiate_lazily<0>(rS);
        } else {
          smem.k.empty(at.stage).arrive_if(elected);  // the producer may refill this K stage
          mask_scores();
          softmax.template update_max<0>(rS);
          softmax.template exponentiate<0>(rS);
          softmax.template update_max<1>(rS);
        }
        sm90::pin(rS);
        softmax.pin();
        smem.v.wait_full(v_at);  // passes at once: ptxas may not hoist the wait for O above it
        sm90::wgmma_wait<0>();   // O is done
        sm90::pin(rO);
        smem.v.empty(v_at.stage).arrive_if(elected);  // the producer may refill this V stage
        if constexpr (kLazily) {
          softmax.template exponentiate_lazily<1>(rS);
          if (softmax.any_row_above(softmax.kLimit)) [[unlikely]]
            raise_reference(q_at.stage);
          smem.k.empty(at.stage).arrive_if(elected);  // the producer may refill this K stage
          pack_probabilities();
        } else {
          softmax.template exponentiate<1>(rS);
          pack_probabilities();
          rescale_output();
        }
      };
      if constexpr (kLazy) {
        // Rows that see nothing of the masked blocks have their first maximum from the next one.
#pragma unroll 1
        while (n_block > 0 && n_block >= extent.keys.first_masked)
          step.template operator()<false>();
#pragma unroll 1
        while (n_block > 0) step.template operator()<true>();
      } else {
#pragma unroll 1
        while (n_block > 0) step.template operator()<false>();
      }

      const KeyCursor v_at = at;
      at.advance();
      smem.v.wait_full(v_at);  // V(0) has landed
      if constexpr (kOwnOutput && !kRegisterQ) {
        smem.q.empty(q_at.stage).arrive_if(elected);  // all of S is done: the next Q may load
      }
      wait_turn();
      start_output(v_at.stage);
      pass_turn();

      // Epilogue; what does not need O runs beside the last product.
      const TileSlot::Place place = slot.place();
      __syncwarp();                                       // every lane has read the slot
      smem.tile.empty(slot_at.stage).arrive_if(elected);  // the slot may be overwritten
      softmax.finish();
      const float normaliser[2] = {softmax.normaliser(0), softmax.normaliser(1)};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = first_row + sm90::accumulator_row(thread) + 8 * r;
        if (thread % 4 == 0 && row < params.seq_q) {
          params.lse[int64_t{place.batch_head} * params.seq_q + row] =
              softmax.log_sum_exp(r, params.softmax_scale);
        }
      }
      auto sync_slab = [&] {
        sm90::named_barrier_sync(sm90::NamedBarrier::kEpilogue, warpgroup, sm90::kWarpgroup);
      };
      if constexpr (kOwnOutput) {
        if (thread == 0) sm90::tma_store_wait_read();  // the previous tile's O has left the slab
        sync_slab();
      }
      sm90::wgmma_wait<0>();  // O is done
      sm90::pin(rO);
      smem.v.empty(v_at.stage).arrive_if(elected);  // the producer may refill this V stage
      write_output_slab<Element, QSlab>(out_slab, rO, normaliser, thread);
      sync_slab();  // the slab is written
      if (thread == 0) {
        store_output_slab<QSlab>(args.out, out_slab, first_row, place.head, place.batch);
        if constexpr (!kOwnOutput) {
          sm90::tma_store_wait_read();
          smem.q.empty(q_at.stage).arrive();  // O has left Q's buffer: the next Q may load
        }
      }
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
    if (threadIdx.x == 0) Kernel::produce(args, smem);
    if (Kernel::kTwoProducers && threadIdx.x == sm90::kWarp) Kernel::produce_values(args, smem);
  } else {
    sm90::grow_registers<Kernel::kTile.consumer_registers>();
    Kernel::consume(args, smem, warpgroup - 1);
  }
}

}  // namespace eqx_flash
