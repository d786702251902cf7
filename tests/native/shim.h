// CUDA for g++: enough of it to compile csrc/cuda unchanged and run it on the host, a block at a time. The threads of a
// block are fibers that run until they wait for each other; SHIM_SEED shuffles the order of blocks and, at every turn,
// of threads. So a missing barrier shows as a wrong result, and one that not every thread reaches as an error. Shared
// memory is NaN when a block starts and has an allocation of its own, whose ends AddressSanitizer guards.
#pragma once
#include <math.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#include "cpu/simd.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
using std::max;
using std::min;

// --- the runtime: one device, whose memory is the host's --------------------------------------------------------

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInsufficientDriver = 35, cudaErrorNoDevice = 100;
enum {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,  // SHIM_SHARED, or an H100's
  cudaDevAttrMultiProcessorCount,           // SHIM_MULTIPROCESSORS, or an H100's
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
};
struct cudaFuncAttributes {};
// SHIM_FAIL="cudaSetDevice:101": what that function returns. As on a device cudaGetLastError keeps it.
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);  // an error where it is the current one already
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaDriverGetVersion(int* version);  // SHIM_DRIVER, or 13000
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int device);

namespace shim {
cudaError_t answer(const char* function);
// An error where it was another value before: other threads may be between setting and launching.
cudaError_t set_shared(const void* kernel, int bytes);
}  // namespace shim

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, int, int value) {
  return shim::set_shared(reinterpret_cast<const void*>(kernel), value);
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return shim::answer("cudaFuncGetAttributes");
}

// --- numbers ----------------------------------------------------------------------------------------------------

// types of their own, for which the functions of simd.h are no candidates
struct __nv_bfloat16 {
  dmf::bf16 x;
};
struct __half {
  dmf::fp16 x;
};
inline float __bfloat162float(__nv_bfloat16 x) { return dmf::to_float(x.x); }
inline float __half2float(__half x) { return dmf::to_float(x.x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  __nv_bfloat16 r;
  dmf::from_float(x, r.x);
  return r;
}
inline __nv_bfloat16 __float2bfloat16_rz(float x) {
  return {{static_cast<uint16_t>(dmf::bit_cast<uint32_t>(x) >> 16)}};
}
inline __half __float2half_rn(float x) {
  __half r;
  dmf::from_float(x, r.x);
  return r;
}
inline float __double2float_rd(double x) {
  const float f = static_cast<float>(x);
  return static_cast<double>(f) > x ? nextafterf(f, -INFINITY) : f;
}

// Two side by side. Of a NaN and a number the number is the larger.
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct __half2 {
  __half x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float __low2float(__nv_bfloat162 p) { return __bfloat162float(p.x); }
inline float __high2float(__nv_bfloat162 p) { return __bfloat162float(p.y); }
inline float __low2float(__half2 p) { return __half2float(p.x); }
inline float __high2float(__half2 p) { return __half2float(p.y); }
template <class Pair>
Pair __hmax2(Pair a, Pair b) {
  const bool x = !(__low2float(a) >= __low2float(b)), y = !(__high2float(a) >= __high2float(b));
  return {x && !isnan(__low2float(b)) ? b.x : a.x, y && !isnan(__high2float(b)) ? b.y : a.y};
}
inline void __stcs(uint4* p, uint4 x) { *p = x; }
inline int __float_as_int(float x) { return dmf::bit_cast<int>(x); }
inline float __int_as_float(int x) { return dmf::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return dmf::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return dmf::bit_cast<float>(x); }

namespace dmf::cuda {
inline float exp2_approx(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}
inline float reciprocal_approx(float x) { return 1.0f / x; }
}  // namespace dmf::cuda

// --- a block ----------------------------------------------------------------------------------------------------

namespace shim {

extern dim3 thread, block, threads, blocks;

// Is told what orders the threads of a kernel: tests/native/trace.cpp.
struct Observer {
  virtual void starts_launch() = 0;  // after all of the launch before, as in a stream
  virtual void starts_block() = 0;
  virtual void passes_barrier() = 0;           // all threads of the block
  virtual void exchanges(unsigned warp) = 0;   // all threads of the warp
  virtual void fences() = 0;                   // the current thread, as is
  virtual void adds(const void* counter) = 0;  // an atomic
};
extern Observer* observer;
bool in_kernel();
bool on_stack(const void* p);  // of the current thread

void launch(unsigned grid, unsigned block, size_t shared, const std::function<void()>& kernel);
void wait_for_block();
void* dynamic_shared();
void* shared(const void* where, size_t bytes);  // one allocation for each place that declares one

// What lane src of the warp gives; all 32 take part.
void exchange(const void* mine, void* result, size_t bytes, unsigned src);

template <class T>
T from_lane(unsigned mask, T x, unsigned src) {
  static_assert(sizeof(T) <= 8, "");
  if (mask != 0xffffffffu) __builtin_trap();
  T result;
  exchange(&x, &result, sizeof(T), src);
  return result;
}

}  // namespace shim

#define threadIdx shim::thread
#define blockIdx shim::block
#define blockDim shim::threads
#define gridDim shim::blocks

inline void __syncthreads() { shim::wait_for_block(); }
inline void __syncwarp() { shim::from_lane(0xffffffffu, 0, shim::thread.x % 32); }
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int lanes) {
  return shim::from_lane(mask, x, shim::thread.x % 32 ^ static_cast<unsigned>(lanes));
}
template <class T>
T __shfl_sync(unsigned mask, T x, int lane) {
  return shim::from_lane(mask, x, static_cast<unsigned>(lane));
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, int lanes) {
  const unsigned lane = shim::thread.x % 32, by = static_cast<unsigned>(lanes);
  return shim::from_lane(mask, x, lane < by ? lane : lane - by);
}
inline int __any_sync(unsigned mask, bool x) {
  int any = x;
  for (int lanes = 16; lanes > 0; lanes /= 2) any |= __shfl_xor_sync(mask, any, lanes);
  return any;
}
void __threadfence();
unsigned atomicAdd(unsigned* p, unsigned x);

#define DMF_LAUNCH(kernel, grid, block, shared, stream, ...) \
  shim::launch(grid, static_cast<unsigned>(block), shared, [=] { kernel(__VA_ARGS__); })
#define DMF_SHARED(Type, name)       \
  static const char name##_here = 0; \
  auto& name = *static_cast<Type*>(shim::shared(&name##_here, sizeof(Type)))
#define DMF_DYNAMIC_SHARED(name) auto* name = static_cast<unsigned char*>(shim::dynamic_shared())
