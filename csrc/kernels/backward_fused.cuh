// SPDX-License-Identifier: Apache-2.0
// The fast backward kernel: dK, dV and dQ in one pass, five products a step instead of seven.
//
// A persistent thread block takes one block of keys after the other. Of its consumer warpgroups two
// hold 64 keys each and compute dK and dV; the third takes dS from them, computes dQ and adds it in
// fp32 to an accumulator in L2, straight from its registers, in whatever order the thread blocks
// get there. The next block's K, V and first queries load while this one's last steps run.
#pragma once

#include "kernels/backward_steps.cuh"
#include "kernels/dq_accumulator.cuh"

namespace eqx_flash {

template <typename Element, int kHeadDim, Mask kMask>
struct BackwardFusedKernel : BackwardKeys<Element, kHeadDim, kMask, backward_fused_tile(kHeadDim)> {
  using Base = BackwardKeys<Element, kHeadDim, kMask, backward_fused_tile(kHeadDim)>;
  using Block = typename Base::Block;
  using Consumer = typename Base::Consumer;
  using Cursor = typename Base::Cursor;
  using KeyCursor = typename Base::KeyCursor;
  using KeySlab = typename Base::KeySlab;
  using ScoreTile = typename Base::ScoreTile;
  using ScoreCursor = sm90::Cursor<Base::kTile.ds_stages>;
  using ScoreRing = sm90::Ring<Base::kTile.ds_stages>;
  using SlotCursor = sm90::Cursor<2>;
  static constexpr int kThreads = 4 * sm90::kWarpgroup;
  static constexpr int kConsumerWarps = 3 * sm90::kWarpgroup / sm90::kWarp;
  // ptxas gives wgmma's operands all but 32 of a thread's registers: 176 for S, dP, P, dS, dK and
  // dV, and V at head dim 64; 32 for dQ, of which therefore 64 columns are computed at once.
  static constexpr int kConsumerRegisters = 208;
  static constexpr int kDqRegisters = 64;
  static constexpr int kDqCols = 64;
  static constexpr int kProducerRegisters = 32;  // 24 would do for loads, but not for the scheduler
  static_assert(kProducerRegisters + 2 * kConsumerRegisters + kDqRegisters <=
                registers_at_start(kThreads));
  static_assert(!Base::kSplitOutputs && !Base::kRotates);
  // Equal blocks are dealt out in turn; causal ones, of unequal length, go to whoever is free.
  static constexpr bool kDynamicTiles = kMask == Mask::kCausal;
  // The next block is claimed when so many steps of this one are still to be loaded: late, so that
  // the longest ones find whoever is free.
  static constexpr int kClaimAhead = 4;

  // What the scheduler tells the others of a block of keys, through shared memory.
  struct Slot {
    static constexpr uint32_t kBytes = 32;
    uint32_t address;

    EQX_DEVICE void write(const Block& block, bool valid) const {
      sm90::store_shared_x4(address, valid ? block.n_block : -1, block.key_head, block.batch,
                            block.steps);
      sm90::store_shared_x4(address + 16, block.queries.first, block.queries.first_unmasked,
                            block.queries.end, 0);
    }
    EQX_DEVICE Block read() const {  // n_block is negative: there is none left
      const int4 where = sm90::load_shared_x4(address);
      const int4 queries = sm90::load_shared_x4(address + 16);
      return {where.x, where.y, where.z, {queries.x, queries.y, queries.z}, where.w};
    }
    EQX_DEVICE Block read_uniform() const {
      const Block block = read();
      return {
          sm90::warp_uniform(block.n_block),
          sm90::warp_uniform(block.key_head),
          sm90::warp_uniform(block.batch),
          {sm90::warp_uniform(block.queries.first),
           sm90::warp_uniform(block.queries.first_unmasked), sm90::warp_uniform(block.queries.end)},
          sm90::warp_uniform(block.steps)};
    }
  };

  struct Smem : Base::Smem {
    static constexpr uint32_t kMoreBarriers = Base::Smem::kMore;
    static constexpr uint32_t kSlots = kMoreBarriers + 96;
    static_assert(kSlots + 2 * Slot::kBytes <= kMoreBarriers + Base::Smem::kMoreBytes);
    ScoreRing ds;
    sm90::Ring<2> tile;       // the scheduler works one block ahead
    sm90::Barrier wanted;     // the next block, by who loads this one
    sm90::Barrier keys_read;  // dQ of a block is done with K

