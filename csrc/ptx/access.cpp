// Loads, stores, atomics and fences.
#include <algorithm>

#include "block.h"
#include "numbers.h"

namespace fusedopt::ptx {
namespace {

constexpr uint64_t kNullPage = 4096, kSector = 32;

std::string kind_of(const Instruction& instruction, size_t bytes) {
  static const char* const spaces[] = {"", ".global", ".shared", ".param"};
  return (instruction.opcode == Opcode::kLoad ? "ld" : "st") +
         std::string(spaces[static_cast<int>(instruction.space)]) + "." + std::to_string(bytes);
}

}  // namespace

// The host's address, once all that may be wrong with the access has been ruled out; `stored` is null for a load.
char* Block::resolve(const Warp& warp, const Instruction& instruction, uint64_t address, size_t bytes, int lane,
                     const char* stored) {
  const Moment now = moment(warp, lane);
  if (address % bytes) {
    fail(instruction, warp, lane, "the address is not aligned to the " + std::to_string(bytes) + " bytes accessed");
  }
  try {
    if (instruction.space == Space::kShared) return shared_.access(address, bytes, now, stored);
    if (instruction.space == Space::kGeneric && shared_.holds(address)) {
      return shared_.access(address - shared_.base(), bytes, now, stored);
    }
    if (address < kNullPage) throw Error("the address is null");
    if (!warp.waited[lane] && stored) throw Error("a store before the kernel before is through (griddepcontrol.wait)");
    if (!warp.waited[lane] && global_.written_before(address, bytes)) {
      throw Error("a load, before the kernel before is through (griddepcontrol.wait), of what that writes");
    }
    if (stored) {
      global_.write(address, bytes, now);
    } else {
      global_.read(address, bytes, now, instruction.past_l1);
    }
  } catch (const Error& error) {
    fail(instruction, warp, lane, error.what());
  }
  return reinterpret_cast<char*>(address);
}

void Block::access(Warp& warp, const Instruction& instruction, uint32_t lanes) {
  const size_t unit = instruction.type.bytes, bytes = unit * static_cast<size_t>(instruction.vector);
  const bool load = instruction.opcode == Opcode::kLoad, parameter = instruction.space == Space::kParameter;
  if (lanes == kAllLanes && !parameter) count_access(warp, instruction, bytes);
  const uint64_t* const addresses = warp.lanes_of(instruction.with[0]);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    const uint64_t address = addresses[lane] + static_cast<uint64_t>(instruction.offset);
    if (instruction.releases) global_.release(moment(warp, lane));
    char value[16] = {};
    for (int i = 0; !load && i < instruction.vector; ++i) {
      memcpy(value + static_cast<size_t>(i) * unit, &warp.lanes_of(instruction.to[i])[lane], unit);
    }
    char* const at = parameter ? reinterpret_cast<char*>(address)
                               : resolve(warp, instruction, address, bytes, lane, load ? nullptr : value);
    if (!load) memcpy(at, value, bytes);
    for (int i = 0; load && i < instruction.vector; ++i) {
      uint64_t loaded = 0;
      memcpy(&loaded, at + static_cast<size_t>(i) * unit, unit);
      warp.lanes_of(instruction.to[i])[lane] = static_cast<uint64_t>(integer(loaded, instruction.type));
    }
    if (instruction.acquires) global_.acquire(moment(warp, lane));
  }
}

void Block::count_access(Warp& warp, const Instruction& instruction, size_t bytes) {
  Accesses& accesses = counts_.accesses[kind_of(instruction, bytes)];
  const uint64_t* const addresses = warp.lanes_of(instruction.with[0]);
  uint64_t sectors[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    sectors[lane] = (addresses[lane] + static_cast<uint64_t>(instruction.offset)) / kSector;
  }
  std::sort(sectors, sectors + kLanes);
  const uint64_t touched = static_cast<uint64_t>(std::unique(sectors, sectors + kLanes) - sectors);
  ++accesses.requests;
  accesses.sectors += touched;
  accesses.most = std::max(accesses.most, touched);
}

// Fences and atomics order what other blocks see: a fence and a later atomic of the thread release what came before the
// fence; an atomic and a later fence acquire; an atomic may also do either by itself.
void Block::fence(Warp& warp, int lane) {
  warp.fenced[lane] = true;
  warp.fence[lane] = moment(warp, lane);
  if (warp.since_atomic[lane]) global_.acquire(moment(warp, lane));
}

void Block::atomic(Warp& warp, const Instruction& instruction, int lane) {
  const uint64_t address = warp.lanes_of(instruction.with[0])[lane] + static_cast<uint64_t>(instruction.offset);
  if (instruction.releases) {
    global_.release(moment(warp, lane));
  } else if (warp.fenced[lane]) {
    global_.release(warp.fence[lane]);
  }
  if (address % 4) fail(instruction, warp, lane, "an atomic of an address that is not aligned");
  if (address < kNullPage) fail(instruction, warp, lane, "the address is null");
  if (!warp.waited[lane]) fail(instruction, warp, lane, "an atomic before the kernel before is through");
  uint32_t before;
  memcpy(&before, reinterpret_cast<char*>(address), 4);
  const uint32_t operand = static_cast<uint32_t>(warp.lanes_of(instruction.with[1])[lane]);
  const uint32_t after = instruction.opcode == Opcode::kAtomicAdd  ? before + operand
                         : instruction.opcode == Opcode::kAtomicOr ? before | operand
                         : before >= operand                       ? 0
                                                                   : before + 1;
  memcpy(reinterpret_cast<char*>(address), &after, 4);
  if (instruction.to[0] != kNoRegister) warp.lanes_of(instruction.to[0])[lane] = before;
  warp.since_atomic[lane] = true;
  if (instruction.acquires) global_.acquire(moment(warp, lane));
}

}  // namespace fusedopt::ptx
