#include "emulation/execution.h"

#include "emulation/predecessor.h"

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

enum class State {
  kReady,
  kAtCollective,
  kAtBarrier,
  kAtNamedBarrier,
  kAtClusterBarrier,
  kAtMbarrier,
  kAtPredecessor,
  kDone
};

constexpr unsigned kWarpgroup = 128;
constexpr unsigned kNamedBarriers = 16;

// What an mbarrier's 8 bytes hold.
struct Mbarrier {
  int32_t bytes;     // that the phase still waits for
  uint8_t expected;  // arrivals of a phase
  uint8_t arrivals;  // that the phase still waits for
  uint8_t parity;    // of the phase under way
  uint8_t mark;      // kMark: initialised

  static constexpr uint8_t kMark = 0x5B;
};
static_assert(sizeof(Mbarrier) == 8);

// Products of a warpgroup that have been issued but not computed; the last group is not committed.
struct Products {
  std::vector<std::vector<std::function<void()>>> groups{1};
};

struct Arrival {
  void* barrier;
  unsigned bytes;
  std::function<void()> copy;
};

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
  unsigned width = kWarp;            // of the collective
  unsigned barrier = 0, parity = 0;  // that it waits at: of the named ones; of the mbarrier's phase
  const Mbarrier* mbarrier = nullptr;
  bool fenced = false;                       // no register written since wgmma.fence, as far as we know
  std::vector<std::vector<Copy>> groups{1};  // of cp.async; the last one is not committed
  std::vector<Copy> unfenced;                // words that the async proxy does not see yet
};

class Stacks {
 public:
  unsigned char* at(size_t index) {
    while (stacks_.size() <= index) stacks_.emplace_back(new unsigned char[kStackBytes]);  // untouched: no pages yet
    return stacks_[index].get();
  }

 private:
  std::vector<std::unique_ptr<unsigned char[]>> stacks_;
};

std::mt19937_64 random_bits(1);
Faults planted;
std::set<int> barrier_lines;
Stacks stacks;

Predecessor predecessor;

class Block {
 public:
  Block(dim3 index, dim3 grid, unsigned count, size_t shared_bytes, const std::function<void()>& kernel, unsigned rank)
      : kernel_(kernel),
        rank_(rank),
        threads_(count),
        shared_bytes_(shared_bytes),
        products_((count + kWarpgroup - 1) / kWarpgroup),
        late_(random_bits() % 2) {
    // Beyond the C library's 16 bytes: the strictest alignment that an instruction asks of shared memory is 1024.
    shared_ = static_cast<unsigned char*>(std::aligned_alloc(1024, (shared_bytes + 1023) / 1024 * 1024));
    std::memset(shared_, kGarbage, shared_bytes);
    for (unsigned i = 0; i < count; ++i) {
      threads_[i].indices = {dim3(i, 0, 0), index, dim3(count), grid};
      threads_[i].lane = i % kWarp;
    }
  }
  ~Block() { std::free(shared_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  void start();                 // its threads, as far as the scheduler lets them
  bool run_warp(size_t first);  // as far as it can; false: it cannot
  bool open_barrier();          // of the block, if all have reached it
  void stop_at(State state);    // of the running thread: hands over to the scheduler
  void wait_at(unsigned barrier, unsigned threads);
  void meet(const char* name, void* operands, Execute execute, unsigned width);
  Products& products() { return products_[running_->indices.thread.x / kWarpgroup]; }
  bool late() const { return late_; }

  Thread& running() { return *running_; }
  std::vector<Thread>& threads() { return threads_; }
  unsigned rank() const { return rank_; }
  unsigned char* shared() { return shared_; }
  size_t shared_bytes() const { return shared_bytes_; }
  bool contains(const void* address) const {
    const auto* at = static_cast<const unsigned char*>(address);
    return shared_ <= at && at < shared_ + shared_bytes_;
  }

 private:
  static void enter();
  void resume(Thread& thread);
  bool can_run(const Thread& thread) const;

  const std::function<void()>& kernel_;
  unsigned rank_;
  std::vector<Thread> threads_;
  size_t shared_bytes_;
  unsigned char* shared_;
  Thread* running_ = nullptr;
  ucontext_t scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
  std::exception_ptr failure_;
  std::vector<Products> products_;
  bool late_;  // whether wgmma computes at the wait
};

// The blocks that run together, and the one whose thread runs.
struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Arrival> arrivals;  // copies under way

  void run();
  void deliver();  // one of the copies
  bool open_barriers();
  bool let_follow();  // completes the kernel in front, if any thread waits for it
};
Cluster* cluster = nullptr;
Block* current = nullptr;

Mbarrier& mbarrier_at(void* address) {
  const bool inside = std::any_of(cluster->blocks.begin(), cluster->blocks.end(),
                                  [&](const auto& block) { return block->contains(address); });
  if (!inside || reinterpret_cast<uintptr_t>(address) % sizeof(Mbarrier)) {
    throw std::runtime_error("emulation: an mbarrier outside of shared memory");
  }
  Mbarrier& barrier = *static_cast<Mbarrier*>(address);
  if (barrier.mark != Mbarrier::kMark) throw std::runtime_error("emulation: an mbarrier that is not initialised");
  return barrier;
}

// Takes arrivals and bytes off a phase; the next one begins when none are left.
void complete(Mbarrier& barrier, unsigned arrivals, unsigned bytes) {
  if (arrivals > barrier.arrivals) throw std::runtime_error("emulation: more arrivals at an mbarrier than it expects");
  barrier.arrivals = static_cast<uint8_t>(barrier.arrivals - arrivals);
  barrier.bytes -= static_cast<int32_t>(bytes);
  if (barrier.arrivals > 0 || barrier.bytes != 0) return;
  barrier.arrivals = barrier.expected;
  barrier.parity ^= 1;
}

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

void Block::start() {
  for (size_t i = 0; i < threads_.size(); ++i) {
    ucontext_t& context = threads_[i].context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks.at(rank_ * threads_.size() + i);
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, &Block::enter, 0);
  }
}