    EQX_DEVICE explicit Smem(const void* dynamic) : Base::Smem(dynamic) {
      const uint32_t base = this->base;
      static_assert(ScoreRing::kBarrierBytes + sm90::Ring<2>::kBarrierBytes +
                        2 * sm90::Barrier::kBytes <=
                    kSlots - kMoreBarriers);
      ds = {base + Base::Smem::kDs, ScoreTile::kBytes, base + kMoreBarriers};
      tile = {base + kSlots, Slot::kBytes, ds.barriers + ScoreRing::kBarrierBytes};
      wanted = {tile.barriers + sm90::Ring<2>::kBarrierBytes};
      keys_read = {wanted.address + sm90::Barrier::kBytes};
    }
    EQX_DEVICE void init_barriers() const {
      ds.init(sm90::kWarpgroup / sm90::kWarp, 2 * sm90::kWarpgroup);
      tile.init(kConsumerWarps + 2);  // and those of produce() and write_starts()
      wanted.init(1);
      keys_read.init(sm90::kWarpgroup);
      Base::Smem::init_barriers();
    }
  };

  // ----------------------------------------------------------------------------------- producers

  // One thread: decides what this thread block works on, and tells the others.
  EQX_DEVICE static void schedule(const BackwardKeysArguments& args, const Smem& smem) {
    if constexpr (kDynamicTiles) sm90::wait_for_previous_kernel();  // the counter is clear
    deal_tiles<kDynamicTiles>(
        smem.tile, smem.wanted, args.params.forward.tile_counter,
        [&](int tile) { return Base::block(args, tile); },
        [&](uint32_t slot, int tile, const Block& block) {
          const bool valid = tile < args.order.total;
          Slot{slot}.write(block, valid);
          return valid;
        });
  }

  // One thread: loads K and V of each block, and the queries that see them.
  EQX_DEVICE static void produce(const BackwardKeysArguments& args, const Smem& smem) {
    Cursor cursor;
    for (int tile_index = 0;; ++tile_index) {
      const auto slot_at = SlotCursor::after(tile_index);
      smem.tile.wait_full(slot_at);  // the block has been decided on
      const Block at = Slot{smem.tile.buffer(slot_at.stage)}.read();
      smem.tile.empty(slot_at.stage).arrive();  // the slot may be overwritten
      if (at.n_block < 0) break;
      Base::load_keys(args, smem, at, KeyCursor::after(tile_index));
      if (tile_index == 0) {
        sm90::wait_for_previous_kernel();  // dQ's accumulator is clear
        sm90::let_next_kernel_start();
      }
      const int claim = max(0, at.steps - kClaimAhead);
      if (kDynamicTiles && at.steps == 0) smem.wanted.arrive();
      Base::load_blocks(
          args, at, cursor,
          [&](int step) {
            if (kDynamicTiles && step == claim) smem.wanted.arrive();
          },
          Base::queries(args, smem), Base::douts(args, smem));
    }
  }

  // Calls work(tile_index, slot) for each block, by the threads of whole warps.
  template <typename Work>
  EQX_DEVICE static void for_each_block(const Smem& smem, Work&& work) {
    for (int tile_index = 0;; ++tile_index) {
      const auto slot_at = SlotCursor::after(tile_index);
      const Slot slot{smem.tile.buffer(slot_at.stage)};
      smem.tile.wait_full(slot_at);  // the block has been decided on
      if (sm90::warp_uniform(slot.read().n_block) < 0) break;
      work(tile_index, slot);
      __syncwarp();  // every lane has read the slot
      smem.tile.empty(slot_at.stage).arrive_if(threadIdx.x % sm90::kWarp == 0);
    }
  }

  // One warp: what the products of each step start from.
  EQX_DEVICE static void write_starts(const BackwardKeysArguments& args, const Smem& smem) {
    Cursor cursor;
    sm90::wait_for_previous_kernel();  // the statistics are there
    for_each_block(
        smem, [&](int, Slot slot) { Base::write_starts(args, smem, slot.read_uniform(), cursor); });
  }

  // --------------------------------------------------------------------------- dQ's warpgroup

