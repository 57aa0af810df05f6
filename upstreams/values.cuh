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