void Block::resume(Thread& thread) {
  running_ = &thread;
  current = this;
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

void Block::meet(const char* name, void* operands, Execute execute, unsigned width) {
  Thread& self = *running_;
  self.instruction = name, self.operands = operands, self.execute = execute, self.width = width;
  const size_t first = self.indices.thread.x / width * width;
  unsigned arrived = 1;
  for (size_t i = first; i < first + width && i < threads_.size(); ++i) {
    const Thread& other = threads_[i];
    if (&other == &self || other.state != State::kAtCollective) continue;
    if (other.execute != execute) {
      throw std::runtime_error(std::string("emulation: lanes of a warp diverge: one is at ") + name + ", another at " +
                               other.instruction);
    }
    ++arrived;
  }
  if (arrived < width) return stop_at(State::kAtCollective);
  void* all[kWarpgroup];
  for (unsigned i = 0; i < width; ++i) all[i] = threads_[first + i].operands;
  execute(all);
  for (unsigned i = 0; i < width; ++i) threads_[first + i].state = State::kReady;
}

void Block::wait_at(unsigned barrier, unsigned threads) {
  if (barrier >= kNamedBarriers || threads % kWarp != 0) throw std::runtime_error("emulation: no such named barrier");
  Thread& self = *running_;
  self.barrier = barrier;
  unsigned arrived = 1;
  for (const Thread& other : threads_) {
    arrived += &other != &self && other.state == State::kAtNamedBarrier && other.barrier == barrier;
  }
  if (arrived < threads) return stop_at(State::kAtNamedBarrier);
  for (Thread& other : threads_) {
    if (other.state == State::kAtNamedBarrier && other.barrier == barrier) other.state = State::kReady;
  }
}

bool Block::can_run(const Thread& thread) const {
  if (thread.state == State::kAtMbarrier) return thread.mbarrier->parity != thread.parity;
  return thread.state == State::kReady;
}

bool Block::run_warp(size_t first) {
  const size_t last = std::min(first + kWarp, threads_.size());
  std::vector<Thread*> ready;
  bool ran = false;
  for (;; ran = true) {
    ready.clear();
    for (size_t i = first; i < last; ++i) {
      if (can_run(threads_[i])) ready.push_back(&threads_[i]);
    }
    if (ready.empty()) break;
    std::shuffle(ready.begin(), ready.end(), random_bits);
    for (Thread* thread : ready) {
      if (!can_run(*thread)) continue;
      thread->state = State::kReady;
      resume(*thread);
    }
  }
  for (size_t i = first; i < last; ++i) {
    if (threads_[i].state == State::kAtCollective && threads_[i].width == kWarp) {
      throw std::runtime_error(std::string("emulation: not all lanes of a warp arrive at ") + threads_[i].instruction);
    }
  }
  return ran;
}

// Whether every thread that is not done stands there.
bool all_at(const std::vector<Thread>& threads, State state) {
  return std::all_of(threads.begin(), threads.end(),
                     [&](const Thread& t) { return t.state == state || t.state == State::kDone; });
}
bool is_done(const std::vector<Thread>& threads) { return all_at(threads, State::kDone); }

bool Block::open_barrier() {
  if (is_done(threads_) || !all_at(threads_, State::kAtBarrier)) return false;
  for (Thread& thread : threads_) {
    if (thread.state == State::kAtBarrier) thread.state = State::kReady;
  }
  return true;
}

void Cluster::deliver() {
  const size_t chosen = random_bits() % arrivals.size();
  const Arrival arrival = std::move(arrivals[chosen]);
  arrivals.erase(arrivals.begin() + static_cast<std::ptrdiff_t>(chosen));
  arrival.copy();
  complete(mbarrier_at(arrival.barrier), 0, arrival.bytes);
}

bool Cluster::open_barriers() {
  bool opened = false;
  for (const auto& block : blocks) opened |= block->open_barrier();
  const auto at_cluster = [](const auto& block) { return all_at(block->threads(), State::kAtClusterBarrier); };
  if (opened || !std::all_of(blocks.begin(), blocks.end(), at_cluster)) return opened;
  for (const auto& block : blocks) {
    for (Thread& thread : block->threads()) {
      if (thread.state == State::kAtClusterBarrier) thread.state = State::kReady;
    }
  }
  return true;
}

bool Cluster::let_follow() {
  bool waited = false;
  for (const auto& block : blocks) {
    for (Thread& thread : block->threads()) {
      if (thread.state != State::kAtPredecessor) continue;
      thread.state = State::kReady;
      waited = true;
    }
  }
  if (waited && predecessor.complete()) {
    throw std::runtime_error("emulation: written to while the kernel in front still runs");
  }
  return waited;
}

void Cluster::run() {
  std::vector<std::pair<Block*, size_t>> warps;
  for (const auto& block : blocks) {
    block->start();
    for (size_t first = 0; first < block->threads().size(); first += kWarp) warps.emplace_back(block.get(), first);
  }
  std::swap(warps[random_bits() % warps.size()], warps.back());
  const auto done = [](const auto& block) { return is_done(block->threads()); };
  while (!std::all_of(blocks.begin(), blocks.end(), done)) {
    // Warps run as far as they can, in random order, one of them only where no other can; then all of them stand at a
    // barrier, or are done.
    bool ran = false;
    std::shuffle(warps.begin(), warps.end() - 1, random_bits);
    for (const auto& [block, first] : warps) {
      if (ran && warps.back() == std::make_pair(block, first)) break;
      if (!arrivals.empty() && random_bits() % 8 == 0) {
        deliver();
        ran = true;
      }
      ran |= block->run_warp(first);
    }
    if (ran) continue;
    if (!arrivals.empty()) {
      deliver();
    } else if (!open_barriers() && !let_follow()) {
      for (const auto& block : blocks) {
        for (const Thread& thread : block->threads()) {
          if (thread.state == State::kDone) continue;
          throw std::runtime_error("emulation: deadlock; thread " + std::to_string(thread.indices.thread.x) +
                                   " waits " +
                                   (thread.state == State::kAtMbarrier     ? "for an mbarrier"
                                    : thread.state == State::kAtCollective ? thread.instruction
                                                                           : "at a barrier"));
        }
      }
    }
  }
  if (!arrivals.empty()) throw std::runtime_error("emulation: a block ends while copies into it are under way");
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

void launch(dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel,
            unsigned cluster_size) {
  if (grid.x % cluster_size != 0) throw std::runtime_error("emulation: a grid that is no multiple of the cluster");
  std::vector<dim3> first_blocks;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; x += cluster_size) first_blocks.emplace_back(x, y, z);
    }
  }
  std::shuffle(first_blocks.begin(), first_blocks.end(), random_bits);
  for (const dim3& first : first_blocks) {
    Cluster together;
    for (unsigned rank = 0; rank < cluster_size; ++rank) {
      const dim3 index(first.x + rank, first.y, first.z);
      together.blocks.push_back(std::make_unique<Block>(index, grid, threads, shared_bytes, kernel, rank));
    }
    cluster = &together;
    predecessor.begin();
    try {
      together.run();
    } catch (...) {
      predecessor.complete();
      throw;
    }
    cluster = nullptr, current = nullptr;
    if (predecessor.complete()) throw std::runtime_error("emulation: no thread waited for the kernel in front");
  }
}

