// From PTX text to functions, and to instructions whose operands are numbers.
#include <string.h>

#include <algorithm>
#include <set>
#include <sstream>

#include "decode.h"
#include "text.h"

namespace fusedopt::ptx {
namespace {

bool begins_with(const std::string& text, const char* start) { return text.rfind(start, 0) == 0; }

// Registers of one function, numbered from 0; link() moves them to their place.
struct Draft {
  Function function;
  std::map<std::string, int> registers, labels;
  std::set<std::string> declared;  // registers, and the beginnings of names of many: "%r" of %r<20>
  std::map<std::string, int> call_parameters;
  std::vector<std::pair<int, std::string>> branches;
};

struct Call {
  int at;  // of the call in the code
  std::string caller, callee;
  std::vector<int> arguments;  // registers of the caller
  int result;
  int first_copy;  // of an argument: instructions in front of the call that wait for the callee's registers
};

class Parser final : Operands {
 public:
  Parser(const std::string& text, const std::string& file) : module_(std::make_shared<Module>()), text_(text) {
    module_->file = file;
  }

  std::shared_ptr<const Module> parse() {
    try {
      while (text_.more()) directive();
    } catch (const std::out_of_range&) {
      fail("the text ends, or a number does, where more was expected");
    } catch (const std::invalid_argument&) {
      fail("a number was expected");
    } catch (const Misunderstood& error) {
      fail(error.what());
    }
    link();
    return module_;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw Error(module_->file + ":" + std::to_string(text_.line()) + ": " +
                (statement_.empty() ? "" : statement_ + ": ") + what);
  }

  // --- Directives of a module ---------------------------------------------------------------------------------------

  void directive() {
    statement_.clear();
    const std::string word = text_.until(" \t\n({;");
    if (word == ".target") {
      const std::string name = trimmed(text_.until("\n"));
      if (begins_with(name, "sm_")) module_->architecture = std::stoi(name.substr(3));
    } else if (word == ".version" || word == ".address_size") {
      text_.until("\n");
    } else if (word == ".global") {  // names for the driver
      text_.until(";");
      text_.advance();
    } else if (word == ".extern") {
      if (text_.until(";").find(".shared") == std::string::npos) fail("something that is defined elsewhere");
      module_->dynamic_shared = true;
      shared_["global_smem"] = 0;
      text_.advance();
    } else if (word == ".shared") {
      shared_variable(text_.until(";"));
      text_.advance();
    } else if (word == ".entry" || word == ".func") {
      function(word == ".entry");
    } else if (word != ".visible" && word != ".weak") {
      fail("unknown directive '" + word + "'");
    }
  }

  // .align 8 .b8 name[72]
  void shared_variable(const std::string& text) {
    const Parameter variable = declared(text);
    size_t& end = module_->shared_bytes;
    end = (end + variable.alignment - 1) / variable.alignment * variable.alignment;
    shared_[variable.name] = end;
    end += variable.bytes;
  }

  // .param .align 8 .b8 name[208], or .param .u64 .ptr .global .align 1 name, whose alignment is that of what it points
  // to
  static Parameter declared(const std::string& text) {
    Parameter found;
    size_t unit = 0, alignment = 0;
    bool pointer = false;
    std::istringstream words(text);
    for (std::string word; words >> word;) {
      if (word == ".ptr") pointer = true;
      if (word == ".align") {
        words >> word;
        if (!pointer) alignment = std::stoul(word);
      } else if (word[0] == '.') {
        const Type type = type_named(word.substr(1));
        if (type.kind != Kind::kNone) unit = type.bytes;
      } else {
        found.name = word;
      }
    }
    const size_t bracket = found.name.find('[');
    found.bytes = unit;
    if (bracket != std::string::npos) {
      found.bytes = unit * std::stoul(found.name.substr(bracket + 1));
      found.name = found.name.substr(0, bracket);
    }
    found.alignment = alignment ? alignment : unit;
    return found;
  }

  // .func (.param .b64 result) name(parameters) { body }, or ; for a declaration
  void function(bool is_kernel) {
    Draft draft;
    draft.function.is_kernel = is_kernel;
    if (text_.next() == '(') draft.function.result = declared(text_.in_parentheses()).name;
    text_.next();
    draft.function.name = trimmed(text_.until(" \t\n("));
    if (text_.next() == '(') {
      for (const std::string& parameter : split(text_.in_parentheses(), ',')) {
        draft.function.parameters.push_back(declared(parameter));
      }
    }
    text_.until("{;");  // .maxntid and the like
    const bool defined = text_.next() == '{';
    text_.advance();
    if (!defined) return;
    draft_ = &(drafts_[draft.function.name] = std::move(draft));
    draft_->function.begin = size();
    for (Parameter& parameter : draft_->function.parameters) parameter.address = fresh();
    body();
    draft_->function.end = size();
  }

