// Happened-before of the accesses to a block's shared memory, with vector clocks: the last write of each byte, and the reads
// and atomics since, against what the thread at hand is known to come after.

#include "races.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace emulator {

namespace {

constexpr uint32_t NOBODY = ~0u;
/// Distinct pairs of places that are kept.
constexpr size_t MOST_FOUND = 32;

void raise(std::vector<uint32_t> &to, const std::vector<uint32_t> &from) {
    if (to.size() < from.size()) to.resize(from.size());
    for (size_t i = 0; i < from.size(); i++) to[i] = std::max(to[i], from[i]);
}

const char *name_of(Access kind) {
    switch (kind) {
    case Access::Read: return "read";
    case Access::Write: return "write";
    case Access::Atomic: return "atomic";
    default: return "copy";
    }
}

std::string at(Site site) {
    const char *slash = std::strrchr(site.file, '/');
    return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

/// File and line of an instruction, with those it was inlined into, as binutils' addr2line has them.
std::string line_of(const void *code) {
    Dl_info info;
    if (!dladdr(code, &info) || !info.dli_fname) return "?";
    char command[4200];
    size_t offset = (size_t)((const char *)code - (const char *)info.dli_fbase) - 1;
    std::snprintf(command, sizeof command, "addr2line -i -s -e '%s' 0x%zx 2>/dev/null", info.dli_fname, offset);
    std::string text;
    if (FILE *lines = popen(command, "r")) {
        char line[256];
        while (std::fgets(line, sizeof line, lines)) {
            std::string one = line;
            one.erase(std::min(one.find_last_not_of(" \n") + 1, one.find(" (")));
            // What takes an instruction's place is not worth a word.
            if (one.rfind("emulated.h", 0) == 0) continue;
            text += (text.empty() ? "" : " < ") + one;
        }
        pclose(lines);
    }
    std::snprintf(command, sizeof command, "+0x%zx", offset);
    return text.empty() ? command : text;
}

} // namespace

void Races::begin(unsigned char *dynamic, size_t dynamic_bytes, unsigned char *variables, size_t variable_bytes, unsigned threads) {
    count = threads;
    generation = 1;
    clocks.assign(threads, Clocks{});
    for (unsigned t = 0; t < threads; t++) {
        clocks[t].generation = generation;
        clocks[t].threads.assign(threads, 0);
        clocks[t].threads[t] = 1;
    }
    runs.clear();
    areas[0] = dynamic, areas[1] = variables;
    sizes[0] = dynamic_bytes, sizes[1] = variable_bytes;
    const Byte untouched = {{0, NOBODY, 0, 0, Access::Write}, {0, NOBODY, 0, 0, nullptr}, {0, NOBODY, 0, 0, nullptr}};
    for (int i = 0; i < 2; i++) bytes[i].assign(sizes[i], untouched);
    tables_used = 0;
    for (auto &table : tables) table.resize(threads);
    found.clear();
}

uint32_t Races::place_of(const void *code, Site site) {
    uint32_t next = (uint32_t)places.size();
    uint32_t place = code ? known.try_emplace(code, next).first->second
                          : known_sites.try_emplace({site.file, site.line}, next).first->second;
    if (place == next) places.push_back({code, site});
    return place;
}

uint32_t *Races::new_table() {
    if (tables_used == tables.size()) tables.emplace_back(count);
    uint32_t *table = tables[tables_used++].data();
    std::fill(table, table + count, 0);
    return table;
}

Races::Byte *Races::byte_at(const void *at, size_t &left) {
    auto p = static_cast<const unsigned char *>(at);
    for (int i = 0; i < 2; i++)
        if (p >= areas[i] && p < areas[i] + sizes[i]) {
            left = sizes[i] - (size_t)(p - areas[i]);
            return bytes[i].data() + (p - areas[i]);
        }
    return nullptr;
}

bool Races::is_before(const Last &last, const Clocks &now) const {
    if (last.who == NOBODY) return true;
    if (last.who < count) return last.generation != generation || now.threads[last.who] >= last.clock;
    unsigned run = last.who - count;
    return run < now.copies.size() && now.copies[run] >= last.clock;
}

unsigned Races::not_before(const Some &some, const Clocks &now) const {
    if (some.generation != generation || some.who == NOBODY) return count;
    if (!some.table) return now.threads[some.who] >= some.clock ? count : some.who;
    for (unsigned t = 0; t < count; t++)
        if (some.table[t] > now.threads[t]) return t;
    return count;
}

void Races::add(Some &some, unsigned thread, uint32_t place) {
    const Clocks &now = clocks[thread];
    uint32_t clock = now.threads[thread];
    bool is_empty = some.generation != generation || some.who == NOBODY;
    if (!is_empty && some.table) {
        some.table[thread] = clock;
    } else if (is_empty || now.threads[some.who] >= some.clock) {
        some = {generation, thread, clock, place, nullptr};
    } else {
        uint32_t *table = new_table();
        table[some.who] = some.clock, table[thread] = clock;
        some.table = table;
    }
    some.place = place;
}

void Races::found_one(const Byte *byte, uint32_t place, Access kind, unsigned who, uint32_t first, Access first_kind, unsigned first_who) {
    for (Race &race : found)
        if (race.first == first && race.second == place && race.kinds[0] == first_kind && race.kinds[1] == kind) {
            race.times++;
            return;
        }
    if (found.size() == MOST_FOUND) return;
    bool is_dynamic = byte >= bytes[0].data() && byte < bytes[0].data() + bytes[0].size();
    size_t offset = (size_t)(byte - bytes[is_dynamic ? 0 : 1].data());
    found.push_back({first, place, {first_kind, kind}, {first_who, who}, offset, 1, is_dynamic});
}

void Races::access(unsigned thread, const void *at, size_t size, Access kind, const void *code) {
    size_t left = 0;
    Byte *byte = byte_at(at, left);
    if (!byte) return;
    uint32_t place = place_of(code, Site{});
    const Clocks &now = clocks[thread];
    for (Byte *end = byte + std::min(size, left); byte < end; byte++) {
        const Last &last = byte->written;
        if (!is_before(last, now)) found_one(byte, place, kind, thread, last.place, last.kind, last.who < count ? last.who : NOBODY);
        if (kind != Access::Atomic) {
            unsigned other = not_before(byte->atomic, now);
            if (other < count) found_one(byte, place, kind, thread, byte->atomic.place, Access::Atomic, other);
        }
        if (kind != Access::Read) {
            unsigned other = not_before(byte->read, now);
            if (other < count) found_one(byte, place, kind, thread, byte->read.place, Access::Read, other);
        }
        if (kind == Access::Read) {
            add(byte->read, thread, place);
        } else if (kind == Access::Atomic) {
            add(byte->atomic, thread, place);
        } else {
            byte->written = {generation, thread, now.threads[thread], place, kind};
            byte->read.who = byte->atomic.who = NOBODY;
        }
    }
}

uint32_t Races::copy_starts(unsigned thread, unsigned run, void *to, size_t size, Site site) {
    if (runs.size() <= run) runs.resize(run + 1);
    uint32_t clock = ++runs[run];
    size_t left = 0;
    Byte *byte = byte_at(to, left);
    if (!byte) return clock;
    uint32_t place = place_of(nullptr, site);
    const Clocks &now = clocks[thread];
    for (Byte *end = byte + std::min(size, left); byte < end; byte++) {
        const Last &last = byte->written;
        if (!is_before(last, now)) found_one(byte, place, Access::Copy, thread, last.place, last.kind, last.who < count ? last.who : NOBODY);
        unsigned other = not_before(byte->atomic, now);
        if (other < count) found_one(byte, place, Access::Copy, thread, byte->atomic.place, Access::Atomic, other);
        other = not_before(byte->read, now);
        if (other < count) found_one(byte, place, Access::Copy, thread, byte->read.place, Access::Read, other);
        byte->written = {generation, count + run, clock, place, Access::Copy};
        byte->read.who = byte->atomic.who = NOBODY;
    }
    return clock;
}

void Races::copy_is_done(Clocks &clocks, unsigned run, uint32_t place) {
    if (clocks.copies.size() <= run) clocks.copies.resize(run + 1);
    clocks.copies[run] = std::max(clocks.copies[run], place);
}

void Races::join(Clocks &to, const Clocks &from) {
    raise(to.copies, from.copies);
    if (from.generation != generation) return;
    if (to.generation != generation) to.threads.assign(count, 0), to.generation = generation;
    raise(to.threads, from.threads);
}

void Races::release(unsigned thread, Clocks &to) {
    join(to, clocks[thread]);
    clocks[thread].threads[thread]++;
}

void Races::acquire(unsigned thread, const Clocks &from) { join(clocks[thread], from); }

void Races::warp_meets(unsigned first, unsigned lanes) {
    Clocks all;
    for (unsigned t = first; t < first + lanes; t++) join(all, clocks[t]);
    for (unsigned t = first; t < first + lanes; t++) {
        join(clocks[t], all);
        clocks[t].threads[t]++;
    }
}

void Races::all_meet() {
    std::vector<uint32_t> copies;
    for (const Clocks &one : clocks) raise(copies, one.copies);
    generation++;
    tables_used = 0;
    for (unsigned t = 0; t < count; t++) {
        Clocks &one = clocks[t];
        one.generation = generation;
        std::fill(one.threads.begin(), one.threads.end(), 0);
        one.threads[t] = 1;
        one.copies = copies;
    }
}

std::string Races::report() const {
    std::string text = std::to_string(found.size()) + (found.size() == MOST_FOUND ? " or more" : "") + " races of shared memory";
    auto where = [this](uint32_t place) { return places[place].code ? line_of(places[place].code) : at(places[place].site); };
    auto who = [](unsigned thread) { return thread == NOBODY ? std::string("on its way") : "of thread " + std::to_string(thread); };
    for (const Race &race : found) {
        text += std::string("; ") + name_of(race.kinds[0]) + " " + who(race.who[0]) + " (" + where(race.first) + ") and " +
                name_of(race.kinds[1]) + " " + who(race.who[1]) + " (" + where(race.second) + "), byte " + std::to_string(race.byte) +
                (race.is_dynamic ? " of the dynamic part" : " of a variable") + ", " + std::to_string(race.times) + " times";
    }
    return text;
}

} // namespace emulator
