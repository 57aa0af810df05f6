// Forward selective scan of Mamba-1 (Gu and Dao 2023, arXiv 2312.00752), compiled at run time for the shapes it meets.
//
// The recurrence costs an exponential a channel, state and frame, on units that do 16 a clock and processor: all else is kept off it.
// A block has SETS sets of CHANNELS neighbouring channels and goes through time in tiles of TILE frames:
//   stage   each thread reads, a tile ahead, a few frames of one set of channels, and puts their step sizes (after softplus) and
//           drives (step u) into shared memory as floats; B and C go there too;
//   scan    GROUP lanes share a set's states, each keeps STATES of them in registers and reads what was staged as broadcasts;
//           the lanes' shares of y are summed by shuffles and put into shared memory;
//   finish  the thread that staged a frame adds the skip, gates and stores: whole lines at a time.
// Everything staged has two buffers, so that one barrier a tile is enough.
//
// Macros set by the host: NSTATE, STATES, GROUP, CHANNELS, THREADS, RESIDENT (blocks of a processor that registers have room for), TILE,
// KIND (0 float, 1 bfloat16, 2 half), HAS_Z, HAS_D, HAS_BIAS, SOFTPLUS, REVERSE, BOTH (two scans, of equal shapes and strides), OUTPUT (0: only each chunk's last state and sum of
// steps), WIDTH, U_FRAME, DELTA_FRAME, Z_FRAME, B_FRAME, C_FRAME (values between frames), WEIGHTS (neighbouring values of B and of C in one
// load, 1 or 2; 2 only where STATES is even), UNROLL (of the scan's loop), POLYNOMIAL (of a lane's CHANNELS x STATES exponentials, how many run on the multiply-add units), KEPT (frames between the
// states that are kept for a backward pass, a multiple of TILE; 0: none).

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

#define SLOTS (32 / GROUP)                        // sets of channels of a warp
#define SETS (THREADS / GROUP)                    // sets of channels of a block
#define PADDED (STATES * GROUP)
#define OWN_FRAMES (TILE / GROUP)                 // frames of a tile that a thread stages and finishes
#define AT_ONCE (GROUP > CHANNELS ? GROUP / CHANNELS : 1)  // frames whose shares of y are summed together
#define ROW_WEIGHTS (NSTATE / WEIGHTS)            // loads for a frame of B
#define OWN_WEIGHTS ((TILE * ROW_WEIGHTS + THREADS - 1) / THREADS)
#define Y_ROW (SETS * CHANNELS + 16)              // 16 apart: the frames summed together fall into different banks
#define EVERY 0xffffffffu

// COUNT neighbouring floats of shared memory, in the widest loads that their alignment allows.
template <int COUNT> __device__ __forceinline__ void read_floats(const float* from, float* to) {
  if constexpr (COUNT % 4 == 0) {
#pragma unroll
    for (int n = 0; n < COUNT; n += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + n);
      to[n] = four.x; to[n + 1] = four.y; to[n + 2] = four.z; to[n + 3] = four.w;
    }
  } else if constexpr (COUNT % 2 == 0) {
#pragma unroll
    for (int n = 0; n < COUNT; n += 2) {
      const float2 two = *reinterpret_cast<const float2*>(from + n);
      to[n] = two.x; to[n + 1] = two.y;
    }
  } else {
#pragma unroll
    for (int n = 0; n < COUNT; ++n) to[n] = from[n];
  }
}

struct Arguments {
  const value_t* u; const value_t* delta; const value_t* b; const value_t* c; const value_t* z;
  const float* a; const float* d; const float* bias;
  const long long* num_frames;     // (B,) or null
  const float* initial;            // (B, E, N), or (B, chunks, E, N) when there are several chunks; null: zeros
  value_t* y;                      // (B, T, E)
  float* last;                     // (B, E, N), or (B, chunks, E, N) without output
  float* steps;                    // (B, chunks, E) sum of the step sizes, without output
  float* kept;                     // (B, ceil(T / KEPT), N, E) states before every KEPT-th logical step
  long long u_batch, delta_batch, b_batch, c_batch, z_batch;
  int frames, chunk_frames, chunks;
};

