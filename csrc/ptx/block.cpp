// The warps of a block: whose turn it is, and how they meet.
#include "block.h"

#include <algorithm>
#include <limits>

#include "numbers.h"

namespace fusedopt::ptx {

Block::Block(const Module& module, const Function& kernel, const Launch& launch, GlobalMemory& global,
             SharedMemory& shared, std::vector<uint64_t>& registers, Counts& counts)
    : module_(module), kernel_(kernel), launch_(launch), global_(global), shared_(shared), counts_(counts) {
  warps_.resize(static_cast<size_t>(launch.warps));
  for (int i = 0; i < launch.warps; ++i) {
    Warp& warp = warps_[static_cast<size_t>(i)];
    warp.number = i;
    warp.registers = registers.data() + static_cast<size_t>(i) * static_cast<size_t>(module.registers) * kLanes;
  }
}

void Block::fail(const Instruction& instruction, const Warp& warp, int lane, const std::string& what) const {
  throw Error(module_.where(instruction) + ": block " + std::to_string(number_) + ", thread " +
              std::to_string(warp.number * kLanes + lane) + ": " + what);
}

void Block::run(uint32_t number, std::mt19937_64& random) {
  number_ = number;
  epoch_ = 0;
  barrier_or_ = false;
  shared_.clear(module_.shared_bytes + launch_.dynamic_shared);
  global_.begin_block();
  for (Warp& warp : warps_) {
    std::fill_n(warp.at, kLanes, kernel_.begin);
    std::fill_n(warp.return_to, kLanes, kNoRegister);
    std::fill_n(warp.state, kLanes, State::kRunning);
    std::fill_n(warp.waited, kLanes, !launch_.early);
    std::fill_n(warp.fenced, kLanes, false);
    std::fill_n(warp.since_atomic, kLanes, false);
    if (kernel_.block != kNoRegister) std::fill_n(warp.lanes_of(kernel_.block), kLanes, number);
  }
  do {
    if (launch_.order) {
      while (advance_some(random)) continue;
    }
    for (bool any = true; any;) {
      any = false;
      for (Warp& warp : warps_) {
        while (advance(warp)) any = true;
      }
    }
  } while (pass_barrier());
}

// A few instructions of warps in random turns.
bool Block::advance_some(std::mt19937_64& random) {
  bool any = false;
  for (int turn = 0; turn < 64; ++turn) {
    Warp& warp = warps_[random() % warps_.size()];
    for (uint64_t left = 1 + random() % 40; left > 0 && advance(warp); --left) any = true;
  }
  return any;
}

bool Block::advance(Warp& warp) {
  int at = std::numeric_limits<int>::max();
  for (int lane = 0; lane < kLanes; ++lane) {
    if (warp.state[lane] == State::kRunning) at = std::min(at, warp.at[lane]);
  }
  if (at == std::numeric_limits<int>::max()) return meet_warp(warp);
  const Instruction& instruction = module_.code[static_cast<size_t>(at)];
  ++counts_.instructions;
  uint32_t lanes = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (warp.state[lane] != State::kRunning || warp.at[lane] != at) continue;
    warp.at[lane] = at + 1;
    lanes |= 1u << lane;
  }
  if (instruction.guard != kNoRegister) {
    const uint64_t* guard = warp.lanes_of(instruction.guard);
    for (int lane = 0; lane < kLanes; ++lane) {
      if ((guard[lane] & 1) == (instruction.guard_negated ? 1u : 0u)) lanes &= ~(1u << lane);
    }
  }
  if (lanes) execute(warp, instruction, lanes);
  return true;
}

// Lets lanes exchange values once all are there; false when some are elsewhere.
bool Block::meet_warp(Warp& warp) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (warp.state[lane] != State::kAtWarp || warp.at[lane] != warp.at[0]) return false;
  }
  exchange(warp, module_.code[static_cast<size_t>(warp.at[0]) - 1]);
  std::fill_n(warp.state, kLanes, State::kRunning);
  return true;
}

