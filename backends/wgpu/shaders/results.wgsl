// What follows the last operation, and what precedes the tail.

const LOGITS: u32 = 0u;
const VOCAB: u32 = 1u;
const OUT: u32 = 2u;
const STEP: u32 = 3u;

const VALUE: u32 = 0u;
const WIDTH: u32 = 1u;

var<workgroup> keys: array<u32, 256>;
var<workgroup> places: array<u32, 256>;

// The lowest index of the largest logit of each row; a logit that is not finite is reported.
@compute @workgroup_size(256)
fn arg_max(
    @builtin(local_invocation_index) thread: u32,
    @builtin(workgroup_id) group: vec3<u32>,
) {
    let n = param(VOCAB);
    let logits = param(LOGITS) + group.z * n;
    var best = 0u;
    var place = 0u;
    var finite = true;
    for (var i = thread; i < n; i += 256u) {
        let x = work[logits + i];
        finite = finite && is_finite(x);
        // -0 equals +0.
        let key = f_key(select(x, 0u, (x & MAGNITUDE) == 0u));
        if key > best {
            best = key;
            place = i;
        }
    }
    if !finite {
        non_finite(param(STEP));
    }
    keys[thread] = best;
    places[thread] = place;
    for (var h = 128u; h > 0u; h = h >> 1u) {
        workgroupBarrier();
        if thread < h {
            let key = keys[thread + h];
            let other = places[thread + h];
            if key > keys[thread] || (key == keys[thread] && other < places[thread]) {
                keys[thread] = key;
                places[thread] = other;
            }
        }
    }
    if thread == 0u {
        work[param(OUT) + group.z] = places[0];
    }
}

// Moves the tokens of the tail to the front. Sources ascend and none lies before its destination, so that one thread
// that goes through an element's rows in order overwrites nothing that is still to be read.
@compute @workgroup_size(64)
fn gather(@builtin(global_invocation_id) id: vec3<u32>) {
    let width = param(WIDTH);
    if id.x >= width {
        return;
    }
    for (var row = 0u; row < batch_rows(); row++) {
        work[param(VALUE) + row * width + id.x] = work[param(VALUE) + row_source(row) * width + id.x];
    }
}
