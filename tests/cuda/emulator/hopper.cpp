// SPDX-License-Identifier: Apache-2.0
//
// Barriers, copies and products: what they hold, and when they happen. hopper.h says what is
// checked.
#include "emulator/hopper.h"

#include <array>
#include <map>
#include <memory>
#include <vector>

#include "cuda/sm90/tensor_map.h"

namespace sparline::cuda {
namespace emulator {

int64_t num_boxes = 0, num_counts = 0;

namespace {

constexpr int kWarpSize = 32, kGroupThreads = 128, kGroupWarps = 4;

enum WaitKind { kBarrier = 1, kNamedBarrier, kWarpgroup, kProducts };

/// What a Barrier holds.
struct BarrierState {
  uint16_t num_arrivals;      // of a phase
  uint16_t num_missing : 15;  // in this one
  uint16_t parity : 1;
  int32_t missing_bytes;
};
static_assert(sizeof(BarrierState) == sizeof(Barrier));

struct KnownBarrier {
  Barrier value;
  unsigned initialiser;
  bool is_made_known;
};

/// On its way: rows of a box, or one row of bytes.
struct Copy {
  Barrier* barrier;
  unsigned char* to;
  const unsigned char* from;
  int64_t num_bytes;
  bool is_box;
  EmulatedTensorMap map;  // of a box
  int64_t d, n, num_rows;
  const void* site;
};

struct NamedBarrier {
  int num_arrived = 0, num_threads = 0;
  uint64_t num_phases = 0;
  uint32_t num_counted = 0, last_count = 0;  // of this phase, and of the last one
};

/// Of a warpgroup.
struct Product {
  uint64_t idx;  // of the block's, as they began
  int num_columns;
  bool is_bf16;
  std::array<WgmmaCall, kGroupThreads> calls;  // their `a` is no longer there
  std::array<std::array<float, 16>, 64> a;
  std::vector<uint16_t> a_bits,
      b_bits;               // as shared memory was at the start; a: where it lies there
  std::vector<float> sums;  // 64 x num_columns, once it has read its operands
};

/// The registers of a D, from the first product under way that adds to it to the last one.
struct Accumulator {
  float* d;
  int size, num_products;
  std::vector<float> values;
};

struct ProductWarp {
  std::vector<std::vector<std::shared_ptr<Product>>> groups;  // oldest first
  std::vector<std::shared_ptr<Product>> open;                 // not committed
  bool has_fence = false;
  int registers = 0;  // as set; 0: what the kernel began with
};

struct Warpgroup {
  std::array<ProductWarp, kGroupWarps> warps;
  std::array<std::vector<Accumulator>, kGroupThreads> accumulators;
  std::array<const WgmmaCall*, kGroupThreads> calls = {};  // of threads that are at a product
  int num_calls = 0;
};

struct BlockState {
  std::map<Barrier*, KnownBarrier> barriers;
  std::vector<Copy> copies;
  std::array<NamedBarrier, 16> named_barriers;
  std::vector<Warpgroup> groups;
  uint64_t num_products = 0;
};

std::map<unsigned, BlockState> states;  // by blockIdx.x, of blocks that use any of this

BlockState& state() {
  const auto [own, is_new] = states.try_emplace(blockIdx.x);
  if (is_new) own->second.groups.resize((blockDim.x + kGroupThreads - 1) / kGroupThreads);
  return own->second;
}

int64_t offset(const void* shared) {
  return static_cast<const unsigned char*>(shared) - dynamic_shared();
}

std::string byte_of(const void* shared) { return "byte " + std::to_string(offset(shared)); }

void check_shared(const void* shared, int64_t num_bytes, int64_t alignment, const char* what) {
  const int64_t at = offset(shared);
  if (at < 0 || at + num_bytes > static_cast<int64_t>(dynamic_shared_bytes())) {
    fail(std::string(what) + ": " + byte_of(shared) + " is not in the " +
         std::to_string(dynamic_shared_bytes()) + " bytes of dynamic shared memory");
  }
  if (at % alignment != 0) {
    fail(std::string(what) + ": " + byte_of(shared) + " of shared memory is not a multiple of " +
         std::to_string(alignment));
  }
}

/// All lanes of the warp, with the same value; the last one acts.
void meet_whole_warp(const char* what, uint64_t value, void (*action)(uint64_t), const void* site) {
  Call call{.op = Op::kTogether, .value = value, .what = what, .action = action, .site = site};
  meet(call);
}

// Barriers ----------------------------------------------------------------------------------------

BarrierState read(Barrier& barrier, const char* what) {
  const auto known = state().barriers.find(&barrier);
  if (known == state().barriers.end()) {
    fail(std::string(what) + ": nobody has initialised the mbarrier at " + byte_of(&barrier));
  }
  if (!known->second.is_made_known && known->second.initialiser != threadIdx.x) {
    fail(std::string(what) + ": no fence_barrier_init since the mbarrier at " + byte_of(&barrier) +
         " was initialised");
  }
  return std::bit_cast<BarrierState>(barrier);
}

void change(Barrier& barrier, int num_arrivals, int bytes) {
  constexpr int kMostBytes = (1 << 20) - 1;
  auto to = std::bit_cast<BarrierState>(barrier);
  if (state().barriers.at(&barrier).value != barrier) {
    fail("the mbarrier at " + byte_of(&barrier) + " was overwritten");
  }
  if (num_arrivals > to.num_missing) {
    fail("arrive: the mbarrier at " + byte_of(&barrier) + " expects no more arrivals");
  }
  to.num_missing = static_cast<uint16_t>(to.num_missing - num_arrivals);
  to.missing_bytes += bytes;
  if (to.missing_bytes > kMostBytes || to.missing_bytes < -kMostBytes) {
    fail("the mbarrier at " + byte_of(&barrier) + " cannot count so many bytes");
  }
  const bool has_ended = to.num_missing == 0 && to.missing_bytes == 0;
  const uint64_t parity = to.parity;
  if (has_ended) {
    to.num_missing = to.num_arrivals;
    to.parity ^= 1;
  }
  barrier = state().barriers.at(&barrier).value = std::bit_cast<Barrier>(to);
  if (has_ended) {
    wake([&](const Wait& wait, int) {
      return wait.kind == kBarrier && wait.at == &barrier && wait.value == parity;
    });
  }
}

// Copies ------------------------------------------------------------------------------------------

void start_copy(const Copy& copy) {
  read(*copy.barrier, "a copy");
  state().copies.push_back(copy);
  std::memset(copy.to, 0xff, static_cast<size_t>(copy.num_bytes));
}

/// Rows of 64 elements, their 16-byte chunks swizzled; zeros past the ends of the tensor.
void deliver_box(const Copy& copy) {
  const EmulatedTensorMap& map = copy.map;
  const int64_t num_elements = std::clamp<int64_t>(map.sizes[0] - copy.d, 0, 64);
  for (int64_t r = 0; r < map.box_rows; ++r) {
    std::array<unsigned char, 128> row = {};
    const int64_t n = copy.n + r;
    if (n >= 0 && n < map.sizes[1] && r < copy.num_rows) {
      std::memcpy(row.data(), copy.from + r * map.strides[1] * 2,
                  static_cast<size_t>(num_elements * 2));
    }
    for (int64_t chunk = 0; chunk < 8; ++chunk) {
      std::memcpy(copy.to + r * 128 + (chunk ^ r % 8) * 16, row.data() + chunk * 16, 16);
    }
  }
}

void deliver(const Copy& copy) {
  if (copy.is_box) {
    deliver_box(copy);
  } else {
    std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.num_bytes));
  }
  change(*copy.barrier, 0, -static_cast<int>(copy.num_bytes));
}

/// All copies to one barrier that a thread waits for.
bool finish_copies() {
  std::vector<Barrier*> candidates;
  for (const Waiting& one : waiting()) {
    if (one.wait->kind != kBarrier) continue;
    for (const Copy& copy : state().copies) {
      if (copy.barrier != one.wait->at) continue;
      candidates.push_back(copy.barrier);
      break;
    }
  }
  if (candidates.empty()) return false;
  const size_t pick = order() == Order::kRandom    ? random_number() % candidates.size()
                      : order() == Order::kReverse ? candidates.size() - 1
                                                   : 0;
  Barrier* const barrier = candidates[pick];
  std::vector<Copy> others, own;
  for (const Copy& copy : state().copies) (copy.barrier == barrier ? own : others).push_back(copy);
  state().copies = std::move(others);
  for (const Copy& copy : own) deliver(copy);
  return true;
}

// Products ----------------------------------------------------------------------------------------

float to_float(uint16_t bits, bool is_bf16) {
  if (is_bf16) return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  static const auto kHalves = [] {
    std::vector<float> table(1 << 16);
    for (uint32_t n = 0; n < table.size(); ++n) {
      table[n] = __half2float(std::bit_cast<__half>(static_cast<uint16_t>(n)));
    }
    return table;
  }();
  return kHalves[bits];
}

/// 16 x size elements at a descriptor: element k of row or column n at [k * size + n]. A matrix
/// whose rows are the n lies in rows of 64 k; transposed, in 16 rows of 64 n.
std::vector<uint16_t> read_operand(uint32_t descriptor, bool is_transposed, int size) {
  const uint32_t begin = (descriptor & 0xffff) * 16, column_stride = (descriptor >> 16) * 16;
  const unsigned char* const shared = dynamic_shared();
  std::vector<uint16_t> bits(static_cast<size_t>(16 * size));
  for (uint32_t k = 0; k < 16; ++k) {
    for (uint32_t n = 0; n < static_cast<uint32_t>(size); ++n) {
      uint32_t at = is_transposed ? begin + k * 128 + n / 64 * column_stride + n % 64 * 2
                                  : begin + n * 128 + k * 2;
      at ^= (at >> 7 & 7) << 4;
      if (at + 2 > dynamic_shared_bytes()) {
        fail("wgmma: byte " + std::to_string(at) + " is not in the " +
             std::to_string(dynamic_shared_bytes()) + " bytes of dynamic shared memory");
      }
      std::memcpy(&bits[k * static_cast<uint32_t>(size) + n], shared + at, 2);
    }
  }
  return bits;
}

void check_same(const std::vector<uint16_t>& before, const std::vector<uint16_t>& now,
                const char* operand, const void* site) {
  if (before == now) return;
  fail_at(std::string("wgmma: shared memory of ") + operand +
              " has changed while a product was under way, given back or filled too early",
          site);
}

/// Reads the operands and multiplies.
void carry_out(Product& p) {
  if (!p.sums.empty()) return;
  const WgmmaCall& call = p.calls[0];
  check_same(p.b_bits, read_operand(call.b_descriptor, call.is_b_transposed, p.num_columns), "B",
             call.site);
  if (!p.a_bits.empty()) {
    check_same(p.a_bits, read_operand(call.a_descriptor, call.is_a_transposed, 64), "A", call.site);
    for (size_t row = 0; row < 64; ++row) {
      for (size_t k = 0; k < 16; ++k) p.a[row][k] = to_float(p.a_bits[k * 64 + row], p.is_bf16);
    }
  }
  const auto num_columns = static_cast<size_t>(p.num_columns);
  std::vector<float> b(16 * num_columns);
  for (size_t n = 0; n < b.size(); ++n) b[n] = to_float(p.b_bits[n], p.is_bf16);
  p.sums.assign(64 * num_columns, 0.0f);
  for (size_t row = 0; row < 64; ++row) {
    float* const to = p.sums.data() + row * num_columns;
    for (size_t k = 0; k < 16; ++k) {
      const float x = p.a[row][k];
      const float* const from = b.data() + k * num_columns;
      for (size_t n = 0; n < num_columns; ++n) to[n] += x * from[n];
    }
  }
}

constexpr uint32_t kPoison = 0x7f85a5a5;  // a signalling NaN: any arithmetic changes it

Accumulator* find(std::vector<Accumulator>& all, const float* d) {
  for (Accumulator& own : all) {
    if (own.d == d) return &own;
  }
  return nullptr;
}

/// D of a product that has been carried out, in a warp of the warpgroup.
void add_up(const Product& p, Warpgroup& group, int warp) {
  for (int t = warp * kWarpSize; t < (warp + 1) * kWarpSize; ++t) {
    const WgmmaCall& call = p.calls[static_cast<size_t>(t)];
    auto& all = group.accumulators[static_cast<size_t>(t)];
    Accumulator& own = *find(all, call.d);
    const int first_row = warp * 16 + t % kWarpSize / 4;
    for (int n = 0; n < own.size; ++n) {
      const int row = first_row + n / 2 % 2 * 8, column = n / 4 * 8 + t % 4 * 2 + n % 2;
      const float sum = p.sums[static_cast<size_t>(row * p.num_columns + column)];
      float& value = own.values[static_cast<size_t>(n)];
      value = call.adds ? value + sum : sum;
    }
    if (--own.num_products > 0) continue;
    for (int n = 0; n < own.size; ++n) {
      if (std::bit_cast<uint32_t>(own.d[n]) != kPoison) {
        fail_at("wgmma: register " + std::to_string(n) + " of D of thread " + std::to_string(t) +
                    " of a warpgroup was written while a product was under way",
                call.site);
      }
      own.d[n] = own.values[static_cast<size_t>(n)];
    }
    all.erase(all.begin() + (&own - all.data()));
  }
}

void start_product_of_group(Warpgroup& group) {
  auto product = std::make_shared<Product>();
  const WgmmaCall& first = *group.calls[0];
  for (size_t t = 0; t < kGroupThreads; ++t) {
    const WgmmaCall& own = *group.calls[t];
    if ((own.a == nullptr) != (first.a == nullptr) || own.a_descriptor != first.a_descriptor ||
        own.b_descriptor != first.b_descriptor || own.num_columns != first.num_columns ||
        own.adds != first.adds || own.is_bf16 != first.is_bf16) {
      fail("wgmma: threads 0 and " + std::to_string(t) +
           " of a warpgroup start different products");
    }
    product->calls[t] = own;
  }
  product->idx = state().num_products++;
  product->num_columns = first.num_columns;
  product->is_bf16 = first.is_bf16;
  product->b_bits = read_operand(first.b_descriptor, first.is_b_transposed, first.num_columns);
  if (first.a == nullptr) {
    product->a_bits = read_operand(first.a_descriptor, first.is_a_transposed, 64);
  } else {
    for (size_t t = 0; t < kGroupThreads; ++t) {
      const size_t row = t / kWarpSize * 16 + t % kWarpSize / 4, column = t % 4 * 2;
      for (size_t n = 0; n < 4; ++n) {
        const uint32_t pair = group.calls[t]->a[n];
        float* const to = product->a[row + n % 2 * 8].data() + column + n / 2 * 8;
        to[0] = to_float(static_cast<uint16_t>(pair & 0xffff), first.is_bf16);
        to[1] = to_float(static_cast<uint16_t>(pair >> 16), first.is_bf16);
      }
    }
  }
  for (size_t t = 0; t < kGroupThreads; ++t) {
    const WgmmaCall& call = *group.calls[t];
    auto& all = group.accumulators[t];
    const int size = call.num_columns / 2;
    Accumulator* own = find(all, call.d);
    if (own == nullptr) {
      if (!group.warps[t / kWarpSize].has_fence) {
        fail("wgmma: no wgmma_fence before the first product to a D");
      }
      all.push_back({.d = call.d, .size = size, .num_products = 0, .values = {}});
      own = &all.back();
      own->values.assign(call.d, call.d + size);
      for (int n = 0; n < size; ++n) call.d[n] = std::bit_cast<float>(kPoison);
    }
    if (own->size != size) fail("wgmma: products of different widths to the same D");
    ++own->num_products;
  }
  for (ProductWarp& warp : group.warps) warp.open.push_back(product);
}

ProductWarp& product_warp(size_t warp) {
  return state().groups[warp / kGroupWarps].warps[warp % kGroupWarps];
}

/// Of a warp of which all lanes wait for them. The ones that began first, so that no warp gets
/// ahead of those whose products began before its own; at random any.
bool finish_products() {
  struct Candidate {
    int warp, num_lanes;
    uint64_t num_pending, last_product;
  };
  std::vector<Candidate> candidates;
  for (const Waiting& one : waiting()) {
    if (one.wait->kind != kProducts) continue;
    const int warp = one.thread / kWarpSize;
    if (candidates.empty() || candidates.back().warp != warp) {
      const auto& groups = product_warp(static_cast<size_t>(warp)).groups;
      const auto& last = groups[groups.size() - 1 - one.wait->value];
      const uint64_t last_product = last.empty() ? 0 : last.back()->idx;
      candidates.push_back({warp, 0, one.wait->value, last_product});
    }
    ++candidates.back().num_lanes;
  }
  std::erase_if(candidates, [](const Candidate& own) { return own.num_lanes < kWarpSize; });
  if (candidates.empty()) return false;
  if (order() == Order::kReverse) std::reverse(candidates.begin(), candidates.end());
  const auto begins_before = [](const Candidate& x, const Candidate& y) {
    return x.last_product < y.last_product;
  };
  const auto [warp, num_lanes, num_pending, last_product] =
      order() == Order::kRandom
          ? candidates[random_number() % candidates.size()]
          : *std::min_element(candidates.begin(), candidates.end(), begins_before);
  Warpgroup& group = state().groups[static_cast<size_t>(warp / kGroupWarps)];
  ProductWarp& own = product_warp(static_cast<size_t>(warp));
  while (own.groups.size() > num_pending) {
    for (const auto& product : own.groups.front()) {
      carry_out(*product);
      add_up(*product, group, warp % kGroupWarps);
    }
    own.groups.erase(own.groups.begin());
  }
  own.has_fence = false;
  wake([own_warp = warp](const Wait& wait, int thread) {
    return wait.kind == kProducts && thread / kWarpSize == own_warp;
  });
  return true;
}

// What the scheduler calls ------------------------------------------------------------------------

void check_registers(const BlockState& own) {
  constexpr int kRegisters = 64 * 1024;
  const int num_warps = static_cast<int>(blockDim.x) / kWarpSize;
  const int at_first = std::min(kRegisters / static_cast<int>(blockDim.x) / 8 * 8, 255 / 8 * 8);
  int total = 0;
  bool is_set = false;
  for (int warp = 0; warp < num_warps; ++warp) {
    const Warpgroup& group = own.groups[static_cast<size_t>(warp / kGroupWarps)];
    const int registers = group.warps[static_cast<size_t>(warp % kGroupWarps)].registers;
    if (registers != group.warps[0].registers) {
      fail_at("setmaxnreg: the warps of a warpgroup have different numbers of registers", nullptr);
    }
    is_set |= registers != 0;
    total += kWarpSize * (registers != 0 ? registers : at_first);
  }
  if (is_set && total > kRegisters) {
    fail_at("setmaxnreg: the block wants " + std::to_string(total) + " registers of 65536",
            nullptr);
  }
}

void end_block() {
  if (!states.contains(blockIdx.x)) return;
  const BlockState& own = state();
  for (const Copy& copy : own.copies) {
    fail_at("the block has ended while a copy was under way", copy.site);
  }
  for (const Warpgroup& group : own.groups) {
    for (const ProductWarp& warp : group.warps) {
      for (const auto& products : warp.groups) {
        for (const auto& product : products) {
          fail_at("the block has ended without waiting for a product", product->calls[0].site);
        }
      }
      for (const auto& product : warp.open) {
        fail_at("the block has ended without committing a product", product->calls[0].site);
      }
    }
  }
  check_registers(own);
  states.erase(blockIdx.x);
}

bool finish_something() {
  if (!states.contains(blockIdx.x)) return false;
  const bool starts_with_copies =
      order() == Order::kRandom ? random_number() % 2 == 0 : order() == Order::kForward;
  return starts_with_copies ? finish_copies() || finish_products()
                            : finish_products() || finish_copies();
}

std::string describe(const Wait& wait) {
  switch (wait.kind) {
    case kBarrier: {
      const auto own = std::bit_cast<BarrierState>(*static_cast<const Barrier*>(wait.at));
      return "wait, for the end of a phase of parity " + std::to_string(wait.value) +
             " of the mbarrier at " + byte_of(wait.at) + ", whose phase of parity " +
             std::to_string(own.parity) + " lacks " + std::to_string(own.num_missing) + " of " +
             std::to_string(own.num_arrivals) + " arrivals and " +
             std::to_string(own.missing_bytes) + " bytes";
    }
    case kNamedBarrier: {
      const auto& own = *static_cast<const NamedBarrier*>(wait.at);
      return "a named barrier, " + std::to_string(&own - state().named_barriers.data()) +
             ", where " + std::to_string(own.num_arrived) + " of " +
             std::to_string(own.num_threads) + " threads have arrived";
    }
    case kWarpgroup: return "wgmma, for the other threads of the warpgroup";
    case kProducts: return "wgmma_wait";
    default: return "";
  }
}

[[maybe_unused]] const bool kIsAdded = [] {
  add_instructions(
      {.end_block = end_block, .finish_something = finish_something, .describe = describe});
  return true;
}();

/// All lanes of a warp arrive; the number of the phase that they arrived in.
uint64_t arrive_whole_warp(const char* what, int idx, int num_threads, const void* site) {
  constexpr uint64_t kIndex = 10'000;  // 10256: barrier 1 of 256 threads
  if (idx < 1 || idx > 15 || num_threads <= 0 || num_threads % kWarpSize != 0) {
    fail(std::string(what) + ": barrier " + std::to_string(idx) + " of " +
         std::to_string(num_threads) + " threads: 1 to 15, whole warps");
  }
  NamedBarrier& barrier = state().named_barriers[static_cast<size_t>(idx)];
  const uint64_t phase = barrier.num_phases;
  const auto action = [](uint64_t value) {
    NamedBarrier& own = state().named_barriers[value / kIndex];
    const int num_threads = static_cast<int>(value % kIndex);
    if (own.num_arrived != 0 && own.num_threads != num_threads) {
      fail("named barrier " + std::to_string(value / kIndex) + ": some threads say it has " +
           std::to_string(own.num_threads) + " of them, some " + std::to_string(num_threads));
    }
    own.num_threads = num_threads;
    own.num_arrived += kWarpSize;
    if (own.num_arrived < num_threads) return;
    own.num_arrived = 0;
    own.last_count = std::exchange(own.num_counted, 0);
    const uint64_t ended = own.num_phases++;
    wake([&](const Wait& wait, int) {
      return wait.kind == kNamedBarrier && wait.at == &own && wait.value == ended;
    });
  };
  meet_whole_warp(what, static_cast<uint64_t>(idx) * kIndex + static_cast<uint64_t>(num_threads),
                  action, site);
  return phase;
}

}  // namespace

