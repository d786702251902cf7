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
#include <stdexcept>
#include <string>

namespace dmf::cuda {

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Makes a device the current one for a scope.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_));
    if (device != before_) check(cudaSetDevice(device));
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

}  // namespace dmf::cuda
