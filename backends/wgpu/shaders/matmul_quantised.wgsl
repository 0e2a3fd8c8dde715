// Quantised matrix * activations (section 1 of the contract), in integers. A workgroup has 32 pairs of a row and a
// segment, and TOKENS vectors. First its THREADS share all slices of all pairs, so that neighbours read neighbouring
// bytes; then a thread has a pair: one wide multiplication and shift. Pairs of a row are added last. Where a row has more
// than 32 segments, this repeats.

const PAIRS: u32 = 32u;
// Slices of a pair, and one place more so that pairs lie in different banks.
const PAIR_PLACES: u32 = 9u;

var<private> tokens_now: u32;
var<workgroup> exponents: array<i32, WORKGROUP_SUMS>;
var<workgroup> sums: array<vec2<u32>, WORKGROUP_SUMS>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(local_invocation_index) thread: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    let lanes_log2 = param(LANES_LOG2);
    let lanes = 1u << lanes_log2;
    let lane = thread & (lanes - 1u);
    let segments = param(SEGMENTS);
    let cols = param(COLS);
    tokens_now = batch_rows();
    let first_row = choose_part(group.y * groups.x + group.x, 5u - lanes_log2);
    let mine = target_row(first_row + (thread >> lanes_log2), group.z);
    let has_pair = thread < PAIRS;
    var constant = 0u;
    var e_w = 0;
    if has_pair {
        for (var t = 0u; t < TOKENS; t++) {
            let vector = vector_at(t, group.z);
            var e = -1000;
            for (var s = thread; s < segments; s += PAIRS) {
                e = max(e, bitcast<i32>(work_word(vector + s * RECORD + AT_E)));
            }
            exponents[PAIRS * t + thread] = e;
            sums[PAIRS * t + thread] = vec2<u32>(0u, 0u);
        }
        if mine.valid {
            constant = weight_word(part_param(PART_CONSTANTS) + mine.flat - part_param(PART_FIRST));
            if !MATRIX_SCALE {
                e_w = bitcast<i32>(constant);
            }
        }
    }
    for (var base = 0u; base < segments; base += lanes) {
        if base > 0u {
            workgroupBarrier();
        }
        for (var slice = thread; slice < 8u * PAIRS; slice += THREADS) {
            let pair = slice >> 3u;
            let k = slice & 7u;
            let place = PAIR_PLACES * pair + k;
            let goal = target_row(first_row + (pair >> lanes_log2), group.z);
            let s = base + (pair & (lanes - 1u));
            if goal.valid && 256u * s + 32u * k < cols {
                slice_sums(row_bytes_at(goal.flat) + s * SEGMENT_BYTES, k, s, group.z, place);
            } else {
                for (var t = 0u; t < TOKENS; t++) {
                    partials[PLACES * t + place] = vec2<i32>(0, 0);
                }
            }
        }
        let s = base + lane;
        let works = has_pair && mine.valid && s < segments;
        var head: Head;
        if works {
            head = head_at(row_bytes_at(mine.flat) + s * SEGMENT_BYTES);
        }
        workgroupBarrier();
        if works {
            let blocks = min(8u, (cols - 256u * s) >> 5u);
            head = align(head, PAIR_PLACES * thread, blocks);
            for (var t = 0u; t < TOKENS; t++) {
                let record = vector_at(t, group.z) + s * RECORD;
                let up = e_w + largest_exponent(t, segments) - bitcast<i32>(work_word(record + AT_E));
                let term = segment_sum(head, t, PAIR_PLACES * thread, blocks, record, work_word(record + AT_M), up);
                sums[PAIRS * t + thread] = add64(sums[PAIRS * t + thread], term);
            }
        }
    }
    for (var h = lanes >> 1u; h > 0u; h = h >> 1u) {
        workgroupBarrier();
        if has_pair && lane < h {
            for (var t = 0u; t < TOKENS; t++) {
                let at = PAIRS * t + thread;
                sums[at] = add64(sums[at], sums[at + h]);
            }
        }
    }
    // A thread reads only what it wrote itself.
    if !has_pair || lane != 0u || !mine.valid {
        return;
    }
    for (var t = 0u; t < TOKENS; t++) {
        let token = group.z * TOKENS + t;
        if param(CHOICES) == 0u && token >= tokens_now {
            return;
        }
        var y = f_finish(sums[PAIRS * t + thread], e_w + largest_exponent(t, segments));
        if MATRIX_SCALE {
            y = f_mul(y, constant);
        }
        if !is_finite(y) {
            non_finite(part_param(STEP));
        }
        deliver(mine, token, y);
    }
}

// Where vector `t` starts.
fn vector_at(t: u32, z: u32) -> u32 {
    var vector = 0u;
    if param(CHOICES) == 0u {
        // Past the last token the last one is computed again, and not stored.
        vector = min(z * TOKENS + t, tokens_now - 1u);
    } else {
        vector = choice_vector(z);
    }
    return param(X) + vector * param(SEGMENTS) * RECORD;
}

// E_a of vector `t`.
fn largest_exponent(t: u32, segments: u32) -> i32 {
    var e = -1000;
    for (var i = 0u; i < min(segments, PAIRS); i++) {
        e = max(e, exponents[PAIRS * t + i]);
    }
    return e;
}
