// Forward selective scan of Mamba-1 (Gu and Dao 2023, arXiv 2312.00752), compiled at run time for the shapes it meets.
//
// A group of GROUP lanes holds CHANNELS neighbouring channels; each lane keeps STATES of their state dimensions in registers.
// B and C of TILE frames are converted to float once for the whole block and read as broadcasts from shared memory.
// Softplus and the gate are computed once a frame, by the lane whose turn it is, and handed to the others by shuffles.
//
// Macros set by the host: NSTATE, STATES, GROUP, CHANNELS, THREADS, TILE, KIND (0 float, 1 bfloat16, 2 half), HAS_Z, HAS_D, HAS_BIAS,
// SOFTPLUS, REVERSE, OUTPUT (0: only each chunk's last state and sum of steps), POLYNOMIAL (states of a lane whose exponential
// runs on the multiply-add units).

#define LOG2E 1.4426950408889634f

// CHANNELS neighbouring values as floats, in one load.
__device__ __forceinline__ void read_channels(const value_t* from, float* to) {
#if CHANNELS == 2 && KIND == 0
  const float2 pair = *reinterpret_cast<const float2*>(from);
  to[0] = pair.x; to[1] = pair.y;
#elif CHANNELS == 2
  const unsigned pair = *reinterpret_cast<const unsigned*>(from);
  to[0] = widen((value_t)(pair & 0xffffu)); to[1] = widen((value_t)(pair >> 16));
#else
  to[0] = widen(*from);
#endif
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 2^x for -126 < x <= 0 on the multiply-add units; smaller x give 2^-126. Degree 5 on [-0.5, 0.5], relative error 1e-7.
__device__ __forceinline__ float exp2_polynomial(float x) {
  x = fmaxf(x, -126.0f);
  float shifted = x + 12582912.0f;  // 1.5 * 2^23: the integer part lands in the low bits
  float f = x - (shifted - 12582912.0f);
  float p = 1.34004e-3f;
  p = fmaf(p, f, 9.67604e-3f);
  p = fmaf(p, f, 5.550327e-2f);
  p = fmaf(p, f, 2.4022107e-1f);
  p = fmaf(p, f, 6.9314721e-1f);
  p = fmaf(p, f, 1.00000008f);
  return __int_as_float(__float_as_int(p) + (__float_as_int(shifted) << 23));
}

#if KIND == 0
// At least as exact as the values it meets.
__device__ __forceinline__ float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }
__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }
#else
__device__ __forceinline__ float softplus(float x) {
  // log1p(e^x), above 20 the identity, as in torch. The logarithm of 1 + e^x loses the small end: a series takes over there.
  const float e = exp2_fast(x * LOG2E);
  const float y = e < 1.0e-2f ? e * (1.0f - e * (0.5f - e * (0.33333333f - 0.25f * e))) : __logf(1.0f + e);
  return x > 20.0f ? x : y;
}
__device__ __forceinline__ float silu(float x) { return x * __fdividef(1.0f, 1.0f + exp2_fast(-x * LOG2E)); }
#endif

#define LANES_PER_WARP (32 / GROUP)               // channel slots of a warp
#define WARPS (THREADS / 32)
#define BLOCK_CHANNELS (WARPS * LANES_PER_WARP * CHANNELS)
#define PADDED (STATES * GROUP)
#define STEPS (GROUP > 4 ? GROUP : 4)

__device__ __forceinline__ void write_channels(value_t* to, const float* from) {
#if CHANNELS == 2 && KIND == 0
  *reinterpret_cast<float2*>(to) = make_float2(from[0], from[1]);
#elif CHANNELS == 2
  *reinterpret_cast<unsigned*>(to) = (unsigned)narrow(from[0]) | ((unsigned)narrow(from[1]) << 16);
#else
  *to = narrow(from[0]);
#endif
}

// STATES neighbouring floats of shared memory, in the widest loads that their alignment allows.
__device__ __forceinline__ void read_states(const float* from, float* to) {
#if STATES % 4 == 0
#pragma unroll
  for (int n = 0; n < STATES; n += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + n);
    to[n] = four.x; to[n + 1] = four.y; to[n + 2] = four.z; to[n + 3] = four.w;
  }
#elif STATES % 2 == 0
#pragma unroll
  for (int n = 0; n < STATES; n += 2) {
    const float2 two = *reinterpret_cast<const float2*>(from + n);
    to[n] = two.x; to[n + 1] = two.y;
  }
#else
#pragma unroll
  for (int n = 0; n < STATES; ++n) to[n] = from[n];
#endif
}

struct Arguments {
  const value_t* u; const value_t* delta; const value_t* b; const value_t* c; const value_t* z;
  const float* a; const float* d; const float* bias;
  const long long* num_frames;     // (B,) or null
  const float* initial;            // (B, E, N), or (B, chunks, E, N) when there are several chunks; null: zeros
  value_t* y;                      // (B, T, E)
  float* last;                     // (B, E, N), or (B, chunks, E, N) without output
  float* steps;                    // (B, chunks, E) sum of the step sizes, without output
  long long u_batch, u_frame, delta_batch, delta_frame, b_batch, b_frame, c_batch, c_frame, z_batch, z_frame;
  int width, frames, chunk_frames, chunks;
};

