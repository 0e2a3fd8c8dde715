/* The minimal backend with the optional functions `load_from`, `cancel` and `stats`: its load asks the host nothing and waits
 * until it is cancelled, ten seconds at most. -DSTATS_BAD: `stats` is no object of strings; -DSTATS_HUGE: it is too long. */
#define _POSIX_C_SOURCE 200809L
#include <stdatomic.h>
#include <time.h>

#define hoist_plugin_open_v1 minimal_open
#include "../../examples/c-minimal/minimal.c"
#undef hoist_plugin_open_v1

static atomic_int cancelled;

static hoist_status waiting_load_from(hoist_handle load, const hoist_load_callbacks *callbacks, hoist_error *error) {
    (void)load, (void)callbacks;
    for (int i = 0; i < 10000; i++) {
        struct timespec millisecond = {.tv_nsec = 1000000};
        if (atomic_exchange(&cancelled, 0)) return hoist_fail(error, HOIST_STATUS_CANCELLED, "as asked");
        nanosleep(&millisecond, NULL);
    }
    return hoist_fail(error, HOIST_STATUS_TIMEOUT, "nobody cancelled it");
}

static hoist_status waiting_cancel(hoist_handle device, hoist_error *error) {
    (void)device, (void)error;
    atomic_store(&cancelled, 1);
    return HOIST_STATUS_OK;
}

/* An object longer than any host would guess: {"path":"xxx…"}. */
static hoist_status waiting_stats(hoist_handle device, uint8_t *out, uint64_t capacity, uint64_t *needed,
                                  hoist_error *error) {
    (void)device, (void)error;
    char text[4096];
    size_t len = 3000;
    memset(text, 'x', sizeof text);
#ifdef STATS_BAD
    memcpy(text, "{\"path\":[1],\"", 13);
#else
    memcpy(text, "{\"path\":\"", 9);
#endif
    memcpy(text + len - 2, "\"}", 2);
    *needed = len;
#ifdef STATS_HUGE
    *needed = (uint64_t)1 << 40;
#endif
    if (*needed <= capacity) memcpy(out, text, len);
    return HOIST_STATUS_OK;
}

static hoist_plugin waiting_table;

HOIST_PLUGIN_EXPORT hoist_status hoist_plugin_open_v1(const hoist_host *host, uint32_t minor,
                                                      const hoist_plugin **plugin, hoist_error *error) {
    const hoist_plugin *minimal = NULL;
    hoist_status status = minimal_open(host, minor, &minimal, error);
    if (status != HOIST_STATUS_OK) return status;
    hoist_take(&waiting_table, sizeof waiting_table, minimal);
    waiting_table.struct_size = sizeof waiting_table;
    waiting_table.load_from = waiting_load_from;
    waiting_table.cancel = waiting_cancel;
    waiting_table.stats = waiting_stats;
    *plugin = &waiting_table;
    return HOIST_STATUS_OK;
}