void set_registers(bool takes, int num_registers) {
  const auto action = [](uint64_t value) {
    product_warp(threadIdx.x / kWarpSize).registers = static_cast<int>(value);
  };
  meet_whole_warp(takes ? "take_registers" : "give_back_registers",
                  static_cast<uint64_t>(num_registers), action, __builtin_return_address(0));
}

void wait_for_products(int num_pending_groups) {
  const void* const site = __builtin_return_address(0);
  const auto value = static_cast<uint64_t>(num_pending_groups);
  meet_whole_warp("wgmma_wait", value, nullptr, site);
  if (product_warp(threadIdx.x / kWarpSize).groups.size() <= value) return;
  park({.kind = kProducts, .value = value, .site = site});
}

void start_product(WgmmaCall call) {
  call.site = __builtin_return_address(0);
  if (blockDim.x < kGroupThreads * (threadIdx.x / kGroupThreads + 1)) {
    fail("wgmma: the block has no whole warpgroup here");
  }
  const size_t idx = threadIdx.x / kGroupThreads;
  Warpgroup& group = state().groups[idx];
  group.calls[threadIdx.x % kGroupThreads] = &call;
  if (++group.num_calls < kGroupThreads) {
    return park({.kind = kWarpgroup, .value = idx, .site = call.site});
  }
  start_product_of_group(group);
  group.num_calls = 0;
  wake([&](const Wait& wait, int) { return wait.kind == kWarpgroup && wait.value == idx; });
}

}  // namespace emulator