  // --- A function's body --------------------------------------------------------------------------------------------

  void body() {
    for (int depth = 1; depth > 0;) {
      statement_.clear();
      if (text_.next() == '{' || text_.next() == '}') {
        depth += text_.next() == '{' ? 1 : -1;
        text_.advance();
      } else if (text_.next() == '$') {
        draft_->labels[text_.until(":")] = size();
        text_.advance();
      } else {
        const int line = text_.line();
        const std::string text = trimmed(text_.until(";"));
        text_.advance();
        if (!text.empty()) statement(text, line);
      }
    }
    for (const auto& [at, label] : draft_->branches) {
      const auto found = draft_->labels.find(label);
      if (found == draft_->labels.end()) fail("there is no label " + label);
      code(at).target = found->second;
    }
    module_->code.emplace_back();  // a return
  }

  void statement(const std::string& text, int line) {
    statement_ = text;
    if (text[0] == '.') {
      declaration(text);
      return;
    }
    std::string rest = text;
    int guard = kNoRegister;
    const bool negated = begins_with(text, "@!");
    if (text[0] == '@') {
      const size_t end = text.find_first_of(" \t\n");
      guard = read(text.substr(negated ? 2 : 1, end - (negated ? 2 : 1)));
      rest = trimmed(text.substr(end));
    }
    if (begins_with(rest, "call")) {
      if (guard != kNoRegister) fail("a call under a condition");
      call(rest, line);
      return;
    }
    Instruction instruction = decode(rest, *this);
    instruction.guard = guard;
    instruction.guard_negated = negated;
    add(std::move(instruction), text, line);
  }

  void declaration(const std::string& text) {
    std::istringstream words(text);
    std::string word;
    words >> word;
    if (word == ".reg") {
      words >> word;  // its type: all registers hold 64 bits here
      std::string names;
      std::getline(words, names);
      for (const std::string& name : split(names, ',')) draft_->declared.insert(name.substr(0, name.find('<')));
    } else if (word == ".param") {
      draft_->call_parameters.emplace(declared(text).name, fresh());
    } else if (word != ".pragma") {
      fail("unknown directive '" + word + "'");
    }
  }

  // call.uni (result), name, (argument, argument)
  void call(const std::string& text, int line) {
    const std::vector<std::string> parts = split(text.substr(text.find_first_of(" \t\n")), ',');
    if (parts.size() != 3) fail("a call of another form");
    Call made{0, draft_->function.name, parts[1], {}, kNoRegister, size()};
    made.result = call_parameter(trimmed(parts[0].substr(1, parts[0].size() - 2)));
    for (const std::string& name : split(parts[2].substr(1, parts[2].size() - 2), ',')) {
      made.arguments.push_back(call_parameter(name));
    }
    Instruction copy;
    copy.opcode = Opcode::kMove;
    copy.type = {Kind::kBits, 8};
    for (size_t i = 0; i < made.arguments.size(); ++i) add(copy, text, line);
    made.at = size();
    Instruction instruction;
    instruction.opcode = Opcode::kCall;
    add(instruction, text, line);
    add(copy, text, line);
    calls_.push_back(made);
  }

  void add(Instruction instruction, const std::string& text, int line) {
    instruction.text = text;
    std::replace(instruction.text.begin(), instruction.text.end(), '\t', ' ');
    instruction.line = line;
    module_->code.push_back(std::move(instruction));
  }

  // --- Operands
  // -------------------------------------------------------------------------------------------------------

  int fresh() { return draft_->function.registers++; }
  int named(const std::string& name) {
    const auto [found, is_new] = draft_->registers.emplace(name, draft_->function.registers);
    if (is_new) fresh();
    return found->second;
  }

  int read(const std::string& operand) override {
    if (operand.empty()) throw Misunderstood("an operand is missing");
    if (operand[0] == '%') return special(operand);
    if (operand[0] == '-' || isdigit(static_cast<unsigned char>(operand[0]))) return constant(number(operand));
    if (operand == "_" || draft_->declared.count(operand)) return named(operand);
    const auto variable = shared_.find(operand);
    if (variable != shared_.end()) return constant(variable->second);
    for (const Parameter& parameter : draft_->function.parameters) {
      if (parameter.name == operand && draft_->function.is_kernel) return parameter.address;
    }
    throw Misunderstood("'" + operand + "' is not known");
  }

  int special(const std::string& name) {
    Function& function = draft_->function;
    if (draft_->declared.count(name) || draft_->declared.count(name.substr(0, name.find_first_of("0123456789")))) {
      return named(name);
    }
    const std::map<std::string, int*> known = {{"%tid.x", &function.thread},
                                               {"%ctaid.x", &function.block},
                                               {"%nctaid.x", &function.blocks},
                                               {"%ntid.x", &function.threads}};
    const auto found = known.find(name);
    if (found == known.end())
      throw Misunderstood("unknown special register '" + name + "', or one that is not declared");
    return *found->second = named(name);
  }

