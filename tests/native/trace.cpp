// Traffic and races of the CUDA kernels, whose source is compiled with -fsanitize=thread against the __tsan_* functions
// below in place of a sanitizer's, on top of the shim: every load and store of a kernel comes here.
//
// Traffic: loads and stores of logits per logit are within 3% of what plan.h declares.
//
// Races: two accesses to the same bytes by two threads, one of them a store, between which there is no order. Order is,
// within a block, a barrier; within a warp, an exchange; and between blocks only this: store, barrier, fence, atomic on
// a counter by the one block; atomic on the same counter, fence, barrier, load by the other. Whatever happens to run
// first on the host orders nothing.
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <unordered_map>
#include <vector>

#include "cuda/loss.h"
#include "cuda/plan.h"
#include "shim.h"

namespace {

using dmf::DType;
using dmf::cuda::Traffic;

int failures = 0;
alignas(16) char memory[16 << 20];  // the device's
size_t used = 0;

struct Access {
  unsigned block, thread, epoch, generation;  // epoch: barriers of the block before; generation: exchanges of the warp
};

struct Shadow {
  bool written = false;
  Access write{};
  std::vector<Access> reads;  // since that write
};

using Clock = std::map<unsigned, unsigned>;  // of each block: accesses before this epoch are over

void join(Clock& to, const Clock& from) {
  for (const auto& [block, epoch] : from) to[block] = std::max(to[block], epoch);
}

struct Tracer : shim::Observer {
  std::unordered_map<uintptr_t, Shadow> global, local;  // by pairs of bytes
  std::map<const void*, Clock> counters;
  Clock seen, read, released;  // what this block may rely on; has read from counters; had seen at its last fence
  unsigned epoch = 0;
  std::array<unsigned, 32> generation{};
  bool has_fenced = false;
  Clock arriving;  // seen, from the next barrier on
  size_t races = 0;
  const char *begin = nullptr, *end = nullptr;  // logits, and then their gradient
  uint64_t loaded = 0, stored = 0;

  void start_kernel() {
    global.clear();
    counters.clear();
    loaded = stored = 0;
    races = 0;
  }
  void starts_block() override {
    local.clear();
    seen.clear();
    read.clear();
    released.clear();
    arriving.clear();
    epoch = 0;
    generation.fill(0);
    has_fenced = false;
  }
  void passes_barrier() override {
    ++epoch;
    join(seen, arriving);
  }
  void exchanges(unsigned warp) override { ++generation[warp]; }
  void fences() override {
    has_fenced = true;
    released = seen;
    released[shim::block.x] = epoch;
    join(arriving, read);
  }
  void adds(const void* counter) override {
    Clock& clock = counters[counter];
    join(read, clock);
    if (has_fenced) join(clock, released);
    has_fenced = false;  // it orders what came before it, not what comes after
  }

  bool ordered(const Access& before, const Access& now) const {
    if (before.block != now.block) {
      const auto found = seen.find(before.block);
      return found != seen.end() && before.epoch < found->second;
    }
    if (before.thread == now.thread || before.epoch < now.epoch) return true;
    return before.thread / 32 == now.thread / 32 && before.generation < now.generation;
  }

  void report(const Access& before, const Access& now, bool store, const void* p) {
    if (races++) return;
    std::printf("RACE: block %u thread %u %s %p, which block %u thread %u had\n", now.block, now.thread,
                store ? "stores to" : "loads from", p, before.block, before.thread);
  }

