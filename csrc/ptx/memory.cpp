#include "memory.h"

#include <algorithm>

namespace fusedopt::ptx {

void SharedMemory::clear(size_t bytes) {
  bytes_.assign(bytes, '\xff');
  state_.assign(bytes, Byte{});
}

char* SharedMemory::access(uint64_t address, size_t bytes, const Moment& now, const char* stored) {
  if (address > bytes_.size() || bytes > bytes_.size() - address) throw Error("outside of the block's shared memory");
  for (uint64_t at = address; at < address + bytes; ++at) {
    Byte& byte = state_[at];
    const bool written = byte.write_epoch == now.epoch && byte.writer != now.thread;
    const bool read = byte.read_epoch == now.epoch && byte.reader != now.thread;
    const bool same = stored && byte.writer / kLanes == now.thread / kLanes && bytes_[at] == stored[at - address];
    if (!stored && byte.write_epoch < 0) throw Error("shared byte " + std::to_string(at) + " was never written");
    if ((written && !same) || (read && stored)) {
      throw Error("shared byte " + std::to_string(at) + " was " + (written ? "written" : "read") +
                  " by another thread since the last barrier");
    }
    if (stored) {
      byte.writer = now.thread, byte.write_epoch = now.epoch;
    } else {
      byte.reader = read ? Byte::kSeveral : now.thread, byte.read_epoch = now.epoch;
    }
  }
  return bytes_.data() + address;
}

void GlobalMemory::begin_launch() {
  before_ = std::move(now_);
  now_.clear();
  latest_ = {~0ull, nullptr};
  released_.clear();
  acquired_.clear();
}

const GlobalMemory::Mark* GlobalMemory::find(const Pages& pages, uint64_t address) {
  const auto page = pages.find(address / kPage);
  return page == pages.end() ? nullptr : &page->second->marks[address % kPage / kUnit];
}

void GlobalMemory::write(uint64_t address, size_t bytes, const Moment& now) {
  for (uint64_t at = address - address % kUnit; at < address + bytes; at += kUnit) {
    if (latest_.first != at / kPage) {
      std::unique_ptr<Page>& page = now_[at / kPage];
      if (!page) page = std::make_unique<Page>();
      latest_ = {at / kPage, page.get()};
    }
    latest_.second->marks[at % kPage / kUnit] = {now, true};
  }
}

void GlobalMemory::read(uint64_t address, size_t bytes, const Moment& now, bool past_l1) const {
  for (uint64_t at = address - address % kUnit; at < address + bytes; at += kUnit) {
    const Mark* mark = latest_.first == at / kPage ? &latest_.second->marks[at % kPage / kUnit] : find(now_, at);
    if (!mark) {  // nothing of this page was written
      at = at / kPage * kPage + kPage - kUnit;
      continue;
    }
    if (!mark->written || mark->moment.block == now.block) continue;
    if (!past_l1) throw Error("another block wrote this in the same launch, and the load may find it in the L1 cache");
    const auto released = released_.find(mark->moment.block);
    const bool is_released =
        released != released_.end() && std::any_of(released->second.begin(), released->second.end(),
                                                   [&](const Moment& release) { return release.after(mark->moment); });
    if (!is_released) throw Error("another block wrote this in the same launch, and has not released it");
    const bool is_acquired =
        std::any_of(acquired_.begin(), acquired_.end(), [&](const Moment& acquire) { return now.after(acquire); });
    if (!is_acquired)
      throw Error("another block wrote and released this in the same launch, and this one has not acquired it");
  }
}

bool GlobalMemory::written_before(uint64_t address, size_t bytes) const {
  for (uint64_t at = address - address % kUnit; at < address + bytes; at += kUnit) {
    const Mark* mark = find(before_, at);
    if (mark && mark->written) return true;
  }
  return false;
}

}  // namespace fusedopt::ptx
