// Attention (section 4 of the contract). `attend`: a workgroup is one split of one query head of one token. `merge`: a
// workgroup is one query head of one token. A token that sees one split has no need of `merge`.

const QUERY: u32 = 0u;
const OUT: u32 = 1u;
const HEADS: u32 = 2u;
const SCALE: u32 = 3u;
const WINDOW: u32 = 4u;
const SOFT_CAP: u32 = 5u;
// `[token][head][split][KV_HEAD_DIM + 2]`: o, then m and l.
const PARTIAL: u32 = 6u;
const SPLITS: u32 = 7u;

const SPLIT: u32 = 256u;
const NO_NUMBER: u32 = 0xffffffffu;

var<workgroup> query: array<u32, MAX_HEAD_DIM>;
var<workgroup> scores: array<u32, 256>;
var<workgroup> folded: array<u32, 256>;

struct Visible {
    first: u32,
    last: u32,
}

fn visible(row: u32) -> Visible {
    let last = row_position(row);
    let seen = min(param(WINDOW), last + 1u);
    return Visible(last + 1u - seen, last);
}

fn partial_at(row: u32, head: u32, split: u32) -> u32 {
    return param(PARTIAL) + ((row * param(HEADS) + head) * param(SPLITS) + split) * (param(KV_HEAD_DIM) + 2u);
}

@compute @workgroup_size(256)
fn attend(
    @builtin(local_invocation_index) thread: u32,
    @builtin(workgroup_id) group: vec3<u32>,
) {
    let head = group.y;
    let row = group.z;
    let head_dim = param(KV_HEAD_DIM);
    let seen = visible(row);
    let first_split = seen.first / SPLIT;
    let split = first_split + group.x;
    if split > seen.last / SPLIT {
        return;
    }
    let base = split * SPLIT;
    let kv_head = head / (param(HEADS) / param(KV_HEADS));
    let keys = cache_row(row_sequence(row), kv_head, base);
    let words = position_words();
    let vector = (row * param(HEADS) + head) * head_dim;
    for (var i = thread; i < head_dim; i += 256u) {
        query[i] = work[param(QUERY) + vector + i];
    }
    workgroupBarrier();
    let position = base + thread;
    let sees = position >= seen.first && position <= seen.last;
    var score = NO_NUMBER;
    if sees {
        let key = keys + thread * words;
        score = 0u;
        for (var i = 0u; i < head_dim; i++) {
            score = f_fma(query[i], cached(key, i), score);
        }
        score = f_mul(score, param(SCALE));
        if param(SOFT_CAP) != NO_NUMBER {
            score = f_soft_cap(score, param(SOFT_CAP));
        }
    }
    // Keys of numbers are above 0; what is not seen, and what is no number, has none.
    folded[thread] = select(f_key(score), 0u, is_nan(score));
    for (var h = 128u; h > 0u; h = h >> 1u) {
        workgroupBarrier();
        if thread < h {
            folded[thread] = max(folded[thread], folded[thread + h]);
        }
    }
    workgroupBarrier();
    let largest = folded[0];
    workgroupBarrier();
    let m = select(~largest, largest ^ SIGN, (largest & SIGN) != 0u);
    var weight = 0u;
    if sees {
        weight = f_exp(f_sub(score, m));
    }
    scores[thread] = weight;
    workgroupBarrier();
    if thread < 64u {
        var acc = f_add(0u, scores[thread]);
        acc = f_add(acc, scores[thread + 64u]);
        acc = f_add(acc, scores[thread + 128u]);
        folded[thread] = f_add(acc, scores[thread + 192u]);
    }
    for (var h = 32u; h > 0u; h = h >> 1u) {
        workgroupBarrier();
        if thread < h {
            folded[thread] = f_add(folded[thread], folded[thread + h]);
        }
    }
    workgroupBarrier();
    let sum = folded[0];
    let alone = first_split == seen.last / SPLIT;
    let low = max(seen.first, base) - base;
    let high = min(seen.last, base + SPLIT - 1u) - base;
    let values = param(VALUES_AT) + keys;
    let part = partial_at(row, head, group.x);
    for (var i = thread; i < head_dim; i += 256u) {
        var o = 0u;
        for (var p = low; p <= high; p++) {
            o = f_fma(scores[p], cached(values + p * words, i), o);
        }
        if alone {
            // Merged with nothing else: f = 1, and -0 becomes +0.
            work[param(OUT) + vector + i] = f_mul(f_add(o, 0u), f_div(ONE, sum));
        } else {
            work[part + i] = o;
        }
    }
    if thread == 0u && !alone {
        work[part + head_dim] = m;
        work[part + head_dim + 1u] = sum;
    }
}

@compute @workgroup_size(64)
fn merge(
    @builtin(local_invocation_index) thread: u32,
    @builtin(workgroup_id) group: vec3<u32>,
) {
    let head = group.y;
    let row = group.z;
    let head_dim = param(KV_HEAD_DIM);
    let seen = visible(row);
    let splits = seen.last / SPLIT - seen.first / SPLIT + 1u;
    if splits == 1u {
        return;
    }
    let part = partial_at(row, head, 0u);
    let stride = head_dim + 2u;
    var largest = 0u;
    for (var s = 0u; s < splits; s++) {
        let m = work[part + s * stride + head_dim];
        largest = max(largest, select(f_key(m), 0u, is_nan(m)));
    }
    let m_all = select(~largest, largest ^ SIGN, (largest & SIGN) != 0u);
    let out = param(OUT) + (row * param(HEADS) + head) * head_dim;
    for (var i = thread; i < head_dim; i += 64u) {
        var sum = 0u;
        var o = 0u;
        for (var s = 0u; s < splits; s++) {
            let at = part + s * stride;
            let f = f_exp(f_sub(work[at + head_dim], m_all));
            sum = f_fma(work[at + head_dim + 1u], f, sum);
            o = f_fma(work[at + i], f, o);
        }
        work[out + i] = f_mul(o, f_div(ONE, sum));
    }
}