void Block::exchange(Warp& warp, const Instruction& instruction) {
  if (instruction.opcode == Opcode::kLoadMatrix) return load_matrix(warp, instruction);
  const bool shuffles = instruction.opcode == Opcode::kShuffleDown || instruction.opcode == Opcode::kShuffleButterfly;
  const uint64_t* members = warp.lanes_of(instruction.with[shuffles ? 3 : 1]);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (static_cast<uint32_t>(members[lane]) != kAllLanes) {
      fail(instruction, warp, lane, "the member mask leaves out lanes that take part");
    }
  }
  uint64_t values[kLanes], *to = warp.lanes_of(instruction.to[0]);
  std::copy_n(warp.lanes_of(instruction.with[0]), kLanes, values);
  if (!shuffles) {
    uint64_t all = values[0];
    for (uint64_t value : values) {
      if (instruction.opcode == Opcode::kReduceOr) all |= value;
      if (instruction.opcode == Opcode::kReduceMaximum &&
          integer(value, instruction.type) > integer(all, instruction.type))
        all = value;
    }
    std::fill_n(to, kLanes, cut(all, instruction.type));
    return;
  }
  const uint64_t *distances = warp.lanes_of(instruction.with[1]), *clamps = warp.lanes_of(instruction.with[2]);
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    const uint32_t distance = static_cast<uint32_t>(distances[lane]) & 31, clamp = static_cast<uint32_t>(clamps[lane]);
    const uint32_t segment = clamp >> 8 & 31, last = (lane & segment) | (clamp & 31 & ~segment);
    const uint32_t from = instruction.opcode == Opcode::kShuffleDown ? lane + distance : lane ^ distance;
    to[lane] = low_bits(values[from <= last ? from : lane], 4);
    if (instruction.to[1] != kNoRegister) warp.lanes_of(instruction.to[1])[lane] = from <= last;
  }
}

// Lane l gets the l-th 4 bytes of each 8 x 8 matrix of 16-bit elements, whose rows the lanes of its own eight point to.
void Block::load_matrix(Warp& warp, const Instruction& instruction) {
  const uint64_t* rows = warp.lanes_of(instruction.with[0]);
  uint32_t values[4][kLanes];
  for (int matrix = 0; matrix < instruction.vector; ++matrix) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint64_t row = rows[8 * matrix + lane / 4] + static_cast<uint64_t>(instruction.offset);
      if (row % 16) fail(instruction, warp, lane, "the row of a matrix is not aligned to 16 bytes");
      const uint64_t at = row + 4 * static_cast<uint64_t>(lane % 4);
      memcpy(&values[matrix][lane], resolve(warp, instruction, at, 4, lane, nullptr), 4);
    }
  }
  for (int matrix = 0; matrix < instruction.vector; ++matrix) {
    std::copy_n(values[matrix], kLanes, warp.lanes_of(instruction.to[matrix]));
  }
}

// Every thread is done, or waits: at the same barrier, or else for ever.
bool Block::pass_barrier() {
  const Instruction* barrier = nullptr;
  for (Warp& warp : warps_) {
    for (int lane = 0; lane < kLanes; ++lane) {
      if (warp.state[lane] == State::kDone) continue;
      const Instruction& here = module_.code[static_cast<size_t>(warp.at[lane]) - 1];
      if (warp.state[lane] == State::kAtWarp) fail(here, warp, lane, "waits for lanes of its warp that do not come");
      if (barrier && barrier != &here) {
        fail(here, warp, lane, "waits while others wait at the barrier in line " + std::to_string(barrier->line));
      }
      barrier = &here;
    }
  }
  if (!barrier) return false;
  for (Warp& warp : warps_) {
    for (int lane = 0; lane < kLanes; ++lane) {
      if (warp.state[lane] == State::kDone) continue;
      warp.state[lane] = State::kRunning;
      if (barrier->opcode == Opcode::kBarrierOr) warp.lanes_of(barrier->to[0])[lane] = barrier_or_;
    }
  }
  barrier_or_ = false;
  ++epoch_;
  return true;
}

}  // namespace fusedopt::ptx
