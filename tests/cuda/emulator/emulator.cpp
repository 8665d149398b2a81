// SPDX-License-Identifier: Apache-2.0
//
// Fibers, their schedule, and what a warp does together. emulator.h says what is checked.
#include "emulator/emulator.h"

#include <dlfcn.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#if !defined(__x86_64__) || !defined(__linux__)
#error \
    "The CUDA emulator switches stacks in x86-64 assembly, for Linux. Port switch_stack to go on."
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// switch_stack(save, load): leaves the running stack, its pointer in *save, for the stack `load`.
// What a call may not change is kept on the stack that is left.
extern "C" void sparline_emulator_switch_stack(void** save, void* load);
asm(R"(
.text
.type sparline_emulator_switch_stack, @function
sparline_emulator_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size sparline_emulator_switch_stack, .-sparline_emulator_switch_stack
)");

namespace sparline::cuda::emulator {
namespace {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;
constexpr int64_t kMaxSharedBytes = 227 * 1024;
constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kPageBytes = 4096;
constexpr size_t kSharedPagesBytes = (kMaxSharedBytes + kPageBytes - 1) / kPageBytes * kPageBytes;

struct Copy {
  void* to = nullptr;
  std::array<uint64_t, 2> bytes = {};
  size_t num_bytes = 16;
  int64_t group = 0;
};

struct Thread {
  unsigned char* stack = nullptr;  // lowest byte; kept from block to block
  void* stack_pointer = nullptr;
  std::vector<Copy> copies;  // issued, not delivered; oldest first
  int64_t num_groups = 0;    // committed
};

/// Lanes are bits: each live lane but the running one is in exactly one of the five masks.
struct Warp {
  uint32_t runnable = 0;
  uint32_t meeting = 0;     // waiting in a collective, in `calls`
  uint32_t at_barrier = 0;  // called from `sites`
  uint32_t parked = 0;      // waiting for `waits`
  uint32_t polling = 0;     // looking again after the others, called from `sites`
  std::array<Call*, kWarpSize> calls = {};
  std::array<const void*, kWarpSize> sites = {};
  std::array<Wait, kWarpSize> waits = {};
};

struct Block {
  uint3 idx = {};
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  unsigned char* shared_pages = nullptr;
  unsigned char* shared = nullptr;
  bool is_new = true;
};

struct Machine {
  std::vector<std::unique_ptr<Block>> live, idle;
  Block* block = nullptr;  // the running one
  Warp* warp = nullptr;
  int lane = 0;
  void* scheduler_stack = nullptr;

  const void* kernel = nullptr;  // null while none runs
  void (*thread_function)(void*) = nullptr;
  void* context = nullptr;
  size_t shared_bytes = 0;
  uint64_t progress = 0;  // counts what others may have waited for
  std::vector<Instructions> instructions;

