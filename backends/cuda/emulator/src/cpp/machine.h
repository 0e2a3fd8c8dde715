// Kernels as fibres: what a launch is, and how it is run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "emulated.h"

namespace emulator {

/// A kernel that was compiled in. Made by the code that build.rs writes.
struct Kernel {
    const char *file, *name;
    void *function;
    void (*invoke)(void *function, void *const *arguments);
    /// Size of each argument.
    std::vector<size_t> arguments;
    /// Most threads of a block; 0: as many as a block can have.
    unsigned max_threads;
};

std::vector<Kernel> &kernels();

template <class... Arguments> struct Invoker {
    template <size_t... I>
    static void apply(void (*function)(Arguments...), void *const *arguments, std::index_sequence<I...>) {
        function(*static_cast<const Arguments *>(arguments[I])...);
    }
    static void invoke(void *function, void *const *arguments) {
        apply(reinterpret_cast<void (*)(Arguments...)>(function), arguments, std::index_sequence_for<Arguments...>());
    }
};

struct Registration {
    template <class... Arguments>
    Registration(const char *file, const char *name, void (*function)(Arguments...), unsigned max_threads = 0) {
        kernels().push_back(Kernel{file, name, reinterpret_cast<void *>(function), &Invoker<Arguments...>::invoke,
                                   {sizeof(Arguments)...}, max_threads});
    }
};

struct Launch {
    const Kernel *kernel;
    Index grid, block;
    unsigned shared;
    bool cooperative;
    /// Copies of the arguments, each in its own room.
    std::vector<std::vector<unsigned char>> arguments;
};

enum class Outcome { Done, BadAddress, Failed, TookTooLong };

/// Runs a launch to its end, on this thread and a helper. `seed` decides every order in it. What went wrong is in `report`.
Outcome run(const Launch &launch, uint64_t seed, std::string &report);

/// Catches accesses of kernels to memory that is not there; once.
void install_handler();

/// Most bytes of dynamic shared memory of a block, and what blocks of a multiprocessor share.
constexpr unsigned SHARED_DEFAULT = 48 << 10, SHARED_OPTIN = 227 << 10, SHARED_MULTIPROCESSOR = 228 << 10;
constexpr unsigned MAX_THREADS = 1024, MULTIPROCESSOR_THREADS = 2048;

/// A small generator: splitmix64.
struct Random {
    uint64_t state;
    uint64_t next() {
        uint64_t z = (state += 0x9e3779b97f4a7c15ull);
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ z >> 27) * 0x94d049bb133111ebull;
        return z ^ z >> 31;
    }
    /// Below `n`, which is not 0.
    uint32_t below(uint32_t n) { return (uint32_t)((next() >> 32) * n >> 32); }
};

} // namespace emulator