struct Shared {
  float staged[2][TILE][SETS][2 * CHANNELS];             // step sizes, then drives
  float weights[2][TILE][GROUP][(1 + OUTPUT) * STATES];  // of B, then of C
#if OUTPUT
  float tile_y[2][TILE][Y_ROW];
#else
  float totals[GROUP][SETS][CHANNELS];
#endif
};

template <bool REVERSED> __device__ __forceinline__ void scan_chunk(const Arguments& p, Shared& shared, const int chunk) {
  constexpr int AHEAD = REVERSED ? -1 : 1;  // frames of a logical step
  auto& staged = shared.staged;
  auto& weights = shared.weights;
#if OUTPUT
  auto& tile_y = shared.tile_y;
#else
  auto& totals = shared.totals;
#endif
  const int row = blockIdx.y;
  const int valid = p.num_frames ? (int)min((long long)p.frames, p.num_frames[row]) : p.frames;
  const int first = min(chunk * p.chunk_frames, valid), end = min(first + p.chunk_frames, valid);
  // Frame of logical step s: forwards s, backwards valid - 1 - s.
#define FRAME(s) (REVERSED ? valid - 1 - (s) : (s))

  // Lanes past the width repeat its end and keep nothing; the width is a multiple of CHANNELS.
  // As a stager: frames phase, phase + GROUP, .. of one set of channels.
  const int set = threadIdx.x % SETS, phase = threadIdx.x / SETS;
  const int set_channel = (blockIdx.x * SETS + set) * CHANNELS;
  const bool set_inside = set_channel < WIDTH;
  const int e_set = set_inside ? set_channel : WIDTH - CHANNELS;
  // As a scanner: states part * STATES and on, of one set of channels.
  const int lane = threadIdx.x & 31, part = lane / SLOTS, own = (threadIdx.x >> 5) * SLOTS + lane % SLOTS;
  const int own_channel = (blockIdx.x * SETS + own) * CHANNELS;
  const bool inside = own_channel < WIDTH;
  const int e0 = inside ? own_channel : WIDTH - CHANNELS;

  const value_t* u = p.u + row * p.u_batch + e_set;
  const value_t* delta = p.delta + row * p.delta_batch + e_set;
  const value_t* b = p.b + row * p.b_batch;
#if OUTPUT
  const value_t* c = p.c + row * p.c_batch;
#if HAS_Z
  const value_t* z = p.z + row * p.z_batch + e_set;
#endif
  value_t* y = p.y + (long long)row * p.frames * WIDTH + e_set;
#endif

  float skip[CHANNELS], bias[CHANNELS], total[CHANNELS], a[CHANNELS][STATES], h[CHANNELS][STATES];
#pragma unroll
  for (int k = 0; k < CHANNELS; ++k) {
    skip[k] = 0.0f; bias[k] = 0.0f; total[k] = 0.0f;
#if HAS_D
    skip[k] = p.d[e_set + k];
#endif
#if HAS_BIAS
    bias[k] = p.bias[e_set + k];
#endif
#pragma unroll
    for (int n = 0; n < STATES; ++n) {
      const int state = part * STATES + n;
      a[k][n] = state < NSTATE ? p.a[(long long)(e0 + k) * NSTATE + state] * LOG2E : 0.0f;
      const long long at = (((long long)row * p.chunks + chunk) * WIDTH + e0 + k) * NSTATE + state;
      h[k][n] = state < NSTATE && p.initial ? p.initial[at] : 0.0f;
    }
  }
#if PADDED > NSTATE
  for (int index = threadIdx.x; index < 2 * TILE * (PADDED - NSTATE); index += THREADS) {
    const int at = index / (PADDED - NSTATE), state = NSTATE + index % (PADDED - NSTATE);
#pragma unroll
    for (int which = 0; which <= OUTPUT; ++which) weights[at / TILE][at % TILE][state / STATES][which * STATES + state % STATES] = 0.0f;
  }
#endif

  // What a thread has read of the tile to come, and what it needs again to finish the tile that is being scanned.
  Packed<CHANNELS> next_u[OWN_FRAMES], next_delta[OWN_FRAMES], done_u[OWN_FRAMES];
  Packed<WEIGHTS> next_b[OWN_WEIGHTS];
#if OUTPUT
  Packed<WEIGHTS> next_c[OWN_WEIGHTS];
#if HAS_Z
  Packed<CHANNELS> next_z[OWN_FRAMES], done_z[OWN_FRAMES];
#endif
#endif
  // Where the next tile begins, for this thread: advanced a tile at a time.
  const long long start = FRAME(first + phase), weight_start = FRAME(first);
  const value_t* next_from_u = u + start * U_FRAME;
  const value_t* next_from_delta = delta + start * DELTA_FRAME;
  const value_t* next_from_b = b + weight_start * B_FRAME;
#if OUTPUT
  const value_t* next_from_c = c + weight_start * C_FRAME;
#if HAS_Z
  const value_t* next_from_z = z + start * Z_FRAME;
#endif
#endif
  int weight_frame[OWN_WEIGHTS], weight_state[OWN_WEIGHTS], weight_place[OWN_WEIGHTS];
#pragma unroll
  for (int j = 0; j < OWN_WEIGHTS; ++j) {
    const int index = min((int)threadIdx.x + j * THREADS, TILE * ROW_WEIGHTS - 1);
    weight_frame[j] = index / ROW_WEIGHTS;
    weight_state[j] = index % ROW_WEIGHTS * WEIGHTS;
    weight_place[j] = (weight_frame[j] * GROUP + weight_state[j] / STATES) * (1 + OUTPUT) * STATES + weight_state[j] % STATES;
  }
  // Reads the tile that begins at s0; of a tile that is not whole, its last frame again.
  auto fetch = [&](int s0) {
    const int left = end - 1 - s0;  // the last step, counted from the tile's first
    if (left >= TILE - 1) {
#pragma unroll
      for (int j = 0; j < OWN_FRAMES; ++j) {
        next_u[j] = read_packed<CHANNELS>(next_from_u + AHEAD * j * GROUP * U_FRAME);
        next_delta[j] = read_packed<CHANNELS>(next_from_delta + AHEAD * j * GROUP * DELTA_FRAME);
#if OUTPUT && HAS_Z
        next_z[j] = read_packed<CHANNELS>(next_from_z + AHEAD * j * GROUP * Z_FRAME);
#endif
      }
#pragma unroll
      for (int j = 0; j < OWN_WEIGHTS; ++j) {
        next_b[j] = read_packed<WEIGHTS>(next_from_b + AHEAD * weight_frame[j] * B_FRAME + weight_state[j]);
#if OUTPUT
        next_c[j] = read_packed<WEIGHTS>(next_from_c + AHEAD * weight_frame[j] * C_FRAME + weight_state[j]);
#endif
      }
    } else if (left >= 0) {
#pragma unroll
      for (int j = 0; j < OWN_FRAMES; ++j) {
        const int t = AHEAD * (min(phase + j * GROUP, left) - phase);
        next_u[j] = read_packed<CHANNELS>(next_from_u + t * U_FRAME);
        next_delta[j] = read_packed<CHANNELS>(next_from_delta + t * DELTA_FRAME);
#if OUTPUT && HAS_Z
        next_z[j] = read_packed<CHANNELS>(next_from_z + t * Z_FRAME);
#endif
      }
#pragma unroll
      for (int j = 0; j < OWN_WEIGHTS; ++j) {
        const int t = AHEAD * min(weight_frame[j], left);
        next_b[j] = read_packed<WEIGHTS>(next_from_b + t * B_FRAME + weight_state[j]);
#if OUTPUT
        next_c[j] = read_packed<WEIGHTS>(next_from_c + t * C_FRAME + weight_state[j]);
#endif
      }
    }
    next_from_u += AHEAD * TILE * U_FRAME;
    next_from_delta += AHEAD * TILE * DELTA_FRAME;
    next_from_b += AHEAD * TILE * B_FRAME;
#if OUTPUT
    next_from_c += AHEAD * TILE * C_FRAME;
#if HAS_Z
    next_from_z += AHEAD * TILE * Z_FRAME;
#endif
#endif
  };
  auto stage = [&](int s0, int buffer) {
#pragma unroll
    for (int j = 0; j < OWN_FRAMES; ++j) {
      const bool counts = s0 + phase + j * GROUP < end;
      float values[2 * CHANNELS], inputs[CHANNELS];
      unpack(next_delta[j], values);
      unpack(next_u[j], inputs);
#pragma unroll
      for (int k = 0; k < CHANNELS; ++k) {
        float step = values[k] + bias[k];
#if SOFTPLUS
        step = softplus(step);
#endif
        if (!counts) step = 0.0f;  // leaves the state alone
        total[k] += step;
        values[k] = step;
        values[CHANNELS + k] = step * inputs[k];
      }
      float* to = staged[buffer][phase + j * GROUP][set];
      if (CHANNELS == 2) *reinterpret_cast<float4*>(to) = make_float4(values[0], values[1], values[2 * CHANNELS - 2], values[2 * CHANNELS - 1]);
      else *reinterpret_cast<float2*>(to) = make_float2(values[0], values[1]);
    }
    float* const to = &weights[buffer][0][0][0];
#pragma unroll
    for (int j = 0; j < OWN_WEIGHTS; ++j) {  // a thread without a share of its own writes what another one writes too
      unpack(next_b[j], to + weight_place[j]);
#if OUTPUT
      unpack(next_c[j], to + weight_place[j] + STATES);
#endif
    }
  };
#if OUTPUT
  value_t* done_y = y + start * WIDTH;
  auto finish = [&](int s0, int buffer) {
#pragma unroll
    for (int j = 0; j < OWN_FRAMES; ++j) {
      const int i = phase + j * GROUP;
      float value[CHANNELS], inputs[CHANNELS];
      unpack(done_u[j], inputs);
#if HAS_Z
      float gates[CHANNELS];
      unpack(done_z[j], gates);
#endif
#pragma unroll
      for (int k = 0; k < CHANNELS; ++k) {
        value[k] = fmaf(skip[k], inputs[k], tile_y[buffer][i][set * CHANNELS + k]);
#if HAS_Z
        value[k] *= silu(gates[k]);
#endif
      }
      if (s0 + i < end && set_inside) write_values<CHANNELS>(done_y + AHEAD * j * GROUP * WIDTH, value);
    }
    done_y += AHEAD * TILE * WIDTH;
  };
#endif

  constexpr int unrolled = UNROLL;
  const int tiles = end > first ? (end - first + TILE - 1) / TILE : 0;
  if (tiles > 0) fetch(first);
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    const int buffer = tile & 1, s0 = first + tile * TILE;
    stage(s0, buffer);
    __syncthreads();
#if OUTPUT
    if (tile > 0) finish(s0 - TILE, buffer ^ 1);
#pragma unroll
    for (int j = 0; j < OWN_FRAMES; ++j) {
      done_u[j] = next_u[j];
#if HAS_Z
      done_z[j] = next_z[j];
#endif
    }
#endif
    fetch(s0 + TILE);
#if KEPT && OUTPUT
    if (inside && s0 % KEPT == 0) {
      const long long at = ((long long)row * ((p.frames + KEPT - 1) / KEPT) + s0 / KEPT) * NSTATE;
#pragma unroll
      for (int n = 0; n < STATES; ++n) {
        const int state = part * STATES + n;
        if (state >= NSTATE) continue;
#pragma unroll
        for (int k = 0; k < CHANNELS; ++k) p.kept[(at + state) * WIDTH + e0 + k] = h[k][n];
      }
    }
#endif
#pragma unroll unrolled
    for (int i0 = 0; i0 < TILE; i0 += AT_ONCE) {
      float out[AT_ONCE * CHANNELS];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        float values[2 * CHANNELS], weight[(1 + OUTPUT) * STATES];
        read_floats<2 * CHANNELS>(staged[buffer][i0 + i][own], values);
        read_floats<(1 + OUTPUT) * STATES>(weights[buffer][i0 + i][part], weight);
#pragma unroll
        for (int k = 0; k < CHANNELS; ++k) {
          float even = 0.0f, odd = 0.0f;
#pragma unroll
          for (int n = 0; n < STATES; ++n) {
            const float exponent = values[k] * a[k][n];
            const float decay = k * STATES + n < POLYNOMIAL ? exp2_polynomial(exponent) : exp2_fast(exponent);
            h[k][n] = fmaf(decay, h[k][n], values[CHANNELS + k] * weight[n]);
#if OUTPUT
            if (n & 1) odd = fmaf(weight[STATES + n], h[k][n], odd); else even = fmaf(weight[STATES + n], h[k][n], even);
#endif
          }
          out[i * CHANNELS + k] = even + odd;
        }
      }
#if OUTPUT
      // Sums over the group's lanes; of AT_ONCE * CHANNELS sums this lane keeps the ones whose number begins with its own.
      int count = AT_ONCE * CHANNELS;
#pragma unroll
      for (int bit = GROUP / 2; bit > 0; bit /= 2) {
        const bool upper = part & bit;
#pragma unroll
        for (int v = 0; v < AT_ONCE * CHANNELS / 2; ++v) {
          if (v < count / 2) {
            const float send = upper ? out[v] : out[v + count / 2], mine = upper ? out[v + count / 2] : out[v];
            out[v] = mine + __shfl_xor_sync(EVERY, send, bit * SLOTS);
          }
        }
        count /= 2;
      }
#pragma unroll
      for (int v = 0; v < AT_ONCE * CHANNELS / GROUP; ++v) {
        const int number = part * (AT_ONCE * CHANNELS / GROUP) + v;
        tile_y[buffer][i0 + number / CHANNELS][own * CHANNELS + number % CHANNELS] = out[v];
      }
#endif
    }
  }
  __syncthreads();