  // 12, -1, 0x7632U, 0f3F800000 (the bits of a float), 0d3FF0000000000000
  static uint64_t number(const std::string& text) {
    if (text.size() > 2 && text[0] == '0' && strchr("fFdD", text[1])) return std::stoull(text.substr(2), nullptr, 16);
    return text[0] == '-' ? static_cast<uint64_t>(std::stoll(text, nullptr, 0)) : std::stoull(text, nullptr, 0);
  }

  int constant(uint64_t bits) override {
    const int registers = draft_->function.registers, at = named("constant " + std::to_string(bits));
    if (at == registers) draft_->function.constants.emplace_back(at, bits);  // a new one
    return at;
  }

  int call_parameter(const std::string& name) override {
    const auto found = draft_->call_parameters.find(name);
    if (found != draft_->call_parameters.end()) return found->second;
    const Function& function = draft_->function;
    if (function.is_kernel) return kNoRegister;
    if (name == function.result) return named(name);
    for (const Parameter& parameter : function.parameters) {
      if (parameter.name == name) return parameter.address;
    }
    return kNoRegister;
  }

  void branch_to(const std::string& label) override { draft_->branches.emplace_back(size(), label); }

  // --- Putting functions together -----------------------------------------------------------------------------------

  int size() const { return static_cast<int>(module_->code.size()); }
  Instruction& code(int at) { return module_->code[static_cast<size_t>(at)]; }

  // Functions that are called have the first registers, each its own; kernels, of which one runs at a time, what
  // follows.
  void link() {
    std::map<std::string, int> first;
    for (auto& [name, draft] : drafts_) {
      if (draft.function.is_kernel) continue;
      first[name] = module_->function_registers;
      module_->function_registers += draft.function.registers;
    }
    module_->registers = module_->function_registers;
    for (auto& [name, draft] : drafts_) {
      if (!draft.function.is_kernel) continue;
      first[name] = module_->function_registers;
      module_->registers = std::max(module_->registers, module_->function_registers + draft.function.registers);
    }
    for (auto& [name, draft] : drafts_) move(draft.function, first[name]);
    for (const Call& made : calls_) {
      const auto found = drafts_.find(made.callee);
      if (found == drafts_.end()) fail("a call of " + made.callee + ", which is not there");
      const Draft& callee = found->second;
      if (callee.function.parameters.size() != made.arguments.size()) fail("a call with too many or few arguments");
      code(made.at).target = callee.function.begin;
      for (size_t i = 0; i < made.arguments.size(); ++i) {
        Instruction& copy = code(made.first_copy + static_cast<int>(i));
        copy.with[0] = made.arguments[i] + first[made.caller];
        copy.to[0] = callee.function.parameters[i].address;
      }
      Instruction& copy = code(made.at + 1);
      copy.to[0] = made.result + first[made.caller];
      copy.with[0] = callee.registers.at(callee.function.result) + first[made.callee];
    }
    for (auto& [name, draft] : drafts_) module_->functions[name] = std::move(draft.function);
  }

  void move(Function& function, int by) {
    auto shift = [by](int& at) { at = at == kNoRegister ? at : at + by; };
    for (int at = function.begin; at < function.end; ++at) {
      Instruction& instruction = code(at);
      shift(instruction.guard);
      for (int& operand : instruction.to) shift(operand);
      for (int& operand : instruction.with) shift(operand);
    }
    for (int* at : {&function.thread, &function.block, &function.blocks, &function.threads}) shift(*at);
    for (Parameter& parameter : function.parameters) shift(parameter.address);
    for (auto& [at, bits] : function.constants) shift(at);
  }

  std::shared_ptr<Module> module_;
  Text text_;
  std::string statement_;  // for messages
  std::map<std::string, size_t> shared_;
  std::map<std::string, Draft> drafts_;
  Draft* draft_ = nullptr;
  std::vector<Call> calls_;
};

}  // namespace

std::shared_ptr<const Module> parse(const std::string& text, const std::string& file) {
  return Parser(text, file).parse();
}

bool Module::has_kernel(const std::string& name) const {
  return std::any_of(functions.begin(), functions.end(), [&](const auto& entry) {
    return entry.second.is_kernel && entry.first.find(name) != std::string::npos;
  });
}

const Function& Module::kernel(const std::string& name) const {
  const Function* found = nullptr;
  for (const auto& [full, function] : functions) {
    if (!function.is_kernel || full.find(name) == std::string::npos) continue;
    if (found) throw Error(file + ": two kernels are named like " + name);
    found = &function;
  }
  if (!found) throw Error(file + ": there is no kernel named " + name);
  return *found;
}

}  // namespace fusedopt::ptx
