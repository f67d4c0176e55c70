// A launch: arguments, registers, and the blocks one after the other.
#include "machine.h"

#include <string.h>

#include <algorithm>
#include <mutex>
#include <numeric>

#include "block.h"

namespace fusedopt::ptx {
namespace {

constexpr size_t kMostArgumentBytes = 32764, kArgumentAlignment = 64;

// What stays between launches.
struct Machine {
  std::mutex busy;
  GlobalMemory global;
  SharedMemory shared;
  std::vector<uint64_t> registers;
  std::map<std::string, Counts> counts;
};
Machine& machine() {
  static Machine only;
  return only;
}

// Arguments as they lie on a device: one after the other, each aligned as its type. Returns where each is.
std::vector<uint64_t> lay_out(const Function& kernel, const std::vector<Argument>& arguments,
                              std::vector<char>& storage) {
  if (kernel.parameters.size() != arguments.size()) {
    throw Error(kernel.name + " takes " + std::to_string(kernel.parameters.size()) + " arguments, not " +
                std::to_string(arguments.size()));
  }
  storage.assign(kMostArgumentBytes + kArgumentAlignment, '\xff');
  const uint64_t start = reinterpret_cast<uint64_t>(storage.data());
  const uint64_t base = (start + kArgumentAlignment - 1) / kArgumentAlignment * kArgumentAlignment;
  std::vector<uint64_t> places;
  size_t end = 0;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const Parameter& parameter = kernel.parameters[i];
    if (parameter.bytes != arguments[i].bytes) {
      throw Error("argument " + std::to_string(i) + " of " + kernel.name + " has " + std::to_string(parameter.bytes) +
                  " bytes on the device, and " + std::to_string(arguments[i].bytes) + " on the host");
    }
    end = (end + parameter.alignment - 1) / parameter.alignment * parameter.alignment;
    if (end + parameter.bytes > kMostArgumentBytes) throw Error("the arguments of " + kernel.name + " are too large");
    memcpy(reinterpret_cast<char*>(base + end), arguments[i].data, parameter.bytes);
    places.push_back(base + end);
    end += parameter.bytes;
  }
  return places;
}

// Numbers in the code, addresses of arguments and a thread's place: registers that no instruction writes.
void fill_registers(const Module& module, const Function& kernel, const Launch& launch,
                    const std::vector<uint64_t>& places, std::vector<uint64_t>& registers) {
  registers.resize(static_cast<size_t>(module.registers) * kLanes * static_cast<size_t>(launch.warps));
  for (int warp = 0; warp < launch.warps; ++warp) {
    auto lanes_of = [&](int index) {
      return registers.data() +
             (static_cast<size_t>(warp) * static_cast<size_t>(module.registers) + static_cast<size_t>(index)) * kLanes;
    };
    auto set = [&](int index, uint64_t value) {
      if (index != kNoRegister) std::fill_n(lanes_of(index), kLanes, value);
    };
    for (const auto& [name, function] : module.functions) {
      if (function.is_kernel && &function != &kernel) continue;
      for (const auto& [index, bits] : function.constants) set(index, bits);
    }
    for (size_t i = 0; i < places.size(); ++i) set(kernel.parameters[i].address, places[i]);
    set(kernel.blocks, launch.blocks);
    set(kernel.threads, static_cast<uint64_t>(launch.warps) * kLanes);
    if (kernel.thread != kNoRegister) {
      std::iota(lanes_of(kernel.thread), lanes_of(kernel.thread) + kLanes, static_cast<uint64_t>(warp) * kLanes);
    }
  }
}

}  // namespace

std::map<std::string, Counts>& counts() { return machine().counts; }

void run(const Module& module, const std::string& name, const Launch& launch, const std::vector<Argument>& arguments) {
  Machine& now = machine();
  const std::lock_guard<std::mutex> lock(now.busy);
  const Function& kernel = module.kernel(name);
  if (launch.dynamic_shared && !module.dynamic_shared) throw Error(kernel.name + " has no dynamic shared memory");
  std::vector<char> storage;
  fill_registers(module, kernel, launch, lay_out(kernel, arguments, storage), now.registers);
  now.global.begin_launch();
  Counts& counts = now.counts[name];
  ++counts.launches;
  counts.early += launch.early;
  counts.blocks += launch.blocks;
  std::mt19937_64 random(launch.order);
  std::vector<uint32_t> order(launch.blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (launch.order) std::shuffle(order.begin(), order.end(), random);
  if (launch.lost < launch.blocks) order.resize(launch.blocks - launch.lost);
  Block block(module, kernel, launch, now.global, now.shared, now.registers, counts);
  for (uint32_t number : order) block.run(number, random);
}

}  // namespace fusedopt::ptx