extern "C" __global__ void __launch_bounds__(THREADS) selective_scan_forward(const Arguments p) {
  __shared__ __align__(16) float tile_b[2][TILE][PADDED];
#if OUTPUT
  __shared__ __align__(16) float tile_c[2][TILE][PADDED];
#endif
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int slot = lane % LANES_PER_WARP, part = lane / LANES_PER_WARP;
  const int own = blockIdx.x * BLOCK_CHANNELS + (warp * LANES_PER_WARP + slot) * CHANNELS;
  const bool inside = own < p.width;                    // the width is a multiple of CHANNELS
  const int e0 = inside ? own : p.width - CHANNELS;     // lanes past the width repeat its end and keep nothing
  const int row = blockIdx.y, chunk = blockIdx.z;
  const int valid = p.num_frames ? (int)min((long long)p.frames, p.num_frames[row]) : p.frames;
  const int first = min(chunk * p.chunk_frames, valid), end = min(first + p.chunk_frames, valid);
  // Frame of logical step s: forwards s, backwards valid - 1 - s.
#define FRAME(s) (REVERSE ? valid - 1 - (s) : (s))

  const value_t* u = p.u + row * p.u_batch + e0;
  const value_t* delta = p.delta + row * p.delta_batch + e0;
  const value_t* b = p.b + row * p.b_batch;
#if OUTPUT
  const value_t* c = p.c + row * p.c_batch;
#if HAS_Z
  const value_t* z = p.z + row * p.z_batch + e0;
#endif
  value_t* y = p.y + (long long)row * p.frames * p.width + e0;
#endif

  float a[CHANNELS][STATES], h[CHANNELS][STATES], skip[CHANNELS], bias[CHANNELS], total[CHANNELS];
#pragma unroll
  for (int k = 0; k < CHANNELS; ++k) {
    const int e = e0 + k;
    skip[k] = 0.0f; bias[k] = 0.0f; total[k] = 0.0f;
#if HAS_D
    skip[k] = p.d[e];
#endif
#if HAS_BIAS
    bias[k] = p.bias[e];
#endif
#pragma unroll
    for (int n = 0; n < STATES; ++n) {
      const int state = part * STATES + n;
      a[k][n] = state < NSTATE ? p.a[(long long)e * NSTATE + state] * LOG2E : 0.0f;
      const long long at = (((long long)row * p.chunks + chunk) * p.width + e) * NSTATE + state;
      h[k][n] = state < NSTATE && p.initial ? p.initial[at] : 0.0f;
    }
  }

  auto load_tile = [&](int tile, int stage) {
    const int base = first + tile * TILE;
    for (int index = threadIdx.x; index < TILE * PADDED; index += THREADS) {
      const int s = min(base + index / PADDED, end - 1), state = index % PADDED;
      const int t = FRAME(s);
      tile_b[stage][index / PADDED][state] = state < NSTATE ? widen(b[(long long)t * p.b_frame + state]) : 0.0f;
#if OUTPUT
      tile_c[stage][index / PADDED][state] = state < NSTATE ? widen(c[(long long)t * p.c_frame + state]) : 0.0f;
#endif
    }
  };

  // STEPS frames are fetched while the STEPS before them are worked on; past the end the last one is fetched again.
  float next_u[STEPS][CHANNELS], next_delta[STEPS][CHANNELS];
#if OUTPUT && HAS_Z
  float next_z[STEPS][CHANNELS];
#endif
  auto fetch = [&](int s0) {
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      const int t = FRAME(min(s0 + i, end - 1));
      read_channels(u + (long long)t * p.u_frame, next_u[i]);
      read_channels(delta + (long long)t * p.delta_frame, next_delta[i]);
#if OUTPUT && HAS_Z
      read_channels(z + (long long)t * p.z_frame, next_z[i]);
#endif
    }
  };

  const int tiles = end > first ? (end - first + TILE - 1) / TILE : 0;
  if (tiles > 0) {
    fetch(first);
    load_tile(0, 0);
  }
  __syncthreads();
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) load_tile(tile + 1, (tile + 1) & 1);
    const int stage = tile & 1;
