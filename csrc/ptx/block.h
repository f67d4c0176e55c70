// One block of a running kernel.
#pragma once
#include <random>

#include "machine.h"
#include "memory.h"

namespace fusedopt::ptx {

constexpr uint32_t kAllLanes = 0xffffffff;

enum class State : uint8_t { kRunning, kAtBarrier, kAtWarp, kDone };

struct Warp {
  int number = 0;
  uint64_t* registers = nullptr;
  int at[kLanes];         // index of the next instruction
  int return_to[kLanes];  // or kNoRegister, outside of a call
  State state[kLanes];
  bool waited[kLanes];        // for the kernel before
  bool fenced[kLanes];        // whether there was a fence
  Moment fence[kLanes];       // the last one
  bool since_atomic[kLanes];  // whether there was an atomic

  uint64_t* lanes_of(int index) { return registers + static_cast<size_t>(index) * kLanes; }
};

class Block {
 public:
  // `registers` are those of all warps, filled with constants, parameters and thread numbers.
  Block(const Module& module, const Function& kernel, const Launch& launch, GlobalMemory& global, SharedMemory& shared,
        std::vector<uint64_t>& registers, Counts& counts);

  void run(uint32_t number, std::mt19937_64& random);

 private:
  // Runs one instruction of those lanes that are furthest behind; false when no lane of the warp can go on.
  bool advance(Warp& warp);
  bool advance_some(std::mt19937_64& random);
  bool pass_barrier();  // false when all threads are done
  bool meet_warp(Warp& warp);
  void exchange(Warp& warp, const Instruction& instruction);
  void load_matrix(Warp& warp, const Instruction& instruction);

  void execute(Warp& warp, const Instruction& instruction, uint32_t lanes);
  bool calculate(Warp& warp, const Instruction& instruction, uint32_t lanes);
  void access(Warp& warp, const Instruction& instruction, uint32_t lanes);
  void count_access(Warp& warp, const Instruction& instruction, size_t bytes);
  void atomic(Warp& warp, const Instruction& instruction, int lane);
  void fence(Warp& warp, int lane);
  char* resolve(const Warp& warp, const Instruction& instruction, uint64_t address, size_t bytes, int lane,
                const char* stored);

  Moment moment(const Warp& warp, int lane) const {
    return {number_, static_cast<uint16_t>(warp.number * kLanes + lane), epoch_, counts_.instructions};
  }
  [[noreturn]] void fail(const Instruction& instruction, const Warp& warp, int lane, const std::string& what) const;

  const Module& module_;
  const Function& kernel_;
  const Launch& launch_;
  GlobalMemory& global_;
  SharedMemory& shared_;
  Counts& counts_;
  std::vector<Warp> warps_;
  uint32_t number_ = 0;
  uint16_t epoch_ = 0;       // barriers so far
  bool barrier_or_ = false;  // what the threads at a barrier have brought
};

}  // namespace fusedopt::ptx
