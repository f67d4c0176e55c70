#include "decode.h"

#include <string.h>

#include <algorithm>

namespace fusedopt::ptx {

std::string trimmed(const std::string& text) {
  const char* blanks = " \t\r\n";
  const size_t begin = text.find_first_not_of(blanks);
  return begin == std::string::npos ? "" : text.substr(begin, text.find_last_not_of(blanks) - begin + 1);
}

std::vector<std::string> split(const std::string& text, char separator, bool nested) {
  std::vector<std::string> parts(1);
  int depth = 0;
  for (char c : text) {
    if (nested && strchr("{[(", c)) ++depth;
    if (nested && strchr("}])", c)) --depth;
    if (c == separator && depth == 0) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  for (std::string& part : parts) part = trimmed(part);
  if (parts.back().empty()) parts.pop_back();
  return parts;
}

Type type_named(const std::string& name) {
  static const std::map<std::string, Type> types = {
      {"pred", {Kind::kPredicate, 1}}, {"b8", {Kind::kBits, 1}},        {"b16", {Kind::kBits, 2}},
      {"b32", {Kind::kBits, 4}},       {"b64", {Kind::kBits, 8}},       {"u8", {Kind::kUnsigned, 1}},
      {"u16", {Kind::kUnsigned, 2}},   {"u32", {Kind::kUnsigned, 4}},   {"u64", {Kind::kUnsigned, 8}},
      {"s8", {Kind::kSigned, 1}},      {"s16", {Kind::kSigned, 2}},     {"s32", {Kind::kSigned, 4}},
      {"s64", {Kind::kSigned, 8}},     {"f16", {Kind::kFloat, 2}},      {"f32", {Kind::kFloat, 4}},
      {"f64", {Kind::kFloat, 8}},      {"bf16", {Kind::kBrainFloat, 2}}};
  const auto found = types.find(name);
  return found == types.end() ? Type{} : found->second;
}

namespace {

// What may be of a type.
constexpr unsigned kInteger = 1, kFloating = 2, kHalf = 4, kPredicates = 8,
                   kAnything = kInteger | kFloating | kPredicates;

unsigned class_of(Type type) {
  if (type.kind == Kind::kPredicate) return kPredicates;
  if (type.is_integer()) return kInteger;
  if (type.is_float(4) || type.is_float(8)) return kFloating;
  return type.kind == Kind::kNone ? 0 : kHalf;
}

// How an instruction is read whose operands are one register to write and some to read. Every part of its name has to
// be a type or one of `modifiers`: what is not known here would be executed as something else.
struct Pattern {
  Opcode opcode;
  int sources;
  unsigned types;
  std::vector<std::string> modifiers;
};

const std::map<std::string, Pattern>& patterns() {
  static const std::map<std::string, Pattern> all = {
      {"mov", {Opcode::kMove, 1, kAnything, {}}},
      {"add", {Opcode::kAdd, 2, kInteger | kFloating, {"rn"}}},
      {"sub", {Opcode::kSubtract, 2, kInteger | kFloating, {"rn"}}},
      {"mul", {Opcode::kMultiply, 2, kInteger | kFloating, {"rn", "lo", "wide"}}},
      {"mad", {Opcode::kMultiplyAdd, 3, kInteger, {"lo", "wide"}}},
      {"fma", {Opcode::kFusedMultiplyAdd, 3, kFloating, {"rn"}}},
      {"div", {Opcode::kDivide, 2, kInteger | kFloating, {"rn"}}},
      {"rem", {Opcode::kRemainder, 2, kInteger, {}}},
      {"rcp", {Opcode::kReciprocal, 1, kFloating, {"rn", "approx", "ftz"}}},
      {"sqrt", {Opcode::kSquareRoot, 1, kFloating, {"rn"}}},
      {"rsqrt", {Opcode::kApproximateInverseSquareRoot, 1, kFloating, {"approx", "ftz"}}},
      {"min", {Opcode::kMinimum, 2, kInteger | kFloating, {"NaN"}}},
      {"max", {Opcode::kMaximum, 2, kInteger | kFloating, {"NaN"}}},
      {"neg", {Opcode::kNegate, 1, kInteger | kFloating, {}}},
      {"abs", {Opcode::kAbsolute, 1, kInteger | kFloating | kHalf, {"ftz"}}},
      {"and", {Opcode::kAnd, 2, kInteger | kPredicates, {}}},
      {"or", {Opcode::kOr, 2, kInteger | kPredicates, {}}},
      {"xor", {Opcode::kXor, 2, kInteger | kPredicates, {}}},
      {"not", {Opcode::kNot, 1, kInteger | kPredicates, {}}},
      {"shl", {Opcode::kShiftLeft, 2, kInteger, {}}},
      {"shr", {Opcode::kShiftRight, 2, kInteger, {}}},
      {"bfe", {Opcode::kExtractBits, 3, kInteger, {}}},
      {"bfi", {Opcode::kInsertBits, 4, kInteger, {}}},
      {"prmt", {Opcode::kPermuteBytes, 3, kInteger, {}}},
      {"selp", {Opcode::kSelect, 3, kInteger | kFloating, {}}},
      {"cvt", {Opcode::kConvert, 1, kInteger | kFloating | kHalf, {"rn", "rzi"}}},
  };
  return all;
}

class Decoder {
 public:
  Decoder(const std::string& text, Operands& operands) : operands_(operands) {
    const size_t end = text.find_first_of(" \t\n");
    parts_ = split(text.substr(0, end), '.', false);
    arguments_ = split(end == std::string::npos ? "" : text.substr(end), ',');
    out_.text = text;
    for (size_t i = 1; i < parts_.size(); ++i) {
      const Type type = type_named(parts_[i]);
      if (type.kind == Kind::kNone) {
        modifiers_.push_back(parts_[i]);
      } else if (out_.type.kind == Kind::kNone) {
        out_.type = type;
      } else {
        out_.from = type;
      }
    }
  }

  Instruction decode() {
    const std::string& name = parts_[0];
    if (name == "bra") {
      accept({"uni"});
      out_.opcode = Opcode::kBranch;
      operands_.branch_to(argument(0));
    } else if (name == "ret" || name == "exit") {
      accept({});
      out_.opcode = Opcode::kReturn;
    } else if (name == "ld" || name == "st") {
      access(name == "ld");
    } else if (name == "mov" && argument(0)[0] == '{') {
      out_.opcode = Opcode::kUnpack;
      vector(argument(0), out_.to);
      out_.with[0] = read(1);
    } else if (name == "mov" && argument(1)[0] == '{') {
      out_.opcode = Opcode::kPack;
      out_.to[0] = read(0);
      vector(argument(1), out_.with);
    } else if (name == "setp") {
      compare();
    } else if (name == "cvta") {
      convert_address();
    } else if (name == "cvt" && has("f16x2")) {
      accept({"rn", "f16x2"});
      require(has("rn") && out_.type.is_float(4), "only of two floats, to the nearest");
      out_.opcode = Opcode::kConvertPair;
      plain(2);
    } else if (name == "atom" || name == "red") {
      atomic(name == "atom");
    } else if (name == "membar" || name == "fence") {
      accept({"gl", "gpu", "sys", "acq_rel", "sc"});
      out_.opcode = Opcode::kFence;
    } else if (name == "griddepcontrol") {
      accept({"wait", "launch_dependents"});
      out_.opcode = has("wait") ? Opcode::kWaitForPrevious : Opcode::kLetNextStart;
    } else if (name == "bar" || name == "barrier") {
      barrier();
    } else if (name == "shfl") {
      shuffle();
    } else if (name == "redux") {
      accept({"sync", "or", "max"});
      out_.opcode = has("or") ? Opcode::kReduceOr : Opcode::kReduceMaximum;
      plain(2);
    } else if (name == "ldmatrix") {
      accept({"sync", "aligned", "m8n8", "x1", "x2", "x4", "shared"});
      out_.opcode = Opcode::kLoadMatrix;
      out_.space = Space::kShared;
      vector(argument(0), out_.to);
      address(argument(1));
    } else {
      arithmetic(name);
    }
    return out_;
  }

 private:
  bool has(const std::string& modifier) const {
    return std::find(modifiers_.begin(), modifiers_.end(), modifier) != modifiers_.end();
  }
  void require(bool condition, const std::string& what) const {
    if (!condition) throw Misunderstood(what);
  }
  void accept(const std::vector<std::string>& known) const {
    for (const std::string& modifier : modifiers_) {
      if (std::find(known.begin(), known.end(), modifier) == known.end()) {
        throw Misunderstood("unknown instruction: '." + modifier + "' of '" + parts_[0] + "'");
      }
    }
  }
  const std::string& argument(size_t index) const {
    if (index >= arguments_.size()) throw Misunderstood("has too few operands");
    return arguments_[index];
  }
  int read(size_t index) { return operands_.read(argument(index)); }

  void plain(int sources) {
    require(arguments_.size() == static_cast<size_t>(sources) + 1, "has another number of operands than is known here");
    out_.to[0] = read(0);
    for (int i = 0; i < sources; ++i) out_.with[i] = read(static_cast<size_t>(i) + 1);
  }

  // {a, b, c, d} or a
  void vector(const std::string& text, int (&registers)[4]) {
    if (text[0] != '{') {
      registers[0] = operands_.read(text);
      return;
    }
    const std::vector<std::string> names = split(text.substr(1, text.size() - 2), ',');
    require(names.size() <= 4, "a vector of more than four");
    out_.vector = static_cast<int>(names.size());
    for (size_t i = 0; i < names.size(); ++i) registers[i] = operands_.read(names[i]);
  }

  // [base], [base+8]
  void address(const std::string& text) {
    require(text.size() > 2 && text.front() == '[' && text.back() == ']', "'" + text + "' is no address");
    const std::string inner = text.substr(1, text.size() - 2);
    const size_t plus = inner.find('+');
    if (plus != std::string::npos) out_.offset = std::stoll(inner.substr(plus + 1));
    out_.with[0] = operands_.read(trimmed(inner.substr(0, plus)));
  }

  void access(bool load) {
    accept({"global", "shared", "param", "v2", "v4", "cg", "volatile", "relaxed", "acquire", "release", "gpu", "sys"});
    out_.space = has("global")   ? Space::kGlobal
                 : has("shared") ? Space::kShared
                 : has("param")  ? Space::kParameter
                                 : Space::kGeneric;
    out_.past_l1 = has("cg") || has("volatile") || has("relaxed") || has("acquire");
    out_.acquires = has("acquire");
    out_.releases = has("release");
    const std::string& where = argument(load ? 1 : 0);
    const std::string& what = argument(load ? 0 : 1);
    if (out_.space == Space::kParameter) {
      const std::string name = trimmed(where.substr(1, where.find_first_of("+]") - 1));
      const int held = operands_.call_parameter(name);
      if (held != kNoRegister) {  // a parameter of a call is a register here
        require(where.find('+') == std::string::npos || where.find("+0]") != std::string::npos,
                "a part of a parameter");
        out_.opcode = Opcode::kMove;
        out_.type = {Kind::kBits, 8};
        out_.to[0] = load ? operands_.read(what) : held;
        out_.with[0] = load ? held : operands_.read(what);
        return;
      }
      require(load, "stores to a parameter of a kernel");
    }
    out_.opcode = load ? Opcode::kLoad : Opcode::kStore;
    vector(what, out_.to);
    require(out_.type.bytes * out_.vector <= 16, "accesses more than 16 bytes");
    address(where);
  }

  void compare() {
    struct Meaning {
      Comparison comparison;
      bool or_unordered;
    };
    static const std::map<std::string, Meaning> meanings = {
        {"eq", {Comparison::kEqual, false}},    {"ne", {Comparison::kNotEqual, false}},
        {"lt", {Comparison::kLess, false}},     {"le", {Comparison::kLessEqual, false}},
        {"gt", {Comparison::kGreater, false}},  {"ge", {Comparison::kGreaterEqual, false}},
        {"lo", {Comparison::kLess, false}},     {"ls", {Comparison::kLessEqual, false}},
        {"hi", {Comparison::kGreater, false}},  {"hs", {Comparison::kGreaterEqual, false}},
        {"equ", {Comparison::kEqual, true}},    {"neu", {Comparison::kNotEqual, true}},
        {"ltu", {Comparison::kLess, true}},     {"leu", {Comparison::kLessEqual, true}},
        {"gtu", {Comparison::kGreater, true}},  {"geu", {Comparison::kGreaterEqual, true}},
        {"num", {Comparison::kOrdered, false}}, {"nan", {Comparison::kUnordered, false}}};
    require(modifiers_.size() == 1 && meanings.count(modifiers_[0]),
            "unknown instruction: a comparison of another kind");
    require(class_of(out_.type) == kInteger || class_of(out_.type) == kFloating, "compares other types than are known");
    const Meaning& meaning = meanings.at(modifiers_[0]);
    out_.opcode = Opcode::kCompare;
    out_.comparison = meaning.comparison;
    out_.or_unordered = meaning.or_unordered;
    plain(2);
  }

  // Generic addresses are the host's; those of shared memory count from its beginning.
  void convert_address() {
    accept({"to", "global", "shared", "param"});
    require(!(has("to") && has("shared")), "makes a shared address of a generic one");
    out_.opcode = has("shared") ? Opcode::kSharedToGeneric : Opcode::kMove;
    plain(1);
  }

  void atomic(bool returns) {
    accept({"global", "add", "or", "inc", "relaxed", "acquire", "release", "acq_rel", "gpu", "sys"});
    require(out_.type.is_integer() && out_.type.bytes == 4, "an atomic of other than 32 bits");
    out_.opcode = has("add") ? Opcode::kAtomicAdd : has("inc") ? Opcode::kAtomicIncrement : Opcode::kAtomicOr;
    out_.space = has("global") ? Space::kGlobal : Space::kGeneric;
    out_.acquires = has("acquire") || has("acq_rel");
    out_.releases = has("release") || has("acq_rel");
    const size_t first = returns ? 1 : 0;
    if (returns) out_.to[0] = read(0);
    address(argument(first));
    out_.with[1] = read(first + 1);
  }

  void barrier() {
    accept({"sync", "red", "or", "cta", "aligned"});
    if (has("red")) {
      require(has("or") && argument(1) == "0", "another reduction than 'or', or another barrier than 0");
      out_.opcode = Opcode::kBarrierOr;
      out_.to[0] = read(0);
      out_.with[0] = read(2);
    } else {
      require(argument(0) == "0" && arguments_.size() == 1, "another barrier than 0, or of some threads only");
      out_.opcode = Opcode::kBarrier;
    }
  }

  // to|predicate, value, distance, clamp and segment, mask
  void shuffle() {
    accept({"sync", "down", "bfly"});
    require(has("sync"), "a shuffle without a mask");
    out_.opcode = has("down") ? Opcode::kShuffleDown : Opcode::kShuffleButterfly;
    const std::vector<std::string> both = split(argument(0), '|');
    for (size_t i = 0; i < both.size() && i < 2; ++i) out_.to[i] = operands_.read(both[i]);
    for (size_t i = 0; i < 4; ++i) out_.with[i] = read(i + 1);
  }

  void arithmetic(const std::string& name) {
    const auto found = patterns().find(name);
    if (found == patterns().end()) throw Misunderstood("unknown instruction: '" + name + "'");
    const Pattern& pattern = found->second;
    std::vector<std::string> known = pattern.modifiers;
    if (name == "abs") known.insert(known.end(), {"f16x2"});
    accept(known);
    out_.opcode = pattern.opcode;
    out_.flushes = has("ftz");
    out_.truncates = has("rzi");
    const bool pair = has("f16x2");
    const unsigned kind = pair ? kHalf : class_of(out_.type);
    require(kind & pattern.types, "unknown instruction: '" + name + "' of this type");
    if (name == "cvt") require(class_of(out_.from) & pattern.types, "converts from a type that is not known");
    if (pattern.types & kFloating && kind == kFloating) check_rounding(name);
    if (kind == kInteger && (name == "mul" || name == "mad")) {
      require(has("lo") || has("wide"), "neither the low half nor all of a product");
      if (has("wide")) out_.opcode = name == "mul" ? Opcode::kMultiplyWide : Opcode::kMultiplyAddWide;
    }
    if (name == "bfe")
      require(out_.type.kind == Kind::kUnsigned && out_.type.bytes == 4, "of other than 32 bits, unsigned");
    if (name == "rcp" && has("approx")) out_.opcode = Opcode::kApproximateReciprocal;
    plain(pattern.sources);
    if (name == "abs" && kind == kHalf) {  // clears signs
      out_.opcode = Opcode::kAnd;
      out_.type = {Kind::kBits, static_cast<uint8_t>(pair ? 4 : 2)};
      out_.with[1] = operands_.constant(pair ? 0x7fff7fff : 0x7fff);
    }
  }

  // Results are rounded to the nearest, and subnormal ones are kept. (Without ".rn" a later compiler may contract.)
  void check_rounding(const std::string& name) const {
    if (name == "rsqrt" || (name == "rcp" && has("approx"))) {
      require(has("approx") && has("ftz"), "unknown instruction: an approximation that keeps subnormals");
      require(name == "rcp" || out_.type.is_float(4), "unknown instruction: an approximation of this type");
      return;
    }
    if (name == "min" || name == "max") return require(has("NaN"), "hands no NaN on");
    static const std::vector<std::string> exact = {"mov", "selp", "neg", "abs", "cvt"};
    if (std::find(exact.begin(), exact.end(), name) != exact.end()) return;
    require(has("rn") && !has("ftz"), "is not rounded to the nearest, explicitly");
  }

  Operands& operands_;
  std::vector<std::string> parts_, arguments_, modifiers_;
  Instruction out_;
};

}  // namespace

Instruction decode(const std::string& text, Operands& operands) { return Decoder(text, operands).decode(); }

}  // namespace fusedopt::ptx