  EQX_DEVICE static void accumulate_dq(const BackwardKeysArguments& args, const Smem& smem) {
    using Parts = DqParts<kHeadDim>;
    const ForwardParams& shape = args.params.forward;
    const int group = shape.heads / shape.heads_k;
    const int thread = threadIdx.x % sm90::kWarpgroup;
    const auto ds = ScoreTile::k_major(smem.origin + Base::Smem::kDs);
    const auto keys = KeySlab::mn_major(smem.origin + Base::Smem::kKeys);
    ScoreCursor cursor;
    for_each_block(smem, [&](int tile_index, Slot slot) {
      const Block at = slot.read_uniform();
      const auto key_at = KeyCursor::after(tile_index);
      const auto k = keys + key_at.stage * Base::Smem::kKeyStride;
      smem.keys.wait_full(key_at);  // K has landed
      for (int head = at.key_head * group; head < (at.key_head + 1) * group; ++head) {
        const int64_t batch_head = int64_t{at.batch} * shape.heads + head;
        float* to = args.params.dq_accumulator +
                    Parts::offset(batch_head, args.params.padded_seq_q, at.queries.first) +
                    thread * 4;
#pragma unroll 1
        for (int m_block = at.queries.first; m_block < at.queries.end; ++m_block) {
          smem.ds.wait_full(cursor);  // both warpgroups have stored their keys of dS
#pragma unroll
          for (int part = 0; part < kHeadDim / kDqCols; ++part) {
            float rdQ[kDqCols / 2];
            sm90::wgmma_fence();
#pragma unroll
            for (int i = 0; i < Base::kBlockN / 16; ++i) {  // dQ = dS K
              const int step = (i / 4) * KeySlab::kBytes + KeySlab::mn_major_step(i % 4) +
                               part * KeySlab::kSlabBytes;
              sm90::WgmmaAtom<Element, kDqCols, sm90::Major::kMN>::shared(
                  rdQ,
                  (ds + (cursor.stage * ScoreTile::kBytes + ScoreTile::k_major_step(i))).bits(),
                  (k + step).bits(), i > 0);
            }
            sm90::wgmma_commit();
            sm90::wgmma_wait<0>();
            sm90::pin(rdQ);
            if (part == kHeadDim / kDqCols - 1) {
              // The stage may take another dS.
              smem.ds.empty(cursor.stage).arrive_if(thread % sm90::kWarp == 0);
            }
#pragma unroll
            for (int i = 0; i < kDqCols / 8; ++i) {
              sm90::reduce_add_x4(to + i * 4 * sm90::kWarpgroup, rdQ + 4 * i);
            }
            to += Parts::kBlockM * kDqCols;
          }
          cursor.advance();
        }
      }
      smem.keys_read.arrive();  // K's buffer may take dK
    });
  }

  // ------------------------------------------------------------------- the warpgroups of the keys

  // Where dS goes.
  struct ToDq {
    static constexpr bool kWanted = true;
    const ScoreRing& ring;
    ScoreCursor cursor;

    EQX_DEVICE void store(const Consumer& me, const uint32_t (&rdS)[Base::kBlockM / 4]) {
      ring.wait_empty(cursor);  // dQ has read the dS before the last
      me.store_ds(ring.buffer(cursor.stage), rdS);
    }
    EQX_DEVICE void hand_over() {
      sm90::fence_async_proxy();
      ring.full(cursor.stage).arrive();  // dQ may have it
      cursor.advance();
    }
  };

  EQX_DEVICE static void consume(const BackwardKeysArguments& args, const Smem& smem,
                                 int warpgroup) {
    Consumer me(args, smem, warpgroup);
    BackwardSteps<Base, ToDq> steps(me, {smem.ds, {}});
    float rdK[kHeadDim / 2], rdV[kHeadDim / 2];
    for_each_block(smem, [&](int tile_index, Slot slot) {
      me.take(slot.read_uniform(), KeyCursor::after(tile_index));
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) rdK[i] = rdV[i] = 0.f;
      // Beside the first scores, and not at the end of the block before: its stores take a while.
      auto release_last_keys = [&] {
        if (tile_index == 0) return;
        if (me.thread == 0) {
          sm90::tma_store_wait_read();
          // The producer may refill this slab of K and V.
          smem.keys.empty(KeyCursor::after(tile_index - 1).stage).arrive();
        }
        __syncwarp();
      };
      steps.run(rdK, rdV, release_last_keys);
      me.at = slot.read_uniform();  // again: the loop has no registers for what it does not need
      me.store(args.dv, me.v(), rdV, 1.f, warpgroup);
      smem.keys_read.wait(tile_index % 2);  // dQ is done with K
      me.store(args.dk, me.k(), rdK, args.params.forward.softmax_scale, warpgroup);
    });
    if (me.thread == 0) sm90::tma_store_wait_read();  // shared memory must outlive the stores
  }
};

template <typename Element, int kHeadDim, Mask kMask>
__global__ void __launch_bounds__(BackwardFusedKernel<Element, kHeadDim, kMask>::kThreads, 1)
    backward_fused_kernel(const __grid_constant__ BackwardKeysArguments args) {
  using Kernel = BackwardFusedKernel<Element, kHeadDim, kMask>;
  extern __shared__ __align__(1024) uint8_t aligned_dynamic_smem[];
  const typename Kernel::Smem smem(aligned_dynamic_smem);
  const int warpgroup = sm90::warp_uniform(threadIdx.x / sm90::kWarpgroup);
  smem.init_ones();
  if (threadIdx.x == 0) smem.init_barriers();
  __syncthreads();
  if (warpgroup == 0) {
    sm90::shrink_registers<Kernel::kProducerRegisters>();
    if (threadIdx.x == 0) Kernel::schedule(args, smem);
    if (threadIdx.x == sm90::kWarp) Kernel::produce(args, smem);
    if (threadIdx.x / sm90::kWarp == 2) Kernel::write_starts(args, smem);
  } else if (warpgroup == 3) {
    sm90::shrink_registers<Kernel::kDqRegisters>();
    Kernel::accumulate_dq(args, smem);
  } else {
    sm90::grow_registers<Kernel::kConsumerRegisters>();
    Kernel::consume(args, smem, warpgroup - 1);
  }
}

}  // namespace eqx_flash