using emulator::fail;

// Barriers ----------------------------------------------------------------------------------------

void init(Barrier& barrier, uint32_t num_arrivals) {
  emulator::check_shared(&barrier, sizeof(barrier), sizeof(barrier), "init");
  if (num_arrivals == 0 || num_arrivals > 1024) {
    fail("init: an mbarrier of " + std::to_string(num_arrivals) + " arrivals");
  }
  const auto count = static_cast<uint16_t>(num_arrivals);
  barrier = std::bit_cast<Barrier>(emulator::BarrierState{count, count, 0, 0});
  const emulator::KnownBarrier known{barrier, threadIdx.x, false};
  if (!emulator::state().barriers.emplace(&barrier, known).second) {
    fail("init: the mbarrier at " + emulator::byte_of(&barrier) + " was initialised before");
  }
}
void fence_barrier_init() {
  for (auto& [barrier, known] : emulator::state().barriers) {
    known.is_made_known |= known.initialiser == threadIdx.x;
  }
}
void arrive(Barrier& barrier) {
  emulator::read(barrier, "arrive");
  emulator::change(barrier, 1, 0);
}
void arrive_expecting(Barrier& barrier, uint32_t bytes) {
  emulator::read(barrier, "arrive_expecting");
  emulator::change(barrier, 1, static_cast<int>(bytes));
}
void wait(Barrier& barrier, uint32_t parity) {
  const void* const site = __builtin_return_address(0);
  if (parity > 1) fail("wait: a parity is 0 or 1, not " + std::to_string(parity));
  if (emulator::read(barrier, "wait").parity != parity) return;
  emulator::park({.kind = emulator::kBarrier, .at = &barrier, .value = parity, .site = site});
}

