// Decides how many threads work on a row and whether it stays in shared memory. This is plain arithmetic, which is
// tested without a device.
#pragma once
#include <algorithm>
#include <cstdint>

namespace dmf::cuda {

struct Plan {
  int threads;     // a multiple of 32
  bool kept;       // the row stays in shared memory, from which it is read again
  int64_t shared;  // bytes of dynamic shared memory
};

// The loads and stores per logit. tests/native/trace.cpp checks that the kernels do not exceed them.
struct Traffic {
  double reads, writes;
};
constexpr Traffic kForward{1, 0}, kBackward{1, 1}, kKnownKept{1, 1}, kKnownReread{2, 1}, kScale{1, 1};
constexpr Traffic kSkipped{0, 1};  // a row that is not scored or has weight 0, in a kernel that writes a gradient
// sampling reads every tile once, and the picked tile once more
inline Traffic sampling(int64_t vocab, int64_t tile) {
  return {1 + static_cast<double>(std::min(vocab, tile)) / static_cast<double>(vocab), 0};
}

constexpr int kMaxThreads = 256;       // for a kernel that reads a row once
constexpr int kMaxKnownThreads = 384;  // for a kernel that keeps its row, since few such blocks fit a multiprocessor
constexpr int64_t kStaticShared = 4096;

// Each thread gets two loads of 16 bytes. There is at least one warp.
inline int threads_for(int64_t row_bytes, int most) {
  const int64_t warps = (row_bytes + 32 * 32 - 1) / (32 * 32);
  return static_cast<int>(std::min<int64_t>(most / 32, std::max<int64_t>(warps, 1))) * 32;
}

inline Plan plan_once(int64_t vocab, int64_t itemsize) {
  return {threads_for(vocab * itemsize, kMaxThreads), false, 0};
}

// A call with few rows divides each of them among several blocks, so that no multiprocessor is idle. One block alone
// has 8 KB of loads under way, which is a quarter of what a multiprocessor needs.
constexpr int64_t kFewRows = 512;      // a call with at most so many rows brings memory for their parts
constexpr int kMostParts = 32;         // a warp joins the parts of a row
constexpr int64_t kPartBytes = 16384;  // of a row, at least, which are two rounds of a block

// Returns into how many parts a row is divided that is only scored. Four blocks of a score fit a multiprocessor.
inline int parts_of_row(int64_t rows, int64_t vocab, int64_t itemsize, int multiprocessors) {
  if (rows < 1 || rows > kFewRows) return 1;
  const int64_t wanted = std::min<int64_t>(4 * multiprocessors / rows, vocab * itemsize / kPartBytes);
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(wanted, kMostParts)));
}

// Returns the shared memory that is left for a row. limit is the shared memory that one block may have.
inline int64_t shared_for_row(int64_t limit) { return std::max<int64_t>(limit - kStaticShared, 0); }

// limit is as above. A row is kept if two fit a multiprocessor, so that one is read while the other is summed up or
// written. A longer row takes two launches, a score and a gradient, which read it twice. A block that kept such a row
// alone on a multiprocessor would idle for 4 to 5 us a row, between its last load and its first store and until the
// next row arrives. A block that did not keep it would read it from memory again in any case, since the rows that are
// being read together exceed the second-level cache.
inline Plan plan_known(int64_t vocab, int64_t itemsize, int64_t limit) {
  const int64_t bytes = (vocab * itemsize + 31) / 16 * 16;  // with room to shift the row to its alignment
  const bool kept = 2 * (bytes + kStaticShared) <= limit;
  return {threads_for(vocab * itemsize, kMaxKnownThreads), kept, kept ? bytes : 0};
}

}  // namespace dmf::cuda
