// What every kernel binds. Values are f32 as bits, or integers; the kernel's parameters say where in `work` they lie.

struct Params {
    v: array<vec4<u32>, 16>,
}

@group(0) @binding(0) var<uniform> params: Params;
// [0]: rows of this batch; from word 4 on, four words a row: token, sequence, position, row that it was before the tail.
@group(0) @binding(1) var<storage, read> batch: array<u32>;
// [2]: `work`, values; [3]: `weights`. Words or vectors of four, as the kernel reads them.
@group(0) @binding(4) var<storage, read> second: array<u32>;
@group(0) @binding(5) var<storage, read> tables: array<u32>;
@group(0) @binding(6) var<storage, read_write> cache: array<u32>;
// [0]: the lowest number of a step that met a NaN or infinity.
@group(0) @binding(7) var<storage, read_write> status: array<atomic<u32>>;

fn param(i: u32) -> u32 {
    return params.v[i >> 2u][i & 3u];
}

fn batch_rows() -> u32 {
    return batch[0];
}

fn row_token(row: u32) -> u32 {
    return batch[4u + 4u * row];
}

fn row_sequence(row: u32) -> u32 {
    return batch[5u + 4u * row];
}

fn row_position(row: u32) -> u32 {
    return batch[6u + 4u * row];
}

fn row_source(row: u32) -> u32 {
    return batch[7u + 4u * row];
}

fn non_finite(step: u32) {
    atomicMin(&status[0], step);
}
