// The kernel in front of an emulated one, which has not completed yet: withhold() of execution.h.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "emulation/execution.h"

namespace vitq::emulation {

constexpr unsigned char kGarbage = 0xCD;

// What the kernel in front has, and its bytes while they are garbage here.
class Predecessor {
 public:
  void own(std::vector<Range> ranges) { ranges_ = std::move(ranges); }
  void begin() {
    for (const Range& range : ranges_) {
      bytes_.emplace_back(range.data, range.data + range.bytes);
      std::memset(range.data, kGarbage, range.bytes);
    }
  }
  bool runs() const { return !bytes_.empty(); }
  // Whether they were written to in the meantime.
  bool complete() {
    bool written = false;
    for (size_t i = 0; i < bytes_.size(); ++i) {
      unsigned char* data = ranges_[i].data;
      written |= std::any_of(data, data + bytes_[i].size(), [](unsigned char byte) { return byte != kGarbage; });
      std::copy(bytes_[i].begin(), bytes_[i].end(), data);
    }
    bytes_.clear();
    return written;
  }

 private:
  std::vector<Range> ranges_;
  std::vector<std::vector<unsigned char>> bytes_;
};

}  // namespace vitq::emulation
