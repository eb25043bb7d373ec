// SPDX-License-Identifier: Apache-2.0
// XLA's view of the kernels: buffers and attributes in, params to the dispatch, errors out.
// The Python layer has checked everything a user can get wrong; what is checked again here is what
// memory safety rests on.
#include "ffi/handlers.h"

#include <cstdint>
#include <limits>

#include "dispatch.h"
#include "ffi/error.h"

namespace eqx_flash {
namespace {

namespace ffi = xla::ffi;

using Lse = ffi::Buffer<ffi::F32, 3>;
using Counter = ffi::Buffer<ffi::S32, 1>;

ffi::Error check_forward(const ffi::AnyBuffer& q, const ffi::AnyBuffer& k, const ffi::AnyBuffer& v,
                         const ffi::AnyBuffer& out, ffi::Span<const int64_t> lse,
                         float softmax_scale) {
  const auto dtype = q.element_type();
  if (dtype != ffi::BF16 && dtype != ffi::F16) return invalid_argument("q must be bf16 or f16");
  for (const auto* buffer : {&k, &v, &out}) {
    if (buffer->element_type() != dtype) return invalid_argument("q, k, v, out differ in dtype");
  }
  for (const auto* buffer : {&q, &k, &v, &out}) {
    if (buffer->dimensions().size() != 4) return invalid_argument("q, k, v, out must have rank 4");
    for (const int64_t dim : buffer->dimensions()) {
      if (dim < 1 || dim > std::numeric_limits<int32_t>::max()) {
        return invalid_argument("a dimension is zero or over 2^31 - 1: " + std::to_string(dim));
      }
    }
  }
  const auto qd = q.dimensions(), kd = k.dimensions();
  if (v.dimensions() != kd) return invalid_argument("k and v differ in shape");
  if (out.dimensions() != qd) return invalid_argument("q and out differ in shape");
  if (kd[0] != qd[0] || kd[3] != qd[3]) {
    return invalid_argument("q and k differ in batch or head_dim");
  }
  if (qd[2] % kd[2] != 0) return invalid_argument("heads is not a multiple of heads_k");
  if (qd[3] % 8 != 0) return invalid_argument("head_dim is not a multiple of 8");
  if (lse[0] != qd[0] || lse[1] != qd[2] || lse[2] != qd[1]) {
    return invalid_argument("lse is not [batch, heads, seq_q]");
  }
  // A tile has at least 64 rows: their number, and each coordinate, stays below 2^31.
  if (qd[0] * qd[2] * ((qd[1] + 63) / 64) > std::numeric_limits<int32_t>::max()) {
    return invalid_argument("more than 2^31 - 1 tiles of 64 queries");
  }
  if (!(softmax_scale > 0)) return invalid_argument("softmax_scale must be positive");
  return ffi::Error::Success();
}

ffi::Error forward(cudaStream_t stream, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                   ffi::Result<ffi::AnyBuffer> out, ffi::Result<Lse> lse,
                   ffi::Result<Counter> tile_counter, float softmax_scale, bool causal,
                   bool bottom_right) {
  if (auto error = check_forward(q, k, v, *out, lse->dimensions(), softmax_scale);
      error.failure()) {
    return error;
  }
  const auto qd = q.dimensions(), kd = k.dimensions();
  const ForwardParams params{.q = q.untyped_data(),
                             .k = k.untyped_data(),
                             .v = v.untyped_data(),
                             .out = out->untyped_data(),
                             .lse = lse->typed_data(),
                             .tile_counter = tile_counter->typed_data(),
                             .batch = static_cast<int>(qd[0]),
                             .seq_q = static_cast<int>(qd[1]),
                             .seq_k = static_cast<int>(kd[1]),
                             .heads = static_cast<int>(qd[2]),
                             .heads_k = static_cast<int>(kd[2]),
                             .head_dim = static_cast<int>(qd[3]),
                             .softmax_scale = softmax_scale,
                             .mask = causal ? Mask::kCausal : Mask::kFull,
                             .diagonal = bottom_right ? static_cast<int>(kd[1] - qd[1]) : 0};
  cudaError_t launched = cudaSuccess;
  const bool built = with_head_dim_tile(params.head_dim, [&]<int kHeadDim>() {
    with_mask(params.mask, [&]<Mask kMask>() {
      launched = q.element_type() == ffi::BF16
                     ? run_forward<__nv_bfloat16, kHeadDim, kMask>(params, stream)
                     : run_forward<__half, kHeadDim, kMask>(params, stream);
    });
  });
  if (!built) {
    return invalid_argument("head_dim " + std::to_string(params.head_dim) +
                            " is over the largest that was built (" EQX_FLASH_HEAD_DIMS_LIST ")");
  }
  return from_cuda(launched, "launching the forward kernel");
}

// Nothing in the handler allocates or waits, so XLA may capture the call into a CUDA graph.
XLA_FFI_DEFINE_HANDLER(kForward, forward,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<cudaStream_t>>()
                           .Arg<ffi::AnyBuffer>()  // q
                           .Arg<ffi::AnyBuffer>()  // k
                           .Arg<ffi::AnyBuffer>()  // v
                           .Ret<ffi::AnyBuffer>()  // out
                           .Ret<Lse>()
                           .Ret<Counter>()
                           .Attr<float>("softmax_scale")
                           .Attr<bool>("causal")
                           .Attr<bool>("bottom_right"),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

void* forward_handler() { return reinterpret_cast<void*>(kForward); }

}  // namespace eqx_flash
