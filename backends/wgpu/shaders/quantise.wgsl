// Quantise (section 1.1 of the contract): a workgroup is one segment of one vector, a thread four elements of it.

const X: u32 = 0u;
const OUT: u32 = 1u;
const COLS: u32 = 2u;
const VECTORS: u32 = 3u;
const STEP: u32 = 4u;

const SMALLEST_NORMAL: u32 = 0x00800000u;

var<workgroup> largest: array<u32, 64>;
var<workgroup> blocks: array<u32, 64>;
var<workgroup> half_sums: array<i32, 64>;

// A / 2032 rounded up to eight significant bits; zero for a zero segment.
fn step_of(a: u32) -> u32 {
    let d0 = f_div(a, 0x44fe0000u);
    return select((d0 + 0xffffu) & 0xffff0000u, 0u, d0 < SMALLEST_NORMAL);
}

// e_a of a step: d = m * 2^e with 128 <= m <= 255.
fn exponent_of(d: u32) -> i32 {
    return select(i32(d >> 23u) - 134, -133, d == 0u);
}

// An f32 of magnitude up to 127.5 to the nearest integer, ties to even.
fn nearest(p: u32) -> i32 {
    let magnitude = p & MAGNITUDE;
    let e = magnitude >> 23u;
    if e < 126u {
        return 0;
    }
    // 24 bits, of which 150 - e lie below the point; three more keep shifts within the word.
    let below = 150u - e;
    let m = (magnitude & 0x7fffffu) | 0x800000u;
    let whole = m >> below;
    let rest = m & ((1u << below) - 1u);
    let half = 1u << (below - 1u);
    let up = rest > half || (rest == half && (whole & 1u) == 1u);
    let i = i32(whole + select(0u, 1u, up));
    return select(i, -i, (p & SIGN) != 0u);
}

@compute @workgroup_size(64)
fn main(
    @builtin(local_invocation_index) thread: u32,
    @builtin(workgroup_id) group: vec3<u32>,
) {
    let cols = param(COLS);
    let segment = group.x;
    let segments = (cols + 255u) / 256u;
    let vector = group.z * param(VECTORS) + group.y;
    let x = param(X) + vector * cols;

    // The largest magnitude of the whole vector gives E_a. Every segment finds it for itself.
    var whole = 0u;
    for (var i = thread; i < cols; i += 64u) {
        whole = max(whole, work[x + i] & MAGNITUDE);
    }
    var values: array<u32, 4>;
    let first = 256u * segment + 4u * thread;
    let live = first < cols;
    var mine = 0u;
    for (var i = 0u; i < 4u; i++) {
        values[i] = 0u;
        if live {
            values[i] = work[x + first + i];
        }
        mine = max(mine, values[i] & MAGNITUDE);
    }
    largest[thread] = whole;
    blocks[thread] = mine;
    for (var h = 32u; h > 0u; h = h >> 1u) {
        workgroupBarrier();
        if thread < h {
            largest[thread] = max(largest[thread], largest[thread + h]);
        }
        // Eight threads share a block.
        if (thread & 7u) < h && h < 8u {
            blocks[thread] = max(blocks[thread], blocks[thread + h]);
        }
    }
    workgroupBarrier();
    let e_all = exponent_of(step_of(largest[0]));
    let finite = is_finite(largest[0]);
    var a_segment = 0u;
    for (var j = 0u; j < 8u; j++) {
        a_segment = max(a_segment, blocks[8u * j]);
    }
    let a_block = blocks[thread & 56u];

    let d = step_of(a_segment);
    var u = 1u;
    var q = 0u;
    var sum = 0;
    if d != 0u && finite {
        // The smallest u with a_block <= (127 u) d. Positive numbers compare as their bits do.
        var low = 1u;
        var high = 16u;
        while low < high {
            let middle = (low + high) >> 1u;
            if a_block <= f_mul(f_from_int(i32(127u * middle)), d) {
                high = middle;
            } else {
                low = middle + 1u;
            }
        }
        u = low;
        let r = f_div(ONE, f_mul(f_from_int(i32(u)), d));
        for (var i = 0u; i < 4u; i++) {
            let code = nearest(f_mul(values[i], r));
            sum += code;
            q |= (bitcast<u32>(code) & 255u) << (8u * i);
        }
    }
    half_sums[thread] = sum;
    workgroupBarrier();
    let record = param(OUT) + (vector * segments + segment) * RECORD;
    work[record + thread] = q;
    if (thread & 7u) == 0u {
        work[record + AT_U + (thread >> 3u)] = u;
    }
    if (thread & 3u) == 0u {
        let s = half_sums[thread] + half_sums[thread + 1u] + half_sums[thread + 2u] + half_sums[thread + 3u];
        work[record + AT_SUMS + (thread >> 2u)] = bitcast<u32>(i32(u) * s);
    }
    if thread == 0u {
        if !finite {
            non_finite(param(STEP));
        }
        let e = exponent_of(d);
        work[record + AT_M] = select(((d >> 16u) & 127u) | 128u, 0u, d == 0u);
        work[record + AT_SHIFT] = bitcast<u32>(e_all - e);
        work[record + AT_E] = bitcast<u32>(e_all);
    }
}
