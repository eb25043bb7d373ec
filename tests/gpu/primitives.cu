// SPDX-License-Identifier: Apache-2.0
// The device primitives, a few at a time in kernels of one block, and functions that run these on
// arrays of the host. test_primitives.py calls the functions through ctypes.

#include <functional>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels/epilogue.cuh"
#include "sm90/barrier.cuh"
#include "sm90/registers.cuh"
#include "sm90/smem_tile.cuh"
#include "sm90/start_tile.cuh"
#include "sm90/tma.cuh"
#include "sm90/wgmma.cuh"

namespace eqx_flash {
namespace {

using namespace sm90;

constexpr int kRows = 64;               // of one wgmma
constexpr int kAlignment = 1024;        // of a tile
constexpr int kBarrierSpace = 64;       // bytes
constexpr int kRingConsumerWarps = 8;   // two warpgroups, as in the forward kernel
constexpr int kRingBufferBytes = 1024;  // eight rows of 128 bytes
constexpr int kGuard = 4096;            // elements before and after a tensor, to be left alone

// ----------------------------------------------------------------------------------------- device

// The first address of dynamic shared memory that a tile may have.
EQX_DEVICE uint32_t first_tile() {
  extern __shared__ uint8_t dynamic_smem[];
  return (shared_address(dynamic_smem) + kAlignment - 1) & ~(kAlignment - 1u);
}

template <typename T>
EQX_DEVICE T& at_shared(uint32_t address) {
  return *static_cast<T*>(__cvta_shared_to_generic(address));
}

// Calls function(i, row, col) for the elements i that this thread holds of a 64 x kCols
// accumulator.
template <int kCols, typename Function>
EQX_DEVICE void for_accumulator(Function function) {
#pragma unroll
  for (int i = 0; i < kCols / 2; ++i) {
    function(i, accumulator_row(threadIdx.x) + 8 * (i / 2 % 2),
             accumulator_col(threadIdx.x) + 8 * (i / 4) + i % 2);
  }
}

// All threads wait until what one of them loads by load() has landed. `full` serves once.
template <typename Load>
EQX_DEVICE void load_and_wait(Barrier full, uint32_t bytes, Load load) {
  if (threadIdx.x == 0) {
    full.init(1);
    fence_barrier_init();
    full.arrive_and_expect(bytes);
    load();
  }
  __syncthreads();
  full.wait(0);
}

template <typename Tile>
EQX_DEVICE void load_tile(const CUtensorMap& map, uint32_t tile, Barrier full, TmaCoordinates at) {
  for (int s = 0; s < Tile::kSlabs; ++s) {
    tma_load(map, tile + s * Tile::kSlabBytes, full.address, l2_policy<L2Policy::kEvictFirst>(),
             {at.col + s * Tile::kSlabCols, at.row, at.head, at.batch});
  }
}

// Slow for some steps and fast for others, so that every role at times waits for every other.
EQX_DEVICE void dawdle(uint32_t seed, uint32_t role, uint32_t step) {
  const uint32_t mood = (seed * 1009 + role * 31 + step / 16) * 2654435769u >> 16;
  if (mood % 2 == 1) __nanosleep(mood * (step + 1) % 1024);
}

// d [64, kN] = a [64, kK] b [kN, kK]^T.
template <typename Element, int kN, int kK, bool kRegisterA>
__global__ void __launch_bounds__(kWarpgroup)
    scores_kernel(const __grid_constant__ CUtensorMap a_map,
                  const __grid_constant__ CUtensorMap b_map, float* d) {
  using TileA = SmemTile<kRows, kK>;
  using TileB = SmemTile<kN, kK>;
  const int thread = threadIdx.x;
  const uint32_t a_tile = first_tile();
  const uint32_t b_tile = a_tile + TileA::kBytes;
  const Barrier full{b_tile + TileB::kBytes};
  load_and_wait(full, TileA::kBytes + TileB::kBytes, [&] {
    load_tile<TileA>(a_map, a_tile, full, {});
    load_tile<TileB>(b_map, b_tile, full, {});
  });

  float acc[kN / 2];
#pragma unroll
  for (float& x : acc) x = std::numeric_limits<float>::quiet_NaN();  // must not be read
  const Descriptor b = TileB::k_major(a_tile) + TileA::kBytes;
  if constexpr (kRegisterA) {
    uint32_t a[kK / 4];
    const int row = (thread / kWarp) * 16 + thread % 16;
#pragma unroll
    for (int k = 0; k < kK / 16; ++k) {
      load_matrix_x4(a_tile + TileA::piece_offset(row, 2 * k + thread % kWarp / 16), a + 4 * k);
    }
    wgmma_fence();
    mma_registers_k_major<Element, TileB>(acc, a, b);
  } else {
    wgmma_fence();
    mma_shared_k_major<Element, TileA, TileB>(acc, TileA::k_major(a_tile), b);
  }
  wgmma_commit();
  wgmma_wait<0>();
  pin(acc);
  for_accumulator<kN>([&](int i, int row, int col) { d[row * kN + col] = acc[i]; });
}

// d [3, 64, kN]: columns that start from `first`, from `second`, and from one plus the other.
template <int kN>
__global__ void __launch_bounds__(kWarpgroup)
    starts_kernel(const float* first, const float* second, float* d) {
  using Tile = StartTile<kN>;
  const uint32_t tile = first_tile();
  const uint32_t ones = tile + Tile::kBytes;
  for (int row = threadIdx.x; row < kN; row += kWarpgroup) {
    Tile::write(tile, row, first[row], second[row]);
  }
  if (threadIdx.x < Tile::kOnesThreads) Tile::write_ones(ones, threadIdx.x);
  fence_async_proxy();
  __syncthreads();

  float acc[kN / 2];
#pragma unroll
  for (float& x : acc) x = std::numeric_limits<float>::quiet_NaN();  // must not be read
  auto put = [&](int which) {
    wgmma_commit();
    wgmma_wait<0>();
    pin(acc);
    for_accumulator<kN>(
        [&](int i, int row, int col) { d[(which * kRows + row) * kN + col] = acc[i]; });
    wgmma_fence();
  };
  const Descriptor at_ones = Descriptor::origin(ones), at_tile = Descriptor::origin(tile);
  wgmma_fence();
  mma_start<kN, Start::kSecond>(acc, at_ones, at_tile, false);
  put(1);
  mma_start<kN, Start::kFirst>(acc, at_ones, at_tile, false);
  put(0);
  mma_start<kN, Start::kSecond>(acc, at_ones, at_tile, true);
  put(2);
}

// d [64, kD] += p [64, kN] v [kN, kD], p rounded to 16 bits where it lies in registers.
template <typename Element, int kN, int kD>
__global__ void __launch_bounds__(kWarpgroup)
    output_kernel(const __grid_constant__ CUtensorMap v_map, const float* p, float* d) {
  using TileV = SmemTile<kN, kD>;
  const uint32_t v_tile = first_tile();
  const Barrier full{v_tile + TileV::kBytes};
  load_and_wait(full, TileV::kBytes, [&] { load_tile<TileV>(v_map, v_tile, full, {}); });

  float scores[kN / 2];
  for_accumulator<kN>([&](int i, int row, int col) { scores[i] = p[row * kN + col]; });
  uint32_t a[kN / 4];
#pragma unroll
  for (int i = 0; i < kN / 4; ++i) a[i] = pack<Element>(scores[2 * i], scores[2 * i + 1]);
  float acc[kD / 2];
  for_accumulator<kD>([&](int i, int row, int col) { acc[i] = d[row * kD + col]; });
  pin(acc);
  wgmma_fence();
  mma_registers_mn_major<Element, TileV>(acc, a, TileV::mn_major(v_tile));
  wgmma_commit();
  wgmma_wait<0>();
  pin(acc);
  for_accumulator<kD>([&](int i, int row, int col) { d[row * kD + col] = acc[i]; });
}

// Rows of acc [64, kCols], each times its factor, to the tensor behind the map.
template <typename Element, int kCols>
__global__ void __launch_bounds__(kWarpgroup)
    epilogue_kernel(const __grid_constant__ CUtensorMap map, TmaCoordinates at, const float* acc,
                    const float* factors) {
  using Slab = SmemTile<kRows, kCols>;
  const int thread = threadIdx.x;
  const uint32_t slab = first_tile();
  float o[kCols / 2];
  for_accumulator<kCols>([&](int i, int row, int col) { o[i] = acc[row * kCols + col]; });
  const int first = accumulator_row(thread);
  const float factor[2] = {factors[first], factors[first + 8]};
  write_output_slab<Element, Slab>(slab, o, factor, thread);
  named_barrier_sync(NamedBarrier::kEpilogue, 0, kWarpgroup);  // the slab is written
  if (thread == 0) {
    store_output_slab<Slab>(map, slab, at.row, at.head, at.batch);
    tma_store_wait_read();
  }
}

// A tile as TMA loads it over poison, put back into rows.
template <int kTileRows, int kCols>
__global__ void __launch_bounds__(kWarpgroup)
    load_kernel(const __grid_constant__ CUtensorMap map, TmaCoordinates at, uint16_t* out) {
  using Tile = SmemTile<kTileRows, kCols>;
  constexpr int kPieces = kCols / 8;
  const uint32_t tile = first_tile();
  const Barrier full{tile + Tile::kBytes};
  for (int i = threadIdx.x; i < Tile::kBytes / 4; i += blockDim.x) {
    at_shared<uint32_t>(tile + 4 * i) = 0xffffffffu;
  }
  fence_async_proxy();
  __syncthreads();  // the poison is written before the load
  load_and_wait(full, Tile::kBytes, [&] { load_tile<Tile>(map, tile, full, at); });
  for (int i = threadIdx.x; i < kTileRows * kPieces; i += blockDim.x) {
    reinterpret_cast<uint4*>(out)[i] =
        at_shared<uint4>(tile + Tile::piece_offset(i / kPieces, i % kPieces));
  }
}

// The numbers 0, 1, … go through a ring, by TMA from a table or by the producer's own stores.
// seen [steps, lanes of all consumers]: what each lane read at each step.
template <int kStages>
__global__ void __launch_bounds__((1 + kRingConsumerWarps) * kWarp)
    ring_kernel(const __grid_constant__ CUtensorMap table, bool through_tma, int steps,
                uint32_t seed, uint16_t* seen) {
  const uint32_t buffers = first_tile();
  const Ring<kStages> ring{buffers, kRingBufferBytes, buffers + kStages * kRingBufferBytes};
  if (threadIdx.x == 0) {
    ring.init(kRingConsumerWarps);
    fence_barrier_init();
  }
  __syncthreads();
  const int warp = warp_uniform(threadIdx.x / kWarp);
  const int lane = threadIdx.x % kWarp;
  constexpr int kLaneBytes = kRingBufferBytes / kWarp;
  Cursor<kStages> at;
  if (warp == 0) {
    for (int step = 0; lane == 0 && step < steps; ++step) {
      dawdle(seed, 0, step);
      ring.wait_empty(at);  // all consumers have read what this stage held
      const uint32_t buffer = ring.buffer(at.stage);
      if (through_tma) {
        ring.full(at.stage).arrive_and_expect(kRingBufferBytes);
        tma_load(table, buffer, ring.full(at.stage).address, l2_policy<L2Policy::kEvictLast>(),
                 {.col = 0, .row = 8 * step, .head = 0, .batch = 0});
      } else {
        for (int i = 0; i < kWarp; ++i) at_shared<uint16_t>(buffer + i * kLaneBytes) = step;
        ring.full(at.stage).arrive();
      }
      at.advance();
    }
  } else {
    const int column = (warp - 1) * kWarp + lane;
    for (int step = 0; step < steps; ++step) {
      ring.wait_full(at);        // this step's number has landed
      dawdle(seed, warp, step);  // a producer that does not wait would overwrite it
      seen[step * kRingConsumerWarps * kWarp + column] =
          at_shared<uint16_t>(ring.buffer(at.stage) + lane * kLaneBytes);
      __syncwarp();
      ring.empty(at.stage).arrive_if(lane == 0);  // this warp is done with the stage
      at.advance();
    }
  }
}

// out [steps]: stage and parity of Cursor::after(step), and of a cursor advanced so often.
template <int kStages>
__global__ void cursor_kernel(int steps, int4* out) {
  Cursor<kStages> advanced;
  for (int step = 0; step < steps; ++step) {
    const auto after = Cursor<kStages>::after(step);
    out[step] = {after.stage, int(after.parity), advanced.stage, int(advanced.parity)};
    advanced.advance();
  }
}

// Warpgroups pass the turn around. In its turn each warp signs the log twice, some time apart.
__global__ void turns_kernel(int rounds, uint32_t seed, int* log) {
  __shared__ int signatures;
  const int warpgroups = blockDim.x / kWarpgroup;
  const int warp = warp_uniform(threadIdx.x / kWarp);
  const int warpgroup = warp_uniform(threadIdx.x / kWarpgroup);
  const int next_warpgroup = (warpgroup + 1) % warpgroups;
  auto sign = [&] {
    if (threadIdx.x % kWarp == 0) log[atomicAdd(&signatures, 1)] = warpgroup;
    __threadfence_block();
  };
  auto pass_turn = [&] {
    named_barrier_arrive(NamedBarrier::kTurn, next_warpgroup, 2 * kWarpgroup);
  };
  if (threadIdx.x == 0) signatures = 0;
  __syncthreads();
  if (warpgroup == warpgroups - 1) pass_turn();  // warpgroup 0 goes first
  for (int round = 0; round < rounds; ++round) {
    dawdle(seed, warp, 2 * round);
    named_barrier_sync(NamedBarrier::kTurn, warpgroup, 2 * kWarpgroup);
    sign();
    dawdle(seed, warp, 2 * round + 1);
    sign();
    pass_turn();
  }
}

template <typename Element>
__global__ void pack_kernel(int count, const float2* pairs, uint32_t* packed) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    packed[i] = pack<Element>(pairs[i].x, pairs[i].y);
  }
}

