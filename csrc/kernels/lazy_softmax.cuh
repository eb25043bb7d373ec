// SPDX-License-Identifier: Apache-2.0
// Online softmax that does not look for the maximum of every block of scores.
#pragma once

#include <cfloat>

#include "kernels/softmax.cuh"
#include "sm90/registers.cuh"

namespace eqx_flash {

// Softmax is the same relative to any reference, and fp32 and bf16 are as precise at 2^30 as at 1.
// So the maximum of a row's first block serves the others too, until the sum of its exponentials
// passes a limit. What overflows fp32 in one block is computed anew; scores of 124 log2 above all
// before them do that, which no peaked distribution of trained models comes near.
template <int kCols>
struct LazySoftmax : OnlineSoftmax<kCols> {
  using Base = OnlineSoftmax<kCols>;
  using Base::rescale;
  using Base::row_max;
  using Base::row_sum;
  using Base::scale_log2;
  // Far above a million keys of the reference's size, far below what overflows.
  static constexpr float kLimit = 1 << 30;
  // Four lanes add up a row's sum.
  static constexpr float kLargest = FLT_MAX / 8;
  float previous_sum[2];

  using Base::Base;

  // Relative to the max as it is.
  template <int r>
  EQX_DEVICE void exponentiate_lazily(float (&scores)[kCols / 2]) {
    previous_sum[r] = row_sum[r];
    Base::template exponentiate<r, false>(scores);
  }

  // Whether a row of this warp has passed the limit. A NaN has not: nothing mends it, and the other
  // rows should not notice it.
  EQX_DEVICE bool any_row_above(float limit) const {
    return __any_sync(sm90::kAllLanes, fmaxf(row_sum[0], row_sum[1]) > limit);
  }

  // Moves the reference of rows above the limit to where their sum is 1. `rescale` is what the
  // probabilities of this block and the output are to be multiplied with.
  EQX_DEVICE void raise_reference() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = row_sum[r];
      sum += __shfl_xor_sync(sm90::kAllLanes, sum, 1);
      sum += __shfl_xor_sync(sm90::kAllLanes, sum, 2);
      const float raised = row_max[r] + (sum > kLimit ? __log2f(sum) / scale_log2 : 0.f);
      rescale[r] = sm90::exp2_approx((row_max[r] - raised) * scale_log2);
      row_max[r] = raised;
      row_sum[r] *= rescale[r];
    }
  }

  // Takes back this block, whose scores are to be given to `update_max` and `exponentiate`.
  EQX_DEVICE void take_back() {
#pragma unroll
    for (int r = 0; r < 2; ++r) row_sum[r] = previous_sum[r];
  }
};

}  // namespace eqx_flash
