/* The minimal backend with one misbehaviour, chosen by the environment variable HOIST_FAULT: what tests of the host, and of
 * the conformance suite, are tried with. Unset, it behaves. Build, from this folder:
 *
 *   cc -std=c11 -O2 -fPIC -shared -fvisibility=hidden -I../../../include faulty.c -o libfaulty.so
 *
 *   HOIST_FAULT               what happens
 *   constructor-abort         the constructor aborts
 *   constructor-hang          ... never returns
 *   constructor-exit          ... ends the process with 0
 *   constructor-flush         ... sets flush-to-zero for the thread
 *   constructor-print         ... writes to stdout
 *   constructor-fork          ... leaves a process behind for half a minute
 *   open-null                 the entry returns OK and no table
 *   open-status               the entry returns an undocumented status
 *   size-zero, -short, -huge  struct_size of the table is 0, too short for the profile, or huge
 *   null:ENTRY                that function is NULL
 *   abort:ENTRY               that function aborts
 *   segfault:ENTRY            ... writes to address 8
 *   overflow:ENTRY            ... recurses until the stack ends
 *   hang:ENTRY                ... never returns
 *   exit:ENTRY                ... ends the process with 0
 *   status:ENTRY              ... returns an undocumented status
 *   lost:ENTRY                ... returns DEVICE_LOST
 *   message:ENTRY             ... fails, and its message does not end
 *   terminal:ENTRY            ... fails, and its message would clear the screen
 *   flush:ENTRY               ... sets flush-to-zero for the thread, and works
 *   print:ENTRY               ... writes to stdout, and works
 *   leak:ENTRY                ... leaks memory, and works
 *   descriptor:ENTRY          ... leaks a file descriptor, and works
 *   zero:ENTRY                ... works and then hands out handle 0 (device_open, load_begin, load_commit)
 *   devices-none, -huge       there are no devices, or 4 billion
 *   strings                   the device's name does not end
 *   strings-terminal          ... would clear the screen
 *   caps-numerics             an unknown class of numerics
 *   caps-alignment            an alignment that is no power of two
 *   caps-operations           claims operations that it has no function for
 *   ignores-offset            uploads go to the start of the tensor
 *   wrong-tensor              uploads go to the tensor before
 *   drops-last                the last byte of every chunk is lost
 *   accepts-overlap           chunks may overlap
 *   writes-input              uploads write to the caller's bytes
 *   commits-incomplete        load_commit does not look for missing bytes
 *   receipt-tensors           load_commit vouches for one tensor less
 *   readback-wrong            the first byte that is read back is wrong
 *   readback-overrun          one byte too many is read back
 *   memory-lies               memory_info says that nothing is resident
 *
 * Compile-time: -DFAULT_UNRESOLVED calls a function that nobody has; -DRECORD exports the addresses that upload and
 * readback were given last; -DRANGE_EMPTY, -DMAJOR=n, -DNO_HEADER and -DHEADER_UNTERMINATED change the header;
 * -DMAX_ROW_BYTES=n is a limit of a row; -DMINOR_1 is the plugin as an author's older header would have made it. */
#define _POSIX_C_SOURCE 200809L
#include <fcntl.h>
#include <stddef.h>
#include <unistd.h>
#ifdef __x86_64__
#include <xmmintrin.h>
#endif

#define hoist_plugin_open_v1 minimal_open
#define HOIST_PLUGIN_HEADER_V1 minimal_header
#include "../c-minimal/minimal.c"
#undef hoist_plugin_open_v1
#undef HOIST_PLUGIN_HEADER_V1

#ifndef MAJOR
#define MAJOR HOIST_ABI_MAJOR
#endif
#ifdef MINOR_1
#define MINOR_MAX 1
#define CAPS_BYTES offsetof(hoist_caps, max_row_bytes)
#else
#define MINOR_MAX HOIST_ABI_MINOR_MAX
#define CAPS_BYTES sizeof(hoist_caps)
#endif
#ifndef MAX_ROW_BYTES
#define MAX_ROW_BYTES 0
#endif
#ifdef RANGE_EMPTY
#define MINOR_MIN (HOIST_ABI_MINOR_MAX + 1)
#else
#define MINOR_MIN HOIST_ABI_MINOR_MIN
#endif

