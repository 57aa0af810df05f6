// The values that kernels read and write, by the macro KIND: 0 float, 1 bfloat16, 2 half. Put before every source by the host.

#if KIND == 0
typedef float value_t;
__device__ __forceinline__ float widen(value_t x) { return x; }
__device__ __forceinline__ value_t narrow(float x) { return x; }
#elif KIND == 1
typedef unsigned short value_t;
__device__ __forceinline__ float widen(value_t x) { return __uint_as_float((unsigned)x << 16); }
__device__ __forceinline__ value_t narrow(float x) {
  value_t y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
#else
typedef unsigned short value_t;
__device__ __forceinline__ float widen(value_t x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}
__device__ __forceinline__ value_t narrow(float x) {
  value_t y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
#endif

// COUNT (1 or 2) neighbouring values as they lie in memory: read in one load, kept as they are until they are wanted as floats.
#if KIND == 0
typedef float2 pair_t;
#else
typedef unsigned pair_t;
#endif
template <int COUNT> struct Packed { value_t value; };
template <> struct Packed<2> { pair_t value; };
template <int COUNT> __device__ __forceinline__ Packed<COUNT> read_packed(const value_t* from) {
  return *reinterpret_cast<const Packed<COUNT>*>(from);
}
__device__ __forceinline__ void unpack(Packed<1> from, float* to) { to[0] = widen(from.value); }
__device__ __forceinline__ void unpack(Packed<2> from, float* to) {
#if KIND == 0
  to[0] = from.value.x; to[1] = from.value.y;
#else
  to[0] = widen((value_t)(from.value & 0xffffu)); to[1] = widen((value_t)(from.value >> 16));
#endif
}
template <int COUNT> __device__ __forceinline__ void read_values(const value_t* from, float* to) { unpack(read_packed<COUNT>(from), to); }
// And back in one store.
template <int COUNT> __device__ __forceinline__ void write_values(value_t* to, const float* from) {
  if constexpr (COUNT == 1) {
    *to = narrow(from[0]);
  } else {
#if KIND == 0
    *reinterpret_cast<float2*>(to) = make_float2(from[0], from[1]);
#else
    *reinterpret_cast<unsigned*>(to) = (unsigned)narrow(from[0]) | ((unsigned)narrow(from[1]) << 16);
#endif
  }
}

#define LOG2E 1.4426950408889634f
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#if KIND == 0
// At least as exact as the values it meets.
__device__ __forceinline__ float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }
__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
#else
__device__ __forceinline__ float softplus(float x) {
  // log1p(e^x), above 20 the identity, as in torch. The logarithm of 1 + e^x loses the small end: a series takes over there.
  const float e = exp2_fast(x * LOG2E);
  const float y = e < 1.0e-2f ? e * (1.0f - e * (0.5f - e * (0.33333333f - 0.25f * e))) : __logf(1.0f + e);
  return x > 20.0f ? x : y;
}
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + exp2_fast(-x * LOG2E)); }
#endif
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
