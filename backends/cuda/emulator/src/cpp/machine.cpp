// The scheduler: threads of a block are fibres that run until they wait; who runs next, and when a copy arrives, is drawn
// from a seed. All blocks of a cooperative grid run together on one thread of the system; other blocks run one after the
// other, on two.

#include "machine.h"
#include "races.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>

namespace emulator {

thread_local const Position *here;

std::vector<Kernel> &kernels() {
    static std::vector<Kernel> all;
    return all;
}

namespace {

// ---- fibres ----

constexpr size_t STACK_BYTES = 64 << 10, GUARD_BYTES = 4 << 10;

#if defined(__x86_64__)
typedef void *Context;
// Saves what a callee must keep, and continues where the other was.
asm(R"(
.text
.type hoist_emulator_switch, @function
.hidden hoist_emulator_switch
hoist_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size hoist_emulator_switch, . - hoist_emulator_switch
)");
extern "C" void hoist_emulator_switch(Context *from, Context to);
inline void switch_to(Context &from, Context &to) { hoist_emulator_switch(&from, to); }
void prepare(Context &context, char *stack, void (*entry)()) {
    void **top = reinterpret_cast<void **>(stack + STACK_BYTES);
    // A function finds its stack 8 bytes off a multiple of 16.
    *--top = nullptr;
    *--top = reinterpret_cast<void *>(entry);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    context = top;
}
#else
typedef ucontext_t Context;
inline void switch_to(Context &from, Context &to) { swapcontext(&from, &to); }
void prepare(Context &context, char *stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = STACK_BYTES;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}
#endif

/// Stacks, each with a page below it that may not be touched; kept by the thread of the system.
struct Stacks {
    std::vector<char *> free, all;
    char *take() {
        if (free.empty()) {
            constexpr size_t EACH = STACK_BYTES + GUARD_BYTES, COUNT = 64;
            char *base = static_cast<char *>(mmap(nullptr, EACH * COUNT, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
            if (base == MAP_FAILED) return nullptr;
            all.push_back(base);
            for (size_t i = 0; i < COUNT; i++) {
                char *stack = base + i * EACH + GUARD_BYTES;
                mprotect(stack, STACK_BYTES, PROT_READ | PROT_WRITE);
                free.push_back(stack);
            }
        }
        char *stack = free.back();
        free.pop_back();
        return stack;
    }
    ~Stacks() {
        for (char *base : all) munmap(base, (STACK_BYTES + GUARD_BYTES) * 64);
    }
};

// ---- what runs ----

struct Block;
struct Group;

enum class Waits : uint8_t { No, Warp, Barrier, Named, Bytes, Counter, Done };

struct Fibre {
    Context context;
    char *stack;
    Block *block;
    Position position;
    unsigned thread, lane, warp;
    Waits waits;
    Site site;
    const char *what;
    /// What it waits for: a barrier's address and parity, a counter and its least value, a named barrier's number.
    const void *address;
    unsigned value;
    /// Whether the counter must be just that.
    bool equal;
    /// Numbers of its own copies that it has not waited for yet, and the group that is open.
    std::vector<size_t> copies;
    unsigned group;
};

struct Warp {
    /// Lanes that exist, have left, and wait together.
    unsigned lanes = 0, left = 0, arrived = 0;
    bool is_exchange = false;
    const char *what = nullptr;
    Site site{};
    unsigned generation = 0;
    alignas(16) unsigned char values[2][32][32];
    unsigned at_named = 0, named = 0;
};

struct Named {
    unsigned arrived = 0, threads = 0;
    /// What those have done who do not wait here.
    Clocks before;
};

struct Copy {
    Block *block;
    Fibre *owner;
    unsigned char *to;
    const unsigned char *from;
    unsigned bytes, group;
    unsigned long long *barrier;
    Site site;
    bool done;
    /// Its run of copies, and its place there.
    unsigned run;
    uint32_t place;
};

struct Variable {
    Site site;
    size_t at, bytes;
};

struct Block {
    Group *group;
    std::vector<Fibre> fibres;
    std::vector<Warp> warps;
    unsigned live, at_barrier;
    bool any[2];
    unsigned barrier_generation;
    Named named[16];
    unsigned char *dynamic;
    unsigned dynamic_bytes;
    unsigned char *variables;
    size_t variable_bytes;
    std::vector<Variable> known;
    std::vector<unsigned long long *> barriers;
    Races races;
    /// Of each barrier that counts: what has arrived, and what had when its last phase was complete.
    std::vector<Clocks> arrived, complete;
};

constexpr size_t VARIABLE_ROOM = 64 << 10;
constexpr size_t DYNAMIC_ROOM = 256 << 10;
constexpr unsigned char SLACK = 0x5c;

/// The shared memory of a block, between pages that may not be touched.
struct Room {
    unsigned char *base = nullptr;
    static constexpr size_t BYTES = 4096 + DYNAMIC_ROOM + 4096 + VARIABLE_ROOM + 4096;
    Room() {
        void *map = mmap(nullptr, BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (map == MAP_FAILED) std::abort();
        base = static_cast<unsigned char *>(map);
        mprotect(base + 4096, DYNAMIC_ROOM, PROT_READ | PROT_WRITE);
        mprotect(base + 8192 + DYNAMIC_ROOM, VARIABLE_ROOM, PROT_READ | PROT_WRITE);
    }
    Room(const Room &) = delete;
    ~Room() { munmap(base, BYTES); }
    unsigned char *dynamic_end() { return base + 4096 + DYNAMIC_ROOM; }
    unsigned char *variables() { return base + 8192 + DYNAMIC_ROOM; }
};

/// What one thread of the system keeps between launches.
struct Local {
    Stacks stacks;
    std::vector<std::unique_ptr<Room>> rooms;
    std::vector<std::unique_ptr<Block>> blocks;
    void *signal_stack = nullptr;
    ~Local() {
        if (signal_stack) {
            stack_t off{};
            off.ss_flags = SS_DISABLE;
            sigaltstack(&off, nullptr);
            munmap(signal_stack, 64 << 10);
        }
    }
};

thread_local Local local;
/// The fibre that runs, or for which a copy is carried out, and where to go on if it touches what is not there.
thread_local Fibre *running __attribute__((tls_model("initial-exec")));
thread_local sigjmp_buf escape;

/// A launch that one thread of the system runs, or a block of it.
struct Group {
    const Launch *launch;
    Random random;
    std::vector<void *> arguments;
    std::vector<Block *> blocks;
    std::vector<Fibre *> ready;
    std::vector<Fibre *> at_counters;
    Context scheduler;
    uint64_t clock = 0;
    std::deque<Copy> copies;
    /// (when, number) of copies under way, the soonest first; copies that are done already are passed over.
    std::vector<std::pair<uint64_t, size_t>> due;
    size_t under_way = 0;
    bool failed = false;
    bool bad_address = false;
    std::string report;
    /// Warps that are left waiting for now.
    uint32_t slow = 0, slow_mask = 0;
    uint64_t latency;

    void fail(const std::string &why) {
        if (failed) return;
        failed = true;
        report = why;
    }
};

constexpr uint64_t NEVER = ~0ull;

std::string at(Site site) {
    const char *slash = std::strrchr(site.file, '/');
    return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

std::string name_of(const Fibre &f) {
    char text[160];
    const Index &b = f.position.block;
    std::snprintf(text, sizeof text, "block (%u, %u, %u) thread %u", b.x, b.y, b.z, f.thread);
    return text;
}

Fibre &current() { return *running; }

/// Leaves the running fibre for good: its launch has failed.
[[noreturn]] void give_up(const std::string &why) {
    Fibre &f = current();
    Group &g = *f.block->group;
    g.fail(name_of(f) + ": " + why);
    switch_to(f.context, g.scheduler);
    std::abort();
}

void wake(Fibre &f) {
    f.waits = Waits::No;
    f.block->group->ready.push_back(&f);
}

void sleep(Waits waits, const char *what, Site site) {
    Fibre &f = current();
    f.waits = waits, f.what = what, f.site = site;
    switch_to(f.context, f.block->group->scheduler);
}

/// Lets others run, now and then, where a thread could also go on.
void pause() {
    Fibre &f = current();
    Group &g = *f.block->group;
    if (g.random.below(4) != 0) return;
    g.ready.push_back(&f);
    switch_to(f.context, g.scheduler);
}

void release_block_barrier(Block &b) {
    b.at_barrier = 0;
    b.barrier_generation++;
    b.any[b.barrier_generation & 1] = false;
    if constexpr (LOOKS_FOR_RACES) b.races.all_meet();
    for (Fibre &f : b.fibres)
        if (f.waits == Waits::Barrier) wake(f);
}

void release_warp(Block &b, unsigned warp) {
    Warp &w = b.warps[warp];
    w.arrived = 0, w.generation++;
    unsigned first = warp * 32;
    // Shuffles order nothing.
    if constexpr (LOOKS_FOR_RACES)
        if (!w.is_exchange) b.races.warp_meets(first, w.lanes);
    for (unsigned i = first; i < first + w.lanes; i++)
        if (b.fibres[i].waits == Waits::Warp) wake(b.fibres[i]);
}

/// Lets those go on who wait at a named barrier, if all have come.
void settle_named(Block &b, unsigned id) {
    Named &n = b.named[id];
    if (n.arrived < n.threads) return;
    n.arrived = n.threads = 0;
    if constexpr (LOOKS_FOR_RACES)
        for (Fibre &f : b.fibres)
            if (f.waits == Waits::Named && f.value == id) b.races.release(f.thread, n.before);
    for (Fibre &f : b.fibres)
        if (f.waits == Waits::Named && f.value == id) {
            if constexpr (LOOKS_FOR_RACES) b.races.acquire(f.thread, n.before);
            wake(f);
        }
    n.before = Clocks{};
}

/// A warp has come to a named barrier with all its lanes.
void warp_at_named(Block &b, unsigned warp, unsigned id) {
    b.warps[warp].at_named = 0;
    b.named[id].arrived += 32;
    settle_named(b, id);
}

void fibre_main() {
    Fibre &f = current();
    const Launch &launch = *f.block->group->launch;
    launch.kernel->invoke(launch.kernel->function, f.block->group->arguments.data());
    Block &b = *f.block;
    f.waits = Waits::Done;
    b.live--;
    Warp &w = b.warps[f.warp];
    w.left++;
    // Whoever waits for all that are left may go on now.
    if (w.arrived > 0 && w.arrived + w.left == w.lanes) {
        if (w.is_exchange) {
            b.group->fail(name_of(f) + " has ended while its warp waits in " + w.what + " at " + at(w.site));
        } else {
            release_warp(b, f.warp);
        }
    }
    if (w.at_named > 0 && w.at_named + w.left == w.lanes) {
        for (unsigned i = f.warp * 32; i < f.warp * 32 + w.lanes; i++)
            if (b.fibres[i].waits == Waits::Named) {
                warp_at_named(b, f.warp, b.fibres[i].value);
                break;
            }
    }
    if (b.live > 0 && b.at_barrier == b.live) release_block_barrier(b);
    switch_to(f.context, b.group->scheduler);
    std::abort();
}

// ---- barriers that count bytes ----
// As the PTX documentation tells: a phase is complete when no arrival is pending and no byte is expected any more; the next
// one begins at once with the full count. In the word: bit 63 says that it was initialised, bit 62 the phase's parity, then
// 20 bits of pending arrivals, 20 bits of the count, and 22 bits of bytes, with 2^21 added.

constexpr unsigned long long VALID = 1ull << 63, ODD = 1ull << 62;
constexpr int BYTES_BIAS = 1 << 21;

struct Word {
    bool odd;
    unsigned pending, count;
    int bytes;
};

Word unpack(unsigned long long w) {
    return {(w & ODD) != 0, (unsigned)(w >> 42) & 0xfffff, (unsigned)(w >> 22) & 0xfffff, (int)(w & 0x3fffff) - BYTES_BIAS};
}

unsigned long long pack(const Word &w) {
    return VALID | (w.odd ? ODD : 0) | (unsigned long long)w.pending << 42 | (unsigned long long)w.count << 22 |
           (unsigned long long)(w.bytes + BYTES_BIAS);
}

bool is_known(const Block &b, const unsigned long long *barrier) {
    return std::find(b.barriers.begin(), b.barriers.end(), barrier) != b.barriers.end();
}

/// A barrier's number in its block, by which `arrived` and `complete` go.
size_t number_of(Block &b, const unsigned long long *barrier) {
    size_t number = (size_t)(std::find(b.barriers.begin(), b.barriers.end(), barrier) - b.barriers.begin());
    if (b.arrived.size() <= number) b.arrived.resize(number + 1), b.complete.resize(number + 1);
    return number;
}

/// Ends the phase if it is complete.
void settle(Block &b, unsigned long long *barrier, Word w) {
    bool complete = w.pending == 0 && w.bytes == 0;
    if (complete) w.odd = !w.odd, w.pending = w.count;
    *barrier = pack(w);
    if (!complete) return;
    if constexpr (LOOKS_FOR_RACES) {
        size_t number = number_of(b, barrier);
        b.complete[number] = b.arrived[number];
    }
    for (Fibre &f : b.fibres)
        if (f.waits == Waits::Bytes && f.address == barrier) wake(f);
}

bool in_shared(const Block &b, const void *p, size_t bytes) {
    auto at = static_cast<const unsigned char *>(p);
    return (at >= b.dynamic && at + bytes <= b.dynamic + b.dynamic_bytes) ||
           (at >= b.variables && at + bytes <= b.variables + b.variable_bytes);
}

// ---- copies ----

bool sooner(const std::pair<uint64_t, size_t> &a, const std::pair<uint64_t, size_t> &b) { return a > b; }

uint64_t draw_due(Group &g) {
    uint32_t r = g.random.below(32);
    if (r < 14) return g.clock + g.random.below(8);
    if (r < 24) return g.clock + g.random.below(64) * g.latency;
    if (r < 30) return g.clock + g.random.below(1024) * g.latency;
    return NEVER;
}

void schedule_copy(Group &g, size_t number) {
    g.due.emplace_back(draw_due(g), number);
    std::push_heap(g.due.begin(), g.due.end(), sooner);
}

void start_copy(Copy copy) {
    Group &g = *copy.block->group;
    g.copies.push_back(copy);
    g.under_way++;
    schedule_copy(g, g.copies.size() - 1);
}

/// Moves a copy's bytes, or some of them if it is a bulk copy.
void carry_out(Group &g, size_t number, bool whole) {
    Copy &c = g.copies[number];
    unsigned n = c.bytes;
    if (!whole && c.barrier && n > 16 && g.random.below(4) == 0) n = 16 * (1 + g.random.below(n / 16 - 1));
    running = c.owner;
    std::memcpy(c.to, c.from, n);
    c.to += n, c.from += n, c.bytes -= n;
    if constexpr (LOOKS_FOR_RACES)
        if (c.barrier && c.bytes == 0) c.block->races.copy_is_done(c.block->arrived[number_of(*c.block, c.barrier)], c.run, c.place);
    if (c.barrier) {
        Word w = unpack(*c.barrier);
        w.bytes -= (int)n;
        if (!(*c.barrier & VALID) || !is_known(*c.block, c.barrier)) {
            g.fail("a copy started at " + at(c.site) + " arrives at a barrier that was overwritten");
            return;
        }
        settle(*c.block, c.barrier, w);
    }
    if (c.bytes > 0) {
        schedule_copy(g, number);
        return;
    }
    c.done = true;
    g.under_way--;
}

/// Carries out the copy that is due next, if one is due by now, or any if `must`.
bool next_copy(Group &g, bool must) {
    while (!g.due.empty()) {
        auto [when, number] = g.due.front();
        if (!g.copies[number].done && when > g.clock && !must) return false;
        std::pop_heap(g.due.begin(), g.due.end(), sooner);
        g.due.pop_back();
        if (g.copies[number].done) continue;
        carry_out(g, number, false);
        return true;
    }
    return false;
}

// ---- the scheduler ----

void set_up(Group &g, Block &b, Room &room, Index block) {
    const Launch &l = *g.launch;
    unsigned threads = l.block.x * l.block.y * l.block.z;
    b.group = &g;
    b.live = threads;
    b.at_barrier = 0, b.barrier_generation = 0;
    b.any[0] = b.any[1] = false;
    for (Named &n : b.named) n = Named{};
    b.known.clear(), b.barriers.clear();
    b.arrived.clear(), b.complete.clear();
    b.variable_bytes = 0;
    b.variables = room.variables();
    // Shared memory ends where a page does, but for its alignment.
    unsigned rounded = (l.shared + 127) & ~127u;
    b.dynamic = room.dynamic_end() - rounded;
    b.dynamic_bytes = l.shared;
    static const unsigned char patterns[] = {0xff, 0xa5, 0x7f, 0x01};
    std::memset(b.dynamic, patterns[g.random.below(4)], l.shared);
    std::memset(b.dynamic + l.shared, SLACK, rounded - l.shared);
    if constexpr (LOOKS_FOR_RACES) b.races.begin(b.dynamic, l.shared, b.variables, VARIABLE_ROOM, threads);
    if (b.fibres.size() < threads) b.fibres.resize(threads);
    unsigned warps = (threads + 31) / 32;
    if (b.warps.size() < warps) b.warps.resize(warps);
    for (unsigned w = 0; w < warps; w++) {
        Warp &warp = b.warps[w];
        warp.lanes = std::min(32u, threads - 32 * w);
        warp.left = warp.arrived = warp.generation = warp.at_named = 0;
    }
    for (unsigned t = 0; t < b.fibres.size(); t++) {
        Fibre &f = b.fibres[t];
        f.stack = nullptr;
        f.waits = Waits::Done;
        if (t >= threads) continue;
        f.block = &b;
        f.position.thread = {t % l.block.x, t / l.block.x % l.block.y, t / l.block.x / l.block.y};
        f.position.block = block;
        f.position.block_size = l.block;
        f.position.grid_size = l.grid;
        f.thread = t, f.lane = t & 31, f.warp = t >> 5;
        f.waits = Waits::No;
        f.copies.clear();
        f.group = 0;
        g.ready.push_back(&f);
    }
    g.blocks.push_back(&b);
}

std::string places(const Group &g) {
    // Alike waits are counted together.
    std::vector<std::pair<std::string, std::pair<unsigned, std::string>>> found;
    for (const Block *b : g.blocks)
        for (const Fibre &f : b->fibres) {
            if (f.waits == Waits::Done || f.waits == Waits::No) continue;
            std::string what = std::string(f.what) + " at " + at(f.site);
            if (f.waits == Waits::Bytes) what += ", parity " + std::to_string(f.value);
            auto place = std::find_if(found.begin(), found.end(), [&](auto &p) { return p.first == what; });
            if (place == found.end()) {
                found.push_back({what, {1, name_of(f)}});
            } else {
                place->second.first++;
            }
        }
    std::string text;
    for (auto &[what, who] : found) {
        text += (text.empty() ? "" : "; ") + std::to_string(who.first) + " in " + what + " (" + who.second + " first)";
    }
    return text;
}

/// A thread that a counter lets go on.
bool look_at_counters(Group &g) {
    bool any = false;
    for (size_t i = 0; i < g.at_counters.size();) {
        Fibre *f = g.at_counters[i];
        unsigned now = __atomic_load_n(static_cast<const unsigned *>(f->address), __ATOMIC_SEQ_CST);
        if (f->equal ? now == f->value : now >= f->value) {
            g.at_counters[i] = g.at_counters.back();
            g.at_counters.pop_back();
            wake(*f);
            any = true;
        } else {
            i++;
        }
    }
    return any;
}

constexpr uint64_t MOST_SECONDS = 120;

void run_group(Group &g) {
    Local &l = local;
    auto started = std::chrono::steady_clock::now();
    size_t left = 0;
    for (Block *b : g.blocks) left += b->live;
    g.latency = 1 + g.random.below(16);
    while (left > 0 && !g.failed) {
        g.clock++;
        if (g.under_way > 0 && next_copy(g, false)) continue;
        if (g.ready.empty()) {
            if (next_copy(g, true) || look_at_counters(g)) continue;
            g.fail("deadlock, " + std::to_string(left) + " threads wait: " + places(g));
            break;
        }
        if ((g.clock & 0xfff) == 0) {
            // Some warps fall behind for a while.
            g.slow_mask = (uint32_t)g.random.next(), g.slow = (uint32_t)g.random.next() & (uint32_t)g.random.next();
            if ((g.clock & 0xfffff) == 0 &&
                std::chrono::steady_clock::now() - started > std::chrono::seconds(MOST_SECONDS)) {
                g.fail("the launch takes more than " + std::to_string(MOST_SECONDS) + " s: " + places(g));
                break;
            }
        }
        size_t pick = g.random.below((uint32_t)g.ready.size());
        if ((g.slow >> (g.ready[pick]->warp & 31) & 1) && g.random.below(16) != 0) pick = g.random.below((uint32_t)g.ready.size());
        Fibre *f = g.ready[pick];
        g.ready[pick] = g.ready.back();
        g.ready.pop_back();
        if (!f->stack) {
            f->stack = l.stacks.take();
            if (!f->stack) {
                g.fail("no memory for a thread's stack");
                break;
            }
            prepare(f->context, f->stack, fibre_main);
        }
        running = f;
        here = &f->position;
        switch_to(g.scheduler, f->context);
        if (f->waits == Waits::Done) {
            l.stacks.free.push_back(f->stack);
            f->stack = nullptr;
            left--;
        }
    }
    if constexpr (LOOKS_FOR_RACES)
        for (Block *b : g.blocks)
            if (b->races.any()) {
                g.fail("block (" + std::to_string(b->fibres[0].position.block.x) + ", …): " + b->races.report());
                break;
            }
    // Copies that nobody waited for arrive all the same.
    while (!g.failed && g.under_way > 0 && next_copy(g, true)) {
    }
}

/// Gives back the stacks of threads that were abandoned, and looks at what blocks must not have touched.
void clean_up(Group &g) {
    for (Block *b : g.blocks) {
        for (Fibre &f : b->fibres) {
            if (f.stack) local.stacks.free.push_back(f.stack), f.stack = nullptr;
            f.waits = Waits::Done;
        }
        unsigned rounded = (b->dynamic_bytes + 127) & ~127u;
        for (unsigned i = b->dynamic_bytes; i < rounded && !g.failed; i++)
            if (b->dynamic[i] != SLACK) g.fail("a block wrote past its dynamic shared memory of " + std::to_string(b->dynamic_bytes) + " bytes");
    }
    running = nullptr;
    here = nullptr;
}

void prepare_signal_stack() {
    if (local.signal_stack) return;
    local.signal_stack = mmap(nullptr, 64 << 10, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    stack_t stack{};
    stack.ss_sp = local.signal_stack;
    stack.ss_size = 64 << 10;
    sigaltstack(&stack, nullptr);
}

/// The blocks `first` to `first + count` of a grid, together.
void run_blocks(const Launch &launch, uint64_t seed, uint64_t first, unsigned count, Group &g) {
    g.launch = &launch;
    g.random = Random{seed};
    g.random.next();
    for (auto &a : launch.arguments) g.arguments.push_back(const_cast<unsigned char *>(a.data()));
    while (local.rooms.size() < count) {
        local.rooms.push_back(std::make_unique<Room>());
        local.blocks.push_back(std::make_unique<Block>());
    }
    for (unsigned i = 0; i < count; i++) {
        uint64_t n = first + i;
        Index block = {(unsigned)(n % launch.grid.x), (unsigned)(n / launch.grid.x % launch.grid.y),
                       (unsigned)(n / launch.grid.x / launch.grid.y)};
        set_up(g, *local.blocks[i], *local.rooms[i], block);
    }
    prepare_signal_stack();
    if (sigsetjmp(escape, 0) == 0) run_group(g);
    clean_up(g);
}

struct sigaction previous_segv, previous_bus;

void on_signal(int number, siginfo_t *info, void *context) {
    if (running) {
        Fibre &f = *running;
        Group *g = f.block->group;
        char text[256];
        std::snprintf(text, sizeof text, "%s: access to %p, which is no memory of the device", name_of(f).c_str(), info->si_addr);
        g->failed = true;
        g->bad_address = true;
        g->report = text;
        siglongjmp(escape, 1);
    }
    struct sigaction &previous = number == SIGSEGV ? previous_segv : previous_bus;
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(number, info, context);
    } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
        previous.sa_handler(number);
    } else {
        signal(number, SIG_DFL);
    }
}

// ---- grids ----

/// A grid whose blocks are handed out to two threads of the system.
struct Grid {
    const Launch *launch;
    uint64_t seed, blocks, stride, offset;
    std::atomic<uint64_t> next{0};
    std::atomic<bool> failed{false};
    std::mutex mutex;
    std::condition_variable ended;
    unsigned helpers = 0;
    bool bad_address = false;
    std::string report;

    void work() {
        for (;;) {
            uint64_t n = next.fetch_add(1);
            if (n >= blocks || failed) return;
            // Some order of all blocks.
            uint64_t block = (n * stride + offset) % blocks;
            Group g;
            run_blocks(*launch, seed ^ (block + 1) * 0xd6e8feb86659fd93ull, block, 1, g);
            if (g.failed) {
                std::lock_guard lock(mutex);
                if (!failed.exchange(true)) report = g.report, bad_address = g.bad_address;
            }
        }
    }
};

/// One more thread that takes blocks of whichever grid was offered last.
struct Helper {
    std::mutex mutex;
    std::condition_variable offered;
    std::deque<Grid *> grids;
    bool started = false;

    void offer(Grid *grid) {
        std::lock_guard lock(mutex);
        if (!started) {
            started = true;
            std::thread([this] { help(); }).detach();
        }
        grids.push_back(grid);
        offered.notify_one();
    }

    /// Takes an offer back, and waits for those who have taken it up.
    void withdraw(Grid *grid) {
        {
            std::lock_guard lock(mutex);
            grids.erase(std::remove(grids.begin(), grids.end(), grid), grids.end());
        }
        std::unique_lock lock(grid->mutex);
        grid->ended.wait(lock, [grid] { return grid->helpers == 0; });
    }

    void help() {
        for (;;) {
            Grid *grid;
            {
                std::unique_lock lock(mutex);
                offered.wait(lock, [this] { return !grids.empty(); });
                grid = grids.front();
                grids.pop_front();
                std::lock_guard count(grid->mutex);
                grid->helpers++;
            }
            grid->work();
            std::lock_guard lock(grid->mutex);
            grid->helpers--;
            grid->ended.notify_all();
        }
    }
};

Helper &helper() {
    // Never destroyed: its thread runs until the process ends.
    static Helper *one = new Helper;
    return *one;
}

uint64_t common_divisor(uint64_t a, uint64_t b) { return b == 0 ? a : common_divisor(b, a % b); }

} // namespace

void install_handler() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action{};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigemptyset(&action.sa_mask);
        sigaction(SIGSEGV, &action, &previous_segv);
        sigaction(SIGBUS, &action, &previous_bus);
    });
}

Outcome run(const Launch &launch, uint64_t seed, std::string &report) {
    uint64_t blocks = (uint64_t)launch.grid.x * launch.grid.y * launch.grid.z;
    std::string why;
    bool bad_address;
    if (launch.cooperative) {
        Group g;
        run_blocks(launch, seed, 0, (unsigned)blocks, g);
        why = g.report, bad_address = g.bad_address;
    } else {
        Random random{seed};
        Grid grid;
        grid.launch = &launch, grid.seed = seed, grid.blocks = blocks;
        grid.offset = random.next() % blocks;
        grid.stride = 1 + random.next() % blocks;
        while (common_divisor(grid.stride, blocks) != 1) grid.stride++;
        // A number times the stride must not overflow.
        if (blocks > 1ull << 31) grid.stride = 1;
        bool shared_out = blocks >= 4;
        if (shared_out) helper().offer(&grid);
        grid.work();
        if (shared_out) helper().withdraw(&grid);
        why = grid.report, bad_address = grid.bad_address;
    }
    if (why.empty()) return Outcome::Done;
    report = std::string("kernel `") + launch.kernel->name + "` of " + launch.kernel->file + ": " + why;
    if (bad_address) return Outcome::BadAddress;
    return why.compare(0, 8, "deadlock") == 0 || why.find("takes more than") != std::string::npos ? Outcome::TookTooLong : Outcome::Failed;
}

// ---- what kernels call ----

void *shared_variable(size_t bytes, size_t alignment, Site site) {
    Fibre &f = current();
    Block &b = *f.block;
    for (const Variable &v : b.known)
        if (v.site.line == site.line && v.site.file == site.file) return b.variables + v.at;
    size_t at = (b.variable_bytes + alignment - 1) / alignment * alignment;
    if (at + bytes > VARIABLE_ROOM || at + bytes + b.dynamic_bytes > SHARED_OPTIN) give_up("too much shared memory");
    b.variable_bytes = at + bytes;
    b.known.push_back({site, at, bytes});
    std::memset(b.variables + at, b.group->random.below(2) ? 0xff : 0xa5, bytes);
    return b.variables + at;
}

void *dynamic_shared() { return current().block->dynamic; }

namespace {

/// Comes together with the other lanes; the generation whose values are meant.
unsigned meet_lanes(bool is_exchange, const void *mine, size_t bytes, const char *what, Site site) {
    Fibre &f = current();
    Block &b = *f.block;
    Warp &w = b.warps[f.warp];
    unsigned generation = w.generation;
    if (w.arrived == 0) {
        w.is_exchange = is_exchange, w.what = what, w.site = site;
    } else if (w.is_exchange != is_exchange || (is_exchange && (w.site.line != site.line || (w.site.file != site.file && std::strcmp(w.site.file, site.file) != 0)))) {
        give_up(std::string("is in ") + what + " at " + at(site) + " while another lane of its warp is in " + w.what + " at " + at(w.site));
    }
    if (is_exchange) {
        if (w.left > 0) give_up(std::string("is in ") + what + " at " + at(site) + ", which needs all lanes, and some have ended");
        if (w.lanes != 32) give_up(std::string("is in ") + what + " at " + at(site) + " in a warp that is not whole");
        std::memcpy(w.values[generation & 1][f.lane], mine, bytes);
    }
    w.arrived++;
    if (w.arrived + w.left == w.lanes) {
        release_warp(b, f.warp);
        pause();
    } else {
        sleep(Waits::Warp, what, site);
    }
    return generation;
}

} // namespace

const unsigned char *exchange(const void *mine, size_t bytes, const char *what, Site site) {
    Warp &w = current().block->warps[current().warp];
    unsigned generation = meet_lanes(true, mine, bytes, what, site);
    return w.values[generation & 1][0];
}

void meet_warp(Site site) { meet_lanes(false, nullptr, 0, "meet_warp", site); }

bool any_of_block(bool x, Site site) {
    Fibre &f = current();
    Block &b = *f.block;
    unsigned generation = b.barrier_generation;
    // What is asked now is kept until the generation after the next begins.
    if (x) b.any[generation & 1] = true;
    b.at_barrier++;
    if (b.at_barrier == b.live) {
        release_block_barrier(b);
        pause();
    } else {
        sleep(Waits::Barrier, "meet_block", site);
    }
    return b.any[generation & 1];
}

void meet_block(Site site) { any_of_block(false, site); }

void meet_threads(int id, int threads, Site site) {
    Fibre &f = current();
    Block &b = *f.block;
    Warp &w = b.warps[f.warp];
    Named &n = b.named[id];
    if (n.threads == 0) n.threads = (unsigned)threads;
    if (n.threads != (unsigned)threads) give_up("meets other threads at " + at(site) + " than those who wait at that barrier");
    f.value = (unsigned)id;
    f.waits = Waits::Named, f.what = "meet_threads", f.site = site;
    if (w.at_named > 0 && w.named != (unsigned)id) give_up("lanes of a warp are at different barriers at " + at(site));
    w.named = (unsigned)id;
    w.at_named++;
    if (w.at_named + w.left == w.lanes) warp_at_named(b, f.warp, (unsigned)id);
    switch_to(f.context, b.group->scheduler);
}

void arrive_threads(int id, int threads, Site site) {
    // The barrier counts warps.
    meet_lanes(false, nullptr, 0, "arrive_threads", site);
    Fibre &f = current();
    Block &b = *f.block;
    Named &n = b.named[id];
    if (n.threads == 0) n.threads = (unsigned)threads;
    if (n.threads != (unsigned)threads) give_up("meets other threads at " + at(site) + " than those who wait at that barrier");
    if constexpr (LOOKS_FOR_RACES) b.races.release(f.thread, n.before);
    n.arrived++;
    settle_named(b, (unsigned)id);
    pause();
}

void barrier_init(unsigned long long *barrier, unsigned count, Site site) {
    Block &b = *current().block;
    if (!in_shared(b, barrier, 8) || (uintptr_t)barrier % 8) give_up("a barrier outside shared memory at " + at(site));
    if (count == 0 || count > 0xfffff) give_up("a barrier of " + std::to_string(count) + " arrivals at " + at(site));
    *barrier = pack(Word{false, count, count, 0});
    if (!is_known(b, barrier)) b.barriers.push_back(barrier);
}

static Word valid(Block &b, unsigned long long *barrier, const char *what, Site site) {
    if (!is_known(b, barrier) || !(*barrier & VALID)) give_up(std::string(what) + " at " + at(site) + ": the barrier is not initialised");
    return unpack(*barrier);
}

void barrier_arrive(unsigned long long *barrier, unsigned expected_bytes, Site site) {
    Block &b = *current().block;
    Word w = valid(b, barrier, "arrival", site);
    if (w.pending == 0) give_up("arrival at " + at(site) + ": more of them than the barrier counts");
    if constexpr (LOOKS_FOR_RACES) b.races.release(current().thread, b.arrived[number_of(b, barrier)]);
    w.bytes += (int)expected_bytes;
    if (w.bytes >= 1 << 20) give_up("arrival at " + at(site) + ": more bytes than a barrier can count");
    w.pending--;
    settle(b, barrier, w);
    pause();
}

void barrier_wait(unsigned long long *barrier, unsigned parity, Site site) {
    Fibre &f = current();
    Block &b = *f.block;
    for (;;) {
        Word w = valid(b, barrier, "wait", site);
        if (w.odd != (parity != 0)) break;
        f.address = barrier, f.value = parity;
        sleep(Waits::Bytes, "barrier_wait", site);
    }
    if constexpr (LOOKS_FOR_RACES) b.races.acquire(f.thread, b.complete[number_of(b, barrier)]);
    pause();
}

void bulk_copy(void *to, const void *from, unsigned bytes, unsigned long long *barrier, Site site) {
    Fibre &f = current();
    Block &b = *f.block;
    valid(b, barrier, "bulk copy", site);
    if (((uintptr_t)to | (uintptr_t)from | bytes) % 16 != 0) give_up("bulk copy at " + at(site) + ": not in units of 16 bytes");
    if (bytes == 0 || !in_shared(b, to, bytes)) give_up("bulk copy at " + at(site) + ": not to shared memory");
    unsigned run = 0;
    uint32_t place = 0;
    if constexpr (LOOKS_FOR_RACES) {
        run = b.races.of_barrier(number_of(b, barrier));
        place = b.races.copy_starts(f.thread, run, to, bytes, site);
    }
    start_copy(Copy{&b, &f, (unsigned char *)to, (const unsigned char *)from, bytes, 0, barrier, site, false, run, place});
    pause();
}

void thread_copy(void *to, const void *from, unsigned bytes, Site site) {
    Fibre &f = current();
    Block &b = *f.block;
    if (((uintptr_t)to | (uintptr_t)from) % bytes != 0) give_up("copy at " + at(site) + ": not aligned");
    if (!in_shared(b, to, bytes)) give_up("copy at " + at(site) + ": not to shared memory");
    f.copies.push_back(b.group->copies.size());
    uint32_t place = 0;
    if constexpr (LOOKS_FOR_RACES) place = b.races.copy_starts(f.thread, f.thread, to, bytes, site);
    start_copy(Copy{&b, &f, (unsigned char *)to, (const unsigned char *)from, bytes, f.group, nullptr, site, false, f.thread, place});
}

void end_copies() { current().group++; }

void await_copies(unsigned recent_groups, bool open_group_too) {
    Fibre &f = current();
    Group &g = *f.block->group;
    if (open_group_too) end_copies();
    // The groups that have ended are 0 … group - 1.
    unsigned wanted = f.group > recent_groups ? f.group - recent_groups : 0;
    for (size_t number : f.copies) {
        Copy &c = g.copies[number];
        if (!c.done && c.group < wanted) carry_out(g, number, true);
        if constexpr (LOOKS_FOR_RACES)
            if (c.group < wanted) f.block->races.copy_is_awaited(f.thread, f.thread, c.place);
    }
    f.copies.erase(std::remove_if(f.copies.begin(), f.copies.end(), [&](size_t number) { return g.copies[number].group < wanted; }), f.copies.end());
    pause();
}

void counter_changed(const void *) {
    Group &g = *current().block->group;
    if (!g.at_counters.empty()) look_at_counters(g);
}

void await_at_least(const unsigned *counter, unsigned least, Site site) {
    Fibre &f = current();
    if (__atomic_load_n(counter, __ATOMIC_SEQ_CST) >= least) {
        pause();
        return;
    }
    f.address = counter, f.value = least, f.equal = false;
    f.block->group->at_counters.push_back(&f);
    sleep(Waits::Counter, "await_at_least", site);
}

void word_changed() {
    Group &g = *current().block->group;
    // Those who wait see it at some time, at the latest when nobody else can go on.
    if (!g.at_counters.empty() && g.random.below(256) == 0) look_at_counters(g);
    pause();
}

unsigned await_word(const unsigned long long *word, unsigned number, Site site) {
    Fibre &f = current();
    unsigned long long now = __atomic_load_n(word, __ATOMIC_SEQ_CST);
    if ((unsigned)(now >> 32) != number) {
        // The number is the upper half, which stands second in memory.
        f.address = reinterpret_cast<const unsigned *>(word) + 1, f.value = number, f.equal = true;
        f.block->group->at_counters.push_back(&f);
        sleep(Waits::Counter, "await_word", site);
        now = __atomic_load_n(word, __ATOMIC_SEQ_CST);
        // Whoever waits for a word must get it before another writes there again.
        if ((unsigned)(now >> 32) != number) give_up("await_word at " + at(site) + ": the word was written again");
    } else {
        pause();
    }
    return (unsigned)now;
}

unsigned long long cycles() { return current().block->group->clock; }

unsigned long long nanoseconds() {
    auto now = std::chrono::steady_clock::now().time_since_epoch();
    return (unsigned long long)std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

} // namespace emulator

#ifdef HOIST_RACES
// What `-fsanitize=thread` calls at every access. The runtime that belongs to it is not linked: these are in its place.

namespace {

inline void note(const void *at, size_t bytes, emulator::Access kind, const void *code) {
    emulator::Fibre *f = emulator::running;
    if (f) f->block->races.access(f->thread, at, bytes, kind, code);
}

} // namespace

using emulator::Access;
#define CODE __builtin_return_address(0)

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void __tsan_read_range(void *at, size_t bytes) { note(at, bytes, Access::Read, CODE); }
void __tsan_write_range(void *at, size_t bytes) { note(at, bytes, Access::Write, CODE); }
#define HOOKS(N)                                                                                                       \
    void __tsan_read##N(void *at) { note(at, N, Access::Read, CODE); }                                                 \
    void __tsan_write##N(void *at) { note(at, N, Access::Write, CODE); }                                               \
    void __tsan_unaligned_read##N(void *at) { note(at, N, Access::Read, CODE); }                                       \
    void __tsan_unaligned_write##N(void *at) { note(at, N, Access::Write, CODE); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
#define ATOMICS(BITS, T)                                                                                               \
    T __tsan_atomic##BITS##_load(const volatile T *a, int) {                                                           \
        note((const void *)a, sizeof *a, Access::Atomic, CODE);                                                        \
        return __atomic_load_n(a, __ATOMIC_SEQ_CST);                                                                   \
    }                                                                                                                  \
    void __tsan_atomic##BITS##_store(volatile T *a, T x, int) {                                                        \
        note((const void *)a, sizeof *a, Access::Atomic, CODE);                                                        \
        __atomic_store_n(a, x, __ATOMIC_SEQ_CST);                                                                      \
    }                                                                                                                  \
    T __tsan_atomic##BITS##_exchange(volatile T *a, T x, int) {                                                        \
        note((const void *)a, sizeof *a, Access::Atomic, CODE);                                                        \
        return __atomic_exchange_n(a, x, __ATOMIC_SEQ_CST);                                                            \
    }                                                                                                                  \
    T __tsan_atomic##BITS##_fetch_add(volatile T *a, T x, int) {                                                       \
        note((const void *)a, sizeof *a, Access::Atomic, CODE);                                                        \
        return __atomic_fetch_add(a, x, __ATOMIC_SEQ_CST);                                                             \
    }                                                                                                                  \
    int __tsan_atomic##BITS##_compare_exchange_strong(volatile T *a, T *expected, T x, int, int) {                     \
        note((const void *)a, sizeof *a, Access::Atomic, CODE);                                                        \
        return __atomic_compare_exchange_n(a, expected, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                 \
    }
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)
void __tsan_atomic_thread_fence(int) {}
}
#endif
