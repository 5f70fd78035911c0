// SHA-256 as FIPS 180-4 defines it: the one thing that a library for TLS would be needed for.
#pragma once

#include <stdint.h>

#include <string>
#include <string_view>

namespace piflow {

class Sha256 {
 public:
  void add(std::string_view data);
  // In hexadecimal. Nothing may be added after it.
  std::string finish();

 private:
  void take_block(const unsigned char* block);

  uint32_t state_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                        0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  unsigned char block_[64];
  uint64_t size_ = 0;
};

inline std::string sha256(std::string_view data) {
  Sha256 digest;
  digest.add(data);
  return digest.finish();
}

}  // namespace piflow
