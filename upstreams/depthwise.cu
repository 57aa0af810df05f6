// The causal depthwise convolution of Mamba with SiLU, forward and backward, compiled at run time.
//
// y[s] = SiLU(v[s]), v[s] = bias + sum over k of taps[k] x[s - KERNEL + 1 + k], over logical steps s: frames, or with REVERSE frames
// counted from the last one. A thread has CHANNELS neighbouring channels and walks over FRAMES steps with a window in registers.
// Backward, v is made again from x; a thread looks KERNEL - 1 steps past its own to gather what they send back.
//
// Macros set by the host: KIND, KERNEL, CHANNELS (1 or 2), FRAMES, REVERSE, HAS_TAIL (inputs before the first step are given).

#define MOVE(window)                                   \
  _Pragma("unroll") for (int k = 0; k < KERNEL - 1; ++k) \
  _Pragma("unroll") for (int j = 0; j < CHANNELS; ++j) window[k][j] = window[k + 1][j];

#define FRAME(s) (REVERSE ? frames - 1 - (s) : (s))

struct Taps {
  float tap[KERNEL][CHANNELS], bias[CHANNELS];
};

__device__ __forceinline__ Taps read_taps(const float* weight, const float* bias, int e) {
  Taps taps;
#pragma unroll
  for (int j = 0; j < CHANNELS; ++j) {
    taps.bias[j] = bias[e + j];
#pragma unroll
    for (int k = 0; k < KERNEL; ++k) taps.tap[k][j] = weight[(long long)(e + j) * KERNEL + k];
  }
  return taps;
}

// The input at a step before the first or past the last one too.
__device__ __forceinline__ void input_at(const value_t* x, const value_t* tail, long long x_frame, int frames, int width, int s, float* to) {
#pragma unroll
  for (int j = 0; j < CHANNELS; ++j) to[j] = 0.0f;
  if (s >= 0 && s < frames) read_values<CHANNELS>(x + (long long)FRAME(s) * x_frame, to);
#if HAS_TAIL
  if (s < 0) read_values<CHANNELS>(tail + (long long)(s + KERNEL - 1) * width, to);
#endif
}

__device__ __forceinline__ float convolved(const Taps& taps, const float (&window)[KERNEL][CHANNELS], int j) {
  float sum = taps.bias[j];
#pragma unroll
  for (int k = 0; k < KERNEL; ++k) sum = fmaf(taps.tap[k][j], window[k][j], sum);
  return sum;
}

extern "C" __global__ void __launch_bounds__(128)
    depthwise_conv_silu(const value_t* x, const float* weight, const float* bias, const value_t* tail, value_t* y,
                        long long x_row, long long x_frame, int frames, int width) {
  const int e = (blockIdx.x * blockDim.x + threadIdx.x) * CHANNELS, row = blockIdx.z, first = blockIdx.y * FRAMES;
  if (e >= width) return;
  x += row * x_row + e;
  if (HAS_TAIL) tail += (long long)row * (KERNEL - 1) * width + e;
  y += (long long)row * frames * width + e;
  const Taps taps = read_taps(weight, bias, e);
  float window[KERNEL][CHANNELS];  // window[k]: the input KERNEL - 1 - k steps ago
#pragma unroll
  for (int k = 1; k < KERNEL; ++k) input_at(x, tail, x_frame, frames, width, first - KERNEL + k, window[k]);
#pragma unroll 8
  for (int s = first; s < min(first + FRAMES, frames); ++s) {
    MOVE(window)
    read_values<CHANNELS>(x + (long long)FRAME(s) * x_frame, window[KERNEL - 1]);
    float value[CHANNELS];
#pragma unroll
    for (int j = 0; j < CHANNELS; ++j) value[j] = silu(convolved(taps, window, j));
    write_values<CHANNELS>(y + (long long)FRAME(s) * width, value);
  }
}

// dweight and dbias: sums over the steps of a thread, (B, pieces of time, E, KERNEL + 1), the bias last.
extern "C" __global__ void __launch_bounds__(128)
    depthwise_conv_silu_backward(const value_t* x, const float* weight, const float* bias, const value_t* tail, const value_t* dy,
                                 value_t* dx, float* sums, long long x_row, long long x_frame, long long dy_row, long long dy_frame,
                                 int frames, int width) {
  const int e = (blockIdx.x * blockDim.x + threadIdx.x) * CHANNELS, row = blockIdx.z, first = blockIdx.y * FRAMES;
  if (e >= width) return;
  x += row * x_row + e;
  dy += row * dy_row + e;
  if (HAS_TAIL) tail += (long long)row * (KERNEL - 1) * width + e;
  dx += (long long)row * frames * width + e;
  const Taps taps = read_taps(weight, bias, e);
  float window[KERNEL][CHANNELS], sent[KERNEL][CHANNELS] = {};  // sent[k]: gradient of v, KERNEL - 1 - k steps ago
  float dtap[KERNEL][CHANNELS] = {}, dbias[CHANNELS] = {};
#pragma unroll
  for (int k = 1; k < KERNEL; ++k) input_at(x, tail, x_frame, frames, width, first - KERNEL + k, window[k]);
  const int end = min(first + FRAMES, frames);
#pragma unroll 4
  for (int s = first; s < end + KERNEL - 1; ++s) {
    MOVE(window)
    MOVE(sent)
    float of_output[CHANNELS] = {};
    input_at(x, tail, x_frame, frames, width, s, window[KERNEL - 1]);
    if (s < frames) read_values<CHANNELS>(dy + (long long)FRAME(s) * dy_frame, of_output);
    float value[CHANNELS];
#pragma unroll
    for (int j = 0; j < CHANNELS; ++j) {
      const float v = convolved(taps, window, j), open = sigmoid(v);
      const float gradient = of_output[j] * open * fmaf(v, 1.0f - open, 1.0f);
      sent[KERNEL - 1][j] = gradient;
      if (s < end) {
        dbias[j] += gradient;
#pragma unroll
        for (int k = 0; k < KERNEL; ++k) dtap[k][j] = fmaf(gradient, window[k][j], dtap[k][j]);
      }
      value[j] = 0.0f;
#pragma unroll
      for (int k = 0; k < KERNEL; ++k) value[j] = fmaf(taps.tap[KERNEL - 1 - k][j], sent[k][j], value[j]);
    }
    const int done = s - KERNEL + 1;
    if (done >= first) write_values<CHANNELS>(dx + (long long)FRAME(done) * width, value);
  }
  float* to = sums + (((long long)row * gridDim.y + blockIdx.y) * width + e) * (KERNEL + 1);
#pragma unroll
  for (int j = 0; j < CHANNELS; ++j) {
#pragma unroll
    for (int k = 0; k < KERNEL; ++k) to[j * (KERNEL + 1) + k] = dtap[k][j];
    to[j * (KERNEL + 1) + KERNEL] = dbias[j];
  }
}
