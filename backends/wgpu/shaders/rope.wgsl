// Rope (section 4 of the contract), in place: a thread turns one pair.

const VALUE: u32 = 0u;
const WIDTH: u32 = 1u;
const HEAD_DIM: u32 = 2u;
const N_ROT: u32 = 3u;
const TABLE: u32 = 4u;
const HALF_SPLIT: u32 = 5u;

fn turn(thread: u32, row: u32) {
    let pairs = param(N_ROT) / 2u;
    let head = thread / pairs;
    let j = thread % pairs;
    let turned = param(HALF_SPLIT) != 0u;
    let at = param(VALUE) + row * param(WIDTH) + head * param(HEAD_DIM) + select(2u * j, j, turned);
    let other = at + select(1u, pairs, turned);
    let angle = param(TABLE) + row_position(row) * param(N_ROT) + 2u * j;
    let c = tables[angle];
    let s = tables[angle + 1u];
    let x0 = work[at];
    let x1 = work[other];
    work[at] = f_fma(x0, c, f_neg(f_mul(x1, s)));
    work[other] = f_fma(x0, s, f_mul(x1, c));
}

fn pairs_of_row() -> u32 {
    return param(WIDTH) / param(HEAD_DIM) * (param(N_ROT) / 2u);
}
