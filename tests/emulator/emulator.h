// SPDX-License-Identifier: Apache-2.0
// One thread block of a Hopper GPU on the host: enough of it to run the kernels, and less forgiving
// than the hardware where they rely on an order that nobody promised.
//
// Threads are fibers. What the hardware does by itself and at its own pace (copies, wgmma) is
// queued, and done early, late or at a random moment, by the seed. Shared memory exists twice: as
// the threads see it, and as the async proxy sees it, where a thread's writes arrive with its
// fence. What would be undefined, or would never end, is an error that says where.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bitset>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace emulator {

// Built-in variables, of the thread that runs.
struct Index {
  unsigned x = 0, y = 0, z = 0;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

[[noreturn]] inline void fail(const std::string& text) { throw std::runtime_error(text); }

using Place = std::source_location;

// In the kernels, not in csrc/sm90, whose functions are called everywhere.
inline std::string text_of(const Place& place) {
  const std::string path = place.file_name();
  const size_t begin = path.rfind("/csrc/");
  if (begin == std::string::npos) return "before it calls anything";
  return path.substr(begin + 6) + ":" + std::to_string(place.line());
}

// ---- Shared memory ------------------------------------------------------------------------------

class SharedMemory {
 public:
  // What the kernel sees it begin at: aligned for TMA only if it asks for that.
  uint32_t begin(uint32_t alignment) {
    constexpr uint32_t kReserved = 1024;
    return begin_ = kReserved + alignment;
  }
  void reset(uint32_t size) {
    size_ = size;
    threads_view_.assign(size, 0xff);  // NaN
    async_view_.assign(size, 0xff);
    being_read_.assign(size / kPiece + 1, 0);
  }
  uint8_t* of_threads(uint32_t address, uint32_t bytes) {
    return threads_view_.data() + checked(address, bytes);
  }
  const uint8_t* of_async_proxy(uint32_t address, uint32_t bytes) {
    return async_view_.data() + checked(address, bytes);
  }
  // 16 bytes that ldmatrix has asked for, and may not have read until its warp has used them.
  void begin_read(uint32_t address) { ++being_read_[checked(address, kPiece) / kPiece]; }
  void end_read(uint32_t address) { --being_read_[checked(address, kPiece) / kPiece]; }

  void write_async(uint32_t address, const void* source, uint32_t bytes) {
    const uint32_t first = checked(address, bytes) / kPiece;
    for (uint32_t piece = first; piece <= (address + bytes - 1 - begin_) / kPiece; ++piece) {
      if (being_read_[piece] > 0) fail("a copy overwrites what ldmatrix may not have read yet");
    }
    std::memcpy(threads_view_.data() + checked(address, bytes), source, bytes);
    std::memcpy(async_view_.data() + checked(address, bytes), source, bytes);
  }
  void show_async_proxy(uint32_t address, uint32_t bytes) {
    const uint32_t at = checked(address, bytes);
    std::memcpy(async_view_.data() + at, threads_view_.data() + at, bytes);
  }

 private:
  uint32_t checked(uint32_t address, uint32_t bytes) const {
    if (address < begin_ || address + bytes > begin_ + size_) {
      fail("access to " + std::to_string(bytes) + " bytes at " + std::to_string(address) +
           " of shared memory, which ends at " + std::to_string(begin_ + size_));
    }
    if (address % (bytes < 16 ? bytes : 16)) fail("misaligned access to shared memory");
    return address - begin_;
  }
  static constexpr uint32_t kPiece = 16;
  uint32_t begin_ = 0, size_ = 0;
  std::vector<uint8_t> threads_view_, async_view_;
  std::vector<uint16_t> being_read_;  // by piece
};

// ---- Barriers -----------------------------------------------------------------------------------

class Mbarrier {
 public:
  bool published = false;  // by the fence after its initialisation

  Mbarrier(int arrivals, size_t threads)
      : arrivals_(arrivals), missing_(arrivals), awaited_(threads, -1) {}

  void arrive(int64_t announced_bytes = 0) {
    if (missing_ == 0) fail("more arrivals at an mbarrier than its phase has");
    --missing_;
    add_bytes(announced_bytes);
  }
  void deliver(int64_t bytes) { add_bytes(-bytes); }

