// Quantising (section 1.1 of the contract): sixty-four threads have a segment, each four elements of it. A workgroup has
// SLOTS segments at a time.

const SMALLEST_NORMAL: u32 = 0x00800000u;

var<workgroup> magnitudes: array<u32, SLOT_THREADS>;
var<workgroup> block_magnitudes: array<u32, SLOT_BLOCKS>;
var<workgroup> quarter_sums: array<i32, SLOT_THREADS>;

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

// Writes the record of a segment, if it is there; false if an element is not finite. All threads of a workgroup call it
// together, and again only after the call before.
fn quantise_segment(thread: u32, values: vec4<u32>, record: u32, live: bool) -> bool {
    let n = thread & 63u;
    let slot = thread >> 6u;
    let sizes = values & vec4<u32>(MAGNITUDE);
    magnitudes[thread] = max(max(sizes.x, sizes.y), max(sizes.z, sizes.w));
    workgroupBarrier();
    // Eight threads share a block.
    var a_block = 0u;
    for (var i = 0u; i < 8u; i++) {
        a_block = max(a_block, magnitudes[(thread & ~7u) + i]);
    }
    if (n & 7u) == 0u {
        block_magnitudes[thread >> 3u] = a_block;
    }
    workgroupBarrier();
    var a_segment = 0u;
    for (var j = 0u; j < 8u; j++) {
        a_segment = max(a_segment, block_magnitudes[8u * slot + j]);
    }
    let d = step_of(a_segment);
    let finite = is_finite(a_segment);
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
    quarter_sums[thread] = sum;
    workgroupBarrier();
    if !live {
        return true;
    }
    work[record + n] = q;
    if (n & 7u) == 0u {
        work[record + AT_U + (n >> 3u)] = u;
    }
    if (n & 3u) == 0u {
        let s = quarter_sums[thread] + quarter_sums[thread + 1u] + quarter_sums[thread + 2u] + quarter_sums[thread + 3u];
        work[record + AT_SUMS + (n >> 2u)] = bitcast<u32>(i32(u) * s);
    }
    if n == 0u {
        work[record + AT_M] = select(((d >> 16u) & 127u) | 128u, 0u, d == 0u);
        work[record + AT_E] = bitcast<u32>(exponent_of(d));
    }
    return finite;
}
