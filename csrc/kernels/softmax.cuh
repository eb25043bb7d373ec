// SPDX-License-Identifier: Apache-2.0
// Online softmax of one warpgroup's 64 rows (FlashAttention-2, Dao 2023, section 3.1).
#pragma once

#include <cfloat>

#include "sm90/registers.cuh"

namespace eqx_flash {

// A thread holds two rows of a 64 x kCols accumulator; four neighbouring lanes share them.
// Each row is worked on by itself, so that its max and the scale stay in the operand-reuse caches
// and one row's max pass can fill the issue slots behind the other row's exp2.
template <int kCols>
struct OnlineSoftmax {
  float scale_log2;  // softmax scale * log2(e)
  float row_max[2];  // in units of raw scores
  float row_sum[2];  // of this thread's columns only, until finish()
  float rescale[2];  // what the last update multiplies the accumulated output with

  EQX_DEVICE explicit OnlineSoftmax(float scale_log2_) : scale_log2(scale_log2_) {
    // A vector register: from constant memory, FFMA could not reuse it as an operand.
    asm volatile("mov.b32 %0, %0;" : "+f"(scale_log2));
  }

  EQX_DEVICE void start() {
    // Finite, also times scale_log2, so that fully masked rows need no guard: their scores are
    // -inf, exp2 makes them 0, and -inf - -inf never occurs.
    const float lowest = -FLT_MAX / fmaxf(scale_log2, 1.f);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_max[r] = lowest;
      row_sum[r] = 0.f;
    }
  }

  // Raises the max of row r by a block of scores.
  template <int r>
  EQX_DEVICE void update_max(const float (&scores)[kCols / 2]) {
    float even = fmaxf(scores[2 * r], row_max[r]);
    float odd = scores[2 * r + 1];
#pragma unroll
    for (int j = 1; j < kCols / 8; ++j) {
      even = fmaxf(even, scores[4 * j + 2 * r]);
      odd = fmaxf(odd, scores[4 * j + 2 * r + 1]);
    }
    float new_max = fmaxf(even, odd);
    new_max = fmaxf(new_max, __shfl_xor_sync(sm90::kAllLanes, new_max, 1));
    new_max = fmaxf(new_max, __shfl_xor_sync(sm90::kAllLanes, new_max, 2));
    rescale[r] = sm90::exp2_approx((row_max[r] - new_max) * scale_log2);
    row_max[r] = new_max;
  }

  // Turns the scores of row r into probabilities relative to its max, and adds them up. The max has
  // moved since the last time, unless told otherwise.
  template <int r, bool kMoved = true>
  EQX_DEVICE void exponentiate(float (&scores)[kCols / 2]) {
    const float max_log2 = row_max[r] * scale_log2;
    if constexpr (kMoved) row_sum[r] *= rescale[r];
    float odd_sum = 0.f;
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j) {
      float& even = scores[4 * j + 2 * r];
      float& odd = scores[4 * j + 2 * r + 1];
      even = sm90::exp2_approx(fmaf(even, scale_log2, -max_log2));
      odd = sm90::exp2_approx(fmaf(odd, scale_log2, -max_log2));
      row_sum[r] += even;
      odd_sum += odd;
    }
    row_sum[r] += odd_sum;
  }

  EQX_DEVICE void pin() {
    sm90::pin(row_max);
    sm90::pin(row_sum);
    sm90::pin(rescale);
  }

  // Completes the sums over the four lanes of a row. A row that saw no key has the sum 0.
  EQX_DEVICE void finish() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_sum[r] += __shfl_xor_sync(sm90::kAllLanes, row_sum[r], 1);
      row_sum[r] += __shfl_xor_sync(sm90::kAllLanes, row_sum[r], 2);
    }
  }
  // What the accumulated output is multiplied with. NaN sums stay NaN.
  EQX_DEVICE float normaliser(int r) const { return row_sum[r] == 0.f ? 0.f : 1.f / row_sum[r]; }
  EQX_DEVICE float log_sum_exp(int r, float softmax_scale) const {
    return row_sum[r] == 0.f ? -INFINITY : row_max[r] * softmax_scale + __logf(row_sum[r]);
  }
};

}  // namespace eqx_flash