void post(uint32_t& word, uint32_t value) {
  word = value;
  emulator::let_polling_go_on();
}
uint32_t posted(const uint32_t& word) {
  emulator::let_others_go_on(__builtin_return_address(0));
  return word;
}

void arrive_named(int idx, int num_threads) {
  emulator::arrive_whole_warp("arrive_named", idx, num_threads, __builtin_return_address(0));
}
void sync_named(int idx, int num_threads) {
  const void* const site = __builtin_return_address(0);
  const uint64_t phase = emulator::arrive_whole_warp("sync_named", idx, num_threads, site);
  auto& barrier = emulator::state().named_barriers[static_cast<size_t>(idx)];
  if (barrier.num_phases != phase) return;
  emulator::park({.kind = emulator::kNamedBarrier, .at = &barrier, .value = phase, .site = site});
}
uint32_t count_named(int idx, int num_threads, bool is_counted) {
  const void* const site = __builtin_return_address(0);
  auto& barrier = emulator::state().named_barriers[static_cast<size_t>(idx)];
  barrier.num_counted += is_counted;
  const uint64_t phase = emulator::arrive_whole_warp("count_named", idx, num_threads, site);
  if (barrier.num_phases == phase) {
    emulator::park({.kind = emulator::kNamedBarrier, .at = &barrier, .value = phase, .site = site});
  }
  return barrier.last_count;
}

