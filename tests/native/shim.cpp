#include "shim.h"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#ifndef __x86_64__
#error "the shim switches between fibers in x86-64 assembly: ucontext costs a system call each way"
#endif

// Stores the callee-saved registers and the stack pointer, and goes on where another stack stopped.
extern "C" void shim_switch(void** from, void* to);
asm(R"(
.text
.globl shim_switch
shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace shim {

dim3 thread, block, threads, blocks;

namespace {

enum class State { ready, at_barrier, in_exchange, done };

struct Fiber {
  std::unique_ptr<char[]> stack;
  void* pointer;
  State state;
  unsigned generation;  // of the exchange that it waits for
};

struct Warp {
  char slots[2][32][8];
  unsigned arrived = 0, generation = 0;
};

constexpr size_t kStack = 64 << 10;

std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::map<const void*, std::pair<std::unique_ptr<char[]>, size_t>> shared_memory;
std::unique_ptr<char[]> dynamic_memory;
size_t dynamic_bytes;
void* scheduler;
const std::function<void()>* body;
bool running;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "shim: %s (block %u, thread %u)\n", what, block.x, thread.x);
  std::abort();
}

void stop(State state) {
  Fiber& me = fibers[thread.x];
  me.state = state;
  shim_switch(&me.pointer, scheduler);
}

void enter() {
  (*body)();
  stop(State::done);
  fail("a finished thread ran on");
}

void start(Fiber& fiber) {
  if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStack);
  auto* top = reinterpret_cast<void**>(fiber.stack.get() + kStack - 64);
  top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15});
  *--top = nullptr;  // keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(&enter);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.pointer = top;
  fiber.state = State::ready;
}

void poison() {
  for (auto& [where, memory] : shared_memory) std::memset(memory.first.get(), 0xff, memory.second);
  if (dynamic_bytes) std::memset(dynamic_memory.get(), 0xff, dynamic_bytes);
}

void run_block(std::mt19937* random) {
  const unsigned n = threads.x;
  poison();
  if (observer) observer->starts_block();
  warps.assign(n / 32, Warp());
  std::vector<unsigned> order(n);
  for (unsigned i = 0; i < n; ++i) {
    start(fibers[i]);
    order[i] = i;
  }
  for (;;) {
    if (random) std::shuffle(order.begin(), order.end(), *random);
    unsigned ran = 0, waiting = 0, done = 0;
    for (const unsigned i : order) {
      Fiber& fiber = fibers[i];
      if (fiber.state == State::in_exchange && warps[i / 32].generation != fiber.generation) fiber.state = State::ready;
      if (fiber.state == State::ready) {
        thread = {i};
        running = true;
        shim_switch(&scheduler, fiber.pointer);
        running = false;
        ++ran;
      }
      waiting += fiber.state == State::at_barrier;
      done += fiber.state == State::done;
    }
    if (done == n) return;
    if (waiting == n) {
      for (Fiber& fiber : fibers) fiber.state = State::ready;
      if (observer) observer->passes_barrier();
    } else if (!ran)
      fail(waiting ? "not every thread reaches a barrier" : "threads wait for each other for ever");
  }
}

}  // namespace

Observer* observer;
bool in_kernel() { return running; }
bool on_stack(const void* p) {
  const char *x = static_cast<const char*>(p), *stack = fibers[thread.x].stack.get();
  return x >= stack && x < stack + kStack;
}

void wait_for_block() { stop(State::at_barrier); }

void exchange(const void* mine, void* result, size_t bytes, unsigned src) {
  Warp& warp = warps[thread.x / 32];
  const unsigned generation = warp.generation;
  auto& slots = warp.slots[generation % 2];  // the other half may still be read
  std::memcpy(slots[thread.x % 32], mine, bytes);
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.generation;
    if (observer) observer->exchanges(thread.x / 32);
  } else {
    fibers[thread.x].generation = generation;
    stop(State::in_exchange);
  }
  std::memcpy(result, slots[src], bytes);
}

void* dynamic_shared() { return dynamic_memory.get(); }

void* shared(const void* where, size_t bytes) {
  auto& [memory, size] = shared_memory[where];
  if (!memory) {
    memory = std::make_unique<char[]>(bytes);
    size = bytes;
    std::memset(memory.get(), 0xff, bytes);
  }
  return memory.get();
}

void launch(unsigned grid, unsigned block_size, size_t shared_bytes, const std::function<void()>& kernel) {
  if (block_size % 32 || block_size > 1024) fail("a block must be whole warps, 1024 threads at most");
  const char* seed = std::getenv("SHIM_SEED");
  std::mt19937 random(seed ? std::atoi(seed) : 0);
  if (observer) observer->starts_launch();
  threads = {block_size};
  blocks = {grid};
  body = &kernel;
  dynamic_bytes = shared_bytes;
  dynamic_memory = std::make_unique<char[]>(shared_bytes);
  fibers.resize(block_size);
  std::vector<unsigned> order(grid);
  for (unsigned i = 0; i < grid; ++i) order[i] = i;
  if (seed) std::shuffle(order.begin(), order.end(), random);
  for (const unsigned i : order) {
    block = {i};
    run_block(seed ? &random : nullptr);
  }
}

}  // namespace shim

// --- the runtime ------------------------------------------------------------------------------------------------

namespace {

cudaError_t last_error = cudaSuccess;

int number(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value ? std::atoi(value) : otherwise;
}

cudaError_t error(const char* what) {
  std::fprintf(stderr, "shim: %s\n", what);
  return last_error = 1;
}

}  // namespace

cudaError_t shim::answer(const char* function) {
  const char* fail = std::getenv("SHIM_FAIL");
  const char* colon = fail ? std::strchr(fail, ':') : nullptr;
  if (!colon || std::string(fail, colon) != function) return cudaSuccess;
  return last_error = std::atoi(colon + 1);
}

cudaError_t shim::set_shared(const void* kernel, int bytes) {
  static std::map<std::pair<const void*, int>, int> before;  // of a kernel and what a block may have
  const int limit = number("SHIM_SHARED", 227 << 10);
  if (before.emplace(std::make_pair(kernel, limit), bytes).first->second != bytes)
    return error("a kernel's shared memory changes from call to call");
  return answer("cudaFuncSetAttribute");
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t error) {
  static thread_local char text[32];
  std::snprintf(text, sizeof(text), "error %d of the shim", error);
  return text;
}
cudaError_t cudaGetDevice(int* device) { return *device = 0, shim::answer("cudaGetDevice"); }
cudaError_t cudaSetDevice(int) { return error("the device is set that is the current one"); }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, shim::answer("cudaGetDeviceCount"); }
cudaError_t cudaDriverGetVersion(int* version) { return *version = number("SHIM_DRIVER", 13000), cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? 7
           : attribute == cudaDevAttrComputeCapabilityMinor ? 5
           : attribute == cudaDevAttrMultiProcessorCount    ? number("SHIM_MULTIPROCESSORS", 132)
                                                            : number("SHIM_SHARED", 227 << 10);
  return shim::answer("cudaDeviceGetAttribute");
}

// --- between blocks ---------------------------------------------------------------------------------------------

void __threadfence() {
  if (shim::observer) shim::observer->fences();
}

unsigned atomicAdd(unsigned* p, unsigned x) {  // blocks run one after the other
  if (shim::observer) shim::observer->adds(p);
  const unsigned before = *p;
  *p = before + x;
  return before;
}
