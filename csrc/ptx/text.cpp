#include "text.h"

#include <ctype.h>
#include <string.h>

#include <sstream>

#include "decode.h"

namespace fusedopt::ptx {

// Comments, debug lines and debug sections become blanks, so that lines keep their numbers.
Text::Text(const std::string& text) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    line = line.substr(0, line.find("//"));
    const std::string words = trimmed(line), directive = words.substr(0, words.find_first_of(" \t"));
    if (directive == ".section") break;
    if (directive != ".loc" && directive != ".file") text_ += line;
    text_ += '\n';
  }
}

bool Text::more() {
  while (at_ < text_.size() && isspace(static_cast<unsigned char>(text_[at_]))) advance();
  return at_ < text_.size();
}

char Text::next() {
  more();
  return text_.at(at_);
}

std::string Text::until(const char* stops) {
  const size_t begin = at_;
  while (!strchr(stops, text_.at(at_))) advance();
  return text_.substr(begin, at_ - begin);
}

std::string Text::in_parentheses() {
  advance();
  const std::string inner = until(")");
  advance();
  return inner;
}

}  // namespace fusedopt::ptx
