/* Helpers for plugins written in C11: reading and writing structs by the rule of sizes, error records, a set of byte
 * ranges, and a table of handles. Optional: the interface is hoist_plugin.h alone. Everything is static inline; include it
 * in one file of the plugin, and compile with -fvisibility=hidden, so that only the two names are exported. */
#ifndef HOIST_PLUGIN_HELPERS_H
#define HOIST_PLUGIN_HELPERS_H

#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "hoist_plugin.h"

/* ---- structs and errors ---- */

/* Reads a struct of the host's into `own` of `size` bytes: what both sides know, the rest zeros. 0 if it is not there. */
static inline int hoist_take(void *own, size_t size, const void *from) {
    uint32_t theirs = 0;
    memset(own, 0, size);
    if (from == NULL) return 0;
    memcpy(&theirs, from, sizeof theirs);
    if (theirs < 8) return 0;
    memcpy(own, from, theirs < size ? theirs : size);
    return 1;
}

/* Writes `own` of `size` bytes to a struct of the host's, no further than its struct_size, which stays. 0 if it is not
 * there. */
static inline int hoist_put(void *to, const void *own, size_t size) {
    uint32_t theirs = 0;
    if (to == NULL) return 0;
    memcpy(&theirs, to, sizeof theirs);
    if (theirs < 8) return 0;
    memcpy((char *)to + 4, (const char *)own + 4, (theirs < size ? theirs : size) - 4);
    return 1;
}

/* Fills the caller's record, about a byte of a tensor (HOIST_NO_TENSOR, HOIST_NO_OFFSET: about none), and gives `code`
 * back. */
#if defined(__GNUC__)
__attribute__((format(printf, 5, 6)))
#endif
static inline hoist_status
hoist_fail_at(hoist_error *error, hoist_status code, uint32_t tensor, uint64_t offset, const char *format, ...) {
    hoist_error own;
    va_list arguments;
    memset(&own, 0, sizeof own);
    own.code = code;
    own.tensor = tensor;
    own.byte_offset = offset;
    va_start(arguments, format);
    vsnprintf((char *)own.message, sizeof own.message, format, arguments);
    va_end(arguments);
    hoist_put(error, &own, sizeof own);
    return code;
}

/* HOIST_STATUS_OUT_OF_DEVICE_MEMORY, with the bytes that the call needs and those that are left. */
static inline hoist_status hoist_fail_memory(hoist_error *error, uint64_t needed, uint64_t available) {
    hoist_error own;
    memset(&own, 0, sizeof own);
    own.code = HOIST_STATUS_OUT_OF_DEVICE_MEMORY;
    own.tensor = HOIST_NO_TENSOR;
    own.byte_offset = HOIST_NO_OFFSET;
    own.needed = needed;
    own.available = available;
    snprintf((char *)own.message, sizeof own.message, "%llu bytes do not fit", (unsigned long long)needed);
    hoist_put(error, &own, sizeof own);
    return own.code;
}

/* `hoist_fail_at` about no tensor. */
#define hoist_fail(error, code, ...) hoist_fail_at(error, code, HOIST_NO_TENSOR, HOIST_NO_OFFSET, __VA_ARGS__)

