#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <deque>

namespace emulator {

namespace {

constexpr size_t PAGE = 4096;
/// Bytes of the file that fresh memory shows until it is written.
constexpr size_t PATTERN_BYTES = 32 << 20;
/// Freed ranges whose addresses are not used again yet.
constexpr size_t QUARANTINE = 1024;

/// A file of nothing but a byte. Mapped privately, it costs no memory where nothing is written.
int pattern_file(unsigned char byte) {
    static std::mutex mutex;
    static std::map<unsigned char, int> files;
    std::lock_guard lock(mutex);
    auto known = files.find(byte);
    if (known != files.end()) return known->second;
    int file = memfd_create("hoist-fresh-memory", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, PATTERN_BYTES) != 0) return -1;
    void *map = mmap(nullptr, PATTERN_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (map == MAP_FAILED) return -1;
    std::memset(map, byte, PATTERN_BYTES);
    munmap(map, PATTERN_BYTES);
    return files[byte] = file;
}

} // namespace

uint64_t Memory::allocate(size_t bytes, unsigned char pattern) {
    size_t rounded = Memory::rounded(bytes);
    size_t pages = (rounded + PAGE - 1) / PAGE * PAGE;
    size_t mapped = pages + PAGE;
    void *map = mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) return 0;
    char *base = static_cast<char *>(map);
    if (pages <= 1 << 20) {
        mprotect(base, pages, PROT_READ | PROT_WRITE);
        std::memset(base, pattern, pages);
    } else {
        int file = pattern_file(pattern);
        for (size_t at = 0; at < pages; at += PATTERN_BYTES) {
            size_t part = pages - at < PATTERN_BYTES ? pages - at : PATTERN_BYTES;
            if (file < 0 || mmap(base + at, part, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, file, 0) == MAP_FAILED) {
                munmap(map, mapped);
                return 0;
            }
        }
    }
    // As near to its end's page as the alignment allows that the driver promises.
    uint64_t address = reinterpret_cast<uint64_t>(base) + pages - rounded;
    std::lock_guard lock(mutex);
    allocations[address] = {bytes, base, mapped};
    taken += rounded;
    return address;
}

bool Memory::free(uint64_t address) {
    static std::deque<std::pair<void *, size_t>> freed;
    std::lock_guard lock(mutex);
    auto found = allocations.find(address);
    if (found == allocations.end()) return false;
    Allocation a = found->second;
    allocations.erase(found);
    taken -= rounded(a.bytes);
    // The memory goes, the addresses stay for a while: whoever uses them is caught.
    mmap(a.map, a.mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    freed.emplace_back(a.map, a.mapped);
    if (freed.size() > QUARANTINE) {
        munmap(freed.front().first, freed.front().second);
        freed.pop_front();
    }
    return true;
}

bool Memory::holds(uint64_t address, size_t bytes) const {
    std::lock_guard lock(mutex);
    auto after = allocations.upper_bound(address);
    if (after == allocations.begin()) return false;
    auto &[start, a] = *--after;
    return address - start <= a.bytes && bytes <= a.bytes - (address - start);
}

size_t Memory::used() const {
    std::lock_guard lock(mutex);
    return taken;
}

size_t Memory::count() const {
    std::lock_guard lock(mutex);
    return allocations.size();
}

void Memory::clear() {
    for (;;) {
        uint64_t first;
        {
            std::lock_guard lock(mutex);
            if (allocations.empty()) return;
            first = allocations.begin()->first;
        }
        free(first);
    }
}

} // namespace emulator
