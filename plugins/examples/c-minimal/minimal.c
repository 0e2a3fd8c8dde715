/* A whole backend in C, residency profile: it holds weights in host memory and gives them back. Start here, and replace
 * malloc and memcpy by what your device has. Build, from this folder:
 *   cc -std=c11 -O2 -Wall -Wextra -fPIC -shared -fvisibility=hidden -I../../../include minimal.c -o libc_minimal.so
 */
#include "hoist_plugin_helpers.h"

HOIST_PLUGIN("c-minimal", "Hoist", "0.1.0", "x86_64-unknown-linux-gnu");
enum { DEVICE = 1, LOAD, MODEL }; /* kinds of handles */
static const uint64_t TOTAL = (uint64_t)64 << 30; /* a real device would be asked */
static const hoist_caps CAPS = {.stored = {~0ull, ~0ull, ~0ull, ~0ull}, .weight_alignment = 1}; /* looks into none */

typedef struct {
    uint8_t *bytes;
    uint64_t nbytes, granule;
    hoist_ranges arrived;
} weight;
typedef struct {
    uint64_t budget, resident[4]; /* quantised, float, gamma, bias */
    weight *weights;
    uint32_t count;
    hoist_handle child; /* of the load or model; 0 if there is none */
} device;

static hoist_handles handles;

/* Back to OPEN: the load or model is gone, and so is its handle. */
static void empty(device *d) {
    hoist_handles_find(&handles, LOAD, d->child, 1);
    hoist_handles_find(&handles, MODEL, d->child, 1);
    for (uint32_t i = 0; i < d->count; i++) {
        free(d->weights[i].bytes);
        hoist_ranges_free(&d->weights[i].arrived);
    }
    free(d->weights);
    *d = (device){.budget = d->budget};
}

static hoist_status device_count(uint32_t *count, hoist_error *error) {
    HOIST_REQUIRE(count != NULL, INVALID_ARGUMENT, "count is NULL");
    *count = 1;
    return HOIST_STATUS_OK;
}

static hoist_status device_info(uint32_t ordinal, hoist_device_info *info, hoist_error *error) {
    hoist_device_info own = {.id = "c-minimal:0", .name = "host memory", .total_memory = TOTAL};
    HOIST_REQUIRE(ordinal == 0, INVALID_ARGUMENT, "device %u of 1", ordinal);
    HOIST_REQUIRE(hoist_put(info, &own, sizeof own), INVALID_ARGUMENT, "info is NULL");
    return HOIST_STATUS_OK;
}

static hoist_status device_open(uint32_t ordinal, const hoist_open_options *options, hoist_handle *out,
                                hoist_error *error) {
    hoist_open_options o;
    HOIST_REQUIRE(ordinal == 0 && out != NULL, INVALID_ARGUMENT, "device %u of 1", ordinal);
    HOIST_REQUIRE(hoist_take(&o, sizeof o, options), INVALID_ARGUMENT, "options is NULL");
    HOIST_REQUIRE(o.flags <= (HOIST_OPTION_IMPORT | HOIST_OPTION_FORCE_SCALAR), INVALID_ARGUMENT, "unknown flag");
    HOIST_REQUIRE((o.flags & HOIST_OPTION_IMPORT) == 0, UNSUPPORTED, "weights are copied, not imported");
    device *d = calloc(1, sizeof *d);
    HOIST_REQUIRE(d != NULL, OUT_OF_HOST_MEMORY, "no memory for a device");
    d->budget = o.memory_budget;
    *out = hoist_handles_add(&handles, DEVICE, d);
    if (*out == 0) free(d);
    HOIST_REQUIRE(*out != 0, OUT_OF_HOST_MEMORY, "too many devices are open");
    return HOIST_STATUS_OK;
}

static hoist_status caps(hoist_handle handle, hoist_caps *out, hoist_error *error) {
    HOIST_REQUIRE(hoist_handles_find(&handles, DEVICE, handle, 0) != NULL, BAD_HANDLE, "no device");
    HOIST_REQUIRE(hoist_put(out, &CAPS, sizeof CAPS), INVALID_ARGUMENT, "caps is NULL");
    return HOIST_STATUS_OK;
}