  // The phase that a thread means by a parity: the one it waited for last, or the next.
  int64_t await(unsigned thread, uint32_t parity) {
    int64_t& phase = awaited_[thread];
    if ((phase & 1) != parity) ++phase;
    return phase;
  }
  bool has_completed(int64_t phase) const { return completed_ > phase; }
  // After two phases the parity is that of one that is still to come.
  bool has_overrun(int64_t phase) const { return completed_ > phase + 1; }

 private:
  void add_bytes(int64_t count) {
    constexpr int64_t kLimit = 1 << 20;  // of what the hardware counts
    bytes_ += count;
    if (bytes_ <= -kLimit || bytes_ >= kLimit) fail("an mbarrier expects too many bytes");
    if (missing_ > 0 || bytes_ != 0) return;
    missing_ = arrivals_;
    ++completed_;
  }
  int arrivals_;  // of a phase
  int missing_;
  int64_t bytes_ = 0;             // announced and not yet delivered
  int64_t completed_ = 0;         // phases; the one before the first counts as complete, too
  std::vector<int64_t> awaited_;  // the last phase that each thread has waited for
};

class NamedBarrier {
 public:
  uint64_t generation = 0;

  void arrive(unsigned thread, unsigned threads) {
    if (threads % 32 != 0) fail("a named barrier of half a warp");
    if (arrived_.none()) expected_ = threads;
    if (threads != expected_) fail("threads disagree about how many meet at a named barrier");
    if (arrived_[thread]) fail("a thread arrives at a named barrier before the others have");
    arrived_[thread] = true;
    if (arrived_.count() < expected_) return;
    arrived_.reset();
    ++generation;
  }

 private:
  unsigned expected_ = 0;
  std::bitset<1024> arrived_;
};

// ---- Matrix products ----------------------------------------------------------------------------

// One wgmma of 64 x n x 16 as its 128 threads issue it.
struct MatrixProduct {
  int n;
  bool a_in_registers;
  bool b_along_n;  // the n axis of B runs along a shared-memory row
  float (*to_float)(uint16_t);
  uint64_t a, b;  // descriptors
  bool accumulate;
  Place place{};
  int issued = 0;
  std::array<float*, 128> d{};
  std::array<const uint32_t*, 128> a_registers{};

  bool same_as(const MatrixProduct& other) const {
    return n == other.n && a_in_registers == other.a_in_registers && b_along_n == other.b_along_n &&
           a == other.a && b == other.b && accumulate == other.accumulate;
  }
  void run(SharedMemory& memory) const;
};

struct Warpgroup {
  std::deque<MatrixProduct> products;  // not done yet
  uint64_t done = 0;
};

struct Warp {
  int alive = 0;
  int arrived = 0;
  uint64_t generation = 0;
  std::array<uint64_t, 32> given{}, received{};

  void exchange() {
    received = given;
    arrived = 0;
    ++generation;
  }
};

// ---- Threads ------------------------------------------------------------------------------------

// Work that the hardware does later.
struct Queued {
  std::function<void()> work;
  Place place;             // that issued it
  bool committed = false;  // of stores: to a bulk group

  void run() const {
    try {
      work();
    } catch (const std::exception& error) {
      fail(error.what() + (", issued at " + text_of(place)));
    }
  }
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  unsigned index = 0;
  bool finished = false;
  int registers = 0;
  std::function<bool()> may_go_on;  // empty: yes
  std::string waits_for;
  Place place;                                          // of its last call from a kernel
  std::vector<std::pair<uint32_t, uint32_t>> unfenced;  // writes to shared memory: address, bytes
  std::vector<uint32_t> unpublished;                    // mbarriers that it has initialised
  // What ldmatrix may not have read yet, and which of `batches` uses it: the next at that time.
  std::vector<std::pair<uint32_t, uint64_t>> reads;
  std::deque<Queued> stores;
  bool registers_fenced = false;     // since the last wait for wgmmas
  uint64_t products = 0;             // wgmmas issued
  std::vector<uint64_t> batches{0};  // `products` at each commit
};

enum class Work { kCopy, kProduct, kStore };  // what the hardware does by itself

class Block {
 public:
  static constexpr size_t kStackBytes = 256 << 10;

  SharedMemory memory;
  int free_registers = 0;  // that threads have given back; nobody gets any from outside
  std::map<uint32_t, Mbarrier> mbarriers;
  std::array<NamedBarrier, 16> named_barriers;
  Thread* thread = nullptr;  // that runs

