//! Says which commit the program was built from, and when. Only where it is built to be used: else, every commit would build it anew.

use std::{
    env,
    process::Command,
    time::{Duration, SystemTime},
};

fn main() {
    for name in ["TRUNKLINE_BUILD_COMMIT", "TRUNKLINE_BUILD_TIME", "SOURCE_DATE_EPOCH"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    println!("cargo:rerun-if-changed=build.rs");
    let is_release = env::var("PROFILE").is_ok_and(|profile| profile == "release");
    let commit = env::var("TRUNKLINE_BUILD_COMMIT").ok().or_else(|| if is_release { head() } else { None });
    let time = env::var("TRUNKLINE_BUILD_TIME").ok().or_else(|| is_release.then(time));
    println!("cargo:rustc-env=TRUNKLINE_COMMIT={}", commit.unwrap_or_default());
    println!("cargo:rustc-env=TRUNKLINE_BUILT_AT={}", time.unwrap_or_default());
}

/// Nothing if this is no clone, as in a source package.
fn head() -> Option<String> {
    println!("cargo:rerun-if-changed=../../.git/logs/HEAD");
    let found = Command::new("git").args(["rev-parse", "HEAD"]).output().ok().filter(|found| found.status.success())?;
    Some(String::from_utf8(found.stdout).ok()?.trim().to_owned())
}

/// In RFC 3339. Builds that are to be the same again set `SOURCE_DATE_EPOCH`.
fn time() -> String {
    let given = env::var("SOURCE_DATE_EPOCH").ok().and_then(|text| text.parse().ok());
    let at = given.map_or_else(SystemTime::now, |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
    humantime::format_rfc3339_seconds(at).to_string()
}