static hoist_status memory_info(hoist_handle handle, hoist_device_memory *out, hoist_error *error) {
    HOIST_FIND(device, d, DEVICE, handle);
    hoist_device_memory own = {.total = TOTAL, .free = hoist_room(TOTAL, d->budget, d->resident), .budget = d->budget};
    memcpy(own.resident, d->resident, sizeof d->resident);
    HOIST_REQUIRE(hoist_put(out, &own, sizeof own), INVALID_ARGUMENT, "memory is NULL");
    return HOIST_STATUS_OK;
}

static hoist_status plan_check(hoist_handle handle, const hoist_plan *plan, hoist_plan_report *out,
                               hoist_error *error) {
    hoist_plan p;
    hoist_plan_report own;
    HOIST_FIND(device, d, DEVICE, handle);
    HOIST_REQUIRE(d->child == 0, BAD_STATE, "a load or model is there");
    HOIST_REQUIRE(hoist_take(&p, sizeof p, plan) && hoist_take(&own, sizeof own, out), INVALID_ARGUMENT, "NULL");
    HOIST_REQUIRE(hoist_plan_sum(&p, own.bytes), INVALID_ARGUMENT, "the plan is malformed");
    own.refusal_count = 0;
    hoist_put(out, &own, sizeof own);
    return HOIST_STATUS_OK;
}

static hoist_status load_begin(hoist_handle handle, const hoist_plan *plan, hoist_handle *load, hoist_error *error) {
    hoist_plan p;
    hoist_tensor t;
    uint64_t bytes[4];
    HOIST_FIND(device, d, DEVICE, handle);
    HOIST_REQUIRE(d->child == 0, BAD_STATE, "a load or model is there");
    HOIST_REQUIRE(load != NULL && hoist_take(&p, sizeof p, plan), INVALID_ARGUMENT, "NULL");
    HOIST_REQUIRE(hoist_plan_sum(&p, bytes), INVALID_ARGUMENT, "the plan is malformed");
    HOIST_REQUIRE(hoist_plan_is_stored(&p, CAPS.stored), UNSUPPORTED, "an encoding is unknown");
    uint64_t room = hoist_room(TOTAL, d->budget, d->resident), needed = bytes[0] + bytes[1] + bytes[2] + bytes[3];
    if (needed > room) return hoist_fail_memory(error, needed, room);
    d->weights = calloc(p.tensor_count + 1, sizeof *d->weights);
    d->child = d->weights == NULL ? 0 : hoist_handles_add(&handles, LOAD, d);
    for (; d->child != 0 && d->count < p.tensor_count; d->count++) {
        hoist_tensor_at(&p, d->count, &t);
        d->weights[d->count] = (weight){.bytes = malloc(t.nbytes), .nbytes = t.nbytes, .granule = t.granule};
        if (d->weights[d->count].bytes == NULL) break;
    }
    int whole = d->child != 0 && d->count == p.tensor_count;
    if (!whole) empty(d);
    HOIST_REQUIRE(whole, OUT_OF_HOST_MEMORY, "no memory for the weights");
    memcpy(d->resident, bytes, sizeof bytes);
    *load = d->child;
    return HOIST_STATUS_OK;
}

/* Whether the range is whole blocks inside a tensor. */
static int is_range(const device *d, uint32_t tensor, uint64_t offset, uint64_t len) {
    return tensor < d->count
        && hoist_is_range(d->weights[tensor].nbytes, d->weights[tensor].granule, offset, len);
}

