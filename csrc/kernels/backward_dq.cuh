// SPDX-License-Identifier: Apache-2.0
// The backward kernel of dQ: a block of queries stays, keys pass by (FlashAttention-2, Dao 2023,
// section 3.1.2). P is recomputed from the log-sum-exp, so there is no running maximum.
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

struct BackwardDqArguments {
  CUtensorMap q, dout, k, v, dq;
  BackwardParams params;
  BlockOrder order;
};

template <typename Element, int kHeadDim, Mask kMask>
struct BackwardDqKernel {
  static constexpr BackwardTile kTile = backward_dq_tile(kHeadDim);
  static constexpr int kBlockM = kTile.block_m;
  static constexpr int kBlockN = kTile.block_n;
  // Without a mask the blocks of queries that run side by side would read the same keys at the same
  // moments, unless each begins at another one: up to 6 % at head dims 128 and 256.
  static constexpr bool kRotates = kMask == Mask::kFull;
  static constexpr int kConsumers = kBlockM / kWarpgroupRows;
  static constexpr int kConsumerWarps = 4 * kConsumers;
  using QSlab = sm90::SmemTile<kWarpgroupRows, kHeadDim>;  // one warpgroup's rows of Q, dO, or dQ
  using KeyTile = sm90::SmemTile<kBlockN, kHeadDim>;       // of K, or of V
  using KCursor = sm90::Cursor<kTile.k_stages>;
  using VCursor = sm90::Cursor<kTile.v_stages>;

  struct Smem {
    static constexpr uint32_t kQueryBytes = kConsumers * QSlab::kBytes;
    static constexpr uint32_t kDout = kQueryBytes;
    static constexpr uint32_t kK = kDout + kQueryBytes;
    static constexpr uint32_t kV = kK + kTile.k_stages * KeyTile::kBytes;
    static constexpr uint32_t kBarriers = kV + kTile.v_stages * KeyTile::kBytes;
    static constexpr int kBytes = kBarriers + 128 + 1024;  // barriers, alignment
    static_assert(kBytes <= kMaxSharedMemory);
    uint32_t q, dout;
    sm90::Ring<kTile.k_stages> k;
    sm90::Ring<kTile.v_stages> v;
    sm90::Barrier queries_full;

    EQX_DEVICE explicit Smem(const void* dynamic) {
      const uint32_t base = (sm90::shared_address(dynamic) + 1023) & ~1023u;
      q = base;
      dout = base + kDout;
      k = {base + kK, KeyTile::kBytes, base + kBarriers};
      v = {base + kV, KeyTile::kBytes, k.barriers + sm90::Ring<kTile.k_stages>::kBarrierBytes};
      queries_full = {v.barriers + sm90::Ring<kTile.v_stages>::kBarrierBytes};
    }
    EQX_DEVICE void init_barriers() const {
      k.init(kConsumerWarps);
      v.init(kConsumerWarps);
      queries_full.init(1);
      sm90::fence_barrier_init();
    }
  };

  struct Block {
    int m_block;
    int batch_head;
    int head;
    int batch;
    KeyBlocks keys;

    // Steps count down.
    EQX_DEVICE int n_block(int step) const {
      return kRotates ? (step + m_block) % keys.count : step;
    }
  };
  EQX_DEVICE static Block block(const BackwardDqArguments& args) {
    const ForwardParams& shape = args.params.forward;
    const RankedHead place = args.order.place(blockIdx.x);
    Block block;
    block.m_block = kMask == Mask::kCausal ? args.order.blocks - 1 - place.rank : place.rank;
    block.batch_head = place.batch_head;
    block.batch = place.batch_head / shape.heads;
    block.head = place.batch_head - block.batch * shape.heads;
    block.keys = key_blocks<kMask, kBlockM, kBlockN>(block.m_block, shape.seq_k, shape.diagonal);
    return block;
  }