/* In a function with an `error`: leaves it with HOIST_STATUS_`CODE` and a message unless the condition holds. */
#define HOIST_REQUIRE(CONDITION, CODE, ...)                                                                            \
    do {                                                                                                               \
        if (!(CONDITION)) return hoist_fail(error, HOIST_STATUS_##CODE, __VA_ARGS__);                                  \
    } while (0)

/* Tensor `i` of a plan, whose structs are as large as the host says. 0 if it is malformed. */
static inline int hoist_tensor_at(const hoist_plan *plan, uint64_t i, hoist_tensor *out) {
    return hoist_take(out, sizeof *out, (const char *)plan->tensors + i * plan->tensor_size) && out->id == i
        && out->class_ < 4 && out->granule != 0;
}

/* Sums a plan's bytes by class; 0 if it is malformed. */
static inline int hoist_plan_sum(const hoist_plan *plan, uint64_t bytes[4]) {
    hoist_tensor t;
    memset(bytes, 0, 4 * sizeof *bytes);
    for (uint64_t i = 0; i < plan->tensor_count; i++) {
        if (!hoist_tensor_at(plan, i, &t) || t.nbytes > UINT64_MAX / 8 - bytes[t.class_]) return 0;
        bytes[t.class_] += t.nbytes;
    }
    return plan->tensor_count < UINT32_MAX;
}

/* Whether every encoding of a plan is in `stored`, as in hoist_caps. */
static inline int hoist_plan_is_stored(const hoist_plan *plan, const uint64_t stored[4]) {
    hoist_tensor t;
    for (uint64_t i = 0; i < plan->tensor_count; i++) {
        if (!hoist_tensor_at(plan, i, &t) || t.encoding >= 256) return 0;
        if ((stored[t.encoding / 64] >> t.encoding % 64 & 1) == 0) return 0;
    }
    return 1;
}

/* What is left of `total` and of a budget (0: none), with weights of the four classes resident. */
static inline uint64_t hoist_room(uint64_t total, uint64_t budget, const uint64_t resident[4]) {
    uint64_t limit = budget != 0 && budget < total ? budget : total;
    return limit - (resident[0] + resident[1] + resident[2] + resident[3]);
}

/* Whether offset..offset + len is whole blocks, at least one, inside `nbytes`. */
static inline int hoist_is_range(uint64_t nbytes, uint64_t granule, uint64_t offset, uint64_t len) {
    return len != 0 && offset % granule == 0 && len % granule == 0 && offset <= nbytes && len <= nbytes - offset;
}

/* ---- a set of byte ranges ---- */

/* Disjoint ranges, sorted, those that touch merged. Zeros are the empty set. */
typedef struct {
    uint64_t (*ranges)[2];
    size_t count, capacity;
} hoist_ranges;

/* Adds start..end. 1: done. 0: it is empty or overlaps what is there, and nothing changed. -1: out of memory. */
static inline int hoist_ranges_add(hoist_ranges *set, uint64_t start, uint64_t end) {
    size_t low = 0, high = set->count;
    int joins_left, joins_right;
    if (start >= end) return 0;
    while (low < high) { /* the first range that ends after `start` */
        size_t middle = low + (high - low) / 2;
        if (set->ranges[middle][1] <= start) low = middle + 1;
        else high = middle;
    }
    if (low < set->count && set->ranges[low][0] < end) return 0;
    joins_left = low > 0 && set->ranges[low - 1][1] == start;
    joins_right = low < set->count && set->ranges[low][0] == end;
    if (joins_left && joins_right) {
        set->ranges[low - 1][1] = set->ranges[low][1];
        set->count--;
        memmove(set->ranges + low, set->ranges + low + 1, (set->count - low) * sizeof *set->ranges);
    } else if (joins_left) {
        set->ranges[low - 1][1] = end;
    } else if (joins_right) {
        set->ranges[low][0] = start;
    } else {
        if (set->count == set->capacity) {
            size_t capacity = set->capacity ? 2 * set->capacity : 4;
            void *ranges = realloc(set->ranges, capacity * sizeof *set->ranges);
            if (ranges == NULL) return -1;
            set->ranges = ranges;
            set->capacity = capacity;
        }
        memmove(set->ranges + low + 1, set->ranges + low, (set->count - low) * sizeof *set->ranges);
        set->ranges[low][0] = start;
        set->ranges[low][1] = end;
        set->count++;
    }
    return 1;
}

/* The first byte of 0..len that is in no range; `len` if all are. */
static inline uint64_t hoist_ranges_gap(const hoist_ranges *set, uint64_t len) {
    if (set->count == 0 || set->ranges[0][0] > 0) return 0;
    return set->ranges[0][1] < len ? set->ranges[0][1] : len;
}

/* Gives its memory back; it is empty again. */
static inline void hoist_ranges_free(hoist_ranges *set) {
    free(set->ranges);
    memset(set, 0, sizeof *set);
}

/* ---- a table of handles ---- */

#define HOIST_MAX_HANDLES 256

/* Handles of all kinds: kind (8 bits), generation (32), index (24). Zeros are the empty table. Any thread. */
typedef struct {
    atomic_flag lock;
    uint32_t open;
    struct {
        uint32_t generation;
        uint8_t kind; /* 0: free */
        void *item;
    } slots[HOIST_MAX_HANDLES];
} hoist_handles;

static inline void hoist_handles_lock(hoist_handles *table) {
    while (atomic_flag_test_and_set_explicit(&table->lock, memory_order_acquire)) {}
}

static inline void hoist_handles_unlock(hoist_handles *table) {
    atomic_flag_clear_explicit(&table->lock, memory_order_release);
}

/* A new handle of that kind (1 to 255); 0 if there are too many. */
static inline hoist_handle hoist_handles_add(hoist_handles *table, uint8_t kind, void *item) {
    hoist_handle handle = 0;
    hoist_handles_lock(table);
    for (uint32_t i = 0; i < HOIST_MAX_HANDLES && handle == 0; i++) {
        if (table->slots[i].kind != 0) continue;
        table->slots[i].kind = kind;
        table->slots[i].item = item;
        table->slots[i].generation++;
        table->open++;
        handle = (uint64_t)kind << 56 | (uint64_t)table->slots[i].generation << 24 | i;
    }
    hoist_handles_unlock(table);
    return handle;
}

/* What the handle stands for, and takes it out of the table if `remove`; NULL if it is 0, stale or of another kind. */
static inline void *hoist_handles_find(hoist_handles *table, uint8_t kind, hoist_handle handle, int remove) {
    uint32_t index = handle & 0xFFFFFF, generation = (uint32_t)(handle >> 24);
    void *item = NULL;
    hoist_handles_lock(table);
    if (index < HOIST_MAX_HANDLES && handle >> 56 == kind && table->slots[index].kind == kind
        && table->slots[index].generation == generation) {
        item = table->slots[index].item;
        if (remove) {
            table->slots[index].kind = 0;
            table->open--;
        }
    }
    hoist_handles_unlock(table);
    return item;
}

/* In a function with an `error` and static `handles`: the item of a handle, or leaves it with BAD_HANDLE. */
#define HOIST_FIND(TYPE, NAME, KIND, HANDLE)                                                                           \
    TYPE *NAME = hoist_handles_find(&handles, KIND, HANDLE, 0);                                                        \
    HOIST_REQUIRE(NAME != NULL, BAD_HANDLE, "the handle is 0, stale or of another kind")

/* ---- the header ---- */

#if UINTPTR_MAX == UINT64_MAX
#define HOIST_POINTER_WIDTH 64
#else
#define HOIST_POINTER_WIDTH 32
#endif

/* HOIST_PLUGIN(name, vendor, version, target): defines the header. */
#define HOIST_PLUGIN(NAME, VENDOR, VERSION, TARGET)                                                                    \
    HOIST_PLUGIN_EXPORT const hoist_plugin_header_v1 HOIST_PLUGIN_HEADER_V1 = {                                        \
        .magic = {'H', 'O', 'I', 'S', 'T', ' ', 'P', 'L', 'U', 'G', 'I', 'N', ' ', 'V', '1', '\n'},                    \
        .header_size = HOIST_HEADER_SIZE,                                                                              \
        .abi_major = HOIST_ABI_MAJOR,                                                                                  \
        .abi_minor_min = HOIST_ABI_MINOR_MIN,                                                                          \
        .abi_minor_max = HOIST_ABI_MINOR_MAX,                                                                          \
        .flags = HOIST_FLAG_PANIC_ABORT,                                                                               \
        .pointer_width = HOIST_POINTER_WIDTH,                                                                          \
        .target = TARGET,                                                                                              \
        .name = NAME,                                                                                                  \
        .vendor = VENDOR,                                                                                              \
        .version = VERSION,                                                                                            \
    }

#endif
