// Quantise of a value, or of what a gate lets through: a workgroup is one segment of one vector.

const X: u32 = 0u;
const OUT: u32 = 1u;
const COLS: u32 = 2u;
const VECTORS: u32 = 3u;
const STEP: u32 = 4u;
// The other factor of a gate.
const Y: u32 = 5u;

@compute @workgroup_size(64)
fn main(
    @builtin(local_invocation_index) thread: u32,
    @builtin(workgroup_id) group: vec3<u32>,
) {
    let cols = param(COLS);
    let segments = (cols + 255u) / 256u;
    let vector = group.z * param(VECTORS) + group.y;
    var values = vec4<u32>(0u);
    let first = 256u * group.x + 4u * thread;
    if first < cols {
        for (var i = 0u; i < 4u; i++) {
            values[i] = element_at(vector * cols + first + i);
        }
    }
    let record = param(OUT) + (vector * segments + group.x) * RECORD;
    if !quantise_segment(thread, values, record, true) {
        non_finite(param(STEP));
    }
}