static hoist_status upload(hoist_handle load, const hoist_chunk *chunk, hoist_error *error) {
    hoist_chunk c;
    HOIST_FIND(device, d, LOAD, load);
    HOIST_REQUIRE(hoist_take(&c, sizeof c, chunk) && c.data != NULL, INVALID_ARGUMENT, "NULL");
    HOIST_REQUIRE(c.semantics <= HOIST_UPLOAD_IMPORT_UNTIL_RELEASE, INVALID_ARGUMENT, "unknown semantics");
    HOIST_REQUIRE(is_range(d, c.tensor, c.offset, c.len), INVALID_ARGUMENT, "no whole blocks of tensor %u", c.tensor);
    int added = hoist_ranges_add(&d->weights[c.tensor].arrived, c.offset, c.offset + c.len);
    HOIST_REQUIRE(added >= 0, OUT_OF_HOST_MEMORY, "no memory to remember what arrived");
    HOIST_REQUIRE(added == 1, INVALID_ARGUMENT, "bytes of tensor %u arrived twice", c.tensor);
    memcpy(d->weights[c.tensor].bytes + c.offset, c.data, c.len);
    return HOIST_STATUS_OK;
}

static hoist_status load_commit(hoist_handle load, hoist_handle *model, hoist_load_receipt *out, hoist_error *error) {
    HOIST_FIND(device, d, LOAD, load);
    HOIST_REQUIRE(model != NULL, INVALID_ARGUMENT, "model is NULL");
    for (uint32_t i = 0; i < d->count; i++) {
        uint64_t gap = hoist_ranges_gap(&d->weights[i].arrived, d->weights[i].nbytes);
        if (gap < d->weights[i].nbytes)
            return hoist_fail_at(error, HOIST_STATUS_INVALID_ARGUMENT, i, gap, "bytes never arrived");
    }
    hoist_load_receipt own = {.tensors = d->count};
    memcpy(own.bytes, d->resident, sizeof own.bytes);
    hoist_put(out, &own, sizeof own);
    hoist_handles_find(&handles, LOAD, load, 1);
    d->child = *model = hoist_handles_add(&handles, MODEL, d);
    return HOIST_STATUS_OK;
}

static hoist_status load_abort(hoist_handle load, hoist_error *error) {
    HOIST_FIND(device, d, LOAD, load);
    empty(d);
    return HOIST_STATUS_OK;
}

static hoist_status readback(hoist_handle model, uint32_t tensor, uint64_t offset, uint8_t *out, uint64_t len,
                             hoist_error *error) {
    HOIST_FIND(device, d, MODEL, model);
    HOIST_REQUIRE(out != NULL && is_range(d, tensor, offset, len), INVALID_ARGUMENT, "no whole blocks of %u", tensor);
    memcpy(out, d->weights[tensor].bytes + offset, len);
    return HOIST_STATUS_OK;
}

static hoist_status model_destroy(hoist_handle model, hoist_error *error) {
    HOIST_FIND(device, d, MODEL, model);
    empty(d);
    return HOIST_STATUS_OK;
}

static hoist_status device_close(hoist_handle handle, hoist_error *error) {
    HOIST_FIND(device, d, DEVICE, handle);
    empty(d);
    free(hoist_handles_find(&handles, DEVICE, handle, 1));
    return HOIST_STATUS_OK;
}

static hoist_status shutdown(hoist_error *error) {
    HOIST_REQUIRE(handles.open == 0, BAD_STATE, "a device is open");
    return HOIST_STATUS_OK;
}

static const hoist_plugin TABLE = {
    .struct_size = sizeof TABLE, .device_count = device_count, .device_info = device_info,
    .device_open = device_open, .caps = caps, .memory_info = memory_info, .plan_check = plan_check,
    .load_begin = load_begin, .upload = upload, .load_commit = load_commit, .load_abort = load_abort,
    .readback = readback, .model_destroy = model_destroy, .device_close = device_close, .shutdown = shutdown,
};

hoist_status hoist_plugin_open_v1(const hoist_host *host, uint32_t minor, const hoist_plugin **plugin,
                                  hoist_error *error) {
    HOIST_REQUIRE(host != NULL && plugin != NULL, INVALID_ARGUMENT, "NULL");
    HOIST_REQUIRE(minor >= HOIST_ABI_MINOR_MIN && minor <= HOIST_ABI_MINOR_MAX, VERSION, "no minor %u", minor);
    *plugin = &TABLE;
    return HOIST_STATUS_OK;
}
