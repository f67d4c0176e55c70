// One PTX instruction, from text.
#pragma once
#include <string>
#include <vector>

#include "module.h"

namespace fusedopt::ptx {

// A reason without a place: who reads the file knows that, and makes an Error of it.
struct Misunderstood : std::runtime_error {
  using std::runtime_error::runtime_error;
};

std::string trimmed(const std::string& text);
// Parts between `separator`, trimmed; with `nested`, not inside of brackets.
std::vector<std::string> split(const std::string& text, char separator, bool nested = true);

// "u32", "pred"; Kind::kNone for what names no type.
Type type_named(const std::string& name);

// What an instruction's operands stand for, in the function that is being read.
class Operands {
 public:
  virtual ~Operands() = default;
  // The register of an operand: a register, a number, or a name that has an address.
  virtual int read(const std::string& operand) = 0;
  virtual int constant(uint64_t bits) = 0;
  // The register that plays a parameter of a call, or kNoRegister for a name that is none.
  virtual int call_parameter(const std::string& name) = 0;
  // Sets the target, now or when it is known.
  virtual void branch_to(const std::string& label) = 0;
};

// `text` is "opcode operands", without a guard. Throws Misunderstood.
Instruction decode(const std::string& text, Operands& operands);

}  // namespace fusedopt::ptx
