#include "emulation/execution.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace vitq::emulation {
namespace {

constexpr size_t kStackBytes = 256 << 10;  // the largest kernel's frame under the sanitizers, with room
constexpr unsigned char kGarbage = 0xCD;

enum class State { kReady, kAtCollective, kAtBarrier, kDone };

struct Copy {
  void* target;
  std::vector<unsigned char> bytes;
};

struct Thread {
  ucontext_t context;
  State state = State::kReady;
  Indices indices;
  unsigned lane;
  const char* instruction = nullptr;  // that it waits at
  Execute execute = nullptr;
  void* operands = nullptr;
  std::vector<std::vector<Copy>> groups{1};  // of cp.async; the last one is not committed
};

class Stacks {
 public:
  unsigned char* at(size_t index) {
    while (stacks_.size() <= index) stacks_.push_back(std::make_unique<unsigned char[]>(kStackBytes));
    return stacks_[index].get();
  }

 private:
  std::vector<std::unique_ptr<unsigned char[]>> stacks_;
};

std::mt19937_64 random_bits(1);
Faults planted;
std::set<int> barrier_lines;
Stacks stacks;

class Block {
 public:
  Block(dim3 index, dim3 grid, unsigned count, size_t shared_bytes, const std::function<void()>& kernel)
      : kernel_(kernel), threads_(count), shared_bytes_(shared_bytes) {
    // Beyond the C library's 16 bytes: the strictest alignment that an instruction asks of shared memory is 128.
    shared_ = static_cast<unsigned char*>(std::aligned_alloc(128, (shared_bytes + 127) / 128 * 128));
    std::memset(shared_, kGarbage, shared_bytes);
    for (unsigned i = 0; i < count; ++i) {
      threads_[i].indices = {dim3(i, 0, 0), index, dim3(count), grid};
      threads_[i].lane = i % kWarp;
    }
  }
  ~Block() { std::free(shared_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  void run();
  void stop_at(State state);  // of the running thread: hands over to the scheduler
  void meet(const char* name, void* operands, Execute execute);

  Thread& running() { return *running_; }
  unsigned char* shared() { return shared_; }
  size_t shared_bytes() const { return shared_bytes_; }

 private:
  static void enter();
  void start(size_t index);
  void resume(Thread& thread);
  void run_warp(size_t first, size_t last);

  const std::function<void()>& kernel_;
  std::vector<Thread> threads_;
  size_t shared_bytes_;
  unsigned char* shared_;
  Thread* running_ = nullptr;
  ucontext_t scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
  std::exception_ptr failure_;
};

Block* current = nullptr;

// Tells AddressSanitizer which stack is in use.
void before_switch([[maybe_unused]] void** fake, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake, stack, bytes);
#endif
}

void after_switch([[maybe_unused]] void* fake, [[maybe_unused]] const void** stack, [[maybe_unused]] size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, stack, bytes);
#endif
}

void Block::enter() {
  after_switch(nullptr, &current->scheduler_stack_, &current->scheduler_stack_bytes_);
  Block* block = current;
  try {
    block->kernel_();
  } catch (...) {
    block->failure_ = std::current_exception();
  }
  block->running_->state = State::kDone;
  before_switch(nullptr, block->scheduler_stack_, block->scheduler_stack_bytes_);
  swapcontext(&block->running_->context, &block->scheduler_);
}

void Block::start(size_t index) {
  ucontext_t& context = threads_[index].context;
  getcontext(&context);
  context.uc_stack.ss_sp = stacks.at(index);
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, &Block::enter, 0);
}

void Block::resume(Thread& thread) {
  running_ = &thread;
  void* fake = nullptr;
  before_switch(&fake, thread.context.uc_stack.ss_sp, kStackBytes);
  swapcontext(&scheduler_, &thread.context);
  after_switch(fake, nullptr, nullptr);
  running_ = nullptr;
  if (failure_) std::rethrow_exception(failure_);
}

void Block::stop_at(State state) {
  Thread& thread = *running_;
  thread.state = state;
  void* fake = nullptr;
  before_switch(&fake, scheduler_stack_, scheduler_stack_bytes_);
  swapcontext(&thread.context, &scheduler_);
  after_switch(fake, &scheduler_stack_, &scheduler_stack_bytes_);
}