  Order order = Order::kForward;
  bool is_order_set = false;
  int late_warp = -1;
  uint64_t random_state = 0;
};
constinit Machine machine;

// Messages ----------------------------------------------------------------------------------------

/// Function and line at a return address, as far as the debug information knows, and of the
/// functions that it was inlined into.
std::string place(const void* address, bool is_return_address = true) {
  constexpr int kMostLines = 4;
  Dl_info info;
  if (dladdr(address, &info) == 0) return "an unknown place";
  const auto offset = reinterpret_cast<uintptr_t>(address) -
                      reinterpret_cast<uintptr_t>(info.dli_fbase) - (is_return_address ? 1 : 0);
  std::array<char, 1024> line = {};
  std::snprintf(line.data(), line.size(), "addr2line -Cfpsie %s 0x%zx 2>/dev/null", info.dli_fname,
                offset);
  std::string result;
  if (FILE* pipe = popen(line.data(), "r")) {
    for (int n = 0; n < kMostLines && std::fgets(line.data(), line.size(), pipe) != nullptr; ++n) {
      result += line.data();
      while (!result.empty() && (result.back() == '\n' || result.back() == ' ')) result.pop_back();
    }
    pclose(pipe);
  }
  return result.empty() ? "an unknown place" : result;
}

const char* name(Op op) {
  switch (op) {
    case Op::kSyncWarp: return "__syncwarp";
    case Op::kShuffle: return "__shfl_sync";
    case Op::kShuffleUp: return "__shfl_up_sync";
    case Op::kShuffleDown: return "__shfl_down_sync";
    case Op::kShuffleXor: return "__shfl_xor_sync";
    case Op::kBallot: return "__ballot_sync";
    case Op::kAny: return "__any_sync";
    case Op::kAll: return "__all_sync";
    case Op::kReduceAdd: return "__reduce_add_sync";
    case Op::kReduceMin: return "__reduce_min_sync (unsigned)";
    case Op::kReduceMax: return "__reduce_max_sync (unsigned)";
    case Op::kReduceMinSigned: return "__reduce_min_sync (int)";
    case Op::kReduceMaxSigned: return "__reduce_max_sync (int)";
    case Op::kReduceAnd: return "__reduce_and_sync";
    case Op::kReduceOr: return "__reduce_or_sync";
    case Op::kReduceXor: return "__reduce_xor_sync";
    case Op::kLdmatrix: return "ldmatrix_x4";
    case Op::kLdmatrixTrans: return "ldmatrix_x4_trans";
    case Op::kMmaBf16: return "mma<bf16>";
    case Op::kMmaFp16: return "mma<fp16>";
    case Op::kMmaInt8: return "mma_int8";
    case Op::kMmaE4m3: return "mma_e4m3";
    case Op::kTogether: break;
  }
  return "an unknown collective";
}

std::string hex(uint64_t value) {
  std::array<char, 32> text;
  std::snprintf(text.data(), text.size(), "0x%llx", static_cast<unsigned long long>(value));
  return text.data();
}

std::string describe(const Call& call) {
  if (call.op == Op::kTogether) {
    return std::string(call.what) + " (" + std::to_string(static_cast<int64_t>(call.value)) +
           "), " + place(call.site);
  }
  return std::string(name(call.op)) + " with mask " + hex(call.mask) + ", " + place(call.site);
}

std::string describe(const Wait& wait) {
  for (const Instructions& some : machine.instructions) {
    const std::string text = some.describe(wait);
    if (!text.empty()) return text + ", " + place(wait.site);
  }
  return "an unknown wait";
}

/// "lanes 0x.. of warp w wait in ..." for each place where lanes of the running block wait.
std::string describe_waiting() {
  std::string text;
  for (size_t w = 0; w < machine.block->warps.size(); ++w) {
    const Warp& warp = machine.block->warps[w];
    const std::string of_warp = " of warp " + std::to_string(w);
    /// Those of `lanes` that are as the first one.
    const auto describe_alike = [&](uint32_t lanes, auto is_alike, auto text_of) {
      while (lanes != 0) {
        const int first = std::countr_zero(lanes);
        uint32_t alike = 0;
        for (int lane = 0; lane < kWarpSize; ++lane) {
          if ((lanes >> lane & 1u) != 0 && is_alike(first, lane)) alike |= 1u << lane;
        }
        lanes &= ~alike;
        text += "\n  lanes " + hex(alike) + of_warp + " wait in " + text_of(first);
      }
    };
    const auto is_same_site = [&](int x, int y) { return warp.sites[x] == warp.sites[y]; };
    describe_alike(
        warp.meeting,
        [&](int x, int y) {
          const Call &a = *warp.calls[x], &b = *warp.calls[y];
          return a.op == b.op && a.mask == b.mask && a.site == b.site;
        },
        [&](int lane) { return describe(*warp.calls[lane]); });
    describe_alike(warp.at_barrier, is_same_site,
                   [&](int lane) { return "__syncthreads, " + place(warp.sites[lane]); });
    describe_alike(
        warp.parked,
        [&](int x, int y) {
          const Wait &a = warp.waits[x], &b = warp.waits[y];
          return a.kind == b.kind && a.at == b.at && a.value == b.value && a.site == b.site;
        },
        [&](int lane) { return describe(warp.waits[lane]); });
    describe_alike(warp.polling, is_same_site, [&](int lane) {
      return "a loop that polls memory, " + place(warp.sites[lane]);
    });
    const uint32_t returned =
        ~(warp.meeting | warp.at_barrier | warp.parked | warp.polling | warp.runnable);
    if (returned != 0) text += "\n  lanes " + hex(returned) + of_warp + " have returned";
  }
  return text;
}

[[noreturn]] void fail_in_block(const std::string& message) {
  std::fflush(stdout);
  const std::string where = place(machine.kernel, false);
  std::fprintf(stderr, "sparline CUDA emulator: %s, block %u of %u: %s\n", where.c_str(),
               blockIdx.x, gridDim.x, message.c_str());
  std::abort();
}

/// Says which thread broke memory; then the fault takes its usual way.
void on_fault(int signal, siginfo_t* info, void*) {
  if (machine.kernel != nullptr) {
    std::fprintf(stderr,
                 "sparline CUDA emulator: %s, block %u of %u, thread %u: signal %d at address %p",
                 place(machine.kernel, false).c_str(), blockIdx.x, gridDim.x, threadIdx.x, signal,
                 info->si_addr);
    const auto at = reinterpret_cast<uintptr_t>(info->si_addr);
    const auto shared = reinterpret_cast<uintptr_t>(machine.block->shared);
    const auto distance = static_cast<int64_t>(at - shared);
    if (distance > -static_cast<int64_t>(kPageBytes) &&
        distance < kMaxSharedBytes + 2 * static_cast<int64_t>(kPageBytes)) {
      std::fprintf(stderr, ", byte %lld of %zu bytes of dynamic shared memory",
                   static_cast<long long>(distance), machine.shared_bytes);
    }
    for (const Thread& thread : machine.block->threads) {
      const auto stack = reinterpret_cast<uintptr_t>(thread.stack);
      if (at < stack && at >= stack - kPageBytes) std::fprintf(stderr, ", stack overflow");
    }
    std::fprintf(stderr, "\n");
  }
  ::signal(signal, SIG_DFL);
}

// Fibers ------------------------------------------------------------------------------------------

/// Pages between two that cannot be touched.
unsigned char* guarded_pages(size_t bytes) {
  void* const pages = mmap(nullptr, bytes + 2 * kPageBytes, PROT_NONE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  auto* const begin = static_cast<unsigned char*>(pages) + kPageBytes;
  if (pages == MAP_FAILED || mprotect(begin, bytes, PROT_READ | PROT_WRITE) != 0) {
    std::fprintf(stderr, "sparline CUDA emulator: out of memory\n");
    std::abort();
  }
  return begin;
}

int pick_lane(uint32_t lanes) {
  switch (machine.order) {
    case Order::kForward: break;
    case Order::kReverse: return 31 - std::countl_zero(lanes);
    case Order::kRandom: {
      const int turn = static_cast<int>(random_number() % kWarpSize);
      return (std::countr_zero(std::rotr(lanes, turn)) + turn) % kWarpSize;
    }
  }
  return std::countr_zero(lanes);
}

Thread& thread_at(const Warp& warp, int lane) {
  Block& block = *machine.block;
  return block.threads[static_cast<size_t>(&warp - block.warps.data()) * kWarpSize +
                       static_cast<size_t>(lane)];
}

/// Makes `lane` of the running warp the running thread; returns the stack to switch to.
void* make_running(int lane) {
  machine.warp->runnable &= ~(1u << lane);
  machine.lane = lane;
  Thread& thread = thread_at(*machine.warp, lane);
  threadIdx.x = static_cast<unsigned>(&thread - machine.block->threads.data());
  return thread.stack_pointer;
}

/// Leaves the running thread until it is picked again.
void yield() {
  Thread& me = thread_at(*machine.warp, machine.lane);
  if (machine.warp->runnable == 0) {
    sparline_emulator_switch_stack(&me.stack_pointer, machine.scheduler_stack);
    return;
  }
  const int next = pick_lane(machine.warp->runnable);
  if (next == machine.lane) {
    make_running(next);
    return;
  }
  sparline_emulator_switch_stack(&me.stack_pointer, make_running(next));
}

void fiber_main() {
  machine.thread_function(machine.context);
  yield();  // in no mask any more: for good
  std::abort();
}

void prepare(Thread& thread) {
  thread.copies.clear();
  thread.num_groups = 0;
  if (thread.stack == nullptr) thread.stack = guarded_pages(kStackBytes);
  // As switch_stack leaves a stack: six registers, the return address; then what the function
  // returned to sees as its own return address, aligned as after a call.
  auto* top = reinterpret_cast<void**>(thread.stack + kStackBytes) - 2;
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(fiber_main);
  for (int idx = 0; idx < 6; ++idx) *--top = nullptr;
  thread.stack_pointer = top;
}

void run_warp(Warp& warp) {
  machine.warp = &warp;
  sparline_emulator_switch_stack(&machine.scheduler_stack, make_running(pick_lane(warp.runnable)));
}

void begin(Block& block) {
  std::memset(block.shared, 0xff, machine.shared_bytes);
  for (int idx = 0; idx < static_cast<int>(blockDim.x); ++idx) prepare(block.threads[idx]);
  for (Warp& warp : block.warps) {
    warp = {};
    warp.runnable = 0xffffffffu;
  }
}

enum class Outcome { kEnded, kWaitsForOthers };

/// Runs the block until it has ended, or until its threads wait for other blocks.
Outcome go_on(Block& block) {
  machine.block = &block;
  blockIdx = block.idx;
  if (std::exchange(block.is_new, false)) begin(block);
  for (Warp& warp : block.warps) warp.runnable |= std::exchange(warp.polling, 0u);
  const size_t num_warps = block.warps.size();
  std::vector<size_t> turns(num_warps);
  for (size_t w = 0; w < num_warps; ++w) turns[w] = w;
  if (machine.order == Order::kReverse) std::reverse(turns.begin(), turns.end());
  for (;;) {
    if (machine.order == Order::kRandom) {
      for (size_t w = num_warps; w > 1; --w) std::swap(turns[w - 1], turns[random_number() % w]);
    }
    for (const size_t w : turns) {
      if (static_cast<int>(w) == machine.late_warp) continue;
      if (block.warps[w].runnable != 0) run_warp(block.warps[w]);
    }
    Warp all;
    Warp* late = nullptr;
    for (Warp& warp : block.warps) {
      if (&warp - block.warps.data() == machine.late_warp && warp.runnable != 0) {
        late = &warp;
      } else {
        all.runnable |= warp.runnable;
      }
      all.meeting |= warp.meeting;
      all.at_barrier |= warp.at_barrier;
      all.parked |= warp.parked;
      all.polling |= warp.polling;
    }
    if (all.runnable != 0) continue;
    const bool is_waiting = (all.meeting | all.parked | all.polling) != 0 || late != nullptr;
    if (all.at_barrier != 0 && !is_waiting) {
      for (Warp& warp : block.warps) warp.runnable = std::exchange(warp.at_barrier, 0u);
      continue;
    }
    bool has_finished_something = false;
    for (const Instructions& some : machine.instructions) {
      has_finished_something = has_finished_something || some.finish_something();
    }
    if (has_finished_something) {
      ++machine.progress;
      continue;
    }
    if (late != nullptr) {
      run_warp(*late);
      continue;
    }
    if (all.polling != 0) return Outcome::kWaitsForOthers;
    if (is_waiting) fail_in_block("deadlock: these lanes wait for ever" + describe_waiting());
    for (const Instructions& some : machine.instructions) some.end_block();
    return Outcome::kEnded;
  }
}

std::unique_ptr<Block> take_block(uint3 idx) {
  std::unique_ptr<Block> block;
  if (machine.idle.empty()) {
    block = std::make_unique<Block>();
    block->shared_pages = guarded_pages(kSharedPagesBytes);
  } else {
    block = std::move(machine.idle.back());
    machine.idle.pop_back();
  }
  const size_t num_threads = blockDim.x;
  block->threads.resize(std::max(block->threads.size(), num_threads));
  block->warps.resize(num_threads / kWarpSize);
  // Up to the page that cannot be touched, as near as alignment to 512 bytes lets it.
  block->shared = block->shared_pages + (kSharedPagesBytes - machine.shared_bytes) / 512 * 512;
  block->idx = idx;
  block->is_new = true;
  return block;
}

/// Blocks one after another; beside each other where one waits for what another one counts.
void run_blocks(int64_t num_blocks, int64_t start) {
  constexpr int kMostIdleRounds = 1000;
  int num_idle_rounds = 0;
  for (int64_t idx = 0; idx < num_blocks || !machine.live.empty();) {
    const uint64_t progress = machine.progress;
    std::erase_if(machine.live, [&](std::unique_ptr<Block>& block) {
      if (go_on(*block) == Outcome::kWaitsForOthers) return false;
      ++machine.progress;
      machine.idle.push_back(std::move(block));
      return true;
    });
    num_idle_rounds = machine.progress == progress ? num_idle_rounds + 1 : 0;
    if (!machine.live.empty() && num_idle_rounds == 0) continue;
    if (idx < num_blocks) {
      if (machine.live.size() == static_cast<size_t>(num_multiprocessors())) {
        fail_in_block("deadlock: blocks wait for others that have no room beside them" +
                      describe_waiting());
      }
      const int64_t block =
          machine.order == Order::kReverse ? num_blocks - 1 - idx : (start + idx) % num_blocks;
      ++idx;
      machine.live.push_back(take_block({static_cast<unsigned>(block), 0, 0}));
      num_idle_rounds = 0;
    } else if (num_idle_rounds > kMostIdleRounds) {
      fail_in_block("deadlock: all blocks wait for each other" + describe_waiting());
    }
  }
}

// What lanes do together
// ----------------------------------------------------------------------------

float bf16_to_float(uint32_t bits) { return std::bit_cast<float>(bits << 16); }

float fp16_to_float(uint32_t bits) {
  const uint32_t magnitude = (bits & 0x7fffu) << 13;
  const bool is_finite = (bits & 0x7c00u) != 0x7c00u;
  const float value = is_finite ? std::bit_cast<float>(magnitude) * 0x1p112f
                                : std::bit_cast<float>(magnitude | 0x7f800000u);
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | (bits & 0x8000u) << 16);
}

float e4m3_to_float(uint32_t bits) {
  const int exponent = static_cast<int>(bits >> 3 & 15u), mantissa = static_cast<int>(bits & 7u);
  float value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                              : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  if (exponent == 15 && mantissa == 7) value = std::numeric_limits<float>::quiet_NaN();
  return (bits & 0x80u) != 0 ? -value : value;
}

/// d (16x8) += a (16xkDepth) b (kDepthx8), element types by `convert` from kDepth / 16 bytes.
template <class D, int kDepth, class Convert>
void multiply_warp(const Warp& warp, Convert convert) {
  constexpr int kPerRegister = kDepth / 8;
  constexpr int kBits = 32 / kPerRegister;
  D a[16][kDepth], b[kDepth][8];
  const auto element = [&](uint32_t bits, int idx) {
    return convert(bits >> (kBits * idx) & ((1u << kBits) - 1u));
  };
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const Call& call = *warp.calls[lane];
    const int g = lane / 4, t = lane % 4;
    for (int idx = 0; idx < kPerRegister; ++idx) {
      const int k = kPerRegister * t + idx;
      a[g][k] = element(call.a[0], idx);
      a[g + 8][k] = element(call.a[1], idx);
      a[g][k + kDepth / 2] = element(call.a[2], idx);
      a[g + 8][k + kDepth / 2] = element(call.a[3], idx);
      b[k][g] = element(call.b[0], idx);
      b[k + kDepth / 2][g] = element(call.b[1], idx);
    }
  }
  D c[16][8] = {};
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      for (int col = 0; col < 8; ++col) c[row][col] += a[row][k] * b[k][col];
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    D* const d = static_cast<D*>(warp.calls[lane]->d);
    const int g = lane / 4, t = lane % 4;
    d[0] += c[g][2 * t];
    d[1] += c[g][2 * t + 1];
    d[2] += c[g + 8][2 * t];
    d[3] += c[g + 8][2 * t + 1];
  }
}

