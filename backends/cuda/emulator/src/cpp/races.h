// Accesses to a block's shared memory that nothing orders: what the order of fibres hides, since a fibre is not interrupted
// between two waits. In the library that looks for them, kernels are compiled with a call at every access.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulated.h"

namespace emulator {

#ifdef HOIST_RACES
constexpr bool LOOKS_FOR_RACES = true;
#else
constexpr bool LOOKS_FOR_RACES = false;
#endif

enum class Access : uint8_t { Read, Write, Atomic, Copy };

/// How much of every thread, and of every run of asynchronous copies, has happened before some point. Of threads since the
/// block has met last: what was before that is before everything.
struct Clocks {
    uint32_t generation = 0;
    std::vector<uint32_t> threads, copies;
};

/// A block's accesses and their order, as the PTX memory model has it: `meet_warp`, barriers of the block and named ones,
/// barriers that count arrivals, and the wait for one's own copies order; shuffles do not.
class Races {
  public:
    /// Begins a launch's block.
    void begin(unsigned char *dynamic, size_t dynamic_bytes, unsigned char *variables, size_t variable_bytes, unsigned threads);

    /// An access of a thread to what may be shared memory.
    void access(unsigned thread, const void *at, size_t bytes, Access kind, const void *code);

    /// All threads that are left have met.
    void all_meet();
    /// Threads `first` to `first + count` have met.
    void warp_meets(unsigned first, unsigned count);
    /// What the thread has done is before whatever acquires `to`.
    void release(unsigned thread, Clocks &to);
    void acquire(unsigned thread, const Clocks &from);
    void join(Clocks &to, const Clocks &from);

    /// A copy to shared memory starts that is one of a run: of a thread's own (the thread's number), or of those that a
    /// barrier counts (`of_barrier`). Returns its place in the run.
    uint32_t copy_starts(unsigned thread, unsigned run, void *to, size_t bytes, Site site);
    unsigned of_barrier(size_t barrier) const { return count + (unsigned)barrier; }
    /// The run has come as far as `place`, as far as `clocks` is concerned.
    void copy_is_done(Clocks &clocks, unsigned run, uint32_t place);
    void copy_is_awaited(unsigned thread, unsigned run, uint32_t place) { copy_is_done(clocks[thread], run, place); }

    bool any() const { return !found.empty(); }
    /// What was found, by file and line.
    std::string report() const;

  private:
    struct Place {
        const void *code;
        Site site;
    };
    /// The last write of a byte: by a thread, or by a run of copies, whose numbers follow those of threads.
    struct Last {
        uint32_t generation, who, clock, place;
        Access kind;
    };
    /// Accesses of a byte by some threads: one's, or a table of all threads' clocks.
    struct Some {
        uint32_t generation, who, clock, place;
        uint32_t *table;
    };
    struct Byte {
        Last written;
        Some read, atomic;
    };
    struct Race {
        uint32_t first, second;
        Access kinds[2];
        unsigned who[2];
        size_t byte, times;
        bool is_dynamic;
    };

    Byte *byte_at(const void *at, size_t &left);
    bool is_before(const Last &last, const Clocks &now) const;
    /// A thread whose access is not before `now`; `count` if there is none.
    unsigned not_before(const Some &some, const Clocks &now) const;
    void add(Some &some, unsigned thread, uint32_t place);
    void found_one(const Byte *byte, uint32_t place, Access kind, unsigned who, uint32_t first, Access first_kind, unsigned first_who);
    uint32_t place_of(const void *code, Site site);
    uint32_t *new_table();

    unsigned count = 0;
    uint32_t generation = 0;
    std::vector<Clocks> clocks;
    std::vector<uint32_t> runs;
    unsigned char *areas[2] = {};
    size_t sizes[2] = {};
    std::vector<Byte> bytes[2];
    std::vector<std::vector<uint32_t>> tables;
    size_t tables_used = 0;
    std::vector<Place> places;
    std::unordered_map<const void *, uint32_t> known;
    std::map<std::pair<const char *, int>, uint32_t> known_sites;
    std::vector<Race> found;
};

} // namespace emulator
