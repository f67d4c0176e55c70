// Memory as the interpreter watches it: who wrote what, and whether a reader may rely on it.
#pragma once
#include <memory>
#include <unordered_map>

#include "module.h"

namespace fusedopt::ptx {

// A thread of a block at a point between two barriers of its block.
struct Moment {
  uint32_t block = 0;
  uint16_t thread = 0;
  uint16_t epoch = 0;  // barriers of the block so far
  uint64_t order = 0;  // instructions so far

  // Whether what was done at `earlier`, in the same block, is done before this: the thread's own, or before a barrier.
  bool after(const Moment& earlier) const {
    return thread == earlier.thread ? order > earlier.order : epoch > earlier.epoch;
  }
};

// The shared memory of one block.
class SharedMemory {
 public:
  // The host's address of these bytes, or Error with a reason: outside, never written, or raced for between two
  // barriers. `stored` is what is about to be written there, or null for a read. Lanes of a warp may store the same
  // value at once.
  char* access(uint64_t address, size_t bytes, const Moment& now, const char* stored);
  void clear(size_t bytes);  // for another block
  uint64_t base() const { return reinterpret_cast<uint64_t>(bytes_.data()); }
  bool holds(uint64_t generic) const { return generic >= base() && generic < base() + bytes_.size(); }

 private:
  // Threads that have touched a byte since the last barrier.
  struct Byte {
    int32_t write_epoch = -1, read_epoch = -1;
    int32_t writer = kNobody, reader = kNobody;
    static constexpr int32_t kNobody = -1, kSeveral = -2;
  };
  std::vector<char> bytes_;
  std::vector<Byte> state_;
};

// Note [Global memory]
// Blocks of a launch run in any order and at once, so a block may read what another has written in the same launch only
// if (1) the load goes past the L1 cache, which other multiprocessors do not write to; and (2) the writer released it
// (a fence and then an atomic, or an atomic that releases), and the reader acquired it since, each on a thread that the
// barriers of its block put in order with the access. Blocks run here one after the other, so every release of a block
// has been seen when a later one asks. That the two sides use one address for it is not checked.
class GlobalMemory {
 public:
  void begin_launch();  // what was written until now is the launch before's
  void write(uint64_t address, size_t bytes, const Moment& now);
  // Error with a reason when this may not be read.
  void read(uint64_t address, size_t bytes, const Moment& now, bool past_l1) const;
  // Whether the launch before wrote any of this.
  bool written_before(uint64_t address, size_t bytes) const;

  void release(const Moment& now) { released_[now.block].push_back(now); }
  void acquire(const Moment& now) { acquired_.push_back(now); }
  void begin_block() { acquired_.clear(); }

 private:
  static constexpr uint64_t kUnit = 2, kPage = 4096, kUnits = kPage / kUnit;
  struct Mark {
    Moment moment;
    bool written = false;
  };
  struct Page {
    Mark marks[kUnits];
  };
  using Pages = std::unordered_map<uint64_t, std::unique_ptr<Page>>;
  static const Mark* find(const Pages& pages, uint64_t address);

  Pages now_, before_;
  std::pair<uint64_t, Page*> latest_ = {~0ull, nullptr};
  std::unordered_map<uint32_t, std::vector<Moment>> released_;
  std::vector<Moment> acquired_;  // by the block that runs
};

}  // namespace fusedopt::ptx