#pragma unroll 1
    for (int i0 = 0; i0 < TILE; i0 += STEPS) {
      const int s0 = first + tile * TILE + i0;
      if (s0 >= end) break;
      float input[STEPS][CHANNELS], step[STEPS][CHANNELS], out[STEPS][CHANNELS];
#if OUTPUT && HAS_Z
      float gate[STEPS][CHANNELS];
#endif
#pragma unroll
      for (int k = 0; k < CHANNELS; ++k) {
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
          input[i][k] = next_u[i][k];
          step[i][k] = next_delta[i][k] + bias[k];
#if OUTPUT && HAS_Z
          gate[i][k] = next_z[i][k];
#endif
        }
#if SOFTPLUS
        // Lane `part` of a group computes the frames i with i % GROUP == part, for all of them.
#pragma unroll
        for (int i = 0; i < STEPS; i += GROUP) {
          float mine = step[i][k];
#pragma unroll
          for (int g = 1; g < GROUP; ++g)
            if (part == g) mine = step[i + g][k];
          mine = softplus(mine);
#pragma unroll
          for (int g = 0; g < GROUP; ++g)
            step[i + g][k] = GROUP == 1 ? mine : __shfl_sync(0xffffffffu, mine, slot + g * LANES_PER_WARP);
        }
#endif
      }
      if (s0 + STEPS > end) {
        // A step of size zero leaves the state alone.
#pragma unroll
        for (int i = 0; i < STEPS; ++i)
#pragma unroll
          for (int k = 0; k < CHANNELS; ++k)
            if (s0 + i >= end) step[i][k] = 0.0f;
      }
      fetch(s0 + STEPS);
#pragma unroll
      for (int i = 0; i < STEPS; ++i) {
        float weights_b[STATES];
        read_states(&tile_b[stage][i0 + i][part * STATES], weights_b);
#if OUTPUT
        float weights_c[STATES];
        read_states(&tile_c[stage][i0 + i][part * STATES], weights_c);
#endif
#pragma unroll
        for (int k = 0; k < CHANNELS; ++k) {
          const float drive = step[i][k] * input[i][k];
          float even = 0.0f, odd = 0.0f;
#pragma unroll
          for (int n = 0; n < STATES; ++n) {
            const float exponent = step[i][k] * a[k][n];
            const float decay = n < POLYNOMIAL ? exp2_polynomial(exponent) : exp2_fast(exponent);
            h[k][n] = fmaf(decay, h[k][n], drive * weights_b[n]);
#if OUTPUT
            if (n & 1) odd = fmaf(weights_c[n], h[k][n], odd); else even = fmaf(weights_c[n], h[k][n], even);
#endif
          }
          out[i][k] = even + odd;
#if !OUTPUT
          total[k] += step[i][k];
#endif
        }
      }
#if OUTPUT
      // Lane `part` finishes the frames i with i % GROUP == part: sums the group's shares, adds the skip, gates, stores.
#pragma unroll
      for (int i = 0; i < STEPS; i += GROUP) {
        float value[CHANNELS];
#pragma unroll
        for (int k = 0; k < CHANNELS; ++k) {
          float mine = out[i][k], mine_u = input[i][k];
#if HAS_Z
          float mine_z = gate[i][k];
#endif
#if GROUP > 1
#pragma unroll
          for (int g = 0; g < GROUP; ++g) {
            float sum = out[i + g][k];
#pragma unroll
            for (int distance = LANES_PER_WARP; distance < 32; distance *= 2)
              sum += __shfl_xor_sync(0xffffffffu, sum, distance);
            if (part == g) {
              mine = sum; mine_u = input[i + g][k];
#if HAS_Z
              mine_z = gate[i + g][k];
#endif
            }
          }
#endif
          value[k] = fmaf(skip[k], mine_u, mine);
#if HAS_Z
          value[k] *= silu(mine_z);
#endif
        }
        const int s = s0 + i + part;
        if (s < end && inside) write_channels(y + (long long)FRAME(s) * p.width, value);
      }
#endif
    }
    __syncthreads();
  }

#if OUTPUT
  const bool keep = inside && chunk == p.chunks - 1;
  const long long kept_row = row;
  if (keep) {  // frames past a row's end are zero; the last chunk writes them
    const float zeros[CHANNELS] = {};
    for (int t = valid + part; t < p.frames; t += GROUP) write_channels(y + (long long)t * p.width, zeros);
  }
#else
  const bool keep = inside;
  const long long kept_row = (long long)row * p.chunks + chunk;
#endif
  if (!keep) return;
#pragma unroll
  for (int k = 0; k < CHANNELS; ++k) {
#pragma unroll
    for (int n = 0; n < STATES; ++n) {
      const int state = part * STATES + n;
      if (state < NSTATE) p.last[(kept_row * p.width + e0 + k) * NSTATE + state] = h[k][n];
    }
#if !OUTPUT
    if (part == 0) p.steps[kept_row * p.width + e0 + k] = total[k];
#endif
  }
}

// The state before each chunk, from every chunk's own last state (started at zero) and its sum of steps. One thread a state.
extern "C" __global__ void carry_states(const float* a, const float* initial, const float* last, const float* steps, float* before,
                                        int batch, int width, int chunks) {
  const long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  const long long per_row = (long long)width * NSTATE;
  if (index >= batch * per_row) return;
  const long long row = index / per_row, inner = index % per_row, e = inner / NSTATE;
  const float rate = a[inner] * LOG2E;
  float h = initial ? initial[index] : 0.0f;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const long long at = row * chunks + chunk;
    before[at * per_row + inner] = h;
    h = fmaf(exp2_fast(rate * steps[at * width + e]), h, last[at * per_row + inner]);
  }
}