#if OUTPUT
  if (tiles > 0) finish(first + (tiles - 1) * TILE, (tiles - 1) & 1);
  const bool keep = inside && chunk == p.chunks - 1;
  const long long kept_row = row;
  if (set_inside && chunk == p.chunks - 1) {  // frames past a row's end are zero; the last chunk writes them
    const float zeros[CHANNELS] = {};
    for (int t = valid + phase; t < p.frames; t += GROUP) write_values<CHANNELS>(y + (long long)t * WIDTH, zeros);
  }
#else
  const bool keep = inside;
  const long long kept_row = (long long)row * p.chunks + chunk;
#pragma unroll
  for (int k = 0; k < CHANNELS; ++k) totals[phase][set][k] = total[k];
  __syncthreads();
  if (phase == 0 && set_inside) {
#pragma unroll
    for (int k = 0; k < CHANNELS; ++k) {
      float sum = 0.0f;
#pragma unroll
      for (int g = 0; g < GROUP; ++g) sum += totals[g][set][k];
      p.steps[kept_row * WIDTH + e_set + k] = sum;
    }
  }
#endif
  if (!keep) return;
#pragma unroll
  for (int k = 0; k < CHANNELS; ++k)
#pragma unroll
    for (int n = 0; n < STATES; ++n) {
      const int state = part * STATES + n;
      if (state < NSTATE) p.last[(kept_row * WIDTH + e0 + k) * NSTATE + state] = h[k][n];
    }
}

// The blocks of z are the chunks of one scan, or with BOTH those of two: one forwards in time, one backwards.
struct Scans {
  Arguments each[1 + BOTH];
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) selective_scan_forward(const Scans scans) {
  __shared__ __align__(16) Shared shared;
#if BOTH
  if (blockIdx.z % 2) scan_chunk<true>(scans.each[1], shared, blockIdx.z / 2);
  else scan_chunk<false>(scans.each[0], shared, blockIdx.z / 2);
#else
  scan_chunk<REVERSE>(scans.each[0], shared, blockIdx.z);
#endif
}

// The state before each chunk, from every chunk's own last state (started at zero) and its sum of steps, those of the last chunk not read.
// One thread a state.
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
    if (chunk + 1 < chunks) h = fmaf(exp2_fast(rate * steps[at * width + e]), h, last[at * per_row + inner]);
  }
}
