// Memory of the emulated device: mappings of the host, each with a page behind it that may not be touched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

namespace emulator {

class Memory {
  public:
    /// 0 if the host has none.
    uint64_t allocate(size_t bytes, unsigned char pattern);
    /// False if nothing was allocated there.
    bool free(uint64_t address);
    /// Whether a range lies in one allocation.
    bool holds(uint64_t address, size_t bytes) const;
    size_t used() const;
    size_t count() const;
    /// Frees everything.
    void clear();

    /// What an allocation takes of the device.
    static size_t rounded(size_t bytes) { return (bytes + 511) / 512 * 512; }

  private:
    struct Allocation {
        size_t bytes;
        char *map;
        size_t mapped;
    };
    mutable std::mutex mutex;
    std::map<uint64_t, Allocation> allocations;
    size_t taken = 0;
};

} // namespace emulator
