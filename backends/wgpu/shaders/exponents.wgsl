// The largest exponent of each row of a part, E_w: computed once, when a weight is first multiplied with.

@compute @workgroup_size(64)
fn main(
    @builtin(local_invocation_index) thread: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    take_part(0u);
    let row = (group.y * groups.x + group.x) * 64u + thread;
    if row >= part_param(PART_ROWS) {
        return;
    }
    let bytes = row_bytes_at(part_param(PART_FIRST) + row);
    let cols = param(COLS);
    var e = -32768;
    for (var s = 0u; s < param(SEGMENTS); s++) {
        e = max(e, segment_exponent(bytes + s * SEGMENT_BYTES, min(8u, (cols - 256u * s) >> 5u)));
    }
    set_word(part_param(OUT) + row, bitcast<u32>(e));
}