bool elect_one() {
  static uint64_t elected = 0;  // a lane of the warp that met last, which goes on at once
  const auto action = [](uint64_t) {
    const auto order = emulator::order();
    elected = order == emulator::Order::kForward   ? 0
              : order == emulator::Order::kReverse ? 31
                                                   : emulator::random_number() % 32;
  };
  emulator::meet_whole_warp("elect_one", 0, action, __builtin_return_address(0));
  return threadIdx.x % 32 == elected;
}

// The copy engine ---------------------------------------------------------------------------------

namespace emulator {
namespace {

void start_box(void* shared, const CUtensorMap& encoded, Barrier& barrier, int32_t d, int32_t n,
               int64_t num_rows, bool is_cut, int32_t h, int32_t b, const void* site) {
  EmulatedTensorMap map;
  std::memcpy(&map, &encoded, sizeof(map));
  if (map.is_cut != is_cut) fail("load_box: this map is for the other kind of boxes");
  const int64_t num_bytes = int64_t{map.box_rows} * 128;
  check_shared(shared, num_bytes, 1024, "load_box");
  if (d < 0 || h < 0 || h >= map.sizes[2] || b < 0 || b >= map.sizes[3]) {
    fail("load_box: the box at (" + std::to_string(d) + ", " + std::to_string(n) + ", " +
         std::to_string(h) + ", " + std::to_string(b) + ") is of no head of the tensor");
  }
  const int64_t first = d + n * map.strides[1] + h * map.strides[2] + b * map.strides[3];
  ++num_boxes;
  start_copy({.barrier = &barrier,
              .to = static_cast<unsigned char*>(shared),
              .from = map.data + first * 2,
              .num_bytes = num_bytes,
              .is_box = true,
              .map = map,
              .d = d,
              .n = n,
              .num_rows = num_rows,
              .site = site});
}

}  // namespace
}  // namespace emulator

