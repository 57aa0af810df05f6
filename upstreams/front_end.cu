// Fused elementwise stages of the HuBERT encoders, compiled at run time: each value is read once and written once.
//
// Macros set by the host: KIND (0 float, 1 bfloat16, 2 half), KERNEL (taps), STRIDE, CHANNELS.

// The first convolution of a waveform, its normalisation folded into weights of each row, and GELU:
// y[t, c] = GELU(shift[c] + sum over k of weight[c, k] x[STRIDE t + k]). A thread has one channel and walks over frames.
#define WALK 64
extern "C" __global__ void __launch_bounds__(256)
    waveform_conv_gelu(const float* wav, const float* weight, const float* shift, value_t* y, long long wav_row, int frames) {
  __shared__ float samples[WALK * STRIDE + KERNEL];
  const int row = blockIdx.z, first = blockIdx.x * WALK, channel = blockIdx.y * blockDim.x + threadIdx.x;
  const int count = min(WALK, frames - first);
  const float* from = wav + row * wav_row + (long long)first * STRIDE;
  for (int i = threadIdx.x; i < (count - 1) * STRIDE + KERNEL; i += blockDim.x) samples[i] = from[i];
  __syncthreads();
  if (channel >= CHANNELS) return;
  float taps[KERNEL];
#pragma unroll
  for (int k = 0; k < KERNEL; ++k) taps[k] = weight[((long long)row * CHANNELS + channel) * KERNEL + k];
  const float start = shift[(long long)row * CHANNELS + channel];
  value_t* to = y + ((long long)row * frames + first) * CHANNELS + channel;
#pragma unroll 4
  for (int t = 0; t < count; ++t) {
    float sum = start;
#pragma unroll
    for (int k = 0; k < KERNEL; ++k) sum = fmaf(taps[k], samples[t * STRIDE + k], sum);
    to[(long long)t * CHANNELS] = narrow(0.5f * sum * (1.0f + erff(sum * 0.70710678f)));
  }
}

#if CHANNELS % 32 == 0
// The same with a bias, then LayerNorm over the channels of each frame, then GELU. A warp has GROUP frames, a lane every 32nd channel
// of them, so that a weight read from shared memory serves GROUP frames.
#define GROUP 4
#define NORM_WARPS 4
#define GROUPS 4  // groups of frames a warp does, one after the other
#define BLOCK_FRAMES (NORM_WARPS * GROUP * GROUPS)
extern "C" __global__ void __launch_bounds__(NORM_WARPS * 32)
    waveform_conv_norm_gelu(const float* wav, const float* weight, const float* bias, const float* gain, const float* offset, value_t* y,
                            long long wav_row, int frames, float eps) {
  __shared__ float taps[KERNEL][CHANNELS];
  __shared__ float samples[BLOCK_FRAMES * STRIDE + KERNEL];
  constexpr int OWN = CHANNELS / 32;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row = blockIdx.y, first = blockIdx.x * BLOCK_FRAMES;
  const int count = min(BLOCK_FRAMES, frames - first);
  for (int i = threadIdx.x; i < KERNEL * CHANNELS; i += blockDim.x) taps[i % KERNEL][i / KERNEL] = weight[i];
  const float* from = wav + row * wav_row + (long long)first * STRIDE;
  for (int i = threadIdx.x; i < BLOCK_FRAMES * STRIDE + KERNEL; i += blockDim.x)
    samples[i] = i < (count - 1) * STRIDE + KERNEL ? from[i] : 0.0f;
  __syncthreads();
  for (int group = warp; group * GROUP < count; group += NORM_WARPS) {
    float value[OWN][GROUP];
#pragma unroll
    for (int j = 0; j < OWN; ++j)
#pragma unroll
      for (int f = 0; f < GROUP; ++f) value[j][f] = bias[j * 32 + lane];
#pragma unroll
    for (int k = 0; k < KERNEL; ++k) {
      float x[GROUP];
#pragma unroll
      for (int f = 0; f < GROUP; ++f) x[f] = samples[(group * GROUP + f) * STRIDE + k];
#pragma unroll
      for (int j = 0; j < OWN; ++j) {
        const float w = taps[k][j * 32 + lane];
#pragma unroll
        for (int f = 0; f < GROUP; ++f) value[j][f] = fmaf(w, x[f], value[j][f]);
      }
    }
#pragma unroll
    for (int f = 0; f < GROUP; ++f) {
      float sum = 0.0f, squares = 0.0f;
#pragma unroll
      for (int j = 0; j < OWN; ++j) sum += value[j][f];
#pragma unroll
      for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      const float mean = sum / CHANNELS;
#pragma unroll
      for (int j = 0; j < OWN; ++j) {
        value[j][f] -= mean;
        squares = fmaf(value[j][f], value[j][f], squares);
      }
#pragma unroll
      for (int distance = 16; distance; distance /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, distance);
      const float scale = rsqrtf(squares / CHANNELS + eps);
      const int t = group * GROUP + f;
      if (t >= count) continue;
      value_t* to = y + ((long long)row * frames + first + t) * CHANNELS + lane;
#pragma unroll
      for (int j = 0; j < OWN; ++j) {
        const float z = fmaf(value[j][f] * scale, gain[j * 32 + lane], offset[j * 32 + lane]);
        to[j * 32] = narrow(0.5f * z * (1.0f + erff(z * 0.70710678f)));
      }
    }
  }
}
#endif
