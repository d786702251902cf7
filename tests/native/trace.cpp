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

  void start_call() { loaded = stored = races = 0; }
  void starts_launch() override {
    global.clear();
    counters.clear();
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

Traffic operator*(int64_t rows, Traffic each) { return {rows * each.reads, rows * each.writes}; }
Traffic operator+(Traffic a, Traffic b) { return {a.reads + b.reads, a.writes + b.writes}; }

// What changes how a kernel goes about a row, but not what plan.h declares for it.
struct Variant {
  const char* name;
  double softcap;
  bool packed;  // sequences of 2, 3, 0 and 7 rows, by cu_seqlens
  bool nan;     // in row 7, whose sequence then has a fault
};
constexpr Variant kPlain{"", 0, false, false};

// Logits and their gradient lie side by side, so that both are counted by address. What a kernel reads are logits, or
// of scale the gradient; what it writes is the gradient.
template <class In, class Out = In>
struct Case {
  const char* dtype;
  Variant variant;
  int64_t vocab, sequences = 4, steps = 3, rows = 12;
  In* z;
  Out* dz;
  int64_t* labels;
  double *lse, *weight, *total, *bonus, *inputs;
  dmf::Batch batch;
  dmf::Terms terms;
  dmf::Outputs out;
  dmf::cuda::Workspace work;

  DType type_dz;

  Case(const char* name, DType type, int64_t v, Variant how = kPlain) : Case(name, type, type, v, how) {}
  Case(const char* name, DType type, DType of_gradient, int64_t v, Variant how = kPlain)
      : dtype(name), variant(how), vocab(v), type_dz(of_gradient) {
    used = 0;
    std::memset(memory, 0, sizeof(memory));
    z = allocate<In>(rows * v, 1);  // no row is aligned
    dz = allocate<Out>(rows * v, 1);
    labels = allocate<int64_t>(rows);
    for (int64_t i = 0; i < rows; ++i) labels[i] = i * 31 % v;
    labels[4] = -100;
    double* values = allocate<double>(9 * sequences + 3 * rows + 8);
    inputs = values + 7 * sequences, lse = values + 9 * sequences, total = lse + 3 * rows, bonus = total + 1;
    std::fill_n(bonus, sequences, 0.3);
    for (int64_t i = 0; i < 2 * sequences; ++i) inputs[i] = -20.0;
    inputs[sequences + 1] = -INFINITY;  // P = 0 in sequence 1, whose weight is then 0 for dpg
    int64_t* starts = allocate<int64_t>(sequences + 1);
    std::copy_n(std::array<int64_t, 5>{0, 2, 5, 5, 12}.data(), sequences + 1, starts);
    const dmf::RowOptions options{v, 1.0, how.softcap};
    batch = {type, 1, reinterpret_cast<char*>(z), sequences, steps, rows, steps * v, v, nullptr, labels, options, 0, v};
    if (how.packed) batch.cu_seqlens = starts, batch.steps = 0, batch.stride_sequence = 0;
    terms = {{dmf::Kind::dpg, dmf::kHasTarget, 0.0, INFINITY}, {inputs, inputs + sequences}, {}};
    out = {lse, values, rows, sequences, total, true, 1.0};
    weight = &out.weight(0);
    work = {0, nullptr, allocate<int64_t>(sequences + rows * dmf::cuda::kMostParts * 2),
            allocate<unsigned>(sequences + 1 + rows), allocate<int64_t>(1)};
  }
  static float& value(float& x) { return x; }
  static dmf::bf16& value(__nv_bfloat16& x) { return x.x; }
  static dmf::fp16& value(__half& x) { return x.x; }

  dmf::Gradient gradient(bool inplace) const {
    return {type_dz, inplace ? reinterpret_cast<char*>(z) : reinterpret_cast<char*>(dz), steps * vocab, vocab};
  }

  void fill() {
    for (int64_t i = 0; i < rows * vocab; ++i)
      dmf::from_float(static_cast<float>(i * 7919 % 1000) / 250.0f, value(z[i]));
    if (variant.nan) dmf::from_float(NAN, value(z[7 * vocab + vocab / 2]));
  }

  // What the kernel does, against what plan.h declares for all rows.
  template <class Call>
  void expect(const char* kernel, Traffic want, Call call, size_t read_size = sizeof(In)) {
    fill();  // a call before may have written its gradient there
    std::fill_n(work.counters, sequences + 1 + rows, 0u);
    tracer.begin = reinterpret_cast<const char*>(z);
    tracer.end = reinterpret_cast<const char*>(dz + rows * vocab);
    tracer.start_call();
    shim::observer = &tracer;
    call();
    shim::observer = nullptr;
    const double reads = static_cast<double>(tracer.loaded) / static_cast<double>(vocab * read_size);
    const double writes = static_cast<double>(tracer.stored) / static_cast<double>(vocab * sizeof(Out));
    const bool near =
        std::fabs(reads - want.reads) <= 0.03 * want.reads && std::fabs(writes - want.writes) <= 0.03 * want.writes;
    const bool ok = near && tracer.races == 0;
    failures += !ok;
    std::printf("%-6s %-28s %s V %5ld%s: %7.3f rows read of %6.2f declared, %7.3f written of %6.2f, %zu races\n",
                ok ? "ok" : "FAILED", kernel, dtype, static_cast<long>(vocab), variant.name, reads, want.reads, writes,
                want.writes, tracer.races);
  }

  // Scores rows in parts, of which there are as many as plan.h says.
  void run_in_parts(int parts) {
    using namespace dmf::cuda;
    if (parts_of_row(rows, vocab, sizeof(In), 132) != parts) std::abort();
    expect("forward, in parts", (rows - 1) * kForward, [&] { forward(batch, terms, out, work); });
  }

  void run() {
    using namespace dmf::cuda;
    // sequence 1 has weight 0 and the masked row; the one with the NaN is the last of the packed ones
    const int64_t scored = rows - 1, faulty = variant.nan ? (variant.packed ? 7 : steps) : 0;
    const int64_t positive = scored - 2 - faulty;
    const Plan plan = plan_known(vocab, sizeof(In), 227 << 10);
    if (!plan.kept) std::abort();
    expect("forward", scored * kForward, [&] { forward(batch, terms, out, work); });
    for (const bool inplace : {false, true}) {
      if (inplace && sizeof(In) != sizeof(Out)) continue;
      expect(inplace ? "backward in place" : "backward", positive * kBackward + (rows - positive) * kSkipped,
             [&] { backward(batch, lse, weight, {nullptr, nullptr}, 0.5, nullptr, NAN, gradient(inplace), work); });
      const dmf::Bonus of_entropy{&out.row_entropy(0), bonus};
      const int64_t with_bonus = scored - faulty;
      expect(inplace ? "bonus, in place" : "bonus", with_bonus * kBackward + (rows - with_bonus) * kSkipped,
             [&] { backward(batch, lse, weight, of_entropy, 0.5, nullptr, NAN, gradient(inplace), work); });
      for (const double coefficient : {0.0, 0.3}) {
        terms.entropy_coefficient = coefficient;
        const auto known = [&] { forward_backward(batch, terms, out, 0.5, gradient(inplace), work); };
        // Sequence 1 is read for its log pi, and its gradient is 0 but for a bonus. So is the row with a NaN; the
        // others of its sequence have their gradient by the time that it is known. Then all of them are zeroed.
        // Where it is read twice, by two launches, the second knows.
        const auto declared = [&](Traffic row, bool kept) {
          const Traffic read_only{kForward.reads, kSkipped.writes};
          Traffic of_faulty = faulty * read_only;
          if (faulty && kept) of_faulty = (faulty - 1) * row + read_only + faulty * kSkipped;
          return positive * row + 2 * (coefficient != 0.0 ? row : read_only) + kSkipped + of_faulty;
        };
        expect(inplace ? "known weight, kept, in place" : "known weight, kept", declared(kKnownKept, true), known);
        setenv("SHIM_SHARED", "0", 1);
        expect(inplace ? "known weight, read twice, in place" : "known weight, read twice",
               declared(kKnownReread, false), known);
        unsetenv("SHIM_SHARED");
      }
    }
    *total = 0.5;  // grad_output
    expect("scale", scored * kScale, [&] { scale(batch, 1.0, total, gradient(false), work); }, sizeof(Out));
    const dmf::SampleRows draws{batch.dtype, batch.logits, rows, vocab, batch.options, 3, nullptr, 5, nullptr};
    expect("sample", rows * sampling(vocab, 512), [&] { sample(draws, labels, lse, work); });
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
    Case<float, __nv_bfloat16>("fp32 -> bf16", DType::f32, DType::bf16, v).run();
    Case<float, __half>("fp32 -> fp16", DType::f32, DType::f16, v).run();
  }
  for (const Variant how : {Variant{", softcap", 30, false, false}, Variant{", packed", 0, true, false},
                            Variant{", NaN", 0, false, true}, Variant{", all of them", 30, true, true}}) {
    Case<float>("fp32", DType::f32, 1000, how).run();
    Case<__nv_bfloat16>("bf16", DType::bf16, 1000, how).run();
    Case<float, __nv_bfloat16>("fp32 -> bf16", DType::f32, DType::bf16, 1000, how).run();
  }
  for (const Variant how : {kPlain, Variant{", softcap, packed, NaN", 30, true, true}}) {
    Case<float>("fp32", DType::f32, 20011, how).run_in_parts(4);
    Case<__nv_bfloat16>("bf16", DType::bf16, 24571, how).run_in_parts(2);
  }
  std::printf("%s\n", failures ? "FAILED" : "ok");
  return failures != 0;
}