void load_matrices(const Warp& warp, bool is_transposed) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t rows[8][8];
    for (int r = 0; r < 8; ++r) std::memcpy(rows[r], warp.calls[8 * matrix + r]->row, 16);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint32_t low = is_transposed ? rows[2 * t][g] : rows[g][2 * t];
      const uint32_t high = is_transposed ? rows[2 * t + 1][g] : rows[g][2 * t + 1];
      static_cast<uint32_t*>(warp.calls[lane]->d)[matrix] = high << 16 | low;
    }
  }
}

void shuffle_lanes(const Warp& warp, uint32_t mask, Op op) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((mask >> lane & 1u) == 0) continue;
    Call& call = *warp.calls[lane];
    const int width = static_cast<int>(call.width), step = static_cast<int>(call.lane_or_step);
    if (width < 1 || width > 32 || !std::has_single_bit(call.width)) {
      fail(std::string(name(op)) + " with width " + std::to_string(width));
    }
    const int begin = lane / width * width;
    int from = lane;
    if (op == Op::kShuffle) from = begin + (step & (width - 1));
    if (op == Op::kShuffleUp) from = lane - step;
    if (op == Op::kShuffleDown) from = lane + step;
    if (op == Op::kShuffleXor) from = lane ^ step;
    // Past the end of its part of the warp a lane gets its own value.
    if (from >= begin + width || (op == Op::kShuffleUp && from < begin)) from = lane;
    if (from < 0 || from >= kWarpSize || (mask >> from & 1u) == 0) {
      fail(std::string(name(op)) + ": lane " + std::to_string(lane) + " reads lane " +
           std::to_string(from) + ", which is not in the mask " + hex(mask));
    }
    call.result = warp.calls[from]->value;
  }
}