__global__ void exp2_kernel(int count, float* values) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) values[i] = exp2_approx(values[i]);
}

// ------------------------------------------------------------------------------------------- host

// One call from Python: its arrays on the device, and the first error.
class Call {
 public:
  ~Call() {
    for (void* array : arrays_) cudaFree(array);
  }

  template <typename T>
  T* copy_in(const T* host, size_t count) {
    void* device = nullptr;
    check(cudaMalloc(&device, count * sizeof(T)));
    arrays_.push_back(device);
    check(cudaMemcpy(device, host, count * sizeof(T), cudaMemcpyHostToDevice));
    return static_cast<T*>(device);
  }

  template <typename T>
  T* copy_in_and_out(T* host, size_t count) {
    T* device = copy_in(host, count);
    copies_back_.push_back(
        [=] { return cudaMemcpy(host, device, count * sizeof(T), cudaMemcpyDeviceToHost); });
    return device;
  }

  template <typename Element>
  CUtensorMap map(const void* data, TensorShape shape, int box_rows) {
    CUtensorMap map{};
    check(encode_tensor_map<Element>(&map, data, shape, box_rows));
    return map;
  }

  // Runs one block, and copies back what comes back.
  template <typename... Parameters>
  cudaError_t run(void (*kernel)(Parameters...), int threads, int smem_bytes,
                  std::type_identity_t<Parameters>... arguments) {
    if (error_ != cudaSuccess) return error_;
    smem_bytes += kAlignment + kBarrierSpace;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes));
    kernel<<<1, threads, smem_bytes>>>(arguments...);
    check(cudaGetLastError());
    check(cudaDeviceSynchronize());
    for (const auto& copy_back : copies_back_) check(copy_back());
    return error_;
  }

 private:
  void check(cudaError_t error) {
    if (error_ == cudaSuccess) error_ = error;
  }

  cudaError_t error_ = cudaSuccess;
  std::vector<void*> arrays_;
  std::vector<std::function<cudaError_t()>> copies_back_;
};