  void access(const char* p, size_t bytes, bool store) {
    if (!shim::in_kernel() || shim::on_stack(p)) return;
    if (p >= begin && p < end) (store ? stored : loaded) += bytes;
    const bool is_global = p >= memory && p < memory + sizeof(memory);
    auto& shadows = is_global ? global : local;
    const unsigned thread = shim::thread.x;
    const Access now{shim::block.x, thread, epoch, generation[thread / 32]};
    const auto first = reinterpret_cast<uintptr_t>(p) / 2, last = (reinterpret_cast<uintptr_t>(p) + bytes - 1) / 2;
    for (uintptr_t i = first; i <= last; ++i) {
      Shadow& shadow = shadows[i];
      if (shadow.written && !ordered(shadow.write, now)) report(shadow.write, now, store, p);
      if (store) {
        for (const Access& before : shadow.reads)
          if (!ordered(before, now)) report(before, now, store, p);
        shadow.reads.clear();
        shadow.write = now;
        shadow.written = true;
      } else {
        // one read of a thread stands for its earlier ones
        const auto mine = std::find_if(shadow.reads.begin(), shadow.reads.end(), [&](const Access& before) {
          return before.block == now.block && before.thread == now.thread;
        });
        if (mine != shadow.reads.end())
          *mine = now;
        else
          shadow.reads.push_back(now);
      }
    }
  }
} tracer;

template <class T>
T* allocate(size_t n, size_t offset = 0) {
  used = (used + 255) / 256 * 256 + offset * sizeof(T);
  T* p = reinterpret_cast<T*>(memory + used);
  used += n * sizeof(T);
  if (used > sizeof(memory)) std::abort();
  return p;
}

// Logits and their gradient lie side by side, so that both are counted by address.
template <class T>
struct Case {
  const char* dtype;
  int64_t vocab, sequences = 4, steps = 3, rows = 12;
  T *z, *dz;
  int64_t* labels;
  double *log_prob, *lse, *entropy, *log_ratio, *log_target_ratio, *weight, *loss, *total, *inputs;
  dmf::Batch batch;
  dmf::Terms terms;
  dmf::Outputs out;
  dmf::cuda::Workspace work;

  Case(const char* name, DType type, int64_t v) : dtype(name), vocab(v) {
    used = 0;
    std::memset(memory, 0, sizeof(memory));
    z = allocate<T>(rows * v, 1);  // no row is aligned
    dz = allocate<T>(rows * v, 1);
    for (int64_t i = 0; i < rows * v; ++i) dmf::from_float(static_cast<float>(i * 7919 % 1000) / 250.0f, value(z[i]));
    labels = allocate<int64_t>(rows);
    for (int64_t i = 0; i < rows; ++i) labels[i] = i * 31 % v;
    labels[4] = -100;
    double* values = allocate<double>(8 * sequences + 2 * rows + 8);
    log_prob = values, entropy = values + sequences, log_ratio = values + 2 * sequences;
    log_target_ratio = values + 3 * sequences, weight = values + 4 * sequences, loss = values + 5 * sequences;
    inputs = values + 6 * sequences, lse = values + 8 * sequences, total = lse + rows;
    for (int64_t i = 0; i < 2 * sequences; ++i) inputs[i] = -20.0;
    inputs[1] = -INFINITY;  // P = 0 in sequence 1, whose weight is then 0 for dpg
    batch = {type, reinterpret_cast<char*>(z), sequences, steps, rows, steps * v, v, nullptr, labels, {v, 1.0, 0.0}, 1};
    terms = {{dmf::Kind::dpg, false, true, 0, 0, INFINITY},
             inputs + sequences,
             inputs,
             nullptr,
             nullptr,
             nullptr,
             nullptr,
             0.0};
    out = {log_prob, lse, entropy, log_ratio, log_target_ratio, weight, loss, total, allocate<int64_t>(1), 1.0};
    work = {0, nullptr, allocate<double>(2 * (rows + sequences)), allocate<unsigned>(sequences + 1),
            allocate<int64_t>(1)};
  }
  static float& value(float& x) { return x; }
  static dmf::bf16& value(__nv_bfloat16& x) { return x.x; }
  static dmf::fp16& value(__half& x) { return x.x; }

  dmf::Gradient gradient(bool inplace) const {
    return {reinterpret_cast<char*>(inplace ? z : dz), steps * vocab, vocab};
  }