void reduce(const Warp& warp, uint32_t mask, Op op) {
  uint32_t result = 0;
  bool is_first = true;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((mask >> lane & 1u) == 0) continue;
    const auto value = static_cast<uint32_t>(warp.calls[lane]->value);
    const auto as_signed = static_cast<int32_t>(value);
    if (op == Op::kBallot || op == Op::kAny || op == Op::kAll) {
      result |= value << lane;
    } else if (is_first) {
      result = value;
    } else {
      switch (op) {
        case Op::kReduceAdd: result += value; break;
        case Op::kReduceMin: result = std::min(result, value); break;
        case Op::kReduceMax: result = std::max(result, value); break;
        case Op::kReduceMinSigned:
          result = static_cast<uint32_t>(std::min(static_cast<int32_t>(result), as_signed));
          break;
        case Op::kReduceMaxSigned:
          result = static_cast<uint32_t>(std::max(static_cast<int32_t>(result), as_signed));
          break;
        case Op::kReduceAnd: result &= value; break;
        case Op::kReduceOr: result |= value; break;
        case Op::kReduceXor: result ^= value; break;
        default: break;
      }
    }
    is_first = false;
  }
  if (op == Op::kAny) result = result != 0;
  if (op == Op::kAll) result = result == mask;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((mask >> lane & 1u) != 0) warp.calls[lane]->result = result;
  }
}

