// SPDX-License-Identifier: Apache-2.0
// Host side of a launch: tensor maps, grid, shared-memory limit. Nothing here allocates or
// synchronises, so that XLA can capture the launch into a CUDA graph.
#pragma once

#include <algorithm>
#include <atomic>

#include "dispatch.h"
#include "kernels/forward.cuh"

namespace eqx_flash {

struct DeviceInfo {
  int ordinal;
  int multiprocessors;
};

inline cudaError_t current_device(DeviceInfo* device) {
  if (const cudaError_t error = cudaGetDevice(&device->ordinal); error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount,
                                device->ordinal);
}

// Raises a kernel's shared-memory limit, once per device and kernel.
template <auto* kKernel>
cudaError_t allow_shared_memory(int device, int bytes) {
  static std::atomic<uint64_t> done{0};
  const uint64_t bit = uint64_t{1} << (device % 64);
  if (done.load(std::memory_order_relaxed) & bit) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) done.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

template <typename Element, int kHeadDim, Mask kMask>
cudaError_t run_forward(const ForwardParams& params, cudaStream_t stream) {
  using Kernel = ForwardKernel<Element, kHeadDim, kMask>;
  constexpr auto* kKernel = &forward_kernel<Element, kHeadDim, kMask>;
  constexpr int kSharedMemory = Kernel::kTile.shared_memory_bytes(kHeadDim);

  DeviceInfo device;
  ForwardArguments args{.params = params, .order = make_tile_order(params, Kernel::kBlockM)};
  const sm90::TensorShape queries{params.batch, params.seq_q, params.heads, params.head_dim};
  const sm90::TensorShape keys{params.batch, params.seq_k, params.heads_k, params.head_dim};
  auto encode = sm90::encode_tensor_map<Element>;
  cudaError_t error;
  if ((error = current_device(&device)) != cudaSuccess) return error;
  if ((error = encode(&args.q, params.q, queries, kWarpgroupRows)) != cudaSuccess) return error;
  if ((error = encode(&args.k, params.k, keys, Kernel::kBlockN)) != cudaSuccess) return error;
  if ((error = encode(&args.v, params.v, keys, Kernel::kBlockN)) != cudaSuccess) return error;
  if ((error = encode(&args.out, params.out, queries, kWarpgroupRows)) != cudaSuccess) return error;
  error = allow_shared_memory<kKernel>(device.ordinal, kSharedMemory);
  if (error != cudaSuccess) return error;
  if constexpr (Kernel::kDynamicTiles) {
    error = cudaMemsetAsync(params.tile_counter, 0, sizeof(int), stream);
    if (error != cudaSuccess) return error;
  }
  const int grid = std::min(args.order.tiles, device.multiprocessors);
  forward_kernel<Element, kHeadDim, kMask>
      <<<grid, Kernel::kTile.threads(), kSharedMemory, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace eqx_flash