  EQX_DEVICE static void produce(const BackwardDqArguments& args, const Smem& smem) {
    const ForwardParams& shape = args.params.forward;
    const Block at = block(args);
    const int key_head = at.head / (shape.heads / shape.heads_k);
    const uint64_t keep = sm90::l2_policy<sm90::L2Policy::kEvictLast>();
    const uint64_t stream = sm90::l2_policy<sm90::L2Policy::kEvictFirst>();
    auto load_queries = [&](const CUtensorMap& map, uint32_t destination) {
      for (int w = 0; w < kConsumers; ++w) {
        for (int s = 0; s < QSlab::kSlabs; ++s) {
          sm90::tma_load(
              map, destination + w * QSlab::kBytes + s * QSlab::kSlabBytes,
              smem.queries_full.address, stream,
              {s * QSlab::kSlabCols, at.m_block * kBlockM + w * kWarpgroupRows, at.head, at.batch});
        }
      }
    };
    auto load_keys = [&](const CUtensorMap& map, const auto& ring, auto& cursor, int n_block) {
      ring.wait_empty(cursor);  // all consumers are done with the block this stage held
      ring.full(cursor.stage).arrive_and_expect(KeyTile::kBytes);
      for (int s = 0; s < KeyTile::kSlabs; ++s) {
        sm90::tma_load(map, ring.buffer(cursor.stage) + s * KeyTile::kSlabBytes,
                       ring.full(cursor.stage).address, keep,
                       {s * KeyTile::kSlabCols, n_block * kBlockN, key_head, at.batch});
      }
      cursor.advance();
    };

    smem.queries_full.arrive_and_expect(2 * Smem::kQueryBytes);
    load_queries(args.q, smem.q);
    load_queries(args.dout, smem.dout);
    KCursor k_at;
    VCursor v_at;
#pragma unroll 1
    for (int step = at.keys.count - 1; step >= 0; --step) {
      const int n_block = at.n_block(step);
      load_keys(args.k, smem.k, k_at, n_block);
      load_keys(args.v, smem.v, v_at, n_block);
    }
    // Nothing here needs the kernel of dK and dV, but who waits for this one waits for both.
    if (blockIdx.x == gridDim.x - 1) sm90::wait_for_previous_kernel();
  }

  EQX_DEVICE static void consume(const BackwardDqArguments& args, const Smem& smem, int warpgroup) {
    const ForwardParams& shape = args.params.forward;
    const int thread = threadIdx.x % sm90::kWarpgroup;
    const bool elected = thread % sm90::kWarp == 0;  // arrives for its warp
    const Block at = block(args);
    const int first_row = sm90::warp_uniform(at.m_block) * kBlockM + warpgroup * kWarpgroupRows;
    const int count = sm90::warp_uniform(at.keys.count);
    const int first_masked = sm90::warp_uniform(at.keys.first_masked);
    const uint32_t q_slab = smem.q + warpgroup * QSlab::kBytes;
    const sm90::Descriptor q_tile = QSlab::k_major(q_slab);
    const sm90::Descriptor dout_tile = QSlab::k_major(smem.dout + warpgroup * QSlab::kBytes);
    const sm90::Descriptor k_tile = KeyTile::k_major(smem.k.buffer(0));
    const sm90::Descriptor k_columns = KeyTile::mn_major(smem.k.buffer(0));
    const sm90::Descriptor v_tile = KeyTile::k_major(smem.v.buffer(0));
    float scale_log2 = shape.softmax_scale * 1.44269504f;
    asm volatile("mov.b32 %0, %0;" : "+f"(scale_log2));  // a vector register: operand reuse

    float lse_log2[2], dlse_minus_delta[2];  // of this thread's two rows
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t row = int64_t{at.batch_head} * args.params.padded_seq_q + first_row +
                          sm90::accumulator_row(thread) + 8 * r;
      // Not through L1, which may be older than the kernel that wrote them.
      lse_log2[r] = __ldcg(args.params.lse_log2 + row);
      dlse_minus_delta[r] = __ldcg(args.params.dlse_minus_delta + row);
    }

    float rS[kBlockN / 2];  // scores, then probabilities
    float rdP[kBlockN / 2];
    uint32_t rdS[kBlockN / 4];
    float rdQ[kHeadDim / 2];
#pragma unroll
    for (float& x : rdQ) x = 0.f;
    KCursor k_at;
    VCursor v_at;