// Calls function(std::integral_constant<int, value>{}) if value is one of the kValues.
template <int... kValues, typename Function>
cudaError_t with_constant(int value, Function function) {
  cudaError_t error = cudaErrorInvalidValue;
  auto try_value = [&](auto constant) {
    if (value == constant) error = function(constant);
  };
  (try_value(std::integral_constant<int, kValues>{}), ...);
  return error;
}

template <typename Function>
cudaError_t with_element(bool is_half, Function function) {
  return is_half ? function(__half{}) : function(__nv_bfloat16{});
}

size_t guarded_size(TensorShape shape) {
  return size_t{2} * kGuard + size_t(shape.batch) * shape.seq * shape.heads * shape.head_dim;
}

}  // namespace

extern "C" {

cudaError_t scores(bool is_half, int n, int k, bool register_a, const uint16_t* a,
                   const uint16_t* b, float* d) {
  return with_element(is_half, [&](auto element) {
    return with_constant<64, 80, 128>(n, [&](auto n) {
      return with_constant<64, 128, 256>(k, [&](auto k) {
        using Element = decltype(element);
        Call call;
        auto* kernel =
            register_a ? scores_kernel<Element, n, k, true> : scores_kernel<Element, n, k, false>;
        return call.run(kernel, kWarpgroup, (kRows + n) * k * 2,
                        call.map<Element>(call.copy_in(a, kRows * k), {1, kRows, 1, k}, kRows),
                        call.map<Element>(call.copy_in(b, n * k), {1, n, 1, k}, n),
                        call.copy_in_and_out(d, kRows * n));
      });
    });
  });
}

cudaError_t starts(int n, const float* first, const float* second, float* d) {
  return with_constant<64, 128>(n, [&](auto n) {
    using Tile = StartTile<n>;
    Call call;
    return call.run(starts_kernel<n>, kWarpgroup, Tile::kBytes + Tile::kOnesBytes,
                    call.copy_in(first, n), call.copy_in(second, n),
                    call.copy_in_and_out(d, 3 * kRows * n));
  });
}

cudaError_t output_product(bool is_half, int n, int head_dim, const float* p, const uint16_t* v,
                           float* d) {
  return with_element(is_half, [&](auto element) {
    return with_constant<80, 128>(n, [&](auto n) {
      return with_constant<64, 128, 256>(head_dim, [&](auto head_dim) {
        using Element = decltype(element);
        Call call;
        return call.run(output_kernel<Element, n, head_dim>, kWarpgroup, n * head_dim * 2,
                        call.map<Element>(call.copy_in(v, n * head_dim), {1, n, 1, head_dim}, n),
                        call.copy_in(p, kRows * n), call.copy_in_and_out(d, kRows * head_dim));
      });
    });
  });
}

// `buffer` holds kGuard elements, the tensor, and kGuard elements again, here and in load_box.
cudaError_t store_output(bool is_half, int cols, const TensorShape* shape, const TmaCoordinates* at,
                         const float* acc, const float* factors, uint16_t* buffer) {
  return with_element(is_half, [&](auto element) {
    return with_constant<64, 128, 256>(cols, [&](auto cols) {
      using Element = decltype(element);
      Call call;
      uint16_t* tensor = call.copy_in_and_out(buffer, guarded_size(*shape)) + kGuard;
      return call.run(epilogue_kernel<Element, cols>, kWarpgroup, kRows * cols * 2,
                      call.map<Element>(tensor, *shape, kRows), *at,
                      call.copy_in(acc, kRows * cols), call.copy_in(factors, kRows));
    });
  });
}

cudaError_t load_box(bool is_half, int rows, int cols, const TensorShape* shape,
                     const TmaCoordinates* at, const uint16_t* buffer, uint16_t* out) {
  return with_element(is_half, [&](auto element) {
    return with_constant<64, 80, 128>(rows, [&](auto rows) {
      return with_constant<64, 128, 256>(cols, [&](auto cols) {
        Call call;
        const uint16_t* tensor = call.copy_in(buffer, guarded_size(*shape)) + kGuard;
        return call.run(load_kernel<rows, cols>, kWarpgroup, rows * cols * 2,
                        call.map<decltype(element)>(tensor, *shape, rows), *at,
                        call.copy_in_and_out(out, rows * cols));
      });
    });
  });
}

cudaError_t pass_through_ring(int stages, bool through_tma, int steps, uint32_t seed,
                              uint16_t* seen) {
  return with_constant<1, 2, 3>(stages, [&](auto stages) {
    constexpr int kElements = kRingBufferBytes / 2;
    std::vector<uint16_t> table(steps * kElements);
    for (size_t i = 0; i < table.size(); ++i) table[i] = i / kElements;
    Call call;
    return call.run(
        ring_kernel<stages>, (1 + kRingConsumerWarps) * kWarp, stages * kRingBufferBytes,
        call.map<__half>(call.copy_in(table.data(), table.size()), {1, 8 * steps, 1, 64}, 8),
        through_tma, steps, seed, call.copy_in_and_out(seen, steps * kRingConsumerWarps * kWarp));
  });
}

cudaError_t move_cursors(int stages, int steps, int4* out) {
  return with_constant<1, 2, 3>(stages, [&](auto stages) {
    Call call;
    return call.run(cursor_kernel<stages>, 1, 0, steps, call.copy_in_and_out(out, steps));
  });
}

cudaError_t take_turns(int warpgroups, int rounds, uint32_t seed, int* log) {
  constexpr int kSignatures = 2 * kWarpgroup / kWarp;  // of a warpgroup in a round
  Call call;
  return call.run(turns_kernel, warpgroups * kWarpgroup, 0, rounds, seed,
                  call.copy_in_and_out(log, rounds * warpgroups * kSignatures));
}

cudaError_t pack_pairs(bool is_half, int count, const float2* pairs, uint32_t* packed) {
  return with_element(is_half, [&](auto element) {
    Call call;
    return call.run(pack_kernel<decltype(element)>, 1024, 0, count, call.copy_in(pairs, count),
                    call.copy_in_and_out(packed, count));
  });
}

cudaError_t exp2_of(int count, float* values) {
  Call call;
  return call.run(exp2_kernel, 1024, 0, count, call.copy_in_and_out(values, count));
}

}  // extern "C"
}  // namespace eqx_flash