void carry_out(const Warp& warp, uint32_t mask, Op op) {
  static const auto kE4m3 = [] {
    std::array<float, 256> table;
    for (uint32_t bits = 0; bits < 256; ++bits) table[bits] = e4m3_to_float(bits);
    return table;
  }();
  switch (op) {
    case Op::kSyncWarp: return;
    case Op::kTogether: {
      const Call& call = *warp.calls[machine.lane];
      if (call.action != nullptr) call.action(call.value);
      return;
    }
    case Op::kShuffle:
    case Op::kShuffleUp:
    case Op::kShuffleDown:
    case Op::kShuffleXor: return shuffle_lanes(warp, mask, op);
    case Op::kLdmatrix: return load_matrices(warp, false);
    case Op::kLdmatrixTrans: return load_matrices(warp, true);
    case Op::kMmaBf16:
      return multiply_warp<float, 16>(warp, [](uint32_t bits) { return bf16_to_float(bits); });
    case Op::kMmaFp16:
      return multiply_warp<float, 16>(warp, [](uint32_t bits) { return fp16_to_float(bits); });
    case Op::kMmaInt8:
      return multiply_warp<int32_t, 32>(
          warp, [](uint32_t bits) { return static_cast<int32_t>(static_cast<int8_t>(bits)); });
    case Op::kMmaE4m3:
      return multiply_warp<float, 32>(warp, [](uint32_t bits) { return kE4m3[bits]; });
    default: return reduce(warp, mask, op);
  }
}

