// SPDX-License-Identifier: Apache-2.0
// mbarriers, rings of shared-memory stages, and named barriers.
// PTX ISA: "mbarrier", "bar / barrier".
#pragma once

#include "sm90/device.cuh"

namespace eqx_flash::sm90 {

// An mbarrier in shared memory. A phase completes when all arrivals and all expected bytes are in.
struct Barrier {
  static constexpr uint32_t kBytes = 8;
  uint32_t address;

  EQX_DEVICE void init(int arrivals) const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(arrivals));
  }

  // One arrival that also announces how many bytes TMA will deliver in this phase. TMA counts the
  // whole box, also where it lies outside the tensor and is filled with zeros.
  EQX_DEVICE void arrive_and_expect(uint32_t bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes)
                 : "memory");
  }

  EQX_DEVICE void arrive() const {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address) : "memory");
  }

  // The predicate lives inside the asm: a branch around it would cut the softmax into basic blocks.
  EQX_DEVICE void arrive_if(bool elected) const {
    asm volatile(
        "{.reg .pred P; setp.ne.b32 P, %1, 0; @P mbarrier.arrive.shared::cta.b64 _, [%0];}" ::"r"(
            address),
        "r"(static_cast<int>(elected))
        : "memory");
  }

  // Blocks until the phase with this parity has completed.
  EQX_DEVICE void wait(uint32_t parity) const {
    asm volatile(
        "{.reg .pred P;\n"
        "RETRY: mbarrier.try_wait.parity.shared::cta.b64 P, [%0], %1;\n"
        "@P bra DONE;\n"
        "bra RETRY;\n"
        "DONE: }" ::"r"(address),
        "r"(parity)
        : "memory");
  }
};

// Makes initialised barriers visible to the other threads and to TMA; a __syncthreads must follow.
EQX_DEVICE void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Where one side of a ring stands. The parity flips each time the stage index wraps.
template <int kStages>
struct Cursor {
  int stage = 0;
  uint32_t parity = 0;

  // After `steps` advances; for powers of two this costs less than keeping a cursor.
  EQX_DEVICE static Cursor after(int steps) {
    return {steps % kStages, static_cast<uint32_t>(steps / kStages) % 2};
  }

  EQX_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// kStages buffers between one producer and its consumers, each with a full and an empty barrier.
// Consumers wait for `full` with their cursor's parity; the producer waits for `empty` with the
// opposite one, so that its first round passes at once.
template <int kStages>
struct Ring {
  static constexpr uint32_t kBarrierBytes = 2 * kStages * Barrier::kBytes;
  uint32_t buffers;
  uint32_t stage_bytes;
  uint32_t barriers;

  EQX_DEVICE void init(int consumer_arrivals, int producer_arrivals = 1) const {
    for (int stage = 0; stage < kStages; ++stage) {
      full(stage).init(producer_arrivals);
      empty(stage).init(consumer_arrivals);
    }
  }
  EQX_DEVICE uint32_t buffer(int stage) const { return buffers + stage * stage_bytes; }
  EQX_DEVICE Barrier full(int stage) const { return {barriers + stage * Barrier::kBytes}; }
  EQX_DEVICE Barrier empty(int stage) const {
    return {barriers + (kStages + stage) * Barrier::kBytes};
  }
  EQX_DEVICE void wait_full(Cursor<kStages> at) const { full(at.stage).wait(at.parity); }
  EQX_DEVICE void wait_empty(Cursor<kStages> at) const { empty(at.stage).wait(at.parity ^ 1); }
};

// Hardware barriers of a block, by number. The numbers of a group of warpgroups follow each other.
enum class NamedBarrier : int {
  kBlock = 0,     // __syncthreads
  kTurn = 1,      // + consumer warpgroup: its turn on the tensor cores
  kEpilogue = 5,  // + consumer warpgroup: its four warps agree on the output slab
};

EQX_DEVICE void named_barrier_sync(NamedBarrier first, int offset, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(static_cast<int>(first) + offset), "r"(threads) : "memory");
}

EQX_DEVICE void named_barrier_arrive(NamedBarrier first, int offset, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(static_cast<int>(first) + offset), "r"(threads)
               : "memory");
}

}  // namespace eqx_flash::sm90
