#pragma once
#include <cuda.h>
#include <map>
#include "cuda/common/platform.cuh"
inline uint32_t atomic_dummy;
namespace sparline::cuda {
using Barrier = uint64_t;
struct Bar { int64_t init : 10, pending : 12, phase : 10, tx : 32; };
inline Bar get(Barrier& b) { return std::bit_cast<Bar>(b); }
inline void put(Barrier& b, Bar x) { if (x.pending == 0 && x.tx == 0) { x.phase ^= 1; x.pending = x.init; } b = std::bit_cast<uint64_t>(x); }
inline void init(Barrier& b, uint32_t n) { Bar x{}; x.init = n; x.pending = n; x.phase = 0; x.tx = 0; b = std::bit_cast<uint64_t>(x); }
inline void fence_barrier_init() {}
inline void fence_async() {}
inline void arrive(Barrier& b) { Bar x = get(b); if (x.pending <= 0) emulator::fail("too many arrivals"); x.pending = x.pending - 1; put(b, x); }
inline void complete(Barrier& b, int bytes) { Bar x = get(b); x.tx = x.tx - bytes; put(b, x); }
inline void arrive_expecting(Barrier& b, uint32_t bytes) { Bar x = get(b); if (x.pending <= 0) emulator::fail("too many arrivals"); x.pending = x.pending - 1; x.tx = x.tx + bytes; put(b, x); }
inline bool has_ended(Barrier& b, uint32_t parity) { return (get(b).phase & 1) != int(parity); }
inline void wait(Barrier& b, uint32_t parity) { int n = 0; while (!has_ended(b, parity)) { if (++n > 20000) emulator::fail("deadlock in wait, barrier at byte " + std::to_string((unsigned char*)&b - emulator::dynamic_shared())); emulator::barrier(); } }
inline std::map<std::pair<int,int>, int> g_named; // arrivals by id
inline int g_count[16], g_gen[16];
inline void arrive_named(int id, int n) { if (++g_count[id] == n) { g_count[id] = 0; ++g_gen[id]; } }
inline void sync_named(int id, int n) { int gen = g_gen[id]; arrive_named(id, n); emulator::barrier(); int k = 0; while (g_gen[id] == gen) { if (++k > 20000) emulator::fail("deadlock in named"); emulator::barrier(); } }
template <int k> inline void give_back_registers() {}
template <int k> inline void take_registers() {}
inline bool elect_one() { return threadIdx.x % 32 == 0; }
struct FakeMap { const unsigned char* data; int64_t sizes[4]; int64_t strides[4]; int box; };
static_assert(sizeof(FakeMap) <= sizeof(CUtensorMap));
inline void load_box(void* shared, const CUtensorMap& map, Barrier& barrier, int32_t d, int32_t n, int32_t h, int32_t b) {
  FakeMap m; std::memcpy(&m, &map, sizeof(m));
  const int64_t off = (unsigned char*)shared - emulator::dynamic_shared();
  if (off % 1024) emulator::fail("box not aligned");
  if (h < 0 || h >= m.sizes[2] || b < 0 || b >= m.sizes[3]) emulator::fail("box head out of range");
  for (int r = 0; r < m.box; ++r) for (int c = 0; c < 8; ++c) {
    unsigned char v[16] = {};
    if (n + r >= 0 && n + r < m.sizes[1]) std::memcpy(v, m.data + 2 * (b * m.strides[3] + h * m.strides[2] + (n + r) * m.strides[1] + d) + c * 16, 16);
    std::memcpy((unsigned char*)shared + r * 128 + ((c ^ (r % 8)) * 16), v, 16);
  }
  complete(barrier, m.box * 128);
}
inline void load_bytes(void* shared, const void* g, uint32_t bytes, Barrier& b) { if ((uintptr_t)g % 16 || bytes % 16) emulator::fail("bulk alignment"); std::memcpy(shared, g, bytes); complete(b, bytes); }
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int k> inline void wgmma_wait() { __syncwarp(); }
inline uint32_t matrix_descriptor(SharedAddress a, uint32_t stride) { return stride >> 4 << 16 | (uint32_t)(a - (SharedAddress)emulator::dynamic_shared()) >> 4; }
template <class T> inline float el(uint32_t w, int i) { uint16_t x = i ? w >> 16 : w; if constexpr (std::is_same_v<T, bf16>) return std::bit_cast<float>(uint32_t(x) << 16); else return __half2float(std::bit_cast<fp16>(x)); }
template <class T, int kColumns, bool kIsTransposed, int kSize>
inline void wgmma(float (&d)[kSize], const uint32_t* a, uint32_t desc, int adds) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float A[2][16];
  for (int tt = 0; tt < 4; ++tt) for (int r = 0; r < 4; ++r) { uint32_t w = __shfl_sync(0xffffffffu, a[r], g * 4 + tt); for (int e = 0; e < 2; ++e) A[r % 2][(r / 2) * 8 + tt * 2 + e] = el<T>(w, e); }
  const uint32_t start = (desc & 0xffff) * 16, stride = (desc >> 16) * 16;
  const unsigned char* base = emulator::dynamic_shared();
  for (int n8 = 0; n8 < kColumns / 8; ++n8) for (int e = 0; e < 2; ++e) {
    const int n = n8 * 8 + t * 2 + e; float s[2] = {0, 0};
    for (int k = 0; k < 16; ++k) {
      uint32_t addr = kIsTransposed ? start + k * 128 + (n / 64) * stride + (n % 64) * 2 : start + n * 128 + k * 2;
      addr ^= ((addr >> 7) & 7) << 4;
      uint16_t x; std::memcpy(&x, base + addr, 2); float bv = el<T>(x, 0);
      s[0] += A[0][k] * bv; s[1] += A[1][k] * bv;
    }
    for (int half = 0; half < 2; ++half) { float& to = d[n8 * 4 + half * 2 + e]; to = adds ? to + s[half] : s[half]; }
  }
}
}  // namespace sparline::cuda
