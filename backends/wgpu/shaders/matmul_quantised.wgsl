// Quantised matrix * activations (section 1 of the contract), in integers. `lanes` threads share a row, each with
// segments of its own; a workgroup has 64 / lanes rows and TOKENS vectors.

var<workgroup> sums: array<vec2<u32>, WORKGROUP_SUMS>;

@compute @workgroup_size(64)
fn main(
    @builtin(local_invocation_index) thread: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    let lanes_log2 = param(LANES_LOG2);
    let lanes = 1u << lanes_log2;
    let lane = thread & (lanes - 1u);
    let row = (group.y * groups.x + group.x) * (64u >> lanes_log2) + (thread >> lanes_log2);
    let row_target = target_row(row, group.z);
    let segments = param(SEGMENTS);
    let cols = param(COLS);
    let rows_now = batch_rows();

    var x: array<u32, TOKENS>;
    var acc: array<vec2<u32>, TOKENS>;
    for (var t = 0u; t < TOKENS; t++) {
        var vector = choice_vector(group.z);
        if param(CHOICES) == 0u {
            // Past the last token the last one is computed again, and not stored.
            vector = min(group.z * TOKENS + t, rows_now - 1u);
        }
        x[t] = param(X) + vector * segments * RECORD;
        acc[t] = vec2<u32>(0u, 0u);
    }
    var e_w = 0;
    var constant = 0u;
    if row_target.valid {
        constant = weights[param(PART_CONSTANTS) + row_target.flat - param(PART_FIRST)];
        if !MATRIX_SCALE {
            e_w = bitcast<i32>(constant);
        }
        let bytes = row_bytes_at(row_target.flat);
        for (var s = lane; s < segments; s += lanes) {
            let blocks = min(8u, (cols - 256u * s) >> 5u);
            accumulate(bytes + s * SEGMENT_BYTES, s, blocks, e_w, &x, &acc);
        }
    }
    for (var t = 0u; t < TOKENS; t++) {
        sums[64u * t + thread] = acc[t];
    }
    for (var h = lanes >> 1u; h > 0u; h = h >> 1u) {
        workgroupBarrier();
        if lane < h {
            for (var t = 0u; t < TOKENS; t++) {
                sums[64u * t + thread] = add64(sums[64u * t + thread], sums[64u * t + thread + h]);
            }
        }
    }
    // A thread reads only what it wrote itself.
    if lane != 0u || !row_target.valid {
        return;
    }
    for (var t = 0u; t < TOKENS; t++) {
        let token = group.z * TOKENS + t;
        if param(CHOICES) == 0u && token >= rows_now {
            return;
        }
        let e_a = bitcast<i32>(work[x[t] + AT_E]);
        var y = f_finish(sums[64u * t + thread], e_w + e_a);
        if MATRIX_SCALE {
            y = f_mul(y, constant);
        }
        if !is_finite(y) {
            non_finite(param(STEP));
        }
        var out = row_target.out;
        if param(CHOICES) == 0u {
            out += token * param(WIDTH);
        }
        if param(BIAS) != NONE {
            y = f_add(y, second[param(BIAS) + row_target.flat]);
        }
        work[out] = y;
    }
}