unsigned cluster_rank() { return current->rank(); }

void* place_in_block(void* shared, unsigned rank) {
  check_shared(shared, 1, "mapa");
  if (is_done(cluster->blocks.at(rank)->threads()))
    throw std::runtime_error("emulation: memory of a block that has ended");
  return cluster->blocks[rank]->shared() + (static_cast<unsigned char*>(shared) - current->shared());
}

void withhold(std::vector<Range> ranges) { predecessor.own(std::move(ranges)); }

void follow_predecessor() {
  if (predecessor.runs() && !planted.no_following) current->stop_at(State::kAtPredecessor);
}

void read_of_cluster(void* to, const void* from, size_t bytes) {
  const auto* at = static_cast<const unsigned char*>(from);
  for (const auto& block : cluster->blocks) {
    if (!block->contains(at) || !block->contains(at + bytes - 1)) continue;
    if (is_done(block->threads())) break;
    if (reinterpret_cast<uintptr_t>(from) % bytes) throw std::runtime_error("emulation: ld.shared::cluster unaligned");
    std::memcpy(to, from, bytes);
    return;
  }
  throw std::runtime_error("emulation: ld.shared::cluster outside of the blocks that run");
}

void cluster_barrier(int line) {
  barrier_lines.insert(line);
  if (line != planted.skipped_barrier) current->stop_at(State::kAtClusterBarrier);
}

