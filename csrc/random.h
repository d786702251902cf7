// The counter-based generator Philox4x32-10 (Salmon et al. 2011). The random number of a draw is a function of the row
// and the step, not of earlier draws. So it depends neither on threads nor on how rows are cut into batches. Its twin
// is ``uniforms`` of dmfast/kernels/eager.py.
#pragma once
#include <cstdint>

#include "objective.h"

namespace dmf {

struct Philox {
  uint32_t x[4];
};

DMF_HD Philox philox(Philox counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter.x[0], b = uint64_t{0xCD9E8D57} * counter.x[2];
    counter = {{static_cast<uint32_t>(b >> 32) ^ counter.x[1] ^ key0, static_cast<uint32_t>(b),
                static_cast<uint32_t>(a >> 32) ^ counter.x[3] ^ key1, static_cast<uint32_t>(a)}};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return counter;
}

// Returns a number in [0, 1), a multiple of 2^-53.
DMF_HD double uniform(uint64_t seed, uint64_t row_id, uint64_t step) {
  const Philox r = philox({{static_cast<uint32_t>(row_id), static_cast<uint32_t>(row_id >> 32),
                            static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32)}},
                          static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return static_cast<double>(((static_cast<uint64_t>(r.x[0]) << 32) | r.x[1]) >> 11) * 0x1p-53;
}

}  // namespace dmf
