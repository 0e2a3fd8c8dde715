//! `hoist op` over raw files, against values worked out here.

use std::path::Path;

use crate::support::run;

fn write(folder: &Path, name: &str, values: &[f32]) -> String {
    let path = folder.join(name);
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    std::fs::write(&path, bytes).unwrap();
    path.to_str().unwrap().to_owned()
}

fn read(path: &Path) -> Vec<f32> {
    let bytes = std::fs::read(path).unwrap();
    bytes
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect()
}

/// Runs an operation and gives its output.
fn op(folder: &Path, arguments: &[&str]) -> Vec<f32> {
    let output = folder.join("y");
    let mut all = vec!["op"];
    all.extend(arguments);
    all.extend(["--output", output.to_str().unwrap()]);
    let ran = run(&all);
    assert_eq!(ran.code, Some(0), "{arguments:?}: {}", ran.stderr);
    read(&output)
}

#[test]
fn a_float_product_of_small_integers_is_exact_in_every_shape() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    // More vectors than rows, and more rows than vectors.
    for (rows, cols, n) in [(3usize, 64usize, 7usize), (9, 32, 2), (1, 32, 1)] {
        let w: Vec<f32> = (0..rows * cols).map(|i| (i % 7) as f32 - 3.0).collect();
        let x: Vec<f32> = (0..n * cols).map(|i| (i % 5) as f32 - 2.0).collect();
        let (weights, input) = (write(folder, "w", &w), write(folder, "x", &x));
        let (r, c) = (rows.to_string(), cols.to_string());
        let y = op(
            folder,
            &[
                "matmul",
                "--encoding",
                "f32",
                "--rows",
                &r,
                "--cols",
                &c,
                "--weights",
                &weights,
                "--input",
                &input,
            ],
        );
        let expected: Vec<f32> = x
            .chunks(cols)
            .flat_map(|x| {
                w.chunks(cols)
                    .map(move |w| w.iter().zip(x).map(|(w, x)| w * x).sum())
            })
            .collect();
        assert_eq!(y, expected, "{rows} x {cols}, {n} vectors");
    }
}

#[test]
fn a_block_of_q4_0_is_its_scale_times_its_codes() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    // Scale 0.5 (f16 0x3800), then byte i holds codes i and 15 - i.
    let mut block = vec![0x00, 0x38];
    block.extend((0..16u8).map(|i| i | (15 - i) << 4));
    let input = folder.join("w");
    std::fs::write(&input, block.repeat(40)).unwrap();
    let y = op(
        folder,
        &[
            "dequantize",
            "--encoding",
            "q4_0",
            "--input",
            input.to_str().unwrap(),
        ],
    );
    let low = (0..16).map(|i| 0.5 * (i as f32 - 8.0));
    let high = (0..16).map(|i| 0.5 * (7.0 - i as f32));
    let expected: Vec<f32> = low.chain(high).collect();
    assert_eq!(y, expected.repeat(40));
}

#[test]
fn norms_and_functions_have_their_values() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let x: Vec<f32> = (0..64).map(|i| if i % 2 == 0 { 2.0 } else { -2.0 }).collect();
    let input = write(folder, "x", &x);
    let halves: Vec<f32> = x.iter().map(|x| x / 2.0).collect();
    assert_eq!(
        op(
            folder,
            &["rms_norm", "--cols", "64", "--eps", "0", "--input", &input]
        ),
        halves
    );
    assert_eq!(
        op(
            folder,
            &["layer_norm", "--cols", "64", "--eps", "0", "--input", &input]
        ),
        halves
    );
    let exact = |f: fn(f64) -> f64| -> Vec<f64> { x.iter().map(|x| f(f64::from(*x))).collect() };
    for (name, expected) in [
        ("exp", exact(f64::exp)),
        ("tanh", exact(f64::tanh)),
        ("silu", exact(|x| x / (1.0 + (-x).exp()))),
    ] {
        for (y, expected) in op(folder, &[name, "--input", &input]).iter().zip(expected) {
            assert!(
                (f64::from(*y) - expected).abs() < 1e-6,
                "{name}: {y} for {expected}"
            );
        }
    }
}

#[test]
fn files_of_the_wrong_size_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let input = write(folder, "x", &[1.0; 65]);
    let out = folder.join("y");
    let ran = run(&[
        "op",
        "rms_norm",
        "--cols",
        "64",
        "--input",
        &input,
        "--output",
        out.to_str().unwrap(),
    ]);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(ran.stderr.contains("260 bytes"), "{}", ran.stderr);
    assert!(!out.exists());
}

#[test]
fn numbers_that_no_memory_holds_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("x");
    std::fs::write(&input, vec![0u8; 1 << 20]).unwrap();
    let (input, output) = (input.to_str().unwrap(), folder.path().join("y"));
    let files = ["--input", input, "--output", output.to_str().unwrap()];
    let most = "4294967295";
    let half = "2147483648";
    for arguments in [
        &["rms_norm", "--cols", most][..],
        &["rms_norm", "--cols", "262144"],
        &["layer_norm", "--cols", "131072"],
        &["dequantize", "--encoding", "f32", "--cols", "262144"],
        &["dequantize", "--encoding", "q8_0", "--cols", "4294967264"],
        &[
            "matmul",
            "--encoding",
            "f32",
            "--rows",
            most,
            "--cols",
            most,
            "--weights",
            "/dev/null",
        ],
        &[
            "matmul",
            "--encoding",
            "f32",
            "--rows",
            half,
            "--cols",
            half,
            "--weights",
            "/dev/null",
        ],
    ] {
        let ran = run(&[&["op"], arguments, &files].concat());
        assert_eq!(ran.code, Some(2), "{arguments:?}: {}", ran.stderr);
        assert!(ran.stderr.starts_with("error: "), "{}", ran.stderr);
        assert!(!output.exists());
    }
    assert_eq!(
        run(&[&["op", "rms_norm", "--cols", "4096"], &files[..]].concat()).code,
        Some(0)
    );
    let endless = [
        "op",
        "silu",
        "--input",
        "/dev/zero",
        "--output",
        output.to_str().unwrap(),
    ];
    assert_eq!(run(&endless).code, Some(7));
}
