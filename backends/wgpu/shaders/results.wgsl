// What follows the last operation, and what precedes the tail.

const LOGITS: u32 = 0u;
const VOCAB: u32 = 1u;
const OUT: u32 = 2u;
const STEP: u32 = 3u;
// `[token][part]`: key and place of the largest logit of a part.
const BEST: u32 = 4u;
const PARTS: u32 = 5u;

const VALUE: u32 = 0u;
const WIDTH: u32 = 1u;

var<workgroup> keys: array<u32, 256>;
var<workgroup> places: array<u32, 256>;

// The largest key of all threads, the lowest place of it, in the first of each.
fn best(thread: u32, key: u32, place: u32) {
    keys[thread] = key;
    places[thread] = place;
    for (var h = 128u; h > 0u; h = h >> 1u) {
        workgroupBarrier();
        if thread < h {
            let other = keys[thread + h];
            let there = places[thread + h];
            if other > keys[thread] || (other == keys[thread] && there < places[thread]) {
                keys[thread] = other;
                places[thread] = there;
            }
        }
    }
}

// The lowest index of the largest logit of PART_LOGITS; a logit that is not finite is reported.
@compute @workgroup_size(256)
fn arg_max_of_part(
    @builtin(local_invocation_index) thread: u32,
    @builtin(workgroup_id) group: vec3<u32>,
) {
    let n = min(param(VOCAB), (group.x + 1u) * PART_LOGITS);
    let logits = param(LOGITS) + group.z * param(VOCAB);
    var largest = 0u;
    var place = 0xffffffffu;
    var finite = true;
    for (var i = group.x * PART_LOGITS + thread; i < n; i += 256u) {
        let x = work[logits + i];
        finite = finite && is_finite(x);
        // -0 equals +0.
        let key = f_key(select(x, 0u, (x & MAGNITUDE) == 0u));
        if key > largest {
            largest = key;
            place = i;
        }
    }
    if !finite {
        non_finite(param(STEP));
    }
    best(thread, largest, place);
    if thread == 0u {
        let at = param(BEST) + 2u * (group.z * param(PARTS) + group.x);
        work[at] = keys[0];
        work[at + 1u] = places[0];
    }
}

// Of the parts of a token, the best.
@compute @workgroup_size(256)
fn arg_max(
    @builtin(local_invocation_index) thread: u32,
    @builtin(workgroup_id) group: vec3<u32>,
) {
    var largest = 0u;
    var place = 0xffffffffu;
    for (var i = thread; i < param(PARTS); i += 256u) {
        let at = param(BEST) + 2u * (group.z * param(PARTS) + i);
        if work[at] > largest {
            largest = work[at];
            place = work[at + 1u];
        }
    }
    best(thread, largest, place);
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
