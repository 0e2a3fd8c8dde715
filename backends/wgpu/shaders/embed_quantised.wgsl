// Rows of a quantised matrix as f32 (section 1.4 of the contract): a thread has four weights.

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    take_part(0u);
    let row = select(row_token(id.z), row_position(id.z), param(POSITIONS) != 0u);
    let first = part_param(PART_FIRST);
    let cols = param(COLS);
    if row < first || row - first >= part_param(PART_ROWS) || 4u * id.x >= cols {
        return;
    }
    let bytes = row_bytes_at(row);
    let n = id.x & 63u;
    var y: vec4<u32>;
    if MATRIX_SCALE {
        let scale = weight_word(part_param(PART_CONSTANTS) + row - first);
        let codes = unaligned_at(bytes + 4u * id.x);
        for (var i = 0u; i < 4u; i++) {
            y[i] = f_mul(f_from_int(bitcast<i32>(codes << (24u - 8u * i)) >> 24u), scale);
        }
    } else {
        y = segment_values(bytes + (id.x >> 6u) * SEGMENT_BYTES, n);
    }
    let out = part_param(OUT) + id.z * cols + 4u * id.x;
    for (var i = 0u; i < min(4u, cols - 4u * id.x); i++) {
        set_word(out + i, y[i]);
    }
}
