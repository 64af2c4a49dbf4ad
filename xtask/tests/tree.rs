//! Invariant: xtask builds without libtorch, or it could not set libtorch up.

use std::process::Command;

#[test]
fn xtask_does_not_link_libtorch() {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--package", "xtask", "--edges", "normal,build,dev", "--prefix", "none", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    let tree = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let names: Vec<&str> = tree.lines().filter_map(|l| l.split_whitespace().next()).collect();
    assert!(names.contains(&"nics-base"), "the tree is not xtask's:\n{tree}");
    for forbidden in ["tch", "torch-sys", "nics-core"] {
        assert!(!names.contains(&forbidden), "xtask depends on {forbidden}:\n{tree}");
    }
}
