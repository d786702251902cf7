// This file has the parts of CUDA that the kernels use. tests/native/shim.h replaces them if g++ compiles the kernels
// for the host.
#pragma once
#ifdef DMF_SHIM
#include "shim.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define DMF_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define DMF_SHARED(Type, name) __shared__ Type name
#define DMF_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif
#include <cstdint>
#include <stdexcept>
#include <string>

namespace dmf::cuda {

#ifndef DMF_SHIM
// Returns 2^x with an error of at most 2^-22 of it. Denormals become 0.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Returns 1 / x with an error of at most an ulp.
__device__ inline float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif
// Returns 1 / x with an error of little more than half an ulp.
__device__ inline float reciprocal(float x) {
  const float y = reciprocal_approx(x);
  return isinf(x) ? y : fmaf(y, fmaf(-x, y, 1.0f), y);
}

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, which the next caller would get otherwise
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Returns the number of bytes of shared memory that one block may have.
inline int shared_limit(int device) {
  int limit = 0;
  check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return limit;
}

inline int multiprocessors(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Lets a kernel have that many bytes of dynamic shared memory. The number must be the same at every call, because
// another thread may set it between this call and the launch.
template <class Kernel>
void allow_shared(Kernel kernel, int64_t bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

// Makes a device the current one for a scope. It calls cudaSetDevice only if it must, because that creates a context.
class OnDevice {
 public:
  explicit OnDevice(int device) : device_(device) {
    check(cudaGetDevice(&before_));
    if (device_ != before_) check(cudaSetDevice(device_));
  }
  ~OnDevice() {
    if (device_ != before_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int device_, before_ = 0;
};

}  // namespace dmf::cuda
