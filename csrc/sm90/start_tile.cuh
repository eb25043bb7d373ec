// SPDX-License-Identifier: Apache-2.0
// What the columns of an accumulator start from, as one more step of a wgmma product.
//
// A float that belongs to a column of a product's result would have to reach every lane, through
// shared memory, and be added to every element. The tensor cores do both on the way: a float is the
// sum of three bf16, so it takes three columns of B, where A has ones.
#pragma once

#include <cuda_bf16.h>

#include "sm90/device.cuh"
#include "sm90/registers.cuh"
#include "sm90/smem_tile.cuh"

namespace eqx_flash::sm90 {

enum class Start { kFirst, kSecond };

// B [kRows, 16], K-major, no swizzle: two floats for each of its rows. The ones of A choose one.
template <int kRows>
struct StartTile {
  static constexpr int kRowBytes = 16;
  static constexpr int kGroupBytes = 8 * kRowBytes;  // a core matrix, 8 x 8
  static constexpr int kBytes = kRows * kRowBytes;
  static constexpr int kOnesThreads = 24;
  static constexpr int kOnesBytes = kOnesThreads * kRowBytes;
  static constexpr float kMost = 3e38f;  // about what a bf16 holds

  // Each is added, as 0, also where the other is chosen, so neither may be NaN or infinite in the
  // tile: beyond kMost `first` becomes kMost, and `second` three times that, whose sum is infinite.
  // A fence_async_proxy must follow.
  EQX_DEVICE static void write(uint32_t tile, int row, float first, float second) {
    const Parts a = split(first < -kMost ? -kMost : first > kMost ? kMost : first);
    Parts b = split(second);
    if (!(fabsf(second) <= kMost)) {
      const float third = copysignf(kMost, second);
      b = {pack<__nv_bfloat16>(third, third), pack<__nv_bfloat16>(third, 0.f)};
    }
    store_shared_x4(tile + row * kRowBytes, a.high_middle, a.low_zero, b.high_middle, b.low_zero);
  }
  // Three core matrices of A: ones that choose the first float, nothing, the second.
  EQX_DEVICE static void write_ones(uint32_t ones, int thread) {
    const uint32_t two = pack<__nv_bfloat16>(1.f, 1.f), one = pack<__nv_bfloat16>(1.f, 0.f);
    const bool first = thread < 8, second = thread >= 16;
    store_shared_x4(ones + thread * kRowBytes, first ? two : 0, first ? one : 0, second ? two : 0,
                    second ? one : 0);
  }

  // Columns 8 to 15 are columns 0 to 7 again.
  EQX_DEVICE static uint64_t operand(Descriptor tile) { return bits(tile, 0, kGroupBytes); }
  // All rows are the same. One half of the columns has the ones, the other has nothing.
  template <Start kStart>
  EQX_DEVICE static uint64_t choice(Descriptor ones) {
    return bits(ones + (kStart == Start::kFirst ? 0 : kGroupBytes), kGroupBytes, 0);
  }

 private:
  struct Parts {
    uint32_t high_middle, low_zero;
  };
  EQX_DEVICE static Parts split(float x) {
    const float high = __bfloat162float(__float2bfloat16(x));
    const float middle = __bfloat162float(__float2bfloat16(x - high));
    return {pack<__nv_bfloat16>(high, middle), pack<__nv_bfloat16>(x - high - middle, 0.f)};
  }
  // A matrix descriptor: bytes between core matrices along k, and along the rows.
  EQX_DEVICE static uint64_t bits(Descriptor at, uint32_t along_k, uint32_t along_rows) {
    uint64_t descriptor;
    asm("mov.b64 %0, {%1, %2};"
        : "=l"(descriptor)
        : "r"(at.low + ((along_k >> 4) << 16)), "r"(along_rows >> 4));
    return descriptor;
  }
};

}  // namespace eqx_flash::sm90
