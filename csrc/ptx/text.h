// The text of a PTX file, read from the front.
#pragma once
#include <string>

namespace fusedopt::ptx {

// Reading past the end throws std::out_of_range.
class Text {
 public:
  explicit Text(const std::string& text);

  bool more();  // after blanks
  char next();  // the next character that is no blank, which stays
  void advance() { line_ += text_.at(at_++) == '\n'; }
  std::string until(const char* stops);  // up to one of these, which stays
  std::string in_parentheses();          // which begin here
  int line() const { return line_; }

 private:
  std::string text_;
  size_t at_ = 0;
  int line_ = 1;
};

}  // namespace fusedopt::ptx
