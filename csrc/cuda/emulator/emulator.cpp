#include "emulator.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fusedopt::cuda::emulated {

Dimension threadIdx, blockIdx, gridDim;

namespace {

constexpr int kWarp = 32, kWarps = kThreads / kWarp;
constexpr size_t kStackBytes = 64 << 10, kSharedBytes = 48 << 10;

// Switching stacks. glibc's own way makes two system calls each time, and a block switches thousands of times.
#if defined(__x86_64__)
extern "C" void fusedopt_switch_stack(void** save, void* load);
asm(R"(
.text
.local fusedopt_switch_stack
.type fusedopt_switch_stack, @function
fusedopt_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size fusedopt_switch_stack, .-fusedopt_switch_stack
)");

struct Context {
  void* top = nullptr;
  void prepare(char* stack, void (*entry)()) {
    void** place = reinterpret_cast<void**>(stack + kStackBytes);
    *--place = nullptr;  // where a return address would be: keeps the alignment of a call
    *--place = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; ++saved) *--place = nullptr;
    top = place;
  }
};
void switch_to(Context& from, Context& to) { fusedopt_switch_stack(&from.top, to.top); }
#else
struct Context {
  ucontext_t context;
  void prepare(char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
};
void switch_to(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Thread {
  Context context;
  State state;
};

// One block at a time, in one thread of the host.
struct Machine {
  std::mutex busy;
  std::vector<char> stacks = std::vector<char>(kThreads * kStackBytes);
  Thread threads[kThreads];
  Context scheduler;
  const std::function<void()>* kernel = nullptr;
  alignas(16) char shared[kSharedBytes];
  uint64_t warp_values[2][kThreads];  // in turns, so that a fast thread does not overwrite what a slow one reads
  int warp_turn[kThreads];
  uint64_t block_value;
  uint64_t block_result;
  bool block_value_taken;
};
Machine machine;
std::shared_ptr<Graph> recording;
uint64_t launches = 0;

void yield(State state) {
  const uint32_t me = threadIdx.x;
  machine.threads[me].state = state;
  switch_to(machine.threads[me].context, machine.scheduler);
  threadIdx.x = me;
}

void thread_entry() {
  (*machine.kernel)();
  yield(State::kDone);
}

bool all_are(int begin, int end, State wanted, bool& any) {
  any = false;
  for (int t = begin; t < end; ++t) {
    if (machine.threads[t].state == State::kDone) continue;
    if (machine.threads[t].state != wanted) return false;
    any = true;
  }
  return true;
}

void release(int begin, int end) {
  for (int t = begin; t < end; ++t) {
    if (machine.threads[t].state != State::kDone) machine.threads[t].state = State::kReady;
  }
}

void run_block(const std::vector<uint32_t>& order) {
  std::fill_n(machine.shared, kSharedBytes, '\xff');  // NaN in any dtype
  machine.block_value_taken = false;
  for (int t = 0; t < kThreads; ++t) {
    machine.threads[t].state = State::kReady;
    machine.warp_turn[t] = 0;
    machine.threads[t].context.prepare(machine.stacks.data() + t * kStackBytes, thread_entry);
  }
  for (bool running = true; running;) {
    bool progress = false, any;
    for (uint32_t t : order) {
      if (machine.threads[t].state != State::kReady) continue;
      threadIdx.x = t;
      switch_to(machine.scheduler, machine.threads[t].context);
      progress = true;
    }
    for (int warp = 0; warp < kWarps; ++warp) {
      if (!all_are(warp * kWarp, (warp + 1) * kWarp, State::kAtWarpBarrier, any) || !any) continue;
      release(warp * kWarp, (warp + 1) * kWarp);
      progress = true;
    }
    if (all_are(0, kThreads, State::kAtBlockBarrier, any)) {
      if (!any) {
        running = false;
      } else {
        machine.block_result = machine.block_value;
        machine.block_value_taken = false;
        release(0, kThreads);
        progress = true;
      }
    }
    if (!progress) throw std::logic_error("some threads of a block wait at a barrier that others never reach");
  }
}

}  // namespace

uint64_t meet_block(uint64_t value, uint64_t (*combine)(uint64_t, uint64_t)) {
  machine.block_value = machine.block_value_taken ? combine(machine.block_value, value) : value;
  machine.block_value_taken = true;
  yield(State::kAtBlockBarrier);
  return machine.block_result;
}

const uint64_t* meet_warp(uint64_t value) {
  const uint32_t me = threadIdx.x;
  uint64_t* const values = machine.warp_values[machine.warp_turn[me] ^= 1];
  values[me] = value;
  yield(State::kAtWarpBarrier);
  return values + me / kWarp * kWarp;
}

Settings& settings() {
  static Settings chosen;
  return chosen;
}

void* shared_memory(size_t bytes) {
  if (bytes > kSharedBytes) throw std::logic_error("a kernel uses more shared memory than a block has");
  return machine.shared;
}

void run_blocks(uint32_t blocks, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(machine.busy);
  std::vector<uint32_t> order(blocks), thread_order(kThreads);
  std::iota(order.begin(), order.end(), 0);
  std::iota(thread_order.begin(), thread_order.end(), 0);
  if (const uint64_t seed = settings().order) {
    std::mt19937_64 random(seed);
    std::shuffle(order.begin(), order.end(), random);
    std::shuffle(thread_order.begin(), thread_order.end(), random);
  }
  if (settings().lost < blocks) order.resize(blocks - settings().lost);
  machine.kernel = &kernel;
  gridDim.x = blocks;
  for (uint32_t block : order) {
    blockIdx.x = block;
    run_block(thread_order);
  }
}

void run_ptx(void* kernel, uint32_t blocks, bool early, const std::vector<ptx::Argument>& arguments) {
  const std::string name = ptx_name(kernel);
  for (const auto& module : settings().ptx) {
    if (!module->has_kernel(name)) continue;
    const bool starts_early = early && module->architecture >= 90;
    ptx::run(*module, name, {blocks, kWarps, 0, starts_early, settings().order, settings().lost}, arguments);
    return;
  }
  throw ptx::Error("the PTX holds no kernel " + name);
}

void run_or_record(std::function<void()> launch) {
  if (recording) {
    recording->launches.push_back(std::move(launch));
  } else {
    ++launches;
    if (!settings().dry) launch();
  }
}

void Graph::replay() const {
  for (const auto& launch : launches) launch();
}

void begin_capture() { recording = std::make_shared<Graph>(); }

std::shared_ptr<Graph> end_capture() { return std::move(recording); }

uint64_t launch_count() { return launches; }

bool capturing(const Place&) { return recording != nullptr; }

}  // namespace fusedopt::cuda::emulated
