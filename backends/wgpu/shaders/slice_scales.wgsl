// Half blocks of the weights of slice k, and their sub-scales and mins, one after the other.

fn slice_halves(k: u32) -> vec2<u32> {
    return vec2<u32>(2u * k, 2u * k + 1u);
}

fn slice_scales(b: u32, k: u32) -> vec4<i32> {
    let c0 = sub_scale(b, 2u * k);
    var c1 = c0;
    if HALVES {
        c1 = sub_scale(b, 2u * k + 1u);
    }
    var k0 = 0;
    var k1 = 0;
    if MINS {
        k0 = sub_min(b, 2u * k);
        k1 = k0;
        if HALVES {
            k1 = sub_min(b, 2u * k + 1u);
        }
    }
    return vec4<i32>(c0, c1, k0, k1);
}
