// Backward selective scan of Mamba-1 (Gu and Dao 2023, arXiv 2312.00752), compiled at run time for the shapes it meets.
//
// With h[t] = a[t] h[t-1] + step[t] B[t] u[t], a[t] = exp(step[t] A), and g[t] the loss's gradient of h[t]:
//   g[t] = C[t] dy[t] + a[t+1] g[t+1]         dC[t] = sum over e of dy[t] h[t]            dB[t] = sum over e of g[t] step[t] u[t]
//   dA = sum over t of g[t] a[t] h[t-1] step[t]      d(step u)[t] = sum over n of g[t] B[t]
//   dstep[t] = u[t] d(step u)[t] + sum over n of g[t] a[t] h[t-1] A
// A block walks from the last chunk of frames to the first. The state before each chunk was kept by the forward pass; the chunk is run
// forwards once to get the state before every STEPS frames, then piece after piece from its end: STEPS states and decays are made again
// in registers and used up. The sums over channels go through registers, shuffles and shared memory to one number a block, which is
// written; the host adds the blocks' numbers. There are no atomic operations, so equal inputs give equal bits.
//
// Four lanes share CHANNELS neighbouring channels, each has STATES of their state dimensions and finishes one of STEPS = 4 frames.
// Macros set by the host: NSTATE, CHANNELS, THREADS, RESIDENT (blocks of a processor), CHUNK (frames, a multiple of 4), KIND,
// HAS_Z, HAS_D, HAS_BIAS, SOFTPLUS, REVERSE, WIDTH, U_FRAME, DELTA_FRAME, B_FRAME, C_FRAME, Z_FRAME, DY_FRAME (values between frames).

#define GROUP 4
#define STEPS 4
#define SLOTS 8
#define STATES ((NSTATE + GROUP - 1) / GROUP)
#define PADDED (STATES * GROUP)
#define WARPS (THREADS / 32)
#define BLOCK_CHANNELS (WARPS * SLOTS * CHANNELS)
#define PIECES (CHUNK / STEPS)
#define AHEAD (REVERSE ? -1 : 1)  // frames of a logical step
#define EVERY 0xffffffffu

struct Arguments {
  const value_t* u; const value_t* delta; const value_t* b; const value_t* c; const value_t* z; const value_t* dy;
  const float* a; const float* d; const float* bias;
  const long long* num_frames;       // (B,) or null
  const float* kept;                 // (B, ceil(T / CHUNK), N, E) states before every chunk
  const float* dlast;                // (B, E, N) gradient of the last state, or null: zero
  value_t* du;                       // (B, T, 3, E): of u, delta and z
  float* da;                         // (B, E, N)
  float* dinitial;                   // (B, E, N)
  float* dd; float* dbias;           // (B, E)
  float* dbc;                        // (blocks of channels, B, T, 2, N)
  long long u_batch, delta_batch, b_batch, c_batch, z_batch, dy_batch;
  int frames;
};

// Values of one frame and CHANNELS channels, as they were read and what follows from them.
struct Frame {
  float u[CHANNELS], step[CHANNELS];
#if SOFTPLUS
  float slope[CHANNELS];  // of softplus
#endif
  float dy[CHANNELS];     // gradient of the scan's output before the gate
#if HAS_Z
  float dz[CHANNELS];     // gradient of z for an output of one
#endif
};

// The sum over the lanes that differ in bit `distance`; of two values this lane keeps the second one if its bit is set.
__device__ __forceinline__ float exchange(float first, float second, bool upper, int distance) {
  const float send = upper ? first : second;
  return (upper ? second : first) + __shfl_xor_sync(EVERY, send, distance);
}

