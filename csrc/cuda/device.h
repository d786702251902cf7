// CUDA as the kernels use it. tests/native/shim.h stands in for it where g++ compiles them to run on the host.
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
// To 2^-22 of the result; denormals are 0.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// To an ulp.
__device__ inline float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif
// To half of an ulp, nearly.
__device__ inline float reciprocal(float x) {
  const float y = reciprocal_approx(x);
  return isinf(x) ? y : fmaf(y, fmaf(-x, y, 1.0f), y);
}

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // which keeps it, for whoever asks next
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// The shared memory that one block may have.
inline int shared_limit(int device) {
  int limit = 0;
  check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return limit;
}

// Lets a kernel have that many bytes of dynamic shared memory. To be the same at every call: between this and its
// launch another thread may set it again.
template <class Kernel>
void allow_shared(Kernel kernel, int64_t bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

// Makes a device the current one for a scope. cudaSetDevice makes a context where there is none: only where it must.
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
