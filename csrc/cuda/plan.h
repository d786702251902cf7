// How many threads work on a row and whether it stays in shared memory: plain arithmetic, tested without a device.
#pragma once
#include <algorithm>
#include <cstdint>

namespace dmf::cuda {

struct Plan {
  int threads;     // a multiple of 32
  bool kept;       // the row stays in shared memory between its two reads
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
constexpr int kMaxKnownThreads = 768;  // of one that visits it twice, of which few fit a multiprocessor
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

// limit as above. A row that exceeds it is read twice; then a block asks for all of
// the memory, which it does not use, so that one row a multiprocessor is under way and all of them stay in the
// second-level cache (132 rows of 300 KB on an H100, which has 50 MB).
inline Plan plan_known(int64_t vocab, int64_t itemsize, int64_t limit) {
  const int64_t available = shared_for_row(limit);
  const int64_t bytes = (vocab * itemsize + 31) / 16 * 16;  // with room to shift the row to its alignment
  const bool kept = bytes <= available, alone = 2 * (bytes + kStaticShared) > limit;
  const int most = alone ? kMaxKnownThreads : kMaxKnownThreads / 2;
  return {threads_for(vocab * itemsize, most), kept, kept ? bytes : available};
}

}  // namespace dmf::cuda
