// The end of a post-norm block, compiled at run time: y = LayerNorm(a + b) over the channels of each frame, in fp32 inside.
//
// A warp has a frame, a lane neighbouring pairs of its channels; the sum never goes to memory.
// Macros set by the host: KIND (0 float, 1 bfloat16, 2 half), CHANNELS (a multiple of 64), WARPS (of a block).

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    sum_layer_norm(const value_t* a, const value_t* b, const value_t* gain, const value_t* offset, value_t* y, long long rows, float eps) {
  constexpr int PAIRS = CHANNELS / 64;
  const int lane = threadIdx.x & 31;
  const long long row = (long long)blockIdx.x * WARPS + (threadIdx.x >> 5);
  if (row >= rows) return;
  a += row * CHANNELS; b += row * CHANNELS; y += row * CHANNELS;
  Packed<2> left[PAIRS], right[PAIRS];
#pragma unroll
  for (int j = 0; j < PAIRS; ++j) {
    left[j] = read_packed<2>(a + (j * 32 + lane) * 2);
    right[j] = read_packed<2>(b + (j * 32 + lane) * 2);
  }
  float value[PAIRS][2], sum = 0.0f, squares = 0.0f;
#pragma unroll
  for (int j = 0; j < PAIRS; ++j) {
    float other[2];
    unpack(left[j], value[j]);
    unpack(right[j], other);
    value[j][0] += other[0]; value[j][1] += other[1];
    sum += value[j][0] + value[j][1];
  }
  const float mean = warp_sum(sum) / CHANNELS;
#pragma unroll
  for (int j = 0; j < PAIRS; ++j) {
    value[j][0] -= mean; value[j][1] -= mean;
    squares = fmaf(value[j][0], value[j][0], fmaf(value[j][1], value[j][1], squares));
  }
  const float scale = rsqrtf(warp_sum(squares) / CHANNELS + eps);
#pragma unroll
  for (int j = 0; j < PAIRS; ++j) {
    float g[2], o[2];
    read_values<2>(gain + (j * 32 + lane) * 2, g);
    read_values<2>(offset + (j * 32 + lane) * 2, o);
    value[j][0] = fmaf(value[j][0] * scale, g[0], o[0]);
    value[j][1] = fmaf(value[j][1] * scale, g[1], o[1]);
    write_values<2>(y + (j * 32 + lane) * 2, value[j]);
  }
}