#ifndef NO_HEADER
HOIST_PLUGIN_EXPORT const hoist_plugin_header_v1 HOIST_PLUGIN_HEADER_V1 = {
    .magic = {'H', 'O', 'I', 'S', 'T', ' ', 'P', 'L', 'U', 'G', 'I', 'N', ' ', 'V', '1', '\n'},
    .header_size = HOIST_HEADER_SIZE,
    .abi_major = MAJOR,
    .abi_minor_min = MINOR_MIN,
    .abi_minor_max = MINOR_MAX,
    .flags = HOIST_FLAG_PANIC_ABORT,
    .pointer_width = HOIST_POINTER_WIDTH,
    .target = "x86_64-unknown-linux-gnu",
    .name = "faulty",
#ifdef HEADER_UNTERMINATED
    .vendor = {[0 ... 63] = 'x'},
#else
    .vendor = "Hoist",
#endif
    .version = "0.1.0",
};
#endif

#ifdef RECORD
HOIST_PLUGIN_EXPORT const void *hoist_recorded[2];
#define RECORD_ADDRESS(i, p) (hoist_recorded[i] = (p))
#else
#define RECORD_ADDRESS(i, p) ((void)(p))
#endif

#ifdef FAULT_UNRESOLVED
extern void hoist_function_that_nobody_has(void);
#endif

static int is_fault(const char *name) {
    const char *fault = getenv("HOIST_FAULT");
    return fault != NULL && strcmp(fault, name) == 0;
}

/* Whether the fault is `kind`:`entry`. */
static int is_fault_of(const char *kind, const char *entry) {
    const char *fault = getenv("HOIST_FAULT");
    size_t len = strlen(kind);
    return fault != NULL && strncmp(fault, kind, len) == 0 && fault[len] == ':' && strcmp(fault + len + 1, entry) == 0;
}

static void hang(void) {
    for (;;) pause();
}

static void flush_to_zero(void) {
#ifdef __x86_64__
    _mm_setcsr(_mm_getcsr() | 0x8040);
#endif
}

static volatile int depth;
static volatile uintptr_t low_address = 8;

static int (*volatile again)(int);

static int overflow(int n) {
    volatile char frame[4096];
    frame[n & 4095] = (char)n;
    depth = n;
    return again(n + 1) + frame[(n * 7) & 4095];
}

__attribute__((constructor)) static void constructor(void) {
    if (is_fault("constructor-abort")) abort();
    if (is_fault("constructor-hang")) hang();
    if (is_fault("constructor-exit")) exit(0);
    if (is_fault("constructor-flush")) flush_to_zero();
    if (is_fault("constructor-fork") && fork() == 0) {
        sleep(30);
        _exit(0);
    }
    if (is_fault("constructor-print")) {
        printf("hello from a constructor\n");
        fflush(stdout);
    }
#ifdef FAULT_UNRESOLVED
    hoist_function_that_nobody_has();
#endif
}

/* What is done before a function of that name works; not OK: it does not work. */
static hoist_status misbehave(const char *entry, hoist_error *error) {
    if (is_fault_of("abort", entry)) abort();
    if (is_fault_of("segfault", entry)) *(volatile int *)low_address = 0;
    if (is_fault_of("overflow", entry)) again = overflow, overflow(0);
    if (is_fault_of("hang", entry)) hang();
    if (is_fault_of("exit", entry)) exit(0);
    if (is_fault_of("status", entry)) return -999;
    if (is_fault_of("lost", entry)) return hoist_fail(error, HOIST_STATUS_DEVICE_LOST, "the device fell off");
    if (is_fault_of("message", entry)) {
        hoist_fail(error, HOIST_STATUS_INTERNAL, "x");
        if (error != NULL) memset(error->message, 'x', sizeof error->message);
        return HOIST_STATUS_INTERNAL;
    }
    if (is_fault_of("terminal", entry)) return hoist_fail(error, HOIST_STATUS_INTERNAL, "\033[2J\r\nerror: none\007");
    if (is_fault_of("flush", entry)) flush_to_zero();
    if (is_fault_of("print", entry)) {
        printf("hello from %s\n", entry);
        fflush(stdout);
    }
    if (is_fault_of("leak", entry)) memset(malloc(1 << 20), 1, 1 << 20);
    if (is_fault_of("descriptor", entry) && open("/dev/null", O_RDONLY) < 0) abort();
    return HOIST_STATUS_OK;
}