  Warp& warp() { return warps_[thread->index / 32]; }
  Warpgroup& warpgroup() { return warpgroups_[thread->index / 128]; }

  // Eight seeds in a row: everything queued is done at once; only when no thread can go on, the
  // kinds of work in one of their six orders; or at random.
  void choose_order(uint32_t seed) {
    random_.seed(seed);
    late_ = seed % 8 != 0;
    order_of_work_ = {Work::kCopy, Work::kProduct, Work::kStore};
    for (uint32_t i = 1; i < seed % 8; ++i) {
      std::next_permutation(order_of_work_.begin(), order_of_work_.end());
    }
    at_random_ = seed % 8 == 7;
  }

  // Runs `body` as every thread of the block.
  void run(unsigned threads, uint32_t shared_bytes, std::function<void()> body) {
    body_ = std::move(body);
    memory.reset(shared_bytes);
    free_registers = 0;
    mbarriers.clear();
    named_barriers = {};
    copies_.clear();
    error_.clear();
    warps_.assign((threads + 31) / 32, {});
    warpgroups_.assign((threads + 127) / 128, {});
    if (threads_.size() < threads) threads_.resize(threads);
    order_.resize(threads);
    for (unsigned i = 0; i < threads; ++i) {
      order_[i] = i;
      ++warps_[i / 32].alive;
      start(threads_[i], i);
      // As ptxas does for a kernel that is alone on its multiprocessor.
      threads_[i].registers = static_cast<int>((64u << 10) / threads / 8 * 8);
    }
    unsigned alive = threads;
    while (alive > 0) {
      bool progress = false;
      std::shuffle(order_.begin(), order_.end(), random_);
      const unsigned delayed = random_() % (2 * warps_.size());  // a warp sits out now and then
      for (unsigned i : order_) {
        Thread& one = threads_[i];
        if (one.finished || i / 32 == delayed) continue;
        if (one.may_go_on && !one.may_go_on()) continue;
        one.may_go_on = nullptr;
        progress = true;
        resume(one);
        if (!error_.empty()) {
          fail(error_ + ", thread " + std::to_string(i) + " at " + text_of(one.place));
        }
        alive -= one.finished;
      }
      const bool stuck = !progress && delayed >= warps_.size();
      if (!late_) {
        while (do_queued_work()) progress = true;
      } else if (stuck || (at_random_ && random_() % 2)) {
        progress |= do_queued_work();
      }
      if (stuck && !progress) fail(describe_deadlock());
    }
    for (unsigned i = 0; i < threads; ++i) {
      if (!threads_[i].stores.empty()) fail("a bulk store outlives its block's shared memory");
      if (threads_[i].products != warpgroups_[i / 128].done) fail("a wgmma outlives its block");
    }
    if (!copies_.empty()) fail("a bulk load outlives its block's shared memory");
  }

  // Called by threads.
  void wait_until(std::function<bool()> condition, std::string what) {
    if (condition()) return;
    thread->may_go_on = std::move(condition);
    thread->waits_for = std::move(what);
    swapcontext(&thread->context, &scheduler_);
  }
  void queue_copy(std::function<void()> copy) {
    copies_.push_back({std::move(copy), thread->place});
  }
  void queue_store(std::function<void()> store) {
    thread->stores.push_back({std::move(store), thread->place});
  }

  // Every lane's value, once all lanes that still run have given theirs.
  const std::array<uint64_t, 32>& exchange(uint64_t value) {
    Warp& mine = warp();
    mine.given[thread->index % 32] = value;
    if (++mine.arrived == mine.alive) {
      mine.exchange();
    } else {
      wait_until(
          [&mine, generation = mine.generation] {
            if (mine.generation == generation && mine.arrived == mine.alive) mine.exchange();
            return mine.generation != generation;
          },
          "the other lanes of its warp");
    }
    return mine.received;
  }