// Static shared memory lies among the variables of the program.
extern "C" char __data_start, _end;

void check_shared(const void* address, size_t bytes, const char* what) {
  const auto at = static_cast<const unsigned char*>(address);
  if (reinterpret_cast<uintptr_t>(at) % bytes != 0) {
    fail(std::string(what) + ": the shared address " + hex(reinterpret_cast<uintptr_t>(at)) +
         " is not a multiple of " + std::to_string(bytes));
  }
  const unsigned char* const shared = machine.block->shared;
  const bool is_dynamic = at >= shared && at + bytes <= shared + machine.shared_bytes;
  const bool is_static = at >= reinterpret_cast<unsigned char*>(&__data_start) &&
                         at + bytes <= reinterpret_cast<unsigned char*>(&_end);
  if (!is_dynamic && !is_static) {
    fail(std::string(what) + ": byte " + std::to_string(at - shared) + " is not in the " +
         std::to_string(machine.shared_bytes) + " bytes of dynamic shared memory");
  }
}

void order_from_environment() {
  const char* const text = std::getenv("SPARLINE_EMULATOR_ORDER");
  if (text == nullptr || std::string(text) == "forward") return;
  if (std::string(text) == "reverse") return set_order(Order::kReverse);
  char* end = nullptr;
  const uint64_t seed = std::strtoull(text, &end, 10);
  if (*text == '\0' || *end != '\0') {
    throw Error(
        ErrorCode::kInvalidArgument,
        std::string("SPARLINE_EMULATOR_ORDER must be forward, reverse or a number, but is ") +
            text + ".");
  }
  set_order(Order::kRandom, seed);
}

}  // namespace