#define MISBEHAVE(ENTRY)                                                                                               \
    do {                                                                                                               \
        hoist_status status = misbehave(#ENTRY, error);                                                                \
        if (status != HOIST_STATUS_OK) return status;                                                                  \
    } while (0)
/* A function that misbehaves and otherwise does what the minimal backend does. */
#define WRAP(ENTRY, PARAMETERS, ARGUMENTS)                                                                             \
    static hoist_status faulty_##ENTRY PARAMETERS {                                                                    \
        MISBEHAVE(ENTRY);                                                                                              \
        return ENTRY ARGUMENTS;                                                                                        \
    }

WRAP(plan_check, (hoist_handle d, const hoist_plan *p, hoist_plan_report *r, hoist_error *error), (d, p, r, error))
WRAP(load_abort, (hoist_handle load, hoist_error *error), (load, error))
WRAP(model_destroy, (hoist_handle model, hoist_error *error), (model, error))
WRAP(device_close, (hoist_handle d, hoist_error *error), (d, error))

static hoist_status faulty_shutdown(hoist_error *error) {
    MISBEHAVE(shutdown);
    return shutdown(error);
}

static hoist_status faulty_device_count(uint32_t *count, hoist_error *error) {
    MISBEHAVE(device_count);
    hoist_status status = device_count(count, error);
    if (is_fault("devices-none")) *count = 0;
    if (is_fault("devices-huge")) *count = UINT32_MAX;
    return status;
}

static hoist_status faulty_device_info(uint32_t ordinal, hoist_device_info *info, hoist_error *error) {
    MISBEHAVE(device_info);
    hoist_status status = device_info(ordinal, info, error);
    if (is_fault("strings-terminal")) snprintf((char *)info->name, sizeof info->name, "\033[2Ja\nb");
    if (is_fault("strings")) memset(info->name, 'x', sizeof info->name);
    return status;
}

static hoist_status faulty_device_open(uint32_t ordinal, const hoist_open_options *options, hoist_handle *device,
                                       hoist_error *error) {
    MISBEHAVE(device_open);
    hoist_status status = device_open(ordinal, options, device, error);
    if (is_fault_of("zero", "device_open")) *device = 0;
    return status;
}

static hoist_status faulty_caps(hoist_handle device, hoist_caps *out, hoist_error *error) {
    MISBEHAVE(caps);
    hoist_caps own = {.struct_size = sizeof own};
    hoist_status status = caps(device, &own, error);
    own.max_row_bytes = MAX_ROW_BYTES;
    if (status == HOIST_STATUS_OK) hoist_put(out, &own, CAPS_BYTES);
    if (is_fault("caps-numerics")) out->numerics = 7;
    if (is_fault("caps-alignment")) out->weight_alignment = 3;
    if (is_fault("caps-operations")) out->ops = 1;
    return status;
}

static hoist_status faulty_memory_info(hoist_handle device, hoist_device_memory *out, hoist_error *error) {
    MISBEHAVE(memory_info);
    hoist_status status = memory_info(device, out, error);
    if (is_fault("memory-lies")) memset(out->resident, 0, sizeof out->resident);
    return status;
}

static hoist_status faulty_load_begin(hoist_handle device, const hoist_plan *plan, hoist_handle *load,
                                      hoist_error *error) {
    MISBEHAVE(load_begin);
    hoist_status status = load_begin(device, plan, load, error);
    if (is_fault_of("zero", "load_begin")) *load = 0;
    return status;
}

