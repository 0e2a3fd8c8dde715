// Operations on elements, or on pairs of them (section 4 of the contract).

const A: u32 = 0u;
const B: u32 = 1u;
const OUT: u32 = 2u;
const WIDTH: u32 = 3u;
// A factor or a cap.
const NUMBER: u32 = 4u;

struct Element {
    i: u32,
    live: bool,
}

fn element(thread: u32, group: vec3<u32>, groups: vec3<u32>) -> Element {
    let i = (group.y * groups.x + group.x) * 64u + thread;
    return Element(i, i < param(WIDTH) * batch_rows());
}

@compute @workgroup_size(64)
fn mul(@builtin(local_invocation_index) thread: u32, @builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let e = element(thread, group, groups);
    if e.live {
        work[param(OUT) + e.i] = f_mul(work[param(A) + e.i], work[param(B) + e.i]);
    }
}

@compute @workgroup_size(64)
fn add(@builtin(local_invocation_index) thread: u32, @builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let e = element(thread, group, groups);
    if e.live {
        work[param(OUT) + e.i] = f_add(work[param(A) + e.i], work[param(B) + e.i]);
    }
}

@compute @workgroup_size(64)
fn scale(@builtin(local_invocation_index) thread: u32, @builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let e = element(thread, group, groups);
    if e.live {
        work[param(OUT) + e.i] = f_mul(work[param(A) + e.i], param(NUMBER));
    }
}

@compute @workgroup_size(64)
fn soft_cap(@builtin(local_invocation_index) thread: u32, @builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let e = element(thread, group, groups);
    if e.live {
        work[param(OUT) + e.i] = f_soft_cap(work[param(A) + e.i], param(NUMBER));
    }
}

@compute @workgroup_size(64)
fn silu(@builtin(local_invocation_index) thread: u32, @builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let e = element(thread, group, groups);
    if e.live {
        work[param(OUT) + e.i] = f_silu(work[param(A) + e.i]);
    }
}

@compute @workgroup_size(64)
fn gelu_tanh(@builtin(local_invocation_index) thread: u32, @builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let e = element(thread, group, groups);
    if e.live {
        work[param(OUT) + e.i] = f_gelu_tanh(work[param(A) + e.i]);
    }
}

// silu(a) * b: an activation whose result only a multiplication reads.
@compute @workgroup_size(64)
fn silu_mul(@builtin(local_invocation_index) thread: u32, @builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let e = element(thread, group, groups);
    if e.live {
        work[param(OUT) + e.i] = f_mul(f_silu(work[param(A) + e.i]), work[param(B) + e.i]);
    }
}

@compute @workgroup_size(64)
fn gelu_tanh_mul(@builtin(local_invocation_index) thread: u32, @builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let e = element(thread, group, groups);
    if e.live {
        work[param(OUT) + e.i] = f_mul(f_gelu_tanh(work[param(A) + e.i]), work[param(B) + e.i]);
    }
}