void load_box(void* shared, const CUtensorMap& map, Barrier& barrier, int32_t d, int32_t n,
              int32_t h, int32_t b) {
  constexpr int64_t kAll = 256;
  emulator::start_box(shared, map, barrier, d, n, kAll, false, h, b, __builtin_return_address(0));
}
void load_cut_box(void* shared, const CUtensorMap& map, Barrier& barrier, int32_t d, int32_t n,
                  int32_t num_rows, int32_t box_rows, int32_t h, int32_t b) {
  EmulatedTensorMap own;
  std::memcpy(&own, &map, sizeof(own));
  if (box_rows != own.box_rows || num_rows < 1 || num_rows > box_rows || n < 0 ||
      n + num_rows > own.sizes[1]) {
    fail("load_cut_box: rows " + std::to_string(n) + " to " + std::to_string(n + num_rows) +
         " in boxes of " + std::to_string(box_rows) + " rows");
  }
  emulator::start_box(shared, map, barrier, d, n, num_rows, true, h, b,
                      __builtin_return_address(0));
}

void load_bytes(void* shared, const void* global, uint32_t bytes, Barrier& barrier) {
  emulator::check_shared(shared, bytes, 16, "load_bytes");
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0 || bytes % 16 != 0 || bytes == 0) {
    fail("load_bytes: " + std::to_string(bytes) + " bytes: not multiples of 16");
  }
  emulator::start_copy({.barrier = &barrier,
                        .to = static_cast<unsigned char*>(shared),
                        .from = static_cast<const unsigned char*>(global),
                        .num_bytes = bytes,
                        .is_box = false,
                        .map = {},
                        .d = 0,
                        .n = 0,
                        .num_rows = 0,
                        .site = __builtin_return_address(0)});
}

