// The part of CUDA C++ that the kernels use, on a CPU: one fiber a thread, blocks one after the other, a warp in step at its shuffles.
// Wrong: a thread that misses a barrier or a shuffle that others of its block or warp wait at. Shared memory begins as not-a-number.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

using std::max;
using std::min;
inline long long min(long long a, int b) { return std::min(a, (long long)b); }
struct Place { int x, y, z; };
static Place threadIdx, blockIdx, blockDim, gridDim;
#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <class To, class From> To same_bits(From from) { To to; memcpy(&to, &from, 4); return to; }
inline float __uint_as_float(unsigned x) { return same_bits<float>(x); }
inline float __int_as_float(int x) { return same_bits<float>(x); }
inline int __float_as_int(float x) { return same_bits<int>(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __logf(float x) { return logf(x); }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline unsigned short to_bfloat16(float x) { unsigned bits = same_bits<unsigned>(x); return (bits + 0x7fff + (bits >> 16 & 1)) >> 16; }

enum State { RUNS, AT_SHUFFLE, AT_BARRIER, ENDED };
struct Fiber { ucontext_t context; std::vector<char> stack; State state; float value; };
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static int current;
static void (*kernel)();
alignas(16) static float dynamic_shared[60000];

inline void wait_in(State state) { fibers[current].state = state; swapcontext(&fibers[current].context, &scheduler); }
inline void __syncthreads() { wait_in(AT_BARRIER); }
inline float shuffle(float value, int from) {
  const int me = current;
  fibers[me].value = value;
  wait_in(AT_SHUFFLE);
  const float found = fibers[(me & ~31) + from].value;
  wait_in(AT_SHUFFLE);  // nobody goes on before all have read
  return found;
}
inline float __shfl_sync(unsigned, float value, int from) { return shuffle(value, from & 31); }
inline float __shfl_xor_sync(unsigned, float value, int bits) { return shuffle(value, (current ^ bits) & 31); }

static void run_fiber() { kernel(); wait_in(ENDED); }
static int count(int first, int last, State state) {
  return std::count_if(&fibers[first], &fibers[last - 1] + 1, [=](const Fiber& fiber) { return fiber.state == state; });
}
static int run_block(int threads) {
  std::fill(dynamic_shared, dynamic_shared + 60000, NAN);
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, run_fiber, 0);
    fiber.state = RUNS;
  }
  while (count(0, threads, ENDED) < threads) {
    for (int warp = 0; warp < threads; warp += 32) {
      while (true) {
        for (current = warp; current < warp + 32; ++current)
          if (fibers[current].state == RUNS) { threadIdx.x = current; swapcontext(&scheduler, &fibers[current].context); }
        const int waiting = count(warp, warp + 32, AT_SHUFFLE);
        if (!waiting) break;
        if (waiting != 32) return 1;
        for (int lane = warp; lane < warp + 32; ++lane) fibers[lane].state = RUNS;
      }
    }
    const int ended = count(0, threads, ENDED);
    if (ended == threads) break;
    if (ended) return 2;
    for (Fiber& fiber : fibers) fiber.state = RUNS;
  }
  return 0;
}
static int run_grid(void (*entry)(), int x, int y, int z, int threads) {
  kernel = entry;
  gridDim = {x, y, z};
  blockDim = {threads, 1, 1};
  fibers.resize(threads);
  for (Fiber& fiber : fibers) fiber.stack.resize(1 << 17);
  for (blockIdx.z = 0; blockIdx.z < z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x)
        if (const int wrong = run_block(threads)) return wrong;
  return 0;
}
