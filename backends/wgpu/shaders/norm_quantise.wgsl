// RmsNorm, and Quantise of its result: a workgroup is one vector, which is the only one of its token.
@compute @workgroup_size(256)
fn rms_norm_quantise(
    @builtin(local_invocation_index) thread: u32,
    @builtin(workgroup_id) group: vec3<u32>,
) {
    let n = param(N);
    let at = group.z * n;
    let x = param(X) + at;
    var acc = 0u;
    for (var i = thread; i < n; i += 256u) {
        let v = work[x + i];
        acc = f_fma(v, v, acc);
    }
    let inverse = inverse_root(f_div(fold(thread, acc), param(N_FLOAT)));
    let segments = (n + 255u) / 256u;
    var finite = true;
    for (var base = 0u; base < segments; base += 4u) {
        let segment = base + (thread >> 6u);
        let first = 256u * segment + 4u * (thread & 63u);
        var values = vec4<u32>(0u);
        if first < n {
            for (var i = 0u; i < 4u; i++) {
                let y = f_mul(f_mul(work[x + first + i], inverse), weights[param(GAMMA) + first + i]);
                work[param(OUT) + at + first + i] = y;
                values[i] = y;
            }
        }
        let record = param(RECORDS) + (group.z * segments + segment) * RECORD;
        finite = quantise_segment(thread, values, record, segment < segments) && finite;
    }
    if !finite {
        non_finite(param(STEP));
    }
}