namespace {

bool encode(CUtensorMap& map, const Rows& rows, int64_t num_batches, int64_t num_heads,
            int64_t num_rows, int64_t head_dim, int box_rows, bool is_cut) {
  if (!rows.is_vectorised || rows.order != nullptr) return false;
  const EmulatedTensorMap encoded{
      .data = static_cast<const unsigned char*>(static_cast<const void*>(rows.data)),
      .sizes = {head_dim, num_rows, num_heads, num_batches},
      .strides = {1, rows.stride_n, rows.stride_h, rows.stride_b},
      .box_rows = box_rows,
      .is_cut = is_cut};
  std::memcpy(static_cast<void*>(&map), &encoded, sizeof(encoded));
  return true;
}

}  // namespace

bool encode_rows(CUtensorMap& map, const Rows& rows, DType, int64_t num_batches, int64_t num_heads,
                 int64_t num_rows, int64_t head_dim, int box_rows) {
  return encode(map, rows, num_batches, num_heads, num_rows, head_dim, box_rows, false);
}
bool encode_cut_rows(CUtensorMap& map, const Rows& rows, DType, int64_t num_batches,
                     int64_t num_heads, int64_t num_rows, int64_t head_dim, int box_rows) {
  return encode(map, rows, num_batches, num_heads, num_rows, head_dim, box_rows, true);
}