  // What the kernel does, against what plan.h declares for rows that count and rows that do not.
  template <class Call>
  void expect(const char* kernel, int64_t counting, Traffic declared, int64_t skipped, Traffic of_skipped, Call call) {
    tracer.begin = reinterpret_cast<const char*>(z);
    tracer.end = reinterpret_cast<const char*>(dz + rows * vocab);
    tracer.start_kernel();
    shim::observer = &tracer;
    call();
    shim::observer = nullptr;
    const double row = static_cast<double>(vocab * sizeof(T));
    const double reads = static_cast<double>(tracer.loaded) / row, writes = static_cast<double>(tracer.stored) / row;
    const double want_reads = counting * declared.reads + skipped * of_skipped.reads;
    const double want_writes = counting * declared.writes + skipped * of_skipped.writes;
    const bool near =
        std::fabs(reads - want_reads) <= 0.03 * want_reads && std::fabs(writes - want_writes) <= 0.03 * want_writes;
    const bool ok = near && tracer.races == 0;
    failures += !ok;
    std::printf("%-6s %-28s %s V %5ld: %7.3f rows read of %6.2f declared, %7.3f written of %6.2f, %zu races\n",
                ok ? "ok" : "FAILED", kernel, dtype, static_cast<long>(vocab), reads, want_reads, writes, want_writes,
                tracer.races);
  }

  void run() {
    using namespace dmf::cuda;
    const int64_t scored = rows - 1, positive = scored - 2;  // sequence 1 has weight 0 and the masked row
    const Traffic nothing{0, 0};
    const Plan plan = plan_known(vocab, sizeof(T), 227 << 10);
    if (!plan.kept) std::abort();
    expect("forward", scored, kForward, 1, nothing, [&] { forward(batch, terms, out, work); });
    for (const bool inplace : {false, true}) {
      expect(inplace ? "backward in place" : "backward", positive, kBackward, rows - positive, kSkipped,
             [&] { backward(batch, lse, weight, 0.5, nullptr, gradient(inplace), work); });
      // sequence 1 is read for its log pi, and its gradient is 0
      const auto known = [&] { forward_backward(batch, terms, out, 0.5, gradient(inplace), work); };
      const double zeroed = static_cast<double>(scored - positive) / (scored - positive + 1);
      expect(inplace ? "known weight, kept, in place" : "known weight, kept", positive, kKnownKept, rows - positive,
             {zeroed, 1}, known);
      setenv("SHIM_SHARED", "0", 1);
      expect(inplace ? "known weight, read twice, in place" : "known weight, read twice", positive, kKnownReread,
             rows - positive, {zeroed, 1}, known);
      unsetenv("SHIM_SHARED");
    }
    *total = 0.5;  // grad_output
    expect("scale", scored, kScale, 1, nothing, [&] { scale(batch, 1.0, total, gradient(false), work); });
    const dmf::SampleRows draws{batch.dtype, batch.logits, rows, vocab, {vocab, 1.0, 0.0}, 3, nullptr, 5, nullptr};
    expect("sample", rows, sampling(vocab, 512), 0, nothing, [&] { sample(draws, labels, lse, work); });
  }
};

}  // namespace

#define ACCESS(n)                                                                                  \
  void __tsan_read##n(void* p) { tracer.access(static_cast<const char*>(p), n, false); }           \
  void __tsan_write##n(void* p) { tracer.access(static_cast<const char*>(p), n, true); }           \
  void __tsan_unaligned_read##n(void* p) { tracer.access(static_cast<const char*>(p), n, false); } \
  void __tsan_unaligned_write##n(void* p) { tracer.access(static_cast<const char*>(p), n, true); }

extern "C" {
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void* p, size_t n) { tracer.access(static_cast<const char*>(p), n, false); }
void __tsan_write_range(void* p, size_t n) { tracer.access(static_cast<const char*>(p), n, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}

int main() {
  for (const int64_t v : {1000, 4099}) {
    Case<float>("fp32", DType::f32, v).run();
    Case<__nv_bfloat16>("bf16", DType::bf16, v).run();
    Case<__half>("fp16", DType::f16, v).run();
  }
  std::printf("%s\n", failures ? "FAILED" : "ok");
  return failures != 0;
}