  void issue(MatrixProduct product, float* d, const uint32_t* a_registers) {
    if (!thread->registers_fenced) fail("a wgmma without wgmma.fence");
    Warpgroup& group = warpgroup();
    const uint64_t position = thread->products++ - group.done;
    if (position == group.products.size()) group.products.push_back(product);
    MatrixProduct& shared = group.products[position];
    if (!shared.same_as(product)) fail("threads of a warpgroup issue different wgmmas");
    shared.place = thread->place;
    shared.d[thread->index % 128] = d;
    shared.a_registers[thread->index % 128] = a_registers;
    ++shared.issued;
  }
  void wait_for_batches(uint64_t pending) {
    thread->registers_fenced = false;
    const std::vector<uint64_t>& batches = thread->batches;
    if (batches.size() <= pending) return;
    const uint64_t needed = batches[batches.size() - 1 - pending];
    Warpgroup& group = warpgroup();
    wait_until([&group, needed] { return group.done >= needed; }, "wgmma");
    end_reads(batches.size() - 1 - pending);
  }
  void begin_read(uint32_t address) {
    memory.begin_read(address);
    thread->reads.push_back({address, thread->batches.size()});
  }
  // What ldmatrix brought for batches up to this one has been used.
  void end_reads(uint64_t batch) {
    std::erase_if(thread->reads, [this, batch](const auto& read) {
      if (read.second > batch) return false;
      memory.end_read(read.first);
      return true;
    });
  }

 private:
  static void enter();

  void start(Thread& one, unsigned index) {
    std::unique_ptr<char[]> stack = std::move(one.stack);
    if (!stack) stack.reset(new char[kStackBytes]);
    one = Thread{};
    one.stack = std::move(stack);
    one.index = index;
    getcontext(&one.context);
    one.context.uc_stack.ss_sp = one.stack.get();
    one.context.uc_stack.ss_size = kStackBytes;
    one.context.uc_link = &scheduler_;
    makecontext(&one.context, &Block::enter, 0);
  }
  void resume(Thread& one) {
    thread = &one;
    threadIdx = {one.index};
    swapcontext(&scheduler_, &one.context);
  }

  // One copy, one wgmma, or one store, of the first kind of which there is any.
  bool do_queued_work() {
    if (at_random_) std::shuffle(order_of_work_.begin(), order_of_work_.end(), random_);
    for (Work kind : order_of_work_) {
      if (kind == Work::kCopy ? copy() : kind == Work::kProduct ? multiply() : store()) return true;
    }
    return false;
  }
  bool copy() {
    if (copies_.empty()) return false;
    std::swap(copies_[random_() % copies_.size()], copies_.back());
    copies_.back().run();
    copies_.pop_back();
    return true;
  }
  bool multiply() {
    const size_t first = random_();
    for (size_t i = 0; i < warpgroups_.size(); ++i) {
      Warpgroup& group = warpgroups_[(first + i) % warpgroups_.size()];
      if (group.products.empty() || group.products.front().issued < 128) continue;
      const MatrixProduct& product = group.products.front();
      Queued{[this, &product] { product.run(memory); }, product.place}.run();
      group.products.pop_front();
      ++group.done;
      return true;
    }
    return false;
  }
  bool store() {
    const size_t first = random_();
    for (size_t i = 0; i < order_.size(); ++i) {
      std::deque<Queued>& stores = threads_[(first + i) % order_.size()].stores;
      if (stores.empty() || !stores.front().committed) continue;
      stores.front().run();
      stores.pop_front();
      return true;
    }
    return false;
  }

  std::string describe_deadlock() const {
    std::map<std::pair<unsigned, std::string>, int> counts;  // of lanes
    for (unsigned i : order_) {
      const Thread& one = threads_[i];
      if (one.finished) continue;
      ++counts[{i / 32, one.waits_for + " at " + text_of(one.place)}];
    }
    std::string text = "deadlock";
    for (const auto& [where, count] : counts) {
      text += "; warp " + std::to_string(where.first) + " (lanes: " + std::to_string(count) +
              ") waits for " + where.second;
    }
    return text;
  }