// The device's side -------------------------------------------------------------------------------

void meet(Call& call) {
  Warp& warp = *machine.warp;
  const int lane = machine.lane;
  if (call.site == nullptr) call.site = __builtin_return_address(0);
  if ((call.mask >> lane & 1u) == 0) {
    fail("lane " + std::to_string(lane) + " is not in its own mask: " + describe(call));
  }
  if (call.row != nullptr) check_shared(call.row, 16, name(call.op));
  warp.calls[lane] = &call;
  warp.meeting |= 1u << lane;
  if ((warp.meeting & call.mask) == call.mask) {
    for (int other = 0; other < kWarpSize; ++other) {
      if ((call.mask >> other & 1u) == 0) continue;
      const Call& theirs = *warp.calls[other];
      if (theirs.op != call.op || theirs.mask != call.mask || theirs.what != call.what ||
          (call.op == Op::kTogether && theirs.value != call.value)) {
        fail("lanes meet in different collectives: lane " + std::to_string(lane) + " in " +
             describe(call) + "; lane " + std::to_string(other) + " in " + describe(theirs));
      }
    }
    carry_out(warp, call.mask, call.op);
    warp.meeting &= ~call.mask;
    warp.runnable |= call.mask;
  }
  yield();
}

void barrier() {
  Warp& warp = *machine.warp;
  warp.sites[machine.lane] = __builtin_return_address(0);
  warp.at_barrier |= 1u << machine.lane;
  yield();
}

void copy_async(void* shared, const void* global, int bytes, bool is_valid) {
  const std::string what = "cp_async_" + std::to_string(bytes);
  const auto num_bytes = static_cast<size_t>(bytes);
  check_shared(shared, num_bytes, what.c_str());
  if (reinterpret_cast<uintptr_t>(global) % num_bytes != 0) {
    fail(what + ": the global address " + hex(reinterpret_cast<uintptr_t>(global)) +
         " is not a multiple of " + std::to_string(bytes));
  }
  Thread& me = thread_at(*machine.warp, machine.lane);
  Copy copy{.to = shared, .num_bytes = num_bytes, .group = me.num_groups};
  if (is_valid) std::memcpy(copy.bytes.data(), global, num_bytes);
  std::memset(shared, 0xff, num_bytes);
  me.copies.push_back(copy);
}

void commit_copies() { ++thread_at(*machine.warp, machine.lane).num_groups; }

void wait_for_copies(int num_pending_groups) {
  Thread& me = thread_at(*machine.warp, machine.lane);
  auto copy = me.copies.begin();
  for (; copy != me.copies.end() && copy->group < me.num_groups - num_pending_groups; ++copy) {
    std::memcpy(copy->to, copy->bytes.data(), copy->num_bytes);
  }
  me.copies.erase(me.copies.begin(), copy);
}

unsigned char* dynamic_shared() { return machine.block->shared; }
size_t dynamic_shared_bytes() { return machine.shared_bytes; }

