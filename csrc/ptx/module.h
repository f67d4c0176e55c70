// PTX, read: what the interpreter works on. docs/ptx.md explains the whole.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace fusedopt::ptx {

// Text that is not understood, or a program that does what a GPU would not forgive. Says where: file, line, thread.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Kind : uint8_t { kNone, kPredicate, kBits, kUnsigned, kSigned, kFloat, kBrainFloat };

struct Type {
  Kind kind = Kind::kNone;
  uint8_t bytes = 0;

  bool is_integer() const { return kind == Kind::kBits || kind == Kind::kUnsigned || kind == Kind::kSigned; }
  bool is_float(int size) const { return kind == Kind::kFloat && bytes == size; }
};

enum class Opcode : uint8_t {
  kBranch,
  kReturn,
  kCall,
  kMove,
  kPack,    // {a, b} to one register
  kUnpack,  // and back
  kAdd,
  kSubtract,
  kMultiply,
  kMultiplyWide,
  kMultiplyAdd,      // integers
  kMultiplyAddWide,  // integers
  kFusedMultiplyAdd,
  kDivide,
  kRemainder,  // integers
  kReciprocal,
  kApproximateReciprocal,
  kSquareRoot,
  kApproximateInverseSquareRoot,
  kMinimum,
  kMaximum,
  kNegate,
  kAbsolute,
  kAnd,
  kOr,
  kXor,
  kNot,
  kShiftLeft,
  kShiftRight,
  kExtractBits,
  kInsertBits,
  kPermuteBytes,
  kSelect,
  kCompare,
  kConvert,
  kConvertPair,      // two floats to one register of halves
  kSharedToGeneric,  // an address
  kLoad,
  kStore,
  kAtomicAdd,
  kAtomicIncrement,  // wraps to 0 above its operand
  kAtomicOr,
  kFence,
  kLetNextStart,
  kWaitForPrevious,
  kBarrier,
  kBarrierOr,
  kShuffleDown,
  kShuffleButterfly,
  kReduceOr,
  kReduceMaximum,
  kLoadMatrix,
};

enum class Comparison : uint8_t { kEqual, kNotEqual, kLess, kLessEqual, kGreater, kGreaterEqual, kOrdered, kUnordered };
enum class Space : uint8_t { kGeneric, kGlobal, kShared, kParameter };

constexpr int kLanes = 32;  // of a warp
constexpr int kNoRegister = -1;

struct Instruction {
  Opcode opcode = Opcode::kReturn;
  Type type, from;  // `from`: of the source of a conversion
  Comparison comparison = Comparison::kEqual;
  bool or_unordered = false;  // a comparison that is true for NaN
  Space space = Space::kGeneric;
  bool past_l1 = false;  // a load that sees what other multiprocessors have written
  bool acquires = false, releases = false;
  bool truncates = false;  // a conversion towards zero
  bool flushes = false;    // subnormal results are zero
  int guard = kNoRegister;
  bool guard_negated = false;
  int vector = 1;  // elements of a vector access
  int to[4] = {kNoRegister, kNoRegister, kNoRegister, kNoRegister};
  int with[4] = {kNoRegister, kNoRegister, kNoRegister, kNoRegister};
  int64_t offset = 0;  // of an address
  int target = -1;     // of a branch or call: an index of Module::code
  int line = 0;
  std::string text;
};

struct Parameter {
  std::string name;
  size_t bytes = 0, alignment = 1;
  int address = kNoRegister;  // the register that holds its address in a kernel, its value in a function
};

// Registers are numbered: first those of all functions that kernels call, then those of the kernel.
struct Function {
  std::string name;
  bool is_kernel = false;
  std::vector<Parameter> parameters;
  std::string result;      // name of what a function returns
  int begin = 0, end = 0;  // in Module::code
  int registers = 0;
  int thread = kNoRegister, block = kNoRegister, blocks = kNoRegister,
      threads = kNoRegister;  // tid, ctaid, nctaid, ntid
  std::vector<std::pair<int, uint64_t>> constants;
};

struct Module {
  std::string file;
  int architecture = 0;  // 90 of sm_90a
  std::vector<Instruction> code;
  std::map<std::string, Function> functions;
  size_t shared_bytes = 0;
  bool dynamic_shared = false;                // a launch says how much more there is
  int function_registers = 0, registers = 0;  // of all functions that kernels call; at most, with a kernel's

  // The kernel whose name contains `name`. Throws Error when there is none, or more than one.
  const Function& kernel(const std::string& name) const;
  bool has_kernel(const std::string& name) const;
  std::string where(const Instruction& instruction) const {
    return file + ":" + std::to_string(instruction.line) + ": " + instruction.text;
  }
};

// Reads PTX. `file` is a name for messages.
std::shared_ptr<const Module> parse(const std::string& text, const std::string& file);

}  // namespace fusedopt::ptx
