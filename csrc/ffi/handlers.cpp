// SPDX-License-Identifier: Apache-2.0
// XLA's view of the kernels: buffers and attributes in, params to the dispatch, errors out.
// The Python layer has checked everything a user can get wrong; what is checked again here is what
// memory safety rests on.
#include "ffi/handlers.h"

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>

#include "dispatch.h"
#include "ffi/error.h"

namespace eqx_flash {
namespace {

namespace ffi = xla::ffi;

using RowStats = ffi::Buffer<ffi::F32, 3>;  // a float for each query row
using Counter = ffi::Buffer<ffi::S32, 1>;
using Accumulator = ffi::Buffer<ffi::F32, 1>;
using Dims = ffi::Span<const int64_t>;

constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();

// All buffers have the dtype and the shape of the first.
ffi::Error check_alike(std::initializer_list<const ffi::AnyBuffer*> buffers, const char* names) {
  const ffi::AnyBuffer& first = **buffers.begin();
  for (const auto* buffer : buffers) {
    if (buffer->element_type() != first.element_type() ||
        buffer->dimensions() != first.dimensions()) {
      return invalid_argument(std::string(names) + " differ in dtype or shape");
    }
  }
  return ffi::Error::Success();
}

ffi::Error check_operands(const ffi::AnyBuffer& q, const ffi::AnyBuffer& k, float softmax_scale) {
  if (q.element_type() != ffi::BF16 && q.element_type() != ffi::F16) {
    return invalid_argument("q must be bf16 or f16");
  }
  if (k.element_type() != q.element_type()) return invalid_argument("q and k differ in dtype");
  const Dims qd = q.dimensions(), kd = k.dimensions();
  if (qd.size() != 4 || kd.size() != 4) return invalid_argument("q and k must have rank 4");
  for (const Dims dims : {qd, kd}) {
    for (const int64_t dim : dims) {
      if (dim < 1 || dim > kMaxInt) {
        return invalid_argument("a dimension is zero or over 2^31 - 1: " + std::to_string(dim));
      }
    }
  }
  if (kd[0] != qd[0] || kd[3] != qd[3]) {
    return invalid_argument("q and k differ in batch or head_dim");
  }
  if (qd[2] % kd[2] != 0) return invalid_argument("heads is not a multiple of heads_k");
  if (qd[3] % 8 != 0) return invalid_argument("head_dim is not a multiple of 8");
  // A tile has at least 64 rows: their number, and each coordinate, stays below 2^31.
  for (const Dims dims : {qd, kd}) {
    if (dims[0] * dims[2] * ((dims[1] + 63) / 64) > kMaxInt) {
      return invalid_argument("more than 2^31 - 1 tiles of 64 rows");
    }
  }
  if (!(softmax_scale > 0)) return invalid_argument("softmax_scale must be positive");
  return ffi::Error::Success();
}

ffi::Error check_row_stats(Dims stats, Dims q, int64_t rows, const char* name) {
  if (stats[0] == q[0] && stats[1] == q[2] && stats[2] == rows) return ffi::Error::Success();
  return invalid_argument(std::string(name) + " is not [batch, heads, " + std::to_string(rows) +
                          "]");
}

// The first failure, if any.
ffi::Error all(std::initializer_list<ffi::Error> checks) {
  for (const ffi::Error& check : checks) {
    if (check.failure()) return check;
  }
  return ffi::Error::Success();
}

ForwardParams make_params(const ffi::AnyBuffer& q, const ffi::AnyBuffer& k, const ffi::AnyBuffer& v,
                          const ffi::AnyBuffer& out, float* lse, float softmax_scale, bool causal,
                          bool bottom_right) {
  const Dims qd = q.dimensions(), kd = k.dimensions();
  return {.q = q.untyped_data(),
          .k = k.untyped_data(),
          .v = v.untyped_data(),
          .out = out.untyped_data(),
          .lse = lse,
          .tile_counter = nullptr,
          .batch = static_cast<int>(qd[0]),
          .seq_q = static_cast<int>(qd[1]),
          .seq_k = static_cast<int>(kd[1]),
          .heads = static_cast<int>(qd[2]),
          .heads_k = static_cast<int>(kd[2]),
          .head_dim = static_cast<int>(qd[3]),
          .softmax_scale = softmax_scale,
          .mask = causal ? Mask::kCausal : Mask::kFull,
          .diagonal = bottom_right ? static_cast<int>(kd[1] - qd[1]) : 0};
}

// Calls launch.template operator()<Element, kHeadDim, kMask>() for the kernel that fits.
template <typename Launch>
ffi::Error dispatch(ffi::DataType dtype, const ForwardParams& shape, const char* doing,
                    Launch&& launch) {
  cudaError_t launched = cudaSuccess;
  const bool built = with_head_dim_tile(shape.head_dim, [&]<int kHeadDim>() {
    with_mask(shape.mask, [&]<Mask kMask>() {
      launched = dtype == ffi::BF16 ? launch.template operator()<__nv_bfloat16, kHeadDim, kMask>()
                                    : launch.template operator()<__half, kHeadDim, kMask>();
    });
  });
  if (built) return from_cuda(launched, doing);
  return invalid_argument("head_dim " + std::to_string(shape.head_dim) +
                          " is over the largest that was built (" EQX_FLASH_HEAD_DIMS_LIST ")");
}

ffi::Error forward(cudaStream_t stream, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                   ffi::Result<ffi::AnyBuffer> out, ffi::Result<RowStats> lse,
                   ffi::Result<Counter> tile_counter, float softmax_scale, bool causal,
                   bool bottom_right) {
  if (auto error = check_operands(q, k, softmax_scale); error.failure()) return error;
  const Dims qd = q.dimensions();
  if (auto error = all({check_alike({&k, &v}, "k and v"), check_alike({&q, &*out}, "q and out"),
                        check_row_stats(lse->dimensions(), qd, qd[1], "lse")});
      error.failure()) {
    return error;
  }
  ForwardParams params =
      make_params(q, k, v, *out, lse->typed_data(), softmax_scale, causal, bottom_right);
  params.tile_counter = tile_counter->typed_data();
  return dispatch(q.element_type(), params, "launching the forward kernel",
                  [&]<typename Element, int kHeadDim, Mask kMask>() {
                    return run_forward<Element, kHeadDim, kMask>(params, stream);
                  });
}

ffi::Error backward(cudaStream_t stream, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                    ffi::AnyBuffer out, RowStats lse, ffi::AnyBuffer dout,
                    std::optional<RowStats> dlse, ffi::Result<ffi::AnyBuffer> dq,
                    ffi::Result<ffi::AnyBuffer> dk, ffi::Result<ffi::AnyBuffer> dv,
                    ffi::Result<RowStats> lse_log2, ffi::Result<RowStats> dlse_minus_delta,
                    ffi::Result<Accumulator> dq_accumulator, ffi::Result<Counter> tile_counter,
                    float softmax_scale, bool causal, bool bottom_right, bool deterministic) {
  if (auto error = check_operands(q, k, softmax_scale); error.failure()) return error;
  const Dims qd = q.dimensions();
  const int64_t padded = (qd[1] + kQueryPadding - 1) / kQueryPadding * kQueryPadding;
  if (auto error = all(
          {check_alike({&k, &v, &*dk, &*dv}, "k, v, dk and dv"),
           check_alike({&q, &out, &dout, &*dq}, "q, out, dout and dq"),
           check_row_stats(lse.dimensions(), qd, qd[1], "lse"),
           dlse ? check_row_stats(dlse->dimensions(), qd, qd[1], "dlse") : ffi::Error::Success(),
           check_row_stats(lse_log2->dimensions(), qd, padded, "lse_log2"),
           check_row_stats(dlse_minus_delta->dimensions(), qd, padded, "dlse_minus_delta")});
      error.failure()) {
    return error;
  }
  BackwardParams params{
      .forward = make_params(q, k, v, out, lse.typed_data(), softmax_scale, causal, bottom_right),
      .dout = dout.untyped_data(),
      .dlse = dlse ? dlse->typed_data() : nullptr,
      .dq = dq->untyped_data(),
      .dk = dk->untyped_data(),
      .dv = dv->untyped_data(),
      .padded_seq_q = static_cast<int>(padded),
      .lse_log2 = lse_log2->typed_data(),
      .dlse_minus_delta = dlse_minus_delta->typed_data(),
      .dq_accumulator = nullptr};
  params.forward.tile_counter = tile_counter->typed_data();
  const int64_t accumulator_rows = qd[0] * qd[2] * padded;
  return dispatch(q.element_type(), params.forward, "launching the backward kernels",
                  [&]<typename Element, int kHeadDim, Mask kMask>() {
                    if (!deterministic && has_fused_backward(kHeadDim)) {
                      if (dq_accumulator->dimensions()[0] < accumulator_rows * kHeadDim) {
                        return cudaErrorInvalidValue;
                      }
                      params.dq_accumulator = dq_accumulator->typed_data();
                    }
                    return run_backward<Element, kHeadDim, kMask>(params, stream);
                  });
}

// Nothing in the handlers allocates or waits, so XLA may capture the calls into a CUDA graph.
XLA_FFI_DEFINE_HANDLER(kForward, forward,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<cudaStream_t>>()
                           .Arg<ffi::AnyBuffer>()  // q
                           .Arg<ffi::AnyBuffer>()  // k
                           .Arg<ffi::AnyBuffer>()  // v
                           .Ret<ffi::AnyBuffer>()  // out
                           .Ret<RowStats>()        // lse
                           .Ret<Counter>()         // tile_counter
                           .Attr<float>("softmax_scale")
                           .Attr<bool>("causal")
                           .Attr<bool>("bottom_right"),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(kBackward, backward,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<cudaStream_t>>()
                           .Arg<ffi::AnyBuffer>()    // q
                           .Arg<ffi::AnyBuffer>()    // k
                           .Arg<ffi::AnyBuffer>()    // v
                           .Arg<ffi::AnyBuffer>()    // out
                           .Arg<RowStats>()          // lse
                           .Arg<ffi::AnyBuffer>()    // dout
                           .OptionalArg<RowStats>()  // dlse
                           .Ret<ffi::AnyBuffer>()    // dq
                           .Ret<ffi::AnyBuffer>()    // dk
                           .Ret<ffi::AnyBuffer>()    // dv
                           .Ret<RowStats>()          // lse_log2, scratch
                           .Ret<RowStats>()          // dlse_minus_delta, scratch
                           .Ret<Accumulator>()       // dq_accumulator, scratch
                           .Ret<Counter>()           // tile_counter, scratch
                           .Attr<float>("softmax_scale")
                           .Attr<bool>("causal")
                           .Attr<bool>("bottom_right")
                           .Attr<bool>("deterministic"),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

void* forward_handler() { return reinterpret_cast<void*>(kForward); }
void* backward_handler() { return reinterpret_cast<void*>(kBackward); }

}  // namespace eqx_flash