static hoist_status faulty_upload(hoist_handle load, const hoist_chunk *chunk, hoist_error *error) {
    MISBEHAVE(upload);
    hoist_chunk c;
    device *d = hoist_handles_find(&handles, LOAD, load, 0);
    RECORD_ADDRESS(0, chunk->data);
    hoist_take(&c, sizeof c, chunk);
    if (d != NULL && c.tensor < d->count) {
        weight *w = &d->weights[c.tensor];
        if (is_fault("accepts-overlap")) hoist_ranges_free(&w->arrived);
        if (is_fault("ignores-offset") && c.offset != 0) {
            hoist_ranges_add(&w->arrived, c.offset, c.offset + c.len);
            memcpy(w->bytes, c.data, c.len);
            return HOIST_STATUS_OK;
        }
        if (is_fault("wrong-tensor") && c.tensor > 0 && is_range(d, c.tensor - 1, c.offset, c.len)) {
            hoist_ranges_add(&w->arrived, c.offset, c.offset + c.len);
            memcpy(d->weights[c.tensor - 1].bytes + c.offset, c.data, c.len);
            return HOIST_STATUS_OK;
        }
    }
    hoist_status status = upload(load, &c, error);
    if (status == HOIST_STATUS_OK && is_fault("drops-last")) d->weights[c.tensor].bytes[c.offset + c.len - 1] ^= 0x5A;
    if (is_fault("writes-input")) ((volatile uint8_t *)(uintptr_t)c.data)[0] ^= 1;
    return status;
}

static hoist_status faulty_load_commit(hoist_handle load, hoist_handle *model, hoist_load_receipt *receipt,
                                       hoist_error *error) {
    MISBEHAVE(load_commit);
    device *d = hoist_handles_find(&handles, LOAD, load, 0);
    if (d != NULL && is_fault("commits-incomplete")) {
        for (uint32_t i = 0; i < d->count; i++) {
            hoist_ranges_free(&d->weights[i].arrived);
            hoist_ranges_add(&d->weights[i].arrived, 0, d->weights[i].nbytes);
        }
    }
    hoist_status status = load_commit(load, model, receipt, error);
    if (is_fault("receipt-tensors") && receipt != NULL) receipt->tensors--;
    if (is_fault_of("zero", "load_commit")) *model = 0;
    return status;
}

static hoist_status faulty_readback(hoist_handle model, uint32_t tensor, uint64_t offset, uint8_t *out, uint64_t len,
                                    hoist_error *error) {
    MISBEHAVE(readback);
    RECORD_ADDRESS(1, out);
    hoist_status status = readback(model, tensor, offset, out, len, error);
    if (status == HOIST_STATUS_OK && is_fault("readback-wrong")) out[0] ^= 1;
    if (status == HOIST_STATUS_OK && is_fault("readback-overrun")) out[len] = 1;
    return status;
}

static hoist_plugin table;

HOIST_PLUGIN_EXPORT hoist_status hoist_plugin_open_v1(const hoist_host *host, uint32_t minor,
                                                      const hoist_plugin **plugin, hoist_error *error) {
    MISBEHAVE(open);
    if (is_fault("open-null")) return HOIST_STATUS_OK;
    if (is_fault("open-status")) return -999;
    hoist_status status = minimal_open(host, minor, plugin, error);
    table.struct_size = sizeof table;
#define ENTRY(NAME) table.NAME = is_fault_of("null", #NAME) ? NULL : faulty_##NAME
    ENTRY(device_count), ENTRY(device_info), ENTRY(device_open), ENTRY(caps), ENTRY(memory_info), ENTRY(plan_check),
        ENTRY(load_begin), ENTRY(upload), ENTRY(load_commit), ENTRY(load_abort), ENTRY(readback), ENTRY(model_destroy),
        ENTRY(device_close), ENTRY(shutdown);
    if (is_fault("size-zero")) table.struct_size = 0;
    if (is_fault("size-short")) table.struct_size = 64;
    if (is_fault("size-huge")) table.struct_size = UINT32_MAX;
    if (status == HOIST_STATUS_OK) *plugin = &table;
    return status;
}