// Counters in global memory -----------------------------------------------------------------------

void count_up(uint32_t* counter) {
  ++*counter;
  ++emulator::num_counts;
  emulator::note_progress();
}
uint32_t count_of(const uint32_t* counter) {
  emulator::let_others_go_on(__builtin_return_address(0));
  return *counter;
}
void wait_for_count(const uint32_t* counter, uint32_t count) {
  const void* const site = __builtin_return_address(0);
  while (*counter < count) emulator::let_others_go_on(site);
}

// Products ----------------------------------------------------------------------------------------

void wgmma_fence() {
  const auto action = [](uint64_t) { emulator::product_warp(threadIdx.x / 32).has_fence = true; };
  emulator::meet_whole_warp("wgmma_fence", 0, action, __builtin_return_address(0));
}

void wgmma_commit() {
  const auto action = [](uint64_t) {
    emulator::ProductWarp& own = emulator::product_warp(threadIdx.x / 32);
    own.groups.push_back(std::move(own.open));
    own.open.clear();
  };
  emulator::meet_whole_warp("wgmma_commit", 0, action, __builtin_return_address(0));
}

uint32_t matrix_descriptor(SharedAddress address, uint32_t column_stride_bytes) {
  const void* const at = reinterpret_cast<const void*>(address);
  emulator::check_shared(at, 16, 16, "matrix_descriptor");
  return column_stride_bytes >> 4 << 16 | static_cast<uint32_t>(emulator::offset(at)) >> 4;
}

}  // namespace sparline::cuda
