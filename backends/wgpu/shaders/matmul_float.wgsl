// Float matrix * activations (section 2 of the contract): a workgroup is the 64 accumulators of one row and one vector.

var<workgroup> sums: array<u32, 64>;

@compute @workgroup_size(64)
fn main(
    @builtin(local_invocation_index) thread: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    let row = choose_part(group.y * groups.x + group.x, 0u);
    let row_target = target_row(row, group.z);
    let cols = param(COLS);
    var vector = group.z;
    if param(CHOICES) != 0u {
        vector = choice_vector(group.z);
    }
    var acc = 0u;
    if row_target.valid {
        let bytes = row_bytes_at(row_target.flat);
        let x = param(X) + vector * cols;
        for (var i = thread; i < cols; i += 64u) {
            acc = f_fma(float_at(bytes, i), work_word(x + i), acc);
        }
    }
    sums[thread] = acc;
    for (var h = 32u; h > 0u; h = h >> 1u) {
        workgroupBarrier();
        if thread < h {
            sums[thread] = f_add(sums[thread], sums[thread + h]);
        }
    }
    if thread == 0u && row_target.valid {
        deliver(row_target, group.z, sums[0]);
    }
}