void barrier(int line) {
  barrier_lines.insert(line);
  if (line != planted.skipped_barrier) current->stop_at(State::kAtBarrier);
}

void named_barrier(int line, int number, unsigned threads) {
  barrier_lines.insert(line);
  if (line != planted.skipped_barrier) current->wait_at(static_cast<unsigned>(number), threads);
}

void collective(const char* name, void* operands, Execute execute, unsigned width) {
  current->meet(name, operands, execute, width);
}

void mbarrier_init(void* address, unsigned arrivals) {
  check_shared(address, sizeof(Mbarrier), "mbarrier.init");
  const auto count = static_cast<uint8_t>(arrivals);
  *static_cast<Mbarrier*>(address) = {0, count, count, 0, Mbarrier::kMark};
}

void mbarrier_arrive(void* address, unsigned expected_bytes) {
  Mbarrier& barrier = mbarrier_at(address);
  barrier.bytes += static_cast<int32_t>(expected_bytes);
  complete(barrier, 1, 0);
}

void mbarrier_wait(int line, void* address, unsigned parity) {
  if (line > 0) barrier_lines.insert(line);
  if (line == planted.skipped_barrier) return;
  Thread& self = current->running();
  self.mbarrier = &mbarrier_at(address), self.parity = (parity ^ planted.wrong_parity) & 1;
  if (self.mbarrier->parity == self.parity) current->stop_at(State::kAtMbarrier);
}

void copy_behind_barrier(void* barrier, unsigned bytes, std::function<void()> copy) {
  mbarrier_at(barrier);
  cluster->arrivals.push_back({barrier, bytes, std::move(copy)});
}

void store_for_async_proxy(void* shared, uint32_t word) {
  check_shared(shared, sizeof word, "st.shared");
  Copy copy{shared, std::vector<unsigned char>(sizeof word)};
  std::memcpy(copy.bytes.data(), &word, sizeof word);
  std::memset(shared, kGarbage, sizeof word);
  current->running().unfenced.push_back(std::move(copy));
}

void fence_async_proxy() {
  if (planted.no_proxy_fence) return;
  for (const Copy& copy : current->running().unfenced) std::memcpy(copy.target, copy.bytes.data(), copy.bytes.size());
  current->running().unfenced.clear();
}

void issue_wgmma(std::function<void()> execute) {
  Products& products = current->products();
  const bool waiting = std::any_of(products.groups.begin(), products.groups.end(), [](auto& g) { return !g.empty(); });
  if (!current->late() && !waiting) return execute();
  products.groups.back().push_back(std::move(execute));
}

void wgmma_fence() { current->running().fenced = !planted.no_fence; }

void check_wgmma_fence() {
  if (!current->running().fenced) throw std::runtime_error("emulation: wgmma without a fence since the last wait");
}

void wgmma_commit() {
  collective(
      "wgmma.commit_group", nullptr, [](void* const*) { current->products().groups.emplace_back(); }, kWarpgroup);
}

void wgmma_wait(unsigned pending_groups) {
  current->running().fenced = false;
  static thread_local unsigned kept;
  kept = pending_groups + planted.extra_pending + 1;  // and the one not committed
  collective(
      "wgmma.wait_group", nullptr,
      [](void* const*) {
        auto& groups = current->products().groups;
        while (groups.size() > kept) {
          for (const auto& execute : groups.front()) execute();
          groups.erase(groups.begin());
        }
      },
      kWarpgroup);
}

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