void park(const Wait& wait) {
  Warp& warp = *machine.warp;
  warp.waits[machine.lane] = wait;
  warp.parked |= 1u << machine.lane;
  yield();
}

void wake(const std::function<bool(const Wait&, int)>& is_over) {
  int first = 0;
  for (Warp& warp : machine.block->warps) {
    for (uint32_t rest = warp.parked; rest != 0; rest &= rest - 1) {
      const int lane = std::countr_zero(rest);
      if (!is_over(warp.waits[lane], first + lane)) continue;
      warp.parked &= ~(1u << lane);
      warp.runnable |= 1u << lane;
    }
    first += kWarpSize;
  }
}

std::vector<Waiting> waiting() {
  std::vector<Waiting> all;
  int first = 0;
  for (const Warp& warp : machine.block->warps) {
    for (uint32_t rest = warp.parked; rest != 0; rest &= rest - 1) {
      const int lane = std::countr_zero(rest);
      all.push_back({&warp.waits[lane], first + lane});
    }
    first += kWarpSize;
  }
  return all;
}

void let_others_go_on(const void* site) {
  Warp& warp = *machine.warp;
  warp.sites[machine.lane] = site;
  warp.polling |= 1u << machine.lane;
  yield();
}

void let_polling_go_on() {
  for (Warp& warp : machine.block->warps) warp.runnable |= std::exchange(warp.polling, 0u);
  note_progress();
}

void note_progress() { ++machine.progress; }

void add_instructions(const Instructions& instructions) {
  machine.instructions.push_back(instructions);
}

Order order() { return machine.order; }

uint64_t random_number() {  // splitmix64
  uint64_t x = machine.random_state += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

namespace {
int emulated_arch = 80, emulated_multiprocessors = 3, emulated_residents = 1;
}
void set_device(int arch, int num_multiprocessors, int resident_blocks) {
  emulated_arch = arch;
  emulated_multiprocessors = num_multiprocessors;
  emulated_residents = resident_blocks;
}
int arch() { return emulated_arch; }
int num_multiprocessors() { return emulated_multiprocessors; }
int resident_blocks() { return emulated_residents; }

void fail(const std::string& message) {
  fail_in_block("thread " + std::to_string(threadIdx.x) + ": " + message);
}

void fail_at(const std::string& message, const void* site) {
  fail_in_block(site == nullptr ? message : message + ": " + place(site));
}

// The host's side ---------------------------------------------------------------------------------

void set_order(Order order, uint64_t seed) {
  machine.order = order;
  machine.is_order_set = true;
  machine.random_state = seed;
}

void set_late_warp(int warp) { machine.late_warp = warp; }

void run(const void* kernel, int64_t blocks, int threads, int64_t shared_bytes,
         void (*thread)(void*), void* context) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  if (blocks == 0) return;
  if (blocks < 0 || blocks >= int64_t{1} << 31 || threads <= 0 || threads > kMaxThreads ||
      threads % kWarpSize != 0 || shared_bytes < 0 || shared_bytes > kMaxSharedBytes) {
    throw Error(ErrorCode::kInternal,
                "CUDA emulator: cannot launch " + std::to_string(blocks) + " blocks of " +
                    std::to_string(threads) + " threads with " + std::to_string(shared_bytes) +
                    " bytes of dynamic shared memory (whole warps, 1024 threads, 227 KiB).");
  }
  static const bool is_ready = [] {
    if (!machine.is_order_set) order_from_environment();
    static std::array<unsigned char, 64 * 1024> stack;
    const stack_t alternative{.ss_sp = stack.data(), .ss_flags = 0, .ss_size = stack.size()};
    sigaltstack(&alternative, nullptr);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, nullptr);
    sigaction(SIGBUS, &action, nullptr);
    return true;
  }();
  static_cast<void>(is_ready);

  machine.kernel = kernel;
  machine.thread_function = thread;
  machine.context = context;
  machine.shared_bytes = static_cast<size_t>(shared_bytes);
  blockDim = dim3(static_cast<unsigned>(threads));
  gridDim = dim3(static_cast<unsigned>(blocks));
  const int64_t start =
      machine.order == Order::kRandom ? static_cast<int64_t>(random_number() % blocks) : 0;
  run_blocks(blocks, start);
  machine.kernel = nullptr;
}

}  // namespace sparline::cuda::emulator
