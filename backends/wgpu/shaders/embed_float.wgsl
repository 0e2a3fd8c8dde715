// Rows of a float matrix, widened.

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    take_part(0u);
    let row = select(row_token(id.z), row_position(id.z), param(POSITIONS) != 0u);
    let first = part_param(PART_FIRST);
    let cols = param(COLS);
    if row < first || row - first >= part_param(PART_ROWS) || id.x >= cols {
        return;
    }
    set_word(part_param(OUT) + id.z * cols + id.x, float_at(row_bytes_at(row), id.x));
}
