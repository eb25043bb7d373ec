// SPDX-License-Identifier: Apache-2.0
// Launch of the forward kernel.
#pragma once

#include <algorithm>

#include "dispatch.h"
#include "kernels/forward.cuh"
#include "launch.cuh"

namespace eqx_flash {

template <typename Element, int kHeadDim, Mask kMask>
cudaError_t run_forward(const ForwardParams& params, cudaStream_t stream) {
  using Kernel = ForwardKernel<Element, kHeadDim, kMask>;
  constexpr auto* kKernel = &forward_kernel<Element, kHeadDim, kMask>;
  constexpr int kSharedMemory = Kernel::kTile.shared_memory_bytes(kHeadDim);

  ForwardArguments args{.params = params, .order = make_forward_order(params, Kernel::kBlockM)};
  TensorMapEncoder<Element> encode;
  encode(&args.q, params.q, query_shape(params), kWarpgroupRows);
  encode(&args.k, params.k, key_shape(params), Kernel::kBlockN);
  encode(&args.v, params.v, key_shape(params), Kernel::kBlockN);
  encode(&args.out, params.out, query_shape(params), kWarpgroupRows);
  if (encode.error != cudaSuccess) return encode.error;

  DeviceInfo device;
  cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  error = allow_shared_memory<kKernel>(device.ordinal, kSharedMemory);
  if (error != cudaSuccess) return error;
  if constexpr (Kernel::kDynamicTiles) {
    error = cudaMemsetAsync(params.tile_counter, 0, sizeof(int), stream);
    if (error != cudaSuccess) return error;
  }
  const int grid = std::min(args.order.total, device.multiprocessors);
  forward_kernel<Element, kHeadDim, kMask>
      <<<grid, Kernel::kTile.threads(), kSharedMemory, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace eqx_flash
