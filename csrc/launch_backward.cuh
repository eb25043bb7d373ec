// SPDX-License-Identifier: Apache-2.0
// Launch of the backward kernels. Deterministic: statistics of the query rows, then dK and dV, then
// dQ. Fused: statistics, then all three gradients, then the conversion of dQ. Each kernel starts in
// the tail of the one before it.
#pragma once

#include <algorithm>
#include <limits>

#include "dispatch.h"
#include "kernels/backward_dkdv.cuh"
#include "kernels/backward_dq.cuh"
#include "kernels/backward_fused.cuh"
#include "kernels/backward_prep.cuh"
#include "launch.cuh"

namespace eqx_flash {

template <typename Element, int kHeadDim>
cudaError_t launch_backward_prep(const BackwardParams& params, cudaStream_t stream) {
  constexpr int kLanes = kHeadDim / 8;
  backward_prep_kernel<Element, kLanes><<<static_cast<unsigned>(PrepTile<kLanes>::blocks(params)),
                                          PrepTile<kLanes>::kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

// A kernel whose blocks hold keys: kKernel runs Kernel.
template <typename Element, int kHeadDim, typename Kernel, auto* kKernel>
cudaError_t launch_backward_keys(const BackwardParams& params, const DeviceInfo& device,
                                 int most_blocks, cudaStream_t stream) {
  const ForwardParams& shape = params.forward;
  const int blocks = (shape.seq_k + Kernel::kBlockN - 1) / Kernel::kBlockN;
  // Q and dO of the heads that share a key head, 16-bit.
  const int64_t head_bytes =
      int64_t{shape.seq_q} * shape.head_dim * 4 * (shape.heads / shape.heads_k);
  BackwardKeysArguments args{
      .params = params,
      .order = make_block_order(blocks, 0, shape.batch * shape.heads_k, head_bytes,
                                backward_section_bytes(kHeadDim, shape.mask, shape.seq_k))};
  TensorMapEncoder<Element> encode;
  encode(&args.q, shape.q, query_shape(shape), Kernel::kBlockM);
  encode(&args.dout, params.dout, query_shape(shape), Kernel::kBlockM);
  encode(&args.k, shape.k, key_shape(shape), kWarpgroupRows);
  encode(&args.v, shape.v, key_shape(shape), kWarpgroupRows);
  encode(&args.dk, params.dk, key_shape(shape), kWarpgroupRows);
  encode(&args.dv, params.dv, key_shape(shape), kWarpgroupRows);
  if (encode.error != cudaSuccess) return encode.error;
  const cudaError_t error = allow_shared_memory<kKernel>(device.ordinal, Kernel::Smem::kBytes);
  if (error != cudaSuccess) return error;
  return launch_early(kKernel, std::min(args.order.total, most_blocks), Kernel::kThreads,
                      Kernel::Smem::kBytes, stream, args);
}

template <typename Element, int kHeadDim, Mask kMask>
cudaError_t launch_backward_dq(const BackwardParams& params, const DeviceInfo& device,
                               cudaStream_t stream) {
  using Kernel = BackwardDqKernel<Element, kHeadDim, kMask>;
  constexpr auto* kKernel = &backward_dq_kernel<Element, kHeadDim, kMask>;
  const ForwardParams& shape = params.forward;
  const int blocks = (shape.seq_q + Kernel::kBlockM - 1) / Kernel::kBlockM;
  // K and V, 16-bit, shared by a group of query heads.
  const int64_t head_bytes =
      int64_t{shape.seq_k} * shape.head_dim * 4 / (shape.heads / shape.heads_k);
  BackwardDqArguments args{
      .params = params,
      .order = make_block_order(blocks, 0, shape.batch * shape.heads, head_bytes,
                                backward_section_bytes(kHeadDim, shape.mask, shape.seq_k))};
  TensorMapEncoder<Element> encode;
  encode(&args.q, shape.q, query_shape(shape), kWarpgroupRows);
  encode(&args.dout, params.dout, query_shape(shape), kWarpgroupRows);
  encode(&args.k, shape.k, key_shape(shape), Kernel::kBlockN);
  encode(&args.v, shape.v, key_shape(shape), Kernel::kBlockN);
  encode(&args.dq, params.dq, query_shape(shape), kWarpgroupRows);
  if (encode.error != cudaSuccess) return encode.error;
  const cudaError_t error = allow_shared_memory<kKernel>(device.ordinal, Kernel::Smem::kBytes);
  if (error != cudaSuccess) return error;
  return launch_early(kKernel, args.order.total, kBackwardThreads, Kernel::Smem::kBytes, stream,
                      args);
}

template <typename Element, int kHeadDim>
cudaError_t launch_backward_finish_dq(const BackwardParams& params, cudaStream_t stream) {
  const ForwardParams& shape = params.forward;
  constexpr int kBlockM = DqParts<kHeadDim>::kBlockM;
  const int64_t parts =
      int64_t{2} * ((shape.seq_q + kBlockM - 1) / kBlockM) * shape.batch * shape.heads;
  return launch_early(&backward_finish_dq_kernel<Element, kHeadDim>, static_cast<unsigned>(parts),
                      kFinishDqThreads<kHeadDim>, 0, stream, params);
}

template <typename Element, int kHeadDim, Mask kMask>
cudaError_t launch_backward_fused(const BackwardParams& params, const DeviceInfo& device,
                                  cudaStream_t stream) {
  using Kernel = BackwardFusedKernel<Element, kHeadDim, kMask>;
  constexpr auto* kKernel = &backward_fused_kernel<Element, kHeadDim, kMask>;
  return launch_backward_keys<Element, kHeadDim, Kernel, kKernel>(params, device,
                                                                  device.multiprocessors, stream);
}

template <typename Element, int kHeadDim, Mask kMask>
cudaError_t run_backward(const BackwardParams& params, cudaStream_t stream) {
  DeviceInfo device;
  cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  error = launch_backward_prep<Element, kHeadDim>(params, stream);
  if (error != cudaSuccess) return error;
  if constexpr (has_fused_backward(kHeadDim)) {
    if (params.dq_accumulator != nullptr) {
      error = launch_backward_fused<Element, kHeadDim, kMask>(params, device, stream);
      if (error != cudaSuccess) return error;
      return launch_backward_finish_dq<Element, kHeadDim>(params, stream);
    }
  }
  using Kernel = BackwardDkdvKernel<Element, kHeadDim, kMask>;
  constexpr auto* kKernel = &backward_dkdv_kernel<Element, kHeadDim, kMask>;
  error = launch_backward_keys<Element, kHeadDim, Kernel, kKernel>(
      params, device, std::numeric_limits<int>::max(), stream);
  if (error != cudaSuccess) return error;
  return launch_backward_dq<Element, kHeadDim, kMask>(params, device, stream);
}

}  // namespace eqx_flash
