// Parameters of matrix products. A part is a run of rows of a weight, counted over all of its matrices. A launch may have
// several parts, of one encoding and one input dimension: whole matrices that multiply the same vectors.

const X: u32 = 0u;
const ROW_BYTES: u32 = 1u;
const ROWS: u32 = 2u;
const COLS: u32 = 3u;
const SEGMENTS: u32 = 4u;
const LANES_LOG2: u32 = 5u;
const PREFIX_BYTES: u32 = 6u;
const CHOICES: u32 = 7u;
const EXPERTS: u32 = 8u;
const SHARED: u32 = 9u;
// What is added to the result.
const ADD: u32 = 10u;
const PARTS: u32 = 11u;
const POSITIONS: u32 = 12u;

// Of each part, two vectors from the fourth on.
const FIRST_PART: u32 = 4u;
const PART_BYTES: u32 = 0u;
const PART_FIRST: u32 = 1u;
const PART_ROWS: u32 = 2u;
const PART_CONSTANTS: u32 = 3u;
const OUT: u32 = 4u;
const WIDTH: u32 = 5u;
const BIAS: u32 = 6u;
const STEP: u32 = 7u;

const NONE: u32 = 0xffffffffu;

// The parameters of the part in hand, read once.
var<private> part_low: vec4<u32>;
var<private> part_high: vec4<u32>;

fn part_param(i: u32) -> u32 {
    if i < 4u {
        return part_low[i];
    }
    return part_high[i - 4u];
}

fn take_part(i: u32) {
    part_low = params.v[FIRST_PART + 2u * i];
    part_high = params.v[FIRST_PART + 2u * i + 1u];
}

// Finds the part of a workgroup, of 2^rows_log2 rows; the first row of the part that it has.
fn choose_part(group: u32, rows_log2: u32) -> u32 {
    var rest = group;
    take_part(0u);
    for (var i = 1u; i < param(PARTS); i++) {
        let groups = (part_param(PART_ROWS) + (1u << rows_log2) - 1u) >> rows_log2;
        if rest < groups {
            break;
        }
        rest -= groups;
        take_part(i);
    }
    return rest << rows_log2;
}

struct Target {
    // Row of the weight, counted over all matrices.
    flat: u32,
    valid: bool,
    // Where the result goes, without what its token adds.
    out: u32,
}

// The row in hand: of the part, or of the expert that choice `z` names.
fn target_row(row: u32, z: u32) -> Target {
    let first = part_param(PART_FIRST);
    let part_rows = part_param(PART_ROWS);
    if param(CHOICES) == 0u {
        return Target(first + row, row < part_rows, first + row);
    }
    let rows = param(ROWS);
    let flat = work_word(param(EXPERTS) + z) * rows + row;
    return Target(flat, row < rows && flat >= first && flat - first < part_rows, z * rows + row);
}

// The vector that choice `z` reads.
fn choice_vector(z: u32) -> u32 {
    return select(z, z / param(CHOICES), param(SHARED) != 0u);
}

fn row_bytes_at(flat: u32) -> u32 {
    let first = part_param(PART_FIRST);
    let bytes = part_param(PART_BYTES) + (flat - first) * param(ROW_BYTES);
    if param(PREFIX_BYTES) == 0u {
        return bytes;
    }
    // A prefix stands in front of every matrix's first row.
    let prefixes = flat / param(ROWS) + 1u - (first + param(ROWS) - 1u) / param(ROWS);
    return bytes + prefixes * param(PREFIX_BYTES);
}

// A finished row of token `token`: bias, what is added, and out it goes.
fn deliver(row_target: Target, token: u32, product: u32) {
    var y = product;
    if part_param(BIAS) != NONE {
        y = f_add(y, second[part_param(BIAS) + row_target.flat]);
    }
    var place = row_target.out;
    if param(CHOICES) == 0u {
        place += token * part_param(WIDTH);
    }
    if param(ADD) != NONE {
        y = f_add(y, work_word(param(ADD) + place));
    }
    set_word(part_param(OUT) + place, y);
}
