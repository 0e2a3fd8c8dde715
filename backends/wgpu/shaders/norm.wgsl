// RmsNorm and LayerNorm (section 4 of the contract): a workgroup is the 256 accumulators of one vector.

const X: u32 = 0u;
const OUT: u32 = 1u;
const N: u32 = 2u;
const N_FLOAT: u32 = 3u;
const EPSILON: u32 = 4u;
const GAMMA: u32 = 5u;
const BETA: u32 = 6u;
const VECTORS: u32 = 7u;
// What is added to the result.
const ADD: u32 = 8u;
// Where the quantised result goes, and the step that reports what is not finite.
const RECORDS: u32 = 9u;
const STEP: u32 = 10u;

const NONE: u32 = 0xffffffffu;

var<workgroup> sums: array<u32, 256>;

fn fold(thread: u32, acc: u32) -> u32 {
    workgroupBarrier();
    sums[thread] = acc;
    for (var h = 128u; h > 0u; h = h >> 1u) {
        workgroupBarrier();
        if thread < h {
            sums[thread] = f_add(sums[thread], sums[thread + h]);
        }
    }
    workgroupBarrier();
    return sums[0];
}

fn inverse_root(mean_square: u32) -> u32 {
    return f_div(ONE, f_sqrt(f_add(mean_square, param(EPSILON))));
}

@compute @workgroup_size(256)
fn rms_norm(
    @builtin(local_invocation_index) thread: u32,
    @builtin(workgroup_id) group: vec3<u32>,
) {
    let n = param(N);
    let at = (group.z * param(VECTORS) + group.x) * n;
    let x = param(X) + at;
    var acc = 0u;
    for (var i = thread; i < n; i += 256u) {
        let v = work[x + i];
        acc = f_fma(v, v, acc);
    }
    let inverse = inverse_root(f_div(fold(thread, acc), param(N_FLOAT)));
    for (var i = thread; i < n; i += 256u) {
        var y = f_mul(f_mul(work[x + i], inverse), weights[param(GAMMA) + i]);
        if param(ADD) != NONE {
            y = f_add(y, work[param(ADD) + at + i]);
        }
        work[param(OUT) + at + i] = y;
    }
}

@compute @workgroup_size(256)
fn layer_norm(
    @builtin(local_invocation_index) thread: u32,
    @builtin(workgroup_id) group: vec3<u32>,
) {
    let n = param(N);
    let at = (group.z * param(VECTORS) + group.x) * n;
    let x = param(X) + at;
    var acc = 0u;
    for (var i = thread; i < n; i += 256u) {
        acc = f_add(acc, work[x + i]);
    }
    let mean = f_div(fold(thread, acc), param(N_FLOAT));
    acc = 0u;
    for (var i = thread; i < n; i += 256u) {
        let c = f_sub(work[x + i], mean);
        acc = f_fma(c, c, acc);
    }
    let inverse = inverse_root(f_div(fold(thread, acc), param(N_FLOAT)));
    for (var i = thread; i < n; i += 256u) {
        let c = f_mul(f_sub(work[x + i], mean), inverse);
        work[param(OUT) + at + i] = f_fma(c, weights[param(GAMMA) + i], second[param(BETA) + i]);
    }
}
