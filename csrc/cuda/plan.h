// How many threads work on a row and whether it stays in shared memory: plain arithmetic, tested without a device.
#pragma once
#include <algorithm>
#include <cstdint>

namespace dmf::cuda {

struct Plan {
  int threads;     // a multiple of 32
  bool kept;       // the row stays in shared memory, from which it is read again
  int64_t shared;  // bytes of dynamic shared memory
};

// Loads and stores of logits per logit, to which tests/native/trace.cpp holds the kernels.
struct Traffic {
  double reads, writes;
};
constexpr Traffic kForward{1, 0}, kBackward{1, 1}, kKnownKept{1, 1}, kKnownReread{2, 1}, kScale{1, 1};
constexpr Traffic kSkipped{0, 1};  // a row that is not scored or of weight 0, where a gradient is written
// sampling: every tile, and the one that is picked once more
inline Traffic sampling(int64_t vocab, int64_t tile) {
  return {1 + static_cast<double>(std::min(vocab, tile)) / static_cast<double>(vocab), 0};
}

constexpr int kMaxThreads = 256;       // of a kernel that visits a row once
constexpr int kMaxKnownThreads = 384;  // of one that keeps it, of which few fit a multiprocessor
constexpr int64_t kStaticShared = 4096;

// Two loads of 16 bytes a thread, at least a warp.
inline int threads_for(int64_t row_bytes, int most) {
  const int64_t warps = (row_bytes + 32 * 32 - 1) / (32 * 32);
  return static_cast<int>(std::min<int64_t>(most / 32, std::max<int64_t>(warps, 1))) * 32;
}

inline Plan plan_once(int64_t vocab, int64_t itemsize) {
  return {threads_for(vocab * itemsize, kMaxThreads), false, 0};
}

// What a row may have of that. limit: the shared memory that one block may have.
inline int64_t shared_for_row(int64_t limit) { return std::max<int64_t>(limit - kStaticShared, 0); }

// limit as above. A row is kept where two fit a multiprocessor, so that one is read while the other is summed up or
// written. Another takes two launches, a score and a gradient, which read it twice: a block that kept it alone would
// idle for 4 to 5 us a row, from its last load to its first store and again until the next row comes, and one that did
// not keep it would read it from memory again all the same, since the rows under way exceed the second-level cache.
inline Plan plan_known(int64_t vocab, int64_t itemsize, int64_t limit) {
  const int64_t bytes = (vocab * itemsize + 31) / 16 * 16;  // with room to shift the row to its alignment
  const bool kept = 2 * (bytes + kStaticShared) <= limit;
  return {threads_for(vocab * itemsize, kMaxKnownThreads), kept, kept ? bytes : 0};
}

}  // namespace dmf::cuda