void Block::meet(const char* name, void* operands, Execute execute) {
  Thread& self = *running_;
  self.instruction = name, self.operands = operands, self.execute = execute;
  const size_t first = self.indices.thread.x / kWarp * kWarp;
  unsigned arrived = 1;
  for (size_t i = first; i < first + kWarp && i < threads_.size(); ++i) {
    const Thread& other = threads_[i];
    if (&other == &self || other.state != State::kAtCollective) continue;
    if (other.execute != execute) {
      throw std::runtime_error(std::string("emulation: lanes of a warp diverge: one is at ") + name + ", another at " +
                               other.instruction);
    }
    ++arrived;
  }
  if (arrived < kWarp) return stop_at(State::kAtCollective);
  void* all[kWarp];
  for (int i = 0; i < kWarp; ++i) all[i] = threads_[first + i].operands;
  execute(all);
  for (int i = 0; i < kWarp; ++i) threads_[first + i].state = State::kReady;
}

void Block::run_warp(size_t first, size_t last) {
  std::vector<Thread*> ready;
  for (;;) {
    ready.clear();
    for (size_t i = first; i < last; ++i) {
      if (threads_[i].state == State::kReady) ready.push_back(&threads_[i]);
    }
    if (ready.empty()) break;
    std::shuffle(ready.begin(), ready.end(), random_bits);
    for (Thread* thread : ready) {
      if (thread->state == State::kReady) resume(*thread);
    }
  }
  for (size_t i = first; i < last; ++i) {
    if (threads_[i].state == State::kAtCollective) {
      throw std::runtime_error(std::string("emulation: not all lanes of a warp arrive at ") + threads_[i].instruction);
    }
  }
}

void Block::run() {
  for (size_t i = 0; i < threads_.size(); ++i) start(i);
  std::vector<size_t> warps;
  for (size_t first = 0; first < threads_.size(); first += kWarp) warps.push_back(first);
  for (;;) {
    // Warps run as far as they can, in random order; then all of them stand at a barrier, or are done.
    std::shuffle(warps.begin(), warps.end(), random_bits);
    for (size_t first : warps) run_warp(first, std::min(first + kWarp, threads_.size()));
    bool waiting = false;
    for (Thread& thread : threads_) {
      if (thread.state != State::kAtBarrier) continue;
      thread.state = State::kReady;
      waiting = true;
    }
    if (!waiting) return;
  }
}

}  // namespace

const Indices& indices() { return current->running().indices; }
unsigned lane() { return current->running().lane; }
unsigned char* shared_memory_of_block() { return current->shared(); }
Faults& faults() { return planted; }
void set_seed(uint64_t seed) { random_bits.seed(seed); }

size_t take_barrier_lines(int* lines, size_t capacity) {
  const size_t count = std::min(capacity, barrier_lines.size());
  std::copy_n(barrier_lines.begin(), count, lines);
  barrier_lines.clear();
  return count;
}

void check_shared(const void* address, size_t bytes, const char* instruction) {
  const auto* at = static_cast<const unsigned char*>(address);
  const unsigned char* base = current->shared();
  if (at < base || at + bytes > base + current->shared_bytes() || reinterpret_cast<uintptr_t>(at) % bytes) {
    throw std::runtime_error(std::string("emulation: ") + instruction + " at byte " + std::to_string(at - base) +
                             " of " + std::to_string(current->shared_bytes()) + " of shared memory");
  }
}

void launch(dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel) {
  std::vector<dim3> blocks;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) blocks.emplace_back(x, y, z);
    }
  }
  std::shuffle(blocks.begin(), blocks.end(), random_bits);
  for (const dim3& index : blocks) {
    Block block(index, grid, threads, shared_bytes, kernel);
    current = &block;
    block.run();
    current = nullptr;
  }
}

void barrier(int line) {
  barrier_lines.insert(line);
  if (line != planted.skipped_barrier) current->stop_at(State::kAtBarrier);
}

void collective(const char* name, void* operands, Execute execute) { current->meet(name, operands, execute); }

void copy_async(void* shared, const void* global, unsigned bytes, unsigned valid) {
  check_shared(shared, bytes, "cp.async");
  if (reinterpret_cast<uintptr_t>(global) % bytes) throw std::runtime_error("emulation: cp.async reads unaligned");
  if (planted.unbounded_copies) valid = bytes;
  Copy copy{shared, std::vector<unsigned char>(bytes, 0)};
  std::memcpy(copy.bytes.data(), global, valid);
  std::memset(shared, kGarbage, bytes);  // the hardware may write at any time from here on
  current->running().groups.back().push_back(std::move(copy));
}

void commit_copies() { current->running().groups.emplace_back(); }

void wait_copies(unsigned pending_groups) {
  auto& groups = current->running().groups;
  const size_t kept = pending_groups + planted.extra_pending + 1;  // and the one not committed
  while (groups.size() > kept) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.target, copy.bytes.data(), copy.bytes.size());
    groups.erase(groups.begin());
  }
}

}  // namespace vitq::emulation