    auto start_scores = [&] {  // S = Q K^T
      smem.k.wait_full(k_at);  // K(n) has landed
      sm90::wgmma_fence();
      sm90::mma_shared_k_major<Element, QSlab, KeyTile>(rS, q_tile,
                                                        k_tile + k_at.stage * KeyTile::kBytes);
      sm90::wgmma_commit();
    };
    auto start_dp = [&] {  // dP - delta + dlse = dO V^T + (dlse - delta)
#pragma unroll
      for (int i = 0; i < kBlockN / 2; ++i) rdP[i] = dlse_minus_delta[(i / 2) % 2];
      smem.v.wait_full(v_at);  // V(n) has landed
      sm90::pin(rdP);
      sm90::wgmma_fence();
      sm90::mma_shared_k_major<Element, QSlab, KeyTile, true>(
          rdP, dout_tile, v_tile + v_at.stage * KeyTile::kBytes);
      sm90::wgmma_commit();
    };
    auto start_dq = [&](KCursor at) {  // dQ += dS K
      sm90::pin(rdQ);
      sm90::wgmma_fence();
      sm90::mma_registers_mn_major<Element, KeyTile>(rdQ, rdS,
                                                     k_columns + at.stage * KeyTile::kBytes);
      sm90::wgmma_commit();
    };
    auto probabilities = [&](int n_block) {  // P = exp2(S * scale - lse)
      sm90::pin(rS);
      if (n_block >= first_masked) {
        apply_mask<kMask, kBlockN>(rS, thread, first_row, n_block, shape.seq_k, shape.diagonal);
      }
#pragma unroll
      for (int i = 0; i < kBlockN / 2; ++i) {
        rS[i] = sm90::exp2_approx(fmaf(rS[i], scale_log2, -lse_log2[(i / 2) % 2]));
      }
    };
    auto finish_ds = [&] {  // dS = P * (dP - delta + dlse)
      sm90::pin(rdP);
      smem.v.empty(v_at.stage).arrive_if(elected);  // the producer may refill this V stage
      v_at.advance();
#pragma unroll
      for (int i = 0; i < kBlockN / 4; ++i) {
        rdS[i] = sm90::pack<Element>(rS[2 * i] * rdP[2 * i], rS[2 * i + 1] * rdP[2 * i + 1]);
      }
    };

    smem.queries_full.wait(0);  // Q and dO have landed
    int step = count - 1;
    int n_block = at.n_block(step);
    start_scores();
    start_dp();
    sm90::wgmma_wait<1>();  // S
    probabilities(n_block);
    sm90::wgmma_wait<0>();  // dP
    finish_ds();
    // Step n: S(n), then dQ += dS(n+1) K(n+1), then dP(n) run on the tensor cores one after the
    // other; the exponentials of step n hide behind the last two.
#pragma unroll 1
    while (step > 0) {
      --step;
      n_block = kRotates ? (n_block == 0 ? count - 1 : n_block - 1) : step;
      const KCursor previous = k_at;
      k_at.advance();
      start_scores();
      start_dq(previous);
      start_dp();
      sm90::wgmma_wait<2>();  // S(n)
      probabilities(n_block);
      sm90::wgmma_wait<1>();  // dQ
      sm90::pin(rdQ);
      smem.k.empty(previous.stage).arrive_if(elected);  // the producer may refill this K stage
      sm90::wgmma_wait<0>();                            // dP(n)
      finish_ds();
    }
    start_dq(k_at);
    sm90::wgmma_wait<0>();
    sm90::pin(rdQ);

    // dQ leaves through the slab of Q, which only this warpgroup reads.
    const float scale[2] = {shape.softmax_scale, shape.softmax_scale};
    write_output_slab<Element, QSlab>(q_slab, rdQ, scale, thread);
    sm90::named_barrier_sync(sm90::NamedBarrier::kEpilogue, warpgroup, sm90::kWarpgroup);
    if (thread == 0) {
      store_output_slab<QSlab>(args.dq, q_slab, first_row, at.head, at.batch);
      sm90::tma_store_wait_read();  // shared memory must outlive the store
    }
  }
};

template <typename Element, int kHeadDim, Mask kMask>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    backward_dq_kernel(const __grid_constant__ BackwardDqArguments args) {
  using Kernel = BackwardDqKernel<Element, kHeadDim, kMask>;
  extern __shared__ uint8_t dynamic_smem[];
  const typename Kernel::Smem smem(dynamic_smem);
  const int warpgroup = sm90::warp_uniform(threadIdx.x / sm90::kWarpgroup);
  if (threadIdx.x == 0) smem.init_barriers();
  __syncthreads();
  if (warpgroup == 0) {
    sm90::shrink_registers<kBackwardProducerRegisters>();
    if (threadIdx.x == 0) Kernel::produce(args, smem);
  } else {
    sm90::grow_registers<kBackwardConsumerRegisters>();
    Kernel::consume(args, smem, warpgroup - 1);
  }
}

}  // namespace eqx_flash