  std::mt19937 random_;
  bool late_ = false, at_random_ = false;
  std::array<Work, 3> order_of_work_;
  std::function<void()> body_;
  std::string error_;
  ucontext_t scheduler_;
  std::deque<Thread> threads_;
  std::vector<unsigned> order_;
  std::vector<Warp> warps_;
  std::deque<Warpgroup> warpgroups_;
  std::vector<Queued> copies_;
};

inline Block block;  // one at a time

inline void note_call(const Place& place) {
  if (std::strstr(place.file_name(), "/sm90/") == nullptr) block.thread->place = place;
}

inline void Block::enter() {
  Thread* me = block.thread;
  try {
    block.body_();
  } catch (const std::exception& error) {
    block.error_ = error.what();
  }
  me->finished = true;
  --block.warps_[me->index / 32].alive;
}

// ---- Matrix products, what they compute ---------------------------------------------------------

// An operand in shared memory, by its descriptor.
class MatrixOperand {
 public:
  explicit MatrixOperand(uint64_t bits)
      : start_((bits & 0x3fff) << 4),
        leading_((bits >> 16 & 0x3fff) << 4),
        stride_((bits >> 32 & 0x3fff) << 4),
        swizzled_(bits >> 62 == 1) {
    if (bits >> 62 > 1) fail("a matrix descriptor with a swizzle of other than 128 bytes");
  }
  // compute-sanitizer takes the left operand for contiguous, whatever the strides say.
  void check_contiguous(SharedMemory& memory) const { memory.of_async_proxy(start_, 64 * 16 * 2); }
  // The rows are the axis of M or N.
  uint16_t k_major(SharedMemory& memory, int row, int k) const {
    const uint32_t group = start_ + row / 8 * stride_;
    if (swizzled_) return element(memory, group + row % 8 * 128 + k * 2);
    return element(memory, group + row % 8 * 16 + k / 8 * leading_ + k % 8 * 2);
  }
  // The rows are the axis of K.
  uint16_t n_major(SharedMemory& memory, int k, int col) const {
    if (!swizzled_) fail("an operand along N without a swizzle");
    return element(memory,
                   start_ + col / 64 * leading_ + k / 8 * stride_ + k % 8 * 128 + col % 64 * 2);
  }

 private:
  // Of an address as it would be without the swizzle, which exclusive-or's its bits 4 to 6 with
  // those of the row in its group of eight.
  uint16_t element(SharedMemory& memory, uint32_t address) const {
    if (swizzled_) address ^= (address >> 7 & 7) << 4;
    uint16_t element;
    std::memcpy(&element, memory.of_async_proxy(address, 2), 2);
    return element;
  }

  uint32_t start_, leading_, stride_;
  bool swizzled_;
};

inline void MatrixProduct::run(SharedMemory& memory) const {
  float left[64][16], right[16][256];
  if (a_in_registers) {
    for (int t = 0; t < 128; ++t) {
      for (int r = 0; r < 4; ++r) {
        const int row = t / 32 * 16 + t % 32 / 4 + r % 2 * 8;
        const int k = t % 4 * 2 + r / 2 * 8;
        left[row][k] = to_float(static_cast<uint16_t>(a_registers[t][r]));
        left[row][k + 1] = to_float(static_cast<uint16_t>(a_registers[t][r] >> 16));
      }
    }
  } else {
    const MatrixOperand at(a);
    at.check_contiguous(memory);
    for (int row = 0; row < 64; ++row) {
      for (int k = 0; k < 16; ++k) left[row][k] = to_float(at.k_major(memory, row, k));
    }
  }
  const MatrixOperand at(b);
  for (int k = 0; k < 16; ++k) {
    for (int col = 0; col < n; ++col) {
      right[k][col] = to_float(b_along_n ? at.n_major(memory, k, col) : at.k_major(memory, col, k));
    }
  }
  float sums[256];
  for (int row = 0; row < 64; ++row) {
    std::fill(sums, sums + n, 0.f);
    for (int k = 0; k < 16; ++k) {
      for (int col = 0; col < n; ++col) sums[col] += left[row][k] * right[k][col];
    }
    for (int col = 0; col < n; ++col) {
      const int t = row / 16 * 32 + row % 8 * 4 + col % 8 / 2;
      float& cell = d[t][col / 8 * 4 + row % 16 / 8 * 2 + col % 2];
      cell = accumulate ? cell + sums[col] : sums[col];
    }
  }
}

// ---- Launches -----------------------------------------------------------------------------------

inline std::string last_error;
inline uint32_t seed = -1;  // of the launch

// Runs the grid, one block after the other.
template <typename Body>
void run_grid(unsigned blocks, unsigned threads, uint32_t shared_bytes, Body body) {
  block.choose_order(seed);
  gridDim = {blocks, 1, 1};
  blockDim = {threads, 1, 1};
  try {
    for (unsigned i = 0; i < blocks; ++i) {
      blockIdx = {i};
      block.run(threads, shared_bytes, body);
    }
  } catch (const std::exception& error) {
    last_error = error.what();
    last_error += "; block " + std::to_string(blockIdx.x) + ", seed " + std::to_string(seed);
  }
}

}  // namespace emulator