// Sums over the four lanes of a group, this lane's part of four.
__device__ __forceinline__ float share(const float (&values)[STEPS], int part) {
  const float low = exchange(values[0], values[2], part & 2, 2 * SLOTS);
  const float high = exchange(values[1], values[3], part & 2, 2 * SLOTS);
  return exchange(low, high, part & 1, SLOTS);
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) selective_scan_backward(const Arguments p) {
  extern __shared__ __align__(16) float shared[];
  float* const tile_b = shared;                                // [PIECES][PADDED][STEPS]
  float* const tile_c = tile_b + CHUNK * PADDED;               // the same
  float* const sums = tile_c + CHUNK * PADDED;                 // [2][WARPS][2][STEPS][PADDED]
  float* const before = sums + 2 * WARPS * 2 * STEPS * PADDED; // [PIECES][STATES][CHANNELS][THREADS] states before every piece
  float* const rates = before + PIECES * STATES * CHANNELS * THREADS + threadIdx.x;  // [STATES][CHANNELS][THREADS] A, in powers of two

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int slot = lane % SLOTS, part = lane / SLOTS;
  const int own = blockIdx.x * BLOCK_CHANNELS + (warp * SLOTS + slot) * CHANNELS;
  const bool inside = own < WIDTH;                    // the width is a multiple of CHANNELS
  const int e0 = inside ? own : WIDTH - CHANNELS;     // lanes past the width read its end, count nothing and keep nothing
  const int row = blockIdx.y;
  const int valid = p.num_frames ? (int)min((long long)p.frames, max(0ll, p.num_frames[row])) : p.frames;
  // Frame of logical step s: forwards s, backwards valid - 1 - s.
#define FRAME(s) (REVERSE ? valid - 1 - (s) : (s))

  const value_t* u = p.u + row * p.u_batch + e0;
  const value_t* delta = p.delta + row * p.delta_batch + e0;
  const value_t* dy = p.dy + row * p.dy_batch + e0;
#if HAS_Z
  const value_t* z = p.z + row * p.z_batch + e0;
#endif
  const int chunks = (valid + CHUNK - 1) / CHUNK;
  const long long kept_row = (long long)row * ((p.frames + CHUNK - 1) / CHUNK);

  float g[STATES][CHANNELS], da[STATES][CHANNELS];
  float skip[CHANNELS], bias[CHANNELS], dd[CHANNELS], dbias[CHANNELS];
#pragma unroll
  for (int k = 0; k < CHANNELS; ++k) {
    skip[k] = 0.0f; bias[k] = 0.0f; dd[k] = 0.0f; dbias[k] = 0.0f;
#if HAS_D
    skip[k] = p.d[e0 + k];
#endif
#if HAS_BIAS
    bias[k] = p.bias[e0 + k];
#endif
#pragma unroll
    for (int n = 0; n < STATES; ++n) {
      const int state = part * STATES + n;
      const long long at = (long long)(e0 + k) * NSTATE + state;
      rates[(n * CHANNELS + k) * THREADS] = state < NSTATE ? p.a[at] * LOG2E : 0.0f;
      g[n][k] = state < NSTATE && inside && p.dlast ? p.dlast[(long long)row * WIDTH * NSTATE + at] : 0.0f;
      da[n][k] = 0.0f;
    }
  }

  // Raw values of this lane's frame of a piece, read one piece ahead. A frame past the end reads the last one.
  Packed<CHANNELS> raw_u, raw_delta, raw_dy;
#if HAS_Z
  Packed<CHANNELS> raw_z;
#endif
  auto fetch_inputs = [&](const value_t* from_u, const value_t* from_delta, int past) {
    raw_u = read_packed<CHANNELS>(from_u - (long long)past * AHEAD * U_FRAME);
    raw_delta = read_packed<CHANNELS>(from_delta - (long long)past * AHEAD * DELTA_FRAME);
  };
  // A frame past the end has a step of size zero, which leaves the states alone, and no gradient.
  auto inputs_of_frame = [&](Frame& f, bool counts) {
    float delta[CHANNELS];
    unpack(raw_u, f.u);
    unpack(raw_delta, delta);
#pragma unroll
    for (int k = 0; k < CHANNELS; ++k) {
      const float x = delta[k] + bias[k];
#if SOFTPLUS
      f.step[k] = counts ? softplus(x) : 0.0f;
      f.slope[k] = sigmoid(x);
#else
      f.step[k] = counts ? x : 0.0f;
#endif
    }
  };

  for (int chunk = chunks - 1; chunk >= 0; --chunk) {
    const int base = chunk * CHUNK, end = min(base + CHUNK, valid);
    const int pieces = (end - base + STEPS - 1) / STEPS;
    const long long start = FRAME(base + part);  // of this lane
    const value_t* at_u = u + start * U_FRAME;
    const value_t* at_delta = delta + start * DELTA_FRAME;
    fetch_inputs(at_u, at_delta, max(0, part - (end - 1 - base)));
    for (int index = threadIdx.x; index < CHUNK * NSTATE; index += THREADS) {
      const int i = index / NSTATE, state = index % NSTATE;
      const long long t = FRAME(min(base + i, valid - 1));
      const int at = ((i / STEPS) * PADDED + state) * STEPS + i % STEPS;
      tile_b[at] = widen(p.b[row * p.b_batch + t * B_FRAME + state]);
      tile_c[at] = widen(p.c[row * p.c_batch + t * C_FRAME + state]);
    }
#if PADDED > NSTATE
    for (int index = threadIdx.x; index < CHUNK * (PADDED - NSTATE); index += THREADS) {
      const int i = index / (PADDED - NSTATE), state = NSTATE + index % (PADDED - NSTATE);
      const int at = ((i / STEPS) * PADDED + state) * STEPS + i % STEPS;
      tile_b[at] = 0.0f; tile_c[at] = 0.0f;
    }
#endif
    const float* kept = p.kept + (kept_row + chunk) * NSTATE * WIDTH + e0;
    auto kept_state = [&](int n, int k) -> float {
      const int state = part * STATES + n;
      return state < NSTATE ? kept[(long long)state * WIDTH + k] : 0.0f;
    };
    float h[STATES][CHANNELS];
#pragma unroll
    for (int n = 0; n < STATES; ++n)
#pragma unroll
      for (int k = 0; k < CHANNELS; ++k) h[n][k] = kept_state(n, k);
    __syncthreads();

    // Forwards: the state before every piece.
#pragma unroll 1
    for (int piece = 0; piece + 1 < pieces; ++piece) {
      Frame f;
      inputs_of_frame(f, true);
      at_u += AHEAD * STEPS * U_FRAME;
      at_delta += AHEAD * STEPS * DELTA_FRAME;
      fetch_inputs(at_u, at_delta, max(0, part - (end - 1 - base - (piece + 1) * STEPS)));
      float step[STEPS][CHANNELS], drive[STEPS][CHANNELS];
#pragma unroll
      for (int i = 0; i < STEPS; ++i)
#pragma unroll
        for (int k = 0; k < CHANNELS; ++k) {
          step[i][k] = __shfl_sync(EVERY, f.step[k], slot + i * SLOTS);
          drive[i][k] = __shfl_sync(EVERY, f.step[k] * f.u[k], slot + i * SLOTS);
        }
#pragma unroll
      for (int n = 0; n < STATES; ++n) {
        const float4 four = *reinterpret_cast<const float4*>(tile_b + (piece * PADDED + part * STATES + n) * STEPS);
        const float weight[STEPS] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int k = 0; k < CHANNELS; ++k) {
          const float a = rates[(n * CHANNELS + k) * THREADS];
          before[((piece * STATES + n) * CHANNELS + k) * THREADS + threadIdx.x] = h[n][k];
#pragma unroll
          for (int i = 0; i < STEPS; ++i)
            h[n][k] = fmaf(exp2_fast(step[i][k] * a), h[n][k], drive[i][k] * weight[i]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < STATES; ++n)
#pragma unroll
      for (int k = 0; k < CHANNELS; ++k) before[(((pieces - 1) * STATES + n) * CHANNELS + k) * THREADS + threadIdx.x] = h[n][k];

    // Backwards. What was fetched last are the inputs of the last piece.
    const long long last_start = FRAME(base + (pieces - 1) * STEPS + part);
    const value_t* at_dy = dy + last_start * DY_FRAME;
#if HAS_Z
    const value_t* at_z = z + last_start * Z_FRAME;
#endif
    value_t* at_out = p.du + (long long)row * p.frames * 3 * WIDTH + last_start * 3 * WIDTH + e0;
    auto fetch_outputs = [&](int past) {
      raw_dy = read_packed<CHANNELS>(at_dy - (long long)past * AHEAD * DY_FRAME);
#if HAS_Z
      raw_z = read_packed<CHANNELS>(at_z - (long long)past * AHEAD * Z_FRAME);
#endif
    };
    fetch_outputs(max(0, part - (end - 1 - base - (pieces - 1) * STEPS)));
#pragma unroll 1
    for (int piece = pieces - 1; piece >= 0; --piece) {
      const int s = base + piece * STEPS + part;
      const bool counts = s < end && inside;
      Frame f;
      inputs_of_frame(f, counts);
      unpack(raw_dy, f.dy);
#if HAS_Z
      float gate[CHANNELS];
      unpack(raw_z, gate);
#endif
#pragma unroll
      for (int k = 0; k < CHANNELS; ++k) {
        if (!counts) f.dy[k] = 0.0f;
#if HAS_Z
        const float open = sigmoid(gate[k]);
        f.dz[k] = f.dy[k] * open * fmaf(gate[k], 1.0f - open, 1.0f);
        f.dy[k] *= gate[k] * open;
#endif
      }
      if (piece > 0) {
        at_u -= AHEAD * STEPS * U_FRAME;
        at_delta -= AHEAD * STEPS * DELTA_FRAME;
        at_dy -= AHEAD * STEPS * DY_FRAME;
        fetch_inputs(at_u, at_delta, 0);
#if HAS_Z
        at_z -= AHEAD * STEPS * Z_FRAME;
#endif
        fetch_outputs(0);
      }
      float step[STEPS][CHANNELS], drive[STEPS][CHANNELS], gradient[STEPS][CHANNELS];
      float by_drive[CHANNELS][STEPS], by_decay[CHANNELS][STEPS];
#if HAS_Z
      float y[CHANNELS][STEPS];
#endif
#pragma unroll
      for (int i = 0; i < STEPS; ++i)
#pragma unroll
        for (int k = 0; k < CHANNELS; ++k) {
          step[i][k] = __shfl_sync(EVERY, f.step[k], slot + i * SLOTS);
          drive[i][k] = __shfl_sync(EVERY, f.step[k] * f.u[k], slot + i * SLOTS);
          gradient[i][k] = __shfl_sync(EVERY, f.dy[k], slot + i * SLOTS);
          by_drive[k][i] = 0.0f; by_decay[k][i] = 0.0f;
#if HAS_Z
          y[k][i] = 0.0f;
#endif
        }
      float* const block_sums = sums + (piece & 1) * WARPS * 2 * STEPS * PADDED;
#pragma unroll
      for (int n = 0; n < STATES; ++n) {
        const int at = (piece * PADDED + part * STATES + n) * STEPS;
        const float4 four_b = *reinterpret_cast<const float4*>(tile_b + at);
        const float4 four_c = *reinterpret_cast<const float4*>(tile_c + at);
        const float weight_b[STEPS] = {four_b.x, four_b.y, four_b.z, four_b.w};
        const float weight_c[STEPS] = {four_c.x, four_c.y, four_c.z, four_c.w};
        float db[STEPS] = {}, dc[STEPS] = {};
#pragma unroll
        for (int k = 0; k < CHANNELS; ++k) {
          const float a = rates[(n * CHANNELS + k) * THREADS];
          float decay[STEPS], past[STEPS];  // past: decayed state before the frame
          float state = before[((piece * STATES + n) * CHANNELS + k) * THREADS + threadIdx.x];
#pragma unroll
          for (int i = 0; i < STEPS; ++i) {
            decay[i] = exp2_fast(step[i][k] * a);
            past[i] = decay[i] * state;
            state = fmaf(drive[i][k], weight_b[i], past[i]);
            dc[i] = fmaf(gradient[i][k], state, dc[i]);
#if HAS_Z
            y[k][i] = fmaf(weight_c[i], state, y[k][i]);
#endif
          }
          float carry = g[n][k], rate = 0.0f;
#pragma unroll
          for (int i = STEPS - 1; i >= 0; --i) {
            carry = fmaf(weight_c[i], gradient[i][k], carry);
            by_drive[k][i] = fmaf(carry, weight_b[i], by_drive[k][i]);
            db[i] = fmaf(carry, drive[i][k], db[i]);
            const float of_exponent = carry * past[i];
            rate = fmaf(of_exponent, step[i][k], rate);
            by_decay[k][i] = fmaf(of_exponent, a, by_decay[k][i]);
            carry *= decay[i];
          }
          g[n][k] = carry;
          da[n][k] += rate;
        }
        // Eight sums over eight slots: bit 2 of the slot chooses B or C, bits 0 and 1 the frame.
        float mixed[STEPS];
#pragma unroll
        for (int i = 0; i < STEPS; ++i) mixed[i] = exchange(db[i], dc[i], slot & 4, 4);
        const float low = exchange(mixed[0], mixed[2], slot & 2, 2), high = exchange(mixed[1], mixed[3], slot & 2, 2);
        block_sums[(warp * 2 * STEPS + slot) * PADDED + part * STATES + n] = exchange(low, high, slot & 1, 1);
      }
      float value_u[CHANNELS], value_delta[CHANNELS];
#if HAS_Z
      float value_z[CHANNELS];
#endif
#pragma unroll
      for (int k = 0; k < CHANNELS; ++k) {
        const float of_drive = share(by_drive[k], part), of_decay = share(by_decay[k], part) * (1.0f / LOG2E);
        value_u[k] = fmaf(f.step[k], of_drive, skip[k] * f.dy[k]);
        value_delta[k] = fmaf(f.u[k], of_drive, of_decay);
#if SOFTPLUS
        value_delta[k] *= f.slope[k];
#endif
#if HAS_Z
        value_z[k] = fmaf(skip[k], f.u[k], share(y[k], part)) * f.dz[k];
#endif
        if (counts) {
          dd[k] = fmaf(f.dy[k], f.u[k], dd[k]);
          dbias[k] += value_delta[k];
        }
      }
      if (counts) {
        write_values<CHANNELS>(at_out, value_u);
        write_values<CHANNELS>(at_out + WIDTH, value_delta);
#if HAS_Z
        write_values<CHANNELS>(at_out + 2 * WIDTH, value_z);
#endif
      }
      at_out -= AHEAD * STEPS * 3 * WIDTH;
      __syncthreads();  // one is enough: the other half of `sums` is written next, and not this one before the next barrier
      for (int index = threadIdx.x; index < STEPS * 2 * NSTATE; index += THREADS) {
        const int i = index / (2 * NSTATE), which = index / NSTATE % 2, state = index % NSTATE;
        const int t = base + piece * STEPS + i;
        if (t >= end) continue;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += block_sums[(w * 2 * STEPS + which * STEPS + i) * PADDED + state];
        const long long at = ((long long)blockIdx.x * gridDim.y + row) * p.frames + FRAME(t);
        p.dbc[(at * 2 + which) * NSTATE + state] = sum;
      }
    }
    __syncthreads();  // the tiles are free
  }

  // Frames past a row's end have no gradient.
  if (inside) {
    const float zeros[CHANNELS] = {};
    for (int t = valid + part; t < p.frames; t += GROUP) {
      value_t* to = p.du + ((long long)row * p.frames + t) * 3 * WIDTH + e0;
#pragma unroll
      for (int which = 0; which < 3; ++which) write_values<CHANNELS>(to + which * WIDTH, zeros);
    }
  }
  const long long first = (((long long)blockIdx.x * gridDim.y + row) * p.frames + valid) * 2 * NSTATE;
  for (long long index = threadIdx.x; index < (long long)(p.frames - valid) * 2 * NSTATE; index += THREADS) p.dbc[first + index] = 0.0f;

#pragma unroll
  for (int k = 0; k < CHANNELS; ++k) {
#pragma unroll
    for (int distance = SLOTS; distance < 32; distance *= 2) {
      dd[k] += __shfl_xor_sync(EVERY, dd[k], distance);
      dbias[k] += __shfl_xor_sync(EVERY, dbias[k], distance);
    }
    if (!inside) continue;
    const long long e = (long long)row * WIDTH + e0 + k;
    if (part == 0) { p.dd[e] = dd[k]; p.dbias[e] = dbias[k]; }
#pragma unroll
    for (int n = 0; n < STATES; ++n) {
      const int state = part * STATES + n;
      if (state >= NSTATE) continue;
      p.da[e * NSTATE + state] = da[n][k];
      p.dinitial[e * NSTATE + state] = g[n][k];
    }
  }
}
