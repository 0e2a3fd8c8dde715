// Parameters of matrix products. A part is a run of rows of a weight, counted over all of its matrices.

const X: u32 = 0u;
const OUT: u32 = 1u;
const ROW_BYTES: u32 = 2u;
const ROWS: u32 = 3u;
const COLS: u32 = 4u;
const PART_BYTES: u32 = 5u;
const PART_FIRST: u32 = 6u;
const PART_ROWS: u32 = 7u;
const PART_CONSTANTS: u32 = 8u;
const LANES_LOG2: u32 = 9u;
const WIDTH: u32 = 10u;
const SEGMENTS: u32 = 11u;
const BIAS: u32 = 12u;
const STEP: u32 = 13u;
const CHOICES: u32 = 14u;
const EXPERTS: u32 = 15u;
const SHARED: u32 = 16u;
const PREFIX_BYTES: u32 = 17u;

const NONE: u32 = 0xffffffffu;

struct Target {
    // Row of the weight, counted over all matrices.
    flat: u32,
    valid: bool,
    // Where the result goes, without the token's offset.
    out: u32,
}

// The row in hand: of the part, or of the expert that choice `z` names.
fn target_row(row: u32, z: u32) -> Target {
    let first = param(PART_FIRST);
    let part_rows = param(PART_ROWS);
    if param(CHOICES) == 0u {
        return Target(first + row, row < part_rows, param(OUT) + first + row);
    }
    let rows = param(ROWS);
    let flat = work[param(EXPERTS) + z] * rows + row;
    return Target(flat, row < rows && flat >= first && flat - first < part_rows, param(OUT) + z * rows + row);
}

// The vector that choice `z` reads.
fn choice_vector(z: u32) -> u32 {
    return select(z, z / param(CHOICES), param(SHARED) != 0u);
}

fn row_bytes_at(flat: u32) -> u32 {
    let first = param(PART_FIRST);
    // A prefix stands in front of every matrix's first row.
    let prefixes = (flat / param(ROWS) + 1u - (first + param(ROWS) - 1u) / param(ROWS)) * param(PREFIX_BYTES);
    return param(PART_BYTES) + (flat - first) * param(ROW_BYTES) + prefixes;
}
