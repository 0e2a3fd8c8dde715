// RouterTopK and WeightedSum (section 4 of the contract).

const LOGITS: u32 = 0u;
const N: u32 = 1u;
const K: u32 = 2u;
const NORMALISE: u32 = 3u;
const EXPERTS: u32 = 4u;
const CHOSEN: u32 = 5u;
const SCRATCH: u32 = 6u;

const X: u32 = 0u;
const WIDTH: u32 = 1u;
const OUT: u32 = 6u;

var<workgroup> sums: array<u32, 256>;

// A workgroup is one token; its probabilities lie in scratch.
@compute @workgroup_size(256)
fn router_top_k(
    @builtin(local_invocation_index) thread: u32,
    @builtin(workgroup_id) group: vec3<u32>,
) {
    let n = param(N);
    let k = param(K);
    let logits = param(LOGITS) + group.z * n;
    let p = param(SCRATCH) + group.z * n;
    var largest = 0u;
    for (var i = thread; i < n; i += 256u) {
        let x = work[logits + i];
        largest = max(largest, select(f_key(x), 0u, is_nan(x)));
    }
    sums[thread] = largest;
    for (var h = 128u; h > 0u; h = h >> 1u) {
        workgroupBarrier();
        if thread < h {
            sums[thread] = max(sums[thread], sums[thread + h]);
        }
    }
    workgroupBarrier();
    largest = sums[0];
    workgroupBarrier();
    let m = select(~largest, largest ^ SIGN, (largest & SIGN) != 0u);
    var acc = 0u;
    for (var i = thread; i < n; i += 256u) {
        let e = f_exp(f_sub(work[logits + i], m));
        work[p + i] = e;
        acc = f_add(acc, e);
    }
    sums[thread] = acc;
    for (var h = 128u; h > 0u; h = h >> 1u) {
        workgroupBarrier();
        if thread < h {
            sums[thread] = f_add(sums[thread], sums[thread + h]);
        }
    }
    workgroupBarrier();
    let sum = sums[0];
    for (var i = thread; i < n; i += 256u) {
        work[p + i] = f_div(work[p + i], sum);
    }
    storageBarrier();
    workgroupBarrier();
    if thread != 0u {
        return;
    }
    let experts = param(EXPERTS) + group.z * k;
    let chosen = param(CHOSEN) + group.z * k;
    var total = 0u;
    for (var c = 0u; c < k; c++) {
        var best = 0u;
        var best_p = 0u;
        var none = true;
        for (var i = 0u; i < n; i++) {
            let x = work[p + i];
            // Probabilities are positive, and so compare as their bits do; one that is no number is never larger.
            if none || (x > best_p && !is_nan(x) && !is_nan(best_p)) {
                var taken = false;
                for (var b = 0u; b < c; b++) {
                    taken = taken || work[experts + b] == i;
                }
                if !taken {
                    best = i;
                    best_p = x;
                    none = false;
                }
            }
        }
        work[experts + c] = best;
        work[chosen + c] = best_p;
        total = f_add(total, best_p);
    }
    if param(NORMALISE) != 0u {
        for (var c = 0u; c < k; c++) {
            work[chosen + c] = f_div(work[chosen + c], total);
        }
    }
}

// A thread is one element of one token.
@compute @workgroup_size(64)
fn weighted_sum(@builtin(global_invocation_id) id: vec3<u32>) {
    let width = param(WIDTH);
    if id.x >= width {
        return;
    }
    let k = param(K);
    let experts = param(EXPERTS) + id.z * k;
    var acc = 0u;
    var before = 0u;
    for (var c = 0u; c < k; c++) {
        // The lowest expert above the one before.
        var slot = k;
        var expert = 0xffffffffu;
        for (var b = 0u; b < k; b++) {
            let e = work[experts + b];
            if (c == 0u || e > before) && e < expert {
                slot = b;
                expert = e;
            }
        }
        if slot < k {
            let w = work[param(CHOSEN) + id.z * k + slot];
            let x = work[param(X) + (id.z * k + slot) * width + id.x];
            acc = select(f_fma(w, x, acc), f_mul(w, x), c == 0u);
            before = expert;
        }
    }
    work[param(OUT) + id.z * width + id.x] = acc;
}
