/* Drives a plugin that is linked in, from C: a whole load, and misuse that must be refused. Nothing of Hoist but its header
 * is needed. Build it with sanitizers, from this folder:
 *
 *   cc -std=c11 -g -fsanitize=address,undefined -I../../../include driver.c minimal.c -o driver
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "hoist_plugin.h"

#define CHECK(CONDITION)                                                                                               \
    do {                                                                                                               \
        if (!(CONDITION)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #CONDITION);                                            \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

enum { TENSORS = 3, BLOCKS = 5, GRANULE = 18, NBYTES = BLOCKS * GRANULE };

static const hoist_plugin *p;
static hoist_error error;

static hoist_status upload(hoist_handle load, uint32_t tensor, uint64_t offset, const uint8_t *data, uint64_t len) {
    hoist_chunk chunk = {.struct_size = sizeof chunk, .tensor = tensor, .offset = offset, .data = data, .len = len};
    return p->upload(load, &chunk, &error);
}

int main(void) {
    CHECK(memcmp(HOIST_PLUGIN_HEADER_V1.magic, HOIST_HEADER_MAGIC, 16) == 0);
    error = (hoist_error){.struct_size = sizeof error};
    hoist_host host = {.struct_size = sizeof host, .minor = HOIST_ABI_MINOR_MAX};
    CHECK(hoist_plugin_open_v1(&host, HOIST_ABI_MINOR_MAX + 1, &p, &error) == HOIST_STATUS_VERSION);
    CHECK(hoist_plugin_open_v1(NULL, HOIST_ABI_MINOR_MAX, &p, NULL) == HOIST_STATUS_INVALID_ARGUMENT);
    CHECK(hoist_plugin_open_v1(&host, HOIST_ABI_MINOR_MAX, &p, &error) == HOIST_STATUS_OK);

    hoist_handle device = 0, load = 0, model = 0, stale;
    hoist_open_options options = {.struct_size = sizeof options};
    CHECK(p->device_open(1, &options, &device, &error) == HOIST_STATUS_INVALID_ARGUMENT);
    options.flags = 1u << 31;
    CHECK(p->device_open(0, &options, &device, &error) == HOIST_STATUS_INVALID_ARGUMENT);
    options.flags = 0;
    CHECK(p->device_open(0, NULL, &device, &error) == HOIST_STATUS_INVALID_ARGUMENT);
    CHECK(p->device_open(0, &options, &device, &error) == HOIST_STATUS_OK && device != 0);
    CHECK(p->shutdown(&error) == HOIST_STATUS_BAD_STATE);

    hoist_tensor tensors[TENSORS];
    for (uint32_t i = 0; i < TENSORS; i++) {
        tensors[i] = (hoist_tensor){.struct_size = sizeof *tensors, .id = i, .encoding = HOIST_ENCODING_Q4_0,
                                    .granule = GRANULE, .matrices = 1, .rows = 1, .cols = BLOCKS * 32, .nbytes = NBYTES,
                                    .resident_bytes = NBYTES};
    }
    hoist_plan plan = {.struct_size = sizeof plan, .layers = 1, .tensors = tensors, .tensor_count = TENSORS,
                       .tensor_size = sizeof *tensors, .nbytes = TENSORS * NBYTES, .resident_bytes = TENSORS * NBYTES};
    tensors[1].granule = 0;
    CHECK(p->load_begin(device, &plan, &load, &error) == HOIST_STATUS_INVALID_ARGUMENT);
    tensors[1].granule = GRANULE;

    uint8_t data[NBYTES], out[NBYTES];
    for (int i = 0; i < NBYTES; i++) data[i] = (uint8_t)(i * 7);
    for (int round = 0; round < 3; round++) {
        stale = load;
        CHECK(p->load_begin(device, &plan, &load, &error) == HOIST_STATUS_OK && load != 0 && load != stale);
        CHECK(p->load_begin(device, &plan, &model, &error) == HOIST_STATUS_BAD_STATE);
        CHECK(upload(stale, 0, 0, data, GRANULE) == HOIST_STATUS_BAD_HANDLE);
        CHECK(upload(device, 0, 0, data, GRANULE) == HOIST_STATUS_BAD_HANDLE);
        CHECK(upload(load, TENSORS, 0, data, GRANULE) == HOIST_STATUS_INVALID_ARGUMENT);
        CHECK(upload(load, UINT32_MAX, 0, data, GRANULE) == HOIST_STATUS_INVALID_ARGUMENT);
        CHECK(upload(load, 0, 0, data, 0) == HOIST_STATUS_INVALID_ARGUMENT);
        CHECK(upload(load, 0, 0, NULL, GRANULE) == HOIST_STATUS_INVALID_ARGUMENT);
        CHECK(upload(load, 0, 1, data, GRANULE) == HOIST_STATUS_INVALID_ARGUMENT);
        CHECK(upload(load, 0, 0, data, GRANULE + 1) == HOIST_STATUS_INVALID_ARGUMENT);
        CHECK(upload(load, 0, NBYTES, data, GRANULE) == HOIST_STATUS_INVALID_ARGUMENT);
        CHECK(upload(load, 0, UINT64_MAX - 15, data, GRANULE) == HOIST_STATUS_INVALID_ARGUMENT);
        /* Blocks in an order that makes ranges, joins them, and fills the hole last. */
        static const int ORDER[] = {0, 4, 2, 3};
        for (uint32_t t = 0; t < TENSORS; t++) {
            for (int i = 0; i < 4; i++) {
                int at = ORDER[i] * GRANULE;
                CHECK(upload(load, t, at, data + at, GRANULE) == HOIST_STATUS_OK);
                CHECK(upload(load, t, at, data + at, GRANULE) == HOIST_STATUS_INVALID_ARGUMENT);
            }
        }
        error.tensor = 9;
        CHECK(p->load_commit(load, &model, NULL, &error) == HOIST_STATUS_INVALID_ARGUMENT);
        CHECK(error.tensor == 0 && error.byte_offset == GRANULE);
        if (round == 1) {
            CHECK(p->load_abort(load, &error) == HOIST_STATUS_OK);
            CHECK(p->load_abort(load, &error) == HOIST_STATUS_BAD_HANDLE);
            continue;
        }
        for (uint32_t t = 0; t < TENSORS; t++) CHECK(upload(load, t, GRANULE, data + GRANULE, GRANULE) == HOIST_STATUS_OK);
        hoist_load_receipt receipt = {.struct_size = sizeof receipt};
        CHECK(p->load_commit(load, &model, &receipt, &error) == HOIST_STATUS_OK);
        CHECK(receipt.tensors == TENSORS && receipt.bytes[0] == TENSORS * NBYTES);
        CHECK(upload(load, 0, 0, data, GRANULE) == HOIST_STATUS_BAD_HANDLE);
        for (uint32_t t = 0; t < TENSORS; t++) {
            memset(out, 0, sizeof out);
            CHECK(p->readback(model, t, 0, out, NBYTES, &error) == HOIST_STATUS_OK);
            CHECK(memcmp(data, out, NBYTES) == 0);
        }
        CHECK(p->readback(model, TENSORS, 0, out, GRANULE, &error) == HOIST_STATUS_INVALID_ARGUMENT);
        CHECK(p->readback(model, 0, GRANULE, out, NBYTES, &error) == HOIST_STATUS_INVALID_ARGUMENT);
        hoist_device_memory memory = {.struct_size = sizeof memory};
        CHECK(p->memory_info(device, &memory, &error) == HOIST_STATUS_OK);
        CHECK(memory.resident[0] == TENSORS * NBYTES);
        if (round == 0) {
            CHECK(p->model_destroy(model, &error) == HOIST_STATUS_OK);
            CHECK(p->model_destroy(model, &error) == HOIST_STATUS_BAD_HANDLE);
        }
    }
    /* Closing a device destroys what is left on it. A short record is not written past its size. */
    CHECK(p->device_close(device, NULL) == HOIST_STATUS_OK);
    uint32_t small[4] = {8, 0, 77, 77};
    CHECK(p->device_close(device, (hoist_error *)(void *)small) == HOIST_STATUS_BAD_HANDLE);
    CHECK(small[1] == (uint32_t)HOIST_STATUS_BAD_HANDLE && small[2] == 77);
    CHECK(p->shutdown(&error) == HOIST_STATUS_OK);
    return 0;
}
