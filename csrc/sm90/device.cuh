// SPDX-License-Identifier: Apache-2.0
// What every device header needs. wgmma demands that everything around it is inlined.
#pragma once

#include <cstdint>

#define EQX_DEVICE __device__ __forceinline__

namespace eqx_flash::sm90 {

inline constexpr int kWarp = 32;
inline constexpr int kWarpgroup = 128;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// Shared-memory addresses are 32-bit offsets into the shared window, as the instructions want them;
// generic pointers would cost a second register and a conversion at every use.
EQX_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same value on all lanes, in a form that ptxas can prove: role branches and tile data read
// from shared memory otherwise count as divergent, and every wgmma descriptor then goes through
// R2UR.
EQX_DEVICE int warp_uniform(int value) { return __shfl_sync(kAllLanes, value, 0); }

// Programmatic dependent launch (PTX ISA: "griddepcontrol"). Waits until the kernel before this one
// in the stream is done and its results are visible.
EQX_DEVICE void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// From here on in all blocks, the next kernel in the stream may start where there is room.
EQX_DEVICE void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Keeps values where the source has them: no instruction that touches them moves across.
template <int kCount>
EQX_DEVICE void pin(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

}  // namespace eqx_flash::sm90
