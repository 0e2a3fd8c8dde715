@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x < pairs_of_row() {
        turn(id.x, id.z);
    }
}
